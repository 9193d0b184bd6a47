"""Rotary positions (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math

import torch

from cheaper.config import ModelConfig, RopeScalingConfig


def rotary_rotation(positions: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles, fp32.

    Computed in every pass rather than kept: it is cheap, and there is nothing to lose when a model is made without
    memory or its ``rope_theta`` is raised.

    Args:
        positions: [T] or [B, T].
        config: For ``rope_theta`` and ``head_dim``.

    Returns:
        Two tensors [(B,) T, 1, E/2].
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequencies = _scaled(config.rope_theta**-exponents, config.rope_scaling)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def _scaled(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Llama 3.1's frequencies: those that turn slowly are divided by the factor, with a smooth passage to the rest."""
    if scaling.factor == 1:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))


def rotate(x_BTHE: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair of features (2i, 2i+1) by its position's angle; fp32 out."""
    cos, sin = rotation
    even, odd = x_BTHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
