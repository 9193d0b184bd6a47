"""Clips the global norm of the gradients and logs it."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_


class GradientClipping(Algorithm):
    """Scales all gradients so that their global L2 norm is at most ``max_norm``.

    The norm before clipping is kept in ``norm``, a scalar tensor, for ``cheaper.callbacks.recipe_metrics``. Composer's
    algorithm of the same purpose computes that norm and throws it away.

    Args:
        max_norm: The largest norm let through, > 0.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norm = torch.tensor(0.0)

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        norm = clip_grad_norm_(state.model.parameters(), self.max_norm)
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
