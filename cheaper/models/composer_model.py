"""The decoder as Composer's trainer wants it."""

from __future__ import annotations

from typing import Any

import torch
from composer.models import ComposerModel
from torchmetrics import Metric

from cheaper.config import ModelConfig
from cheaper.losses.cross_entropy import linear_cross_entropy
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
        self.cross_entropy = linear_cross_entropy

    def forward(self, batch: dict[str, Any]) -> LossOutput:
        """``batch["loss"]`` takes the place of the cross-entropy; an Algorithm may put it there."""
        loss = batch.get("loss", self.cross_entropy)
        return self.model(batch["input_ids"], batch["labels"], batch.get("document_lengths"), loss)

    def loss(self, outputs: LossOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over the micro-batch's targets; the trainer weighs micro-batches and ranks by their targets."""
        return outputs.loss_sum / outputs.num_targets.clamp(min=1)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """What an ``Evaluator`` reports. Training has none here: its figures are summed from the passes' outputs."""
        if is_train:
            return {}
        return {"loss": TargetMean(), "perplexity": Perplexity(), "accuracy": TargetMean("accuracy")}

    def update_metric(self, batch: dict[str, torch.Tensor], outputs: LossOutput, metric: Metric) -> None:
        metric.update(outputs)


class TargetMean(Metric):
    """Mean per target over all batches and ranks.

    Args:
        name: Which of ``LossOutput.sums`` is averaged; the loss by default.
    """

    full_state_update = False  # lets torchmetrics call ``update`` once a batch

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_targets", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: LossOutput) -> None:
        self.total += outputs.sums[self.name] if self.name else outputs.loss_sum
        self.num_targets += outputs.num_targets

    def compute(self) -> torch.Tensor:
        return self.total / self.num_targets


class Perplexity(TargetMean):
    """exp of the mean cross-entropy."""

    def compute(self) -> torch.Tensor:
        return super().compute().exp()
