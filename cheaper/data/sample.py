"""A small corpus made of what every machine with Python has, and a tokenizer trained on it.

``code``: the sources of Python's standard library. ``english``: Python's documentation topics and the docstrings of its
library. Both are © Python Software Foundation and contributors, PSF License 2.0; they are read from the running
interpreter and not shipped. ``math``: arithmetic with worked steps, generated here from a seed.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
MATH_PROBLEMS = 40_000


def write_sample(folder: Path, seed: int = 17) -> dict[str, int]:
    """Writes ``raw/<stream>.jsonl`` and ``tokenizer/`` under ``folder``.

    Returns:
        Documents per stream.
    """
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    sources = list(_sources())
    corpora = {
        "code": sources,
        "english": [*topics.values(), *_docstrings(sources)],
        "math": [_problem(random.Random(f"{seed}-{i}")) for i in range(MATH_PROBLEMS)],
    }
    for name, texts in corpora.items():
        with open(folder / "raw" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    # A part of each corpus is enough to learn its words from.
    _train_tokenizer((text for texts in corpora.values() for text in texts[:4000]), folder / "tokenizer")
    return {name: len(texts) for name, texts in corpora.items()}


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


def _problem(rng: random.Random) -> str:
    """One question, its worked steps and its answer."""
    kind = rng.choice(["sum", "difference", "product", "two_steps"])
    name, thing = (
        rng.choice(["Ana", "Ben", "Chi", "Dev", "Eva", "Finn"]),
        rng.choice(["apples", "books", "coins", "pens"]),
    )
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    if kind == "sum":
        question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?"
        steps, answer = f"{name} has {a} + {b} = {a + b} {thing}.", a + b
    elif kind == "difference":
        a, b = max(a, b), min(a, b)
        question = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
        steps, answer = f"There are {a} - {b} = {a - b} {thing} left.", a - b
    elif kind == "product":
        question = f"{name} buys {c} boxes with {b} {thing} each. How many {thing} is that?"
        tens, ones = b // 10 * 10, b % 10
        steps = f"{c} * {tens} = {c * tens} and {c} * {ones} = {c * ones}. Together {c * tens} + {c * ones} = {c * b}."
        answer = c * b
    else:
        question = f"{name} has {a} {thing}, gets {b} more and then gives away {c}. How many {thing} are left?"
        steps = f"First {a} + {b} = {a + b}. Then {a + b} - {c} = {a + b - c}."
        answer = a + b - c
    return f"Question: {question}\nAnswer: {steps} The answer is {answer}.\n"


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
