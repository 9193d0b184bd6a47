"""Initialisation, the shift, documents, and the switch for attention kernels."""

import math

import pytest
import torch
import torch.nn.functional as F

from cheaper.losses.chunked import IGNORED
from cheaper.models.attention import kernel_name
from cheaper.models.decoder import Decoder, count_targets
from tests.numerics.test_llama4_parity import randomise, small, tokens


@pytest.fixture
def decoder() -> Decoder:
    model = Decoder(small())
    randomise(model)
    return model


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    config = small(hidden_size=512, intermediate_size=1024, num_layers=8, vocab_size=4096)
    model = Decoder(config)
    small_std = 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        expected = small_std if name.endswith(("wo.weight", "down.weight")) else 0.02
        assert abs(parameter.std().item() / expected - 1) < 0.05, name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    config = small(vocab_size=4096)
    out = Decoder(config)(tokens(config), tokens(config))
    assert abs(out.loss_sum / out.num_targets - math.log(4096)) < 0.1


def test_the_loss_is_that_of_the_shifted_logits(decoder):
    ids = tokens(decoder.config)
    labels = ids.clone()
    labels[0, :30] = IGNORED
    out = decoder(ids, labels)
    logits = decoder(ids)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert out.num_targets == count_targets(labels) == 2 * 63 - 29
    hits = (logits.argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != IGNORED)
    assert out.sums["accuracy"] == hits.sum()


def test_a_token_sees_only_those_before_it(decoder):
    ids = tokens(decoder.config)
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % decoder.config.vocab_size
    before, after = decoder(ids), decoder(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_documents_of_one_row_do_not_see_each_other(decoder):
    lengths = [10, 1, 23, 30]
    ids = tokens(decoder.config, rows=1, length=sum(lengths))
    together = decoder(ids, document_lengths_BN=torch.tensor([[*lengths, 0]]))
    alone = torch.cat([decoder(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(decoder(ids), alone, atol=1e-2)


def test_state_dict_holds_parameters_only(decoder):
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters(remove_duplicate=False)}


def test_a_model_made_without_memory_computes_the_same_once_filled(decoder):
    with torch.device("meta"):
        other = Decoder(decoder.config)
    other.to_empty(device="cpu")
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(tokens(decoder.config)), decoder(tokens(decoder.config)))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_made_without_memory_is_initialised_module_by_module_as_composer_does(tied):
    torch.manual_seed(0)
    config = small(tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Decoder(config)
    for module in model.modules():
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(9)
        model.param_init_fn(module)
    torch.manual_seed(0)
    expected = Decoder(config).state_dict()
    got = model.state_dict()
    assert got.keys() == expected.keys()
    assert ("head.weight" in got) is not tied
    for name, tensor in got.items():
        assert tensor.abs().max() < 1.5, name
        torch.testing.assert_close(tensor.std(), expected[name].std(), rtol=0.15, atol=0)


def test_rope_theta_can_be_raised_later(decoder):
    ids = tokens(decoder.config)
    before = decoder(ids)
    decoder.config.rope_theta *= 8
    raised = Decoder(small(rope_theta=4_000_000.0))
    raised.load_state_dict(decoder.state_dict())
    assert torch.equal(decoder(ids), raised(ids))
    assert not torch.allclose(decoder(ids), before)


def test_compiles_as_one_graph_with_its_loss_and_gradients(decoder):
    ids = tokens(decoder.config)

    def gradients(model):
        out = model(ids, ids)
        return out.loss_sum, *torch.autograd.grad(0.3 * out.loss_sum, list(decoder.parameters()))

    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled), gradients(decoder), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def test_bf16_autocast_stays_near_fp32_and_gradients_are_fp32():
    torch.manual_seed(0)
    decoder = Decoder(small())
    ids = tokens(decoder.config)
    exact = decoder(ids, ids)
    exact_grads = torch.autograd.grad(exact.loss_sum, list(decoder.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = decoder(ids, ids)
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, exact.loss_sum, rtol=5e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(out.loss_sum, list(decoder.parameters())), exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_which_kernel_runs_is_said():
    """A CPU test of a GPU feature: only the choice is tested, flash-attn cannot run here."""
    pytorch = "PyTorch scaled_dot_product_attention"
    assert kernel_name(torch.device("cpu"), torch.float32, True) == pytorch
    assert kernel_name(torch.device("cpu"), torch.bfloat16, True) == "products of blocks in bf16"
    assert kernel_name(torch.device("cuda"), torch.float32, True) == pytorch
    assert kernel_name(torch.device("cuda"), torch.bfloat16, False) == pytorch
