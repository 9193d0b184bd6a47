"""Removes what a killed run of streaming left behind, and nothing that a living run still uses."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.util import clean_stale_shared_memory

SHARED_MEMORY = Path("/dev/shm")


def remove_stale_shared_memory() -> None:
    """Unlinks streaming's shared memory and lock files whose run is dead.

    Streaming's own ``clean_stale_shared_memory`` also removes those of other runs that are alive on this machine, so
    it serves only where ``/proc`` cannot tell. Call it on one process per machine, before a dataset is made.
    """
    if not Path("/proc/self/maps").exists():
        clean_stale_shared_memory()
        return
    name = re.compile(rf"(\d{{6}})_({'|'.join(SHM_TO_CLEAN)})")
    files = [(match[1], path) for path in SHARED_MEMORY.iterdir() if (match := name.fullmatch(path.name))]
    alive = _mapped_prefixes(name) if files else set()
    for prefix, path in files:
        if prefix not in alive:
            path.unlink(missing_ok=True)
            for lock in (BARRIER_FILELOCK, CACHE_FILELOCK):
                Path(tempfile.gettempdir(), f"{prefix}_{lock}").unlink(missing_ok=True)


def _mapped_prefixes(name: re.Pattern[str]) -> set[str]:
    """Prefixes of the segments that some process on this machine has mapped."""
    prefixes: set[str] = set()
    mapped = re.compile(rf"{re.escape(str(SHARED_MEMORY))}/{name.pattern}")
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            prefixes.update(match[1] for match in mapped.finditer(maps.read_text(errors="replace")))
        except OSError:  # the process ended, or belongs to another user
            if maps.exists() and not os.access(maps, os.R_OK):
                prefixes.update(_owned_by(maps.parent.stat().st_uid))
    return prefixes


def _owned_by(uid: int) -> set[str]:
    """Prefixes of another user's segments, which are theirs to remove."""
    return {path.name[:6] for path in SHARED_MEMORY.iterdir() if path.exists() and path.stat().st_uid == uid}
