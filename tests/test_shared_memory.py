"""Stale shared memory is removed, that of a living run is not: real segments, real processes."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cheaper.cli import main
from cheaper.data.shared_memory import SHARED_MEMORY, remove_stale_shared_memory

HOLD = """
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(sys.argv[1], create=True, size=64)
print("ready", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm")


def hold(name: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_only_the_dead_are_removed():
    living, dead, foreign = "990001_locals", "990002_locals", "990003_other"
    keeper = hold(living)
    Path(SHARED_MEMORY / dead).write_bytes(b"left by a killed run")
    Path(SHARED_MEMORY / foreign).write_bytes(b"not streaming's")
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    try:
        remove_stale_shared_memory()
        assert (SHARED_MEMORY / living).exists()
        assert not (SHARED_MEMORY / dead).exists()
        assert (SHARED_MEMORY / foreign).exists()
        assert (SHARED_MEMORY / f"sem.{semaphore._semlock.name[1:]}").exists()  # of a living process pool
        keeper.kill()
        keeper.wait()
        Path(SHARED_MEMORY / living).write_bytes(b"its keeper is dead")
        remove_stale_shared_memory()
        assert not (SHARED_MEMORY / living).exists()
    finally:
        keeper.kill()
        keeper.wait()
        for name in (living, dead, foreign):
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def held() -> set[str]:
    """What this process has open in ``SHARED_MEMORY``, and the locks that lie beside."""
    files = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    locks = map(str, Path(tempfile.gettempdir()).glob("*_filelock"))
    return {*locks, *(file for file in files if file.startswith(str(SHARED_MEMORY)))}


def test_a_run_that_has_ended_holds_none(corpus, tmp_path):
    before = held()
    assert main(["train", *corpus.arguments(tmp_path / "run", "training.stage.tokens=512")]) == 0
    assert held() == before
