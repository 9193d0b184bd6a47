"""Biases move until the experts' loads are alike."""

from types import SimpleNamespace

import torch

from cheaper.algorithms.expert_balancing import ExpertBalancing
from cheaper.models.moe import Router
from tests.numerics.test_deepseek_v3_parity import CONFIG


def test_loads_become_alike():
    torch.manual_seed(0)
    router = Router(CONFIG)
    torch.nn.init.normal_(router.weight, std=0.3)
    x_ND = torch.randn(4000, CONFIG.hidden_size) + 0.5  # a mean that favours some experts
    balancing, state = ExpertBalancing(0.01), SimpleNamespace(model=router)

    def spread() -> float:
        router.load.zero_()
        router(x_ND)
        return float(router.load.max() / router.load.mean())

    before = spread()
    for _ in range(150):
        router.load.zero_()
        router(x_ND)
        balancing.apply(None, state, None)
    assert before > 1.4
    assert spread() < 1.1


def test_the_bias_is_kept_and_the_load_is_not():
    assert set(Router(CONFIG).state_dict()) == {"weight", "bias"}


def test_a_pass_without_training_counts_no_tokens():
    router = Router(CONFIG).eval()
    torch.nn.init.normal_(router.weight)
    router(torch.randn(10, CONFIG.hidden_size))
    assert router.load.sum() == 0
