"""Exit statuses, and one line for a mistake, without a traceback."""

import pytest

from cheaper.cli import main


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: cheaper trian: no such verb; did you mean train?"),
        (["train", "model=tny"], "error: model=tny (the command line): no such model; did you mean tiny?"),
        (["train", "yamls/none.yaml"], "error: recipe yamls/none.yaml: no such file"),
        (
            ["train", "yamls/quickstart/phas1.yaml"],
            "error: recipe yamls/quickstart/phas1.yaml: no such file; did you mean phase1.yaml?",
        ),
        (
            ["generate", "model", "text", "--temprature", "1"],
            "error: cheaper generate --temprature: no such argument; did you mean --temperature?",
        ),
        (["export", "model", "--output", "new"], "error: cheaper export: the following arguments are required: --to"),
        (["report"], "error: cheaper report: the following arguments are required: RUN"),
        (["convert", "data=sample", "data.tokenizer=/nowhere"], "error: tokenizer /nowhere: there is no"),
        (["convert", "data=sampel"], "error: data=sampel (the command line): no such data; did you mean sample?"),
        (
            ["train", "yamls/midtrain.yaml", "model=mobilellm_7b"],
            "error: training.checkpoint_path ./runs/mobilellm_7b-pretrain_phase2: no such file or folder; train",
        ),
    ],
)
def test_a_mistake_is_status_2_and_one_line(capsys, arguments, line):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_several_mistakes_are_a_line_each(capsys):
    assert main(["train", "model=tiny", "training=pretrain_phase1", "data=sample", "model.x=1", "data.y=2"]) == 2
    assert [line.split()[:2] for line in capsys.readouterr().err.splitlines()] == [
        ["error:", "model.x"],
        ["error:", "data.y"],
    ]


def test_a_later_stage_without_weights_is_warned_of(capsys, monkeypatch):
    stage = ["model=tiny", "data=sample", "data.tokenizer=/nowhere"]
    for training, warned in (("midtrain", True), ("pretrain_phase2", True), ("pretrain_phase1", False)):
        assert main(["train", f"training={training}", *stage]) == 2
        told = f"warning: {training} starts from random weights: training.checkpoint_path is none\n"
        assert (told in capsys.readouterr().err) == warned
    main(["train", "training=midtrain", *stage, "training.checkpoint_path=yamls"])
    main(["train", "training=midtrain", *stage, "training.resume=true"])
    main(["train", "yamls/quickstart/teacher.yaml", "data.root=/nowhere"])
    assert "warning" not in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == main([]) == 0
    assert "usage: cheaper train" in capsys.readouterr().out
