"""Matrix products of the blocks in fp8 (Micikevicius et al., arXiv 2209.05433), through torchao."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from cheaper.config import RunConfig
from cheaper.errors import UserError
from cheaper.models.decoder import Decoder

CAPABILITY = (8, 9)  # of the first GPUs that multiply fp8
MULTIPLE = 16  # that both sizes of a matrix must be of


def check_fp8(config: RunConfig) -> None:
    """Raises ``UserError`` naming what products in fp8 lack here."""
    reason = None
    if not torch.cuda.is_available():
        reason = "there is no GPU"
    elif (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        reason = f"{torch.cuda.get_device_name()} has compute capability {has}, expected {needed} or more"
    elif importlib.util.find_spec("torchao") is None:
        reason = "torchao is not installed; it is in the extra gpu"
    elif config.training.precision != "bf16":
        reason = f"training.precision is {config.training.precision}, expected bf16"
    elif config.distributed.tensor_parallel_degree > 1:
        reason = f"distributed.tensor_parallel_degree is {config.distributed.tensor_parallel_degree}, expected 1"
    if reason:
        raise UserError(f"training.fp8 is true: {reason}")


def multiply_in_fp8(decoder: Decoder, emulate: bool = False) -> None:
    """Makes each matrix of the blocks multiply in fp8, forward and backward; names and parameters stay as they are.

    Inputs, weights and gradients are scaled by their largest element, anew in every pass. The embedding, the head, the
    norms and attention itself stay as they are, and so do matrices whose sizes are no multiples of 16.

    Args:
        decoder: Not yet divided; may be without memory (on the meta device).
        emulate: Round to fp8, but multiply in the type of the inputs, as any device can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # only needed here, and may be missing

    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)  # padded where a batch's tokens are no multiple
    convert_to_float8_training(decoder.blocks, module_filter_fn=lambda module, _: has_fp8_sizes(module), config=config)


def has_fp8_sizes(module: nn.Linear) -> bool:
    """Whether both sizes of a matrix are multiples that fp8 products take."""
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
