"""Raw rows to shards: no token lost, the same bytes however it runs or is killed, and what is said of bad input."""

import bz2
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from streaming import MDSWriter

from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data import convert, shards
from cheaper.data.convert import convert_mixture
from cheaper.data.manifest import Manifest
from cheaper.data.rows import Position, RowCutter
from cheaper.data.shards import ShardWriter, narrowest
from cheaper.data.tokenize import load_tokenizer
from cheaper.errors import UserError
from tests.conftest import kill, rows_of, some_texts, train_tokenizer, write_jsonl

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), some_texts(50, seed=0))


@pytest.fixture
def mixture(tmp_path, tokenizer_folder):
    def make(path=None, root="mds", **stream) -> DataConfig:
        others = {key: stream.pop(key, None) for key in ("listed_in", "dataset")}
        source = SourceConfig(path=str(path) if path else None, **others)
        streams = {"s": StreamConfig(proportion=1.0, source=source, **stream)}
        return DataConfig(name="m", root=str(tmp_path / root), tokenizer=str(tokenizer_folder), streams=streams)

    return make


def digest(folder: Path) -> dict[str, str]:
    names = [path for path in sorted(folder.iterdir()) if path.suffix == ".mds" or path.name == "index.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def assert_holds(folder: Path, texts: list[str], tokenizer_folder: Path, length: int) -> None:
    """The rows of ``folder``, end to end, are exactly BOS text EOS for each text, and ``lengths`` tell the borders."""
    rows = rows_of(folder)
    stream = np.concatenate([row["input_ids"] for row in rows])
    encoded = load_tokenizer(str(tokenizer_folder)).encode_batch(texts)
    expected = np.concatenate([np.concatenate([[BOS], ids, [EOS]]) for ids in encoded])
    assert np.array_equal(stream, expected)
    assert all(len(row["input_ids"]) == length for row in rows[:-1])
    for row in rows:
        assert row["lengths"].sum() == len(row["input_ids"])
        begins = np.cumsum(row["lengths"])[:-1]
        assert all(row["input_ids"][begins] == BOS)
        assert all(row["input_ids"][begins - 1] == EOS)
        assert (row["input_ids"] == BOS).sum() == len(begins) + (row["input_ids"][0] == BOS)
    manifest = Manifest.read(folder / "manifest.json")
    assert (manifest.complete, manifest.rows, manifest.tokens) == (True, len(rows), len(stream))
    assert manifest.documents == len(texts)


@pytest.mark.parametrize("seed", range(5))
def test_the_cutter_keeps_every_token_and_knows_where_rows_begin(seed):
    rng = random.Random(seed)
    documents = [np.array([1000 * i + j for j in range(rng.choice([1, 2, 3, 9, 40]))]) for i in range(60)]
    everything = np.concatenate(documents)

    def cut(begin: Position) -> list:
        cutter, rows, rest = RowCutter(8, begin), [], documents[begin.row :]
        while rest:
            some, rest = rest[: rng.randint(0, 6)], rest[rng.randint(0, 0) :]
            rest = rest[len(some) :]
            first = len(documents) - len(rest) - len(some)
            tokens = np.concatenate(some) if some else np.empty(0, np.int64)
            lengths = np.array([len(d) for d in some], np.int64)
            cutter.add(tokens, lengths, np.arange(first, first + len(some)))
            rows += cutter.rows()
        return rows + list(cutter.rows(last=True))

    rows = cut(Position(0, 0, 0))
    assert np.array_equal(np.concatenate([row["input_ids"] for row, _ in rows]), everything)
    for i, (row, begin) in enumerate(rows):
        tokens = row["input_ids"]
        assert tokens[0] == 1000 * begin.row + begin.token
        assert begin.documents == begin.row
        borders = np.split(tokens, np.cumsum(row["lengths"])[:-1])
        assert all(len(set(piece // 1000)) == 1 for piece in borders)
        assert len(borders) == len(set(tokens // 1000))
        again = cut(begin)  # going on from any row gives the same rows
        assert len(again) == len(rows) - i
        for (one, place), (other, same_place) in zip(again, rows[i:], strict=True):
            assert np.array_equal(one["input_ids"], other["input_ids"])
            assert place == same_place


@pytest.mark.parametrize("processes", [1, 2])
def test_documents_come_back_token_for_token(mixture, tmp_path, tokenizer_folder, processes, monkeypatch):
    monkeypatch.setattr(convert, "BATCH_BYTES", 5000)
    texts = [*some_texts(300, seed=1), "x" * 5000, "ünïcødé 漢字 <s> </s>", " "[:0] + "one\nline\ttab"]
    data = mixture(write_jsonl(tmp_path / "raw.jsonl", texts))
    convert_mixture(data, 64, processes)
    assert_holds(tmp_path / "mds" / "s", texts, tokenizer_folder, 64)


def test_shards_are_the_same_bytes_whatever_the_number_of_workers(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BATCH_BYTES", 3000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    path = write_jsonl(tmp_path / "raw.jsonl", some_texts(500, seed=2))
    digests = []
    for processes in (1, 2, 3):
        convert_mixture(mixture(path, root=f"mds{processes}"), 64, processes)
        digests.append(digest(tmp_path / f"mds{processes}" / "s"))
    assert digests[0] == digests[1] == digests[2]
    assert len(digests[0]) > 3


OPEN = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": zstandard.open}


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet", "txt", "dataset", "glob", "url", "list"]
)
def test_every_kind_of_source(mixture, tmp_path, tokenizer_folder, kind):
    texts = some_texts(20, seed=3)
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts)
    stream = {}
    path = raw / f"rows.{kind}"
    if kind.startswith("jsonl"):
        with OPEN[path.suffix if path.suffix != ".jsonl" else ""](path, "wt") as file:
            file.write(lines)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "other": [1] * 20}), path)
    elif kind == "txt":
        for i, text in enumerate(texts):
            (raw / f"{i:03}.txt").write_text(text)
        path = raw
    elif kind == "glob":
        for part in range(2):
            (raw / f"part-{part}.jsonl").write_text(
                "".join(lines.splitlines(keepends=True)[part * 10 : part * 10 + 10])
            )
        path = raw / "part-*.jsonl"
    elif kind in ("url", "list"):
        with gzip.open(raw / "0.jsonl.gz", "wt") as file:
            file.writelines(lines.splitlines(keepends=True)[:10])
        pyarrow.parquet.write_table(pyarrow.table({"text": texts[10:]}), raw / "1.parquet")
        path = f"file://{raw}/[0-9].*"
        if kind == "list":
            (tmp_path / "list.txt").write_text(f"{raw}/0.jsonl.gz\n\nfile://{raw}/1.parquet\n")
            path, stream = None, {"listed_in": f"file://{tmp_path}/list.txt"}
    else:
        (raw / "train.jsonl").write_text(lines)
        path, stream = None, {"dataset": str(raw)}
    convert_mixture(mixture(path, **stream), 64, processes=1)
    assert_holds(tmp_path / "mds" / "s", texts, tokenizer_folder, 64)


def test_formats_and_fields(mixture, tmp_path, tokenizer_folder):
    path = tmp_path / "raw.jsonl"
    rows = [{"question": "why", "responses": [{"response": "because"}]}, {"question": "no", "responses": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert_mixture(mixture(path, format="natural_reasoning"), 64, 1)
    assert_holds(tmp_path / "mds" / "s", ["why\n\nbecause"], tokenizer_folder, 64)
    rows = [{"input": [{"role": "user", "content": "a b"}], "output": "c"}]
    path.write_text(json.dumps(rows[0]) + "\n")
    convert_mixture(mixture(path, root="second", format="nemotron_post_training"), 64, 1)
    assert_holds(tmp_path / "second" / "s", ["a b\n\nc"], tokenizer_folder, 64)
    path.write_text(json.dumps({"content": "code"}) + "\n")
    convert_mixture(mixture(path, root="third", field="content"), 64, 1)
    assert_holds(tmp_path / "third" / "s", ["code"], tokenizer_folder, 64)


def test_unusable_rows_go_to_the_side_file_with_reasons(mixture, tmp_path, tokenizer_folder):
    path = tmp_path / "raw.jsonl"
    bad = [
        b"{not json",
        b"\xff\xfe{}",
        b'{"text": 3}',
        b'{"other": "x"}',
        b'{"text": "  "}',
        b"[1]",
        b'{"text": "\\ud800"}',
    ]
    lines = [b'{"text": "first"}', *bad, b"", b'{"text": "last"}']
    path.write_bytes(b"\n".join(lines))  # no newline at the end
    manifest = convert_mixture(mixture(path), 64, 1)["s"]
    assert_holds(tmp_path / "mds" / "s", ["first", "last"], tokenizer_folder, 64)
    skipped = [json.loads(line) for line in (tmp_path / "mds" / "s" / "skipped.jsonl").read_text().splitlines()]
    assert manifest.skipped == len(bad) == len(skipped)
    assert [line["row_of_file"] for line in skipped] == list(range(1, 8))
    reasons = [
        "invalid JSON",
        "invalid UTF-8 at byte 0",
        "holds int",
        "no column text",
        "empty text",
        "JSON list",
        "surr",
    ]
    for line, reason in zip(skipped, reasons, strict=True):
        assert reason in line["reason"]
        assert line["file"] == str(path)


def test_long_lines_and_long_documents(mixture, tmp_path, tokenizer_folder):
    texts = ["short", "many words " * 200_000, "x" * 1_000_000, "end"]
    path = write_jsonl(tmp_path / "raw.jsonl", texts)
    with open(path, "a") as file:
        file.write('{"text": "one line of 50 MB' + " " * 50_000_000)
    manifest = convert_mixture(mixture(path), 2048, 1)["s"]
    assert manifest.skipped == 1
    assert_holds(tmp_path / "mds" / "s", texts, tokenizer_folder, 2048)
    assert len((tmp_path / "mds" / "s" / "skipped.jsonl").read_text()) < 2000


RUN = """
import sys
from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data import convert, shards
from cheaper.errors import UserError
convert.BATCH_BYTES, shards.SHARD_BYTES = 20_000, 60_000
path, root, tokenizer = sys.argv[1:]
stream = StreamConfig(proportion=1.0, source=SourceConfig(path=path))
if __name__ == "__main__":
    try:
        convert.convert_mixture(DataConfig(name="m", root=root, tokenizer=tokenizer, streams={"s": stream}), 64, 2)
    except UserError as error:
        sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory, tokenizer_folder):
    """A source of some seconds, with unusable rows, a script that converts it, and the shards of a whole run."""
    folder = tmp_path_factory.mktemp("big")
    path = write_jsonl(folder / "raw.jsonl", some_texts(30_000, seed=5))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line + (b"{bad\n" if i % 97 == 0 else b"") for i, line in enumerate(lines)))
    script = folder / "convert_it.py"
    script.write_text(RUN)

    def command(root: Path) -> list[str]:
        return [sys.executable, str(script), str(path), str(root), str(tokenizer_folder)]

    subprocess.run(command(folder / "whole"), check=True, capture_output=True)
    return command, folder / "whole" / "s"


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(folder.glob("shard.*.mds"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILL_SEEDS", "2"))))  # two kills each
def test_killed_at_random_it_goes_on_without_a_missing_or_double_document(big, tmp_path, seed):
    command, whole = big
    rng = random.Random(seed)
    for count in sorted(rng.sample(range(1, 40), 2)):
        victim = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for_shards(tmp_path / "s", count, victim)
        time.sleep(rng.random() / 50)
        kill(victim)
        assert not (tmp_path / "s" / "index.json").exists()
    subprocess.run(command(tmp_path), check=True, capture_output=True)
    assert digest(tmp_path / "s") == digest(whole)
    assert (tmp_path / "s" / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert (tmp_path / "s" / "manifest.json").read_text() == (whole / "manifest.json").read_text()


def test_ctrl_c_is_one_line_and_a_worker_that_dies_does_not_hang(big, tmp_path):
    command, whole = big
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_shards(tmp_path / "s", 5, process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1].splitlines()
    assert errors[-1] == "error: data.streams.s: stopped; the same command goes on from here"
    assert not any("Traceback" in line for line in errors)
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_shards(tmp_path / "s", len(list((tmp_path / "s").glob("shard.*.mds"))) + 5, process)
    import psutil

    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    errors = process.communicate(timeout=60)[1].splitlines()
    assert errors[-1] == "error: data.streams.s: a worker process died; the same command goes on from here"
    subprocess.run(command(tmp_path), check=True, capture_output=True)
    assert digest(tmp_path / "s") == digest(whole)


def test_workers_that_cannot_start_are_one_line(big, tmp_path):
    """A script that starts processes when it is imported: each worker imports it and dies at once."""
    command, _ = big
    script = tmp_path / "unguarded.py"
    script.write_text(Path(command(tmp_path)[1]).read_text().replace('if __name__ == "__main__":', "if True:"))
    arguments = [sys.executable, str(script), *command(tmp_path / "mds")[2:]]
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=90)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: data.streams.s: a worker process died")


def test_a_full_disk_is_one_line_and_can_go_on(big, tmp_path):
    command, whole = big
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        process = subprocess.run(command(disk), capture_output=True, text=True)
        assert process.returncode == 1
        assert "cannot be written (No space left on device); free some space" in process.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        subprocess.run(command(disk), check=True, capture_output=True)
        assert digest(disk / "s") == digest(whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_finished_stream_is_left_alone_and_another_one_is_not_written_over(mixture, tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", some_texts(10, seed=6))
    convert_mixture(mixture(path), 64, 1)
    before = digest(tmp_path / "mds" / "s")
    path.write_text("gone")  # the source is not even read again
    convert_mixture(mixture(path), 64, 1)
    with pytest.raises(UserError, match=r"was made with sequence_length 64, now it is 128; choose another data.root"):
        convert_mixture(mixture(path), 128, 1)
    with pytest.raises(UserError, match=r"was made with field text, now it is content"):
        convert_mixture(mixture(path, field="content"), 64, 1)
    assert digest(tmp_path / "mds" / "s") == before
    (tmp_path / "other" / "s").mkdir(parents=True)
    (tmp_path / "other" / "s" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty and holds no manifest.json"):
        convert_mixture(mixture(path, root="other"), 64, 1)
    assert [p.name for p in (tmp_path / "other" / "s").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no"),
        ("empty.jsonl", b"", "gave no text; it is empty"),
        ("bad.jsonl", b"{\n{\n", "gave no text; all 2 rows were skipped, the first: invalid JSON"),
        ("columns.jsonl", b'{"content": "x"}\n', "the first: no column text, only content"),
        ("binary.jsonl", bytes(range(256)) * 20, "is a binary file, expected lines of JSON"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "hello"}\n' * 9999)[:-20], "cannot be read to its end"),
        ("cut.parquet", b"PAR1 and no more", "is not a whole Parquet file"),
        ("rows.csv", b"text\nhello\n", "is of no known kind: .jsonl"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(mixture, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        convert_mixture(mixture(path), 64, 1)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "mds").glob("s/index.json"))


def test_bad_urls_lists_and_datasets_are_one_line(mixture, tmp_path):
    (tmp_path / "list.txt").write_text(f"{tmp_path}/none.jsonl\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n' * 9999)[:-20])
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    for source, message in (
        ({"path": f"file://{tmp_path}/none.jsonl"}, "none.jsonl cannot be read to its end"),
        ({"path": f"file://{tmp_path}/none*.jsonl"}, "there is no file://"),
        ({"path": f"file://{tmp_path}/cut.jsonl.gz"}, "cut.jsonl.gz cannot be read to its end"),
        ({"path": "nowhere://here/*.jsonl"}, "nowhere://here/*.jsonl cannot be listed (Protocol not known: nowhere"),
        ({"listed_in": str(tmp_path / "none.txt")}, "none.txt cannot be read (["),
        ({"listed_in": str(tmp_path / "list.txt")}, f"there is no {tmp_path}/none.jsonl"),
        ({"dataset": str(tmp_path / "scripted")}, "no longer supported, but found scripted.py; name its files instead"),
    ):
        with pytest.raises(UserError) as error:  # nothing was written: the next source may have the folder
            convert_mixture(mixture(**source), 64, 1)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_newer_kind_of_source_leaves_earlier_conversions_as_they_are(mixture, tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", some_texts(5, seed=1))
    manifest = convert_mixture(mixture(path), 64, 1)["s"]
    manifest.source.pop("listed_in")  # as an earlier version wrote it
    manifest.write(tmp_path / "mds" / "s" / "manifest.json")
    assert convert_mixture(mixture(path), 64, 1)["s"].tokens == manifest.tokens


def test_wrong_names_are_answered_with_the_nearest(mixture, tmp_path):
    path = write_jsonl(tmp_path / "raw.jsonl", ["x"])
    with pytest.raises(UserError, match=r"format natural_resoning: no such format; did you mean natural_reasoning"):
        convert_mixture(mixture(path, format="natural_resoning"), 64, 1)
    with pytest.raises(UserError, match=r"--only t: no such stream"):
        convert_mixture(mixture(path), 64, 1, only=["t"])
    with pytest.raises(UserError, match=r"expected exactly one of path, listed_in and dataset"):
        convert_mixture(mixture(), 64, 1)


def test_uploads_as_it_goes_and_keeps_the_manifest(tmp_path):
    """Streaming's uploader with a folder in the place of a bucket."""
    remote, folder = tmp_path / "remote", tmp_path / "local"
    folder.mkdir()
    manifest = Manifest("t", "f", 300, 0, 1, 8, {"path": "x", "dataset": None}, "text", "text")
    writer = ShardWriter(folder, str(remote), manifest)
    assert isinstance(writer.mds, MDSWriter)
    for i in range(100):
        writer.write_all([({"input_ids": np.arange(8), "lengths": np.array([8])}, Position(i, 0, i))])
    writer.finish(Position(100, 0, 100), skipped=0)
    assert {p.name for p in remote.iterdir()} == {"index.json", "manifest.json", "shard.00000.mds"}
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]
    shutil.rmtree(folder)
    assert len(rows_of(remote)) == 100


def test_narrowest():
    assert [str(narrowest(n)) for n in (256, 257, 65536, 65537, 128256)] == [
        "uint8",
        "uint16",
        "uint16",
        "uint32",
        "uint32",
    ]
