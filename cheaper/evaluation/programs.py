"""Benchmarks of programming: what their tasks ask, and whether the tests pass. The programs run in a sandbox."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import datasets

from cheaper.evaluation.code_execution import execute, in_parallel, passes

Passed = list[list[bool]]  # of each document, of each sample

# What solutions of contests take for granted.
IMPORTS = """import bisect, collections, functools, heapq, itertools, math, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *  # math's pow has no modulus
sys.setrecursionlimit(50_000)
"""
CALL = """
import json as _json, sys as _sys
print("\\n{mark}" + _json.dumps(Solution().{name}(*map(_json.loads, filter(None, _sys.stdin.read().split("\\n"))))))
"""
MARK = "value: "  # what a solution returns is told from what it prints
SECONDS = 6.0  # of each test of a contest


def process_results(doc: dict[str, Any], results: list[list[bool]]) -> dict[str, float]:
    """The share of the samples that passed."""
    return {"pass_at_1": sum(results[0]) / len(results[0])}


def humaneval(resps: Sequence[list[str]], docs: Sequence[dict[str, Any]]) -> Passed:
    """Runs what continues each function's head, and its tests."""
    ends = [f"{doc['test']}\ncheck({doc['entry_point']})" for doc in docs]
    programs = [
        [f"{doc['prompt']}{text}\n{end}" for text in texts] for doc, end, texts in zip(docs, ends, resps, strict=True)
    ]
    return _grouped(in_parallel(passes, _flat(programs)), resps)


def mbpp(resps: Sequence[list[str]], docs: Sequence[dict[str, Any]]) -> Passed:
    """Runs each function and its assertions."""
    ends = ["\n".join([doc.get("test_setup_code") or "", *doc["test_list"]]) for doc in docs]
    programs = [[f"{text}\n{end}" for text in texts] for end, texts in zip(ends, resps, strict=True)]
    return _grouped(in_parallel(passes, _flat(programs)), resps)


def mbpp_shots(split: datasets.Dataset) -> list[dict[str, Any]]:
    """The tasks that are shown before every other."""
    return [doc for doc in split if doc["task_id"] in (2, 3, 4)]


def livecodebench(resps: Sequence[list[str]], docs: Sequence[dict[str, Any]]) -> Passed:
    """Runs the last block of code of each answer on its problem's public and private tests."""
    asked = [[(doc, code_block(text)) for text in texts] for doc, texts in zip(docs, resps, strict=True)]
    return _grouped(in_parallel(lambda one: solves(*one), _flat(asked)), resps)


def livecodebench_question(doc: dict[str, Any]) -> str:
    """What a model is asked."""
    if doc["starter_code"]:
        how = f"Complete this code:\n```python\n{doc['starter_code']}\n```"
    else:
        how = "Read from standard input and write to standard output."
    return f"{doc['question_content']}\n\n{how}"


def code_block(text: str) -> str:
    """The last fenced block of ``text``; empty where there is none."""
    blocks = re.findall(r"```(?:[Pp]y(?:thon)?3?)?[ \t]*\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else ""


def solves(doc: dict[str, Any], code: str) -> bool:
    """Whether a program passes all tests of a problem of LiveCodeBench.

    Args:
        doc: With the public columns ``public_test_cases``, ``private_test_cases``, ``starter_code`` and ``metadata``.
        code: Python.
    """
    if not code:
        return False
    tests = test_cases(doc["public_test_cases"]) + test_cases(doc["private_test_cases"])
    by_call = tests[0]["testtype"] == "functional"
    end = CALL.format(mark=MARK, name=json.loads(doc["metadata"])["func_name"]) if by_call else ""
    runs = execute(IMPORTS + code + end, [test["input"] for test in tests], SECONDS)
    same = _same_value if by_call else _same_text
    return len(runs) == len(tests) and all(
        run.status == 0 and same(run.output, test["output"]) for run, test in zip(runs, tests, strict=True)
    )


def test_cases(written: str) -> list[dict[str, str]]:
    """Tests from JSON, or from JSON that is pickled, compressed and in base64, as the private ones are published."""
    if not written.lstrip().startswith("["):
        written = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(written)))).load()
    return json.loads(written)


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"a test names {module}.{name}; expected text alone")


def _same_value(output: str, expected: str) -> bool:
    """Whether the value behind the mark is the one expected, as JSON."""
    value = output.rpartition(f"\n{MARK}")[2].partition("\n")[0]
    try:
        return json.loads(value) == json.loads(expected)
    except (ValueError, RecursionError):
        return False


def _same_text(output: str, expected: str) -> bool:
    """Whether all lines have the same words; white space around them, and how a number is written, do not count."""
    ours, theirs = ([line.split() for line in text.strip().splitlines()] for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_words, ours, theirs))


def _same_words(ours: list[str], theirs: list[str]) -> bool:
    if ours == theirs:
        return True
    try:
        return [Decimal(word) for word in ours] == [Decimal(word) for word in theirs]
    except InvalidOperation:
        return False


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [one for group in groups for one in group]


def _grouped(flat: Sequence[bool], like: Sequence[Sequence[Any]]) -> Passed:
    rest = iter(flat)
    return [[next(rest) for _ in group] for group in like]
