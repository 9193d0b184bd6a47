"""Kills and signals: a resumed run equals one that was never stopped, bit for bit, with one process and with two."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from cheaper.checkpoints import model_weights, safe_load
from cheaper.data.shared_memory import stale_shared_memory
from cheaper.files import newest_checkpoint, read_records
from tests.conftest import finish, kill, start

EXACT = ("train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate", "data/tokens/")


def samples(run: Path, rank: int) -> dict[int, list[int]]:
    """Samples of each step; a step that was done twice must have seen the same ones."""
    seen: dict[int, list[int]] = {}
    for line in (run / f"samples-{rank}.log").read_text().splitlines():
        record = json.loads(line)
        assert seen.setdefault(record["step"], record["samples"]) == record["samples"]
    return seen


def assert_same_runs(one: Path, other: Path, processes: int) -> None:
    first, second = (read_records(run / "metrics.jsonl") for run in (one, other))
    assert [record["step"] for record in first] == [record["step"] for record in second]
    for a, b in zip(first, second, strict=True):
        names = [name for name in a if name.startswith(EXACT)]
        assert len(names) >= len(EXACT)
        for name in names:
            assert a[name] == b[name], (a["step"], name)
    for rank in range(processes):
        assert samples(one, rank) == samples(other, rank)
    weights = [model_weights(safe_load(newest_checkpoint(run))) for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def wait_for_step(run: Path, step: int, process) -> None:
    path = run / "samples-0.log"
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    raise AssertionError("the run did not get that far")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> dict[int, Path]:
    """Runs of 40 steps of 4 rows with 1 and 2 processes: they go through the 277 rows of an epoch in part."""
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path_factory.mktemp("run") / "uninterrupted"
        rows = f"training.stage.batch_size_per_gpu={4 // processes}"
        finish(start(corpus.arguments(runs[processes], rows), processes))
    return runs


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume(corpus, tmp_path, uninterrupted, processes):
    before = stale_shared_memory()
    run = tmp_path / "killed"
    rows = f"training.stage.batch_size_per_gpu={4 // processes}"
    victim = start(corpus.arguments(run, rows), processes, SLOW="0.05")
    wait_for_step(run, 16, victim)
    kill(victim)
    assert newest_checkpoint(run).name == "step-00000010.pt"
    finish(start(corpus.arguments(run, rows, "training.resume=true"), processes))
    assert_same_runs(run, uninterrupted[processes], processes)
    assert set(stale_shared_memory()) <= set(before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_and_leaves(corpus, tmp_path, uninterrupted, signum, status):
    run = tmp_path / "stopped"
    process = start(corpus.arguments(run), SLOW="0.05")
    wait_for_step(run, 13, process)
    process.send_signal(signum)
    output = finish(process, status)
    assert f"stopped by {signum.name}; checkpoint {run}/step-" in output
    assert "Traceback" not in output
    stopped_at = int(newest_checkpoint(run).stem.removeprefix("step-"))
    assert stopped_at >= 13
    assert stopped_at % 10
    finish(start(corpus.arguments(run, "training.resume=true")))
    assert_same_runs(run, uninterrupted[1], processes=1)


def test_a_second_ctrl_c_stops_at_once(corpus, tmp_path):
    run = tmp_path / "stopped"
    process = start(corpus.arguments(run), SLOW="30")
    while not (run / "run.yaml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None  # it waits for the step to end
    process.send_signal(signal.SIGINT)
    finish(process, 130, timeout=5)
    assert newest_checkpoint(run) is None


def test_a_finished_run_says_so(corpus, uninterrupted):
    run = uninterrupted[1]
    before = {path.name: path.stat().st_mtime for path in run.iterdir() if path.suffix != ".log"}
    output = finish(start(corpus.arguments(run, "training.resume=true")))
    assert f"test has finished: {run}" in output
    assert {path.name for path in run.iterdir() if path.suffix == ".pt"} == {n for n in before if n.endswith(".pt")}
    assert (run / "summary.json").stat().st_mtime == before["summary.json"]


def test_gradients_do_not_depend_on_accumulation_or_processes(corpus, tmp_path):
    """Rows have uneven numbers of targets here: the first token of each document is none."""
    within = "data.intra_document_attention=true"
    tokens = "training.stage.tokens=256"
    unclipped = "training.stage.max_grad_norm=1e9"
    gradients = {}
    for name, rows, accumulation, processes in (("whole", 8, 1, 1), ("accumulated", 1, 8, 1), ("two", 4, 1, 2)):
        target = tmp_path / f"{name}.pt"
        arguments = corpus.arguments(
            tmp_path / name,
            within,
            tokens,
            unclipped,
            f"training.stage.batch_size_per_gpu={rows}",
            f"training.stage.gradient_accumulation_steps={accumulation}",
        )
        finish(start(arguments, processes, GRADIENTS=str(target)))
        gradients[name] = torch.load(target, weights_only=True)
    for name in ("accumulated", "two"):
        for parameter, expected in gradients["whole"].items():
            torch.testing.assert_close(gradients[name][parameter], expected, atol=1e-6, rtol=0)
    assert max(gradient.abs().max() for gradient in gradients["whole"].values()) > 1e-3


def test_three_kills_at_random_moments(corpus, tmp_path):
    """The short form of ``kill_repeatedly``, which kills 50 times."""
    from tests.e2e.kill_repeatedly import kill_repeatedly

    hits = kill_repeatedly(corpus, tmp_path, kills=3, processes=1, seed=1)
    assert sum(hits.values()) == 3
