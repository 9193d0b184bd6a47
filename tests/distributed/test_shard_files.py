"""Checkpoints in shards: what they hold and what they may not do. One process shards as several do."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from cheaper import cli
from cheaper.checkpoints import load_decoder, load_weights, model_weights, safe_load, versions
from cheaper.config import DistributedConfig
from cheaper.distributed.processes import join_processes
from cheaper.distributed.sharding import build_mesh
from cheaper.errors import UserError
from cheaper.files import read_records
from cheaper.models.decoder import Decoder
from cheaper.models.teacher import load_teacher

SHARDED = ("distributed=fsdp2", "training.stage.tokens=2688")


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("sharded") / "run"
    assert cli.main(["train", *corpus.arguments(run, *SHARDED)]) == 0
    return run


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(["train", *corpus.arguments(run, "training.stage.tokens=2688")]) == 0
    return run


def test_shards_hold_what_a_whole_checkpoint_holds(sharded, whole, tmp_path):
    assert sorted(path.name for path in sharded.glob("step-*")) == ["step-00000010", "step-00000020", "step-00000021"]
    assert cli.main(["consolidate", str(sharded), "--output", str(tmp_path / "one.pt")]) == 0
    ours, theirs = safe_load(tmp_path / "one.pt")["state"], safe_load(whole / "step-00000021.pt")["state"]
    assert ours.keys() == theirs.keys()
    for name, tensor in model_weights({"state": theirs}).items():
        assert torch.equal(model_weights({"state": ours})[name], tensor)
    moments, expected = ours["optimizers"]["AdamW"], theirs["optimizers"]["AdamW"]
    assert moments["param_groups"] == expected["param_groups"]
    assert moments["state"].keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        assert all(torch.equal(moments["state"][name][key], tensor) for key, tensor in state.items())


def test_a_consolidated_checkpoint_goes_on(corpus, sharded, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.yaml", "metrics.jsonl"):
        shutil.copy(sharded / name, run)
    assert cli.main(["consolidate", str(sharded / "step-00000010"), "--output", str(run / "step-00000010.pt")]) == 0
    assert capsys.readouterr().out.endswith("step-00000010.pt\n")
    assert cli.main(["train", *corpus.arguments(run, *SHARDED[1:], "training.resume=true")]) == 0
    for name in ("train/loss", "train/grad_norm", "data/tokens/a"):
        ours, expected = (read_records(folder / "metrics.jsonl") for folder in (run, sharded))
        assert [record[name] for record in ours] == [record[name] for record in expected]
    assert cli.main(["consolidate", str(sharded / "step-00000010"), "--output", str(run / "step-00000010.pt")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["consolidate", str(run)]) == 2
    assert "expected a folder with shards" in capsys.readouterr().err


def test_shards_are_weights_to_start_from(sharded):
    loaded = load_decoder(sharded / "step-00000021")
    filled = Decoder(loaded.config)
    load_weights(filled, str(sharded))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), filled.state_dict().values(), strict=True)
    )
    loaded.config.num_layers = 1
    with pytest.raises(UserError, match=r"has blocks\.1\..*, which this model lacks"):
        load_weights(Decoder(loaded.config), str(sharded))


def test_a_checkpoint_names_what_wrote_it(corpus, sharded, tmp_path, capsys):
    record = safe_load(sharded / "step-00000010" / "run.pt")["state"]["callbacks"]["Checkpointer"]
    assert record["versions"] == versions()
    assert record["recipe"] == "model=tiny training=pretrain_phase1 data=small distributed=fsdp2"
    shutil.copytree(sharded, tmp_path / "run", ignore=shutil.ignore_patterns("step-0000002*", "summary.json"))
    path = tmp_path / "run" / "step-00000010" / "run.pt"
    changed = safe_load(path)
    changed["state"]["callbacks"]["Checkpointer"]["versions"]["torch"] = "1.0.0"
    torch.save(changed, path.with_name("changed"))
    path.with_name("changed").replace(path)
    assert cli.main(["train", *corpus.arguments(tmp_path / "run", *SHARDED, "training.resume=true")]) == 0
    assert f"was written with torch 1.0.0, this is {versions()['torch']}" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/evil-was-here"),))


def test_metadata_runs_no_code(corpus, sharded, tmp_path, capsys):
    shutil.copytree(sharded, tmp_path / "run")
    (tmp_path / "run" / "step-00000021" / ".metadata").write_bytes(pickle.dumps(Evil()))
    weights = f"training.checkpoint_path={tmp_path / 'run'}"
    assert cli.main(["train", *corpus.arguments(tmp_path / "next", *SHARDED, weights)]) == 2
    assert ".metadata is not readable (refused: it holds pathlib.Path.touch)" in capsys.readouterr().err
    assert not Path("/tmp/evil-was-here").exists()


@pytest.mark.parametrize(("file", "said"), [("__0_0.distcp", "its shards are not readable"), ("run.pt", "refused")])
def test_a_shard_that_is_cut_short_is_refused(corpus, sharded, tmp_path, capsys, file, said):
    shutil.copytree(sharded, tmp_path / "run", ignore=shutil.ignore_patterns("step-0000002*", "summary.json"))
    path = tmp_path / "run" / "step-00000010" / file
    path.write_bytes(path.read_bytes()[:2000])
    assert cli.main(["train", *corpus.arguments(tmp_path / "run", *SHARDED, "training.resume=true")]) == 2
    line = capsys.readouterr().err
    assert "error: checkpoint" in line
    assert said in line


def test_a_divided_teacher_reads_its_own_shards_alone(sharded, monkeypatch):
    path = sharded / "step-00000021"
    whole = load_decoder(path).eval()
    monkeypatch.setattr("cheaper.models.teacher.load_decoder", None)  # which would make it whole in every process
    join_processes()
    teacher = load_teacher(path, torch.device("cpu"), torch.float32, mesh=build_mesh(DistributedConfig(shard=True)))
    assert isinstance(teacher.output_weight, DTensor)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(teacher.hidden(ids, None), whole.hidden(ids, None))


def test_an_offloaded_run_is_the_same_run(corpus, sharded, tmp_path):
    """On a CPU, where nothing moves: what is shown is that every part of a run takes it."""
    run = tmp_path / "run"
    assert cli.main(["train", *corpus.arguments(run, *SHARDED, "distributed.cpu_offload=true")]) == 0
    for file, name in (("metrics.jsonl", "train/loss"), ("samples.jsonl", "continuation")):
        ours, expected = (read_records(folder / file) for folder in (run, sharded))
        assert [record[name] for record in ours] == [record[name] for record in expected]
