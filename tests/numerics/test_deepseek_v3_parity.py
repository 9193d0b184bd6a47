"""Latent attention and experts against ``transformers``' DeepSeek-V3: logits and gradients, fp32."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig
from cheaper.errors import UserError
from cheaper.models import hf, hf_moe
from cheaper.models.decoder import Decoder

CONFIG = ModelConfig(
    name="probe",
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    hidden_size=64,
    intermediate_size=96,
    head_dim=8,
    vocab_size=101,
    tie_word_embeddings=False,
    qk_norm=False,
    rope_theta=10_000.0,
    initializer_std=0.2,
    latent_attention=LatentAttentionConfig(query_rank=24, key_value_rank=16, plain_dim=16, value_dim=12),
    experts=ExpertsConfig(
        number=8, per_token=3, groups=4, groups_kept=2, shared=1, intermediate_size=32, dense_layers=1, scale=2.5
    ),
)


def as_ours(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their tensors under our names."""
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name):  # transformers 5 keeps them stacked
            halves = tensor.chunk(2, 1) if match[2] == "gate_up" else [tensor]
            for part, stack in zip(match[2].split("_"), halves, strict=True):
                apart |= {f"{match[1]}.{i}.{part}_proj.weight": matrix for i, matrix in enumerate(stack)}
        else:
            apart[name] = tensor
    return hf_moe.from_hf_state_dict(apart, CONFIG.num_layers, "theirs")


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, DeepseekV3ForCausalLM]:
    torch.manual_seed(0)
    latent, experts = CONFIG.latent_attention, CONFIG.experts
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.intermediate_size,
            moe_intermediate_size=experts.intermediate_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_heads,
            n_shared_experts=experts.shared,
            n_routed_experts=experts.number,
            routed_scaling_factor=experts.scale,
            kv_lora_rank=latent.key_value_rank,
            q_lora_rank=latent.query_rank,
            qk_rope_head_dim=CONFIG.head_dim,
            v_head_dim=latent.value_dim,
            qk_nope_head_dim=latent.plain_dim,
            n_group=experts.groups,
            topk_group=experts.groups_kept,
            num_experts_per_tok=experts.per_token,
            first_k_dense_replace=experts.dense_layers,
            rms_norm_eps=CONFIG.norm_eps,
            rope_theta=CONFIG.rope_theta,
            initializer_range=CONFIG.initializer_std,
            attn_implementation="eager",
        )
    )
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "mlp.gate.weight")):
            torch.nn.init.normal_(tensor, std=0.3)
    ours = Decoder(CONFIG)
    ours.load_state_dict(as_ours(theirs.state_dict()))
    return ours, theirs


def test_logits_and_gradients(models):
    ours, theirs = models
    ids = torch.randint(CONFIG.vocab_size, (3, 40))
    expected = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=1e-4)
    loss = theirs(ids, labels=ids, use_cache=False).loss
    loss.backward()
    out = ours(ids, ids)
    (out.loss_sum / out.num_targets).backward()
    assert (out.loss_sum / out.num_targets).item() == pytest.approx(loss.item(), abs=1e-5)
    expected = as_ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-4, rtol=1e-3, msg=lambda text, n=name: f"{n} {text}"
        )


def test_experts_are_weighed_and_summed_in_fp32(models, monkeypatch):
    """In bf16, as ``transformers`` does it: if every expert answers with its input, a token gets ``scale`` times it."""
    experts = copy.deepcopy(models[0].blocks[1].feed_forward).bfloat16()
    monkeypatch.setattr(experts, "_each_on_its_own", lambda x_MD, *_: x_MD)
    torch.nn.init.zeros_(experts.shared.down.weight)
    x_BTE = torch.randn(1, 50, CONFIG.hidden_size).bfloat16()
    out, expected = experts(x_BTE), (CONFIG.experts.scale * x_BTE.float()).bfloat16()
    assert out.dtype == torch.bfloat16
    # The others are ties, which the last place of fp32 decides; rounded before they are summed, 0.79 agree.
    assert (out == expected).float().mean() > 0.9


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch before 2.10 has grouped products for GPUs alone")
def test_grouped_products_are_those_of_each_expert(models, monkeypatch):
    """A CPU test of what runs on GPUs."""
    experts = copy.deepcopy(models[0].blocks[1].feed_forward).bfloat16()
    x_BTE = torch.randn(2, 50, CONFIG.hidden_size).bfloat16()
    one_by_one = experts(x_BTE)
    monkeypatch.setattr("cheaper.models.moe._grouped", lambda _: True)
    torch.testing.assert_close(experts(x_BTE), one_by_one, atol=1e-2, rtol=2e-2)


def test_every_group_and_bias_matters(models):
    """The probe's routing is not one that a simpler router would find too."""
    router = models[0].blocks[1].feed_forward.router
    x_ND = torch.randn(200, CONFIG.hidden_size)
    chosen, weights = router(x_ND)
    scores = torch.nn.functional.linear(x_ND, router.weight).sigmoid()
    assert (scores.topk(3).indices.sort(-1).values != chosen.sort(-1).values).any(-1).float().mean() > 0.1
    torch.testing.assert_close(weights.sum(-1), torch.full((200,), 2.5))


def test_a_folder_goes_both_ways_bit_for_bit(models, tmp_path):
    ours, theirs = models
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    read = hf.load_pretrained(tmp_path / "theirs")
    hf.save_pretrained(read, tmp_path / "ours")
    again = hf.load_pretrained(tmp_path / "ours")
    assert dataclasses.replace(read.config, name="probe") == dataclasses.replace(again.config, name="probe") == CONFIG
    for name, tensor in ours.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    ids = torch.randint(CONFIG.vocab_size, (2, 30))
    assert torch.equal(reloaded(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


def test_layers_that_predict_further_words_are_left_out(models):
    state = hf.to_hf_state_dict(models[0])
    more = {**state, f"model.layers.{CONFIG.num_layers}.eh_proj.weight": torch.zeros(1)}
    assert hf_moe.from_hf_state_dict(more, CONFIG.num_layers, "there").keys() == models[0].state_dict().keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "its rotary positions are scaled by yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
        ({"q_lora_rank": None}, "its queries have no latent"),
        ({"scoring_func": "softmax"}, "scoring_func is softmax, expected sigmoid"),
    ],
)
def test_a_model_we_would_compute_wrongly_is_refused(change, reason):
    with pytest.raises(UserError, match=reason):
        hf.from_hf_config({**hf.to_hf_config(CONFIG), **change}, "somewhere")


def test_what_transformers_has_no_model_for_is_refused():
    config = dataclasses.replace(CONFIG, latent_attention=None)
    with pytest.raises(UserError, match="no model with one of experts and latent attention"):
        hf.to_hf_state_dict(Decoder(config))
