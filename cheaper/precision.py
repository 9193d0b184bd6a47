"""In which type a run computes."""

from __future__ import annotations

import torch

from cheaper.config import RunConfig


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Of matrix products: bf16 where ``training.precision`` asks for it and the device has it, else fp32."""
    return torch.bfloat16 if config.training.precision == "bf16" and has_bf16() else torch.float32


def has_bf16() -> bool:
    """Whether the device multiplies bf16 itself. Processors that cannot are over 100 times slower than in fp32."""
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe(config: RunConfig) -> str:
    """The precision of a run, and why it is another than was asked for."""
    if config.training.precision == "bf16" and not has_bf16():
        return "fp32 (this processor has no bf16)"
    return config.training.precision
