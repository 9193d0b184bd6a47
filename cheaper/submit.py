"""One stage of a pipeline as a job for a cluster: MosaicML's platform, Slurm or SkyPilot.

All of them run the same command, which goes on where an earlier attempt stopped, so that a job that was preempted is
simply started again. The files in ``mcli/`` and ``cluster/`` are made here.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cheaper.errors import UserError

REPOSITORY = "WrinkleFree/WrinkleFree-CheaperTraining"
IMAGE = "mosaicml/pytorch:2.7.0_cu128-python3.12-ubuntu22.04"


@dataclass(frozen=True)
class Job:
    """A stage on so many machines.

    Args:
        stage: Of ``pipeline``.
        nodes: Machines.
        gpus: Of each machine.
        gpu: Their kind, as the cluster calls it.
        overrides: For the training.
        pipeline: The file.
        storage: A folder or URL that all machines and all attempts see; runs and shards are in it.
        hours: The longest an attempt takes (Slurm).
        cluster: Name of the cluster (MosaicML).
    """

    stage: str
    nodes: int = 1
    gpus: int = 8
    gpu: str = "h100"
    overrides: list[str] = field(default_factory=list)
    pipeline: str = "yamls/pipeline.yaml"
    storage: str = "/storage"
    hours: int = 24
    cluster: str = "your-cluster"

    @property
    def name(self) -> str:
        """Of the job: letters, digits and hyphens."""
        return self.stage.replace("_", "-")

    def command(self, launcher: str) -> str:
        """What each machine runs; ``launcher`` is in the shell's words, for the cluster's variables to be filled in."""
        layout = "fsdp2" if self.nodes * self.gpus > 1 else "single_gpu"
        folders = [f"training.checkpoint_dir={self.storage}/runs/${{run_name}}"]
        folders.append(f"data.root={self.storage}/data/${{data.name}}-${{data.row_length}}")
        arguments = shlex.join([f"distributed={layout}", *folders, *self.overrides])
        stage = f"--from {self.stage} --until {self.stage}"
        return f'cheaper pipeline {self.pipeline} {stage} --launcher "{launcher}" \\\n  {arguments}'


def mcli(job: Job) -> str:
    """A run for ``mcli run -f``. The platform tells Composer's launcher which machine it is on."""
    note = f"# Every machine must see {job.storage}: runs, checkpoints and shards are in it.\n"
    run: dict[str, Any] = {
        "name": job.name,
        "image": IMAGE,
        "compute": {"cluster": job.cluster, "gpus": job.nodes * job.gpus, "gpu_type": job.gpu, "nodes": job.nodes},
        "scheduling": {"preemptible": True, "max_retries": 10, "retry_on_system_failure": True},
        "integrations": [
            {"integration_type": "git_repo", "git_repo": REPOSITORY, "git_branch": "main", "pip_install": ".[gpu]"}
        ],
        "command": f"cd {Path(REPOSITORY).name}\nexec {job.command('composer')}\n",
    }
    return note + _yaml(run)


def slurm(job: Job) -> str:
    """A script for ``sbatch``. Five minutes before its time is up the run writes a checkpoint and queues again."""
    torchrun = (
        f"torchrun --nnodes={job.nodes} --nproc_per_node={job.gpus} --rdzv_id=$SLURM_JOB_ID "
        "--rdzv_backend=c10d --rdzv_endpoint=$HEAD:29500"
    )
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpu}:{job.gpus}
#SBATCH --exclusive
#SBATCH --time={job.hours}:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
#SBATCH --signal=B:TERM@300
set -uo pipefail
export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

job() {{ # signals reach srun's own children alone
  exec {job.command(torchrun)}
}}
export -f job

again() {{ # the run writes its checkpoint and ends
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$steps"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}}
trap again TERM

srun --kill-on-bad-exit=1 bash -c job &
steps=$!
wait "$steps"
"""


def sky(job: Job) -> str:
    """A task for ``sky jobs launch``, on a spot machine that is replaced when it is taken away.

    Raises:
        UserError: The job is for several machines. Each would upload what it wrote to a ``MOUNT_CACHED`` bucket in its
            own time, when the first has long called the checkpoint whole; with ``MOUNT`` no file can be appended to.
    """
    if job.nodes > 1:
        reason = "a bucket of SkyPilot's may lack parts of a checkpoint that several machines wrote"
        raise UserError(f"--nodes {job.nodes}: expected 1 with --to sky, for {reason}")
    task: dict[str, Any] = {
        "name": job.name,
        "resources": {
            "accelerators": f"{job.gpu.upper()}:{job.gpus}",
            "use_spot": True,
            "disk_size": 512,
            "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3},
        },
        "workdir": ".",
        "file_mounts": {job.storage: {"name": "cheaper-training", "mode": "MOUNT_CACHED"}},
        "setup": "pip install -e '.[gpu]'\n",
        # No exec: SkyPilot appends lines that wait until the checkpoints are uploaded.
        "run": job.command("torchrun --standalone --nproc_per_node=$SKYPILOT_NUM_GPUS_PER_NODE") + "\n",
    }
    return _yaml(task)


# How each cluster's file is made, where it lies in this repository, and what takes it.
TARGETS = {
    "mcli": (mcli, "mcli/{stage}.yaml", ["mcli", "run", "-f"]),
    "slurm": (slurm, "cluster/slurm/{stage}.sbatch", ["sbatch"]),
    "sky": (sky, "cluster/sky/{stage}.yaml", ["sky", "jobs", "launch", "--yes"]),
}


def submit(job: Job, target: str, folder: Path) -> Path:
    """Writes the job's file into ``folder`` and hands it to the cluster's own command.

    Raises:
        UserError: The command is missing or refuses the job.
    """
    make, place, command = TARGETS[target]
    path = folder / Path(place.format(stage=job.stage)).name
    path.write_text(make(job))
    try:
        done = subprocess.run([*command, str(path)])
    except FileNotFoundError:
        raise UserError(
            f"--to {target}: there is no command {command[0]} on this machine; the job is in {path}"
        ) from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)} {path}: refused the job (exit status {done.returncode})")
    return path


def _yaml(content: dict[str, Any]) -> str:
    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, width=120)
