"""Ids equal those of the reference: tiktoken for Llama 3's file, Hugging Face's tokenizers for its own."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from cheaper.data.bpe import as_tiktoken
from cheaper.data.sample import write_sample
from cheaper.data.tokenize import LLAMA3_PATTERN, load_tokenizer
from cheaper.errors import UserError
from tests.conftest import some_texts, train_tokenizer

llama_models = pytest.importorskip("llama_models", reason="Llama 3's vocabulary comes with the package llama-models")
LLAMA3 = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"
ODD = [
    "",
    " ",
    "  \n\n \t x",
    "a" * 3000,
    "ünï 漢字 🙂\u200d",
    "x<|end_of_text|>y",
    "12345 6 7.89",
    "it's WE'LL",
    "\r\n\r\n",
]
ODD += ["=" * n for n in range(1, 200)]


def real_texts() -> list[str]:
    """The sources of the package and its tests."""
    repository = Path(__file__).parents[2]
    return [path.read_text() for folder in ("cheaper", "tests") for path in sorted((repository / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    lines = (line.split() for line in LLAMA3.read_bytes().splitlines())
    ranks = {base64.b64decode(word): int(rank) for word, rank in lines}
    return tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_llama3_ids_equal_tiktokens(reference):
    tokenizer = load_tokenizer(str(LLAMA3))
    texts = [*real_texts(), *ODD]
    assert sum(map(len, texts)) > 100_000
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == reference.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


def test_llama3_special_tokens():
    """Against the tokenizer that its authors ship."""
    from llama_models.llama3.tokenizer import Tokenizer

    theirs, ours = Tokenizer(LLAMA3), load_tokenizer(str(LLAMA3))
    assert ours.vocab_size == theirs.n_words == 128_256
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id, theirs.eos_id) == (128_000, 128_001)
    assert ours.engine._special_tokens == theirs.special_tokens
    assert ours.encode("<|end_of_text|>").max() < 128_000


def test_a_text_that_tiktoken_gives_up_on_is_still_encoded():
    tokenizer = load_tokenizer(str(LLAMA3))
    text = "start" + " " * 1_000_000 + "end"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def byte_level(merges_from: list[str], **model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(**model))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        merges_from,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def with_all_merges(raw: dict) -> dict:
    """The vocabulary with every pair that makes a word, in the order in which transformers converts tiktoken's."""
    words = {word: id for word, id in raw["model"]["vocab"].items() if word != "<s>"}
    pairs = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in words and w[i:] in words]
    pairs.sort(key=lambda pair: (words["".join(pair)], words[pair[0]], words[pair[1]]))
    merges = [list(pair) for pair in pairs]
    return {**raw, "model": {**raw["model"], "merges": merges, "ignore_merges": True}}


def test_a_tiktoken_like_vocabulary_is_proved_so_and_gives_the_same_ids():
    raw = with_all_merges(json.loads(byte_level(real_texts()).to_str()))
    fast, slow = as_tiktoken(raw), tokenizers.Tokenizer.from_str(json.dumps(raw))
    slow.encode_special_tokens = True
    assert fast is not None
    for text in [*real_texts(), *ODD]:
        assert fast.encode_ordinary(text) == slow.encode(text, add_special_tokens=False).ids


def test_other_vocabularies_are_left_to_their_own_engine():
    raw = with_all_merges(json.loads(byte_level(real_texts()).to_str()))
    merges = raw["model"]["merges"]
    changes = {
        "a pair is missing": {"model": {**raw["model"], "merges": merges[1:]}},
        "out of order": {"model": {**raw["model"], "merges": [merges[-1], *merges[:-1]]}},
        "normalised": {"normalizer": {"type": "NFC"}},
        "unknown words": {"model": {**raw["model"], "unk_token": "<s>"}},
        "another splitter": {"pre_tokenizer": {"type": "Whitespace"}},
        "a word cut out before": {"added_tokens": [*raw["added_tokens"], {**raw["added_tokens"][0], "special": False}]},
    }
    for reason, change in changes.items():
        assert as_tiktoken({**raw, **change}) is None, reason


def test_hugging_face_folder_encodes_as_its_own_library(tmp_path):
    write_sample(tmp_path)  # the quickstart's tokenizer, trained here
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for text in [*real_texts()[:5], *(odd for odd in ODD if "<|" not in odd)]:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode("<|end_of_text|>")
    assert library.encode("<|end_of_text|>").ids == [tokenizer.eos_id]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 4096)


def test_the_fingerprint_tells_vocabularies_apart_and_not_their_places(tmp_path):
    train_tokenizer(tmp_path / "a", some_texts(50, seed=0))
    train_tokenizer(tmp_path / "b", some_texts(50, seed=0))
    train_tokenizer(tmp_path / "c", some_texts(50, seed=0), vocab_size=321)
    a, b, c = (load_tokenizer(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c


def test_an_end_of_its_own_leaves_the_vocabulary_as_it_is(tmp_path):
    for name, end in (("base", "</s>"), ("instruct", "<s>")):  # as Llama 3.1's two tokenizers differ
        folder = train_tokenizer(tmp_path / name, some_texts(50, seed=0))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": end}))
    base, instruct = (load_tokenizer(str(tmp_path / name)) for name in ("base", "instruct"))
    assert base.vocabulary == instruct.vocabulary
    assert base.fingerprint != instruct.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no"),
        ({"tokenizer.json": "{"}, "is not a tokenizer"),
        ({"tokenizer.model": "aGVsbG8= 0\n"}, "has 1 words, expected Llama 3's 128000"),
        ({"tokenizer.model": "no base64 here"}, "expected a tiktoken .model file"),
    ],
)
def test_what_is_no_tokenizer_is_told_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    source = tmp_path / "tokenizer.model" if "tokenizer.model" in files else tmp_path
    with pytest.raises(UserError) as error:
        load_tokenizer(str(source))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_documents_keep_their_type():
    assert load_tokenizer(str(LLAMA3)).encode("hello").dtype == np.uint32
