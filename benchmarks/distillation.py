"""Distillation on this machine: its loss against the plain formula, and a teacher cache against the teacher.

    python benchmarks/distillation.py [--tokens 4096] [--student_width 1536] [--teacher_width 4096] [--rounds 5]

The loss: what distillation adds to the two models' blocks, both output matrices over 128,256 words, the forward KL, and
the gradients of the student's hidden states and output matrix, against the plain formula on whole logits. Each side has
a process of its own for its memory; both have the system's malloc as it is. Before timing, losses and gradients are
compared.

The cache, on a CPU: whole training steps of the 140M on one row of 512 tokens, from 64 words a token drawn from the
teacher's distribution, against the teacher in memory. The teacher has an 8B's shape but only ``--teacher_layers`` of
its 32 layers, so that it fits: the ratio is a lower bound. Reading the cache is not in it. Before timing, the losses of
both are compared.

Products are in bf16 where the device has it, else in fp32, in which the plain loss may need fewer ``--tokens`` for want
of memory. Sides take turns. Prints a table, writes ``benchmarks/results/distillation-<cpu or cuda>.json``.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Algorithm
from side_by_side import alternate, save, show, speed_ratio, spread
from torch.nn.utils import clip_grad_norm_

from cheaper.algorithms.knowledge_distillation import CachedDistillation, KnowledgeDistillation
from cheaper.allocator import keep_freed_memory
from cheaper.compose import load_config
from cheaper.config import DistillationConfig, ModelConfig
from cheaper.losses.distillation import SparseTeacher, linear_distillation
from cheaper.models.decoder import Decoder
from cheaper.precision import has_bf16
from cheaper.training import build_model, build_optimizer

WORDS = 128_256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if has_bf16() else torch.float32
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-3}  # relative, of losses and gradients
SETTINGS = DistillationConfig()
KEPT = 64  # words of a token in the cache
ROW = 512  # tokens
STUDENT = ["model=mobilellm_140m", "training=midtrain", "data=midtrain_mix"]
LAYERS = 32  # of an 8B


# ---- the loss against the plain formula


def inputs(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=DEVICE)).to(DTYPE)

    student, teacher = options.student_width, options.teacher_width
    return {
        "hidden": normal(options.tokens, student).requires_grad_(),
        "weight": normal(WORDS, student, std=2 / student**0.5).requires_grad_(),
        "teacher_hidden": normal(options.tokens, teacher),
        "teacher_weight": normal(WORDS, teacher, std=2 / teacher**0.5),
        "labels": torch.randint(WORDS, (options.tokens,), generator=generator, device=DEVICE),
    }


def plain(x: dict[str, torch.Tensor]) -> torch.Tensor:
    log_q = (x["hidden"] @ x["weight"].T).float().log_softmax(-1)
    log_p = (x["teacher_hidden"] @ x["teacher_weight"].T).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def chunked(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return linear_distillation(
        x["hidden"], x["weight"], x["labels"], x["teacher_hidden"], x["teacher_weight"], SETTINGS
    )[0]


SIDES = {"plain": plain, "chunked": chunked}


def loss_and_gradients(side: str, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    loss = SIDES[side](x)
    result = (loss.detach(), *torch.autograd.grad(loss, [x["hidden"], x["weight"]]))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result


def peak_bytes(side: str, arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--only", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(side: str, options: argparse.Namespace) -> None:
    x = inputs(options)
    few = {name: x[name][:8].detach().requires_grad_(x[name].requires_grad) for name in x if "weight" not in name}
    loss_and_gradients(side, {**x, **few})
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(side, x)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        before = resident("VmRSS")
        loss_and_gradients(side, x)
        print(resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def against_plain(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Memory and time of ``SIDES``."""
    peaks = {side: peak_bytes(side, arguments) for side in SIDES}
    x = inputs(options)
    for ours, right in zip(loss_and_gradients("chunked", x), loss_and_gradients("plain", x), strict=True):
        error = ((ours.float() - right.float()).norm() / right.float().norm()).item()
        assert error < TOLERANCE[DTYPE], error  # both round, in another order
    times = alternate({side: lambda side=side: loss_and_gradients(side, x) for side in SIDES}, options.rounds)
    return {
        "tokens": options.tokens,
        "peak_bytes_above_the_start": peaks,
        "memory_ratio": round(peaks["chunked"] / peaks["plain"], 3),
        "seconds": {side: spread(seconds) for side, seconds in times.items()},
        "speed_ratio": speed_ratio(times["plain"], times["chunked"]),
    }


