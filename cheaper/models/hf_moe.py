"""The decoder with latent attention and experts as ``transformers``' ``DeepseekV3ForCausalLM``, both ways."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch

from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig
from cheaper.models.hf_names import rename

MODEL_TYPE = "deepseek_v3"
ATTENTION = {
    "wq_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "wq_up": "q_b_proj",
    "wkv_down": "kv_a_proj_with_mqa",
    "key_value_norm": "kv_a_layernorm",
    "wkv_up": "kv_b_proj",
    "wo": "o_proj",
}
PARTS = ("gate", "up", "down")  # of a feed-forward network
# Ours, theirs; {} is the number of the layer. Experts, which we keep stacked, are not among them.
NAMES = [
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("blocks.{}.feed_forward_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("blocks.{}.feed_forward.router.weight", "model.layers.{}.mlp.gate.weight"),
    ("blocks.{}.feed_forward.router.bias", "model.layers.{}.mlp.gate.e_score_correction_bias"),
    *(
        (f"blocks.{{}}.attention.{ours}.weight", f"model.layers.{{}}.self_attn.{theirs}.weight")
        for ours, theirs in ATTENTION.items()
    ),
    *((f"blocks.{{}}.feed_forward.{part}.weight", f"model.layers.{{}}.mlp.{part}_proj.weight") for part in PARTS),
    *(
        (f"blocks.{{}}.feed_forward.shared.{part}.weight", f"model.layers.{{}}.mlp.shared_experts.{part}_proj.weight")
        for part in PARTS
    ),
]


def to_hf_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's tensors under ``DeepseekV3ForCausalLM``'s names, each expert's on their own."""
    theirs: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if stacked := re.fullmatch(r"blocks\.(\d+)\.feed_forward\.(gate|up|down)", name):
            layer, part = stacked.groups()
            for expert, matrix in enumerate(tensor):  # copied, since files hold no tensor that is a part of another
                theirs[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] = matrix.clone()
        else:
            theirs[rename(name, dict(NAMES), "this model")] = tensor
    return theirs


def from_hf_state_dict(state: dict[str, torch.Tensor], layers: int, source: str) -> dict[str, torch.Tensor]:
    """Tensors of a ``DeepseekV3ForCausalLM`` under the decoder's names, the experts of a layer stacked.

    Args:
        state: Their tensors. Layers after the last predict further words, and are left out.
        layers: Of the decoder.
        source: Where they come from, for errors.

    Raises:
        UserError: A tensor has a name that the decoder lacks.
    """
    stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if (layer := re.match(r"model\.layers\.(\d+)\.", name)) and int(layer[1]) >= layers:
            continue
        if expert := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name):
            stacks[f"blocks.{expert[1]}.feed_forward.{expert[3]}"][int(expert[2])] = tensor
        else:
            ours[rename(name, {theirs: ours for ours, theirs in NAMES}, source)] = tensor
    return ours | {name: torch.stack([experts[i] for i in sorted(experts)]) for name, experts in stacks.items()}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of attention and experts, besides what all models say."""
    latent, experts = config.latent_attention, config.experts
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": MODEL_TYPE,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": experts.intermediate_size,
        "n_shared_experts": experts.shared,
        "n_routed_experts": experts.number,
        "num_experts_per_tok": experts.per_token,
        "routed_scaling_factor": experts.scale,
        "n_group": experts.groups,
        "topk_group": experts.groups_kept,
        "first_k_dense_replace": experts.dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": config.head_dim,
        "v_head_dim": latent.value_dim,
        "head_dim": config.head_dim,
        "rope_interleave": True,
    }


def what_differs(raw: dict[str, Any]) -> str | None:
    """Why the decoder cannot compute this model; a key that is missing has transformers' default."""
    expected = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    for key, value in expected.items():
        if raw.get(key, value) != value:
            return f"{key} is {raw[key]}, expected {value}"
    if raw.get("quantization_config"):
        return "its weights are quantised, expected bf16 or fp32"
    if not raw["q_lora_rank"]:
        return "its queries have no latent"
    return None


def shape(raw: dict[str, Any]) -> dict[str, Any]:
    """What of ``ModelConfig`` is particular to these models."""
    return {
        "intermediate_size": raw["intermediate_size"],
        "head_dim": raw["qk_rope_head_dim"],
        "latent_attention": LatentAttentionConfig(
            query_rank=raw["q_lora_rank"],
            key_value_rank=raw["kv_lora_rank"],
            plain_dim=raw["qk_nope_head_dim"],
            value_dim=raw["v_head_dim"],
        ),
        "experts": ExpertsConfig(
            number=raw["n_routed_experts"],
            per_token=raw["num_experts_per_tok"],
            groups=raw["n_group"],
            groups_kept=raw["topk_group"],
            shared=raw["n_shared_experts"],
            intermediate_size=raw["moe_intermediate_size"],
            dense_layers=raw["first_k_dense_replace"],
            scale=raw["routed_scaling_factor"],
        ),
    }
