"""``cheaper generate`` and ``cheaper chat``: what is typed, and what is printed."""

import dataclasses
import json

import pytest
import tokenizers

from cheaper import cli
from cheaper.data.tokenize import Tokenizer
from cheaper.errors import UserError
from cheaper.generation import Sampling
from cheaper.language_model import LanguageModel, load_model
from tests.test_interchange import refused, run  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def model(run) -> LanguageModel:  # noqa: F811
    return load_model(str(run))


def pieces(model: LanguageModel, prompt, **settings) -> list[str]:
    stop = settings.pop("stop", ())
    return list(model.stream(prompt, Sampling(**settings), stop))


def test_pieces_are_the_whole_text(model):
    whole = model.generate(["the model"], max_new_tokens=40)[0]
    streamed = pieces(model, "the model", max_new_tokens=40)
    assert "".join(streamed) == whole
    assert len(streamed) > 10


def test_a_batch_gives_what_each_prompt_gives_alone(model):
    prompts = ["the model", "a", [{"role": "user", "content": "which word"}]]
    together = model.generate(prompts, max_new_tokens=12)
    assert together == [model.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(together)) > 1


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_ends_it_and_is_never_shown(model, length):
    whole = model.generate(["the model"], max_new_tokens=40)[0]
    stop = whole[9 : 9 + length]
    expected = whole[: whole.index(stop)]
    assert model.generate(["the model"], max_new_tokens=40, stop=["no such text", stop]) == [expected]
    assert "".join(pieces(model, "the model", max_new_tokens=40, stop=["no such text", stop])) == expected


def test_characters_of_several_tokens_are_shown_whole(model, monkeypatch):
    """Whatever the model says: here é and 北 come byte by byte."""
    ids = model.tokenizer.encode("é 北!").tolist()
    assert len(ids) > 5
    monkeypatch.setattr("cheaper.language_model.next_tokens", lambda *_: iter([[token] for token in ids]))
    assert pieces(model, "x") == ["é", " ", "北", "!"]


def test_pieces_of_words_whose_first_space_is_not_written(monkeypatch, model):
    """As in Llama 2's tokenizer: alone, a token would lose its space."""
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "▁the": 1, "▁model": 2}, unk_token="</s>"))
    engine.decoder = tokenizers.decoders.Metaspace()
    words = Tokenizer("words", 3, bos_id=None, eos_id=0, engine=engine)
    monkeypatch.setattr("cheaper.language_model.next_tokens", lambda *_: iter([[1], [2], [1], [2]]))
    monkeypatch.setattr(LanguageModel, "encode", lambda *_: [1])
    assert pieces(dataclasses.replace(model, tokenizer=words), "x") == ["the", " model", " the", " model"]


def test_the_command_streams_a_prompt_and_answers_a_chat(run, model, capsys):  # noqa: F811
    assert cli.main(["generate", str(run), "the model", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out == model.generate(["the model"], max_new_tokens=8)[0] + "\n"
    assert cli.main(["generate", str(run), "the model", "--chat", "--max_new_tokens", "8"]) == 0
    answer = model.generate([[{"role": "user", "content": "the model"}]], max_new_tokens=8)[0]
    assert capsys.readouterr().out == answer + "\n"


def test_a_file_of_prompts(run, model, tmp_path, capsys):  # noqa: F811
    chat = [{"role": "user", "content": "which"}]
    rows = [{"prompt": "the model"}, {"messages": chat}, {"prompt": "each"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out.jsonl"
    arguments = ["generate", str(run), "--file", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "6"]
    assert cli.main([*arguments, "--output", str(output), "--batch_size", "2"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    expected = model.generate(["the model", chat, "each"], max_new_tokens=6)
    assert written == [{**row, "continuation": text} for row, text in zip(rows, expected, strict=True)]
    assert "is there already" in refused(capsys, *arguments, "--output", str(output))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    assert "line 2: expected JSON with prompt or messages" in refused(capsys, *arguments)
    assert "expected a prompt or --file" in refused(capsys, "generate", str(run))
    assert "top_p=0.0" in refused(capsys, "generate", str(run), "x", "--top_p", "0")
    assert "temperature=-1.0" in refused(capsys, *arguments, "--temperature", "-1")


def test_the_same_prompt_is_drawn_anew_in_every_batch(run, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("the model\n" * 4)
    arguments = ["generate", str(run), "--file", str(tmp_path / "prompts.txt"), "--temperature", "2"]
    assert cli.main([*arguments, "--batch_size", "2", "--output", str(tmp_path / "out.jsonl")]) == 0
    assert len({json.loads(line)["continuation"] for line in (tmp_path / "out.jsonl").read_text().splitlines()}) == 4


def test_a_line_of_json_may_hold_other_ends_of_lines(run, tmp_path, capsys):  # noqa: F811
    row = {"prompt": "the\u2028model\x85"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    arguments = ["generate", str(run), "--file", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text().removesuffix("\n"))["prompt"] == row["prompt"]


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("the model")
    arguments = ["generate", "no/such/model", "--file", str(tmp_path / "prompts.txt")]
    assert "--batch_size 0: expected 1 or more" in refused(capsys, *arguments, "--batch_size", "0")
    assert "there is no folder" in refused(capsys, *arguments, "--output", str(tmp_path / "none" / "out.jsonl"))


@pytest.mark.parametrize("settings", [{"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}])
def test_numbers_out_of_their_range(model, settings):
    with pytest.raises(UserError, match="expected 0 or more, above 0 and up to 1, 1 or more"):
        model.generate(["the model"], **settings)


def test_ctrl_c_stops_an_answer_and_forgets_the_question(run, model, monkeypatch, capsys):  # noqa: F811
    said = iter(["which word", "and next"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or interrupt(EOFError))
    answer, asked = LanguageModel.stream, []

    def interrupt(error):
        raise error

    def stream(self, messages, *settings):
        asked.append([message["content"] for message in messages])
        return interrupt(KeyboardInterrupt) if len(asked) == 1 else answer(self, messages, *settings)

    monkeypatch.setattr(LanguageModel, "stream", stream)
    assert cli.main(["chat", str(run), "--max_new_tokens", "5"]) == 0
    assert asked == [["which word"], ["and next"]]
    assert "The answer was stopped" in capsys.readouterr().err


def test_a_chat_remembers_what_was_said(run, model, monkeypatch, capsys):  # noqa: F811
    said = iter(["which word", "and next", "", "which word"])

    def typed(prompt: str) -> str:
        if (line := next(said, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert cli.main(["chat", str(run), "--max_new_tokens", "5"]) == 0
    first = [{"role": "user", "content": "which word"}]
    one = model.generate([first], max_new_tokens=5)[0]
    later = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "and next"}]
    two = model.generate([later], max_new_tokens=5)[0]
    assert capsys.readouterr().out == f"model: {one}\nmodel: {two}\nmodel: {one}\n\n"
