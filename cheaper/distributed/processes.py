"""The processes of a run: how they find each other, and what the others do when one has died."""

from __future__ import annotations

import os
import re

import torch
from composer.devices import DeviceGPU
from composer.utils import dist, get_device

from cheaper.data.shared_memory import remove_stale_shared_memory

# What gloo, NCCL and the data loader say when another process is gone, or has not answered for minutes. What follows
# the first line is somebody's traceback: a data worker that has failed, not gone, hands its own on.
LOST = re.compile(
    r"connection (was )?(closed|reset)|broken pipe|timed? ?out|remote process exited|DataLoader worker \(pid",
    re.IGNORECASE,
)


def join_processes() -> None:
    """Joins the processes that ``composer``, ``torchrun`` or Slurm's ``srun`` started, or none when run alone."""
    if "GROUP_RANK" in os.environ:  # torchrun's name for what Composer calls the rank of the node
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    # Checkpoints and what is offloaded travel between processors.
    DeviceGPU.dist_backend = "cuda:nccl,cpu:gloo"
    dist.initialize_dist(get_device(None))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        # Composer's launcher leaves every process all cores, and they would wait for each other.
        torch.set_num_threads(max(1, os.cpu_count() // dist.get_local_world_size()))
    if dist.get_local_rank() == 0:
        remove_stale_shared_memory()
    dist.barrier()


def lost_another(error: RuntimeError) -> str | None:
    """If ``error`` says that another process is gone: one line about it; nobody is left to agree with on anything."""
    first = (str(error).splitlines() or [""])[0]
    if not LOST.search(first):
        return None
    reason = re.sub(r"^\[[^\]]*\] ", "", first)[:160]
    return f"rank {dist.get_global_rank()} has lost another process of the run ({reason})"
