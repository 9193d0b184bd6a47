"""A small corpus as shards, and how tests start runs on it: in this process or as real processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from streaming import StreamingDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cheaper.compose import load_config
from cheaper.data.convert import convert_mixture
from cheaper.data.shared_memory import release, remove_stale_shared_memory

DRIVER = Path(__file__).parent / "e2e" / "train_and_log.py"
REPOSITORY = Path(__file__).parents[1]
WORDS = "the model reads a row of tokens and learns which word comes next in each of many short texts".split()  # noqa: SIM905


def train_tokenizer(folder: Path, texts: list[str], vocab_size: int = 320) -> Path:
    """A byte-level BPE with BOS and EOS in ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows_of(folder: Path) -> list[dict]:
    """The rows of the shards in ``folder``, as streaming reads them."""
    remove_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    rows = [dataset[i] for i in range(len(dataset))]
    release(dataset)
    return rows


def some_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) for _ in range(count)]


class Corpus:
    """Two streams, asked 70 to 30, as shards of 32-token rows."""

    def __init__(self, folder: Path):
        self.folder = folder
        train_tokenizer(folder / "tokenizer", some_texts(50, seed=0))
        for name, count in (("a", 300), ("b", 120)):
            write_jsonl(folder / "raw" / f"{name}.jsonl", some_texts(count, seed=count))
        (folder / "data").mkdir()
        (folder / "data" / "small.yaml").write_text(
            f"name: small\nroot: {folder}/mds\ntokenizer: {folder}/tokenizer\nnum_workers: 0\nstreams:\n"
            f"  a: {{proportion: 70, source: {{path: {folder}/raw/a.jsonl}}}}\n"
            f"  b: {{proportion: 30, source: {{path: {folder}/raw/b.jsonl}}}}\n"
        )
        (folder / "recipe.yaml").write_text(
            "defaults: [{model: tiny}, {training: pretrain_phase1}, {data: small}, {distributed: single_gpu},"
            " {logging: console}, _self_]\n"
            "model: {num_layers: 2, num_heads: 8, num_kv_heads: 4, hidden_size: 32, intermediate_size: 64,"
            " head_dim: 8, vocab_size: 320}\n"
            "training:\n  stage: {tokens: 5120, sequence_length: 32, batch_size_per_gpu: 4, warmup: 10%}\n"
            "  precision: fp32\n  checkpoint_interval: 10\n  samples: {prompts: [the model], max_new_tokens: 3}\n"
            "logging: {interval: 1}\n"
        )
        config = load_config([str(folder / "recipe.yaml")])
        convert_mixture(config.data, 32, processes=1)

    def arguments(self, run: Path, *overrides: str) -> list[str]:
        """The command line of a run of 40 steps of 4 rows that writes into ``run``."""
        return [str(self.folder / "recipe.yaml"), f"training.checkpoint_dir={run}", "run_name=test", *overrides]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def start(arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """Starts a run as real processes of a group of their own; it logs its samples, see ``train_and_log.py``."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*python, str(DRIVER), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a run and every process it started; torchrun puts its own into sessions of theirs."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def finish(process: subprocess.Popen, status: int = 0, timeout: float = 240) -> str:
    """Waits for a run and returns what it printed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output[-4000:]
    return output
