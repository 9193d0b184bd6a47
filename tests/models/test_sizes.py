"""The six sizes have as many parameters as their names say; they are built without memory."""

from __future__ import annotations

import pytest
import torch

from cheaper.compose import load_config
from cheaper.config import ModelConfig
from cheaper.flops import flops_per_token
from cheaper.models.decoder import Decoder
from tests.peak_memory import peak, reset_peak


def shape(name: str) -> ModelConfig:
    return load_config([f"model={name}", "training=pretrain_phase1", "data=pretrain_phase1_mix"]).model


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mobilellm_140m", 140.2e6, 140.2e6),
        ("mobilellm_360m", 359.4e6, 359.4e6),
        ("mobilellm_950m", 949.2e6, 949.2e6),
        ("mobilellm_7b", 6.7e9, 6.7e9),
        ("mobilellm_70b", 70.6e9, 70.6e9),
        ("mobilellm_671b", 671e9, 37e9),
    ],
)
def test_parameters(name, total, active):
    config = shape(name)
    before = reset_peak()
    with torch.device("meta"):
        decoder = Decoder(config)
    assert peak() - before < 2 * 2**30
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert sum(parameter.numel() for parameter in decoder.parameters()) == pytest.approx(total, rel=0.01)
    # 6 FLOPs per token and parameter that it meets; the embedding is looked up, the head multiplied.
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert flops_per_token(config, sequence_length=0) / 6 + looked_up == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("name", ["mobilellm_950m", "mobilellm_671b"])
def test_flops_are_those_of_the_matrices(name):
    """Counted from the modules: every matrix, but of the experts only those that a token meets."""
    config = shape(name)
    with torch.device("meta"):
        decoder = Decoder(config)
    matrices = sum(p.numel() for n, p in decoder.named_parameters() if p.ndim == 2 and not n.startswith("embedding"))
    if config.tie_word_embeddings:
        matrices += decoder.embedding.weight.numel()
    stacks = sum(p.numel() for p in decoder.parameters() if p.ndim == 3)
    if config.experts:
        matrices += stacks * config.experts.per_token // config.experts.number
    assert flops_per_token(config, sequence_length=0) == 6 * matrices
