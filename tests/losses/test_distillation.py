"""Distillation in chunks against the plain formulas: values, gradients, masks, bucketed and sampled teachers."""

import pytest
import torch
import torch.nn.functional as F

from cheaper.config import DistillationConfig
from cheaper.losses import chunked
from cheaper.losses.chunked import IGNORED
from cheaper.losses.distillation import SparseTeacher, linear_distillation, sparse_distillation

WORDS = 101


@pytest.fixture(autouse=True, params=[5, 1000])
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": request.param * 4 * WORDS})
    monkeypatch.setattr(chunked, "SLICE_BYTES", {"cpu": 2 * 4 * WORDS})


def inputs(tokens: int = 33, width: int = 16, teacher_width: int = 24, teacher_words: int = WORDS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (0.5 * torch.randn(WORDS, width, generator=generator)).requires_grad_()
    teacher = torch.randn(tokens, teacher_width, generator=generator)
    teacher_weight = 0.5 * torch.randn(teacher_words, teacher_width, generator=generator)
    labels = torch.randint(WORDS, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return hidden, weight, labels, teacher, teacher_weight


def plain(hidden, weight, labels, teacher_logits, settings: DistillationConfig):
    """The formulas as the papers write them, on whole logits, differentiated by autograd."""
    kept = labels != IGNORED
    logits, teacher_logits, labels = (hidden @ weight.T)[kept], teacher_logits[kept], labels[kept]
    t, beta = settings.temperature, settings.beta
    log_q, log_p = (logits / t).log_softmax(-1), (teacher_logits / t).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if settings.top_k:
        ids = teacher_logits.topk(settings.top_k).indices
        p, q = p.gather(1, ids), q.gather(1, ids)
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], 1) for x in (p, q))
        kd = (p * (p.log() - q.log())).sum()
    elif settings.divergence == "forward_kl":
        kd = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    elif settings.divergence == "reverse_kl":
        kd = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        kd = beta * (p * (log_p - log_m)).sum() + (1 - beta) * (q * (log_q - log_m)).sum()
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    sums = {
        "kd_loss": t**2 * kd,
        "cross_entropy": cross_entropy,
        "accuracy": (logits.argmax(-1) == labels).sum(),
        "teacher_agreement": (logits.argmax(-1) == teacher_logits.argmax(-1)).sum(),
    }
    return settings.kd_alpha * t**2 * kd + (1 - settings.kd_alpha) * cross_entropy, sums


def assert_same(ours, theirs, parameters):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, atol=1e-5, rtol=1e-5, msg=name)
    expected = torch.autograd.grad(0.37 * theirs[0], parameters)
    for gradient, right in zip(torch.autograd.grad(0.37 * ours[0], parameters), expected, strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-5, rtol=1e-5)


SETTINGS = [
    {},
    {"temperature": 2.0},
    {"kd_alpha": 0.0},
    {"kd_alpha": 0.3, "temperature": 0.5},
    {"divergence": "reverse_kl", "temperature": 3.0, "kd_alpha": 0.7},
    {"divergence": "jensen_shannon", "beta": 0.1},
    {"divergence": "jensen_shannon", "beta": 0.5, "temperature": 2.0, "kd_alpha": 0.5},
    {"top_k": 7},
    {"top_k": 1, "temperature": 2.0, "kd_alpha": 0.4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_plain_formula_with_all_gradients(settings):
    hidden, weight, labels, teacher, teacher_weight = inputs()
    config = DistillationConfig(**settings)
    theirs = plain(hidden, weight, labels, teacher @ teacher_weight.T, config)
    ours = linear_distillation(hidden, weight, labels, teacher, teacher_weight, config)
    assert_same(ours, theirs, [hidden, weight])


def test_all_words_kept_is_the_whole_divergence():
    hidden, weight, labels, teacher, teacher_weight = inputs()
    theirs = plain(hidden, weight, labels, teacher @ teacher_weight.T, DistillationConfig())
    ours = linear_distillation(hidden, weight, labels, teacher, teacher_weight, DistillationConfig(top_k=WORDS))
    assert_same(ours, theirs, [hidden, weight])


@pytest.mark.parametrize(("student_words", "teacher_words"), [(WORDS, WORDS + 9), (WORDS, WORDS - 9)])
def test_words_that_only_one_model_has_take_no_part(student_words, teacher_words):
    hidden, weight, labels, teacher, teacher_weight = inputs(teacher_words=teacher_words)
    common = min(student_words, teacher_words)
    labels = torch.where(labels >= common, 3, labels)
    theirs = plain(hidden, weight[:common], labels, teacher @ teacher_weight[:common].T, DistillationConfig())
    ours = linear_distillation(hidden, weight, labels, teacher, teacher_weight, DistillationConfig())
    assert_same(ours, theirs, [hidden, weight])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_distributions_that_share_no_word_give_finite_losses_and_gradients(divergence):
    hidden, weight, labels, teacher, teacher_weight = inputs()
    config = DistillationConfig(divergence=divergence)
    loss, _ = linear_distillation(hidden * 100, weight, labels, teacher * 100, teacher_weight, config)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, [hidden, weight]))


