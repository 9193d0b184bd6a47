"""Programs that a model wrote, run in a sandbox: see ``sandbox.py`` for what they may do there.

No network, no files but Python, the system's libraries and an empty folder in memory, an empty environment, limits of
time, memory, processes and files. They can import what Python finds outside of virtual environments.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaper.errors import UserError
from cheaper.evaluation.processes import share, together

SANDBOX = Path(__file__).with_name("sandbox.py")
SECONDS, MEMORY = 10.0, 2 << 30  # of each run of a program
START = 20.0  # seconds that a busy machine may take to start one


@dataclass(frozen=True)
class Run:
    """What became of a program.

    Args:
        status: Its exit status, negative after a signal, ``None`` if its time was over.
        output: What it printed.
    """

    status: int | None
    output: str


def execute(program: str, inputs: Sequence[str] = ("",), seconds: float = SECONDS, memory: int = MEMORY) -> list[Run]:
    """Runs a program in a sandbox, once for each input, up to the first run that fails.

    Args:
        program: Python.
        inputs: Texts of standard input.
        seconds: Of the clock, for each run.
        memory: Bytes, of each process.

    Raises:
        UserError: This machine has no sandbox.
    """
    python, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    is_root = os.getuid() == 0
    namespaces = ["--net", "--mount", "--pid", "--ipc", *([] if is_root else ["--user", "--map-root-user"])]
    command = ["unshare", *namespaces, "--fork", "--kill-child", python, "-I", str(SANDBOX)]
    command += [prefix, os.path.relpath(python, prefix), str(is_root), str(seconds), str(memory)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"program": program, "inputs": list(inputs)}),
            capture_output=True,
            text=True,
            timeout=(seconds + 1) * len(inputs) + START,
            cwd="/",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise UserError("--execute_code: there is no unshare, which util-linux has, to run programs with") from None
    except subprocess.TimeoutExpired:
        return [Run(None, "")]
    if "started" not in done.stdout:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"--execute_code: this machine makes no sandbox for programs ({why[:120]})")
    if done.returncode:  # the program broke the sandbox, which is its failure
        return [Run(done.returncode, "")]
    return [Run(**run) for run in json.loads(done.stdout.splitlines()[-1])]


@functools.cache
def check_sandbox() -> None:
    """Tries the sandbox once.

    Raises:
        UserError: This machine has none.
    """
    (run,) = execute("print('runs')")
    if run != Run(0, "runs\n"):
        raise UserError(f"--execute_code: Python does not start in the sandbox (status {run.status})")


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end, past its assertions; leaving early does not count."""
    secret = secrets.token_hex()
    (run,) = execute(f"{program}\nprint({secret!r})", seconds=seconds)
    return run.status == 0 and run.output.rstrip().endswith(secret)


def in_parallel(function: Callable[[Any], bool], items: Sequence[Any]) -> list[bool]:
    """``function`` of each item: the processes of ``torchrun`` share the items, each on its part of the cores."""
    mine = share(range(len(items)))
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, cores)) as threads:
        done = together(dict(zip(mine, threads.map(function, (items[number] for number in mine)), strict=True)))
    return [done[number] for number in range(len(items))]
