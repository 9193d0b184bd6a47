"""Stages in a row as real processes: order, weights handed on, interruption, and what is refused."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from cheaper import cli
from cheaper.checkpoints import find_model, load_decoder
from cheaper.files import newest_checkpoint, read_records
from tests.conftest import REPOSITORY, Corpus

PYTHON = shlex.quote(sys.executable)


@pytest.fixture
def three(corpus: Corpus, tmp_path):
    """A pipeline of three short stages with runs in ``tmp_path``; the last starts from the first."""
    recipe = str(corpus.folder / "recipe.yaml")
    short = ["training.stage.tokens=640", "training.samples.prompts=[]"]

    def stage(name: str, *more: str, **keys: str) -> dict:
        return {"recipe": recipe, "overrides": [*short, f"training.checkpoint_dir={tmp_path}/{name}", *more], **keys}

    path = tmp_path / "pipeline.yaml"
    stages = {
        "first": stage("first"),
        "second": stage("second", start_from="first"),
        "third": stage("third", "training.seed=3", start_from="first"),
    }
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cheaper.cli", "pipeline", *arguments, "--launcher", PYTHON]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_stages_run_in_order_once_and_start_from_weights(three, tmp_path):
    done = run(str(three), "training.stage.learning_rate=1e-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n$ ") == 3
    for name in ("first", "second", "third"):
        assert f"  {name}" in done.stdout
        assert (tmp_path / name / "summary.json").exists()
        assert "learning_rate: 0.001" in (tmp_path / name / "run.yaml").read_text()
    assert f"checkpoint_path: {tmp_path}/first" in (tmp_path / "third" / "run.yaml").read_text()
    weights = [load_decoder(find_model(str(tmp_path / name), "run")).embedding.weight for name in ("second", "third")]
    assert not torch.equal(*weights)  # another seed, other batches
    again = run(str(three))
    assert again.returncode == 0
    assert "\n$ " not in again.stdout
    assert again.stdout.count("finished, ") == 6  # said once on the way and once in the table


def test_an_interrupted_stage_goes_on(three, tmp_path):
    slow = "training.stage.tokens=64000"
    command = [sys.executable, "-m", "cheaper.cli", "pipeline", str(three), "--launcher", PYTHON, slow]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True)
    while not newest_checkpoint(tmp_path / "first"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "first   interrupted at step-" in process.stdout.read()
    stopped = newest_checkpoint(tmp_path / "first")
    done = run(str(three), "--until", "first", "training.stage.tokens=64000")
    assert done.returncode == 0, done.stderr
    assert "training.resume=true" in done.stdout
    assert newest_checkpoint(tmp_path / "first") > stopped


@pytest.mark.parametrize("launcher", ["torchrun --standalone --nproc_per_node=2", "composer -n 2"])
def test_a_signal_reaches_the_ranks_of_a_launcher(three, tmp_path, launcher):
    launcher = str(Path(sys.executable).with_name(launcher))
    overrides = ["training.stage.tokens=640000", "training.checkpoint_interval=100000", "distributed=fsdp2"]
    command = [sys.executable, "-m", "cheaper.cli", "pipeline", str(three), "--launcher", launcher, *overrides]
    metrics, reached = tmp_path / "first" / "metrics.jsonl", 0
    # The second run goes on with the first. A terminal sends Ctrl-C to the whole group.
    for signum, send in ((signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)):
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while len(read_records(metrics)) <= reached:
            assert process.poll() is None
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        send(process.pid, signum)
        assert process.wait(60) == 128 + signum
        printed = (tmp_path / "output").read_text()
        assert f"stopped by {signum.name}; checkpoint" in printed
        assert "Killing training processes" not in printed  # as Composer's launcher says when it is told itself
        assert len(family) >= 3
        assert not psutil.wait_procs(family, timeout=5)[1]
        steps = [record["step"] for record in read_records(metrics)]
        assert newest_checkpoint(tmp_path / "first").name == f"step-{steps[-1]:08d}"
        assert steps == [*range(1, len(steps) + 1)]
        reached = len(steps)
    assert not (tmp_path / "second").exists()


def test_from_and_until_and_dry_run(three, tmp_path, capsys):
    assert cli.main(["pipeline", str(three), "--dry-run", "--from", "second"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("$ ") == 2
    assert f"training.checkpoint_path={tmp_path}/first" in printed
    assert printed.count("not started") == 3
    assert cli.main(["pipeline", str(three), "--from", "second"]) == 2
    assert "stage second starts from first, which has not finished" in capsys.readouterr().err
    assert cli.main(["pipeline", str(three), "--from", "third", "--until", "first"]) == 2
    assert "--from third comes after --until first" in capsys.readouterr().err
    assert cli.main(["pipeline", str(three), "--until", "secnd"]) == 2
    assert "--until secnd: no such stage; did you mean second?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stages: stages["second"].update(start_form="first"), "stages.second.start_form is not a key"),
        (lambda stages: stages["second"].pop("recipe"), "stages.second names no recipe"),
        (
            lambda stages: stages["first"].update(start_from="third"),
            "stages.first.start_from is third: expected one of",
        ),
        (lambda stages: stages["first"].update(recipe="none.yaml"), "none.yaml: no such file"),
        (
            lambda stages: stages["third"].update(overrides=stages["first"]["overrides"]),
            "first and third have one folder",
        ),
        (lambda stages: stages["third"]["overrides"].append("model.layers=3"), "model.layers is not a key"),
    ],
)
def test_mistakes_in_any_stage_are_told_before_the_first_runs(three, capsys, change, message):
    content = yaml.safe_load(three.read_text())
    change(content["stages"])
    three.write_text(yaml.safe_dump(content, sort_keys=False))
    assert cli.main(["pipeline", str(three)]) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_pipelines_compose(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("yamls/pipeline.yaml", "yamls/quickstart/pipeline.yaml"):
        assert cli.main(["pipeline", str(REPOSITORY / path), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("$ ") == 5 + 7
