"""Gives all experts as many tokens, without an auxiliary loss."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from cheaper.models.moe import Router


class ExpertBalancing(Algorithm):
    """After each step moves the bias of every expert by ``speed``: up where it had too few tokens, else down.

    "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), as DeepSeek-V3 uses it.

    Args:
        speed: The published one is 0.001.
    """

    def __init__(self, speed: float):
        self.speed = speed

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        routers = [module for module in state.model.modules() if isinstance(module, Router)]
        loads_LX = torch.stack([router.load for router in routers])
        dist.all_reduce(loads_LX)
        moves_LX = self.speed * (loads_LX.mean(-1, keepdim=True) - loads_LX).sign()
        for router, move in zip(routers, moves_LX, strict=True):
            router.bias += move
            router.load.zero_()
