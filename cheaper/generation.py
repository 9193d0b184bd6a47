"""Text from a decoder."""

from __future__ import annotations

from collections.abc import Container

import torch

from cheaper.models.decoder import Decoder


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
    device = next(decoder.parameters()).device
    texts, going = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not going:
            break
        # Filled up on the right: what comes after a token does not change it.
        ends = torch.tensor([len(texts[i]) - 1 for i in going], device=device)
        rows = [torch.tensor(texts[i], device=device) for i in going]
        hidden = decoder.hidden(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        logits = hidden[torch.arange(len(going), device=device), ends] @ decoder.output_weight.T
        for i, token in zip(list(going), logits.argmax(-1).tolist(), strict=True):
            if token in stop_ids:
                going.remove(i)
            else:
                texts[i].append(token)
    decoder.train(was_training)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
