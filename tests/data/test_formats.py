"""Each format reads a row shaped like the published ones."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cheaper.data.formats import FORMATS, UnusableRow, get_format
from cheaper.data.questions import PUBLISHED, Questions
from cheaper.errors import UserError


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


BE_BRIEF = {"role": "system", "content": "detailed thinking off"}
CHATS = {
    "messages": (
        {"id": "oasst1_1", "messages": turns("hi", "hello", "1+1?", "2"), "source": "ai2-adapt-dev/oasst1_converted"},
        turns("hi", "hello", "1+1?", "2"),
    ),
    "prompt_response": ({"prompt": "1+1?", "response": "2"}, turns("1+1?", "2")),
    "open_math_reasoning": (
        {
            "expected_answer": "2",
            "problem_type": "has_answer_extracted",
            "problem_source": "aops_c4_high_school_math",
            "generation_model": "DeepSeek-R1",
            "pass_rate_72b_tir": "0.96875",
            "problem": "What is 1+1?",
            "generated_solution": "<think>\n1+1\n</think>\n\\boxed{2}",
            "inference_mode": "cot",
        },
        turns("What is 1+1?", "<think>\n1+1\n</think>\n\\boxed{2}"),
    ),
    "open_science_reasoning": (
        {"expected_answer": "A", "input": "Which? A: x B: y", "output": "<think>\nx\n</think>\n\\boxed{A}"},
        turns("Which? A: x B: y", "<think>\nx\n</think>\n\\boxed{A}"),
    ),
    "nemotron_chat": (
        {
            "input": turns("1+1?"),
            "output": "2",
            "category": "math",
            "reasoning": "off",
            "system_prompt": "detailed thinking off",
        },
        [BE_BRIEF, *turns("1+1?", "2")],
    ),
}


TEXTS = {
    "gsm8k": ({"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, "1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2"),
    "arc": (
        {
            "id": "Mercury_SC_415702",
            "question": "Which is warm?",
            "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Which is warm?",
        "fire",
    ),
    "openbookqa": (
        {
            "id": "7-980",
            "question_stem": "The sun is",
            "choices": {"text": ["a star", "a moon"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "The sun is",
        "a star",
    ),
    "piqa": ({"goal": "To boil", "sol1": "heat", "sol2": "cool", "label": 0}, "To boil", "heat"),
    "trivia_qa": (
        {"question": "Who?", "question_id": "tc_1", "answer": {"value": "He", "aliases": ["Him"]}},
        "Who?",
        "He",
    ),
    "natural_questions": ({"question": "who is it", "answer": ["she", "her"]}, "who is it?", "she"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_benchmarks_as_question_and_answer(name):
    row, question, answer = TEXTS[name]
    assert get_format(name, "text")(row) == f"Question: {question}\nAnswer: {answer}"
    assert not get_format(name, "text").is_chat


def test_boolq_puts_its_passage_first():
    row = {"question": "is it wet", "answer": True, "passage": "Water is wet."}
    assert get_format("boolq", "text")(row) == "Water is wet.\n\nQuestion: is it wet?\nAnswer: yes"
    assert get_format("boolq", "text")({**row, "answer": False}).endswith("Answer: no")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("arc", {**TEXTS["arc"][0], "answerKey": "C"}, "answerKey names none of the choices"),
        ("arc", {**TEXTS["arc"][0], "choices": None}, "answerKey names none of the choices"),
        ("piqa", {**TEXTS["piqa"][0], "label": -1}, "column label is neither 0 nor 1"),  # its test split
        ("boolq", {"question": "q", "answer": "yes", "passage": "p"}, "column answer holds neither true nor false"),
        ("trivia_qa", {"question": "Who?", "answer": None}, "the answer is NoneType, expected text"),
        ("natural_questions", {"question": "who", "answer": []}, "the answer is NoneType, expected text"),
        ("gsm8k", {"question": 1, "answer": "2"}, "column question holds int, expected text"),
    ],
)
def test_benchmark_rows_without_an_answer_cannot_be_used(name, row, reason):
    with pytest.raises(UnusableRow, match=reason):
        get_format(name, "text")(row)


@pytest.mark.parametrize("name", CHATS)
def test_chats(name):
    row, chat = CHATS[name]
    assert get_format(name, "text")(row) == chat
    assert get_format(name, "text").is_chat


def test_nemotron_without_a_system_prompt_and_with_text_for_input():
    read = get_format("nemotron_chat", "text")
    for row in ({"input": "1+1?", "output": "2"}, {"input": turns("1+1?"), "output": "2", "system_prompt": ""}):
        assert read(row) == turns("1+1?", "2")
    assert get_format("nemotron_post_training", "text")({"input": "1+1?", "output": "2"}) == "1+1?\n\n2"


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("text", {"content": "def f(): pass", "id": 1}, "def f(): pass"),
        (
            "natural_reasoning",
            {"question": "why", "reference_answer": "", "responses": [{"response_model": "x", "response": "so"}]},
            "why\n\nso",
        ),
        ("nemotron_post_training", {**CHATS["nemotron_chat"][0]}, "1+1?\n\n2"),
    ],
)
def test_texts(name, row, text):
    assert get_format(name, "content")(row) == text
    assert not get_format(name, "content").is_chat


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("text", {"text": "x"}, "no column content, only text"),
        ("messages", {"text": "x", "id": 1}, "column messages holds no list; there are text, id"),
        ("messages", {"messages": "x"}, "column messages holds no list"),
        ("prompt_response", {"prompt": "x", "response": None}, "column response holds NoneType, expected text"),
        ("open_math_reasoning", {"problem": "x", "generated_solution": None}, "generated_solution holds NoneType"),
        ("open_science_reasoning", {"input": "x"}, "no column output, only input"),
        ("open_code_reasoning", {"question": "x", "solution": "y"}, "no column r1_generation"),
        ("nemotron_chat", {"input": 1, "output": "x"}, "column input holds no messages"),
        ("nemotron_chat", {"input": ["x"], "output": "x"}, "column input holds no messages"),
    ],
)
def test_unusable_rows(name, row, reason):
    with pytest.raises(UnusableRow, match=reason):
        get_format(name, "content")(row)


def test_an_unknown_format_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"^format mesages: no such format; did you mean messages\?$"):
        get_format("mesages", "text")
    assert "text" not in FORMATS


CODEFORCES = {
    "id": "1/A",
    "description": "Add.",
    "input_format": "Two numbers.",
    "output_format": "One.",
    "examples": [{"input": "1 1", "output": "2"}, {"input": "1 2", "output": "3"}],
    "note": "Easy.",
    "tests": "x" * 1000,
}
BARE = {"id": "1/B", "description": "Stop.", "input_format": None, "output_format": "", "examples": [], "note": None}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def questions(tmp_path) -> Questions:
    """The four datasets as local files of several kinds."""
    tables = {
        "taco": [{"question": "t0", "solutions": "[]"}, {"question": "t1", "solutions": "[]"}],
        "apps": [{"problem_id": 0, "question": "a0"}],
        "code_contests": [{"name": "x", "description": "c0"}, {"name": "y", "description": ""}],
        "codeforces": [CODEFORCES, {**BARE, "tests": "y"}],
    }
    for name, rows in tables.items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            rows = [{**row, "split": split} for row in rows]
            if name in ("code_contests", "codeforces"):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / f"{split}.parquet")
            else:
                (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "taco" / "test.jsonl").write_text('{"question": "of the test split"}\n')
    return Questions(
        {
            "taco": str(tmp_path / "taco"),
            "apps": str(tmp_path / "apps" / "{split}.jsonl"),
            "code_contests": str(tmp_path / "code_contests"),
            "open-r1/codeforces": str(tmp_path / "codeforces" / "{split}.parquet"),
        }
    )


def code_row(dataset: str, split: str, index: str) -> dict:
    """As in OpenCodeReasoning-2; the index is text there."""
    return {
        "id": "0b9e",
        "question_id": "6d5c",
        "question": "-",
        "r1_generation": "<think>\n</think>\n```python\n```",
        "qwq_critique": "",
        "solution": "",
        "judgement": "right",
        "pass_rate": "1.0",
        "source": "codeforces",
        "license": "mit",
        "dataset": dataset,
        "split": split,
        "difficulty": "EASY",
        "index": index,
    }


@pytest.mark.parametrize(
    ("place", "question"),
    [
        (("taco", "train", "1"), "t1"),
        (("taco", "test", "0"), "of the test split"),
        (("apps", "train", "0"), "a0"),
        (("code_contests", "train", "0"), "c0"),
        (
            ("open-r1/codeforces", "train", "0"),
            "Add.\n\nInput\n\nTwo numbers.\n\nOutput\n\nOne.\n\nExamples\n\n"
            "Input\n\n1 1\n\nOutput\n\n2\n\nInput\n\n1 2\n\nOutput\n\n3\n\nNote\n\nEasy.",
        ),
        (("open-r1/codeforces", "train", "1"), "Stop."),
    ],
)
def test_code_questions_are_looked_up(questions, place, question):
    read = get_format("open_code_reasoning", "text", questions)
    assert read.is_chat
    assert read(code_row(*place)) == turns(question, "<think>\n</think>\n```python\n```")


def test_several_datasets_and_splits_at_once(questions):
    places = [("taco", "train", 0), ("taco", "test", 0), ("apps", "train", 0), ("taco", "train", 1)]
    assert [questions.find(*place) for place in places] == ["t0", "of the test split", "a0", "t1"]


def test_a_question_that_is_there_is_taken(questions):
    row = {**code_row("nowhere", "train", "0"), "question": "1+1?"}
    assert get_format("open_code_reasoning", "text", questions)(row)[0]["content"] == "1+1?"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (("leetcode", "train", "0"), "dataset 'leetcode', expected one of taco, apps, code_contests"),
        ((["taco"], "train", "0"), "dataset .'taco'., expected one of"),
        (("taco", "../train", "0"), "split '../train' of taco, which is no name of a split"),
        (("taco", None, "0"), "split None of taco, which is no name"),
        (("taco", "train", "2"), "row '2' of taco, split train, which has 2 rows"),
        (("taco", "train", "-1"), "row '-1' of taco"),
        (("taco", "train", None), "row None of taco"),
        (("code_contests", "train", "1"), "row 1 of code_contests, split train, holds no question"),
    ],
)
def test_questions_that_are_not_found(questions, place, reason):
    with pytest.raises(UnusableRow, match=reason):
        get_format("open_code_reasoning", "text", questions)(code_row(*place))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}", r"holds no train.jsonl and no train.parquet$"),
        ("{}/{{split}}.jsonl", "train.jsonl, split train, cannot be read"),
        ("{}/bad.jsonl", "cannot be read"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as error:
        Questions({"taco": source.format(tmp_path)}).find("taco", "train", 0)
    assert str(error.value).startswith("questions of taco: ")
    assert "\n" not in str(error.value)


def test_a_table_is_opened_once_and_without_its_tests(questions):
    questions.find("open-r1/codeforces", "train", 0)
    [table] = questions._opened.values()
    assert set(table.column_names) == {"description", "input_format", "output_format", "examples", "note"}
    questions.find("open-r1/codeforces", "train", 1)
    assert list(questions._opened.values()) == [table]


def test_other_datasets_stay_the_published_ones():
    assert Questions({"taco": "x"}).tables == {**PUBLISHED, "taco": "x"}
    assert Questions().tables == PUBLISHED
