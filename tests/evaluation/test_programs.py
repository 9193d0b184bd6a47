"""Programs against the tests of HumanEval's, MBPP's and LiveCodeBench's rows."""

import base64
import json
import pickle
import zlib

import pytest

from cheaper.errors import UserError
from cheaper.evaluation.code_execution import check_sandbox
from cheaper.evaluation.programs import (
    code_block,
    humaneval,
    livecodebench,
    livecodebench_question,
    mbpp,
    process_results,
)
from cheaper.evaluation.programs import (
    test_cases as read_tests,
)

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that doubles.",
    "code": "def double(x): return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(2) == 4"],
    "test_setup_code": "",
}


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def problem(tests, private, starter_code="", metadata=None):
    return {
        "question_content": "Double.",
        "starter_code": starter_code,
        "public_test_cases": json.dumps(tests),
        "private_test_cases": private,
        "metadata": json.dumps(metadata or {}),
    }


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_humaneval():
    assert humaneval([["    return 2 * x", "    return x"]], [HUMANEVAL]) == [[True, False]]


def test_mbpp():
    right, wrong = "def double(x): return x + x", "def double(x): return x + 1"
    assert mbpp([[right], [wrong]], [MBPP, MBPP]) == [[True], [False]]


def test_problems_of_standard_input():
    tests = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    private = [{"input": "2 3", "output": "4.0 6\n", "testtype": "stdin"}]
    right = "So:\n```python\nprint(*(2 * int(x) for x in input().split()))\n```"
    one_right = "```\nprint(2)\n```"
    doc = problem(tests, packed(private))
    assert livecodebench([[right, one_right, "no code"]], [doc]) == [[True, False, False]]
    assert "standard input" in livecodebench_question(doc)


def test_problems_of_a_function():
    tests = [{"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}]
    starter = "class Solution:\n    def scale(self, xs: List[int], by: int) -> List[int]:\n"
    right = f"```python\n{starter}        return [by * x for x in xs]\n```"
    wrong = f"```python\n{starter}        return xs\n```"
    doc = problem(tests, json.dumps(tests), starter, {"func_name": "scale"})
    assert livecodebench([[right], [wrong]], [doc, doc]) == [[True], [False]]
    assert starter in livecodebench_question(doc)


@pytest.mark.parametrize(
    ("body", "right"),
    [
        ("print('dbg', end=' ')\n        return pow(x, 2, 5)", True),
        ("print('value: 1')\n        return 2", False),
        ("print('dbg')\n        exit()", False),
        ("sys.stdout.write('\\nvalue: ' + '[' * 100_000)\n        exit()", False),
    ],
)
def test_what_a_function_prints_is_not_its_value(body, right):
    tests = [{"input": "4", "output": "1", "testtype": "functional"}]
    answer = f"```python\nclass Solution:\n    def rest(self, x):\n        {body}\n```"
    assert livecodebench([[answer]], [problem(tests, json.dumps(tests), "class", {"func_name": "rest"})]) == [[right]]


@pytest.mark.parametrize(
    ("printed", "expected", "right"),
    [
        ("1000000000000000001", "1000000000000000000", False),
        ("0.50 1e3", "0.5 1000", True),
        ("Yes 1.0", "Yes 1", False),
        ("sNaN", "1", False),
    ],
)
def test_numbers_are_compared_to_the_last_digit(printed, expected, right):
    tests = [{"input": "", "output": expected, "testtype": "stdin"}]
    assert livecodebench([[f"```\nprint({printed!r})\n```"]], [problem(tests, "[]")]) == [[right]]


def test_private_tests_cannot_run_code():
    class Harmful:
        def __reduce__(self):
            return eval, ("1",)

    with pytest.raises(pickle.UnpicklingError, match=r"builtins.eval; expected text alone"):
        read_tests(base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode())


def test_the_last_block_counts():
    assert code_block("```python\n1\n```\nor\n```py\n2\n```") == "2\n"
    assert code_block("```text\n1\n```") == ""


def test_the_score_is_a_mean_over_samples():
    assert process_results({}, [[True, False, False, True]]) == {"pass_at_1": 0.5}
