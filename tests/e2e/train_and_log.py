"""Trains as ``scripts/train.py`` does and logs what no product file says.

Each rank appends ``{"step", "samples"}`` to ``samples-<rank>.log`` in the run's folder before each step. With
``GRADIENTS`` set, rank 0 saves the gradients of the first step there. With ``SLOW`` set, each step takes that many
seconds longer.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from composer.core import Callback
from composer.utils import dist

from cheaper import cli, training


class Log(Callback):
    def __init__(self, folder: Path):
        self.path = folder / f"samples-{dist.get_global_rank()}.log"

    def batch_start(self, state, logger):
        time.sleep(float(os.environ.get("SLOW", 0)))
        with open(self.path, "a") as file:
            line = {"step": int(state.timestamp.batch), "samples": state.batch["sample"]}
            file.write(json.dumps(line) + "\n")

    def batch_end(self, state, logger):
        target = os.environ.get("GRADIENTS")
        if target and int(state.timestamp.batch) == 1 and dist.get_global_rank() == 0:
            model = getattr(state.model, "module", state.model)
            torch.save({name: p.grad for name, p in model.named_parameters()}, target)


build_trainer = training.build_trainer


def build_and_log(config):
    trainer = build_trainer(config)
    trainer.state.callbacks.insert(0, Log(Path(config.training.checkpoint_dir)))
    return trainer


training.build_trainer = build_and_log
sys.exit(cli.main(["train", *sys.argv[1:]]))
