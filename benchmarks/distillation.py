"""The distillation step against the plain formula on whole logits: peak memory and time, on this machine's CPU or GPU.

    python benchmarks/distillation.py [--tokens 4096] [--student_width 1536] [--teacher_width 4096] [--rounds 5]

One step is what distillation adds to the two models' blocks: both output matrices over 128,256 words, the forward KL,
and the gradients of the student's hidden states and output matrix, in bf16 products. ``--teacher_layers 8`` puts the
blocks of a teacher of that depth in front, forward only, on both sides. Each side runs in a process of its own for its
memory; sides alternate for the time. Before timing, losses and gradients are compared. Prints a table, writes
``benchmarks/results/distillation-<cpu or cuda>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from cheaper.config import DistillationConfig, ModelConfig
from cheaper.losses.distillation import linear_distillation
from cheaper.models.decoder import Decoder

WORDS = 128_256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator, device=DEVICE)).bfloat16()

    student, teacher = options.student_width, options.teacher_width
    return {
        "hidden": normal(options.tokens, student).requires_grad_(),
        "weight": normal(WORDS, student, std=2 / student**0.5).requires_grad_(),
        "teacher_hidden": normal(options.tokens, teacher),
        "teacher_weight": normal(WORDS, teacher, std=2 / teacher**0.5),
        "labels": torch.randint(WORDS, (options.tokens,), generator=generator, device=DEVICE),
    }


def teacher_blocks(options: argparse.Namespace) -> Decoder | None:
    if not options.teacher_layers:
        return None
    heads = options.teacher_width // 64
    shape = ModelConfig(
        "teacher", options.teacher_layers, heads, heads, options.teacher_width, options.teacher_width * 4
    )
    shape.vocab_size = 64  # its words are in the output matrix of ``inputs``
    return Decoder(shape).to(DEVICE, torch.bfloat16).requires_grad_(False)


def plain(x: dict[str, torch.Tensor], teacher: torch.Tensor) -> torch.Tensor:
    log_q = (x["hidden"] @ x["weight"].T).float().log_softmax(-1)
    log_p = (teacher @ x["teacher_weight"].T).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def chunked(x: dict[str, torch.Tensor], teacher: torch.Tensor) -> torch.Tensor:
    settings = DistillationConfig()
    return linear_distillation(x["hidden"], x["weight"], x["labels"], teacher, x["teacher_weight"], settings)[0]


SIDES = {"plain": plain, "chunked": chunked}


def step(side: str, x: dict[str, torch.Tensor], blocks: Decoder | None) -> tuple[torch.Tensor, ...]:
    teacher = x["teacher_hidden"]
    if blocks is not None:
        with torch.no_grad():
            teacher = blocks.hidden(torch.zeros(1, len(teacher), dtype=torch.int64, device=DEVICE))[0]
    loss = SIDES[side](x, teacher)
    result = (loss.detach(), *torch.autograd.grad(loss, [x["hidden"], x["weight"]]))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result


def peak_bytes(side: str, arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--only", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(side: str, options: argparse.Namespace) -> None:
    x, blocks = inputs(options), teacher_blocks(options)
    few = argparse.Namespace(**{**vars(options), "tokens": 8})
    step(side, {**x, **{name: inputs(few)[name] for name in ("hidden", "teacher_hidden", "labels")}}, blocks)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(side, x, blocks)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
        before = resident("VmRSS")
        step(side, x, blocks)
        print(resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--student_width", type=int, default=1536, help="the 950M's")
    parser.add_argument("--teacher_width", type=int, default=4096, help="an 8B's")
    parser.add_argument("--teacher_layers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # what peak_bytes measures
    options = parser.parse_args()
    if options.only:
        return measure_peak(options.only, options)
    peaks = {side: peak_bytes(side, sys.argv[1:]) for side in SIDES}

    x, blocks = inputs(options), teacher_blocks(options)
    for ours, right in zip(step("chunked", x, blocks), step("plain", x, blocks), strict=True):
        error = ((ours.float() - right.float()).norm() / right.float().norm()).item()
        assert error < 0.02, error  # both round to bf16, in another order
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side, seconds in times.items():
            begin = time.perf_counter()
            step(side, x, blocks)
            seconds.append(time.perf_counter() - begin)
    ratios = sorted(a / b for a, b in zip(times["plain"], times["chunked"], strict=True))
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/distillation.py", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "peak_bytes_of_the_step": peaks,
        "memory_ratio": round(peaks["chunked"] / peaks["plain"], 3),
        "seconds_median": {side: round(statistics.median(seconds), 4) for side, seconds in times.items()},
        "speed_ratio_median": round(statistics.median(ratios), 3),
        "speed_ratio_min_max": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    target = Path(__file__).parent / "results" / f"distillation-{DEVICE.type}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    for side in SIDES:
        seconds = report["seconds_median"][side]
        print(f"{side:<10}{peaks[side] / 2**30:8.2f} GiB above the start{seconds:10.3f} s")
    print(f"memory ×{report['memory_ratio']}, speed ×{report['speed_ratio_median']} {report['speed_ratio_min_max']}")
    return None


if __name__ == "__main__":
    main()
