"""The training step on one GPU: against transformers with Liger kernels and torch.compile, and part by part.

    python benchmarks/gpu.py [--only training ablation …] [--smoke]

Both sides train the same shape on the same batch with fused AdamW under bf16 autocast, gradients clipped. Ours is what
`build_model` and `build_optimizer` make of a recipe with `training.compile`. Theirs is `Llama4ForCausalLM`, with
Liger's kernels where they are installed, each layer compiled. Both are on the GPU together and take turns of a few
steps; a turn ends when the GPU has finished. MFU is by the convention of `cheaper.flops` over the datasheet's peak; of
documents only the attention inside them counts. A part that fails says why in its row. No row begins after 8 minutes.

Correctness comes first: a wrong result is a row that says so, and exit status 1. Prints a table last and writes
``benchmarks/results/gpu-<device>.json``. ``--smoke`` runs all of it on a CPU with small sizes in fp32, where nothing is
compiled and nothing written: it tells that this file works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_step import (
    LIGER,
    STEPS,
    Sizes,
    allocated,
    autocast,
    document_lengths,
    error_of,
    flex,
    free,
    liger_cross_entropy,
    one_by_one,
    our_step,
    peak_gib,
    random_batch,
    recipe,
    synchronisations,
    their_step,
    turn,
)
from side_by_side import alternate, save, show, speed_ratio, spread

from cheaper.algorithms.knowledge_distillation import CachedDistillation, KnowledgeDistillation
from cheaper.config import DistillationConfig, ModelConfig
from cheaper.flops import flops_per_token
from cheaper.losses.cross_entropy import compiled_cross_entropy, linear_cross_entropy
from cheaper.losses.distillation import linear_distillation
from cheaper.models import attention
from cheaper.models.decoder import Decoder
from cheaper.planning.hardware import recognise
from cheaper.planning.memory import plan_memory
from cheaper.training import build_model

SECONDS = 480
ROUNDS = 5

Row = dict[str, object]

LARGE = Sizes(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    overrides=(),
    training={
        "140M": ("mobilellm_140m", 2048, (16, 8, 4), False),
        "360M": ("mobilellm_360m", 2048, (16, 8, 4), False),
        "950M": ("mobilellm_950m", 2048, (16, 8, 4), False),
        "950M, rows of 4,096": ("mobilellm_950m", 4096, (8, 4, 2), False),
        "950M, documents in 32,768": ("mobilellm_950m", 32768, (1,), True),
    },
    ablation=("mobilellm_360m", 2048, 16),
    documents=32768,
    loss=(4096, 128_256, 1536, 4096),
    teacher=("mobilellm_950m", 2048, 4),
    teacher_shape=ModelConfig("8B", 32, 32, 8, 4096, 14336, 128, tie_word_embeddings=False, qk_norm=False),
    square=8192,
)
SMALL = Sizes(
    device=torch.device("cpu"),
    dtype=torch.float32,
    overrides=("training.precision=fp32", "model.num_layers=2", "model.vocab_size=512"),
    training={"rows": ("tiny", 64, (2,), False), "documents": ("tiny", 128, (1,), True)},
    ablation=("tiny", 64, 2),
    documents=128,
    loss=(32, 512, 32, 64),
    teacher=("tiny", 64, 2),
    teacher_shape=ModelConfig("small", 2, 4, 2, 64, 128, 16, 512, tie_word_embeddings=False, qk_norm=False),
    square=64,
)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def attempt(what: str, measure: Callable[[], Row], begin: float) -> Row:
    """A row, or why there is none."""
    if time.monotonic() - begin > SECONDS:
        return {"what": what, "failed": "not begun: time is up"}
    try:
        return {"what": what, **measure()}
    except Exception as error:
        return {"what": what, "failed": one_line(error)}
    finally:
        torch._dynamo.reset()
        free()


# ---- the parts; each yields names of rows and how to measure them

Part = Iterator[tuple[str, Callable[[], Row]]]


def correctness(sizes: Sizes) -> Part:
    """Losses with their gradients against whole logits in fp32; logits of a small model against fp32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens, words, width, wide = 256, sizes.loss[1] // 8, 128, 192

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(sizes.device, sizes.dtype)

    hidden, weight = normal(tokens, width).requires_grad_(), normal(words, width, std=2 / width**0.5).requires_grad_()
    teacher = normal(tokens, wide), normal(words, wide, std=2 / wide**0.5)
    labels = torch.randint(words, (tokens,), generator=generator).to(sizes.device)

    def logits() -> torch.Tensor:
        return hidden.float() @ weight.float().T

    def plain_distillation() -> torch.Tensor:
        log_p = (teacher[0].float() @ teacher[1].float().T).log_softmax(-1)
        return F.kl_div(logits().log_softmax(-1), log_p, log_target=True, reduction="sum")

    def plain_cross_entropy() -> torch.Tensor:
        return F.cross_entropy(logits(), labels, reduction="sum")

    def gradients(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [hidden, weight])

    distillation = functools.partial(
        linear_distillation,
        teacher_hidden_NE=teacher[0],
        teacher_weight_VE=teacher[1],
        settings=DistillationConfig(),
    )
    for name, fused, plain in (
        ("cross-entropy", linear_cross_entropy, plain_cross_entropy),
        ("compiled cross-entropy", compiled_cross_entropy(), plain_cross_entropy),
        ("distillation", distillation, plain_distillation),
    ):

        def losses(fused=fused, plain=plain) -> Row:
            ours, right = fused(hidden, weight, labels)[0], plain()
            pairs = zip((ours, *gradients(ours)), (right, *gradients(right)), strict=True)
            return judged(max(error_of(*pair) for pair in pairs))

        yield name, losses

    for name, documents, overrides in (
        ("logits, rows", False, ["model.use_flash_attention=false"]),
        ("logits, documents", True, ["model.use_flash_attention=false"]),
        ("logits, rows, flash-attn if installed", False, []),
        ("logits, documents, flash-attn if installed", True, []),
    ):

        def outputs(documents=documents, overrides=overrides) -> Row:
            config = recipe(sizes, "tiny", 256, 2, *overrides)
            decoder, batch = build_model(config, None, None).model, random_batch(config, sizes, documents)
            with torch.no_grad(), autocast(sizes):
                ours = decoder(batch["input_ids"], document_lengths_BN=batch.get("document_lengths"))
            right = Decoder(config.model)
            right.load_state_dict(decoder.state_dict())
            lengths = batch["document_lengths"].cpu() if documents else None
            with torch.no_grad():
                return judged(error_of(ours, right(batch["input_ids"].cpu(), document_lengths_BN=lengths)))

        yield name, outputs

    def compiled() -> Row:
        results = []
        for override in ("training.compile=false", "training.compile=true"):
            config = recipe(sizes, "tiny", 256, 2, override)
            model, batch = build_model(config, None, None), random_batch(config, sizes)
            with autocast(sizes):
                loss = model(batch).loss_sum
            results.append((loss, *torch.autograd.grad(loss, [model.model.embedding.weight])))
        return judged(max(error_of(ours, right) for right, ours in zip(*results, strict=True)))

    yield "compiled model", compiled


