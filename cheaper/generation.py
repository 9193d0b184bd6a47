"""Text from a decoder."""

from __future__ import annotations

import torch

from cheaper.models.decoder import Decoder


@torch.no_grad()
def greedy(decoder: Decoder, prompt: list[int], max_new_tokens: int, stop_id: int | None = None) -> list[int]:
    """Continues ``prompt`` with the most likely token each time.

    Args:
        decoder: The model; it is put back into the mode (train or eval) it was in.
        prompt: Token ids, at least one.
        max_new_tokens: How many tokens to add at most.
        stop_id: A token that ends the text; it is not returned.

    Returns:
        The new token ids.
    """
    was_training = decoder.training
    decoder.eval()
    device = next(decoder.parameters()).device
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        most_likely = decoder(tokens)[:, -1].argmax(-1, keepdim=True)
        if most_likely.item() == stop_id:
            break
        tokens = torch.cat([tokens, most_likely], dim=1)
    decoder.train(was_training)
    return tokens[0, len(prompt) :].tolist()
