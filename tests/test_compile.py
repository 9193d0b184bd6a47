"""``training.compile``: what is compiled computes the same. CPU tests of a feature for GPUs, in fp32.

Inductor's C++ takes a minute to compile: one test of blocks has it, in the others the same graphs are run eagerly.
"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from cheaper.compose import load_config
from cheaper.files import newest_checkpoint, read_records
from cheaper.losses.cross_entropy import compiled_cross_entropy, linear_cross_entropy
from cheaper.training import build_model
from tests.conftest import REPOSITORY
from tests.losses.test_cross_entropy import inputs
from tests.test_training import train

DOCUMENTS = torch.tensor([[10, 22, 0], [5, 7, 20]])


def model_of(corpus, *overrides: str):
    return build_model(load_config(corpus.arguments("unused", *overrides)), mesh=None, weights=None)


def losses(model, documents: torch.Tensor | None, steps: int = 5) -> list[float]:
    """Of a few steps on batches that are always the same."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    results = []
    for _ in range(steps):
        ids = torch.randint(320, (2, 32), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        if documents is not None:
            batch["document_lengths"] = documents
        loss = model.loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss.item())
    return results


@pytest.fixture
def traced(monkeypatch):
    """Starts anew, with graphs that are run eagerly; returns what is counted."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def compare(corpus, checkpointing: str, documents: torch.Tensor | None) -> None:
    override = f"distributed.activation_checkpointing={checkpointing}"
    plain, compiled = model_of(corpus, override), model_of(corpus, override, "training.compile=true")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert losses(compiled, documents) == pytest.approx(losses(plain, documents), abs=1e-5)


def test_compiled_losses_are_those_of_the_plain_model(corpus):
    torch._dynamo.reset()
    compare(corpus, "none", None)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_all_blocks_are_one_graph_with_what_is_recomputed(corpus, traced, checkpointing):
    compare(corpus, checkpointing, None)
    assert traced["stats"]["unique_graphs"] == 1
    assert not traced["graph_break"]


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_documents_are_left_out_of_the_graphs(corpus, traced, checkpointing):
    compare(corpus, checkpointing, DOCUMENTS)
    assert traced["graph_break"]


def test_evaluation_and_sampling_compile_nothing(corpus, traced):
    model = model_of(corpus, "training.compile=true").eval()
    for width in (8, 9, 10):
        model.model(torch.zeros(1, width, dtype=torch.int64))
    assert not traced["frames"]


def test_a_run_goes_on_compiled_and_back(corpus, tmp_path, traced):
    folder = tmp_path / "run"
    resumed = corpus.arguments(folder, "training.stage.tokens=2000", "training.resume=true")
    short = [argument for argument in resumed if argument != "training.resume=true"]
    assert train([*short, "training.checkpoint_interval=8", "training.compile=true"]) == 0
    keys = list(torch.load(newest_checkpoint(folder), weights_only=False)["state"]["model"])
    newest_checkpoint(folder).unlink()  # goes on from an earlier one
    assert train(resumed) == 0
    assert list(torch.load(newest_checkpoint(folder), weights_only=False)["state"]["model"]) == keys
    assert train(corpus.arguments(tmp_path / "plain", "training.stage.tokens=2000")) == 0
    ours, plain = (read_records(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    for record, expected in zip(ours, plain, strict=True):
        assert record["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)
    assert json.loads((folder / "summary.json").read_text())["steps"] == len(plain)


def test_divided_models_compile_to_the_same_losses(corpus, tmp_path):
    steps = "training.stage.tokens=600"
    layouts = {
        "sharded": ["distributed=fsdp2", "distributed.activation_checkpointing=selective"],
        "split": ["distributed=fsdp2_tp", "training.stage.batch_size_per_gpu=4"],
    }
    half = "training.stage.batch_size_per_gpu=2"
    runs = [
        corpus.arguments(tmp_path / name, steps, half, "training.compile=true", *run) for name, run in layouts.items()
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launcher, "tests/train_traced.py", json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        check=True,
        timeout=240,
    )
    assert train(corpus.arguments(tmp_path / "one", steps)) == 0
    expected = read_records(tmp_path / "one" / "metrics.jsonl")
    for name in layouts:
        for record, plain in zip(read_records(tmp_path / name / "metrics.jsonl"), expected, strict=True):
            assert record["train/loss"] == pytest.approx(plain["train/loss"], abs=1e-5)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_compiled_cross_entropy_is_the_plain_one(needs_grad):
    hidden, weight, labels = inputs(21)
    hidden.requires_grad_(needs_grad)
    weight.requires_grad_(needs_grad)
    results = [loss(hidden, weight, labels) for loss in (compiled_cross_entropy(), linear_cross_entropy)]
    torch.testing.assert_close(*(loss for loss, _ in results))
    assert results[0][1] == results[1][1]
    if needs_grad:
        ours, plain = (torch.autograd.grad(loss, [hidden, weight]) for loss, _ in results)
        torch.testing.assert_close(ours, plain)
