"""Conversions that are stopped, doubled, moved or misled: what goes on, what is refused, what is left behind."""

import contextlib
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from streaming.base.storage import download, upload

from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data import convert, shards
from cheaper.data.convert import convert_mixture
from cheaper.data.formats import FORMATS
from cheaper.data.manifest import Manifest
from cheaper.errors import UserError
from tests.conftest import some_texts, train_tokenizer, write_jsonl
from tests.data.test_convert import digest

RUN = """
import sys
from cheaper.config import DataConfig, SourceConfig, StreamConfig
from cheaper.data.convert import convert_mixture
from cheaper.errors import UserError
path, root, tokenizer = sys.argv[1:]
stream = StreamConfig(proportion=1.0, source=SourceConfig(path=path))
if __name__ == "__main__":
    try:
        convert_mixture(DataConfig(name="m", root=root, tokenizer=tokenizer, streams={"s": stream}), 64, 2)
    except UserError as error:
        sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return str(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), some_texts(50, seed=0)))


@pytest.fixture
def mixture(tmp_path, tokenizer):
    def make(path: Path, root: str = "mds") -> DataConfig:
        streams = {"s": StreamConfig(proportion=1.0, source=SourceConfig(path=str(path)))}
        root = root if "://" in root else str(tmp_path / root)
        return DataConfig(name="m", root=root, cache=str(tmp_path / "cache"), tokenizer=tokenizer, streams=streams)

    return make


@pytest.fixture
def conversion(tmp_path, tokenizer):
    """Starts one conversion, of some seconds into a single shard, as real processes; also says where it writes."""
    script, folder, started = tmp_path / "convert_it.py", tmp_path / "out", []
    script.write_text(RUN)
    source = tmp_path / "rows.jsonl"
    write_jsonl(source, some_texts(40_000, seed=1))

    def start() -> subprocess.Popen:
        command = [sys.executable, str(script), str(source), str(folder), tokenizer]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield start, folder / "s"
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_before_its_first_shard_it_goes_on_and_its_workers_end(conversion):
    start, folder = conversion
    process = start()
    wait_until((folder / "skipped.jsonl").exists, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()  # the parent alone
    process.wait()
    assert not list(folder.glob("*.mds"))
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    again = start()
    errors = again.communicate(timeout=100)[1]
    assert again.returncode == 0, errors
    assert Manifest.read(folder / "manifest.json").documents == 40_000


def test_ctrl_c_in_a_terminal_reaches_all_processes_and_is_one_line(conversion):
    start, folder = conversion
    process = start()
    wait_until((folder / "manifest.json").exists, process)  # workers are still starting
    os.killpg(process.pid, signal.SIGINT)
    errors = [line for line in process.communicate(timeout=60)[1].splitlines() if line and "B/s" not in line]
    assert errors == ["error: data.streams.s: stopped; the same command goes on from here"]


def test_one_folder_takes_one_conversion_at_a_time(conversion):
    start, folder = conversion
    first = start()
    wait_until((folder / "manifest.json").exists, first)
    os.killpg(first.pid, signal.SIGSTOP)
    second = start()
    errors = second.communicate(timeout=60)[1]
    os.killpg(first.pid, signal.SIGCONT)
    assert errors.splitlines()[-1] == f"error: {folder}: another conversion is writing there"
    assert first.wait(timeout=100) == 0


def stop_after(monkeypatch, count: int) -> None:
    """Lets a conversion fail on its ``count``-th batch."""
    original, left = convert._Progress.update, [count]

    def update(*arguments) -> None:
        original(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(convert._Progress, "update", update)


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(convert, "BATCH_BYTES", 3000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)


def test_a_source_that_changed_under_a_half_finished_conversion_is_refused(mixture, tmp_path, monkeypatch, many_shards):
    path = write_jsonl(tmp_path / "rows.jsonl", some_texts(300, seed=1))
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(UserError, match="stopped; the same command goes on from here"):
            convert_mixture(mixture(path), 64, 1)
    size = path.stat().st_size
    before = digest(tmp_path / "mds" / "s")
    assert len(before) > 2
    with open(path, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=rf"had {size} bytes when the conversion into \S+ began, now {size + 17}"):
        convert_mixture(mixture(path), 64, 1)
    assert digest(tmp_path / "mds" / "s") == before


def test_a_source_that_was_cut_short_can_be_repaired(mixture, tmp_path):
    whole = gzip.compress(b'{"text": "hello"}\n' * 999)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        convert_mixture(mixture(path), 64, 1)
    path.write_bytes(whole)
    assert convert_mixture(mixture(path), 64, 1)["s"].documents == 999


def test_damaged_gz_is_one_line(mixture, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rng = random.Random(0)
    data = bytearray(gzip.compress("".join(f'{{"text": "{rng.random()}"}}\n' for _ in range(999)).encode()))
    data[1000:1100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be read to its end \(Error -3"):
        convert_mixture(mixture(path), 64, 1)


def test_a_finished_stream_needs_its_raw_files_no_more(mixture, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ["hello"])
    convert_mixture(mixture(path), 64, 1)
    path.unlink()
    assert convert_mixture(mixture(path), 64, 1)["s"].documents == 1


def test_a_root_that_cannot_be_made_is_one_line(mixture, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ["hello"])
    with pytest.raises(UserError, match=r"rows.jsonl/s cannot be written \(Not a directory\)"):
        convert_mixture(mixture(path, root="rows.jsonl"), 64, 1)
    assert path.read_text() == '{"text": "hello"}\n'


def test_an_error_in_the_code_is_not_taken_for_the_users(mixture, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", ["hello"])
    monkeypatch.setattr(convert, "_tokenise", len)  # len of a batch is no batch
    with pytest.raises(AttributeError):
        convert_mixture(mixture(path), 64, 1)
    assert "text" not in FORMATS


class Bucket(download.LocalDownloader):
    @staticmethod
    def _client_identifier() -> str:
        return "bucket"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """``bucket://…`` served by streaming's uploader and downloader for folders; nothing else is replaced."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(upload.UPLOADERS, "bucket", "LocalUploader")
    monkeypatch.setitem(download.DOWNLOADER_MAPPINGS, "bucket", Bucket)
    return tmp_path / "bucket:" / "mds" / "s"


