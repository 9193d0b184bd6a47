"""Assembles a run: ``build_trainer(config)`` is a Composer ``Trainer`` ready to ``fit()``."""

from __future__ import annotations

import sys
import uuid
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from composer import Algorithm, Callback, DataSpec, Evaluator, Trainer
from composer.loggers import LoggerDestination, TensorboardLogger, WandBLogger
from composer.optim import LinearWithWarmupScheduler
from composer.utils import dist, get_device
from torch.distributed.device_mesh import DeviceMesh

from cheaper import checkpoints, flops, run_folder
from cheaper.algorithms.expert_balancing import ExpertBalancing
from cheaper.algorithms.gradient_clipping import GradientClipping
from cheaper.algorithms.knowledge_distillation import CachedDistillation, KnowledgeDistillation
from cheaper.algorithms.long_context import LongContext
from cheaper.allocator import keep_freed_memory
from cheaper.cache_teacher import check_cache
from cheaper.callbacks.checkpointer import Checkpointer
from cheaper.callbacks.metrics_file import MetricsFile
from cheaper.callbacks.progress_bar import TokenProgressBar
from cheaper.callbacks.recipe_metrics import RecipeMetrics
from cheaper.callbacks.run_summary import RunSummary
from cheaper.callbacks.samples import Samples
from cheaper.compilation import compile_training
from cheaper.config import DataConfig, RunConfig, StageConfig, parse_count, parse_warmup
from cheaper.data.chat import ChatTemplate
from cheaper.data.manifest import Manifest
from cheaper.data.streams import (
    build_dataloader,
    build_held_out,
    check_shards,
    epoch_tokens,
    mixed_streams,
    row_length,
    shares,
)
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.distributed.activation_checkpointing import checkpoint_activations
from cheaper.distributed.processes import join_processes
from cheaper.distributed.shard_files import is_shards, read_shards
from cheaper.distributed.sharding import build_mesh, divide, init_shards
from cheaper.distributed.tensor_parallel import check_degree
from cheaper.errors import UserError
from cheaper.files import write_atomically
from cheaper.low_precision import check_fp8, multiply_in_fp8
from cheaper.models.composer_model import CausalLM
from cheaper.models.teacher import check_teacher, load_teacher
from cheaper.planning.plan import Plan, check_memory
from cheaper.precision import compute_dtype
from cheaper.profiling import build_profiler
from cheaper.trainer import UnhurriedTrainer


def build_trainer(config: RunConfig) -> Trainer:
    """Checks the run against its data and folder, and puts all its parts together.

    Raises:
        UserError: The data, the checkpoint or the folder do not fit the run.
    """
    # A last batch is smaller; no warm-up; PyTorch's own way of writing shards.
    for meant in ("Cannot split (tensor|list) of length", "The warmup duration is 0", "TypedStorage is deprecated"):
        warnings.filterwarnings("ignore", meant)
    join_processes()
    # On a GPU only checkpoints and data are in the processor's memory.
    allocator = "the system's allocator" if torch.cuda.is_available() else keep_freed_memory()
    if config.training.auto_microbatch and (config.distributed.shard or not torch.cuda.is_available()):
        why = "with distributed.shard=true" if config.distributed.shard else "without a GPU"
        raise UserError(f"training.auto_microbatch is true: Composer does not offer it {why}")
    tokenizer, manifests = check_data(config)
    warn_of_memory(check_memory(config))
    length = run_length(config, manifests)
    clipping, mesh = GradientClipping(config.training.stage.max_grad_norm), build_mesh(config.distributed)
    algorithms = [clipping, *build_algorithms(config, tokenizer, mesh)]
    resume_from = run_folder.open_run_folder(config)
    stage = config.training.stage
    model = build_model(config, mesh, weights=None if config.training.resume else config.training.checkpoint_path)
    if resume_from:
        checkpoints.check_resume(resume_from, model.model, rows_per_step(config))
    peak = flops.peak_flops(get_device(None)._device, compute_dtype(config))
    callbacks = build_callbacks(config, model, tokenizer, clipping, peak[0])
    every = f"{config.training.eval_interval}ba" if config.training.eval_interval else "1dur"
    trainer = UnhurriedTrainer(
        model=model,
        train_dataloader=build_train_data(config, manifests),
        eval_dataloader=build_evaluators(config, manifests),
        eval_interval=every if config.data.held_out else 0,
        max_duration=f"{length.tokens}tok",
        optimizers=build_optimizer(model, stage),
        schedulers=build_scheduler(stage, length),
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=build_loggers(config, manifests, peak, allocator),
        run_name=config.run_name,
        progress_bar=False,
        profiler=build_profiler(Path(config.training.checkpoint_dir) / "profile") if config.training.profile else None,
        precision="amp_bf16" if torch.cuda.is_available() and compute_dtype(config) == torch.bfloat16 else "fp32",
        device_train_microbatch_size="auto" if config.training.auto_microbatch else stage.batch_size_per_gpu,
        accumulate_train_batch_on_tokens=True,
        seed=config.training.seed,
        load_path=str(checkpoints.run_file(resume_from)) if resume_from else None,
        load_ignore_keys=checkpoints.without_foreign_algorithms(algorithms),
        load_progress_bar=False,
    )
    try:
        if resume_from and is_shards(resume_from):
            read_shards(trainer.state, resume_from)
        if resume_from and not trainer.state.optimizers[0].state:
            raise UserError(f"checkpoint {resume_from}: its optimizer state does not fit this version of PyTorch")
    except UserError:
        trainer.close()
        raise
    if dist.get_global_rank() == 0:
        run_folder.write_run_yaml(config)
    return trainer


