"""Text from a decoder, token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from cheaper.errors import UserError
from cheaper.models.decoder import Decoder
from cheaper.models.kv_cache import KeyValueCache


@dataclass(frozen=True)
class Sampling:
    """How a text goes on.

    Args:
        max_new_tokens: How many tokens to add at most.
        temperature: Of the distribution that tokens are drawn from, 0 or more; 0 takes the most likely each time.
        top_p: The most likely words with this much of the mass are drawn from (Holtzman et al., arXiv 1904.09751).
        stop_ids: Tokens that end a text.
        seed: Of the draws.
        words: Only so many, the first, may come: a model may have more than its tokenizer.

    Raises:
        UserError: A number is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop_ids: Collection[int | None] = ()
    seed: int = 0
    words: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            given = f"temperature={self.temperature} top_p={self.top_p} max_new_tokens={self.max_new_tokens}"
            raise UserError(f"{given}: expected 0 or more, above 0 and up to 1, 1 or more")


@torch.no_grad()
def next_tokens(decoder: Decoder, prompts: list[list[int]], sampling: Sampling) -> Iterator[list[int | None]]:
    """Continues each prompt; yields the next token of each, and ``None`` for those that have ended.

    Args:
        decoder: The model; it is put back into the mode (train or eval) it was in.
        prompts: Token ids, at least one each.
        sampling: How they go on.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        device = decoder.device
        generator = torch.Generator(device).manual_seed(sampling.seed)
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        input_ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        cache, going = KeyValueCache(len(decoder.blocks), lengths_B), [True] * len(prompts)
        for _ in range(sampling.max_new_tokens):
            input_ids_BT = choose(decoder.next_token_logits(input_ids_BT, cache), sampling, generator)
            tokens = input_ids_BT.flatten().tolist()
            going = [still and token not in sampling.stop_ids for still, token in zip(going, tokens, strict=True)]
            if not any(going):
                break
            yield [token if still else None for still, token in zip(going, tokens, strict=True)]
    finally:
        decoder.train(was_training)


def continuations(decoder: Decoder, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The new token ids of each prompt; see ``next_tokens``."""
    texts: list[list[int]] = [[] for _ in prompts]
    for tokens in next_tokens(decoder, prompts, sampling):
        for text, token in zip(texts, tokens, strict=True):
            if token is not None:
                text.append(token)
    return texts


def choose(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """A token for each row of logits; int64 [B, 1]."""
    logits_BV = logits_BV[:, : sampling.words]
    if sampling.temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    p_BV, words_BV = (logits_BV.float() / sampling.temperature).softmax(-1).sort(-1, descending=True)
    p_BV[p_BV.cumsum(-1) - p_BV >= sampling.top_p] = 0  # the first word stays: there is no mass before it
    return words_BV.gather(-1, torch.multinomial(p_BV, 1, generator=generator))
