"""Slurm's variables, as ``srun`` of 22.05 sets them."""

import os
import subprocess
import sys

import pytest

from cheaper import cli
from cheaper.distributed.slurm import adopt_slurm, first_host, tasks_per_node
from cheaper.files import newest_checkpoint
from tests.conftest import REPOSITORY

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_task_of_a_step_knows_its_place():
    environment = dict(STEP)
    adopt_slurm(environment)
    added = {key: value for key, value in environment.items() if key not in STEP}
    assert added == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
    }


@pytest.mark.parametrize("change", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": "batch"}])
def test_a_launcher_a_lone_task_and_the_batch_script_are_left_alone(change):
    environment = {**STEP, **change}
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("vm", "vm"), ("a,b", "a"), ("gpu[07-09,11],gpu20", "gpu07"), ("rack[1-2]-ib", "rack1-ib"), ("n-1,n-2", "n-1")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_tasks_per_node():
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_two_tasks_make_one_teacher_cache(corpus, tmp_path):
    run = tmp_path / "teacher"
    assert cli.main(["train", *corpus.arguments(run, "training.stage.tokens=640", "training.samples.prompts=[]")]) == 0
    teacher = [f"training.teacher_model={newest_checkpoint(run)}", f"training.teacher_cache={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "cheaper.cli", "cache-teacher", *corpus.arguments(tmp_path / "none", *teacher)]
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    alone = {key: value for key, value in os.environ.items() if key != "RANK"}  # the training set it in here
    tasks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**alone, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert (tmp_path / "cache" / "a" / "index.json").exists()
    assert [f"{tmp_path}/cache/a" in output for output in outputs] == [True, False]  # the first speaks for both