def test_a_tail_that_is_almost_nothing_keeps_its_gradient():
    """The student's tail is summed, not 1 minus the rest: fp32 could not tell 1 - 1e-9 from 1."""
    hidden, weight, labels, teacher, teacher_weight = (x.detach().double() for x in inputs())
    weight[:90] += 0.01
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    exact = plain(hidden * 6, weight, labels.long(), teacher @ teacher_weight.T, DistillationConfig(top_k=40))[0]
    expected = torch.autograd.grad(exact, hidden)[0]
    single = hidden.detach().float().requires_grad_()
    config = DistillationConfig(top_k=40)
    ours = linear_distillation(
        single * 6, weight.float(), labels.long(), teacher.float(), teacher_weight.float(), config
    )[0]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=0)
    error = torch.autograd.grad(ours, single)[0].double() - expected
    assert error.norm() < 1e-4 * expected.norm()


def test_sampled_words_estimate_loss_and_gradient_without_bias():
    hidden, weight, labels, teacher, teacher_weight = inputs(tokens=12)
    logits = teacher @ teacher_weight.T
    p = logits.softmax(-1)
    expected, sums = plain(hidden, weight, labels, logits, DistillationConfig())
    expected_gradient = torch.autograd.grad(expected, hidden)[0]
    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], []
    for _ in range(400):
        ids = torch.multinomial(p, 25, replacement=True, generator=generator)
        estimate = SparseTeacher(
            ids, torch.full(ids.shape, 1 / 25), None, torch.distributions.Categorical(p).entropy(), p.argmax(-1)
        )
        loss, ours = sparse_distillation(hidden, weight, labels, estimate, DistillationConfig())
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, hidden)[0])
        assert ours["teacher_agreement"] == sums["teacher_agreement"]
    losses, gradients = torch.stack(losses), torch.stack(gradients)
    assert abs(losses.mean() - expected) < 4 * losses.std() / 20
    error = (gradients.mean(0) - expected_gradient) / (gradients.std(0) / 20 + 1e-6)
    assert error.abs().max() < 5
    assert error.square().mean() < 1.5


def test_bf16_autocast_stays_near_fp32():
    hidden, weight, labels, teacher, teacher_weight = inputs(64)
    exact = linear_distillation(hidden, weight, labels, teacher, teacher_weight, DistillationConfig())
    with torch.autocast("cpu", torch.bfloat16):
        teacher, teacher_weight = teacher.bfloat16(), teacher_weight.bfloat16()
        half = linear_distillation(hidden, weight, labels, teacher, teacher_weight, DistillationConfig())
    torch.testing.assert_close(half[0], exact[0], rtol=1e-2, atol=0)
    pairs = zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (half[0], exact[0])), strict=True)
    for ours, right in pairs:
        assert ours.dtype == torch.float32
        assert (ours - right).norm() < 0.03 * right.norm()
