"""The devices that plans and MFU are made for: ``yamls/hardware/<name>.yaml``."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import yaml

from cheaper.compose import yaml_dir
from cheaper.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Hardware:
    """One device.

    Args:
        name: Of its file.
        device_name: Words that are all in the name that CUDA gives it.
        peak_flops: Dense bf16, FLOP/s; 0 where nobody knows it.
        memory_mib: Of which CUDA, its libraries and the gaps between tensors take some.
    """

    name: str
    device_name: str
    peak_flops: float
    memory_mib: int

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_mib * 2.0**20


def all_hardware() -> list[Hardware]:
    """Every device that is known; of those whose words are in one name the one with more words comes first."""
    files = sorted((yaml_dir() / "hardware").glob("*.yaml"))
    known = [Hardware(path.stem, **yaml.safe_load(path.read_text())) for path in files]
    return sorted(known, key=lambda hardware: -len(hardware.device_name.split()))


def load_hardware(name: str) -> Hardware:
    """Raises ``UserError`` with the nearest name where there is no ``name``."""
    known = {hardware.name: hardware for hardware in all_hardware()}
    if name not in known:
        raise UserError(f"hardware={name}: no such hardware{did_you_mean(name, known)}")
    return known[name]


def recognise(device_name: str) -> Hardware | None:
    """The device that CUDA calls ``device_name``, such as ``NVIDIA H100 80GB HBM3``."""
    fitting = (hardware for hardware in all_hardware() if set(hardware.device_name.split()) <= _words(device_name))
    return next(fitting, None)


def _words(device_name: str) -> set[str]:
    """``NVIDIA A100-SXM4-40GB`` has the words A100 and 40GB."""
    return set(device_name.replace("-", " ").split())


def this_device() -> Hardware:
    """The GPU of this process, or what each process of this machine has of the processor and its memory."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        known, memory = recognise(device.name), device.total_memory
        return Hardware(device.name, device.name, known.peak_flops if known else 0.0, memory // 2**20)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Hardware("this machine's processor", "", 0.0, memory // 2**20)
