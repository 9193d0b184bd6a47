"""A training step of ours and of theirs, and what `gpu.py` measures of one."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from composer.core import Algorithm, Event
from torch import nn
from torch.nn.utils import clip_grad_norm_

from cheaper.compose import load_config
from cheaper.config import ModelConfig, RunConfig
from cheaper.models import attention, hf
from cheaper.models.decoder import Decoder
from cheaper.training import build_model, build_optimizer

STEPS = 2  # in one turn
LIGER = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()

Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured; on which device."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    overrides: tuple[str, ...]  # of every recipe
    training: dict[str, tuple[str, int, tuple[int, ...], bool]]  # model, sequence length, rows to try, documents
    ablation: tuple[str, int, int]  # model, sequence length, rows
    documents: int  # tokens of a row of documents, for attention
    loss: tuple[int, int, int, int]  # tokens, words, widths of student and teacher
    teacher: tuple[str, int, int]  # the student's model, sequence length, rows
    teacher_shape: ModelConfig
    square: int  # of the matrices whose product gives the device's rate


def recipe(sizes: Sizes, model: str, length: int, rows: int, *overrides: str) -> RunConfig:
    """A run of one GPU."""
    groups = (f"model={model}", "training=pretrain_phase1", "data=pretrain_phase1_mix", "distributed=single_gpu")
    stage = (f"training.stage.sequence_length={length}", f"training.stage.batch_size_per_gpu={rows}")
    positions = f"model.max_position_embeddings={max(length, 4096)}"
    return load_config([*groups, "logging=console", *stage, positions, *sizes.overrides, *overrides])


def random_batch(config: RunConfig, sizes: Sizes, documents: bool = False) -> dict[str, torch.Tensor]:
    stage, generator = config.training.stage, torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (stage.batch_size_per_gpu, stage.sequence_length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if documents:
        batch["document_lengths"] = document_lengths(stage.sequence_length).expand(len(ids), -1)
        batch["labels"][:, batch["document_lengths"][0].cumsum(0)[:-1]] = -100
    return {name: tensor.to(sizes.device) for name, tensor in batch.items()}


def document_lengths(tokens: int) -> torch.Tensor:
    """Lognormal lengths with a median of 1/64 of the tokens, which they fill; int64 [documents]."""
    drawn = torch.empty(1000).log_normal_(std=1.0, generator=torch.Generator().manual_seed(0)) * tokens / 64
    lengths = drawn.long().clamp(min=1)
    before = lengths.cumsum(0) - lengths
    return lengths.minimum(tokens - before)[before < tokens]


def autocast(sizes: Sizes) -> contextlib.AbstractContextManager:
    return torch.autocast(sizes.device.type, sizes.dtype, enabled=sizes.dtype != torch.float32)


def training_step(loss: Callable[[], torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        loss().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(
    config: RunConfig,
    batch: dict[str, torch.Tensor],
    sizes: Sizes,
    algorithm: Algorithm | None = None,
    cross_entropy: Callable | None = None,
) -> Step:
    """As the trainer runs it; ``algorithm`` and ``cross_entropy`` decide the loss."""
    model = build_model(config, mesh=None, weights=None).train()
    if cross_entropy:
        model.cross_entropy = cross_entropy

    def loss() -> torch.Tensor:
        state = SimpleNamespace(batch=dict(batch))
        if algorithm:
            algorithm.apply(Event.BEFORE_FORWARD, state, None)
        with autocast(sizes):
            return model.loss(model(state.batch), state.batch)

    return training_step(loss, model, build_optimizer(model, config.training.stage))


def their_step(config: RunConfig, batch: dict, sizes: Sizes) -> Step:
    """`transformers` as its users run it: Liger kernels where they are installed, each layer compiled."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    if LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_llama4

        apply_liger_kernel_to_llama4()
    shape = Llama4TextConfig.from_dict(hf.to_hf_config(config.model))
    with sizes.device:
        model = Llama4ForCausalLM._from_config(shape, attn_implementation="sdpa").float().train()
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in Decoder(config.model).parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    for layer in model.model.layers:
        layer.compile()
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    if "document_lengths" in batch:
        positions = [torch.arange(length) for length in batch["document_lengths"][0].tolist()]
        inputs["position_ids"] = torch.cat(positions)[None].to(sizes.device)

    def loss() -> torch.Tensor:
        with autocast(sizes):
            return model(**inputs, use_cache=False).loss

    return training_step(loss, model, build_optimizer(model, config.training.stage))


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def turn(step: Step, steps: int = STEPS) -> Step:
    def run() -> None:
        for _ in range(steps):
            step()
        wait()

    return run


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def allocated() -> float:
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def peak_gib(step: Step, before: float) -> float | None:
    """Of one step, above what was allocated ``before``."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    return torch.cuda.max_memory_allocated() / 2**30 - before


def synchronisations(step: Step) -> int | None:
    """How often the processor waits for the GPU in one step."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def error_of(ours: torch.Tensor, right: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    ours, right = ours.detach().double().cpu(), right.detach().double().cpu()
    return ((ours - right).norm() / right.norm()).item()


# ---- what others have in the place of our losses and of our attention


def liger_cross_entropy(chunk: int) -> Callable:
    """Liger's fused linear cross-entropy as our loss; its chunks are ``chunk`` times as large as it makes them."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32, False, False, False, None, None, chunk)

    def loss(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, labels_N: torch.Tensor):
        total = LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, weight_VD, labels_N, *options)[0]
        return total, {"accuracy": torch.zeros((), dtype=torch.int64, device=labels_N.device)}

    return loss


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """PyTorch's fused attention on one document at a time."""
    documents = zip(*(x.split(lengths[0].tolist(), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attention.fused_attention(*document) for document in documents], dim=1)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return compiled_flex()(q, k, v, block_mask=flex_mask(lengths), enable_gqa=True).transpose(1, 2)


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=1)
def flex_mask(lengths: torch.Tensor):
    """As a trainer would make it, once for all layers of a step."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents = torch.stack([torch.arange(len(row), device=row.device).repeat_interleave(row) for row in lengths])

    def visible(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    return create_block_mask(visible, len(lengths), None, *(2 * documents.shape[1:]), device=str(lengths.device))
