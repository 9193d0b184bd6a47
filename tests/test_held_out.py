"""Held-out sets, natural shares, epochs and targets in a whole run."""

import json
import warnings

import pytest

from cheaper import cli
from cheaper.compose import load_config
from cheaper.data.convert import convert_mixture
from cheaper.files import read_records
from tests.conftest import Corpus, some_texts, write_jsonl


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    raw = write_jsonl(folder / "raw.jsonl", some_texts(41, seed=99))
    arguments = corpus.arguments(
        folder / "run",
        f"data.root={folder}/mds",
        f"data.held_out.probe.source.path={raw}",
        "data.streams.a.proportion=null",
        "data.streams.b.proportion=null",
        "training.stage.tokens=null",
        "training.stage.epochs=2",
        "training.eval_interval=50",
        "training.targets=['train/loss < 100', 'eval/probe/accuracy > 0.999', 'train/kd_loss < 2.0']",
    )
    config = load_config(arguments)
    manifests = convert_mixture(config.data, 32, processes=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert cli.main(["train", *arguments]) == 0
    return folder / "run", manifests, [str(warning.message) for warning in told]


def test_two_epochs_are_every_token_twice(run):
    folder, manifests, _ = run
    last = read_records(folder / "metrics.jsonl")[-2]
    for name in ("a", "b"):
        assert last[f"data/tokens/{name}"] == 2 * manifests[name].tokens


def test_the_held_out_set_is_looked_at_on_the_way_and_at_the_end(run):
    folder, _, _ = run
    records = [record for record in read_records(folder / "metrics.jsonl") if "eval/probe/loss" in record]
    steps = read_records(folder / "metrics.jsonl")[-1]["step"]
    assert [record["step"] for record in records] == [*range(50, steps, 50), steps]
    assert records[-1]["eval/probe/loss"] < records[0]["eval/probe/loss"]
    assert "data/tokens/probe" not in records[-1]


def test_targets_are_checked_at_the_end(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    assert [target["met"] for target in summary["targets"]] == [True, False, False]
    assert summary["targets"][2]["value"] is None
    assert summary["targets"][1]["value"] == summary["held_out"]["eval/probe/accuracy"]


def test_a_last_batch_may_be_small_without_a_word(run):
    _, manifests, told = run
    assert manifests["probe"].rows % 4  # what is left over is smaller than a batch
    assert not [line for line in told if "Cannot split" in line]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.streams.a.proportion=null",
            "data.streams.a has no proportion, others have: expected all of them or none",
        ),
        ("training.stage.epochs=1", "training.stage has tokens=5120, epochs=1.0: expected one of them"),
        ("training.targets=[loss below 2]", "training.targets is loss below 2: expected a metric and a bound such as"),
        ("data.held_out.a.source.path=x", "data.held_out.a is a name of data.streams too: expected another"),
    ],
)
def test_impossible_combinations_are_refused(corpus: Corpus, tmp_path, capsys, override, message):
    assert cli.main(["train", *corpus.arguments(tmp_path, override)]) == 2
    assert message in capsys.readouterr().err