# ---- a teacher cache against the teacher


def build_teacher(layers: int) -> Decoder:
    """Random weights; the output matrix is the embedding, which saves memory and takes the same time."""
    shape = ModelConfig("8b", layers, 32, 8, 4096, 14336, head_dim=128, qk_norm=False, vocab_size=WORDS)
    return Decoder(shape).to(DTYPE).requires_grad_(False).eval()


def drawn(teacher: Decoder, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a teacher cache adds to the batch of these tokens."""
    with torch.no_grad():
        logits_NV = teacher(ids_BT).flatten(0, 1)
    kept = SparseTeacher.sampled(logits_NV, KEPT, SETTINGS.temperature, torch.Generator().manual_seed(0))
    fields = {"ids": kept.ids_NK, "probabilities": kept.probabilities_NK, "entropy": kept.entropy_N}
    fields["most_likely"] = kept.most_likely_N
    return {f"teacher_{name}": values.unflatten(0, ids_BT.shape) for name, values in fields.items()}


def student(algorithm: Algorithm, batch: dict[str, Any]) -> Callable[[], float]:
    """A training step of a new student, which returns its loss."""
    config = load_config(STUDENT)
    model = build_model(config, mesh=None, weights=None)
    optimizer = build_optimizer(model, config.training.stage)

    def step() -> float:
        state = SimpleNamespace(batch=dict(batch))
        algorithm.apply(None, state, None)
        loss = model.loss(model(state.batch), state.batch)
        loss.backward()
        clip_grad_norm_(model.parameters(), config.training.stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def against_teacher(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second from a cache and with the teacher in memory."""
    keep_freed_memory()
    teacher = build_teacher(options.teacher_layers)
    ids = torch.randint(WORDS, (1, ROW), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    cached = student(CachedDistillation(SETTINGS), {**batch, **drawn(teacher, ids)})
    online = student(KnowledgeDistillation(teacher, SETTINGS), batch)
    first = cached(), online()
    assert math.isclose(*first, rel_tol=0.05), first  # the cache's is an estimate
    times = alternate({"teacher in memory": online, "teacher cache": cached}, options.rounds, warm_up=0)
    return {
        "tokens": ROW,
        "teacher_layers": f"{options.teacher_layers} of {LAYERS}",
        "k": KEPT,
        "tokens_per_second": {side: spread([ROW / each for each in seconds]) for side, seconds in times.items()},
        "speed_ratio": speed_ratio(times["teacher in memory"], times["teacher cache"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the loss")
    parser.add_argument("--student_width", type=int, default=1536, help="the 950M's")
    parser.add_argument("--teacher_width", type=int, default=4096, help="an 8B's")
    parser.add_argument("--teacher_layers", type=int, default=2, help=f"of {LAYERS}, of the teacher in memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # what peak_bytes measures
    options = parser.parse_args()
    if options.only:
        return measure_peak(options.only, options)
    loss = against_plain(options, sys.argv[1:])
    widths = {"student_width": options.student_width, "teacher_width": options.teacher_width}
    result = {"rounds": options.rounds, "precision": str(DTYPE).removeprefix("torch."), "loss": {**widths, **loss}}
    if DEVICE.type == "cpu":
        result["cache"] = against_teacher(options)
    save(f"distillation-{DEVICE.type}", result)
    show(table(result))
    return None


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    loss, cache = result["loss"], result.get("cache")
    rows = [("", "peak above the start", "median")]
    for side, peak in loss["peak_bytes_above_the_start"].items():
        name, seconds = f"{side} loss, {loss['tokens']:,} tokens", loss["seconds"][side]["median"]
        rows.append((name, f"{peak / 2**30:.2f} GiB", f"{seconds:.2f} s"))
    rows.append(("chunked against plain", f"×{loss['memory_ratio']:.2f}", faster(loss["speed_ratio"])))
    if cache:
        speeds = cache["tokens_per_second"].items()
        rows += [(f"step, {side}", "", f"{speed['median']:.0f} tokens/s") for side, speed in speeds]
        name = f"cache against a teacher of {cache['teacher_layers']} layers, at least"
        rows.append((name, "", faster(cache["speed_ratio"])))
    return rows


def faster(ratio: dict[str, float]) -> str:
    return f"×{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"


if __name__ == "__main__":
    main()
