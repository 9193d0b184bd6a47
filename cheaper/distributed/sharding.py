"""Parameters, gradients and optimizer state over devices: FSDP2 (arXiv 2304.11277) through Composer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
from composer.utils import FSDP2Config, ParallelismConfig, dist
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from cheaper.config import DistributedConfig
from cheaper.errors import UserError
from cheaper.models.decoder import Decoder


@dataclass
class _FSDP2Config(FSDP2Config):
    """Composer's, which has no key for replicas of the sharded model."""

    replicate_degree: int = 1

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicate_degree if self.replicate_degree > 1 else None


def parallelism(config: DistributedConfig) -> ParallelismConfig | None:
    """What Composer's trainer is told of sharding; ``None`` where every device keeps a whole copy.

    Raises:
        UserError: The processes cannot be divided as asked.
    """
    if not config.shard:
        return None
    if dist.get_world_size() % config.replicate_degree:
        raise UserError(
            f"distributed.replicate_degree is {config.replicate_degree}: expected a divisor of the "
            f"{dist.get_world_size()} processes"
        )
    _average_on_gloo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Composer calls its FSDP2 experimental
        # Whole state dicts: a checkpoint goes on with any number of processes, sharded or not.
        return ParallelismConfig(fsdp2=_FSDP2Config(state_dict_type="full", replicate_degree=config.replicate_degree))


def gather_for_generation(decoder: Decoder) -> None:
    """Lets ``decoder.next_token_logits`` gather a sharded model's parameters as ``forward`` does."""
    if isinstance(decoder, FSDPModule):
        register_fsdp_forward_method(decoder, "next_token_logits")


def _average_on_gloo() -> None:
    """Makes FSDP2 sum and then divide on a CPU: up to PyTorch 2.7 it asks gloo for averages, which gives sums."""
    if torch.cuda.is_available() or hasattr(FSDPModule, "set_gradient_divide_factor"):
        return

    def sum_then_divide(shards, replicas, *_):
        return 1.0, float(shards.size() * (replicas.size() if replicas else 1))

    collectives._get_gradient_divide_factors = sum_then_divide
