"""A model over devices: parameters, gradients and optimizer state in shards (FSDP2, arXiv 2304.11277).

The model comes to Composer's trainer already divided; the trainer finds that it is and leaves it so. It is made without
memory and filled shard by shard: no process ever holds more than its share and the whole parameters of one module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
from composer.utils import dist, get_device
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cheaper.config import DistributedConfig
from cheaper.distributed.tensor_parallel import split_matrices
from cheaper.errors import UserError
from cheaper.models.decoder import Decoder

REPLICATE, SHARD, TENSOR = "data_parallel_replicate", "data_parallel_shard", "tensor_parallel"


def build_mesh(config: DistributedConfig) -> DeviceMesh | None:
    """The processes in three dimensions: copies of the model, its shards, and last its split matrices.

    Returns:
        ``None`` where every process keeps a whole copy.

    Raises:
        UserError: The processes cannot be divided as asked.
    """
    if not config.shard:
        return None
    processes, copies, degree = dist.get_world_size(), config.replicate_degree, config.tensor_parallel_degree
    for key, factor in (("tensor_parallel_degree", degree), ("replicate_degree", copies)):
        if processes % factor:
            raise UserError(f"distributed.{key} is {factor}: expected a divisor of the {processes} processes")
        processes //= factor
    _average_on_gloo()
    device = get_device(None)._device.type
    return init_device_mesh(device, (copies, processes, degree), mesh_dim_names=(REPLICATE, SHARD, TENSOR))


def divide(decoder: Decoder, mesh: DeviceMesh, dtype: torch.dtype, cpu_offload: bool) -> None:
    """Leaves this process its shard of ``decoder``, not yet filled; names and shapes stay as they are.

    Args:
        decoder: Without memory (on the meta device).
        mesh: What ``build_mesh`` made.
        dtype: In which parameters are gathered and computed with; gradients are summed in fp32.
        cpu_offload: Keep the shards in the processor's memory, and step the optimizer there.
    """
    if mesh[TENSOR].size() > 1:
        split_matrices(decoder, mesh[TENSOR])
    shard(decoder, decoder.blocks, mesh, dtype, cpu_offload)
    # What else than ``forward`` needs the parameters gathered.
    register_fsdp_forward_method(decoder, "hidden")
    register_fsdp_forward_method(decoder, "next_token_logits")
    decoder.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    for module in decoder.modules():  # buffers are not sharded, and so not offloaded
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=mesh.device_type))


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, cpu_offload: bool):
    """Shards ``model`` block by block; what is in none of the ``blocks`` is one more."""
    reduced = mesh.device_type == "cuda" and dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if reduced else None
    settings = {
        # Inputs keep their type: angles of rotary positions must not be rounded.
        "mp_policy": policy or MixedPrecisionPolicy(cast_forward_inputs=False),
        "mesh": mesh[REPLICATE, SHARD] if mesh[REPLICATE].size() > 1 else mesh[SHARD],
        "shard_placement_fn": lambda parameter: _other_dimension(parameter, mesh[SHARD].size()),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")} if cpu_offload else {}),
    }
    for block in blocks:
        fully_shard(block, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)


def _other_dimension(parameter: torch.Tensor, shards: int) -> Shard | None:
    """Where a matrix is split already, FSDP takes its other dimension: it cannot share what was left unevenly."""
    if isinstance(parameter, DTensor) and parameter.placements[0].is_shard(0) and parameter.ndim > 1:
        return next((Shard(i) for i in range(1, parameter.ndim) if parameter.shape[i] % shards == 0), None)
    return None


def init_shards(decoder: Decoder) -> None:
    """Fills this process's shards with what ``decoder.init_weights`` gives the same model in one process."""
    for module in decoder.modules():
        shards = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
        for name, parameter in shards.items():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.to_local().device)
            module._parameters[name] = nn.Parameter(whole)
        decoder.param_init_fn(module)
        for name, parameter in shards.items():
            set_value(parameter, module._parameters[name])
            module._parameters[name] = parameter


def set_weights(decoder: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Fills the parameters and buffers, or this process's shards of them, with the whole tensors of the same names."""
    for name, tensor in decoder.state_dict().items():
        set_value(tensor, weights[name])


@torch.no_grad()
def set_value(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies ``whole``, or this process's shard of it, into ``tensor``."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        whole = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
        tensor = tensor.to_local()
    tensor.copy_(whole)


def _average_on_gloo() -> None:
    """Makes FSDP2 sum and then divide on a CPU: up to PyTorch 2.7 it asks gloo for averages, which gives sums."""
    if torch.cuda.is_available() or hasattr(FSDPModule, "set_gradient_divide_factor"):
        return

    def sum_then_divide(shards, replicas, *_):
        return 1.0, float(shards.size() * (replicas.size() if replicas else 1))

    collectives._get_gradient_divide_factors = sum_then_divide
