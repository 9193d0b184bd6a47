"""Gives back the shared memory of runs that have ended, killed ones too, and nothing that a living process uses."""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from pathlib import Path

from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.util import clean_stale_shared_memory

SHARED_MEMORY = Path("/dev/shm")
# Streaming's segments; those of one dataset share the number. Semaphores of killed process pools stay: the C library
# makes them under another name, so nothing tells which of them are still in use.
NAME = re.compile(rf"(\d{{6}})_(?:{'|'.join(SHM_TO_CLEAN)})")


def release(dataset: StreamingDataset) -> None:
    """Ends a data set's threads and gives back its memory, which streaming keeps until the process ends.

    Call it when no process reads the data set any more.
    """
    if hasattr(dataset, "_iterator"):
        dataset._iterator.non_blocking_exit()
        dataset._executor.shutdown()
    arrays = dataset._shared_barrier._arr, dataset._next_epoch.arr, dataset._cache_usage.arr
    memories = [array.shm for array in (*arrays, dataset._shard_states, dataset._shard_access_times)]
    memories += [dataset._resume_shm] if hasattr(dataset, "_resume_shm") else []
    if dataset._locals_shm.created_shms:  # the one that chose the number, which is taken while a file has it
        for lock in (dataset._shared_barrier.filelock_path, dataset._cache_filelock_path):
            Path(lock).unlink(missing_ok=True)
    for memory in (dataset._locals_shm, *memories):
        atexit.unregister(memory.cleanup)
        memory.cleanup()


def stale_shared_memory() -> list[Path]:
    """Segments of this user's in ``/dev/shm`` whose makers are dead."""
    if not SHARED_MEMORY.is_dir():
        return []
    files = [path for path in SHARED_MEMORY.iterdir() if NAME.fullmatch(path.name)]
    alive = _in_use() if files else set()
    return [path for path in files if path.name[:6] not in alive and _is_ours(path)]


def remove_stale_shared_memory() -> None:
    """Unlinks ``stale_shared_memory()`` and streaming's lock files that go with it.

    Streaming's own ``clean_stale_shared_memory`` also removes the segments of runs that are alive on this machine, so
    it serves only where ``/proc`` cannot tell. Call it on one process per machine, before a dataset is made.
    """
    if not Path("/proc/self/maps").exists():
        clean_stale_shared_memory()
        return
    for path in stale_shared_memory():
        path.unlink(missing_ok=True)
        for lock in (BARRIER_FILELOCK, CACHE_FILELOCK):
            Path(tempfile.gettempdir(), f"{path.name[:6]}_{lock}").unlink(missing_ok=True)


def _in_use() -> set[str]:
    """Numbers of the segments that some process of this user's has mapped."""
    mapped = re.compile(rf"{re.escape(str(SHARED_MEMORY))}/{NAME.pattern}")
    numbers: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            numbers.update(mapped.findall(maps.read_text(errors="replace")))
        except OSError:  # it has ended, or is another user's: then so are its files
            continue
    return numbers


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
