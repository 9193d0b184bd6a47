"""What the model writes after fixed prompts, at each checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from cheaper.config import SamplesConfig
from cheaper.data.chat import ChatTemplate
from cheaper.data.tokenize import Tokenizer
from cheaper.files import keep_until
from cheaper.generation import Sampling, continuations


class Samples(Callback):
    """Continues the prompts and answers the chats greedily; a line ``{"step", "prompt", "continuation"}`` each.

    Args:
        path: A JSONL file.
        samples: The prompts, the chats and the length of the continuations.
        tokenizer: The run's tokenizer.
        template: For the chats.
        interval: Steps between two rounds.
    """

    def __init__(
        self, path: Path, samples: SamplesConfig, tokenizer: Tokenizer, template: ChatTemplate | None, interval: int
    ):
        self.path, self.tokenizer, self.interval = path, tokenizer, interval
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.prompts = [(text, start + tokenizer.encode(text).tolist()) for text in samples.prompts]
        stop_ids = [tokenizer.eos_id]
        if template:
            asked = [(text, [{"role": "user", "content": text}]) for text in samples.chats]
            self.prompts += [(text, template.prompt(messages).tolist()) for text, messages in asked]
            stop_ids.append(template.end_of_turn_id)
        self.sampling = Sampling(samples.max_new_tokens, stop_ids=stop_ids)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            keep_until(self.path, int(state.timestamp.batch))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if not self.prompts or (step % self.interval and state.timestamp < state.max_duration):
            return
        decoder = getattr(state.model, "module", state.model).model  # inside DDP's wrapper, if there is one
        # Every rank takes part: a sharded model has no whole weights on one of them.
        answers = continuations(decoder, [ids for _, ids in self.prompts], self.sampling)
        if dist.get_global_rank() == 0:
            with open(self.path, "a") as file:
                for (prompt, _), answer in zip(self.prompts, answers, strict=True):
                    line = {"step": step, "prompt": prompt, "continuation": self.tokenizer.decode(answer)}
                    file.write(json.dumps(line) + "\n")
