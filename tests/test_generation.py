"""Greedy continuations are what whole passes over the texts give, token by token."""

import pytest
import torch

from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig
from cheaper.generation import greedy
from cheaper.models.decoder import Decoder
from cheaper.models.kv_cache import KeyValueCache

LATENT = LatentAttentionConfig(query_rank=24, key_value_rank=20, plain_dim=8, value_dim=12)
EXPERTS = ExpertsConfig(number=8, per_token=2, groups=4, groups_kept=2, intermediate_size=32, dense_layers=1)


@pytest.fixture(scope="module", params=[{}, {"latent_attention": LATENT, "experts": EXPERTS}], ids=["dense", "experts"])
def decoder(request) -> Decoder:
    torch.manual_seed(0)
    return Decoder(
        ModelConfig(
            name="probe",
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            hidden_size=64,
            intermediate_size=96,
            head_dim=16,
            vocab_size=97,
            initializer_std=0.4,  # so that continuations are not one word over and over
            **request.param,
        )
    )


PROMPTS = [[5], [7, 1, 2, 3, 96, 4, 9, 11], [3, 3, 8]]


@torch.no_grad()
def step_by_step(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(decoder(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_the_cache_changes_no_token(decoder):
    expected = [step_by_step(decoder, prompt, 40) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) == 3
    assert all(len(set(text)) > 5 for text in expected)
    assert greedy(decoder, PROMPTS, 40) == expected


def test_hidden_states_with_the_cache_are_those_without(decoder):
    text = torch.randint(97, (2, 12))
    cache = KeyValueCache(3, torch.tensor([4, 4]), room=12)
    with torch.no_grad():
        passes = [decoder.hidden(text[:, :4], cache=cache)]
        passes += [decoder.hidden(text[:, i : i + 1], cache=cache) for i in range(4, 12)]
        torch.testing.assert_close(torch.cat(passes, 1), decoder.hidden(text), rtol=1e-4, atol=1e-5)


def test_a_text_ends_at_its_stop_token_and_the_others_go_on(decoder):
    whole = greedy(decoder, PROMPTS, 40)
    stop = whole[1][6]
    expected = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert greedy(decoder, PROMPTS, 40, {stop}) == expected
    assert len(expected[1]) <= 6


def test_the_mode_of_the_model_is_put_back(decoder):
    decoder.train()
    greedy(decoder, [[1]], 2)
    assert decoder.training
    decoder.eval()
