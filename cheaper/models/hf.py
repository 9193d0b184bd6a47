"""To and from ``transformers``: the published checkpoints are Llama 4's text model without experts; Llama is read too.

The decoder with latent attention and experts is DeepSeek-V3's, see ``cheaper.models.hf_moe``. Tensors keep their
values; the rows of Llama's queries and keys are reordered, else only names change. Reading and writing use safetensors
alone: nothing is unpickled and ``transformers`` itself is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from cheaper.config import ModelConfig, RopeScalingConfig
from cheaper.errors import UserError
from cheaper.models import hf_moe
from cheaper.models.decoder import Decoder
from cheaper.models.hf_names import rename

SHARD_SIZE = "5GB"
MODEL_TYPES = ("llama4_text", "llama", hf_moe.MODEL_TYPE)
# Of the dense decoder: ours, theirs; {} is the number of the layer.
NAMES = [
    ("embedding.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("head.weight", "lm_head.weight"),
    ("blocks.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("blocks.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight"),
    ("blocks.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight"),
    ("blocks.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight"),
    ("blocks.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight"),
    ("blocks.{}.feed_forward_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("blocks.{}.feed_forward.gate.weight", "model.layers.{}.feed_forward.gate_proj.weight"),
    ("blocks.{}.feed_forward.up.weight", "model.layers.{}.feed_forward.up_proj.weight"),
    ("blocks.{}.feed_forward.down.weight", "model.layers.{}.feed_forward.down_proj.weight"),
]


def to_hf_state_dict(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The decoder's tensors under the names of ``Llama4ForCausalLM`` or ``DeepseekV3ForCausalLM``.

    Raises:
        UserError: It has experts or latent attention, but not both.
    """
    state, config = decoder.state_dict(), decoder.config
    if (config.experts is None) != (config.latent_attention is None):
        raise UserError(f"model {config.name}: transformers has no model with one of experts and latent attention")
    if config.experts:
        return hf_moe.to_hf_state_dict(state)
    return {rename(name, dict(NAMES), "this model"): tensor for name, tensor in state.items()}


