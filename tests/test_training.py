"""Whole runs in this process: what a run writes, what it refuses, and what a checkpoint may not do."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cheaper import cli, precision, training
from cheaper.checkpoints import load_weights, model_weights, safe_load
from cheaper.compose import load_config
from cheaper.data.streams import epoch_tokens, row_length, shares
from cheaper.files import newest_checkpoint, read_records
from cheaper.flops import flops_per_token
from cheaper.models import hf
from cheaper.models.decoder import Decoder
from cheaper.training import build_optimizer, build_scheduler, build_trainer, run_length
from tests.numerics.test_llama4_parity import small


def train(arguments: list[str]) -> int:
    return cli.main(["train", *arguments])


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(corpus.arguments(run, "training.keep_checkpoints=2", "logging.tensorboard=true")) == 0
    return run


def refusal(capsys, arguments: list[str]) -> str:
    """The one line that a run answers with."""
    assert train(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_metrics_have_the_names_of_the_specification(finished):
    records = read_records(finished / "metrics.jsonl")
    # 40 full steps are 5,120 tokens; the last row of a stream is short, so one step more is needed.
    assert [record["step"] for record in records] == list(range(1, 42))
    assert [record["tokens"] for record in records][:5] == [128, 256, 384, 512, 640]
    assert records[-2]["tokens"] < 5120 <= records[-1]["tokens"] <= 5248
    names = {"loss", "accuracy", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "mfu"}
    assert {f"train/{name}" for name in names} <= set(records[-1])
    assert {"data/tokens/a", "data/tokens/b", "time/hours_left"} <= set(records[-1])
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5
    assert records[-1]["data/tokens/a"] + records[-1]["data/tokens/b"] == records[-1]["tokens"]
    assert abs(records[-1]["data/share/a"] - 0.7) < 0.01


def test_learning_rate_warms_up_and_decays_to_a_tenth(finished):
    records = read_records(finished / "metrics.jsonl")
    assert records[0]["train/learning_rate"] == 0
    for before, now in zip(records[:-2], records[2:], strict=True):  # Composer's schedule lags by one step
        tokens = before["tokens"]
        expected = tokens / 512 if tokens < 512 else 1 - 0.9 * (tokens - 512) / (5120 - 512)  # warm-up is 10% of 5,120
        assert now["train/learning_rate"] == pytest.approx(4e-3 * expected), now["step"]


def test_the_run_folder_holds_what_the_readme_says(finished):
    assert sorted(path.name for path in finished.glob("step-*")) == ["step-00000040.pt", "step-00000041.pt"]
    assert not list(finished.glob(".partial*"))
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [10, 20, 30, 40, 41]
    assert all(sample["prompt"] == "the model" and sample["continuation"] for sample in samples)
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (41, read_records(finished / "metrics.jsonl")[-1]["tokens"])
    assert summary["mixture"]["a"]["asked"] == 0.7
    assert list((finished / "tensorboard").rglob("events.out.tfevents*"))


def test_another_run_does_not_write_into_the_folder(corpus, finished, capsys):
    line = refusal(capsys, corpus.arguments(finished))
    assert "already holds a run (step-00000041.pt): add training.resume=true" in line
    line = refusal(capsys, corpus.arguments(finished, "training.resume=true", "training.stage.learning_rate=1e-3"))
    assert "training.stage.learning_rate is 0.001: the run to resume was started with 0.004" in line


def test_the_next_stage_starts_from_the_weights_alone(corpus, finished, tmp_path):
    arguments = corpus.arguments(tmp_path / "next", f"training.checkpoint_path={finished}", "training.seed=5")
    trainer = build_trainer(load_config(arguments))
    weights = model_weights(safe_load(newest_checkpoint(finished)))
    for name, tensor in trainer.state.model.model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert int(trainer.state.timestamp.batch) == 0
    assert not trainer.state.optimizers[0].state
    trainer.close()


def test_a_transformers_folder_is_a_start_too(corpus, finished, tmp_path):
    config = load_config(corpus.arguments(tmp_path / "run"))
    decoder = Decoder(config.model)
    load_weights(decoder, str(finished))
    hf.save_pretrained(decoder, tmp_path / "hf")
    other = Decoder(config.model)
    load_weights(other, str(tmp_path / "hf"))
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), other.parameters(), strict=True))


class Payload:
    """What an attacker puts into a checkpoint: code that runs when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("way", ["weights", "resume"])
