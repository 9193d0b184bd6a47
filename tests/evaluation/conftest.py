"""A tiny model as ``transformers`` has it, and made-up sets with the columns of the public ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from cheaper.config import ModelConfig
from cheaper.data.tokenize import load_tokenizer
from cheaper.evaluation.benchmarks import find_benchmarks, index
from cheaper.interchange import export_to_hf
from cheaper.language_model import LanguageModel
from cheaper.models.decoder import Decoder
from tests.conftest import WORDS, some_texts, train_tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random decoder, exported."""
    folder = tmp_path_factory.mktemp("evaluation")
    words = train_tokenizer(folder / "tokenizer", some_texts(50, seed=0))
    config = json.loads((words / "tokenizer_config.json").read_text())
    (words / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))
    torch.manual_seed(0)
    shape = ModelConfig(
        name="tiny",
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_size=32,
        intermediate_size=64,
        head_dim=8,
        vocab_size=320,
        max_position_embeddings=1024,
        initializer_std=0.3,  # far from ties
    )
    model = LanguageModel(Decoder(shape), load_tokenizer(str(words)), str(words), "tokenizer", folder / "none")
    export_to_hf(model, folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """200 questions and more of ARC, HellaSwag, MMLU, GSM8K and others."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for split in ("train", "validation", "test"):
        write(folder / "allenai/ai2_arc/ARC-Easy" / split, [arc_row(rng) for _ in range(200)])
    for split in ("train", "validation"):
        write(folder / "Rowan/hellaswag" / split, [hellaswag_row(rng) for _ in range(200)])
    for subject in mmlu_subjects():
        write(folder / "cais/mmlu" / subject / "dev", [mmlu_row(rng) for _ in range(5)])
        write(folder / "cais/mmlu" / subject / "test", [mmlu_row(rng) for _ in range(4)])
    for split in ("train", "test"):
        write(folder / "openai/gsm8k/main" / split, [gsm8k_row(rng) for _ in range(200)])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(rng: random.Random, longest: int = 12) -> str:
    return " ".join(rng.choices([*WORDS, "7", "x", "ß"], k=rng.randint(1, longest)))


def arc_row(rng: random.Random) -> dict:
    choices = {"text": [sentence(rng, 5) for _ in range(4)], "label": list("ABCD")}
    return {"id": str(rng.random()), "question": sentence(rng), "choices": choices, "answerKey": rng.choice("ABCD")}


def hellaswag_row(rng: random.Random) -> dict:
    return {
        "ind": 0,
        "activity_label": sentence(rng, 2),
        "ctx_a": sentence(rng),
        "ctx_b": sentence(rng, 3),
        "ctx": "",
        "endings": [sentence(rng) for _ in range(4)],
        "source_id": "",
        "split": "val",
        "split_type": "indomain",
        "label": str(rng.randrange(4)),
    }


def mmlu_row(rng: random.Random) -> dict:
    choices = [sentence(rng, 3) for _ in range(4)]
    return {"question": sentence(rng), "subject": "", "choices": choices, "answer": rng.randrange(4)}


def gsm8k_row(rng: random.Random) -> dict:
    a, b = rng.randrange(50), rng.randrange(50)
    return {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}


def mmlu_subjects() -> list[str]:
    (mmlu,) = find_benchmarks(["mmlu"])
    tasks = index(mmlu.folder).all_subtasks
    return [name.removeprefix("mmlu_") for name in tasks]
