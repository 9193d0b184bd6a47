"""The training data loader against llm-foundry's and plain streaming, over the same rows: tokens per second.

    python benchmarks/loader.py [--rows 20000] [--rounds 7]

Two streams mixed 0.7 to 0.3 and shuffled, rows of 2,048 tokens of 128,256 words, batches of 16, one process, no
workers, shards in the page cache. Ours is ``build_dataloader``, whose batches are what training gets. llm-foundry's is
``build_text_dataloader`` over shards as its converter writes them. Plain is streaming's ``StreamingDataset`` over a
copy of our shards in a ``DataLoader`` that stacks ``input_ids`` and does nothing else: they stay uint32. A turn is an
epoch; sides take turns, each peer in a process of its own. Before timing, our epoch is checked row by row: each once,
with its ids, the mixture as asked all the way. Prints a table, writes ``benchmarks/results/loader.json``.

The peer's environment, made from the repository's root::

    UV_PROJECT_ENVIRONMENT=/tmp/foundry uv sync --frozen --no-default-groups --extra foundry --no-install-project
    uv pip install --python /tmp/foundry/bin/python "setuptools<81"  # llm-foundry imports pkg_resources
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peers.turns import Peer, version_of
from side_by_side import alternate, save, show, speed_ratio, spread
from streaming import MDSWriter

from cheaper.config import DataConfig, StreamConfig
from cheaper.data.manifest import Manifest
from cheaper.data.rows import Position
from cheaper.data.shards import ShardWriter
from cheaper.data.streams import build_dataloader

WORDS = 128_256
LENGTH = 2_048
BATCH = 16
SEED = 17
SHARES = {"web": 0.7, "code": 0.3}


def random_rows(count: int) -> dict[str, np.ndarray]:
    """Each stream's rows, [rows, LENGTH] uint32."""
    generator = np.random.default_rng(SEED)
    return {
        name: generator.integers(1, WORDS, size=(round(share * count), LENGTH), dtype=np.uint32)
        for name, share in SHARES.items()
    }


def write_ours(folder: Path, rows: np.ndarray) -> Manifest:
    """Writes rows as conversion does; each is one document."""
    folder.mkdir(parents=True)
    made_from = {"source": {}, "format": "text", "field": "text"}
    manifest = Manifest("random", "", WORDS, None, 0, LENGTH, **made_from)
    writer = ShardWriter(folder, None, manifest)
    lengths = np.array([LENGTH])
    writer.write_all(({"input_ids": ids, "lengths": lengths}, Position(i, 0, i)) for i, ids in enumerate(rows))
    writer.finish(Position(len(rows), 0, len(rows)), 0)
    return manifest


def write_as_llm_foundry(folder: Path, rows: np.ndarray) -> None:
    """Writes rows as llm-foundry's ``ConcatTokensDataset`` and converter do."""
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:int32"}) as writer:
        for ids in rows.astype(np.int32):
            writer.write({"tokens": ids})


def our_loader(root: Path, manifests: dict[str, Manifest]) -> Iterable[dict[str, torch.Tensor]]:
    streams = {name: StreamConfig(proportion=share) for name, share in SHARES.items()}
    data = DataConfig(name="benchmark", root=str(root), tokenizer="random", streams=streams, num_workers=0)
    return build_dataloader(data, manifests, BATCH, SEED).dataloader


def settings(root: Path) -> str:
    """What a peer is told."""
    streams = {name: {"local": f"{root}/{name}", "proportion": share} for name, share in SHARES.items()}
    return json.dumps({"streams": streams, "batch_size": BATCH, "seed": SEED, "sequence_length": LENGTH})


def check(loader: Iterable[dict[str, torch.Tensor]], rows: dict[str, np.ndarray]) -> None:
    """One epoch of ours: each row once, with its ids, after every batch the mixture within 0.5 points and a row."""
    expected = np.concatenate(list(rows.values()))
    streams = np.repeat(np.arange(len(rows)), [len(stream) for stream in rows.values()])
    seen, order = np.zeros(len(expected), int), []
    for batch in loader:
        samples = np.array(batch["sample"])
        seen[samples] += 1
        order.extend(batch["stream"])
        assert np.array_equal(batch["input_ids"].numpy(), expected[samples])
        assert np.array_equal(batch["labels"].numpy(), expected[samples])
        assert np.array_equal(batch["stream"], streams[samples])
        assert set(batch["row_tokens"]) == {LENGTH}
        assert abs(np.mean(np.array(order) == 0) - SHARES["web"]) <= 0.005 + 1 / len(order)
    assert (seen == 1).all()


def epoch(loader: Iterable[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Rows, and the sum of their first tokens."""
    rows = total = 0
    for batch in loader:
        rows += len(batch["input_ids"])
        total += int(batch["input_ids"][:, 0].sum())
    return rows, total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--foundry", default="/tmp/foundry/bin/python", help="the interpreter of llm-foundry's environment"
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="benchmark-loader-"))
    rows = random_rows(options.rows)
    manifests = {name: write_ours(folder / "ours" / name, stream) for name, stream in rows.items()}
    for name, stream in rows.items():
        write_as_llm_foundry(folder / "foundry" / name, stream)
    shutil.copytree(folder / "ours", folder / "plain")  # streaming lets no two datasets share a folder

    ours = our_loader(folder / "ours", manifests)
    check(ours, rows)
    plain = Peer(sys.executable, "plain_loader.py", settings(folder / "plain"))
    foundry = Peer(options.foundry, "foundry_loader.py", settings(folder / "foundry"))
    sides = {"ours": lambda: epoch(ours), "plain StreamingDataset": plain, "llm-foundry": foundry}
    expected = (options.rows, sum(int(stream[:, 0].sum(dtype=np.int64)) for stream in rows.values()))
    for name, side in sides.items():
        assert side() == expected, name
    times = alternate(sides, options.rounds)
    plain.stop(), foundry.stop()
    shutil.rmtree(folder)

    tokens = options.rows * LENGTH
    speeds = {name: spread([tokens / each for each in seconds]) for name, seconds in times.items()}
    ratios = {name: speed_ratio(seconds, times["ours"]) for name, seconds in times.items()}
    peers = {package: version_of(package, options.foundry) for package in ("llm-foundry", "mosaicml-streaming")}
    conditions = {"peers": peers, "rows": options.rows, "rounds": options.rounds}
    result = {**conditions, "tokens_per_second": speeds, "ours_against": ratios}
    save("loader", result, ("torch", "mosaicml-streaming"))
    table = [("loader", "tokens/s", "ours against it", "least to most")]
    for name, ratio in ratios.items():
        speed = f"{speeds[name]['median'] / 1e6:.1f}M"
        table.append((name, speed, f"{ratio['median']:.2f}", f"{ratio['min']:.2f}–{ratio['max']:.2f}"))
    show(table)


if __name__ == "__main__":
    main()
