"""Removes what killed runs and conversions left in shared memory, and nothing that a living process still uses."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.util import clean_stale_shared_memory

SHARED_MEMORY = Path("/dev/shm")
# Streaming's segments, which belong together by their number, and the semaphores of Python's process pools.
NAME = re.compile(rf"(?P<group>\d{{6}})_({'|'.join(SHM_TO_CLEAN)})|(?P<semaphore>sem\.mp-\w{{8}})")


def stale_shared_memory() -> list[Path]:
    """Files of this user's in ``/dev/shm`` whose makers are dead."""
    if not SHARED_MEMORY.is_dir():
        return []
    files = [path for path in SHARED_MEMORY.iterdir() if NAME.fullmatch(path.name)]
    alive = _in_use() if files else set()
    return [path for path in files if _key(path.name) not in alive and _is_ours(path)]


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
            Path(tempfile.gettempdir(), f"{_key(path.name)}_{lock}").unlink(missing_ok=True)


def _key(name: str) -> str:
    match = NAME.fullmatch(name)
    return match["group"] or match["semaphore"]


def _in_use() -> set[str]:
    """Keys of the files that some process of this user's has mapped."""
    mapped = re.compile(rf"{re.escape(str(SHARED_MEMORY))}/({NAME.pattern})")
    keys: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            keys.update(_key(match[1]) for match in mapped.finditer(maps.read_text(errors="replace")))
        except OSError:  # it has ended, or is another user's: then so are its files
            continue
    return keys


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
