"""What a run will take: memory, whether it fits, time and money."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cheaper.checkpoints import find_model, is_checkpoint, model_shape
from cheaper.config import ModelConfig, RunConfig, parse_count
from cheaper.distributed.tensor_parallel import check_degree
from cheaper.errors import UserError
from cheaper.flops import flops_per_token
from cheaper.models import hf
from cheaper.planning.hardware import Hardware, this_device
from cheaper.planning.memory import Memory, plan_memory

RESERVED = 2.0 * 2**30  # bytes that CUDA and NCCL take beside the tensors
GAPS = 0.05  # of the memory, that the allocator loses between tensors of different sizes
EFFICIENT_TOKENS = 8192  # of a micro-batch: with fewer a device is not busy
RECOMPUTED = {"none": 1.0, "selective": 1.05, "full": 4 / 3}  # arithmetic of a step


@dataclass(frozen=True)
class Plan:
    """What a run takes on so many devices.

    Args:
        config: The run.
        hardware: Of each device.
        devices: How many.
        memory: Of the fullest device.
        teacher: The shape of an online teacher, where it is known.
        mfu: Model FLOPs utilisation that is expected.
    """

    config: RunConfig
    hardware: Hardware
    devices: int
    memory: Memory
    teacher: ModelConfig | None
    mfu: float

    @property
    def available(self) -> float:
        """Bytes for tensors."""
        return self.hardware.memory * (1 - GAPS) - RESERVED

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    @property
    def tokens_per_second(self) -> float:
        """Of one device; 0 where nobody knows its peak."""
        length, layout = self.config.training.stage.sequence_length, self.config.distributed
        flops = flops_per_token(self.config.model, length) * RECOMPUTED[layout.activation_checkpointing]
        if self.teacher:
            flops += flops_per_token(self.teacher, length) / 3  # forward only
        return self.mfu * self.hardware.peak_flops / flops

    @property
    def gpu_hours(self) -> float | None:
        """``None`` where the length is a number of epochs, or the speed is not known."""
        tokens = self.config.training.stage.tokens
        return parse_count(tokens) / self.tokens_per_second / 3600 if tokens and self.tokens_per_second else None


def make_plan(config: RunConfig, hardware: Hardware, devices: int, mfu: float = 0.4) -> Plan:
    """Plans ``config`` on so many devices.

    Raises:
        UserError: The devices cannot be divided as the run asks.
    """
    layout = config.distributed
    check_degree(config.model, layout.tensor_parallel_degree)
    if devices % (layout.tensor_parallel_degree * layout.replicate_degree):
        raise UserError(
            f"gpus={devices}: expected a multiple of distributed.tensor_parallel_degree × replicate_degree = "
            f"{layout.tensor_parallel_degree * layout.replicate_degree}"
        )
    teacher = teacher_shape(config)
    return Plan(config, hardware, devices, plan_memory(config, devices, teacher), teacher, mfu)


def check_memory(config: RunConfig) -> Plan:
    """Plans ``config`` on the devices of this run, before anything is allocated.

    Raises:
        UserError: Not even the model's state and its gradients fit.
    """
    plan = make_plan(config, this_device(), int(os.environ.get("WORLD_SIZE", 1)))
    if plan.memory.least > plan.hardware.memory:
        raise UserError(
            f"model {config.model.name}: its state and gradients alone take {_gib(plan.memory.least)} on a device, "
            f"which has {_gib(plan.hardware.memory)}; look for devices and settings with: cheaper plan --find"
        )
    return plan


def teacher_shape(config: RunConfig) -> ModelConfig | None:
    """The shape of the online teacher; ``None`` where there is none or this machine does not know it."""
    source = config.training.teacher_model
    if not source or config.training.teacher_cache or not Path(source).exists():
        return None
    path = find_model(source, "training.teacher_model")
    if is_checkpoint(path):
        return model_shape(path)
    known = json.loads((path / "config.json").read_text()).get("model_type") in ("llama", "llama4_text")
    return hf.load_config(path) if known else None


def find(config: RunConfig, hardware: Hardware, devices: int, mfu: float = 0.4) -> Plan | None:
    """The fastest plan that fits with as many rows in a step: as little recomputed, as few devices to a matrix, and as
    large a micro-batch as there is memory for; ``None`` where nothing fits."""
    plans = [plan for plan in _candidates(config, hardware, devices, mfu) if plan.fits]
    return max(plans, key=_speed, default=None)


def _candidates(config: RunConfig, hardware: Hardware, devices: int, mfu: float) -> Iterator[Plan]:
    stage = config.training.stage
    step = stage.batch_size_per_gpu * stage.gradient_accumulation_steps * devices
    step //= config.distributed.tensor_parallel_degree
    for degree in (1, 2, 4, 8):
        if devices % degree:
            continue
        try:
            check_degree(config.model, degree)
        except UserError:
            continue
        rows = step * degree // devices  # of one device in a step
        for checkpointing in RECOMPUTED:
            for batch in (rows // parts for parts in range(1, rows + 1) if rows % parts == 0):
                changed = copy.deepcopy(config)
                changed.distributed.shard = devices > 1
                changed.distributed.tensor_parallel_degree = degree
                changed.distributed.activation_checkpointing = checkpointing
                changed.training.stage.batch_size_per_gpu = batch
                changed.training.stage.gradient_accumulation_steps = rows // batch
                plan = make_plan(changed, hardware, devices, mfu)
                yield plan
                if plan.fits:
                    break  # smaller ones fit too


def _speed(plan: Plan) -> float:
    """Relative to other plans of the same run."""
    layout, stage = plan.config.distributed, plan.config.training.stage
    busy = min(1.0, stage.batch_size_per_gpu * stage.sequence_length / EFFICIENT_TOKENS) ** 0.5
    return busy * 0.9 ** (layout.tensor_parallel_degree - 1).bit_length() / RECOMPUTED[layout.activation_checkpointing]


def overrides(plan: Plan) -> str:
    """The command-line arguments that make a run of a plan."""
    layout, stage = plan.config.distributed, plan.config.training.stage
    group = "fsdp2_tp" if layout.tensor_parallel_degree > 1 else "fsdp2" if layout.shard else "single_gpu"
    arguments = [f"distributed={group}"]
    if layout.tensor_parallel_degree > 1:
        arguments.append(f"distributed.tensor_parallel_degree={layout.tensor_parallel_degree}")
    if layout.activation_checkpointing != "none":
        arguments.append(f"distributed.activation_checkpointing={layout.activation_checkpointing}")
    arguments.append(f"training.stage.batch_size_per_gpu={stage.batch_size_per_gpu}")
    if stage.gradient_accumulation_steps > 1:
        arguments.append(f"training.stage.gradient_accumulation_steps={stage.gradient_accumulation_steps}")
    return " ".join(arguments)


def table(plan: Plan, price: float | None = None) -> str:
    """The plan for a reader."""
    memory, stage, layout = plan.memory, plan.config.training.stage, plan.config.distributed
    rows = stage.batch_size_per_gpu * stage.gradient_accumulation_steps * plan.devices // layout.tensor_parallel_degree
    lines = [
        ("model", plan.config.model.name),
        ("devices", f"{plan.devices} × {plan.hardware.name}, {_gib(plan.hardware.memory)} each"),
        ("a step", f"{rows} rows of {stage.sequence_length:,} tokens, {stage.batch_size_per_gpu} at once on a device"),
        ("parameters", _gib(memory.parameters)),
        ("optimizer", _gib(memory.optimizer)),
        ("gradients", _gib(memory.gradients)),
        ("gathered in bf16", _gib(memory.gathered)),
        (f"activations, {layout.activation_checkpointing} recomputed", _gib(memory.activations)),
        ("loss", _gib(memory.loss)),
    ]
    if memory.offloaded:
        lines.append(("in the processor's memory", f"{_gib(memory.offloaded)} for each device"))
    if plan.teacher:
        lines.append(("teacher", _gib(memory.teacher)))
    elif plan.config.training.teacher_model and not plan.config.training.teacher_cache:
        lines.append(("teacher", f"not counted: this machine does not have {plan.config.training.teacher_model}"))
    verdict = "fits" if plan.fits else "does not fit"
    lines.append(("at most at once", f"{_gib(memory.peak)} of {_gib(plan.available)} for tensors: {verdict}"))
    speed = plan.tokens_per_second
    if not speed:
        return _rows(lines)
    both = f"{speed:,.0f} tokens/s on a device, {speed * plan.devices:,.0f} on all"
    lines.append(("expected", f"{both}, at {plan.mfu:.0%} MFU"))
    if (hours := plan.gpu_hours) is not None:
        days = hours / plan.devices / 24
        lines.append(("time", f"{days:,.1f} days, {hours:,.0f} device-hours for {stage.tokens} tokens"))
        if price is not None:
            lines.append(("cost", f"{hours * price:,.0f} at {price:g} a device-hour"))
    return _rows(lines)


def _rows(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:36}{value}" for name, value in lines)


def _gib(amount: float) -> str:
    return f"{amount / 2**30:,.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:,.1f} MiB"
