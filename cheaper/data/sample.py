"""A small corpus made of what every machine with Python has, and a tokenizer trained on it.

``code``: sources of Python's standard library. ``english``: Python's documentation topics and the docstrings of its
library. Both are © Python Software Foundation and contributors, PSF License 2.0; they are read from the running
interpreter and not shipped. ``math``: arithmetic with worked steps, generated here from a seed, see
``cheaper.data.arithmetic``; ``chats`` and ``long_chats`` are such questions, short and long, as conversations.
Beside each lies ``held_out_…``, what no training sees; the long chats of it are the benchmark ``sums``, too.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cheaper.data.arithmetic import Problem, problem

VOCAB_SIZE = 4096
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# Words with their leading space, single digits (so that arithmetic can be learned), punctuation, white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MAX_SOURCE_BYTES = 12_000_000
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
PROBLEMS = 20_000
SHORT, LONG = 3, 5  # numbers in a question
HELD_OUT = 200  # documents of each kind
SUMS = "cheaper/sums"  # as ``evaluation/tasks/sums.yaml`` names its data set


def write_sample(folder: Path, seed: int = 17) -> dict[str, int]:
    """Writes ``raw/<stream>.jsonl``, ``tokenizer/`` and ``benchmarks/`` under ``folder``.

    Returns:
        Documents per stream.
    """
    sources, rng = list(_sources()), random.Random(seed)
    english = [*topics.values(), *_docstrings(sources)]
    rng.shuffle(sources)
    rng.shuffle(english)
    held_out = [problem(rng, SHORT, held_out=True) for _ in range(HELD_OUT)]
    long_held_out = [problem(rng, LONG, held_out=True) for _ in range(HELD_OUT)]
    texts = {
        "code": sources[5 : len(sources) // 3],  # as much as english and math
        "english": english[HELD_OUT:],
        "math": [_as_text(problem(rng, SHORT)) for _ in range(PROBLEMS)],
        "held_out_code": sources[:5],
        "held_out_english": english[:HELD_OUT],
        "held_out_math": [_as_text(problem) for problem in held_out],
    }
    chats = {
        "chats": [problem(rng, SHORT) for _ in range(PROBLEMS)],
        "long_chats": [problem(rng, LONG) for _ in range(PROBLEMS)],
        "held_out_chats": held_out,
        "held_out_long_chats": long_held_out,
    }
    rows = {name: [{"text": text} for text in documents] for name, documents in texts.items()}
    rows |= {name: [_as_chat(problem) for problem in problems] for name, problems in chats.items()}
    for name, documents in rows.items():
        _write_rows(folder / "raw" / f"{name}.jsonl", documents)
    questions = [{"question": problem.question, "answer": str(problem.answer)} for problem in long_held_out]
    _write_rows(folder / "benchmarks" / SUMS / "test.jsonl", questions)
    # A part of each corpus is enough to learn its words from.
    learned_from = (text for name in ("code", "english", "math") for text in texts[name][:4000])
    _train_tokenizer(learned_from, folder / "tokenizer")
    return {name: len(documents) for name, documents in rows.items()}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _as_text(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer: {problem.worked}\n"


def _as_chat(problem: Problem) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.worked},
        ],
        "answer": problem.answer,
    }


def _sources() -> Iterator[str]:
    total = 0
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(library).parts) or total > MAX_SOURCE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        total += len(text)
        if text.strip():
            yield text


def _docstrings(sources: Iterable[str]) -> Iterator[str]:
    """The prose in the sources: docstrings of at least 200 characters."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in sources:
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, documented) and len(text := ast.get_docstring(node) or "") >= 200:
                yield text


def _train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Trains a byte-level BPE and saves it in the layout that ``transformers`` reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
