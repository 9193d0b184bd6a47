"""Models out to ``transformers`` and llama.cpp, and in from there; no weight changes its value on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiktoken
import tokenizers
import torch
import yaml
from tokenizers import processors

from cheaper.checkpoints import save_weights
from cheaper.data.tokenize import LLAMA3_PATTERN
from cheaper.errors import UserError
from cheaper.files import publish
from cheaper.language_model import LanguageModel
from cheaper.model_card import model_card
from cheaper.models import hf
from cheaper.models.hf_llama_cpp import save_for_llama_cpp

OUTTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}  # of the converter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONVERTER = "convert_hf_to_gguf.py"  # llama.cpp's


def export_to_hf(model: LanguageModel, output: Path, dtype: str | None = None) -> None:
    """Writes a folder that ``transformers`` loads: weights, configurations, tokenizer with chat template, model card.

    Args:
        model: What to write.
        output: A new folder.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default the weights stay as they are.

    Raises:
        UserError: The folder is there already, or ``transformers`` has no such model.
    """
    with _new(output) as folder:
        hf.save_pretrained(model.decoder.to(DTYPES[dtype]) if dtype else model.decoder, folder)
        write_tokenizer(model, folder)
        (folder / "README.md").write_text(model_card(model.decoder, model.source, output.name), encoding="utf-8")


def export_to_gguf(model: LanguageModel, output: Path, dtype: str | None = None) -> None:
    """Writes a GGUF file through llama.cpp's converter, which is looked for in ``LLAMA_CPP`` and on the path.

    A dense model is a Qwen3 or a Llama there, see ``cheaper.models.hf_llama_cpp``.

    Raises:
        UserError: The file is there already, or llama.cpp's converter is not installed or does not take the model.
    """
    folders = [os.environ.get("LLAMA_CPP", ""), *os.environ.get("PATH", "").split(os.pathsep)]
    converter = next((path for folder in folders if (path := Path(folder, CONVERTER)).is_file()), None)
    if converter is None:
        raise UserError(f"--to gguf: there is no {CONVERTER} on the path; set LLAMA_CPP to a folder of llama.cpp")
    if output.exists():
        raise UserError(f"--output {output}: is there already; choose another name")
    with tempfile.TemporaryDirectory(prefix="export-") as temporary:
        decoder, folder = model.decoder.to(DTYPES[dtype]) if dtype else model.decoder, Path(temporary, output.stem)
        save_for_llama_cpp(decoder, folder)
        write_tokenizer(model, folder)
        written = OUTTYPES[next(decoder.parameters()).dtype]
        partial = output.with_name(f".partial-{output.name}")
        command = [sys.executable, str(converter), str(folder), "--outtype", written]
        done = subprocess.run([*command, "--outfile", str(partial)], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            partial.unlink(missing_ok=True)
            raise UserError(f"--to gguf: {converter} does not take this model ({last[:200]})")
        publish(partial, output)


def import_model(model: LanguageModel, output: Path) -> None:
    """Writes weights and tokenizer as a run folder, from which stages start; ``model.yaml`` is a choice for ``model=``.

    Raises:
        UserError: The folder is there already.
    """
    with _new(output) as folder:
        begins = {"begins_with_bos": model.begins_with_bos}
        record = {"vocabulary": model.tokenizer.vocabulary, "recipe": f"imported from {model.source}", **begins}
        save_weights(model.decoder, folder / "step-00000000.pt", record)
        (folder / "tokenizer").mkdir()
        write_tokenizer(model, folder / "tokenizer")
        shape = dataclasses.asdict(model.decoder.config)
        (folder / "model.yaml").write_text(yaml.safe_dump(shape, sort_keys=False))
        data = {"tokenizer": str(output / "tokenizer"), "chat_template": "tokenizer"}
        (folder / "run.yaml").write_text(yaml.safe_dump({"model": shape, "data": data}, sort_keys=False))


@contextmanager
def _new(output: Path) -> Iterator[Path]:
    """A folder that gets the name ``output`` once it is whole."""
    if output.exists():
        raise UserError(f"--output {output}: is there already; choose another name")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.absolute().parent}")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output.absolute().parent) as temporary:
        folder = Path(temporary, "whole")
        folder.mkdir()
        yield folder
        publish(folder, output)


def write_tokenizer(model: LanguageModel, folder: Path) -> None:
    """Writes ``tokenizer.json``, its configuration with the chat template, and ``generation_config.json``."""
    words, source = model.tokenizer, Path(model.tokenizer_source)
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if source.is_dir():
        shutil.copy(source / "tokenizer.json", folder)
        if (source / "tokenizer_config.json").is_file():
            config |= json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    elif source.is_file():
        _tokenizer_of_tiktoken(words.engine, source).save(str(folder / "tokenizer.json"))
    else:
        from transformers import AutoTokenizer  # slow to import, and only needed for the hub

        AutoTokenizer.from_pretrained(model.tokenizer_source).save_pretrained(folder)
        config |= json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ends = [words.eos_id]
    for name, token in (("bos_token", words.bos_id), ("eos_token", words.eos_id)):
        if token is not None:
            config.setdefault(name, words.decode([token]))
    try:
        config["chat_template"] = model.template.source
        ends.append(model.template.end_of_turn_id)
    except UserError:
        config.pop("chat_template", None)  # a model without chats
    if model.start:
        _begin_with(words.bos_id, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    ends = sorted({token for token in ends if token is not None})
    generation = {"bos_token_id": words.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _begin_with(bos_id: int, file: Path) -> None:
    """Makes the tokenizer in ``file`` begin its texts with BOS, if it does not."""
    engine = tokenizers.Tokenizer.from_file(str(file))
    if engine.encode("").ids != [bos_id]:
        bos = engine.id_to_token(bos_id)
        single, pair = f"{bos} $A", f"{bos} $A {bos}:1 $B:1"  # as Llama 3's does
        begin = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, bos_id)])
        engine.post_processor = processors.Sequence([p for p in (engine.post_processor, begin) if p is not None])
        engine.save(str(file))


def _tokenizer_of_tiktoken(engine: tiktoken.Encoding, source: Path) -> object:
    """Llama 3's vocabulary for Hugging Face's library."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = sorted(engine._special_tokens, key=engine._special_tokens.get)
    named = {"additional_special_tokens": special, "extra_special_tokens": special}  # transformers 4, and 5
    return TikTokenConverter(str(source), pattern=LLAMA3_PATTERN, **named).converted()
