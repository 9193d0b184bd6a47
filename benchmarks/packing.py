"""Best-fit packing against TRL's and llm-foundry's first-fit: how full the rows are, and seconds.

    python benchmarks/packing.py [--rounds 5]

Conversations of lognormal lengths (σ = 1, none longer than a row), all in one batch, from tokens that lie end to end to
rows of joined tokens. Ours is ``best_fit`` and ``ChatRows``, as conversion uses them; ``ChatRows`` also carries which
tokens have loss, and packs windows of 16.8 million tokens in rounds. TRL's is ``pack_dataset(strategy="bfd")`` from
Arrow to Arrow; llm-foundry's is what ``BinPackCollator`` does inside, which looks at every row for every conversation
and is left out where that would take hours. Sides take turns, each peer in a process of its own. Before timing, the
rows of every side are checked: each token once, no row too long, no conversation cut. Prints a table, writes
``benchmarks/results/packing.json``.

The peers' environments, made from the repository's root::

    UV_PROJECT_ENVIRONMENT=/tmp/foundry uv sync --frozen --no-default-groups --extra foundry --no-install-project
    uv pip install --python /tmp/foundry/bin/python "setuptools<81"  # llm-foundry imports pkg_resources
    uv venv /tmp/trl && uv pip install --python /tmp/trl/bin/python trl torch
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import numpy as np
from peers.turns import Peer, version_of
from side_by_side import alternate, save, show, speed_ratio, spread

from cheaper.data.pack import best_fit
from cheaper.data.rows import ChatRows, Position

# Conversations, tokens of a row, median tokens of a conversation: a million of 2,048 would be 14 GB, many times over.
SETTINGS = ((20_000, 4_096, 256), (20_000, 32_768, 2_048), (1_000_000, 4_096, 128), (1_000_000, 32_768, 128))
MOST_FIRST_FIT = 100_000  # conversations for llm-foundry


class Chats:
    """Conversations whose tokens are numbered through, so that it shows where each token went.

    Args:
        lengths: int64 [N].
        capacity: Tokens of a row.
    """

    def __init__(self, lengths: np.ndarray, capacity: int):
        self.lengths, self.capacity = lengths, capacity
        self.ends = lengths.cumsum()
        self.tokens = np.arange(self.ends[-1], dtype=np.int32)
        self.loss = np.ones(len(self.tokens), bool)

    def join(self) -> list[np.ndarray]:
        """Rows by ``best_fit``."""
        begins, ends = (self.ends - self.lengths).tolist(), self.ends.tolist()
        return [
            np.concatenate([self.tokens[begins[i] : ends[i]] for i in row])
            for row in best_fit(self.lengths, self.capacity)
        ]

    def rows(self) -> list[np.ndarray]:
        """Rows by ``ChatRows``."""
        chats = ChatRows(self.capacity, True, Position(0, 0, 0))
        chats.add(self.tokens, self.lengths, np.arange(len(self.lengths)), self.loss)
        return [row["input_ids"] for row, _ in chats.rows(last=True) if row]

    def fill(self, tokens: np.ndarray, lengths: np.ndarray) -> float:
        """Checks rows, given end to end, and says which share of them is tokens."""
        assert lengths.max() <= self.capacity
        seen = np.zeros(len(self.tokens), bool)
        seen[tokens] = True
        assert seen.all()
        assert len(tokens) == lengths.sum() == len(self.tokens)
        jumps = np.diff(tokens, prepend=-2) != 1
        jumps[lengths.cumsum()[:-1]] = True  # rows begin there
        begins = np.zeros(len(tokens), bool)
        begins[self.ends - self.lengths] = True
        assert begins[tokens[jumps]].all()  # no conversation begins inside
        return len(tokens) / (self.capacity * len(lengths))

    def fill_of(self, rows: list[np.ndarray]) -> float:
        """The same of rows in a list."""
        return self.fill(np.concatenate(rows), np.array([len(row) for row in rows]))


def lognormal(count: int, capacity: int, median: int) -> np.ndarray:
    """Lengths of conversations, int64 [count], 1 … ``capacity``."""
    lengths = np.random.default_rng(17).lognormal(np.log(median), 1, count)
    return lengths.astype(np.int64).clip(1, capacity)


def compare(options: argparse.Namespace, count: int, capacity: int, median: int) -> dict[str, object]:
    """Fill and seconds of every side for one setting."""
    chats = Chats(lognormal(count, capacity, median), capacity)
    sides: dict[str, Callable[[], object]] = {"best_fit": chats.join, "ChatRows": chats.rows}
    fills = {name: chats.fill_of(side()) for name, side in sides.items()}
    peers = {"TRL": (options.trl, "trl_packing.py"), "llm-foundry": (options.foundry, "foundry_packing.py")}
    if count > MOST_FIRST_FIT:
        del peers["llm-foundry"]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/lengths.npy", chats.lengths)
        for name, (python, script) in peers.items():
            sides[name] = Peer(python, script, f"{folder}/lengths.npy", capacity, f"{folder}/rows.npz")
            with np.load(f"{folder}/rows.npz") as rows:
                fills[name] = chats.fill(rows["tokens"], rows["lengths"])
    times = alternate(sides, options.rounds)
    for name in peers:
        sides[name].stop()
    return {
        "conversations": count,
        "row_tokens": capacity,
        "median_tokens": median,
        "tokens": len(chats.tokens),
        "fill": {name: round(fill, 5) for name, fill in fills.items()},
        "seconds": {name: spread(seconds) for name, seconds in times.items()},
        "best_fit_against": {name: speed_ratio(seconds, times["best_fit"]) for name, seconds in times.items()},
        "ChatRows_against": {name: speed_ratio(seconds, times["ChatRows"]) for name, seconds in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl", default="/tmp/trl/bin/python", help="the interpreter of TRL's environment")
    parser.add_argument(
        "--foundry", default="/tmp/foundry/bin/python", help="the interpreter of llm-foundry's environment"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    peers = {"trl": version_of("trl", options.trl), "llm-foundry": version_of("llm-foundry", options.foundry)}
    results = []
    for setting in SETTINGS:
        results.append(compare(options, *setting))
        save("packing", {"peers": peers, "rounds": options.rounds, "settings": results}, ("numpy",))
    table = [("conversations × row", "side", "full", "seconds", "best_fit against it", "ChatRows against it")]
    for result in results:
        for name, fill in result["fill"].items():
            setting = f"{result['conversations']:,} × {result['row_tokens']:,}"
            ratios = [result[f"{ours}_against"][name] for ours in ("best_fit", "ChatRows")]
            figures = [f"{ratio['median']:.3g} ({ratio['min']:.3g}–{ratio['max']:.3g})" for ratio in ratios]
            table.append((setting, name, f"{fill:.3%}", f"{result['seconds'][name]['median']:.3g}", *figures))
    show(table)


if __name__ == "__main__":
    main()
