"""The dense decoder as ``transformers``' Qwen3 or Llama, for llama.cpp: what it makes of Llama 4 must have experts.

Qwen3 norms queries and keys before RoPE and with weights; Llama 4 and we after it and without. RoPE turns vectors and
keeps their lengths, so with weights of one both compute the same. Without norms of queries and keys we are Llama.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cheaper.config import ModelConfig
from cheaper.errors import UserError
from cheaper.models import hf
from cheaper.models.decoder import Decoder


def save_for_llama_cpp(decoder: Decoder, folder: Path) -> None:
    """Writes a folder that llama.cpp's converter takes; one with experts is DeepSeek-V3's, as everywhere.

    Raises:
        UserError: llama.cpp has no such model.
    """
    config = decoder.config
    if config.experts or config.latent_attention:
        hf.save_pretrained(decoder, folder)
        return
    if config.qk_norm and config.rope_scaling.factor != 1:
        raise UserError(f"model {config.name}: llama.cpp has no model with both qk_norm and rope_scaling")
    hf.write_folder(folder, _state_dict(decoder), _config(config))


def _state_dict(decoder: Decoder) -> dict[str, torch.Tensor]:
    config, state = decoder.config, hf.to_hf_state_dict(decoder)
    state = {name.replace(".feed_forward.", ".mlp."): tensor for name, tensor in state.items()}
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = _pair_halves(state[name], config.head_dim)
    if config.qk_norm:
        norms = [f"model.layers.{n}.self_attn.{x}_norm.weight" for n in range(config.num_layers) for x in "qk"]
        state |= {name: torch.ones(config.head_dim, dtype=state["model.norm.weight"].dtype) for name in norms}
    return state


def _config(config: ModelConfig) -> dict[str, Any]:
    kind, name = ("qwen3", "Qwen3") if config.qk_norm else ("llama", "Llama")
    return {
        **hf.common_config(config),
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
    }


def _pair_halves(weight_HD: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders each head's rows: we turn features (2i, 2i + 1) together, Qwen3 and Llama (i, i + E/2)."""
    return weight_HD.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
