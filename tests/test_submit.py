"""Jobs for clusters: the shipped files are the generated ones, and the clusters' own tools and bash read them."""

import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from mcli import RunConfig

from cheaper import cli
from cheaper.pipeline import load_pipeline
from cheaper.submit import TARGETS, Job
from tests.conftest import REPOSITORY

STAGES = [stage.name for stage in load_pipeline(REPOSITORY / "yamls/pipeline.yaml", [])]
CHANGED = ["model=mobilellm_950m", "logging.wandb.project=it's mine"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_shipped_jobs_are_the_generated_ones(target):
    make, place, _ = TARGETS[target]
    shipped = sorted((REPOSITORY / place).parent.iterdir())
    assert sorted(path.stem for path in shipped) == sorted(STAGES)
    for path in shipped:
        assert path.read_text() == make(Job(path.stem))


@pytest.mark.parametrize("stage", STAGES)
def test_mosaicml_reads_its_runs(stage, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TARGETS["mcli"][0](Job(stage, nodes=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it warns of are unknown keys
        run = RunConfig.from_file(path)
    assert run.compute == {"cluster": "your-cluster", "gpus": 32, "gpu_type": "h100", "nodes": 4}
    assert run.scheduling["preemptible"]
    assert run.image
    assert set(run.integrations[0]) == {"integration_type", "git_repo", "git_branch", "pip_install"}


def test_skypilot_reads_its_tasks():
    sky = pytest.importorskip("sky", reason="skypilot pins other versions than this package; install it by itself")
    for stage in STAGES:
        task = sky.Task.from_yaml_config(yaml.safe_load(TARGETS["sky"][0](Job(stage))))
        assert task.num_nodes == 1
        assert all(resources.use_spot for resources in task.resources)


def executed(target: str, job: Job, tmp_path: Path) -> list[str]:
    """The training command that bash, in the place of the cluster, makes of the job: ``cheaper`` only prints it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "cheaper": f'exec {sys.executable} -m cheaper.cli "$@" --dry-run',
        "scontrol": "echo first-node",
        "srun": 'shift; exec "$@"',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    text = TARGETS[target][0](job)
    if target != "slurm":
        text = yaml.safe_load(text)["command" if target == "mcli" else "run"].replace("cd WrinkleFree", ": WrinkleFree")
    cluster = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        env={**os.environ, **cluster, "PATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    return shlex.split(line.removeprefix("$ "))


@pytest.mark.parametrize("target", ["mcli", "slurm"])
def test_a_signal_for_the_task_reaches_the_pipeline(target, tmp_path):
    """The process that the cluster starts, and sends its signals to, has become ``cheaper``."""
    for name, body in {
        "cheaper": "echo cheaper $$",
        "srun": 'shift; "$@" & echo task $!; wait',
        "scontrol": "",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = TARGETS[target][0](Job("midtrain"))
    if target == "mcli":
        text = yaml.safe_load(text)["command"].replace("cd WrinkleFree", ": WrinkleFree")
    (tmp_path / "job").write_text(text)  # bash does not treat the last command of a file as it does that of -c
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"}
    process = subprocess.Popen(["bash", tmp_path / "job"], env=environment, stdout=subprocess.PIPE, text=True)
    said = dict(line.split() for line in process.communicate()[0].splitlines())
    assert said["cheaper"] == said.get("task", str(process.pid))


@pytest.mark.parametrize(
    ("target", "nodes", "launcher"),
    [
        ("mcli", 2, ["composer"]),
        ("slurm", 2, ["--nnodes=2", "--nproc_per_node=8", "--rdzv_id=7", "--rdzv_endpoint=first-node:29500"]),
        ("sky", 1, ["--standalone", "--nproc_per_node=8"]),
    ],
)
def test_a_job_trains_its_stage(target, nodes, launcher, tmp_path):
    command = executed(target, Job("midtrain", nodes=nodes, storage="/shared", overrides=CHANGED), tmp_path)
    assert set(launcher) <= set(command)
    assert command[command.index("-m") + 1 :][:3] == ["cheaper.cli", "train", "yamls/midtrain.yaml"]
    assert (
        "training.checkpoint_path=/shared/runs/mobilellm_950m-pretrain_phase2" in command
    )  # where the stage before it is
    assert {"distributed=fsdp2", "training.checkpoint_dir=/shared/runs/${run_name}", *CHANGED} <= set(command)


def test_what_is_asked_for_is_printed_or_refused(capsys, monkeypatch, tmp_path):
    assert cli.main(["submit", "midtrain", "--to", "sky", "--gpus", "4", "--gpu", "a100", "--dry-run"]) == 0
    task = yaml.safe_load(capsys.readouterr().out)
    assert task["resources"]["accelerators"] == "A100:4"
    assert cli.main(["submit", "midtrain", "--to", "sky", "--nodes", "3", "--dry-run"]) == 2
    assert "error: --nodes 3: expected 1 with --to sky" in capsys.readouterr().err
    assert cli.main(["submit", "midtrian", "--to", "sky", "--dry-run"]) == 2
    assert "midtrian: no such stage; did you mean midtrain" in capsys.readouterr().err
    assert cli.main(["submit", "midtrain", "--to", "sky", "--dry-run", "model.num_layer=3"]) == 2
    assert "model.num_layer is not a key" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pipeline = str(REPOSITORY / "yamls/pipeline.yaml")
    assert cli.main(["submit", "midtrain", "--to", "slurm", "--pipeline", pipeline]) == 2
    assert "there is no command sbatch on this machine; the job is in midtrain.sbatch" in capsys.readouterr().err
    assert (tmp_path / "midtrain.sbatch").exists()
