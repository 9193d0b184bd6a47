"""Our decoder against transformers' ``Llama4ForCausalLM``: parameters, logits, gradients, both ways."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from cheaper.compose import load_config
from cheaper.config import ModelConfig, RopeScalingConfig
from cheaper.errors import UserError
from cheaper.models import hf
from cheaper.models.decoder import Decoder
from cheaper.models.hf_names import rename

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def small(**changes) -> ModelConfig:
    shape = {
        "name": "small",
        "num_layers": 5,  # more than 4: transformers drops the rotary positions of each fourth layer by default
        "num_heads": 6,
        "num_kv_heads": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "head_dim": 16,
        "vocab_size": 211,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**{**shape, **changes})


def theirs(config: ModelConfig, attention: str = "eager") -> Llama4ForCausalLM:
    raw = hf.to_hf_config(config)
    return Llama4ForCausalLM._from_config(Llama4TextConfig(**raw), attn_implementation=attention).eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from their initial values, so that every norm and matrix matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(offset + 0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(config: ModelConfig, rows: int = 2, length: int = 64) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


VARIANTS = {
    "published shape": {},
    "own output matrix": {"tie_word_embeddings": False},
    "no QK norm": {"qk_norm": False},
    "one key head per query head": {"num_kv_heads": 6},
    "another theta": {"rope_theta": 4_000_000.0},
    "rotary positions scaled as in Llama 3.1": {
        "rope_scaling": RopeScalingConfig(factor=8.0, original_max_position_embeddings=32),
        "rope_theta": 10_000.0,
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_equal_when_theirs_takes_our_weights(changes):
    config = small(**changes)
    ours, reference = Decoder(config), theirs(config)
    randomise(ours)
    missing, unexpected = reference.load_state_dict(hf.to_hf_state_dict(ours), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    ids = tokens(config)
    logits = reference(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), logits, **TOLERANCE)

    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    out = ours(ids, labels_BT=ids)
    out.loss_sum.backward()
    assert out.num_targets == ids[:, 1:].numel()
    their_gradients = {name: p.grad for name, p in reference.named_parameters()}
    our_gradients = {rename(n, dict(hf.NAMES), "ours"): p.grad for n, p in ours.named_parameters()}
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = their_gradients[name].abs().max()
        torch.testing.assert_close(gradient / scale, their_gradients[name] / scale, **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_written_by_us_gives_transformers_the_same_logits(tmp_path, tied):
    ours = Decoder(small(tie_word_embeddings=tied))
    randomise(ours)
    hf.save_pretrained(ours, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert isinstance(reference, Llama4ForCausalLM)
    ids = tokens(ours.config, length=128)
    torch.testing.assert_close(ours(ids), reference(ids, use_cache=False).logits, **TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_written_by_transformers_is_read_bit_for_bit(tmp_path, tied, shards):
    reference = theirs(small(tie_word_embeddings=tied))
    randomise(reference)
    size = sum(p.numel() * 4 for p in reference.parameters())
    reference.save_pretrained(tmp_path, max_shard_size=size // shards + 4096)
    assert len(list(tmp_path.glob("*.safetensors"))) >= min(shards, 2)
    ours = hf.load_pretrained(tmp_path)
    ids = tokens(ours.config)
    torch.testing.assert_close(ours(ids), reference(ids, use_cache=False).logits, **TOLERANCE)
    again = hf.to_hf_state_dict(ours)
    for name, parameter in reference.named_parameters():
        assert torch.equal(again[name], parameter), name
    hf.save_pretrained(ours, tmp_path / "again")
    for name, tensor in hf.load_pretrained(tmp_path / "again").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_llama_folder_gives_the_same_logits(tmp_path, tied, scaled):
    llama31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config = small(tie_word_embeddings=tied, qk_norm=False)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=40_000.0,
            rope_scaling={"rope_type": "llama3", **llama31} if scaled else None,
            tie_word_embeddings=tied,
        )
    ).eval()
    randomise(reference)
    reference.save_pretrained(tmp_path)
    ours = hf.load_pretrained(tmp_path)
    ids = tokens(config)
    logits, expected = ours(ids), reference(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    for output in (logits, expected):
        output.log_softmax(-1)[..., 0].sum().backward()
    theirs = {name.replace(".mlp.", ".feed_forward."): p for name, p in reference.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        layer = re.search(r"\d+", name)
        their_name = dict(hf.NAMES)[re.sub(r"\d+", "{}", name)].format(layer[0] if layer else "")
        if "q_proj" not in their_name and "k_proj" not in their_name:  # whose rows are in another order
            scale = theirs[their_name].grad.abs().max()
            torch.testing.assert_close(parameter.grad / scale, theirs[their_name].grad / scale, **TOLERANCE)
            compared += 1
    assert compared >= 7 * config.num_layers


def test_a_folder_can_be_written_over_by_what_was_read_from_it(tmp_path):
    before = Decoder(small())
    hf.save_pretrained(before, tmp_path)
    hf.save_pretrained(hf.load_pretrained(tmp_path), tmp_path)
    after = hf.load_pretrained(tmp_path).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.state_dict().items())


def test_a_damaged_folder_is_told_in_one_line(tmp_path):
    hf.save_pretrained(Decoder(small()), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, raw = weights.read_bytes(), json.loads(config.read_text())
    for wrong, reason in (
        (lambda: weights.write_bytes(whole[:-100]), "not a whole safetensors file"),
        (
            lambda: (
                weights.write_bytes(whole),
                config.write_text(json.dumps({**raw, "num_hidden_layers": 6, "no_rope_layers": [1] * 6})),
            ),
            r"Missing key\(s\)",
        ),
        (lambda: config.write_text(json.dumps({k: v for k, v in raw.items() if k != "vocab_size"})), "no 'vocab_size'"),
        (config.unlink, "no such file"),
    ):
        wrong()
        with pytest.raises(UserError, match=reason) as error:
            hf.load_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "exact", "published"),
    # The shape published for the 950M adds up to 0.05% more than the published count.
    [
        ("mobilellm_140m", 140_248_512, 140.2e6),
        ("mobilellm_360m", 359_431_168, 359.4e6),
        ("mobilellm_950m", 949_685_760, 949.2e6),
    ],
)
def test_parameter_counts(model, exact, published):
    config = load_config([f"model={model}", "training=pretrain_phase1", "data=pretrain_phase1_mix"]).model
    with torch.device("meta"):
        count = sum(p.numel() for p in Decoder(config).parameters())
        reference = sum(p.numel() for p in theirs(config).parameters())
    assert count == reference == exact
    assert abs(count / published - 1) < 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type is gpt2, expected llama4_text or llama or deepseek_v3"),
        ({"model_type": "llama", "mlp_bias": True}, "its matrices have biases"),
        ({"attention_bias": True}, "its matrices have biases"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
        ({"no_rope_layers": [1, 1, 1, 0, 1]}, r"layers \[3\] have no rotary positions"),
        ({"no_rope_layers": None}, r"layers \[3\] have no rotary positions"),
        ({"moe_layers": [0]}, r"layers \[0\] have experts"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "has no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rotary positions are scaled by linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "its rotary positions are scaled by yarn"),
        ({"layer_types": ["chunked_attention"] * 5, "attention_chunk_size": 64}, "its attention is chunked"),
    ],
)
def test_a_model_we_would_compute_wrongly_is_refused(change, reason):
    raw = {**hf.to_hf_config(small()), **change}
    with pytest.raises(UserError, match=reason):
        hf.from_hf_config(raw, "somewhere")
