"""Conversion with Ray: real workers, one of which is killed, make the shards that one process makes of each part."""

import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from cheaper import cli
from cheaper.compose import load_config
from cheaper.data import convert_cluster
from cheaper.data.convert import convert_stream
from cheaper.data.manifest import Manifest
from cheaper.data.tokenize import load_tokenizer
from tests.conftest import some_texts, train_tokenizer, write_jsonl

ROW = 32


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A stream of four files, of which two are a part."""
    train_tokenizer(tmp_path / "tokenizer", some_texts(50, seed=0))
    sizes = [write_jsonl(tmp_path / "raw" / f"{i}.jsonl", some_texts(9000, seed=i)).stat().st_size for i in range(4)]
    monkeypatch.setattr(convert_cluster, "PART_BYTES", max(sizes) + 1)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mix.yaml").write_text(
        f"name: mix\nroot: {tmp_path}/mds\ntokenizer: {tmp_path}/tokenizer\nnum_workers: 0\n"
        f"streams: {{a: {{source: {{path: {tmp_path}/raw}}}}}}\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "defaults: [{model: tiny}, {training: pretrain_phase1}, {data: mix}, {distributed: single_gpu},"
        " {logging: console}, _self_]\n"
        f"training: {{stage: {{tokens: 512, sequence_length: {ROW}, batch_size_per_gpu: 4, warmup: 0}}}}\n"
        "model: {vocab_size: 320}\n"
    )
    return path


def kill_one_worker(killed: list[psutil.Process], stop: threading.Event) -> None:
    """Kills the first process that converts a part, once its own two are at work; ``killed`` is it and they."""
    while not stop.is_set() and not killed:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_convert_part"):
                while len(process.children()) < 3:  # one is the resource tracker
                    time.sleep(0.05)
                time.sleep(2)
                killed += [process, *process.children()]
                process.kill()
                return
        time.sleep(0.05)


def test_a_worker_that_dies_changes_nothing(recipe, tmp_path, capsys):
    killed, stop = [], threading.Event()
    killer = threading.Thread(target=kill_one_worker, args=(killed, stop))
    killer.start()
    try:
        assert cli.main(["convert", str(recipe), "--engine", "ray", "--processes", "2"]) == 0
    finally:
        stop.set()
        killer.join()
    assert len(killed) >= 3
    assert not psutil.wait_procs(killed, timeout=5)[1]
    assert "2 parts" in capsys.readouterr().out

    data = load_config([str(recipe)]).data
    tokenizer = load_tokenizer(data.tokenizer)
    parts = convert_cluster.parts_of("a", data.streams["a"])
    assert parts == [slice(0, 2), slice(2, 4)]
    expected = []
    data.root = str(tmp_path / "alone")
    for number, part in enumerate(parts):
        name = f"a/part-{number:05d}"
        expected.append(convert_stream(name, data.streams["a"], data, tokenizer, ROW, processes=1, part=part))
        for shard in (tmp_path / "alone" / name).glob("*.mds"):
            assert (tmp_path / "mds" / name / shard.name).read_bytes() == shard.read_bytes()
    whole = Manifest.read(tmp_path / "mds" / "a" / "manifest.json")
    for key in ("rows", "tokens", "documents"):
        assert getattr(whole, key) == sum(getattr(manifest, key) for manifest in expected)
    index = json.loads((tmp_path / "mds" / "a" / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == whole.rows

    run = f"training.checkpoint_dir={tmp_path / 'run'}"
    assert cli.main(["train", str(recipe), run]) == 0  # training reads the parts as one stream


def test_mistakes(recipe, capsys):
    assert cli.main(["convert", str(recipe), "--engine", "ray", "data.root=s3://bucket/mds"]) == 2
    assert "expected a folder that all machines see" in capsys.readouterr().err
    assert cli.main(["convert", str(recipe), "--engine", "ray", "--only", "b"]) == 2
    assert "no such stream in mix" in capsys.readouterr().err
    assert cli.main(["convert", str(recipe), "--engine", "ray", "data.streams.a.source.path=/nowhere"]) == 2
    assert "there is no /nowhere" in capsys.readouterr().err
