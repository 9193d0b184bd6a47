"""Gradients are those of the mean over all targets, however a batch is cut into micro-batches and ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Evaluator, Trainer
from composer.core import Callback, DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from cheaper.data.streams import count_tokens
from cheaper.losses.chunked import IGNORED
from cheaper.models.composer_model import CausalLM
from cheaper.models.decoder import count_targets
from tests.numerics.test_llama4_parity import randomise, small

ROWS, LENGTH = 8, 24


def build_model() -> CausalLM:
    model = CausalLM(small(num_layers=2))
    randomise(model.model)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Row i has 0, 3, 6 … 21 targets, so micro-batches and ranks have uneven numbers of them, and one has none."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(211, (ROWS, LENGTH), generator=generator)
    labels = input_ids.clone()
    for row in range(ROWS):
        labels[row, : LENGTH - 3 * row] = IGNORED
    return {
        "input_ids": input_ids,
        "labels": labels,
        "row_tokens": [LENGTH] * ROWS,
        "row_targets": count_targets(labels, dim=-1).tolist(),
    }


def loader() -> DataSpec:
    """The rows of the one batch; of two processes the first has the even ones, the second the odd ones."""
    rows = [dict(zip(batch(), row, strict=True)) for row in zip(*batch().values(), strict=True)]
    sampler = dist.get_sampler(rows)
    return DataSpec(
        DataLoader(rows, batch_size=ROWS // dist.get_world_size(), sampler=sampler),
        get_num_tokens_in_batch=count_tokens,
    )


class KeepGradients(Callback):
    def batch_end(self, state, logger):
        model = getattr(state.model, "module", state.model)
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def train(micro_batches: int) -> dict[str, torch.Tensor]:
    """Gradients of one step through Composer's own trainer, on each of the processes there are."""
    model, keep = build_model(), KeepGradients()
    Trainer(
        model=model,
        train_dataloader=loader(),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        device="cpu",
        device_train_microbatch_size=ROWS // dist.get_world_size() // micro_batches,
        accumulate_train_batch_on_tokens=True,
        callbacks=[keep],
        progress_bar=False,
    ).fit()
    return keep.gradients


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """By hand: the gradient of the plain mean over the batch's targets."""
    model = build_model()
    logits = model.model(batch()["input_ids"])[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch()["labels"][:, 1:].flatten(), ignore_index=IGNORED).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_accumulation_gives_the_same_gradients(expected, micro_batches):
    assert_equal(train(micro_batches), expected)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_two_processes_give_the_same_gradients(expected, tmp_path, micro_batches):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    arguments = ["tests.test_gradient_accumulation", str(micro_batches), str(tmp_path / "gradients.pt")]
    done = subprocess.run(
        [*command, *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(torch.load(tmp_path / "gradients.pt", weights_only=True), expected)


def test_an_evaluator_reports_the_mean_over_all_targets():
    """Micro-batches of one row: a mean of their means would differ, and the row without targets would be NaN."""
    model = build_model()
    trainer = Trainer(
        model=model,
        device="cpu",
        progress_bar=False,
        eval_dataloader=Evaluator(label="eval", dataloader=loader(), device_eval_microbatch_size=1),
    )
    trainer.eval()
    metrics = {name: metric.compute().item() for name, metric in trainer.state.eval_metrics["eval"].items()}
    out = model(batch())
    loss = (out.loss_sum / out.num_targets).double()
    accuracy = out.sums["accuracy"] / out.num_targets
    assert metrics == pytest.approx(
        {"loss": loss.item(), "perplexity": loss.exp().item(), "accuracy": accuracy.item()},
        rel=1e-5,
    )


if __name__ == "__main__":
    os.environ.setdefault("NODE_RANK", "0")  # torchrun does not set it, and Composer asks for it
    dist.initialize_dist("cpu")
    gradients = train(int(sys.argv[1]))
    if dist.get_global_rank() == 0:
        torch.save(gradients, sys.argv[2])
