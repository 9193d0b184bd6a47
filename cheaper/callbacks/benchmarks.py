"""Benchmarks on the way: ``eval/<benchmark>/score`` every so many tokens."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from cheaper.config import BenchmarksConfig, parse_count
from cheaper.data.tokenize import Tokenizer
from cheaper.evaluation.benchmarks import load_tasks
from cheaper.evaluation.evaluator import SEED, chosen, load_all_tasks, results
from cheaper.evaluation.harness import CheaperLM
from cheaper.language_model import LanguageModel


class Benchmarks(Callback):
    """Asks the model as it is, every so many tokens and at the end.

    Args:
        settings: Which benchmarks, how often, how many questions, and where their data are.
        tokenizer: The run's.
        tokenizer_source: Where it came from.
        chat_template: As ``data.chat_template`` has it.
        dtype: In which the model computes.
        batch_size: Questions at once.
        sharded: Whether every process must take part in each pass, because none has the whole model.

    Raises:
        UserError: There is no such benchmark, or its data are missing: told before training begins.
    """

    def __init__(
        self,
        settings: BenchmarksConfig,
        tokenizer: Tokenizer,
        tokenizer_source: str,
        chat_template: str,
        dtype: torch.dtype,
        batch_size: int,
        sharded: bool,
    ):
        self.settings, self.dtype, self.batch_size, self.sharded = settings, dtype, batch_size, sharded
        self.speaks = (tokenizer, tokenizer_source, chat_template)
        self.asked = chosen(settings.names, execute_code=False)
        self.data_dir = Path(settings.data_dir) if settings.data_dir else None
        for benchmark in self.asked:
            load_tasks(benchmark, self.data_dir, SEED)
        self.every = parse_count(settings.every) if settings.every else None

    def batch_end(self, state: State, logger: Logger) -> None:
        before, now = (int(stamp.token) for stamp in (state.previous_timestamp, state.timestamp))
        passed = self.every and now // self.every > before // self.every
        if passed or state.timestamp >= state.max_duration:
            logger.log_metrics(self._scores(state))

    def _scores(self, state: State) -> dict[str, float]:
        decoder = getattr(state.model, "module", state.model).model  # inside DDP's wrapper, if there is one
        generators = random.getstate(), np.random.get_state()  # the harness seeds them
        model = LanguageModel(decoder, *self.speaks, source=Path())
        was_training, device = decoder.training, decoder.device.type
        decoder.eval()
        try:
            with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                lm = CheaperLM(model, batch_size=self.batch_size, divides=not self.sharded)
                tasks = load_all_tasks(self.asked, self.data_dir, SEED)
                found = list(results(lm, self.asked, tasks, self.settings.limit, SEED))
        finally:
            decoder.train(was_training)
            random.setstate(generators[0])
            np.random.set_state(generators[1])
        return {f"eval/{result.benchmark}/score": result.score for result in found}
