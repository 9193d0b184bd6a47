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
    input_ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cache = KeyValueCache(len(decoder.blocks), lengths_B, input_ids_BT.shape[1] + max_new_tokens)
    texts, going = [[] for _ in prompts], [True] * len(prompts)
    for _ in range(max_new_tokens):
        input_ids_BT = decoder.next_token_logits(input_ids_BT, cache).argmax(-1, keepdim=True)
        for i, token in enumerate(input_ids_BT.flatten().tolist()):
            going[i] = going[i] and token not in stop_ids
            if going[i]:
                texts[i].append(token)
        if not any(going):
            break
    decoder.train(was_training)
    return texts
