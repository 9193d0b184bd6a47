"""The typed schema of a run: every key, its type, default, unit and range.

``cheaper.compose`` turns YAML and the command line into one of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


def at_least(minimum: float, default: Any = "???") -> Any:
    """A field whose values must be ``minimum`` or more."""
    return field(default=default, metadata={"min": minimum})


def above(bound: float, default: Any = "???") -> Any:
    """A field whose values must be greater than ``bound``."""
    return field(default=default, metadata={"above": bound})


def one_of(*choices: str) -> Any:
    """A field that takes one of ``choices``, the first by default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass
class RopeScalingConfig:
    """Llama 3.1's scaling of the rotary frequencies; a factor of 1 is none."""

    factor: float = at_least(1, default=1.0)
    low_freq_factor: float = above(0, default=1.0)
    high_freq_factor: float = above(0, default=4.0)
    original_max_position_embeddings: int = at_least(1, default=8192)


@dataclass
class LatentAttentionConfig:
    """Multi-head latent attention; ``model.head_dim`` is the part of a head with rotary positions."""

    query_rank: int = at_least(1)
    key_value_rank: int = at_least(1)
    plain_dim: int = at_least(1)  # of a head's queries and keys, without positions
    value_dim: int = at_least(1)  # of a head's values


@dataclass
class ExpertsConfig:
    """A mixture of experts in the place of feed-forward networks."""

    number: int = at_least(1)
    per_token: int = at_least(1)
    groups: int = at_least(1, default=1)  # that the experts are in, as many in each
    groups_kept: int = at_least(1, default=1)  # for a token
    shared: int = at_least(1, default=1)  # experts that every token goes through
    intermediate_size: int = at_least(1)  # of one expert
    dense_layers: int = at_least(0, default=0)  # first layers without experts
    scale: float = above(0, default=1.0)  # of the chosen experts' sum
    balancing_speed: float = at_least(0, default=0.001)  # of the bias in one step


@dataclass
class ModelConfig:
    """Shape of a decoder. Sizes are counts of layers, heads, features, words or tokens."""

    name: str = "???"
    num_layers: int = at_least(1)
    num_heads: int = at_least(1)
    num_kv_heads: int = at_least(1)
    hidden_size: int = at_least(1)
    intermediate_size: int = at_least(1)
    head_dim: int = at_least(2, default=64)
    vocab_size: int = at_least(2, default=128256)
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    rope_theta: float = above(0, default=500_000.0)
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = above(0, default=1e-5)
    max_position_embeddings: int = at_least(1, default=4096)
    initializer_std: float = above(0, default=0.02)
    use_flash_attention: bool = True
    latent_attention: LatentAttentionConfig | None = None
    experts: ExpertsConfig | None = None


@dataclass
class StageConfig:
    """Hyper-parameters of one training stage; its length is either ``tokens`` or ``epochs``."""

    tokens: str | None = None  # 2T, 100B, 5M or a plain count
    epochs: float | None = above(0, default=None)  # passes over the data
    sequence_length: int = at_least(2)
    batch_size_per_gpu: int = at_least(1)  # rows in one micro-batch of one device
    gradient_accumulation_steps: int = at_least(1, default=1)  # micro-batches per optimizer step
    learning_rate: float = above(0)  # peak
    warmup: str = "0"  # steps, or a share of the stage such as 3%
    final_lr_fraction: float = at_least(0, default=0.0)  # of the peak, reached linearly at the end
    beta1: float = at_least(0, default=0.9)
    beta2: float = at_least(0, default=0.95)
    eps: float = above(0, default=1e-8)
    weight_decay: float = at_least(0, default=0.0)  # on matrices only
    max_grad_norm: float = above(0, default=1.0)


@dataclass
class DistillationConfig:
    """Loss: kd_alpha · T² · divergence(teacher, student) + (1 - kd_alpha) · cross-entropy."""

    kd_alpha: float = field(default=1.0, metadata={"min": 0, "max": 1})
    temperature: float = above(0, default=1.0)
    divergence: str = one_of("forward_kl", "reverse_kl", "jensen_shannon")
    beta: float = field(default=0.5, metadata={"above": 0, "below": 1})  # of jensen_shannon: the teacher's share
    top_k: int | None = None  # only the teacher's k most likely words, all others as one; by default every word


