"""Questions of arithmetic with worked steps: something that a model of a few million parameters can learn in minutes.

Sums of several digits, worked from left to right. A tenth of the questions is held out, whatever the order of their
numbers: they are in no training text, so who answers them has learnt to compute the steps.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question, its worked steps that end with the answer, and the answer."""

    question: str
    worked: str
    answer: int


def problem(rng: random.Random, numbers: int, held_out: bool = False) -> Problem:
    """The sum of so many numbers from 1 to 9."""
    while True:
        terms = [rng.randint(1, 9) for _ in range(numbers)]
        if _is_held_out(terms) == held_out:
            break
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}.")
        total += term
    question = f"What is {' + '.join(map(str, terms))}?"
    return Problem(question, f"{' '.join(steps)} The answer is {total}.", total)


def is_right(text: str, answer: int) -> bool:
    """Whether ``text`` says that the answer is ``answer``."""
    said = re.search(r"The answer is (\d+)", text)
    return bool(said) and int(said[1]) == answer


def _is_held_out(terms: list[int]) -> bool:
    return random.Random("+".join(map(str, sorted(terms)))).random() < 0.1
