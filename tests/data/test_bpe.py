"""tiktoken stands in for a Hugging Face tokenizer where it gives the same ids, and nowhere else."""

import json
import pickle
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from cheaper.data.bpe import GPT2_PATTERN, _byte_characters, as_tiktoken
from cheaper.data.sample import SPLIT
from cheaper.data.tokenize import LLAMA3_PATTERN, Tokenizer, load_tokenizer
from tests.conftest import some_texts, train_tokenizer

ODD_TEXTS = [
    " ",
    "\n\n\n  \t x\r\n",
    "it's IT'S 'ſ don't I'LL",
    "12345678 ١٢٣ ½ 一二三",
    "ünïcødé 漢字かな עברית 👩‍👩‍👧 \u200b\u00a0\u3000",
    "<|begin_of_text|><|eot_id|> <s></s>",
    "\x00\x7f\ufeff\U0010ffff",
    "=" * 300 + "a" * 3000 + " " * 3000,
]
SPLIT_AND_BYTES = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    """More than 1 MB of sources of Python's library."""
    paths = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    texts = [path.read_text("utf-8", errors="ignore") for path in paths]
    assert sum(map(len, texts)) > 1_000_000
    return texts


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """The ``tokenizer.json`` of a small vocabulary that tiktoken takes."""
    folder = train_tokenizer(tmp_path_factory.mktemp("small"), some_texts(50, seed=0))
    raw = json.loads((folder / "tokenizer.json").read_text())
    assert as_tiktoken(raw)
    return raw


def assert_same(tokenizer: Tokenizer, reference: tokenizers.Tokenizer, texts: list[str]) -> None:
    assert isinstance(tokenizer.engine, tiktoken.Encoding)
    reference.encode_special_tokens = True
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_llama3s_model_file_and_tokenizer_json_are_one_tokenizer(tmp_path, real_texts):
    llama3 = pytest.importorskip("llama_models.llama3", reason="Llama 3's vocabulary comes with llama-models")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = str(Path(llama3.__path__[0]) / "tokenizer.model")
    special = load_tokenizer(file).engine._special_tokens
    converted = TikTokenConverter(file, pattern=LLAMA3_PATTERN, additional_special_tokens=[]).converted()
    converted.model.ignore_merges = True
    converted.add_special_tokens(sorted(special, key=special.get))
    converted.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    folder = load_tokenizer(str(tmp_path))
    assert folder.fingerprint == load_tokenizer(file).fingerprint
    assert_same(folder, converted, [*real_texts[:20], *ODD_TEXTS])


@pytest.mark.parametrize("splits", [pre_tokenizers.ByteLevel(add_prefix_space=False), SPLIT_AND_BYTES])
def test_a_trained_tokenizer_runs_on_tiktoken_with_the_same_ids(splits, tmp_path, real_texts):
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = splits, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(real_texts[:20], trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert_same(load_tokenizer(str(tmp_path)), trained, [*real_texts, *ODD_TEXTS])


def random_vocabulary(rng: random.Random) -> dict:
    """The ``tokenizer.json`` of a few words over a, b and c, whose merges are sound or not."""
    alphabet = list(_byte_characters().values())
    words = sorted({"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(rng.randint(3, 12))})
    rng.shuffle(words)
    if rng.random() < 0.6:
        words.sort(key=len)
    known, most = {*alphabet, *words}, rng.choice([1, 2, 9])
    merges = []
    for word in words:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in known and word[i:] in known]
        rng.shuffle(cuts)
        merges += cuts[:most]
    if rng.random() < 0.2:
        rng.shuffle(merges)
    model = models.BPE(vocab={word: id for id, word in enumerate([*alphabet, *words])}, merges=merges)
    model.ignore_merges = rng.random() < 0.5
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return json.loads(tokenizer.to_str())


def test_no_vocabulary_is_taken_with_which_tiktoken_disagrees():
    rng, outcomes = random.Random(3), Counter()
    for _ in range(1000):
        raw = random_vocabulary(rng)
        fast = as_tiktoken(raw)
        outcomes["taken" if fast else "refused"] += 1
        if fast:
            reference = tokenizers.Tokenizer.from_str(json.dumps(raw))
            texts = ["".join(rng.choices("abc ", k=rng.randint(1, 40))) for _ in range(20)]
            for text in [*texts, *(word for word in raw["model"]["vocab"] if set(word) <= set("abc"))]:
                assert fast.encode_ordinary(text) == reference.encode(text).ids, (raw["model"]["merges"], text)
    assert min(outcomes["taken"], outcomes["refused"]) > 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalizer", {"type": "NFC"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    ],
)
def test_what_does_more_than_split_and_merge_is_refused(small, key, value):
    assert as_tiktoken({**small, key: value}) is None


def test_words_that_are_cut_out_before_the_split_are_refused(small):
    word = {"id": 999, "content": "zzz", "special": False}
    assert as_tiktoken({**small, "added_tokens": [*small["added_tokens"], word]}) is None
    assert as_tiktoken({**small, "added_tokens": [*small["added_tokens"], {**word, "special": True}]})


@pytest.mark.parametrize("pattern", [r"\p{L}+", r"\p{L}+|\p{N}+|\s+", rf"x*|{GPT2_PATTERN}", rf"(?=a)|{SPLIT}"])
def test_a_pattern_that_could_leave_text_out_is_refused(small, pattern):
    """tiktoken drops what its pattern does not match; Hugging Face keeps it as a piece."""

    def with_pattern(pattern: str) -> dict:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        steps = [split, {**small["pre_tokenizer"], "use_regex": False}]
        return {**small, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    assert as_tiktoken(with_pattern(SPLIT))
    assert as_tiktoken(with_pattern(pattern)) is None


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\p{N}", r"\s", r"(?i:s)"])
def test_both_engines_know_the_same_characters(pattern):
    """Their regular expressions come from two libraries, each with Unicode tables of its own."""
    characters = "".join(chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000)
    words = {bytes([i]): i for i in range(256)}
    by_byte = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=words, special_tokens={})
    matched = by_byte.decode(by_byte.encode_ordinary(characters))
    left = pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(characters)
    assert set(matched) == set(characters) - set("".join(piece for piece, _ in left))
    assert len(matched) > 2


def test_other_tokenizers_run_on_their_own_engine_also_in_another_process(tmp_path):
    folder = train_tokenizer(tmp_path, some_texts(50, seed=0))
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"] = {"type": "NFC"}
    raw["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer.engine, tokenizers.Tokenizer)
    text = "<s> a word </s> cafe\u0301"
    assert tokenizer.decode(tokenizer.encode(text)) == "<s> a word </s> café"
    assert not {0, 1} & set(tokenizer.encode(text).tolist())  # text that spells a special token is text
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert sent.fingerprint == tokenizer.fingerprint