def test_a_foreign_checkpoint_runs_no_code(corpus, tmp_path, capsys, way):
    proof, evil = tmp_path / "proof", tmp_path / "evil.pt"
    torch.save({"state": {"model": {}}, "payload": Payload(proof)}, evil)
    resume = ["training.resume=true"] if way == "resume" else []
    arguments = corpus.arguments(tmp_path / "run", f"training.checkpoint_path={evil}", *resume)
    assert "refused, it holds objects other than tensors" in refusal(capsys, arguments)
    assert not proof.exists()


def test_a_checkpoint_may_not_have_composer_evaluate_its_algorithms(corpus, finished, tmp_path):
    """Composer passes the ``repr`` of algorithms that a run lacks to ``eval``."""
    folder, proof = tmp_path / "copy", tmp_path / "proof"
    shutil.copytree(finished, folder)
    path = newest_checkpoint(folder)
    checkpoint = safe_load(path)
    checkpoint["state"]["algorithms"].append(
        ("BlurPool", {"repr": f"BlurPool(__import__('pathlib').Path('{proof}').touch())"})
    )
    path.unlink()
    torch.save(checkpoint, path)
    trainer = build_trainer(load_config(corpus.arguments(folder, "training.resume=true")))
    assert int(trainer.state.timestamp.batch) == 41
    trainer.close()
    assert not proof.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", "has no blocks.2"),
        ("model.num_layers=1", "has blocks.1"),
        ("model.intermediate_size=96", "is [64, 32], expected [96, 32]; it is of another model"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(corpus, finished, tmp_path, capsys, override, message):
    for resume in ([], ["training.resume=true"]):
        weights = shutil.copy(newest_checkpoint(finished), tmp_path)
        arguments = corpus.arguments(tmp_path / "run", f"training.checkpoint_path={weights}", override, *resume)
        assert message in refusal(capsys, arguments)


@pytest.mark.parametrize(
    "overrides", ["qk_norm=false", "norm_eps=0.01", "num_heads=4 num_kv_heads=2 head_dim=16", "rope_scaling.factor=8"]
)
def test_weights_that_were_trained_otherwise_are_refused(corpus, finished, tmp_path, capsys, overrides):
    """Tensors of the same names and shapes, from which another model would be computed."""
    changed = [f"model.{override}" for override in overrides.split()]
    line = refusal(capsys, corpus.arguments(tmp_path / "run", f"training.checkpoint_path={finished}", *changed))
    assert f"was trained with {changed[0].partition('=')[0]}=" in line


def test_an_earlier_checkpoint_of_the_folder_is_not_passed_over(corpus, finished, tmp_path, capsys):
    earlier = sorted(finished.glob("step-*.pt"))[0]
    arguments = (f"training.checkpoint_path={earlier}", "training.resume=true")
    line = refusal(capsys, corpus.arguments(finished, *arguments))
    assert f"{finished} holds later checkpoints, up to {newest_checkpoint(finished).name}" in line
    trainer = build_trainer(load_config(corpus.arguments(tmp_path / "back", *arguments)))
    assert f"step-{int(trainer.state.timestamp.batch):08}.pt" == earlier.name
    trainer.close()


def test_steps_of_another_size_are_refused(corpus, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    again = ("training.resume=true", "training.stage.batch_size_per_gpu=2")
    line = refusal(capsys, corpus.arguments(tmp_path / "run", *again))
    assert "a step has 2 rows over all processes, the run to resume had 4" in line
    same = "training.stage.gradient_accumulation_steps=2"
    watched = ("training.eval_interval=5", "training.targets=[loss/train < 99]")
    assert cli.main(["train", *corpus.arguments(tmp_path / "run", *again, same, *watched)]) == 0  # it had finished


def test_a_checkpoint_that_is_cut_short_or_missing_is_refused(corpus, finished, tmp_path, capsys):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(newest_checkpoint(finished).read_bytes()[:-5000])
    for path, message in ((cut, "refused, it is not readable"), (tmp_path / "none.pt", "no such file or folder")):
        assert message in refusal(capsys, corpus.arguments(tmp_path / "run", f"training.checkpoint_path={path}"))
    line = refusal(capsys, corpus.arguments(tmp_path / "run", "training.resume=true"))
    assert "training.resume=true: no checkpoint in training.checkpoint_dir" in line


def test_shards_that_do_not_fit_are_refused(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    line = refusal(capsys, corpus.arguments(run, f"data.root={tmp_path}/nowhere", "training.seed=3"))
    command = f"cheaper convert {corpus.folder}/recipe.yaml data.root={tmp_path}/nowhere"
    assert line.endswith(f"data.streams.a: no shards in {tmp_path}/nowhere/a; make them with: {command}")
    line = refusal(capsys, corpus.arguments(run, "training.stage.sequence_length=64"))
    assert "has rows of 32 tokens, which cannot be cut into 64, training.stage.sequence_length" in line
    line = refusal(capsys, corpus.arguments(run, "model.vocab_size=300"))
    assert "model.vocab_size is 300: tokenizer" in line
    assert "has 320 words, expected at least as many" in line
    other = tmp_path / "tokenizer"
    shutil.copytree(corpus.folder / "tokenizer", other)
    raw = json.loads((other / "tokenizer.json").read_text())
    raw["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(raw))
    line = refusal(capsys, corpus.arguments(run, f"data.tokenizer={other}"))
    assert f"was made with tokenizer {corpus.folder}/tokenizer" in line
    assert f"the run has {other}" in line
    shards = tmp_path / "mds"
    shutil.copytree(corpus.folder / "mds", shards)
    shard = shards / "b" / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    line = refusal(capsys, corpus.arguments(run, f"data.root={shards}"))
    assert f"shard {shard} has {len(whole) - 100} bytes, expected {len(whole)} bytes" in line
    shard.unlink()
    assert f"shard {shard} is missing" in refusal(capsys, corpus.arguments(run, f"data.root={shards}"))
    assert not run.exists()


def test_a_warm_up_longer_than_the_run_is_refused(corpus, tmp_path, capsys):
    line = refusal(capsys, corpus.arguments(tmp_path / "run", "training.stage.warmup=2000"))
    assert "training.stage.warmup is 2000 steps: the run has only 40 (5120 tokens in steps of 128)" in line


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_written(corpus, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        line = refusal(capsys, corpus.arguments(disk / "run", "training.keep_checkpoints=9"))
        assert "could not be written" in line
        assert "the earlier ones are whole" in line
        newest = newest_checkpoint(disk / "run")
        assert newest is not None
        assert safe_load(newest)["state"]["model"]
        assert not list((disk / "run").glob(".partial*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_wandb_offline_and_resume_go_together(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    wandb = ["logging.wandb.enabled=true", "logging.wandb.project=test"]
    assert train(corpus.arguments(run, *wandb)) == 0
    identity = (run / "wandb-id").read_text()
    newest_checkpoint(run).unlink()  # as if it had been killed on the way
    (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text() + '{"step": 41, "cut sh')
    assert train(corpus.arguments(run, *wandb, "training.resume=true")) == 0
    assert (run / "wandb-id").read_text() == identity
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    assert [sample["step"] for sample in read_records(run / "samples.jsonl")] == [10, 20, 30, 40, 41]
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == list(range(1, 42))


def test_dry_run_prints_the_run_and_writes_nothing(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*corpus.arguments(run), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate: 0.004" in printed
    assert "the run is sound" in printed
    assert not run.exists()


def test_weight_decay_is_on_matrices_only():
    config = load_config(["model=tiny", "training=pretrain_phase1", "data=sample"])
    groups = build_optimizer(training.CausalLM(small()), config.training.stage).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert (groups[0]["lr"], groups[0]["betas"], groups[0]["eps"]) == (4e-3, (0.9, 0.95), 1e-8)


def test_warm_up_and_length_follow_tokens_or_epochs():
    config = load_config(["model=tiny", "training=pretrain_phase1", "data=sample"])
    stage = config.training.stage
    full = {name: SimpleNamespace(rows=100, tokens=100 * 2048) for name in config.data.streams}

    def length() -> tuple[int, str]:
        run = run_length(config, full)
        return run.tokens, build_scheduler(stage, run).t_warmup

    assert length() == (2 * 10**12, f"{2000 * 16 * 2048}tok")
    stage.gradient_accumulation_steps = 4
    assert length()[1] == f"{2000 * 16 * 2048 * 4}tok"
    stage.warmup = "3%"
    assert length()[1] == f"{6 * 10**10}tok"
    stage.tokens, stage.epochs = None, 2.0
    assert length() == (2 * 300 * 2048, f"{round(0.03 * 2 * 300 * 2048)}tok")


def test_shares_are_of_tokens_where_rows_have_other_lengths():
    data = load_config(["model=tiny", "training=pretrain_phase1", "data=sample"]).data
    data.streams.pop("code")
    data.streams["english"].proportion, data.streams["math"].proportion = 50.0, 20.0
    found = {"english": SimpleNamespace(rows=100, tokens=5_000), "math": SimpleNamespace(rows=400, tokens=80_000)}
    assert shares(data, found) == {"english": 50 / 70, "math": 20 / 70}
    # 50 tokens of english for 20 of math are 1 row for 0.1 rows: 70 tokens in 1.1 rows.
    assert row_length(data, found) == pytest.approx(70 / 1.1)
    assert epoch_tokens(data, found) == pytest.approx(500 * 70 / 1.1)
    for stream in data.streams.values():
        stream.proportion = None
    assert shares(data, found) == {"english": 5 / 85, "math": 80 / 85}
    assert epoch_tokens(data, found) == pytest.approx(85_000)


def test_flops_per_token_by_hand():
    config = small(
        num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=3, vocab_size=5
    )
    matrices = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 3 + 4 * 5
    assert flops_per_token(config, 8) == 6 * matrices + 12 * 1 * 4 * 8


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_autocasts_the_products_where_the_processor_has_it(corpus, tmp_path, monkeypatch, has_bf16, dtype):
    monkeypatch.setattr(precision, "has_bf16", lambda: has_bf16)
    config = load_config(corpus.arguments(tmp_path / "run", "training.precision=bf16"))
    assert precision.describe(config) == ("bf16" if has_bf16 else "fp32 (this processor has no bf16)")
    model = training.build_model(config, mesh=None, weights=None)
    seen = []
    model.model.blocks[0].attention.wq.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    ids = torch.arange(64).reshape(2, 32)
    out = model({"input_ids": ids, "labels": ids})
    out.loss_sum.backward()
    assert seen == [dtype]
    assert out.loss_sum.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU whole models may ask for it")
@pytest.mark.parametrize(("layout", "why"), [("single_gpu", "without a GPU"), ("fsdp2", "with distributed.shard=true")])
def test_automatic_micro_batches_where_composer_has_none(corpus, tmp_path, capsys, layout, why):
    asked = ("training.auto_microbatch=true", f"distributed={layout}")
    line = refusal(capsys, corpus.arguments(tmp_path / "run", *asked))
    assert f"Composer does not offer it {why}" in line


def test_long_rows_of_the_shards_serve_several_sequence_lengths(corpus, tmp_path, capsys):
    """Cut when they are read, they train as shards of short rows do."""
    long = (f"data.root={tmp_path}/long", "data.row_length=64", "data.shuffle=false")
    assert cli.main(["convert", *corpus.arguments(tmp_path, *long)]) == 0
    for name, arguments in {"short": ["data.shuffle=false"], "cut": long}.items():
        short = ("training.stage.tokens=2560", *arguments)
        assert cli.main(["train", *corpus.arguments(tmp_path / name, *short)]) == 0
    short, cut = (read_records(tmp_path / name / "metrics.jsonl") for name in ("short", "cut"))
    for key in ("train/loss", "data/tokens/a", "tokens"):
        assert [record[key] for record in cut] == [record[key] for record in short]
    whole = (*long, "training.stage.sequence_length=64", "training.stage.tokens=2560")
    assert cli.main(["train", *corpus.arguments(tmp_path / "whole", *whole)]) == 0
    line = refusal(capsys, corpus.arguments(tmp_path / "run", "data.row_length=48"))
    assert "data.row_length is 48: expected a multiple of training.stage.sequence_length=32" in line
