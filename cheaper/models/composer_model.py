"""The decoder as Composer's trainer wants it."""

from __future__ import annotations

import torch
from composer.models import ComposerModel

from cheaper.config import ModelConfig
from cheaper.models.decoder import Decoder, LossOutput


class CausalLM(ComposerModel):
    """Next-token prediction.

    The decoder sits one level below because Composer shards the model it is given from its children down.

    Args:
        config: The decoder's shape.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.model = Decoder(config)

    def forward(self, batch: dict[str, torch.Tensor]) -> LossOutput:
        return self.model(batch["input_ids"], batch["labels"], batch.get("document_ids"))

    def loss(self, outputs: LossOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the micro-batch's targets; the trainer weighs micro-batches and ranks by their targets."""
        return outputs.loss_sum / outputs.num_targets.clamp(min=1)
