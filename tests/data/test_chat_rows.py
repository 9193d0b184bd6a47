"""Chats from raw rows to shards: whole, packed or alone, with their loss, whatever happens on the way."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data import rows
from cheaper.data.chat import ChatTemplate
from cheaper.data.convert import convert_mixture
from cheaper.data.pack import best_fit
from cheaper.data.rows import ChatRows, Position, run_lengths
from cheaper.data.tokenize import load_tokenizer
from cheaper.errors import UserError
from tests.conftest import WORDS, kill, rows_of, train_tokenizer

ROW = 64


def chats(count: int, seed: int) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))

    return [
        [{"role": role, "content": words()} for _ in range(rng.randint(1, 2)) for role in ("user", "assistant")]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Raw chats, among them rows that are none, and a tokenizer with a template of its own."""
    folder = tmp_path_factory.mktemp("chats")
    train_tokenizer(folder / "tokenizer", [" ".join(WORDS)] * 5)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    lines = [json.dumps({"messages": chat}) for chat in chats(3000, seed=0)]
    for place in range(5, 3000, 211):
        lines[place] = json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]})
    lines[7] = json.dumps(
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "word " * 90}]}
    )
    (folder / "raw.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def data(folder: Path, root: Path, **settings) -> DataConfig:
    stream = StreamConfig(source=SourceConfig(path=f"{folder}/raw.jsonl"), format="messages")
    tokenizer = f"{folder}/tokenizer"
    given = {"chat_template": "tokenizer", **settings}
    return DataConfig(name="chats", root=str(root), tokenizer=tokenizer, streams={"s": stream}, **given)


def documents(shards: list[dict[str, np.ndarray]]) -> list[tuple[list[int], list[bool]]]:
    found = []
    for row in shards:
        loss = np.repeat(np.arange(len(row["loss_lengths"])) % 2 == 1, row["loss_lengths"])
        borders = np.cumsum(row["lengths"])[:-1]
        pieces = zip(np.split(row["input_ids"], borders), np.split(loss, borders), strict=True)
        found += [(ids.tolist(), mask.tolist()) for ids, mask in pieces]
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_every_chat_is_in_the_shards_once_with_its_loss(folder, tmp_path, monkeypatch, packing, too_long):
    monkeypatch.setattr(rows, "WINDOW_TOKENS", 20_000)
    config = data(folder, tmp_path, packing=packing, too_long=too_long)
    manifest = convert_mixture(config, ROW, processes=1)["s"]
    tokenizer = load_tokenizer(config.tokenizer)
    template = ChatTemplate.load("tokenizer", config.tokenizer, tokenizer)
    expected = []
    for line in (folder / "raw.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        if len(messages) > 1:
            chat = template.encode(messages)
            if len(chat.ids) <= ROW or too_long == "cut":
                expected.append((chat.ids[:ROW].tolist(), chat.loss[:ROW].tolist()))
    shards = rows_of(tmp_path / "s")
    got = documents(shards)
    assert sorted(got) == sorted(expected)
    if not packing:
        assert got == expected
        assert all(len(row["lengths"]) == 1 for row in shards)
    else:
        assert manifest.tokens / (manifest.rows * ROW) > 0.88  # most chats are longer than half a row
        assert max(len(row["input_ids"]) for row in shards) <= ROW
    assert manifest.documents == len(expected)
    skipped = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in skipped}
    assert reasons[5] == "no assistant turn"
    assert (7 in reasons) == (too_long == "drop")
    assert len(skipped) == manifest.skipped == 3000 - len(expected)


@pytest.mark.parametrize("seed", range(4))
def test_packing_goes_on_from_the_end_of_any_round(monkeypatch, seed):
    """However the chats are brought, and wherever a conversion was killed, the rows are the same."""
    monkeypatch.setattr(rows, "WINDOW_TOKENS", 2_000)
    monkeypatch.setattr(rows, "ROUNDS", 3)
    rng = random.Random(seed)
    lengths = [rng.randint(1, ROW) if rng.random() < 0.5 else rng.randint(ROW // 2, ROW) for _ in range(2000)]

    def pack(start: Position) -> list:
        maker, made = ChatRows(ROW, True, start), []
        held = {ordinal for ordinal, _ in start.held}
        left = [i for i in range(2000) if i >= start.row or i in held]
        while left:
            some, left = left[: (count := rng.randint(1, 300))], left[count:]
            tokens = np.concatenate([np.full(lengths[i], i) for i in some])
            sizes = np.array([lengths[i] for i in some])
            maker.add(tokens, sizes, np.array(some), np.ones(len(tokens), bool))
            made += maker.rows()
        return made + list(maker.rows(last=True))

    whole = pack(Position(0, 0, 0))
    ids = [set(row["input_ids"].tolist()) for row, _ in whole if row]
    assert sorted(i for row in ids for i in row) == list(range(2000))
    assert all(list(row["input_ids"]) == sorted(row["input_ids"]) for row, _ in whole if row)
    places = [(i, place) for i, (row, place) in enumerate(whole) if row is None]
    assert len(places) > 20
    waited = [rounds for _, place in places for _, rounds in place.held]
    assert max(waited) <= 3
    for i, place in places:
        assert [r and r["input_ids"].tolist() for r, _ in pack(place)] == [
            r and r["input_ids"].tolist() for r, _ in whole[i + 1 :]
        ]
        assert place.documents == sum(len(row["lengths"]) for row, _ in whole[:i] if row)


RUN = """
import sys
from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data import convert, rows
convert.BATCH_BYTES, rows.WINDOW_TOKENS = 20_000, 12_000
folder, root = sys.argv[1:]
stream = StreamConfig(source=SourceConfig(path=folder + "/raw.jsonl"), format="messages")
data = DataConfig(name="m", root=root, tokenizer=folder + "/tokenizer", chat_template="tokenizer", packing=True)
data.streams["s"] = stream
if __name__ == "__main__":
    convert.convert_mixture(data, 64, 2)
"""


def test_killed_conversions_of_packed_chats_go_on_to_the_same_shards(folder, tmp_path):
    script = tmp_path / "convert_it.py"
    script.write_text(RUN)

    def command(root: str) -> list[str]:
        return [sys.executable, str(script), str(folder), str(tmp_path / root)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    whole, killed = tmp_path / "whole" / "s", tmp_path / "killed" / "s"
    assert len(list(whole.glob("*.mds"))) > 6
    for count in (2, 5):
        victim = subprocess.Popen(command("killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(list(killed.glob("*.mds"))) < count:
            assert victim.poll() is None, victim.communicate()
        kill(victim)
        assert not (killed / "index.json").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name


def test_packing_and_template_belong_to_the_shards(folder, tmp_path):
    convert_mixture(data(folder, tmp_path), ROW, processes=1)
    for change, key in (({"packing": True}, "packing"), ({"too_long": "cut"}, "too_long")):
        with pytest.raises(UserError, match=f"was made with {key} "):
            convert_mixture(data(folder, tmp_path, **change), ROW, processes=1)
    other = tmp_path / "other.jinja"
    other.write_text((folder / "tokenizer" / "chat_template.jinja").read_text() + "\n")
    with pytest.raises(UserError, match="was made with chat_template "):
        convert_mixture(data(folder, tmp_path, chat_template=str(other)), ROW, processes=1)


def test_chats_that_are_none_are_one_error(folder, tmp_path):
    (tmp_path / "raw.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": 3}]}) + "\n")
    config = data(folder, tmp_path / "mds")
    config.streams["s"].source.path = f"{tmp_path}/raw.jsonl"
    with pytest.raises(
        UserError, match="gave no text; all 1 rows were skipped, the first: the content of a message is int"
    ):
        convert_mixture(config, ROW, processes=1)


def test_run_lengths_by_hand():
    for flags, expected in (("", [0]), ("0", [1]), ("1", [0, 1]), ("0011101", [2, 3, 1, 1]), ("110", [0, 2, 1])):
        assert run_lengths(np.array([flag == "1" for flag in flags], bool)).tolist() == expected


def test_best_fit_by_hand():
    # 7 and 3, 5 and 4, then 4 and 2 in what is left: the fullest row that still has room takes each.
    assert best_fit(np.array([4, 7, 5, 2, 3, 4]), 10) == [[1, 4], [0, 2], [3, 5]]
    with pytest.raises(ValueError, match="lengths are 3 … 11, expected 1 … 10"):
        best_fit(np.array([3, 11]), 10)
    assert best_fit(np.array([], int), 10) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_the_search_of_every_row(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, size=100)
    slow: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable"):
        room = [30 - lengths[row].sum() for row in slow]
        fits = [left for left in room if left >= lengths[index]]
        if fits:
            slow[room.index(min(fits))].append(index)
        else:
            slow.append([index])
    fast = best_fit(lengths, 30)
    assert sorted(i for row in fast for i in row) == list(range(100))
    assert sorted(lengths[row].sum() for row in fast) == sorted(lengths[row].sum() for row in slow)


@pytest.mark.parametrize(("median", "sigma", "capacity"), [(600, 1.0, 4096), (9000, 0.8, 32768)])
def test_packing_fills_rows_to_999_thousandths(median, sigma, capacity):
    rng = np.random.default_rng(0)
    lengths = np.rint(median * np.exp(sigma * rng.standard_normal(20_000))).clip(1, capacity).astype(int)
    assert lengths.sum() / (len(best_fit(lengths, capacity)) * capacity) >= 0.999
    maker = ChatRows(capacity, True, Position(0, 0, 0))
    count = 0
    for first in range(0, 20_000, 500):
        some = lengths[first : first + 500]
        tokens = np.zeros(some.sum(), np.uint8)
        maker.add(tokens, some, np.arange(first, first + len(some)), np.zeros(len(tokens), bool))
        count += sum(row is not None for row, _ in maker.rows())
    count += sum(1 for _ in maker.rows(last=True))
    assert lengths.sum() / (count * capacity) >= 0.999