def judged(error: float) -> Row:
    return {"relative error": error, "right": error < 0.02}  # bf16 has 8 bits


def training(sizes: Sizes) -> Part:
    """Whole steps of the recipe's models."""
    rate, peak = matrix_rate(sizes), None
    if torch.cuda.is_available() and (hardware := recognise(torch.cuda.get_device_name())):
        peak = hardware.peak_flops
    for name, (model, length, choices, documents) in sizes.training.items():

        def steps(model=model, length=length, choices=choices, documents=documents) -> Row:
            for rows in choices[:-1]:
                with contextlib.suppress(torch.OutOfMemoryError):
                    return one_size(sizes, model, length, rows, documents, rate, peak)
                torch._dynamo.reset()  # else the number of rows would be a variable of what is compiled
                free()
            return one_size(sizes, model, length, choices[-1], documents, rate, peak, smallest=True)

        yield name, steps
    yield "products of square matrices", lambda: {"TFLOP/s": rate / 1e12, "MFU": rate / peak if peak else None}


def matrix_rate(sizes: Sizes) -> float:
    """FLOP/s of products of square matrices."""
    a, b = (torch.randn(sizes.square, sizes.square, device=sizes.device).to(sizes.dtype) for _ in range(2))
    times = alternate({"products": turn(lambda: a @ b, steps=20)}, ROUNDS)["products"]
    return 20 * 2 * sizes.square**3 / spread(times)["median"]


