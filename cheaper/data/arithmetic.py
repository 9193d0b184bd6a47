"""Questions of arithmetic with worked steps: something that a model of a few million parameters can learn in minutes.

Additions and subtractions of numbers below 100 inside a short story, worked digit by digit. A tenth of the pairs of
numbers is held out: they are in no training text, so who answers them has learnt to compute.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = ["Ana", "Ben", "Chi", "Dev", "Eva", "Finn", "Gus", "Hana"]
THINGS = ["apples", "books", "coins", "pens", "cups", "keys"]


@dataclass(frozen=True)
class Problem:
    """A question, its worked steps that end with the answer, and the answer."""

    question: str
    worked: str
    answer: int


def problem(rng: random.Random, held_out: bool = False) -> Problem:
    """A question of one step."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = _pair(rng, held_out)
        question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
        return Problem(question, f"{_add(a, b)} The answer is {a + b}.", a + b)
    b, a = sorted(_pair(rng, held_out))
    question = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
    return Problem(question, f"{_subtract(a, b)} The answer is {a - b}.", a - b)


def long_problem(rng: random.Random, held_out: bool = False) -> Problem:
    """A question of two steps: numbers are added, then one is taken away."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = _pair(rng, held_out)
    c = rng.randint(1, a + b)
    question = f"{name} has {a} {thing}, gets {b} more and then gives away {c}. How many {thing} are left?"
    worked = f"First {a} + {b}. {_add(a, b)} Then {a + b} - {c}. {_subtract(a + b, c)} The answer is {a + b - c}."
    return Problem(question, worked, a + b - c)


def is_right(text: str, answer: int) -> bool:
    """Whether ``text`` says that the answer is ``answer``."""
    said = re.search(r"The answer is (\d+)", text)
    return bool(said) and int(said[1]) == answer


def _pair(rng: random.Random, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        if (random.Random(100 * min(a, b) + max(a, b)).random() < 0.1) == held_out:
            return a, b


def _add(a: int, b: int) -> str:
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = " + 1" if ones > 9 else ""
    return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10}{carry} = {tens + bool(carry)}."


def _subtract(a: int, b: int) -> str:
    ones, tens, borrow = a % 10, a // 10, ""
    if ones < b % 10:
        ones, borrow = ones + 10, " - 1"
    rest = tens - bool(borrow) - b // 10
    return f"Ones: {ones} - {b % 10} = {ones - b % 10}. Tens: {tens}{borrow} - {b // 10} = {rest}."
