"""The processes that Slurm's ``srun`` started, in the words of PyTorch."""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and so on from the variables of a step of several tasks.

    A launcher that ``srun`` started once per machine sets them itself for its processes; those stay.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or tasks == 1 or not environment.get("SLURM_STEP_ID", "").isdigit():
        return
    node = environment["SLURM_NODEID"]
    environment |= {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(node)]),
        "NODE_RANK": node,
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }


def tasks_per_node(text: str) -> list[int]:
    """Reads ``2(x3),1``: three machines with two tasks, then one with one."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, machines in parts for _ in range(int(machines or 1))]


def first_host(nodes: str) -> str:
    """The first of ``gpu[07-09,11],gpu20``, or of any list that Slurm writes."""
    name, number, rest = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes).groups()
    return name + (number or "") + rest