def one_size(
    sizes: Sizes,
    model: str,
    length: int,
    rows: int,
    documents: bool,
    rate: float,
    peak: float | None,
    smallest: bool = False,
) -> Row:
    """Both sides with so many rows; ours alone where theirs fails with the smallest number."""
    config = recipe(sizes, model, length, rows, "training.compile=true")
    batch, before = random_batch(config, sizes, documents), allocated()
    steps = {"ours": our_step(config, batch, sizes)}
    turn(steps["ours"])()
    row: Row = {
        "rows": rows,
        "peak GiB": peak_gib(steps["ours"], before),
        "planned GiB": plan_memory(config, devices=1).peak / 2**30,
        "waits": synchronisations(steps["ours"]),
    }
    try:
        before = allocated()
        theirs = their_step(config, batch, sizes)
        turn(theirs)()
        row |= {"their peak GiB": peak_gib(theirs, before), "their waits": synchronisations(theirs)}
        row["they"] = "with Liger" if LIGER else "without Liger"
        steps["theirs"] = theirs
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) and not smallest:
            raise
        row["they"] = one_line(error)
        theirs = None
    free()
    times = alternate({name: turn(step) for name, step in steps.items()}, ROUNDS)
    tokens = STEPS * rows * length
    row["tokens/s"] = spread([tokens / seconds for seconds in times["ours"]])
    attended = int(batch["document_lengths"][0].pow(2).sum()) // length if documents else length
    flops = flops_per_token(config.model, attended) * row["tokens/s"]["median"]
    row |= {"MFU": flops / peak if peak else None, "of matrix rate": flops / rate}
    if "theirs" in times:
        row["their tokens/s"] = spread([tokens / seconds for seconds in times["theirs"]])
        row["speed ratio"] = speed_ratio(times["theirs"], times["ours"])
    return row


def ablation(sizes: Sizes) -> Part:
    """Variants of one model, each in turns with the same model as it is written."""
    compiled, fp8 = "training.compile=true", "training.fp8=true"
    variants = {
        "compiled blocks": ([compiled], lambda: linear_cross_entropy),
        "compiled blocks and loss": ([compiled], compiled_cross_entropy),
        "compiled blocks and loss, fp8": ([compiled, fp8], compiled_cross_entropy),
        "compiled blocks, Liger's loss": ([compiled], lambda: liger_cross_entropy(chunk=1)),
        "compiled blocks, Liger's loss, chunks × 16": ([compiled], lambda: liger_cross_entropy(chunk=16)),
    }
    for name, (overrides, cross_entropy) in variants.items():

        def variant(name=name, overrides=overrides, cross_entropy=cross_entropy) -> Row:
            config = recipe(sizes, *sizes.ablation, "training.compile=false")
            batch, before = random_batch(config, sizes), allocated()
            changed = recipe(sizes, *sizes.ablation, *overrides)
            step = our_step(changed, batch, sizes, cross_entropy=cross_entropy())
            turn(step)()
            peak = peak_gib(step, before)
            steps = {"as written": our_step(config, batch, sizes, cross_entropy=linear_cross_entropy), name: step}
            times = alternate({side: turn(step) for side, step in steps.items()}, ROUNDS)
            tokens = STEPS * batch["input_ids"].numel()
            return {
                "tokens/s": spread([tokens / seconds for seconds in times[name]]),
                "speed ratio": speed_ratio(times["as written"], times[name]),
                "peak GiB": peak,
            }

        yield name, variant


