"""How a raw row becomes one document: a function from the row to its text, or to its chat.

A chat is a list of messages with ``role`` and ``content``; a template decides its text, see ``cheaper.data.chat``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cheaper.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from cheaper.data.questions import Questions

Row = Mapping[str, Any]
Chat = list[dict[str, Any]]


class UnusableRow(ValueError):  # noqa: N818  the row is at fault, not the program
    """The row cannot become a document; the message says why."""


def column(row: Row, name: str) -> str:
    """The text in one column."""
    if name not in row:
        raise UnusableRow(f"no column {name}, only {', '.join(map(str, row))}")
    if not isinstance(row[name], str):
        raise UnusableRow(f"column {name} holds {type(row[name]).__name__}, expected text")
    return row[name]


def natural_reasoning(row: Row) -> str:
    """``facebook/natural_reasoning``: the question and its first response."""
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses or not isinstance(responses[0], Mapping):
        raise UnusableRow("column responses holds no response")
    return f"{column(row, 'question')}\n\n{column(responses[0], 'response')}"


def nemotron_post_training(row: Row) -> str:
    """``nvidia/Llama-Nemotron-Post-Training-Dataset``: the messages of ``input``, then ``output``."""
    return "\n\n".join([*(column(message, "content") for message in _input_messages(row)), column(row, "output")])


def nemotron_chat(row: Row) -> Chat:
    """The same as a chat, after ``system_prompt`` where there is one."""
    system = [{"role": "system", "content": row["system_prompt"]}] if row.get("system_prompt") else []
    return [*system, *_input_messages(row), {"role": "assistant", "content": column(row, "output")}]


def _input_messages(row: Row) -> Chat:
    messages = row.get("input")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UnusableRow("column input holds no messages")
    return messages


def messages(row: Row) -> Chat:
    """``allenai/tulu-3-sft-olmo-2-mixture-0225`` and its like: a chat in the column ``messages``."""
    if not isinstance(row.get("messages"), list):
        raise UnusableRow(f"column messages holds no list; there are {', '.join(map(str, row))}")
    return row["messages"]


def one_turn(row: Row, question: str, answer: str) -> Chat:
    """What one column asks and another answers."""
    return [
        {"role": "user", "content": column(row, question)},
        {"role": "assistant", "content": column(row, answer)},
    ]


def open_code_reasoning(row: Row, questions: Questions) -> Chat:
    """``nvidia/OpenCodeReasoning-2``: most questions are left out of it and found by three of its columns."""
    if row.get("question") == "-":
        row = {**row, "question": questions.find(row.get("dataset"), row.get("split"), row.get("index"))}
    return one_turn(row, "question", "r1_generation")


# ---- training sets of benchmarks, as a question and its answer


def _answered(question: str, answer: Any) -> str:
    if not isinstance(answer, str):
        raise UnusableRow(f"the answer is {type(answer).__name__}, expected text")
    return f"Question: {question}\nAnswer: {answer}"


def gsm8k(row: Row) -> str:
    """``openai/gsm8k``."""
    return _answered(column(row, "question"), column(row, "answer"))


def multiple_choice(row: Row, question: str) -> str:
    """``allenai/ai2_arc`` and ``allenai/openbookqa``: the choice that ``answerKey`` names."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or row.get("answerKey") not in choices.get("label", ()):
        raise UnusableRow("answerKey names none of the choices")
    return _answered(column(row, question), choices["text"][list(choices["label"]).index(row["answerKey"])])


def boolq(row: Row) -> str:
    """``google/boolq``: a passage, and a question that is answered with yes or no."""
    if not isinstance(row.get("answer"), bool):
        raise UnusableRow("column answer holds neither true nor false")
    question = f"{column(row, 'question')}?"
    return f"{column(row, 'passage')}\n\n{_answered(question, 'yes' if row['answer'] else 'no')}"


def piqa(row: Row) -> str:
    """``ybisk/piqa``: a goal and the better of two ways to it."""
    if row.get("label") not in (0, 1):
        raise UnusableRow("column label is neither 0 nor 1")
    return _answered(column(row, "goal"), column(row, ("sol1", "sol2")[row["label"]]))


def trivia_qa(row: Row) -> str:
    """``mandarjoshi/trivia_qa``."""
    return _answered(column(row, "question"), (row.get("answer") or {}).get("value"))


def natural_questions(row: Row) -> str:
    """``google-research-datasets/nq_open``: the first of the answers."""
    return _answered(f"{column(row, 'question')}?", next(iter(row.get("answer") or ()), None))


@dataclass(frozen=True)
class Format:
    """How rows of one kind are read: ``format(row)`` is the document's text, or its chat where ``is_chat``."""

    read: Callable[..., Any]
    is_chat: bool = False

    def __call__(self, row: Row) -> Any:
        """The document; raises ``UnusableRow``."""
        return self.read(row)


FORMATS: dict[str, Format] = {
    "natural_reasoning": Format(natural_reasoning),
    "nemotron_post_training": Format(nemotron_post_training),
    "gsm8k": Format(gsm8k),
    "arc": Format(functools.partial(multiple_choice, question="question")),
    "openbookqa": Format(functools.partial(multiple_choice, question="question_stem")),
    "boolq": Format(boolq),
    "piqa": Format(piqa),
    "trivia_qa": Format(trivia_qa),
    "natural_questions": Format(natural_questions),
    "messages": Format(messages, is_chat=True),
    "prompt_response": Format(functools.partial(one_turn, question="prompt", answer="response"), is_chat=True),
    "nemotron_chat": Format(nemotron_chat, is_chat=True),
    # nvidia/OpenMathReasoning, nvidia/OpenScienceReasoning-2, nvidia/OpenCodeReasoning-2
    "open_math_reasoning": Format(
        functools.partial(one_turn, question="problem", answer="generated_solution"), is_chat=True
    ),
    "open_science_reasoning": Format(functools.partial(one_turn, question="input", answer="output"), is_chat=True),
    "open_code_reasoning": Format(open_code_reasoning, is_chat=True),
}


def get_format(name: str, field: str, questions: Questions | None = None) -> Format:
    """The format called ``name``; ``text`` reads the column ``field``.

    Args:
        name: ``text`` or one of ``FORMATS``.
        field: The column that ``text`` reads.
        questions: Where ``open_code_reasoning`` finds its questions, the published datasets by default.

    Raises:
        UserError: There is no such format.
    """
    if name == "text":
        return Format(functools.partial(column, name=field))
    if name not in FORMATS:
        raise UserError(f"format {name}: no such format{did_you_mean(name, ['text', *FORMATS])}")
    if name == "open_code_reasoning":
        from cheaper.data.questions import Questions  # which needs UnusableRow from here

        return Format(functools.partial(open_code_reasoning, questions=questions or Questions()), is_chat=True)
    return FORMATS[name]
