"""However a run is divided over processes, it is the same run. Real processes on gloo, fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cheaper.files import read_records
from tests.conftest import REPOSITORY, Corpus

ROWS = 8  # of a step, over all processes
STEPS = f"training.stage.tokens={50 * ROWS * 32}"
FSDP2, TENSOR, FOUR = "distributed=fsdp2", "distributed=fsdp2_tp", "distributed.tensor_parallel_degree=4"
FULL, SELECTIVE = "distributed.activation_checkpointing=full", "distributed.activation_checkpointing=selective"
# How a run is divided: processes and arguments.
LAYOUTS = {
    "one": (1, []),
    "one, selective": (1, [SELECTIVE]),
    "DDP on 2": (2, []),
    "FSDP2 on 2": (2, [FSDP2]),
    "FSDP2 on 2, full": (2, [FSDP2, FULL]),
    "FSDP2 on 4": (4, [FSDP2]),
    "TP 2": (2, [TENSOR]),
    "TP 2 × FSDP2 2, selective": (4, [TENSOR, SELECTIVE]),
    "TP 4": (4, [TENSOR, FOUR]),
}
if torch.__version__ >= "2.8":  # PyTorch 2.7 cannot run replicas of a sharded model on a CPU
    LAYOUTS["HSDP on 2 × 2"] = (4, [FSDP2, "distributed.replicate_degree=2"])
EXPERTS = "{number: 8, per_token: 2, groups: 4, groups_kept: 2, intermediate_size: 16, dense_layers: 1}"
# What is computed.
VARIANTS = {
    "plain": [],
    "documents": ["data.intra_document_attention=true"],
    "distilled": ["training.teacher_model=FOLDER/plain, one"],
    "experts": [
        f"model.experts={EXPERTS}",
        "model.latent_attention={query_rank: 12, key_value_rank: 10, plain_dim: 8, value_dim: 8}",
    ],
}
RUNS = [(variant, layout) for layout in LAYOUTS for variant in VARIANTS if layout != "one"]


def rows_of(processes: int, arguments: list[str]) -> str:
    """So many for each process that a step has ``ROWS`` over all; processes that share matrices have the same ones."""
    degree = 4 if FOUR in arguments else 2 if TENSOR in arguments else 1
    return f"training.stage.batch_size_per_gpu={ROWS * degree // processes}"


def train_all(corpus: Corpus, folder: Path, processes: int, runs: dict[str, list[str]]) -> None:
    """Trains the runs one after the other in one group of processes; their folders have the runs' names."""
    commands = [corpus.arguments(folder / name, rows_of(processes, run), *run) for name, run in runs.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    driver = str(Path(__file__).with_name("train_several.py"))
    done = subprocess.run(
        [*launcher, driver, json.dumps(commands)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    for processes in (1, 2, 4):
        layouts = {name: arguments for name, (count, arguments) in LAYOUTS.items() if count == processes}
        runs = {
            f"{variant}, {layout}": [STEPS, *arguments, *(change.replace("FOLDER", str(folder)) for change in changes)]
            for variant, changes in VARIANTS.items()
            for layout, arguments in layouts.items()
        }
        train_all(corpus, folder, processes, runs)
    return folder


@pytest.mark.parametrize(("variant", "layout"), RUNS)
def test_losses_gradients_and_samples_are_those_of_one_process(trained, variant, layout):
    ours, one = (trained / f"{variant}, {name}" for name in (layout, "one"))
    records = [read_records(folder / "metrics.jsonl") for folder in (ours, one)]
    assert len(records[0]) == len(records[1]) >= 50
    for record, expected in zip(*records, strict=True):
        assert record["data/tokens/a"] == expected["data/tokens/a"]
        # What sums round differently grows from step to step.
        near, norm = (1e-5, 2e-3) if record["step"] <= 20 else (1e-4, 1e-2)
        assert record["train/loss"] == pytest.approx(expected["train/loss"], abs=near)
        assert record["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=norm)
        assert record["train/accuracy"] == pytest.approx(expected["train/accuracy"], abs=1e-6)
    assert read_records(ours / "samples.jsonl") == read_records(one / "samples.jsonl")


def test_the_variants_differ(trained):
    losses = {read_records(trained / f"{name}, one" / "metrics.jsonl")[-1]["train/loss"] for name in VARIANTS}
    assert len(losses) == len(VARIANTS)
