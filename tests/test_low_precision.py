"""``training.fp8``: what is multiplied in fp8, and where that is refused. Products in fp8 are emulated on a CPU."""

import importlib.util
import re

import pytest
import torch

from cheaper import low_precision
from cheaper.compose import load_config
from cheaper.config import ModelConfig
from cheaper.models.decoder import Decoder
from tests.test_training import refusal

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SHAPE = ModelConfig("small", 2, 4, 2, 64, 136, 16, 320)  # 136 is no multiple of 16


def losses(decoder: Decoder, steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    ids = torch.randint(320, (2, 31), generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(steps):
        output = decoder(ids, ids)
        loss = output.loss_sum / output.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss.item())
    return results


def decoders() -> tuple[Decoder, Decoder]:
    """A decoder, and one with the same weights whose products are in fp8."""
    plain, fp8 = Decoder(SHAPE), Decoder(SHAPE)
    low_precision.multiply_in_fp8(fp8, emulate=True)
    fp8.load_state_dict(plain.state_dict())
    return plain, fp8


@needs_torchao
def test_only_matrices_of_blocks_that_fit_are_converted_and_names_stay():
    plain, fp8 = decoders()
    assert list(fp8.state_dict()) == list(plain.state_dict())
    converted = {name for name, module in fp8.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == {f"blocks.{i}.attention.{name}" for i in range(2) for name in ("wq", "wk", "wv", "wo")}


@needs_torchao
def test_losses_stay_near_those_of_the_plain_model():
    torch.manual_seed(0)
    ours, expected = (losses(decoder) for decoder in decoders()[::-1])
    assert ours != expected
    assert ours == pytest.approx(expected, rel=0.02)
    assert expected[-1] < 0.9 * expected[0]


@needs_torchao
def test_a_model_without_memory_is_converted_and_initialised_the_same():
    with torch.device("meta"):
        fp8, plain = Decoder(SHAPE), Decoder(SHAPE)
    low_precision.multiply_in_fp8(fp8, emulate=True)
    for decoder in (fp8, plain):
        torch.manual_seed(0)
        decoder.to_empty(device="cpu").init_weights()
    assert all(torch.equal(a, b) for a, b in zip(fp8.parameters(), plain.parameters(), strict=True))


GPU = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "H100"}


@pytest.mark.parametrize(
    ("gpu", "installed", "overrides", "reason"),
    [
        ({"is_available": False}, True, [], "there is no GPU"),
        (
            {**GPU, "get_device_capability": (8, 0), "get_device_name": "A100"},
            True,
            [],
            "A100 has compute capability 8.0, expected 8.9 or more",
        ),
        (GPU, False, [], "torchao is not installed; it is in the extra gpu"),
        (GPU, True, ["training.precision=fp32"], "training.precision is fp32, expected bf16"),
        (GPU, True, ["distributed=fsdp2_tp"], "distributed.tensor_parallel_degree is 2, expected 1"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, gpu, installed, overrides, reason):
    groups = ["model=tiny", "training=pretrain_phase1", "data=sample", "distributed=single_gpu", "logging=console"]
    config = load_config([*groups, "training.fp8=true", *overrides])
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    with pytest.raises(low_precision.UserError, match=f"^training.fp8 is true: {re.escape(reason)}$"):
        low_precision.check_fp8(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_answers_in_one_line(corpus, tmp_path, capsys):
    line = refusal(capsys, corpus.arguments(tmp_path / "run", "training.fp8=true"))
    assert line == "error: training.fp8 is true: there is no GPU"
