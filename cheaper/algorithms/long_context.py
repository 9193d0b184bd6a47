"""Longer rows for a model that was trained on shorter ones."""

from __future__ import annotations

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from cheaper.models.decoder import Decoder


def extend_context(decoder: Decoder, rope_theta_factor: float, max_position_embeddings: int) -> None:
    """Slows the rotary positions down, so that far tokens are told apart, and allows positions up to the new maximum.

    Both are kept in every checkpoint and exported configuration, for they are the decoder's own.

    Args:
        decoder: Changed in place.
        rope_theta_factor: ``rope_theta`` is multiplied with it; MobileLLM-R1 takes 8 from 4,096 to 32,768 tokens.
        max_position_embeddings: Tokens in the longest row.
    """
    decoder.config.rope_theta *= rope_theta_factor
    decoder.config.max_position_embeddings = max_position_embeddings


class LongContext(Algorithm):
    """Extends the context once, when the run starts or resumes; arguments as in ``extend_context``."""

    def __init__(self, rope_theta_factor: float, max_position_embeddings: int):
        self.rope_theta_factor, self.max_position_embeddings = rope_theta_factor, max_position_embeddings

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        extend_context(state.model.model, self.rope_theta_factor, self.max_position_embeddings)
