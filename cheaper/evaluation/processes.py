"""Work that the processes of ``torchrun`` share, and whose results all of them have."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed
from composer.utils import dist

PATIENCE = timedelta(days=1)  # long answers take some processes much longer than others


def share(items: Sequence[Any]) -> Sequence[Any]:
    """What this process is to do of ``items``."""
    return items[dist.get_global_rank() :: dist.get_world_size()]


def together(done: dict[Any, Any]) -> dict[Any, Any]:
    """The results of all processes, from each one's own."""
    if dist.get_world_size() == 1:
        return done
    parts: list[dict[Any, Any]] = [{} for _ in range(dist.get_world_size())]
    torch.distributed.all_gather_object(parts, done, group=_group())
    return {key: value for part in parts for key, value in part.items()}


def is_first() -> bool:
    """Whether this is the process that speaks and writes."""
    return dist.get_global_rank() == 0


@functools.cache
def _group() -> Any:
    return torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
