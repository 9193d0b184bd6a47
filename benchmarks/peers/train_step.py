"""Whole training steps of one model on a CPU, so many at each turn.

    train_step.py <pipe> <steps> <folder with weights> <ours | theirs> <keeps freed memory> <choices of the run …>

Ours is what ``cheaper.training`` builds, theirs the model of transformers in the folder. Loss, batch, clipping and
optimizer are the same.
"""

import re
import sys
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM
from turns import take_turns

from cheaper.allocator import keep_freed_memory
from cheaper.compose import load_config
from cheaper.precision import compute_dtype
from cheaper.training import build_model, build_optimizer

steps, folder, side, keeps, *choices = sys.argv[2:]
if keeps == "True":
    keep_freed_memory()
config = load_config(choices)
stage, dtype = config.training.stage, compute_dtype(config)
shape = (stage.batch_size_per_gpu, stage.sequence_length)
ids = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
if side == "ours":
    model = build_model(config, mesh=None, weights=folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", use_cache=False)
optimizer = build_optimizer(model.train(), stage)


def loss() -> torch.Tensor:
    """The mean over the targets."""
    if side == "ours":
        batch = {"input_ids": ids, "labels": ids}
        return model.loss(model(batch), batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(ids, labels=ids).loss


def step() -> float:
    value = loss()
    value.backward()
    clip_grad_norm_(model.parameters(), stage.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def turn() -> tuple[list[float], int]:
    """The losses, and the most memory in bytes that has been resident so far."""
    losses = [step() for _ in range(int(steps))]
    return losses, 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


take_turns(turn)
