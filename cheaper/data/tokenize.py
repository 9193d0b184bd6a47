"""Text to token ids and back: tiktoken where the vocabulary is one of its kind, Hugging Face's tokenizers elsewhere.

Text is only ever text: where it spells a special token such as ``<|end_of_text|>``, it is encoded as those characters.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from cheaper.data.bpe import as_tiktoken
from cheaper.errors import UserError

# Llama 3's pattern and special tokens, as Meta published them with the vocabulary.
LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
LLAMA3_WORDS = 128_000
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
# tiktoken's regex engine gives up on some texts, such as a million spaces; those are encoded in slices of this length.
SLICE_CHARACTERS = 10_000


class Tokenizer:
    """A vocabulary with one of two engines.

    Args:
        name: Where it came from.
        vocab_size: Number of ids, special tokens included.
        bos_id: Id that starts a document, if the vocabulary has one.
        eos_id: Id that ends a document.
        engine: What encodes.
        adds_bos: Whether ``transformers`` begins a text with BOS when it encodes one with this tokenizer.

    Attributes:
        special_tokens: Id of each special token by its spelling.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int,
        engine: tiktoken.Encoding | tokenizers.Tokenizer,
        adds_bos: bool = True,
    ):
        self.name, self.vocab_size, self.engine = name, vocab_size, engine
        self.bos_id, self.eos_id, self.adds_bos = bos_id, eos_id, adds_bos
        if isinstance(engine, tokenizers.Tokenizer):
            engine.encode_special_tokens = True  # what text spells is text
        self.special_tokens = _special_tokens(engine)
        words = _identity(engine)
        self.vocabulary = hashlib.sha256(words).hexdigest()  # which words have which ids, and how text becomes words
        self.fingerprint = hashlib.sha256(f"{vocab_size} {bos_id} {eos_id} ".encode() + words).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # Through __init__, because a pickled engine forgets encode_special_tokens.
        return Tokenizer, (self.name, self.vocab_size, self.bos_id, self.eos_id, self.engine, self.adds_bos)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, uint32, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32, without BOS and EOS."""
        if isinstance(self.engine, tiktoken.Encoding):
            return [self._tiktoken(text) for text in texts]
        encodings = self.engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out."""
        if isinstance(self.engine, tiktoken.Encoding):
            return self.engine.decode(list(ids))
        return self.engine.decode(list(ids), skip_special_tokens=False)

    def _tiktoken(self, text: str) -> np.ndarray:
        try:
            return self.engine.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            slices = [text[i : i + SLICE_CHARACTERS] for i in range(0, len(text), SLICE_CHARACTERS)]
            return np.concatenate([self.engine.encode_to_numpy(part, disallowed_special=()) for part in slices])


def _special_tokens(engine: tiktoken.Encoding | tokenizers.Tokenizer) -> dict[str, int]:
    if isinstance(engine, tiktoken.Encoding):
        return dict(engine._special_tokens)
    return {token.content: id for id, token in engine.get_added_tokens_decoder().items() if token.special}


def _identity(engine: tiktoken.Encoding | tokenizers.Tokenizer) -> bytes:
    if isinstance(engine, tiktoken.Encoding):
        words = sorted((rank, word.hex()) for word, rank in engine._mergeable_ranks.items())
        return json.dumps([engine._pat_str, words]).encode()
    raw = json.loads(engine.to_str())
    if merges := raw["model"].get("merges"):  # versions write a pair as a list or as one string
        raw["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    parts = [raw[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
    return json.dumps(parts, sort_keys=True).encode()


@functools.lru_cache(maxsize=4)
def load_tokenizer(source: str, trust_remote_code: bool = False) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        source: A tiktoken ``.model`` file of Llama 3's kind, a folder with ``tokenizer.json``, or a hub id.
        trust_remote_code: Let a hub repository run its own code to make the tokenizer.

    Raises:
        UserError: Nothing is there, or it is no such tokenizer.
    """
    path = Path(source)
    if path.is_file():
        return _llama3(path)
    if path.is_dir() or source.startswith((".", "/")):
        return _hugging_face(path, source)
    with tempfile.TemporaryDirectory() as folder:
        _download(source, trust_remote_code, folder)
        return _hugging_face(Path(folder), source)


def _llama3(path: Path) -> Tokenizer:
    try:
        content = path.read_bytes()
        ranks = {base64.b64decode(word): int(rank) for word, rank in (line.split() for line in content.splitlines())}
    except ValueError:
        raise UserError(f"tokenizer {path}: expected a tiktoken .model file, lines of base64 and rank") from None
    if len(ranks) != LLAMA3_WORDS:
        raise UserError(f"tokenizer {path}: has {len(ranks)} words, expected Llama 3's {LLAMA3_WORDS}")
    names = [LLAMA3_NAMED.get(i) for i in range(256)]
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
    special = {name or next(reserved): LLAMA3_WORDS + i for i, name in enumerate(names)}
    engine = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(str(path), engine.n_vocab, bos_id=LLAMA3_WORDS, eos_id=LLAMA3_WORDS + 1, engine=engine)


def _hugging_face(folder: Path, name: str) -> Tokenizer:
    file = folder / "tokenizer.json"
    try:
        content = file.read_text(encoding="utf-8")
        engine = tokenizers.Tokenizer.from_str(content)
    except FileNotFoundError:
        raise UserError(f"tokenizer {name}: there is no {file}") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"tokenizer {name}: {file} is not a tokenizer ({' '.join(str(error).split())[:100]})") from None
    engine.no_truncation()
    engine.no_padding()
    ids = _boundary_ids(folder, engine)
    if ids.get("eos_token") is None:
        raise UserError(f"tokenizer {name}: {folder / 'tokenizer_config.json'} names no eos_token")
    return Tokenizer(
        name=name,
        vocab_size=1 + max(engine.get_vocab(with_added_tokens=True).values()),
        bos_id=ids.get("bos_token"),
        eos_id=ids["eos_token"],
        engine=as_tiktoken(json.loads(content)) or engine,
        adds_bos=engine.encode("").ids == [ids.get("bos_token")],
    )


def _boundary_ids(folder: Path, engine: tokenizers.Tokenizer) -> dict[str, int | None]:
    """Ids of ``bos_token`` and ``eos_token`` as the folder's configuration names them."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {key: config.get(key) for key in ("bos_token", "eos_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in names.items()}
    return {key: engine.token_to_id(text) for key, text in texts.items() if text is not None}


def _download(source: str, trust_remote_code: bool, folder: str) -> None:
    from transformers import AutoTokenizer  # slow to import, and only needed here

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, use_fast=True)
    except (OSError, ValueError) as error:
        if source.startswith("data/sample/"):
            raise UserError(f"tokenizer {source}: not found; `cheaper sample` makes it") from None
        hint = "a folder, a hub id, or a tiktoken .model file such as Llama 3's"
        raise UserError(f"tokenizer {source}: not found; expected {hint} ({str(error).splitlines()[0]})") from None
    tokenizer.save_pretrained(folder)
