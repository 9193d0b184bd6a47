"""Slurm's variables, as ``srun`` of 22.05 sets them."""

import pytest

from cheaper.distributed.slurm import adopt_slurm, first_host, tasks_per_node

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
