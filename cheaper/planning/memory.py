"""How much memory a training step takes on one device, part by part.

Parameters, gradients and optimizer state are counted tensor by tensor as ``cheaper.distributed`` divides them, and are
exact. Activations are what autograd keeps of a block in bf16 with PyTorch's fused attention and norms; they and the
temporaries of the loss are estimates.

Letters as in ``cheaper.models``: D width, F inside the feed-forward network, H and K heads, E features per head,
V words, n tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cheaper.config import DistributedConfig, ModelConfig, RunConfig
from cheaper.distributed.tensor_parallel import split_dimensions
from cheaper.losses.chunked import CHUNK_BYTES, SLICE_BYTES
from cheaper.models.decoder import Decoder

HALF, FULL = 2, 4  # bytes of bf16 and fp32
# On CUDA, from PyTorch 2.8 on; elsewhere a norm keeps two fp32 copies.
FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    ``gradients`` grow in the backward pass while ``activations`` go, unless gradients are accumulated. Parameters,
    gradients and optimizer state that are offloaded are in ``offloaded`` instead.
    """

    parameters: float  # fp32, or its shard
    optimizer: float  # two moments in fp32
    gathered: float  # parameters in bf16: those that are gathered from the shards, or autocast's copies
    gradients: float
    activations: float
    loss: float
    teacher: float
    accumulates: bool
    offloaded: float  # of the processor's memory

    @property
    def state(self) -> float:
        """What is there all the time, whatever the batch."""
        return self.parameters + self.optimizer + self.teacher

    @property
    def least(self) -> float:
        """What is there at the end of every backward pass, whatever the batch."""
        return self.state + self.gradients

    @property
    def peak(self) -> float:
        passing = self.activations + self.loss
        if self.accumulates:
            return self.state + self.gathered + self.gradients + passing
        return self.state + self.gathered + max(passing, self.gradients)


def plan_memory(config: RunConfig, devices: int, teacher: ModelConfig | None = None) -> Memory:
    """What a step of ``config`` takes on each of ``devices``.

    Args:
        config: The run.
        devices: Of all machines.
        teacher: The shape of an online teacher.
    """
    layout, decoder = config.distributed, _without_memory(config.model)
    shard = sum(shard_sizes(decoder, layout, devices).values())
    stage = config.training.stage
    copies = 2 if devices > 1 and not layout.shard else 1  # DDP sums gradients in buckets of their own
    tokens = stage.batch_size_per_gpu * stage.sequence_length
    state = FULL * shard, 2 * FULL * shard, copies * FULL * shard
    parameters, optimizer, gradients = (0.0, 0.0, 0.0) if layout.cpu_offload else state
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        gathered=_gathered(decoder, layout),
        gradients=gradients,
        activations=_activations(config.model, layout, tokens),
        loss=_loss(config, tokens, distilled=bool(config.training.teacher_model or config.training.teacher_cache)),
        teacher=_teacher(teacher, layout, devices, tokens) if teacher else 0.0,
        accumulates=stage.gradient_accumulation_steps > 1,
        offloaded=sum(state) if layout.cpu_offload else 0.0,
    )


def shard_sizes(decoder: Decoder, layout: DistributedConfig, devices: int) -> dict[str, int]:
    """Elements of each parameter on the first device, which has the most."""
    shards = devices // (layout.replicate_degree * layout.tensor_parallel_degree) if layout.shard else 1
    split = split_dimensions(decoder) if layout.tensor_parallel_degree > 1 else {}
    sizes = {}
    for name, parameter in decoder.named_parameters():
        shape, dimension = list(parameter.shape), 0
        if name in split:
            shape[split[name]] = math.ceil(shape[split[name]] / layout.tensor_parallel_degree)
            if split[name] == 0:  # as ``cheaper.distributed.sharding`` places them
                dimension = next((i for i in range(1, len(shape)) if shape[i] % shards == 0), 0)
        shape[dimension] = math.ceil(shape[dimension] / shards)
        sizes[name] = math.prod(shape)
    return sizes


BUILT: dict[str, Decoder] = {}  # looking for a plan asks for the same shape again and again


def _without_memory(config: ModelConfig) -> Decoder:
    key = repr(config)
    if key not in BUILT:
        BUILT.clear()
        with torch.device("meta"):
            BUILT[key] = Decoder(config)
    return BUILT[key]


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gathered(decoder: Decoder, layout: DistributedConfig) -> float:
    blocks = [_numel(block.parameters()) for block in decoder.blocks]
    root = _numel(decoder.parameters()) - sum(blocks)
    if not layout.shard:
        return HALF * _numel(p for p in decoder.parameters() if p.ndim > 1)
    # Embedding and head all the time; a block at work, the next on its way, and one's gradients going out in fp32.
    return (HALF * root + (2 * HALF + HALF + FULL) * max(blocks)) / layout.tensor_parallel_degree


