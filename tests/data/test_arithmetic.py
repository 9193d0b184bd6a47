"""The quickstart's questions: right, held out whatever their order, and told from wrong answers."""

import json
import random
import re

import pytest

from cheaper.data.arithmetic import is_right, problem
from cheaper.data.sample import HELD_OUT, write_sample
from cheaper.evaluation.benchmarks import find_benchmarks, load_tasks


@pytest.mark.parametrize("numbers", [2, 3, 5])
def test_every_step_is_right_and_the_last_is_the_answer(numbers):
    rng = random.Random(0)
    for _ in range(200):
        made = problem(rng, numbers)
        terms = [int(term) for term in re.findall(r"\d", made.question)]
        assert len(terms) == numbers
        steps = re.findall(r"(\d+) \+ (\d) = (\d+)\.", made.worked)
        assert [int(b) for _, b, _ in steps] == terms[1:]
        assert all(int(a) + int(b) == int(c) for a, b, c in steps)
        assert int(steps[-1][2]) == sum(terms) == made.answer
        assert is_right(made.worked, made.answer)
        assert not is_right(made.worked, made.answer + 1)
    assert not is_right("no idea", 3)


def test_no_order_of_a_held_out_question_is_trained_on(tmp_path):
    counts = write_sample(tmp_path)

    def questions(name: str) -> set[tuple[str, ...]]:
        lines = (tmp_path / "raw" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        texts = [row["messages"][0]["content"] if "messages" in row else row["text"].split("\n")[0] for row in rows]
        assert len(texts) == counts[name]
        return {tuple(sorted(re.findall(r"\d", text))) for text in texts}

    trained = questions("math") | questions("chats") | questions("long_chats")
    for name in ("held_out_math", "held_out_chats", "held_out_long_chats"):
        held_out = questions(name)
        assert counts[name] == HELD_OUT
        assert len(held_out) > 5
        assert not held_out & trained


def test_the_long_chats_are_a_benchmark(tmp_path):
    write_sample(tmp_path)
    [task] = load_tasks(find_benchmarks(["sums"])[0], tmp_path / "benchmarks", seed=0)["tasks"].values()
    documents = list(task.test_docs())
    chats = [json.loads(line) for line in (tmp_path / "raw" / "held_out_long_chats.jsonl").read_text().splitlines()]
    assert [task.doc_to_text(document) for document in documents] == [chat["messages"][0]["content"] for chat in chats]
    for document, chat in zip(documents, chats, strict=True):
        right, wrong = chat["messages"][1]["content"], f"The answer is {chat['answer'] + 1}."
        assert task.process_results(document, [[right, wrong]]) == {"math_verify": 0.5}
