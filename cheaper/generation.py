"""Text from a decoder."""

from __future__ import annotations

from collections.abc import Container

import torch

from cheaper.models.decoder import Decoder
from cheaper.models.kv_cache import KeyValueCache


@torch.no_grad()
def greedy(
    decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, stop_ids: Container[int | None] = ()
) -> list[list[int]]:
    """Continues each prompt with the most likely token each time.

    Args:
        decoder: The model; it is put back into the mode (train or eval) it was in.
        prompts: Token ids, at least one each.
        max_new_tokens: How many tokens to add at most.
        stop_ids: Tokens that end a text; they are not returned.

    Returns:
        The new token ids of each.
    """
    was_training = decoder.training
    decoder.eval()
    device = decoder.output_weight.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    cache = KeyValueCache(len(decoder.blocks), lengths_B, int(lengths_B.max()) + max_new_tokens)
    hidden_BTD = decoder.hidden(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), cache=cache)
    hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), lengths_B - 1]
    texts, going = [[] for _ in prompts], [True] * len(prompts)
    for _ in range(max_new_tokens):
        next_B = (hidden_BD @ decoder.output_weight.T).argmax(-1)
        for i, token in enumerate(next_B.tolist()):
            going[i] = going[i] and token not in stop_ids
            if going[i]:
                texts[i].append(token)
        if not any(going):
            break
        hidden_BD = decoder.hidden(next_B[:, None], cache=cache)[:, 0]
    decoder.train(was_training)
    return texts