@dataclass
class LongContextConfig:
    """Prepares the model for longer rows, see ``cheaper.algorithms.long_context``."""

    enabled: bool = False
    rope_theta_factor: float = at_least(1, default=8.0)
    max_position_embeddings: int = at_least(1, default=32768)


@dataclass
class SamplesConfig:
    """Text that the model continues at each checkpoint."""

    prompts: list[str] = field(default_factory=list)
    chats: list[str] = field(default_factory=list)  # what a user says; the model answers in the chat template
    max_new_tokens: int = at_least(1, default=48)


@dataclass
class BenchmarksConfig:
    """Benchmarks on the way, see ``cheaper.callbacks.benchmarks``; those that run generated code are not offered."""

    names: list[str] = field(default_factory=list)  # as `cheaper evaluate --benchmarks` has them
    every: str | None = None  # tokens between two times, such as 1B, besides the end
    limit: int | None = at_least(1, default=None)  # questions of each task
    data_dir: str | None = None  # local copies of their data sets; by default from the hub


@dataclass
class ExpectedConfig:
    """What the recipe is expected to reach with one model."""

    loss: float | None = None
    perplexity: float | None = None
    tokens_per_second_per_gpu: float | None = None


@dataclass
class TrainingConfig:
    name: str = "???"
    stage: StageConfig = field(default_factory=StageConfig)
    seed: int = at_least(0, default=17)
    precision: str = one_of("bf16", "fp32")
    compile: bool = False  # fuse the operations of each block (torch.compile); the first step takes a minute or so
    fp8: bool = False  # matrix products of the blocks in fp8; for GPUs from Ada and Hopper on, best with compile=true
    auto_microbatch: bool = False  # on a GPU: find how many of a step's rows fit at once; not with distributed.shard
    profile: bool = False  # record where the time and memory of three early steps go, into profile/ of checkpoint_dir
    checkpoint_path: str | None = None  # weights to start from, or with resume=true the checkpoint to go on from
    expects_weights: bool = False  # a stage that goes on from another's weights: say so where it starts without
    resume: bool = False
    checkpoint_dir: str = "runs/${run_name}"  # everything the run writes
    checkpoint_interval: int = at_least(1, default=1000)  # steps
    eval_interval: int | None = at_least(1, default=None)  # steps between two looks at data.held_out, besides the end
    keep_checkpoints: int = at_least(1, default=3)  # the newest ones; older files are deleted
    teacher_model: str | None = None  # distil from it: a run folder, a checkpoint, a transformers folder or a hub id
    teacher_cache: str | None = None  # distil from what `cheaper cache-teacher` kept of it; may be a URL
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    long_context: LongContextConfig = field(default_factory=LongContextConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)
    expected: dict[str, ExpectedConfig] = field(default_factory=dict)  # by model name
    targets: list[str] = field(default_factory=list)  # such as "train/kd_loss < 2.0", checked at the end


@dataclass
class SourceConfig:
    """Where the raw rows of one stream come from: exactly one of ``path``, ``listed_in`` and ``dataset``."""

    # File, folder or glob: JSONL (.gz .zst .bz2), Parquet, text. A file or glob may be a URL, such as hf://datasets/….
    path: str | None = None
    listed_in: str | None = None  # text file or its URL that names such files or URLs, one a line
    dataset: str | None = None  # Hugging Face dataset id
    subset: str | None = None  # its configuration name
    data_dir: str | None = None  # folder inside the dataset repository
    split: str = "train"


@dataclass
class StreamConfig:
    """One stream of a mixture."""

    proportion: float | None = at_least(0, default=None)  # share of the tokens, normalised over the streams; given for
    # all of them or for none, which takes each stream whole once in an epoch
    source: SourceConfig = field(default_factory=SourceConfig)
    format: str = "text"  # a name in cheaper.data.formats
    field: str = "text"  # the column that format "text" reads


