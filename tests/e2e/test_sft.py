"""SFT on packed conversations at 32k: what is learned, and that a kill changes nothing."""

import json
import random
from pathlib import Path

import pytest
import torch

from cheaper.checkpoints import find_model, load_decoder
from cheaper.compose import load_config
from cheaper.data.convert import convert_mixture
from cheaper.data.shared_memory import release
from cheaper.data.tokenize import load_tokenizer
from cheaper.files import read_records
from cheaper.models.decoder import Decoder
from cheaper.training import build_train_data, check_data
from tests.conftest import WORDS, finish, kill, start, train_tokenizer
from tests.e2e.test_resume import assert_same_runs, wait_for_step

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content + ':' }}{% endif %}{% endfor %}"
)
RECIPE = """
defaults: [{model: tiny}, {training: posttrain_reasoning_sft}, {data: chats}, {distributed: single_gpu},
  {logging: console}, _self_]
run_name: test
model: {num_layers: 2, num_heads: 4, num_kv_heads: 2, hidden_size: 32, intermediate_size: 64, head_dim: 8,
  vocab_size: 320}
training:
  stage: {epochs: 2, batch_size_per_gpu: 1, gradient_accumulation_steps: 1, learning_rate: 1.0e-2}
  precision: fp32
  checkpoint_interval: 2
  samples: {chats: [the], max_new_tokens: 4}
logging: {interval: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Conversations of up to 700 tokens in which the assistant repeats the question, packed into rows of 32,768."""
    folder = tmp_path_factory.mktemp("sft")
    train_tokenizer(folder / "tokenizer", [" ".join(WORDS)] * 5)
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    rng = random.Random(0)
    rows = []
    for _ in range(500):
        text = " ".join(rng.choices(WORDS, k=rng.randint(20, 160)))
        rows.append({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]})
    (folder / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data").mkdir()
    (folder / "data" / "chats.yaml").write_text(
        f"name: chats\nroot: {folder}/mds\ntokenizer: {folder}/tokenizer\nchat_template: tokenizer\npacking: true\n"
        f"num_workers: 0\nstreams:\n  s: {{source: {{path: {folder}/raw.jsonl}}, format: messages}}\n"
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    config = load_config([str(folder / "recipe.yaml")])
    manifest = convert_mixture(config.data, 32768, processes=1)["s"]
    assert 3 <= manifest.rows <= 6
    return folder / "recipe.yaml"


def test_the_packed_32k_stage_resumes_bit_for_bit(recipe, tmp_path):
    def arguments(name: str) -> list[str]:
        return [str(recipe), f"training.checkpoint_dir={tmp_path}/{name}"]

    finish(start(arguments("whole")))
    victim = start(arguments("killed"))
    wait_for_step(tmp_path / "killed", 4, victim)
    kill(victim)
    finish(start([*arguments("killed"), "training.resume=true"]))
    first, second = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert len(first) == len(second) >= 6
    assert [record["train/loss"] for record in first] == [record["train/loss"] for record in second]
    assert_same_runs(tmp_path / "whole", tmp_path / "killed", processes=1)
    assert first[-1]["train/loss"] < first[0]["train/loss"]
    config = load_decoder(find_model(str(tmp_path / "killed"), "run")).config
    assert (config.rope_theta, config.max_position_embeddings) == (4_000_000, 32768)
    sample = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "the"


def test_a_packed_row_gives_the_logits_of_its_conversations_alone(recipe, tmp_path):
    config = load_config([str(recipe), f"training.checkpoint_dir={tmp_path}"])
    config.data.num_workers = 0
    _, manifests = check_data(config)
    loader = build_train_data(config, manifests).dataloader
    batch = next(iter(loader))
    release(loader.dataset)
    torch.manual_seed(0)
    decoder = Decoder(config.model)
    lengths = [length for length in batch["document_lengths"][0].tolist() if length]
    assert len(lengths) > 5
    with torch.no_grad():
        together = decoder.hidden(batch["input_ids"], batch["document_lengths"])
        alone = torch.cat([decoder.hidden(part) for part in batch["input_ids"].split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    tokenizer = load_tokenizer(config.data.tokenizer)
    first, labels = batch["input_ids"][0, : lengths[0]], batch["labels"][0, : lengths[0]]
    question, answer = tokenizer.decode(first.tolist()).removeprefix("<s>").split(":")
    assert tokenizer.decode(labels[labels >= 0].tolist()) == answer == question + "</s>"
