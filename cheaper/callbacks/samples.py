"""What the model writes after fixed prompts, at each checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheaper.callbacks.metrics_file import keep_until
from cheaper.config import SamplesConfig
from cheaper.data.tokenize import Tokenizer
from cheaper.generation import greedy


class Samples(Callback):
    """Continues the prompts greedily and appends ``{"step", "prompt", "continuation"}`` to ``path``.

    Args:
        path: A JSONL file.
        samples: The prompts and the length of the continuations.
        tokenizer: The run's tokenizer.
        interval: Steps between two rounds.
    """

    def __init__(self, path: Path, samples: SamplesConfig, tokenizer: Tokenizer, interval: int):
        self.path, self.samples, self.tokenizer, self.interval = path, samples, tokenizer, interval

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            keep_until(self.path, int(state.timestamp.batch))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval and state.timestamp < state.max_duration:
            return
        lines = []
        for prompt in self.samples.prompts:
            # Every rank takes part: a sharded model has no whole weights on one of them.
            text = self._continue(state, prompt)
            lines.append(json.dumps({"step": step, "prompt": prompt, "continuation": text}) + "\n")
        if dist.get_global_rank() == 0:
            with open(self.path, "a") as file:
                file.writelines(lines)

    def _continue(self, state: State, prompt: str) -> str:
        decoder = getattr(state.model, "module", state.model).model  # inside DDP's wrapper, if there is one
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = start + self.tokenizer.encode(prompt).tolist()
        new = greedy(decoder, ids, self.samples.max_new_tokens, stop_id=self.tokenizer.eos_id)
        return self.tokenizer.decode(new)
