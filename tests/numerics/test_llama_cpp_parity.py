"""What goes to llama.cpp computes what the decoder does, by ``transformers``' Qwen3 and Llama."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from cheaper.config import ModelConfig, RopeScalingConfig
from cheaper.errors import UserError
from cheaper.models.decoder import Decoder
from cheaper.models.hf_llama_cpp import save_for_llama_cpp

SCALED = RopeScalingConfig(factor=8.0)


def decoder(**change) -> Decoder:
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 48, "intermediate_size": 96}
    made = Decoder(ModelConfig(name="t", head_dim=16, vocab_size=99, initializer_std=0.3, **shape, **change))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "Qwen3ForCausalLM"),
        ({"tie_word_embeddings": False, "rope_theta": 4e6, "norm_eps": 1e-2}, "Qwen3ForCausalLM"),
        ({"qk_norm": False}, "LlamaForCausalLM"),
        ({"qk_norm": False, "tie_word_embeddings": False, "rope_scaling": SCALED}, "LlamaForCausalLM"),
    ],
)
def test_same_logits(tmp_path, change, kind):
    ours = decoder(**change)
    save_for_llama_cpp(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == kind
    ids = torch.randint(99, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_llama_cpp_would_compute_wrongly_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no model with both qk_norm and rope_scaling"):
        save_for_llama_cpp(decoder(rope_scaling=SCALED), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