def from_hf_state_dict(state: dict[str, torch.Tensor], config: ModelConfig, source: str) -> dict[str, torch.Tensor]:
    """Tensors of a ``Llama4ForCausalLM``, ``LlamaForCausalLM`` or ``DeepseekV3ForCausalLM`` under the decoder's names.

    Args:
        state: Their tensors; Llama's are told by their names.
        config: What ``from_hf_config`` made of their configuration.
        source: Where they come from, for errors.

    Raises:
        UserError: A tensor has a name that the decoder lacks.
    """
    if config.experts:
        return hf_moe.from_hf_state_dict(state, config.num_layers, source)
    if any(".mlp." in name for name in state):
        state = {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in state.items()}
        for name in state:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state[name] = _pair_neighbours(state[name], config.head_dim)
    if config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    names = {theirs: ours for ours, theirs in NAMES}
    return {rename(name, names, source): tensor for name, tensor in state.items()}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` for ``transformers``, without the weights' type."""
    return {**(hf_moe.to_hf_config(config) if config.experts else _llama4_config(config)), **common_config(config)}


def common_config(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of every kind of model."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if config.rope_scaling.factor == 1
        else {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _llama4_config(config: ModelConfig) -> dict[str, Any]:
    """Attention is full and every layer has rotary positions."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "intermediate_size": config.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,  # the one that dense layers read
        "head_dim": config.head_dim,
        "use_qk_norm": config.qk_norm,
        "no_rope_layers": [1] * config.num_layers,  # in transformers 1 means "has rotary positions"
        "layer_types": ["full_attention"] * config.num_layers,
        "attention_chunk_size": config.max_position_embeddings,
        "attn_temperature_tuning": False,
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }


def from_hf_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """The decoder's shape from the ``config.json`` of a Llama 4 text model, a Llama or a DeepSeek-V3.

    Raises:
        UserError: The model computes something that the decoder does not, or a key is missing.
    """
    file, kind = f"{source}/config.json", raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{file}: model_type is {kind}, expected {' or '.join(MODEL_TYPES)}")
    # rope_parameters is where transformers 5 writes what 4 had at the top.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    try:
        if reason := _what_differs(raw, rope):
            raise UserError(f"{file}: {reason}; this decoder would compute it wrongly")
        return ModelConfig(
            name=Path(source).name,
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            hidden_size=raw["hidden_size"],
            vocab_size=raw["vocab_size"],
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qk_norm=kind == "llama4_text" and raw.get("use_qk_norm", True),
            rope_theta=rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"],
            rope_scaling=RopeScalingConfig(**{key: rope[key] for key in SCALING})
            if _kind(rope) == "llama3"
            else RopeScalingConfig(),
            norm_eps=raw["rms_norm_eps"],
            max_position_embeddings=raw["max_position_embeddings"],
            initializer_std=raw.get("initializer_range", 0.02),
            **(hf_moe.shape(raw) if kind == hf_moe.MODEL_TYPE else _dense_shape(raw)),
        )
    except KeyError as missing:
        raise UserError(f"{file}: has no {missing}") from None


def _dense_shape(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": raw[
            "intermediate_size_mlp" if raw["model_type"] == "llama4_text" else "intermediate_size"
        ],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
    }


def _what_differs(raw: dict[str, Any], rope: dict[str, Any]) -> str | None:
    """Why the decoder cannot compute this model; a key that is missing has transformers' default."""
    if _kind(rope) not in ("default", "llama3"):
        return f"its rotary positions are scaled by {_kind(rope)}, expected llama3 or none"
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        return "its matrices have biases"
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {raw['hidden_act']}, expected silu"
    if raw["model_type"] == hf_moe.MODEL_TYPE:
        return hf_moe.what_differs(raw)
    if raw["model_type"] == "llama":
        return None
    if raw.get("moe_layers") not in ([], ()):
        return f"layers {raw.get('moe_layers', 'all')} have experts, expected none"
    every = raw.get("no_rope_layer_interval", 4)
    uses_rope = raw.get("no_rope_layers") or [(layer + 1) % every for layer in range(raw["num_hidden_layers"])]
    if without := [layer for layer, uses in enumerate(uses_rope) if not uses]:
        return f"layers {without} have no rotary positions, expected them on every layer"
    chunked = "chunked_attention" in (raw.get("layer_types") or ["chunked_attention"])
    if chunked and raw.get("attention_chunk_size", 8192) < raw["max_position_embeddings"]:
        return "its attention is chunked"
    return None


SCALING = [field.name for field in dataclasses.fields(RopeScalingConfig)]


def _kind(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def save_pretrained(decoder: Decoder, folder: str | Path) -> None:
    """Writes ``config.json`` and safetensors of at most 5 GB for ``AutoModelForCausalLM.from_pretrained(folder)``."""
    write_folder(Path(folder), to_hf_state_dict(decoder), to_hf_config(decoder.config))


def write_folder(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Writes tensors and the configuration that goes with them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}, indent=2) + "\n")
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # they were written for their owner alone


def load_pretrained(folder: str | Path) -> Decoder:
    """The decoder in a ``transformers`` folder, in the weights' own type.

    Raises:
        UserError: Nothing is there, or it is another kind of model.
    """
    with torch.device("meta"):
        decoder = Decoder(load_config(folder))
    try:
        decoder.load_state_dict(load_weights(folder), assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: {str(error).splitlines()[1].strip()}") from None
    return decoder


def load_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in a ``transformers`` folder.

    Raises:
        UserError: There is none, or it is another kind of model.
    """
    return from_hf_config(_read_json(Path(folder, "config.json")), str(folder))


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``transformers`` folder under the decoder's names, in one file or several.

    Raises:
        UserError: Nothing is there, a file is cut short, or it is another kind of model.
    """
    folder, config = Path(folder), load_config(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(folder / file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file}: not a whole safetensors file ({error})") from None
    return from_hf_state_dict(state, config, str(folder))


def _pair_neighbours(weight_HD: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders each head's rows: Llama turns features (i, i + E/2) together, Llama 4 and we (2i, 2i + 1)."""
    return weight_HD.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def download(hub_id: str, key: str) -> Path:
    """The folder on this machine with the safetensors model called ``hub_id`` on the hub, and its tokenizer.

    Raises:
        UserError: It is not to be had.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = f"no such file or folder, and not to be had from the hub ({type(error).__name__})"
        raise UserError(f"{key} {hub_id}: {why}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
