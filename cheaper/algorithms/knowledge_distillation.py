"""Distillation in training: the loss compares the student with a teacher, which runs beside it or ran before."""

from __future__ import annotations

import functools

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from cheaper.config import DistillationConfig
from cheaper.losses.distillation import SparseTeacher, linear_distillation, sparse_distillation
from cheaper.models.decoder import predictors
from cheaper.models.teacher import Teacher


class KnowledgeDistillation(Algorithm):
    """Before each forward pass runs the teacher on the micro-batch and puts the loss that compares both into it.

    The teacher is no part of the student: it takes no gradient, no optimizer knows it and no checkpoint holds it.

    Args:
        teacher: Gives hidden states and has an output matrix, both of one type.
        settings: The loss, see ``cheaper.losses.distillation``.
    """

    def __init__(self, teacher: Teacher, settings: DistillationConfig):
        self.teacher, self.settings = teacher, settings

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        with torch.no_grad():
            hidden_BTE = self.teacher.hidden(state.batch["input_ids"], state.batch.get("document_lengths"))
        state.batch["loss"] = functools.partial(
            linear_distillation,
            teacher_hidden_NE=predictors(hidden_BTE),
            teacher_weight_VE=self.teacher.output_weight.detach(),
            settings=self.settings,
        )


class CachedDistillation(Algorithm):
    """The same from what a teacher cache put into the batch: no teacher is in memory.

    Args:
        settings: The loss; its temperature must be the cache's.
    """

    def __init__(self, settings: DistillationConfig):
        self.settings = settings

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        fields = ("ids", "probabilities", "tail", "entropy", "most_likely")
        kept = (state.batch.get(f"teacher_{field}") for field in fields)
        teacher = SparseTeacher(*(None if values is None else predictors(values) for values in kept))
        state.batch["loss"] = functools.partial(sparse_distillation, teacher=teacher, settings=self.settings)
