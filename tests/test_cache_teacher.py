"""The teacher cache: what is packed comes back, training from it equals online distillation, kills lose little."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from cheaper import cache_teacher, cli
from cheaper.checkpoints import model_weights, safe_load
from cheaper.data.manifest import Manifest, TeacherRecord
from cheaper.data.teacher_cache import KeptRow, decode_row, encode_row
from cheaper.files import newest_checkpoint, read_records
from cheaper.losses.distillation import SparseTeacher
from tests.algorithms.test_knowledge_distillation import SHORT, WIDER
from tests.conftest import REPOSITORY, Corpus, finish, kill, start
from tests.e2e.test_resume import assert_same_runs, wait_for_step
from tests.test_training import refusal

WORDS = 320


def logits(tokens: int, words: int = WORDS, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(tokens, words, generator=torch.Generator().manual_seed(seed))


def as_row(teacher: SparseTeacher) -> KeptRow:
    fields = (teacher.ids_NK, teacher.probabilities_NK, teacher.tail_N, teacher.entropy_N, teacher.most_likely_N)
    return KeptRow(*(None if field is None else field.numpy() for field in fields))


def dense(row: KeptRow) -> np.ndarray:
    probabilities = np.zeros((len(row.ids), WORDS), np.float32)
    np.add.at(probabilities, (np.arange(len(row.ids))[:, None], row.ids), row.probabilities)
    return probabilities


@pytest.mark.parametrize("k", [1, 12, WORDS])
@pytest.mark.parametrize("precision", ["compact", "fp32"])
def test_the_most_likely_words_come_back(k, precision):
    row = as_row(SparseTeacher.top(logits(30), k, 1.0))
    again = decode_row(encode_row(row, 0, precision == "compact"), 30, TeacherRecord("top_k", k, precision))
    assert (np.diff(again.ids, axis=1) > 0).all()
    assert np.array_equal(again.most_likely, row.most_likely)
    if precision == "fp32":
        assert np.array_equal(dense(again), dense(row))
        assert np.array_equal(again.tail, row.tail)
    else:
        np.testing.assert_allclose(again.probabilities.sum(1) + again.tail, 1, rtol=1e-5)
        large = dense(row) > 1e-9
        assert np.abs(np.log(dense(again)[large] / dense(row)[large])).max() < 0.13  # half a step, and the sum made 1
        p, q = (np.concatenate([dense(x), x.tail[:, None]], 1).clip(1e-12) for x in (row, again))
        assert (p * np.log(p / q)).sum(1).mean() < 2e-3


def test_drawn_words_come_back_with_how_often_they_were_drawn():
    row = as_row(SparseTeacher.sampled(logits(30), 50, 1.0, torch.Generator().manual_seed(3)))
    assert any(len(set(ids)) < 50 for ids in row.ids.tolist())
    again = decode_row(encode_row(row, 50, True), 30, TeacherRecord("sampled", 50, "compact"))
    np.testing.assert_allclose(dense(again), dense(row), rtol=1e-6)
    assert np.array_equal(again.entropy, row.entropy)
    assert np.array_equal(again.most_likely, row.most_likely)
    used = again.probabilities > 0
    assert (np.diff(again.ids, axis=1) > 0)[used[:, 1:]].all()


def test_fifty_of_128256_words_take_at_most_114_bytes_a_token():
    """Ids fall as in a vocabulary whose frequent words come first, with noise: a stand-in for a real teacher."""
    words, tokens = 128_256, 256
    likely = 2 * logits(tokens, words) / 3 - torch.arange(1, words + 1).log()
    top = encode_row(as_row(SparseTeacher.top(likely, 50, 1.0)), 0, True)
    drawn = encode_row(as_row(SparseTeacher.sampled(likely, 50, 1.0, torch.Generator().manual_seed(0))), 50, True)
    assert len(top) / tokens <= 114
    assert len(drawn) / tokens <= 114


@pytest.fixture(scope="module")
def teacher(corpus: Corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert cli.main(["train", *corpus.arguments(run, *SHORT, *WIDER)]) == 0
    return run


def cache(corpus: Corpus, teacher, folder, *options: str) -> list[str]:
    """Makes a cache in ``folder``; returns the arguments of a training from it."""
    given = [f"training.teacher_model={teacher}", f"training.teacher_cache={folder}"]
    assert cli.main(["cache-teacher", *corpus.arguments(folder / "none", *given), *options]) == 0
    return given


def test_all_words_kept_train_as_the_teacher_itself(corpus: Corpus, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_teacher, "PART_BYTES", 40 * 32 * (8 + 5 * WORDS))
    given = cache(corpus, teacher, tmp_path / "cache", "--k", str(WORDS), "--kind", "top_k", "--precision", "fp32")
    assert len(list((tmp_path / "cache" / "a").glob("*.mds"))) == 9  # 332 rows in parts of 40
    # Which rows an epoch draws depends on where the shards are cut, but not if it takes every row once and in order.
    whole = ["data.streams.a.proportion=null", "data.streams.b.proportion=null", "data.shuffle=false"]
    in_order = [*whole, "training.distillation.kd_alpha=0.7", *SHORT]
    assert cli.main(["train", *corpus.arguments(tmp_path / "cached", *given, *in_order)]) == 0
    assert cli.main(["train", *corpus.arguments(tmp_path / "online", given[0], *in_order)]) == 0
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl") for name in ("cached", "online"))
    assert len(ours) == len(theirs) >= 10
    for cached, online in zip(ours, theirs, strict=True):
        for name in ("loss", "kd_loss", "cross_entropy", "accuracy", "teacher_agreement", "grad_norm"):
            assert cached[f"train/{name}"] == pytest.approx(online[f"train/{name}"], rel=1e-4), name
    weights = [model_weights(safe_load(newest_checkpoint(tmp_path / name))) for name in ("cached", "online")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_few_words_come_near_the_teacher_itself(corpus: Corpus, teacher, tmp_path, kind):
    given = cache(corpus, teacher, tmp_path / "cache", "--k", "32", "--kind", kind)
    assert cli.main(["train", *corpus.arguments(tmp_path / "online", given[0])]) == 0
    assert cli.main(["train", *corpus.arguments(tmp_path / "cached", *given)]) == 0
    ours, theirs = (read_records(tmp_path / name / "metrics.jsonl")[-1] for name in ("cached", "online"))
    assert ours["train/cross_entropy"] == pytest.approx(theirs["train/cross_entropy"], rel=0.05)


def test_training_from_a_cache_resumes_bit_for_bit(corpus: Corpus, teacher, tmp_path):
    given = cache(corpus, teacher, tmp_path / "cache", "--k", "32", "--kind", "sampled")
    finish(start(corpus.arguments(tmp_path / "cached", *given)))
    victim = start(corpus.arguments(tmp_path / "killed", *given), SLOW="0.05")
    wait_for_step(tmp_path / "killed", 16, victim)
    kill(victim)
    finish(start(corpus.arguments(tmp_path / "killed", *given, "training.resume=true")))
    assert_same_runs(tmp_path / "killed", tmp_path / "cached", processes=1)


def test_killed_it_goes_on_and_two_processes_share_the_work(corpus: Corpus, teacher, tmp_path):
    code = (
        "import sys; from cheaper import cache_teacher, cli; cache_teacher.PART_BYTES = 20 * 32 * 68;"
        "sys.exit(cli.main(['cache-teacher', *sys.argv[1:], '--k', '12', '--kind', 'sampled']))"
    )
    given = [f"training.teacher_model={teacher}"]

    def command(folder, processes: int = 1) -> list[str]:
        python = [sys.executable]
        script = tmp_path / "cache_it.py"
        script.write_text(code)
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*python, str(script), *corpus.arguments(folder, *given, f"training.teacher_cache={folder}")]

    environment = {**__import__("os").environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True}
    subprocess.run(command(tmp_path / "whole"), check=True, **options)
    victim = subprocess.Popen(command(tmp_path / "killed"), cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    while len(list((tmp_path / "killed" / "a").glob("*.json"))) < 4:
        assert victim.poll() is None
    kill(victim)
    assert not (tmp_path / "killed" / "a" / "index.json").exists()
    subprocess.run(command(tmp_path / "killed", processes=2), check=True, **options)
    for stream in ("a", "b"):
        folders = [tmp_path / name / stream for name in ("whole", "killed")]
        assert sorted(path.name for path in folders[0].iterdir()) == sorted(path.name for path in folders[1].iterdir())
        for path in folders[0].iterdir():
            assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_caches_that_do_not_fit_are_refused(corpus: Corpus, teacher, tmp_path, capsys):
    given = cache(corpus, teacher, tmp_path / "cache", "--k", "4")

    def line(*arguments: str) -> str:
        return refusal(capsys, corpus.arguments(tmp_path / "run", *arguments))

    other = tmp_path / "other"
    assert cli.main(["train", *corpus.arguments(other, *SHORT, *WIDER, "training.seed=3")]) == 0
    capsys.readouterr()
    assert f"is of teacher {teacher}, the run has {other}" in line(given[1], f"training.teacher_model={other}")
    assert f"is of teacher {teacher}, the run has a/b" in line(given[1], "training.teacher_model=a/b")
    text = line(*given, "training.distillation.temperature=2")
    assert "was made at temperature 1.0, training.distillation.temperature is 2.0" in text
    assert "keeps no teacher; make it with: cheaper cache-teacher" in line(
        f"training.teacher_cache={corpus.folder}/mds"
    )
    text = line(*given, "training.distillation.divergence=reverse_kl")
    assert "training.teacher_cache keeps some of the teacher's words, expected forward_kl" in text

    shutil.copytree(corpus.folder / "mds", tmp_path / "mds")
    manifest = Manifest.read(tmp_path / "mds" / "b" / "manifest.json")
    manifest.documents += 1
    manifest.write(tmp_path / "mds" / "b" / "manifest.json")
    assert "was made from other shards than those in" in line(*given, f"data.root={tmp_path}/mds")

    arguments = corpus.arguments(tmp_path / "run", *given)
    assert cli.main(["cache-teacher", *arguments, "--k", "5"]) == 2
    assert "is the cache of another teacher, kind or shards; choose another folder" in capsys.readouterr().err
    assert cli.main(["cache-teacher", *arguments, "--k", "4"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert cli.main(["cache-teacher", *corpus.arguments(tmp_path / "run", given[0])]) == 2
    assert "expected a teacher and a folder on this machine" in capsys.readouterr().err
    assert cli.main(["cache-teacher", *arguments, "--k", "0"]) == 2
    assert "--k 0: expected 1 to 65535 words" in capsys.readouterr().err
    assert cli.main(["cache-teacher", *arguments, "--only", "aa"]) == 2
    assert "--only aa: no such stream in small; did you mean a?" in capsys.readouterr().err
    assert json.loads((tmp_path / "cache" / "a" / "manifest.json").read_text())["teacher"]["k"] == 4