def attention_kernels(sizes: Sizes) -> Part:
    """Attention alone, forward and backward, in turns with PyTorch's fused attention."""
    model, length, rows = sizes.ablation
    shape = recipe(sizes, model, length, rows).model
    cases = {
        f"{rows} rows of {length:,}": torch.full((rows, 1), length),
        f"documents in {sizes.documents:,}": document_lengths(sizes.documents)[None],
    }
    for case, lengths in cases.items():
        lengths = lengths.to(sizes.device)
        size = (len(lengths), int(lengths[0].sum()))
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        kernels = {
            "varlen": lambda q, k, v, lengths=lengths: attention.causal_attention(q, k, v, lengths, False),
            "FlexAttention": functools.partial(flex, lengths=lengths),
            "flash-attn": lambda q, k, v, lengths=lengths: attention.causal_attention(q, k, v, lengths, True),
        }
        if not attention.INSTALLED:
            del kernels["flash-attn"]
        plain = attention.fused_attention if lengths.shape[1] == 1 else functools.partial(one_by_one, lengths=lengths)
        for name, kernel in kernels.items():

            def compare(kernel=kernel, plain=plain, size=size, heads=heads) -> Row:
                inputs = [
                    torch.randn(*size, count, shape.head_dim, device=sizes.device).to(sizes.dtype).requires_grad_()
                    for count in heads
                ]

                def once(function: Callable) -> torch.Tensor:
                    out = function(*inputs)
                    torch.autograd.grad(out.sum(), inputs)
                    return out

                error = error_of(once(kernel), once(plain))
                sides = {"theirs": turn(lambda: once(plain)), "ours": turn(lambda: once(kernel))}
                times = alternate(sides, ROUNDS)
                return {
                    "ms": spread([1e3 * seconds / STEPS for seconds in times["ours"]]),
                    "speed ratio": speed_ratio(times["theirs"], times["ours"]),
                    "relative error": error,
                }

            yield f"{name}, {case}", compare