def warn_of_memory(plan: Plan) -> None:
    """Says so if a step is not expected to fit; only trying tells, for the plan is an estimate."""
    if not plan.fits and dist.get_global_rank() == 0:
        told = "a step is expected to need more memory than a device has; see it with --dry-run"
        print(f"warning: {told}, or ask: cheaper plan --find", file=sys.stderr)


@dataclass(frozen=True)
class Length:
    """How long a run is, in tokens."""

    tokens: int
    tokens_per_step: float  # of all devices, on average
    warmup: int


def check_data(config: RunConfig) -> tuple[Tokenizer, dict[str, Manifest]]:
    """Checks that shards and teacher fit this run and that its length makes sense.

    Returns:
        The run's tokenizer and the manifests of its streams and held-out sets.

    Raises:
        UserError: One line that says what does not fit.
    """
    stage, data = config.training.stage, config.data
    tokenizer = load_tokenizer(data.tokenizer, data.trust_remote_code)
    expected = (stage.sequence_length, config.model.vocab_size, tokenizer)
    held_out = check_shards(data, data.held_out, *expected)
    manifests = check_shards(token_shards(config), mixed_streams(data), *expected)
    length = run_length(config, manifests)
    if length.warmup >= length.tokens:
        raise UserError(
            f"training.stage.warmup is {stage.warmup} steps: the run has only "
            f"{length.tokens // length.tokens_per_step:.0f} ({length.tokens} tokens in steps of "
            f"{length.tokens_per_step:.0f}); expected fewer, or a share such as 3%"
        )
    if config.training.teacher_cache:
        check_cache(config, manifests)
    elif config.training.teacher_model:
        check_teacher(config.training.teacher_model, tokenizer)
    return tokenizer, {**manifests, **held_out}


def token_shards(config: RunConfig) -> DataConfig:
    """The mixture as training reads it."""
    return replace(config.data, root=config.training.teacher_cache or config.data.root)


def run_length(config: RunConfig, manifests: dict[str, Manifest]) -> Length:
    """The length of a run from its token budget, or from its epochs and what the shards hold."""
    stage = config.training.stage
    tokens = parse_count(stage.tokens) if stage.tokens else round(stage.epochs * epoch_tokens(config.data, manifests))
    step = rows_per_step(config) * row_length(config.data, manifests)
    amount, unit = parse_warmup(stage.warmup)
    return Length(tokens, step, round(amount * (step if unit == "steps" else tokens)))


def rows_per_step(config: RunConfig) -> int:
    """Rows that all devices see in one optimizer step; those that share matrices see the same ones."""
    return rows_per_device(config.training.stage) * dist.get_world_size() // config.distributed.tensor_parallel_degree


def rows_per_device(stage: StageConfig) -> int:
    """Rows that one device sees in one optimizer step."""
    return stage.batch_size_per_gpu * stage.gradient_accumulation_steps


def build_model(config: RunConfig, mesh: DeviceMesh | None, weights: str | None) -> CausalLM:
    """The model, or this process's share of it, initialised from the seed or filled with the weights at ``weights``."""
    with torch.device("meta"):
        model = CausalLM(config.model)
    if config.training.fp8:
        check_fp8(config)
        multiply_in_fp8(model.model)
    torch.manual_seed(config.training.seed)
    if mesh is None:
        model.to_empty(device=get_device(None)._device)
        model.model.init_weights()
    else:
        check_degree(config.model, config.distributed.tensor_parallel_degree)
        divide(model.model, mesh, compute_dtype(config), config.distributed.cpu_offload)
        init_shards(model.model)
        if config.distributed.cpu_offload:
            model.to = lambda *_: model  # Composer moves what it is given to the GPU
    if weights:
        checkpoints.load_weights(model.model, weights)
    checkpoint_activations(model.model, config.distributed.activation_checkpointing)
    if config.training.compile:
        compile_training(model)
    if compute_dtype(config) == torch.bfloat16 and not torch.cuda.is_available():
        # Composer has no mixed precision on a CPU.
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def build_optimizer(model: CausalLM, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW; weight decay applies to matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=(stage.beta1, stage.beta2),
        eps=stage.eps,
        fused=True,
    )


def build_scheduler(stage: StageConfig, length: Length) -> LinearWithWarmupScheduler:
    """Linear warm-up from 0 to the peak, then linear decay to ``final_lr_fraction`` of it, both over tokens."""
    return LinearWithWarmupScheduler(t_warmup=f"{length.warmup}tok", alpha_f=stage.final_lr_fraction)