@dataclass
class DataConfig:
    name: str = "???"
    root: str = "data/${data.name}-${data.row_length}"  # a folder of MDS shards per stream; may be a URL
    # Tokens in a row of the shards. Text may be cut into shorter rows when it is read, for stages of several lengths.
    row_length: int = at_least(2, default="${training.stage.sequence_length}")
    cache: str = "data/cache"  # where shards of a remote root are kept on this machine
    tokenizer: str = "???"  # folder, hub id or tiktoken .model file
    trust_remote_code: bool = False  # let a tokenizer from the hub run its own code
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    held_out: dict[str, StreamConfig] = field(default_factory=dict)  # for evaluation only; converted like the streams
    packing: bool = False  # rows of whole documents, best fit; attention stays inside each
    chat_template: str = "llama3"  # that name, "tokenizer" for the tokenizer's own, or a .jinja file
    too_long: str = one_of("drop", "cut")  # what to do with a chat that is longer than a row
    intra_document_attention: bool = False  # keep attention and positions inside each document of a row
    shuffle: bool = True
    num_workers: int = at_least(0, default=2)  # loader processes per device
    canonical_nodes: int = at_least(1, default=1)  # fixes the order of the data whatever the number of machines


@dataclass
class DistributedConfig:
    name: str = "???"
    shard: bool = False  # parameters, gradients and optimizer state over the devices (FSDP2); else each has all of them
    replicate_degree: int = at_least(1, default=1)  # copies of the sharded model, each over its share of the devices
    tensor_parallel_degree: int = at_least(1, default=1)  # devices that share every matrix; within one machine
    activation_checkpointing: str = one_of("none", "selective", "full")  # what is computed again to save memory
    cpu_offload: bool = False  # keep shards in the processor's memory, and step the optimizer there


@dataclass
class WandBConfig:
    enabled: bool = False
    project: str = "cheapertraining"
    run_name: str | None = None


@dataclass
class LoggingConfig:
    name: str = "???"
    interval: int = at_least(1, default=10)  # steps between two records of metrics
    tensorboard: bool = False
    wandb: WandBConfig = field(default_factory=WandBConfig)
    price_per_gpu_hour: float | None = None  # in your currency; adds the cost to the end of the run


@dataclass
class RunConfig:
    """Everything about one run."""

    run_name: str = "${model.name}-${training.name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def parse_count(text: str) -> int:
    """Reads a count of tokens: ``"2T"``, ``"100B"``, ``"5M"``, ``"512K"``, ``"1.5M"`` or ``"4096"``.

    Raises:
        ValueError: If ``text`` is not a positive count.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", str(text).strip().replace("_", ""), re.IGNORECASE)
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    count = round(float(match[1]) * scale[match[2].upper()]) if match else 0
    if count < 1:
        raise ValueError("expected a count of tokens such as 2T, 100B, 5M or 4096")
    return count


def parse_target(text: str) -> tuple[str, str, float]:
    """Reads a target: ``"train/kd_loss < 2.0"`` → ``("train/kd_loss", "<", 2.0)``.

    Raises:
        ValueError: If ``text`` is no metric, comparison and number.
    """
    match = re.fullmatch(r"([a-z]+/\S+)\s*([<>])\s*(-?\d+(?:\.\d+)?)", text.strip())
    if not match:
        raise ValueError("expected a metric and a bound such as train/kd_loss < 2.0")
    return match[1], match[2], float(match[3])


def parse_warmup(text: str) -> tuple[float, str]:
    """Reads a warm-up: ``"2000"`` → ``(2000, "steps")``, ``"3%"`` → ``(0.03, "share")``.

    Raises:
        ValueError: If ``text`` is neither a number of steps nor a percentage below 100.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", str(text).strip())
    if match and float(match[1]) < 100:
        return float(match[1]) / 100, "share"
    if re.fullmatch(r"\d+", str(text).strip()):
        return int(text), "steps"
    raise ValueError("expected steps such as 2000 or a share of the stage such as 3%")
