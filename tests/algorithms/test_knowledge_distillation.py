"""Distillation and long context in real training: what is computed, what is kept, what is refused."""

import json
import shutil

import pytest
import torch
from composer.core import Callback
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cheaper import cli
from cheaper.checkpoints import find_model, load_decoder, safe_load
from cheaper.compose import load_config
from cheaper.config import DistillationConfig
from cheaper.data.tokenize import load_tokenizer
from cheaper.files import newest_checkpoint, read_records
from cheaper.losses.distillation import linear_distillation
from cheaper.models import hf
from cheaper.models.decoder import Decoder, predictors, targets
from cheaper.models.teacher import TransformersModel, check_teacher, load_teacher
from cheaper.training import build_trainer
from tests.conftest import Corpus, finish, kill, start, train_tokenizer
from tests.e2e.test_resume import assert_same_runs, wait_for_step
from tests.test_training import refusal

SHORT = ("training.stage.tokens=1280", "training.checkpoint_interval=5")  # 10 steps of 4 rows
WIDER = ("model.hidden_size=48", "model.num_layers=3")


def train(arguments: list[str]) -> int:
    return cli.main(["train", *arguments])


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """A run folder with a wider model, trained a little."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert train(corpus.arguments(run, *SHORT, *WIDER)) == 0
    return run


def test_a_run_learns_from_its_teacher_and_does_not_keep_it(corpus: Corpus, teacher, tmp_path):
    run = tmp_path / "run"
    assert train(corpus.arguments(run, *SHORT, f"training.teacher_model={teacher}")) == 0
    records = read_records(run / "metrics.jsonl")
    assert records[-1]["train/kd_loss"] < records[0]["train/kd_loss"]
    for record in records:
        assert record["train/loss"] == record["train/kd_loss"]  # α is 1
        assert record["train/cross_entropy"] > record["train/kd_loss"]
        assert 0 <= record["train/teacher_agreement"] <= 1
        assert record["train/perplexity"] == pytest.approx(torch.tensor(record["train/cross_entropy"]).exp().item())
    state = safe_load(newest_checkpoint(run))["state"]
    assert state["model"]["model.embedding.weight"].shape == (320, 32)
    assert len(state["optimizers"]["AdamW"]["state"]) == len(state["model"]) == 20
    summary = json.loads((run / "summary.json").read_text())
    assert summary["teacher_agreement"] == pytest.approx(records[-1]["train/teacher_agreement"], abs=1e-4)


class Recompute(Callback):
    """Computes each loss once more from the two models alone."""

    def __init__(self, teacher: Decoder, settings: DistillationConfig):
        self.teacher, self.settings, self.checked = teacher, settings, 0

    def after_forward(self, state, logger):
        student, batch, outputs = state.model.model, state.batch, state.outputs
        with torch.no_grad():
            loss, sums = linear_distillation(
                predictors(student.hidden(batch["input_ids"])),
                student.output_weight,
                targets(batch["labels"]),
                predictors(self.teacher.hidden(batch["input_ids"])),
                self.teacher.output_weight,
                self.settings,
            )
        assert outputs.loss_sum == loss
        assert outputs.sums == sums
        self.checked += 1


def test_the_loss_of_a_step_is_that_of_the_two_models(corpus: Corpus, teacher, tmp_path):
    settings = {"kd_alpha": 0.6, "temperature": 2.0, "divergence": "reverse_kl"}
    given = [f"training.distillation.{key}={value}" for key, value in settings.items()]
    arguments = corpus.arguments(tmp_path, *SHORT, f"training.teacher_model={teacher}", *given)
    trainer = build_trainer(load_config(arguments))
    recompute = Recompute(load_decoder(find_model(str(teacher), "teacher")), DistillationConfig(**settings))
    trainer.state.callbacks.append(recompute)
    trainer.fit()
    trainer.close()
    assert recompute.checked >= 10


def test_distillation_and_long_context_resume_bit_for_bit(corpus: Corpus, teacher, tmp_path):
    settings = [
        f"training.teacher_model={teacher}",
        "training.distillation.kd_alpha=0.5",
        "training.long_context.enabled=true",
        "data.intra_document_attention=true",
    ]
    finish(start(corpus.arguments(tmp_path / "whole", *settings)))
    run = tmp_path / "killed"
    victim = start(corpus.arguments(run, *settings), SLOW="0.05")
    wait_for_step(run, 16, victim)
    kill(victim)
    finish(start(corpus.arguments(run, *settings, "training.resume=true")))
    assert_same_runs(run, tmp_path / "whole", processes=1)
    names = ("train/kd_loss", "train/teacher_agreement", "train/cross_entropy")
    records = zip(*(read_records(path / "metrics.jsonl") for path in (run, tmp_path / "whole")), strict=True)
    assert all(one[name] == other[name] for one, other in records for name in names)


def test_the_raised_context_is_kept_in_checkpoint_and_export(corpus: Corpus, tmp_path, capsys):
    long = ["training.long_context.enabled=true", "training.long_context.max_position_embeddings=8192"]
    assert train(corpus.arguments(tmp_path / "long", *SHORT, *long)) == 0
    decoder = load_decoder(find_model(str(tmp_path / "long"), "model"))
    assert (decoder.config.rope_theta, decoder.config.max_position_embeddings) == (4_000_000, 8192)
    hf.save_pretrained(decoder, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["rope_theta"], raw["max_position_embeddings"]) == (4_000_000, 8192)
    for source in ("long", "hf"):  # weights that were trained with other positions are no start for this run
        line = refusal(capsys, corpus.arguments(tmp_path / "next", f"training.checkpoint_path={tmp_path / source}"))
        assert "was trained with model.rope_theta=4000000.0, the run has 500000.0" in line


def test_a_teacher_from_transformers_gives_its_own_logits(corpus: Corpus, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=64, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(f"{corpus.folder}/tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(corpus.folder / "tokenizer" / name, tmp_path)
    teacher = load_teacher(check_teacher(str(tmp_path), tokenizer), torch.device("cpu"), torch.float32)
    assert isinstance(teacher, TransformersModel)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    ids = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = teacher.hidden(ids) @ teacher.output_weight.T
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    packed = teacher.hidden(ids, torch.tensor([[5, 7, 0], [3, 3, 6]])) @ teacher.output_weight.T
    documents = [*ids[:1].split([5, 7], dim=1), *ids[1:].split([3, 3, 6], dim=1)]
    alone = torch.cat([theirs(document).logits[0] for document in documents])
    torch.testing.assert_close(packed.flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


def test_teachers_that_do_not_fit_are_refused(corpus: Corpus, teacher, tmp_path, capsys):
    def line(path, *more: str) -> str:
        return refusal(capsys, corpus.arguments(tmp_path / "run", f"training.teacher_model={path}", *more))

    assert f"training.teacher_model {tmp_path}/none: no such file or folder" in line(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds neither a checkpoint step-* nor a transformers model" in line(tmp_path / "empty")

    decoder = load_decoder(find_model(str(teacher), "teacher"))
    hf.save_pretrained(decoder, tmp_path / "other")
    assert "other: there is no" in line(tmp_path / "other")  # no tokenizer: nobody can tell whether its words fit
    train_tokenizer(tmp_path / "other", ["quite other words than those of the corpus"] * 3)
    text = line(tmp_path / "other")
    ours, other = (load_tokenizer(str(path)).vocabulary for path in (corpus.folder / "tokenizer", tmp_path / "other"))
    assert ours[:12] in text
    assert other[:12] in text

    decoder.embedding.weight.data = decoder.embedding.weight.data[:300].clone()
    decoder.config.vocab_size = 300
    hf.save_pretrained(decoder, tmp_path / "fewer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(corpus.folder / "tokenizer" / name, tmp_path / "fewer")
    assert "has 300 words, expected at least the tokenizer's 320" in line(tmp_path / "fewer")
    text = line(teacher, "training.distillation.top_k=5", "training.distillation.divergence=reverse_kl")
    assert "keeps some of the teacher's words, expected forward_kl" in text
    assert not (tmp_path / "run").exists()