def build_train_data(config: RunConfig, manifests: dict[str, Manifest]) -> DataSpec:
    """The batches of one device, from the token shards or from the teacher cache, which holds the tokens too."""
    rows, copies = rows_per_device(config.training.stage), config.distributed.tensor_parallel_degree
    return build_dataloader(token_shards(config), manifests, rows, config.training.seed, copies)


def build_evaluators(config: RunConfig, manifests: dict[str, Manifest]) -> list[Evaluator]:
    """One for each set of ``data.held_out``; their figures are ``eval/<set>/loss`` and so on."""
    rows, copies = config.training.stage.batch_size_per_gpu, config.distributed.tensor_parallel_degree
    return [
        Evaluator(label=f"eval/{name}", dataloader=build_held_out(config.data, name, manifests[name], rows, copies))
        for name in config.data.held_out
    ]


def build_algorithms(config: RunConfig, tokenizer: Tokenizer, mesh: DeviceMesh | None) -> list[Algorithm]:
    """What changes the training of a stage."""
    training, algorithms = config.training, []
    if config.model.experts:
        algorithms.append(ExpertBalancing(config.model.experts.balancing_speed))
    if training.long_context.enabled:
        long = training.long_context
        algorithms.append(LongContext(long.rope_theta_factor, long.max_position_embeddings))
    if training.teacher_cache:
        algorithms.append(CachedDistillation(training.distillation))
    elif training.teacher_model:
        path = check_teacher(training.teacher_model, tokenizer)
        teacher = load_teacher(
            path, get_device(None)._device, compute_dtype(config), config.data.trust_remote_code, mesh
        )
        algorithms.append(KnowledgeDistillation(teacher, training.distillation))
    return algorithms


def build_callbacks(
    config: RunConfig, model: CausalLM, tokenizer: Tokenizer, clipping: GradientClipping, peak_flops: float
) -> list[Callback]:
    """What observes the run. The checkpointer is last: what the others remember must be in the checkpoint."""
    training, data, folder = config.training, config.data, Path(config.training.checkpoint_dir)
    chats = training.samples.chats
    template = ChatTemplate.load(data.chat_template, data.tokenizer, tokenizer) if chats else None
    return [
        *build_benchmarks(config, tokenizer),
        RecipeMetrics(
            streams=mixed_streams(config.data),
            interval=config.logging.interval,
            flops_per_token=flops.flops_per_token(config.model, training.stage.sequence_length),
            peak_flops=peak_flops,
            clipping=clipping,
            data_copies=config.distributed.tensor_parallel_degree,
            price_per_gpu_hour=config.logging.price_per_gpu_hour,
        ),
        Samples(folder / "samples.jsonl", training.samples, tokenizer, template, training.checkpoint_interval),
        Checkpointer(
            folder,
            training.checkpoint_interval,
            training.keep_checkpoints,
            config.distributed.shard,
            model.model,
            {"vocabulary": tokenizer.vocabulary, "rows_per_step": rows_per_step(config), "recipe": recipe(config)},
        ),
    ]


def build_benchmarks(config: RunConfig, tokenizer: Tokenizer) -> list[Callback]:
    """Benchmarks on the way, if any are asked for."""
    if not config.training.benchmarks.names:
        return []
    from cheaper.callbacks.benchmarks import Benchmarks  # the harness takes seconds to import

    data, rows, sharded = config.data, config.training.stage.batch_size_per_gpu, config.distributed.shard
    speaks = (tokenizer, data.tokenizer, data.chat_template)
    return [Benchmarks(config.training.benchmarks, *speaks, compute_dtype(config), rows, sharded)]


def recipe(config: RunConfig) -> str:
    """The names of what the run was put together from."""
    sections = ("model", "training", "data", "distributed")
    return " ".join(f"{section}={getattr(config, section).name}" for section in sections)


def build_loggers(
    config: RunConfig, manifests: dict[str, Manifest], peak: tuple[float, str], allocator: str
) -> list[LoggerDestination]:
    """Where the metrics go: always the run's file and the progress bar."""
    folder, logging = Path(config.training.checkpoint_dir), config.logging
    loggers: list[LoggerDestination] = [
        MetricsFile(folder / "metrics.jsonl"),
        TokenProgressBar(config.training.name),
        RunSummary(config, peak, shares(config.data, manifests), allocator),
    ]
    if logging.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(folder / "tensorboard")))
    if logging.wandb.enabled:
        loggers.append(build_wandb(config, folder))
    return loggers


def build_wandb(config: RunConfig, folder: Path) -> WandBLogger:
    """Weights & Biases; a resumed run goes on in the same W&B run, whose id the folder keeps."""
    identity = folder / "wandb-id"
    if dist.get_global_rank() == 0 and not identity.exists():
        write_atomically(identity, uuid.uuid4().hex.encode())
    dist.barrier()
    return WandBLogger(
        project=config.logging.wandb.project,
        name=config.logging.wandb.run_name or config.run_name,
        init_kwargs={"id": identity.read_text(), "resume": "allow", "dir": str(folder)},
    )