def test_an_uploaded_conversion_goes_on_after_failures_and_is_not_done_twice(
    mixture, tmp_path, monkeypatch, many_shards, bucket
):
    path = write_jsonl(tmp_path / "rows.jsonl", some_texts(300, seed=1))
    convert_mixture(mixture(path), 64, 1)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(UserError, match="stopped"):
            convert_mixture(mixture(path, "bucket://mds"), 64, 1)
    assert list(bucket.glob("*.mds"))
    assert not (bucket / "manifest.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(upload.LocalUploader, "upload_file", lambda *_: 1 / 0)
        with pytest.raises(UserError, match=r"an upload to bucket://mds/s failed \(.+\); the same command goes on"):
            convert_mixture(mixture(path, "bucket://mds"), 64, 1)
    convert_mixture(mixture(path, "bucket://mds"), 64, 1)
    assert digest(bucket) == digest(tmp_path / "mds" / "s")
    assert Manifest.read(bucket / "manifest.json").complete
    assert not list((tmp_path / "cache").rglob("*.mds"))

    before = {entry.name: entry.stat().st_mtime_ns for entry in bucket.iterdir()}
    shutil.rmtree(tmp_path / "cache")  # another machine
    path.unlink()
    assert convert_mixture(mixture(path, "bucket://mds"), 64, 1)["s"].documents == 300
    with pytest.raises(UserError, match="bucket://mds/s was made with sequence_length 64, now it is 32"):
        convert_mixture(mixture(path, "bucket://mds"), 32, 1)
    assert {entry.name: entry.stat().st_mtime_ns for entry in bucket.iterdir()} == before


def test_size_counts_what_is_nested():
    assert convert._size({"input": [{"role": "user", "content": "x" * 100}], "n": 3}) == 4 + 100 + 8
    assert convert._size(b"12345") == 5