def distillation(sizes: Sizes) -> Part:
    """What distillation adds to two models' blocks: both output matrices, forward KL, the student's gradients."""
    tokens, words, width, wide = sizes.loss
    for name in ("ours", "Liger's"):

        def compare(name=name) -> Row:
            generator = torch.Generator(sizes.device).manual_seed(0)

            def normal(*shape: int) -> torch.Tensor:
                drawn = torch.randn(*shape, generator=generator, device=sizes.device)
                return (drawn * (2 / shape[1] ** 0.5 if shape[0] == words else 1)).to(sizes.dtype)

            hidden, weight = normal(tokens, width).requires_grad_(), normal(words, width).requires_grad_()
            teacher = normal(tokens, wide), normal(words, wide)
            labels = torch.randint(words, (tokens,), generator=generator, device=sizes.device)

            def plain() -> torch.Tensor:
                log_q, log_p = ((x @ w.T).float().log_softmax(-1) for x, w in ((hidden, weight), teacher))
                return F.kl_div(log_q, log_p, log_target=True, reduction="sum")

            def ours() -> torch.Tensor:
                return linear_distillation(hidden, weight, labels, *teacher, DistillationConfig())[0]

            def ligers() -> torch.Tensor:
                from liger_kernel.transformers import LigerFusedLinearJSD

                return LigerFusedLinearJSD(jsd_beta=0.0)(hidden, weight, *teacher, labels) * tokens

            def once(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
                value = loss()
                torch.autograd.grad(value, [hidden, weight])
                return value

            fused = ours if name == "ours" else ligers
            error = error_of(once(fused), once(plain))
            peaks = [peak_gib(lambda loss=loss: once(loss), allocated()) for loss in (fused, plain)]
            sides = {"plain": turn(lambda: once(plain)), "fused": turn(lambda: once(fused))}
            times = alternate(sides, ROUNDS)
            return {
                "ms": spread([1e3 * seconds / STEPS for seconds in times["fused"]]),
                "speed ratio": speed_ratio(times["plain"], times["fused"]),
                "peak GiB": peaks[0],
                "plain's GiB": peaks[1],
                "relative error": error,
            }

        yield f"fused KL, {name}, to the plain one", compare


def teachers(sizes: Sizes) -> Part:
    """Training from a cache that keeps 64 of the teacher's words a token, to a teacher that runs beside the student."""

    def compare() -> Row:
        config = recipe(sizes, *sizes.teacher, "training.compile=true")
        batch = random_batch(config, sizes)
        steps = {
            "online": our_step(
                config, batch, sizes, KnowledgeDistillation(random_teacher(sizes), DistillationConfig())
            ),
            "cached": our_step(config, {**batch, **kept_words(batch)}, sizes, CachedDistillation(DistillationConfig())),
        }
        times = alternate({name: turn(step) for name, step in steps.items()}, ROUNDS)
        tokens = STEPS * batch["input_ids"].numel()
        return {
            "tokens/s": spread([tokens / seconds for seconds in times["cached"]]),
            "their tokens/s": spread([tokens / seconds for seconds in times["online"]]),
            "speed ratio": speed_ratio(times["online"], times["cached"]),
        }

    yield "cached teacher, to an online one of 8B", compare


def random_teacher(sizes: Sizes) -> Decoder:
    with torch.device("meta"):
        teacher = Decoder(sizes.teacher_shape).to(sizes.dtype)
    teacher.to_empty(device=sizes.device).init_weights()
    return teacher.requires_grad_(False).eval()


def kept_words(batch: dict[str, torch.Tensor], kept: int = 64) -> dict[str, torch.Tensor]:
    """What a cache of the kind ``top_k`` puts into a batch."""
    ids = batch["input_ids"]
    probabilities = torch.rand(*ids.shape, kept + 1, device=ids.device).softmax(-1)
    return {
        "teacher_ids": (ids[..., None] + torch.arange(kept, device=ids.device)) % (ids.max() + 1),
        "teacher_probabilities": probabilities[..., :-1].contiguous(),
        "teacher_tail": probabilities[..., -1].contiguous(),
        "teacher_most_likely": ids,
    }


PARTS = {
    "correctness": correctness,
    "training": training,
    "ablation": ablation,
    "attention": attention_kernels,
    "distillation": distillation,
    "teachers": teachers,
}


def rows_of(part: str, sizes: Sizes, begin: float) -> Iterator[Row]:
    try:
        for what, measure in PARTS[part](sizes):
            yield attempt(what, measure, begin)
    except Exception as error:
        yield {"what": part, "failed": one_line(error)}


def cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{cell(value['median'])} ({cell(value['min'])}–{cell(value['max'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def table(part: str, rows: list[Row]) -> list[tuple[str, ...]]:
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("what", "failed")))
    lines = [(part, *columns)]
    for row in rows:
        cells = [cell(row[name]) if name in row else "" for name in columns]
        lines.append((str(row["what"]), *cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="small sizes on a CPU")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke runs small sizes on a CPU")
    sizes = SMALL if options.smoke else LARGE
    torch._dynamo.config.disable = options.smoke
    begin, results = time.monotonic(), {}
    for part in options.only:
        results[part] = []
        for row in rows_of(part, sizes, begin):
            results[part].append(row)
            print(part, row, file=sys.stderr, flush=True)
    wrong = [row for row in results.get("correctness", []) if not row.get("right")]
    if not options.smoke:
        device = torch.cuda.get_device_name()
        name = hardware.name if (hardware := recognise(device)) else device.lower().replace(" ", "-")
        packages = ("torch", "transformers", "mosaicml", *(("liger-kernel",) if LIGER else ()))
        some = "" if options.only == list(PARTS) else "-" + "-".join(options.only)
        save(
            f"gpu-{name}{some}", {"correct": not wrong, "seconds": round(time.monotonic() - begin), **results}, packages
        )
    for part, rows in results.items():
        print()
        show(table(part, rows))
        for row in rows:
            if "failed" in row:
                print(f"  {row['what']}: {row['failed']}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
