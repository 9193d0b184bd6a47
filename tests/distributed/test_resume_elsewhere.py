"""A run goes on with other processes as if it had not stopped, with words that no number of processes divides.

One process writes whole checkpoints, several that divide the model write shards.

Real processes on gloo, fp32.
"""

import shutil
from pathlib import Path

import pytest

from cheaper.files import read_records
from tests.distributed.test_same_losses import FSDP2, TENSOR, train_all

SMALL = ["model.vocab_size=50257", "training.stage.tokens=2048", "training.checkpoint_interval=4"]
LAYOUTS = {"one": (1, []), "FSDP2 on 2": (2, [FSDP2]), "FSDP2 on 4": (4, [FSDP2]), "TP 2 × FSDP2 2": (4, [TENSOR])}
PAIRS = [(saved, resumed) for saved in LAYOUTS for resumed in LAYOUTS if saved != resumed]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Each layout's run of 8 steps, and from the checkpoint in the middle of each the same run on every other."""
    folder = tmp_path_factory.mktemp("resumed")
    train_grouped(corpus, folder, LAYOUTS)
    for saved, resumed in PAIRS:
        later = shutil.ignore_patterns("step-00000008*", "summary.json")
        shutil.copytree(folder / saved, folder / f"{saved} → {resumed}", ignore=later)
    resumes = {f"{a} → {b}": (LAYOUTS[b][0], [*LAYOUTS[b][1], "training.resume=true"]) for a, b in PAIRS}
    train_grouped(corpus, folder, resumes)
    return folder


def train_grouped(corpus, folder: Path, runs: dict[str, tuple[int, list[str]]]) -> None:
    """Those of as many processes in one group of them: most of the time is theirs to start."""
    for processes in (1, 2, 4):
        some = {name: [*SMALL, *arguments] for name, (count, arguments) in runs.items() if count == processes}
        train_all(corpus, folder, processes, some)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_loss_over_a_vocabulary_that_cannot_be_divided_evenly(runs, layout):
    ours, one = (read_records(runs / name / "metrics.jsonl") for name in (layout, "one"))
    assert [record["train/loss"] for record in ours] == pytest.approx([r["train/loss"] for r in one], abs=1e-5)


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_a_run_goes_on_elsewhere(runs, saved, resumed):
    ours, one = (read_records(runs / name / "metrics.jsonl") for name in (f"{saved} → {resumed}", "one"))
    assert [record["step"] for record in ours] == [record["step"] for record in one]
    assert [record["train/loss"] for record in ours] == pytest.approx([r["train/loss"] for r in one], abs=2e-5)
    assert [record["data/tokens/a"] for record in ours] == [record["data/tokens/a"] for record in one]
