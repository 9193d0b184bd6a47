"""``training.benchmarks``: the model is asked while it trains, and training does not notice."""

from pathlib import Path

import pytest

from cheaper import cli
from cheaper.evaluation import evaluate
from cheaper.files import read_records
from tests.conftest import finish, start
from tests.evaluation.conftest import data_dir  # noqa: F401  a fixture

TOKENS = "training.stage.tokens=2560"


def asks(folder: Path) -> tuple[str, ...]:
    settings = f"{{names: [arc_easy], every: 1000, limit: 20, data_dir: {folder}}}"
    return TOKENS, f"training.benchmarks={settings}"


@pytest.fixture(scope="module")
def run(corpus, data_dir, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("asked") / "run"
    assert cli.main(["train", *corpus.arguments(folder, *asks(data_dir))]) == 0
    return folder


def test_scores_are_logged_every_so_many_tokens_and_at_the_end(run, data_dir):  # noqa: F811
    records = [record for record in read_records(run / "metrics.jsonl") if "eval/arc_easy/score" in record]
    assert [record["step"] for record in records] == [8, 16, 20]
    last = evaluate(str(run), ["arc_easy"], data_dir=data_dir, limit=20)[0]
    assert records[-1]["eval/arc_easy/score"] == last.score


def test_training_does_not_notice(corpus, run, tmp_path):
    assert cli.main(["train", *corpus.arguments(tmp_path / "run", TOKENS)]) == 0
    asked, plain = (read_records(folder / "metrics.jsonl") for folder in (run, tmp_path / "run"))
    for name in ("train/loss", "train/grad_norm"):
        assert [record[name] for record in asked] == [record[name] for record in plain]


@pytest.mark.parametrize("layout", ["single_gpu", "fsdp2"])
def test_several_processes_share_the_questions_or_the_model(corpus, run, data_dir, tmp_path, layout):  # noqa: F811
    arguments = corpus.arguments(tmp_path / "run", *asks(data_dir), f"distributed={layout}")
    finish(start([*arguments, "training.stage.batch_size_per_gpu=2"], processes=2))
    scores = [
        [
            record["eval/arc_easy/score"]
            for record in read_records(folder / "metrics.jsonl")
            if "eval/arc_easy/score" in record
        ]
        for folder in (run, tmp_path / "run")
    ]
    assert scores[0] == scores[1]


def test_mistakes_are_told_before_training(corpus, tmp_path, capsys):
    for wrong, told in (
        ("{names: [arc_esy]}", "did you mean arc_easy"),
        (f"{{names: [arc_easy], data_dir: {tmp_path}}}", str(tmp_path)),
        ("{names: [arc_easy], every: often}", "training.benchmarks.every is often: expected a count of tokens"),
        ("{names: [humaneval]}", "runs generated code"),
    ):
        assert cli.main(["train", *corpus.arguments(tmp_path / "run", f"training.benchmarks={wrong}")]) == 2
        assert told in capsys.readouterr().err
