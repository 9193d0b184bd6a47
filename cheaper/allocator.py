"""The C library's allocator, which training on a CPU spends much time in."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h. Memory above the first is mapped anew at each allocation; what is free at the heap's end above
# the second is given back.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_MMAP_MAX = -3, -1, -4


def keep_freed_memory() -> str:
    """Makes glibc keep big tensors' memory for the next ones; any other C library is left as it is.

    By default each step's tensors are mapped anew and given back, and every 4 KiB of them cost a page fault.

    Returns:
        What the allocator does, for people.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before 2.35 it takes no such threshold; then nothing is mapped.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_MAX, 0)) and mallopt(M_TRIM_THRESHOLD, -1):
        return "glibc keeps freed memory"
    return "the system's allocator"