def _activations(model: ModelConfig, layout: DistributedConfig, tokens: int) -> float:
    """Of all blocks at the end of the forward pass."""
    degree, width = layout.tensor_parallel_degree, model.hidden_size
    inside, kept = 0.0, 0.0
    for layer in range(model.num_layers):
        everything, selected = block_activations(model, layer, layout.shard)
        inside = max(inside, everything)
        kept += {"none": everything, "selective": selected, "full": HALF * width}[layout.activation_checkpointing]
    recomputed = inside if layout.activation_checkpointing != "none" else 0.0  # of one block, in the backward pass
    # Where matrices are split, inputs of both halves of a block are whole, for the gradients of their weights.
    whole = 2 * HALF * width * model.num_layers if layout.activation_checkpointing == "none" else 0.0
    return tokens * ((kept + recomputed) / degree + whole * (1 - 1 / degree) + 2 * FULL * width)


def block_activations(model: ModelConfig, layer: int, sharded: bool) -> tuple[float, float]:
    """Bytes per token that a block keeps; and with selective checkpointing.

    Sharded models have a residual stream in bf16. Others have one in fp32, of which what the matrices see is a copy.
    """
    width, heads, latent, experts = model.hidden_size, model.num_heads, model.latent_attention, model.experts
    if latent:
        query_dim = latent.plain_dim + model.head_dim
        ranks = HALF * 2 * (latent.query_rank + latent.key_value_rank)  # before and after their norms
        queries, keys, values = (heads * query_dim,) * 3
        out, normed = heads * latent.value_dim, 0
    else:
        ranks, queries, out = 0, heads * model.head_dim, heads * model.head_dim
        keys = values = model.num_kv_heads * model.head_dim
        normed = FULL * (queries + keys) if model.qk_norm else 0
    attention = ranks + normed + HALF * (queries + keys + values + out) + FULL * heads
    if experts and layer >= experts.dense_layers:
        chosen = experts.per_token
        # Of each chosen expert its input, four of its inside and its output, plain and weighed.
        network = chosen * HALF * (width + 4 * experts.intermediate_size + 2 * width)
        network += HALF * 4 * experts.shared * experts.intermediate_size + 3 * FULL * experts.number
        inside = (chosen + experts.shared) * experts.intermediate_size
    else:
        network, inside = HALF * 4 * model.intermediate_size, model.intermediate_size
    kept_by_norm = 2 * FULL if not FUSED_NORM else HALF if sharded else FULL
    residual = 2 * width * (kept_by_norm + HALF)  # for each norm, and what comes of it
    selected = HALF * width + HALF * out + FULL * heads + HALF * (queries + values + inside + width)
    return residual + attention + network, min(selected, residual + attention + network)


def _loss(config: RunConfig, tokens: int, distilled: bool) -> float:
    model, degree = config.model, config.distributed.tensor_parallel_degree
    words = math.ceil(model.vocab_size / degree)
    rows = min(tokens, CHUNK_BYTES["cuda"] // (HALF * words))
    at_work = min(rows, SLICE_BYTES["cuda"] // (FULL * words))
    logits = words * (rows * HALF * (2 if distilled else 1) + at_work * FULL * (5 if distilled else 2))
    matrix = words * model.hidden_size * (FULL + HALF)  # its gradient, and a chunk's part of it
    return logits + matrix + tokens * model.hidden_size * HALF


def _teacher(teacher: ModelConfig, layout: DistributedConfig, devices: int, tokens: int) -> float:
    decoder, degree = _without_memory(teacher), layout.tensor_parallel_degree
    blocks = [_numel(block.parameters()) for block in decoder.blocks]
    root = _numel(decoder.parameters()) - sum(blocks)
    weights = HALF * sum(shard_sizes(decoder, layout, devices).values())
    if layout.shard:
        weights += HALF * (root + 2 * max(blocks)) / degree
    # It keeps no activations and no keys and values: only a block's at work, and the hidden states for the loss.
    at_work = HALF * (4 * teacher.hidden_size + 2 * teacher.intermediate_size) / degree
    return weights + tokens * (at_work + HALF * teacher.hidden_size)
