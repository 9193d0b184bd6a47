"""Greedy continuations are what whole passes over the texts give, token by token."""

import pytest
import torch

from cheaper.config import ExpertsConfig, LatentAttentionConfig, ModelConfig
from cheaper.generation import Sampling, choose, continuations
from cheaper.models import kv_cache
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


@pytest.mark.parametrize("growth", [256, 3])
def test_the_cache_changes_no_token(decoder, monkeypatch, growth):
    monkeypatch.setattr(kv_cache, "GROWTH", growth)
    expected = [step_by_step(decoder, prompt, 40) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) == 3
    assert all(len(set(text)) > 5 for text in expected)
    assert continuations(decoder, PROMPTS, Sampling(40)) == expected


def test_hidden_states_with_the_cache_are_those_without(decoder):
    text = torch.randint(97, (2, 12))
    cache = KeyValueCache(3, torch.tensor([4, 4]))
    with torch.no_grad():
        passes = [decoder.hidden(text[:, :4], cache=cache)]
        passes += [decoder.hidden(text[:, i : i + 1], cache=cache) for i in range(4, 12)]
        torch.testing.assert_close(torch.cat(passes, 1), decoder.hidden(text), rtol=1e-4, atol=1e-5)


def test_a_text_ends_at_its_stop_token_and_the_others_go_on(decoder):
    whole = continuations(decoder, PROMPTS, Sampling(40))
    stop = whole[1][6]
    expected = [text[: text.index(stop)] if stop in text else text for text in whole]
    assert continuations(decoder, PROMPTS, Sampling(40, stop_ids={stop})) == expected
    assert len(expected[1]) <= 6


def test_the_mode_of_the_model_is_put_back(decoder):
    decoder.train()
    continuations(decoder, [[1]], Sampling(2))
    assert decoder.training
    decoder.eval()


def test_drawn_tokens_have_the_distribution_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    drawn = choose(logits.expand(200_000, 4), Sampling(temperature=0.7), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.flatten().bincount() / 200_000, (logits / 0.7).softmax(-1), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("top_p", "words"), [(0.5, 1), (0.65, 2), (0.95, 3), (1.0, 4), (1e-6, 1)])
def test_top_p_draws_from_the_fewest_words_with_the_mass(top_p, words):
    """Of 0.64, 0.24, 0.09 and 0.03."""
    logits = torch.tensor([[0.0, -1.0, 2.0, 1.0]]).expand(50_000, 4)
    drawn = choose(logits, Sampling(temperature=1.0, top_p=top_p), torch.Generator().manual_seed(0)).flatten()
    assert drawn.unique().tolist() == sorted([2, 3, 0, 1][:words])
    kept = torch.tensor([2.0, 1.0, 0.0, -1.0])[:words].softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4)[[2, 3, 0, 1][:words]] / 50_000, kept, atol=1e-2, rtol=0)


def test_only_the_tokenizers_words_come():
    logits = torch.tensor([[0.0, 2.0, 9.0]]).expand(500, 3)
    for temperature in (0.0, 1.0):
        drawn = choose(logits, Sampling(temperature=temperature, words=2), torch.Generator().manual_seed(0))
        assert drawn.max() == 1


def test_the_seed_decides_what_is_drawn(decoder):
    draws = [continuations(decoder, PROMPTS, Sampling(20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
