"""Evaluation: our wrapper of a model against the harness's own one of ``transformers``, on the same weights.

A random model in fp32 of mobilellm_140m's shape with fewer layers and words, exported for transformers, gets requests
as long as those of ARC, MMLU (5 shots) and GSM8K (8 shots). Before timing both give the same log-likelihoods and texts.
Run from the repository: ``python benchmarks/evaluation.py [--rounds 5] [--questions 48]``. It needs ``accelerate``.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from pathlib import Path

import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from side_by_side import alternate, save, show, speed_ratio, spread
from tokenizers import decoders, models, pre_tokenizers, trainers

from cheaper.config import ModelConfig
from cheaper.data.tokenize import load_tokenizer
from cheaper.evaluation.harness import CheaperLM
from cheaper.interchange import export_to_hf
from cheaper.language_model import LanguageModel
from cheaper.models.decoder import Decoder

SHAPE = ModelConfig(
    name="140m-like",
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    hidden_size=576,
    intermediate_size=2048,
    head_dim=64,
    vocab_size=32_000,
    max_position_embeddings=2048,
)
SYLLABLES = [a + b + c for a in "bdkmst" for b in "aeiou" for c in ("", "n", "r")]
WORDS = ["".join(random.Random(i).choices(SYLLABLES, k=3)) for i in range(60_000)]
BATCH = 8
NEW_TOKENS = 32
Questions = list[tuple]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=48, help="of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = export(Path(folder))
        ours = CheaperLM(str(model), batch_size=BATCH, device="cpu")
        theirs = HFLM(str(model), batch_size=BATCH, device="cpu", dtype="float32")
    rows = [("questions", "requests", "theirs, s", "ours, s", "times as fast")]
    results = {}
    for name, (method, questions) in kinds(options.questions).items():
        asked = [Instance(method, {}, arguments, 0) for arguments in questions]
        sides = {
            "theirs": lambda method=method, asked=asked: getattr(theirs, method)(asked, disable_tqdm=True),
            "ours": lambda method=method, asked=asked: getattr(ours, method)(asked, disable_tqdm=True),
        }
        check_same(method, sides["theirs"](), sides["ours"]())
        times = alternate(sides, options.rounds)
        ratio = speed_ratio(times["theirs"], times["ours"])
        seconds = {side: spread(of_side) for side, of_side in times.items()}
        results[name] = {"requests": len(asked), "seconds": seconds, "times_as_fast": ratio}
        medians = [f"{seconds[side]['median']:.2f}" for side in ("theirs", "ours")]
        figure = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
        rows.append((name, str(len(asked)), *medians, figure))
    shape = {key: value for key, value in dataclasses.asdict(SHAPE).items() if isinstance(value, int)}
    conditions = {"dtype": "fp32", "batch_size": BATCH, "threads": torch.get_num_threads(), "model": shape}
    packages = ("torch", "transformers", "lm-eval")
    save("evaluation", {**conditions, "rounds": options.rounds, "results": results}, packages)
    show(rows)


def export(folder: Path) -> Path:
    """A random model with a tokenizer of the made-up words that begins texts with BOS by itself."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    words = load_tokenizer(str(folder / "tokenizer"))
    model = LanguageModel(Decoder(SHAPE), words, str(folder / "tokenizer"), "tokenizer", folder / "none")
    export_to_hf(model, folder / "model")
    return folder / "model"


def write_tokenizer(folder: Path) -> None:
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    engine.train_from_iterator(WORDS + [f" {word}" for word in WORDS], trainer)
    folder.mkdir()
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')


def kinds(count: int) -> dict[str, tuple[str, Questions]]:
    """Requests by the kind of benchmark, with contexts and answers about as long as the public sets'."""
    rng = random.Random(0)
    return {
        "ARC": ("loglikelihood", [pair for _ in range(count) for pair in choices(text(rng, 20, 40), rng)]),
        "MMLU, 5 shots": ("loglikelihood", [pair for _ in range(count) for pair in letters(text(rng, 300, 600))]),
        "GSM8K, 8 shots": ("generate_until", [(text(rng, 600, 1000), settings()) for _ in range(count // 4)]),
    }


def settings() -> dict[str, object]:
    return {"until": ["Question:"], "max_gen_toks": NEW_TOKENS, "do_sample": False}


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def choices(context: str, rng: random.Random) -> Questions:
    return [(context, f" {text(rng, 1, 8)}") for _ in range(4)]


def letters(context: str) -> Questions:
    return [(context, letter) for letter in "ABCD"]


def check_same(method: str, theirs: list, ours: list) -> None:
    if method == "generate_until":
        assert theirs == ours, "the texts differ"
        return
    worst = max(abs(a - b) for (a, _), (b, _) in zip(theirs, ours, strict=True))
    assert worst < 1e-3, f"log-likelihoods differ by {worst}"


if __name__ == "__main__":
    main()
