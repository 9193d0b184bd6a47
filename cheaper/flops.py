"""How much arithmetic training takes, and how much a device can do.

Model FLOPs utilisation follows the field's convention (PaLM, arXiv 2204.02311, appendix B): 6 per parameter and token
for the matrices, the output matrix counted once, 12 · layers · width of attention · sequence length for the
attention scores without halving for causality, over the datasheet's dense peak.
"""

from __future__ import annotations

import time

import torch

from cheaper.config import ModelConfig
from cheaper.planning.hardware import recognise


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of one token in a row of ``sequence_length`` tokens."""
    width, latent, experts = model.hidden_size, model.latent_attention, model.experts
    if latent:
        attention_width = model.num_heads * (latent.plain_dim + model.head_dim + latent.value_dim) / 2
        attention = width * (latent.query_rank + latent.key_value_rank + model.head_dim)
        attention += latent.query_rank * model.num_heads * (latent.plain_dim + model.head_dim)
        attention += latent.key_value_rank * model.num_heads * (latent.plain_dim + latent.value_dim)
        attention += width * model.num_heads * latent.value_dim
    else:
        attention_width = model.num_heads * model.head_dim
        attention = width * (2 * attention_width + 2 * model.num_kv_heads * model.head_dim)
    dense = model.num_layers if experts is None else experts.dense_layers
    feed_forward = 3 * width * model.intermediate_size * dense
    if experts:
        chosen = 3 * experts.intermediate_size * (experts.per_token + experts.shared) + experts.number
        feed_forward += width * chosen * (model.num_layers - dense)
    matrices = model.num_layers * attention + feed_forward + width * model.vocab_size
    return 6 * matrices + 12 * model.num_layers * attention_width * sequence_length


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure comes from.

    A GPU in ``yamls/hardware`` has its datasheet's value; for anything else it is the rate measured on square matrices.
    """
    if device.type == "cuda" and (hardware := recognise(torch.cuda.get_device_name(device))):
        return hardware.peak_flops, f"datasheet of {hardware.device_name}"
    return _measured_matrix_rate(device, dtype), "measured on matrix products"


def _measured_matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):  # the first warms up; the fastest is the least disturbed
        start = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
