"""Models out to transformers and in from there, with tokenizer and chat template; and text from what comes out."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cheaper import cli
from cheaper.checkpoints import load_decoder, safe_load
from cheaper.evaluation.results import Result, save
from cheaper.generation import Sampling, continuations
from cheaper.interchange import export_to_hf
from cheaper.language_model import load_model
from cheaper.models import hf
from cheaper.models.decoder import Decoder
from tests.conftest import some_texts, train_tokenizer

CHAT = [{"role": "user", "content": "the model"}, {"role": "assistant", "content": "reads"}]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run of 10 steps whose chats have a template of their own, at the raised RoPE of a longer context."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "template.jinja").write_text(TEMPLATE)
    arguments = corpus.arguments(
        folder / "run",
        "training.stage.tokens=1280",
        f"data.chat_template={folder}/template.jinja",
        "training.long_context={enabled: true, rope_theta_factor: 8, max_position_embeddings: 512}",
    )
    assert cli.main(["train", *arguments]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run) -> Path:
    output = run.parent / "exported"
    assert cli.main(["export", str(run), "--to", "hf", "--output", str(output)]) == 0
    return output


def test_transformers_gives_the_same_logits_and_the_same_64_tokens(run, exported):
    ours, theirs = load_model(str(run)), AutoModelForCausalLM.from_pretrained(exported)
    assert theirs.config.max_position_embeddings == 512
    ids = torch.tensor([ours.encode("the model reads a row of tokens")])
    torch.testing.assert_close(ours.decoder(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "the model reads"
    expected = theirs.generate(torch.tensor([ours.encode(text)]), max_new_tokens=64, do_sample=False)[0]
    expected = tokenizer.decode(expected[len(ours.encode(text)) :], skip_special_tokens=True)
    assert ours.generate([text], max_new_tokens=64) == [expected]
    assert len(expected) > 20


@pytest.mark.parametrize(("context", "theta"), [(4096, 5e5), (32_768, 4e6)])
def test_transformers_agrees_up_to_the_end_of_the_context(run, tmp_path, context, theta):
    model = load_model(str(run))
    shape = {
        "max_position_embeddings": context,
        "rope_theta": theta,
        "initializer_std": 0.3,
        "num_heads": 2,
        "num_kv_heads": 1,
    }
    torch.manual_seed(0)
    model.decoder = Decoder(dataclasses.replace(model.decoder.config, **shape)).eval()
    export_to_hf(model, tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert theirs.config.max_position_embeddings == context
    ids = torch.randint(2, 320, (1, context - 64))
    cache, expected = DynamicCache(), []
    with torch.no_grad():
        for piece in ids.split(512, dim=1):  # at once it would take 34 GB
            logits = theirs(piece, past_key_values=cache).logits
        torch.testing.assert_close(model.decoder(ids)[:, -64:], logits[:, -64:], atol=1e-4, rtol=1e-4)
        while len(expected) < 64:
            expected.append(logits[0, -1].argmax().item())
            logits = theirs(torch.tensor([expected[-1:]]), past_key_values=cache).logits
    assert continuations(model.decoder, ids.tolist(), Sampling(64)) == [expected]


def test_the_tokenizer_has_the_same_words_and_chats(run, exported):
    ours, theirs = load_model(str(run)), AutoTokenizer.from_pretrained(exported)
    for text in some_texts(20, seed=4):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text).tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.tokenizer.bos_id, ours.tokenizer.eos_id)
    told = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    assert told == ours.tokenizer.decode(ours.encode(CHAT[:1]))
    assert json.loads((exported / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}


def test_what_is_exported_comes_back_bit_for_bit(run, exported, tmp_path):
    assert cli.main(["import", str(exported), "--output", str(tmp_path / "again")]) == 0
    before, after = load_model(str(run)), load_model(str(tmp_path / "again"))
    for name, tensor in before.decoder.state_dict().items():
        assert torch.equal(after.decoder.state_dict()[name], tensor)
    assert after.encode(CHAT[:1]) == before.encode(CHAT[:1])
    assert cli.main(["export", str(tmp_path / "again"), "--to", "hf", "--output", str(tmp_path / "last")]) == 0
    for file in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "last" / file).read_bytes() == (exported / file).read_bytes(), file


def test_texts_begin_as_the_models_own_tokenizer_begins_them(exported, tmp_path):
    """A foreign model may name a BOS that it was not trained to see before every text, as SmolLM2 does."""
    foreign = tmp_path / "foreign"
    shutil.copytree(exported, foreign)
    raw = json.loads((foreign / "tokenizer.json").read_text())
    (foreign / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    theirs = AutoTokenizer.from_pretrained(foreign)
    assert theirs.bos_token_id == 0
    assert theirs("the model").input_ids == load_model(str(foreign)).encode("the model")
    assert load_model(str(exported)).encode("the model") == [0, *theirs("the model").input_ids]
    assert cli.main(["import", str(foreign), "--output", str(tmp_path / "run")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "last")]) == 0
    for path in ("run", "last"):
        assert load_model(str(tmp_path / path)).encode("the model") == theirs("the model").input_ids


def test_who_may_read_one_file_may_read_all(exported):
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1


def test_a_stage_starts_from_an_imported_model_and_nothing_resumes_from_it(corpus, exported, tmp_path, capsys):
    assert cli.main(["import", str(exported), "--output", str(tmp_path / "again")]) == 0
    start = (f"training.checkpoint_path={tmp_path / 'again'}", "training.stage.tokens=256")
    longer = ("model.rope_theta=4000000", "model.max_position_embeddings=512")
    assert cli.main(["train", *corpus.arguments(tmp_path / "next", *start, *longer)]) == 0
    assert cli.main(["train", *corpus.arguments(tmp_path / "more", *start, *longer, "training.resume=true")]) == 2
    assert "holds weights alone; start from it, without training.resume=true" in capsys.readouterr().err


def test_the_card_says_what_made_the_model(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for told in ("model=tiny training=pretrain_phase1 data=small", "1,280 in 10 steps", "| a |", "70.00%"):
        assert told in card, card


def test_the_card_has_the_scores_of_its_own_model(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newest = load_model(str(folder)).source
    earlier = shutil.copy(newest, folder / "step-00000005.pt")
    for source, score in ((newest, 0.75), (earlier, 0.5)):
        save(folder / "evaluation.json", source, [Result("sums", "acc", 0, 200, score)])
    cards = {}
    for name, source in (("newest", folder), ("earlier", earlier)):
        export_to_hf(load_model(str(source)), tmp_path / name)
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert "| sums | 75.0% |" in cards["newest"]
    assert "1,280 in 10 steps" in cards["newest"]
    assert "| sums | 50.0% |" in cards["earlier"]
    assert "1,280 in 10 steps" not in cards["earlier"]  # the end of the run is not this checkpoint's
    save(tmp_path / "newest" / "evaluation.json", tmp_path / "newest", [Result("sums", "acc", 0, 200, 1.0)])
    export_to_hf(load_model(str(tmp_path / "newest")), tmp_path / "again")
    assert "| sums | 100.0% |" in (tmp_path / "again" / "README.md").read_text()


def test_weights_may_be_written_in_another_type(run, tmp_path):
    assert cli.main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    half, whole = hf.load_pretrained(tmp_path / "half"), load_decoder(load_model(str(run)).source)
    assert half.output_weight.dtype == torch.bfloat16
    assert torch.equal(half.output_weight, whole.output_weight.bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", torch_dtype="auto").dtype == torch.bfloat16


def test_gguf_goes_through_llama_cpps_converter(run, tmp_path, monkeypatch, capsys):
    """The converter is a stand-in: llama.cpp is no Python package. What it is given and what becomes of it is real."""
    output = tmp_path / "model.gguf"
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setenv("PATH", os.defpath)
    arguments = ["export", str(run), "--to", "gguf", "--output", str(output), "--dtype", "bf16"]
    assert cli.main(arguments) == 2
    assert "set LLAMA_CPP to a folder of llama.cpp" in capsys.readouterr().err
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(
        "import json, pathlib, sys\nfolder, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]\n"
        "kept = {'type': json.loads((folder / 'config.json').read_text())['model_type'], 'arguments': arguments[:3]}\n"
        "pathlib.Path(arguments[3]).write_text(json.dumps(kept))\n"
    )
    assert cli.main(arguments) == 0
    kept = json.loads(output.read_text())
    assert (kept["type"], kept["arguments"]) == ("qwen3", ["--outtype", "bf16", "--outfile"])
    converter.write_text("import sys\nsys.exit('Model Qwen3ForCausalLM is not supported')\n")
    output.unlink()
    assert cli.main(arguments) == 2
    assert "does not take this model (Model Qwen3ForCausalLM is not supported)" in capsys.readouterr().err
    assert list(tmp_path.glob("*.gguf")) == []


def test_llama_3s_vocabulary_becomes_one_of_hugging_faces(run, tmp_path):
    import llama_models

    words = next(Path(llama_models.__file__).parent.rglob("llama3/tokenizer.model"))
    model = load_model(str(run))
    from cheaper.data.tokenize import load_tokenizer
    from cheaper.interchange import write_tokenizer

    model.tokenizer, model.tokenizer_source, model.template_name = load_tokenizer(str(words)), str(words), "llama3"
    write_tokenizer(model, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert ours.vocabulary == load_tokenizer(str(words)).vocabulary
    for text in [*some_texts(5, seed=1), "don't  x²\n\n\t12345 été 北京 <|eot_id|>"]:
        assert ours.encode(text).tolist() == model.tokenizer.encode(text).tolist()
    assert theirs.bos_token == "<|begin_of_text|>"
    told = json.loads((tmp_path / "generation_config.json").read_text())
    assert told == {"bos_token_id": 128000, "eos_token_id": [128001, 128009]}


def refused(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


def test_what_does_not_work_is_told_in_one_line(run, exported, tmp_path, capsys):
    there = str(tmp_path)
    assert "is there already" in refused(capsys, "export", str(run), "--to", "hf", "--output", there)
    assert "there is no folder" in refused(capsys, "export", str(run), "--to", "hf", "--output", f"{there}/a/b")
    without = tmp_path / "without"
    without.mkdir()
    for file in ("config.json", "model.safetensors"):
        (without / file).write_bytes((exported / file).read_bytes())
    assert "has no tokenizer.json; name a tokenizer with --tokenizer" in refused(capsys, "generate", str(without), "x")
    assert cli.main(["generate", str(without), "x", "--tokenizer", str(exported), "--max_new_tokens", "1"]) == 0
    capsys.readouterr()
    (without / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    told = refused(capsys, "generate", str(without), "x", "--tokenizer", str(exported))
    assert "model.safetensors: not a whole safetensors file" in told
    bigger = train_tokenizer(tmp_path / "bigger", some_texts(50, seed=3), vocab_size=330)
    assert "has 320 words, its tokenizer" in refused(capsys, "generate", str(run), "x", "--tokenizer", str(bigger))


def test_a_checkpoint_of_a_newer_version_is_refused(corpus, run, tmp_path, capsys):
    newer = safe_load(load_model(str(run)).source)
    newer["state"]["callbacks"]["Checkpointer"]["model"]["sparse_attention"] = True
    newer["state"]["callbacks"]["Checkpointer"]["versions"]["cheaper"] = "9.0"
    torch.save(newer, tmp_path / "step-00000001.pt")
    words = ("--tokenizer", str(corpus.folder / "tokenizer"))
    told = refused(capsys, "generate", str(tmp_path / "step-00000001.pt"), "x", *words)
    assert "its model has what this version does not know" in told
    assert "cheaper 9.0, this is" in told
    assert "says its tokenizer; name one with --tokenizer" in refused(
        capsys, "generate", str(tmp_path / "step-00000001.pt"), "x"
    )
