"""A whole training step on a CPU against transformers: tokens per second and the most memory a process has.

    python benchmarks/train_cpu.py [--rounds 5]

A step is forward, backward, clipping and fused AdamW: the 140M at 1 × 1,024 tokens, and the tiny model at the
quickstart's batch. Ours is what ``cheaper.training`` builds. Against it ``Llama4ForCausalLM`` with the published
recipe's configuration, and ``LlamaForCausalLM`` of the same shape, which has no QK norm, and then neither has ours.
Each pair starts from the same weights and sees the same ids; before timing, their first losses are compared. Products
are in bf16 (autocast) where the processor has bf16, else in fp32. Each model is in a process of its own, and the two
take turns.

The peer runs twice: with glibc keeping freed memory as it does for ours, and with the system's malloc as it is. Prints
a table, writes ``benchmarks/results/train-cpu.json``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.turns import Peer
from side_by_side import alternate, save, show, speed_ratio, spread
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cheaper.compose import load_config
from cheaper.config import ModelConfig, RunConfig
from cheaper.models.hf import to_hf_config
from cheaper.precision import compute_dtype, describe

QUICKSTART = Path(__file__).parents[1] / "yamls" / "quickstart" / "phase1.yaml"
LARGE = ["model=mobilellm_140m", "training=pretrain_phase1", "data=pretrain_phase1_mix"]
ROW = ["training.stage.batch_size_per_gpu=1", "training.stage.sequence_length=1024"]
RUNS = {"140m": ([*LARGE, *ROW], 1), "tiny": ([str(QUICKSTART)], 10)}  # and how many steps a turn has
SETTINGS = {"same allocator": True, "out of the box": False}
CHECKED = 3  # steps
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}  # relative, of a loss


def llama4(shape: ModelConfig) -> PreTrainedModel:
    return Llama4ForCausalLM(Llama4TextConfig(**to_hf_config(shape)))


def llama(shape: ModelConfig) -> PreTrainedModel:
    same = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "rope_theta", "head_dim")
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            rms_norm_eps=shape.norm_eps,
            initializer_range=shape.initializer_std,
            tie_word_embeddings=shape.tie_word_embeddings,
            **{key: getattr(shape, key) for key in same},
        )
    )


PEERS = {"Llama4ForCausalLM": (llama4, []), "LlamaForCausalLM": (llama, ["model.qk_norm=false"])}


def first_losses(side: Peer) -> list[float]:
    losses: list[float] = []
    while len(losses) < CHECKED:
        losses += side()[0]
    return losses[:CHECKED]


def compare(name: str, run: str, setting: str, rounds: int) -> dict[str, Any]:
    """Ours and the peer ``name`` in turns: tokens per second, memory, and the ratios of both."""
    choices, steps = RUNS[run]
    make, changes = PEERS[name]
    config = load_config([*choices, *changes])
    with tempfile.TemporaryDirectory(prefix="benchmark-train-") as folder:
        torch.manual_seed(0)
        make(config.model).save_pretrained(folder)
        arguments = {"ours": ("ours", True), "theirs": ("theirs", SETTINGS[setting])}
        sides = {
            side: Peer(sys.executable, "train_step.py", steps, folder, *which, *choices, *changes)
            for side, which in arguments.items()
        }
    check(config, *(first_losses(side) for side in sides.values()))
    times = alternate(sides, rounds, warm_up=0)
    peaks = {name: side()[1] for name, side in sides.items()}
    for side in sides.values():
        side.stop()
    tokens = steps * config.training.stage.batch_size_per_gpu * config.training.stage.sequence_length
    return {
        "tokens_per_second": {side: spread([tokens / each for each in seconds]) for side, seconds in times.items()},
        "speed_ratio": speed_ratio(times["theirs"], times["ours"]),
        "peak_bytes": peaks,
        "memory_ratio": round(peaks["ours"] / peaks["theirs"], 3),
    }


def check(config: RunConfig, ours: list[float], theirs: list[float]) -> None:
    """Their first losses are the same."""
    tolerance = TOLERANCE[compute_dtype(config)]
    assert all(math.isclose(*pair, rel_tol=tolerance) for pair in zip(ours, theirs, strict=True)), (ours, theirs)


def row(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    """Of the table."""
    speeds, ratio = result["tokens_per_second"], result["speed_ratio"]
    medians = (f"{speeds[side]['median']:,.0f}" for side in ("theirs", "ours"))
    least_to_most = f"{ratio['min']:.2f}–{ratio['max']:.2f}"
    return name, *medians, f"×{ratio['median']:.2f}", least_to_most, f"×{result['memory_ratio']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = {
        run: {setting: {name: compare(name, run, setting, options.rounds) for name in PEERS} for setting in SETTINGS}
        for run in RUNS
    }
    table = [("", "tokens/s", "ours", "ours is faster", "least to most", "its memory")]
    table += [
        row(f"{run}, {name}, {setting}", result)
        for run in RUNS
        for setting, peers in results[run].items()
        for name, result in peers.items()
    ]
    conditions = {
        "threads": torch.get_num_threads(),
        "precision": describe(load_config(RUNS["140m"][0])),
        "rounds": options.rounds,
    }
    save("train-cpu", {**conditions, "results": results}, ("torch", "transformers"))
    show(table)


if __name__ == "__main__":
    main()
