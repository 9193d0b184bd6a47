"""The plan's bytes are those of real tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cheaper.compose import load_config
from cheaper.config import DistributedConfig
from cheaper.models.decoder import Block, Decoder
from cheaper.models.rotary import rotary_rotation
from cheaper.planning import memory
from cheaper.planning.memory import FULL, block_activations, plan_memory, shard_sizes
from cheaper.training import build_model, build_optimizer
from tests.conftest import REPOSITORY

LAYOUTS = {
    "FSDP2 on 4": {"shard": True},
    "TP 2 × FSDP2 2": {"shard": True, "tensor_parallel_degree": 2},
    "TP 4": {"shard": True, "tensor_parallel_degree": 4},
}


def test_parameters_gradients_and_optimizer_of_one_process(corpus):
    config = load_config(corpus.arguments(Path("unused")))
    model = build_model(config, mesh=None, weights=None)
    optimizer = build_optimizer(model, config.training.stage)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    planned = plan_memory(config, devices=1)
    assert planned.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned.optimizer == sum(moment.nbytes for moment in moments)


def test_shards_are_as_large_as_planned(corpus):
    """Four real processes hold the shards of four layouts; 333 words that nothing divides evenly."""
    script = Path(__file__).with_name("shard_sizes.py")
    recipe = [*corpus.arguments(Path("unused"), "model.vocab_size=333")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    done = subprocess.run(
        [*launcher, script, json.dumps(list(LAYOUTS.values())), *recipe],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = load_config(recipe).model
    with torch.device("meta"):
        decoder = Decoder(config)
    for layout, measured in zip(LAYOUTS.values(), json.loads(done.stdout), strict=True):
        assert shard_sizes(decoder, DistributedConfig("x", **layout), devices=4) == measured


@pytest.mark.parametrize("model", ["mobilellm_140m", "mobilellm_950m", "mobilellm_7b"])
@pytest.mark.parametrize("sharded", [True, False])
def test_activations_of_a_block_are_what_autograd_keeps(model, sharded, monkeypatch):
    """On a CPU, whose norms are not fused in any version, and whose attention keeps no sums of its softmax."""
    monkeypatch.setattr(memory, "FUSED_NORM", False)
    config = load_config([f"model={model}", "training=pretrain_phase1", "data=pretrain_phase1_mix"]).model
    tokens, dtype = 64, torch.bfloat16 if sharded else torch.float32
    block = Block(config, layer=0).to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # Autocast's copies of the weights are no activations.
        if tensor.untyped_storage().data_ptr() not in weights and tokens in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=not sharded):
        block(x, rotary_rotation(torch.arange(tokens), config), None)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens
    planned, selected = block_activations(config, 0, sharded)
    assert planned - FULL * config.num_heads == pytest.approx(measured, rel=0.02)
    assert selected < 0.8 * planned
