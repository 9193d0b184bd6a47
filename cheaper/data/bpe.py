"""Which of Hugging Face's byte-level BPE tokenizers tiktoken can replace, id for id."""

from __future__ import annotations

import re
from typing import Any

import tiktoken
import tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Alternatives of patterns: each kind matches every character of its class, so a pattern with one of each kind and
# nothing unknown splits a text without leaving anything out, and never matches the empty text.
ALTERNATIVES = {
    "letters": {r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"},
    "numbers": {r"\p{N}", r"\p{N}+", r" ?\p{N}", r" ?\p{N}+", r"\p{N}{1,2}", r"\p{N}{1,3}"},
    "others": {r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"},
    "spaces": {r"\s+"},
    "further": {r"\s+(?!\S)", r"\s*[\r\n]+", r"\s*[\r\n]", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}
    | {"'(?:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"},
}


def as_tiktoken(raw: dict[str, Any]) -> tiktoken.Encoding | None:
    """The same tokenizer for tiktoken, several times faster, or ``None`` where the two could differ.

    Both cut the text into pieces by a pattern and merge neighbours in each piece: Hugging Face the pair that comes
    first in its list, tiktoken the pair whose union has the lowest id, both the leftmost of equals. They agree if

    1. the list is ordered by the id of the union, and
    2. for each word, merging its characters by the list gives the word, or all pairs that make it are in the list.

    For say they agree so far, and x, y with the word xy are neighbours. No merge crossed the borders of xy, so merging
    xy alone comes by (x, y) too, and as that never has two such pairs, (x, y) is the one it ends with: by 2, it is in
    the list. So both choose among the same pairs, by 1 in the same order, and agree one step further.

    Args:
        raw: The content of ``tokenizer.json``.
    """
    model, pattern = raw["model"], _pattern(raw.get("pre_tokenizer"))
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(key) for key in odd) or raw.get("normalizer") or not pattern:
        return None
    special = {token["content"]: token["id"] for token in raw.get("added_tokens", []) if token.get("special")}
    if len(special) != len(raw.get("added_tokens", [])):
        return None  # an added word that is no special token is cut out of the text before the pattern
    takes_whole = bool(model.get("ignore_merges"))  # a piece that is a word is taken whole, as tiktoken does
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated").pre_tokenize_str
    if takes_whole and any(token in model["vocab"] and len(cut(token)) == 1 for token in special):
        return None  # a piece that spells a special token would become it
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    words = {word: id for word, id in model["vocab"].items() if word not in special}
    if not all(character in words for character in to_byte) or any(not to_byte.keys() >= set(word) for word in words):
        return None
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if not _agree(words, merges, takes_whole):
        return None
    ranks = {bytes(to_byte[character] for character in word): id for word, id in words.items()}
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _agree(words: dict[str, int], merges: list[tuple[str, str]], takes_whole: bool) -> bool:
    """Conditions 1 and 2 of ``as_tiktoken``, and that a piece that is a word becomes that word."""
    if any(a not in words or b not in words or a + b not in words for a, b in merges):
        return False
    unions = [words[a + b] for a, b in merges]
    if unions != sorted(unions):
        return False
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=merges))
    encodings = bare.encode_batch_fast(list(words), add_special_tokens=False)
    halves = [word for (word, id), encoding in zip(words.items(), encodings, strict=True) if encoding.ids != [id]]
    if halves and not takes_whole:
        return False
    listed = set(merges)
    cuts = ((word[:i], word[i:]) for word in halves for i in range(1, len(word)))
    return all((a, b) in listed for a, b in cuts if a in words and b in words)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of a byte-level pre-tokenizer that only splits, if it leaves no character out."""
    if not pre_tokenizer:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    byte_level = steps[-1]
    if byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    if len(steps) == 1 and byte_level["use_regex"]:
        return GPT2_PATTERN
    if len(steps) != 2 or steps[0]["type"] != "Split" or byte_level["use_regex"]:
        return None
    split = steps[0]
    isolates = (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))
    pattern = split["pattern"].get("Regex")
    return pattern if isolates and pattern and _leaves_nothing_out(pattern) else None


def _leaves_nothing_out(pattern: str) -> bool:
    alternatives = set(re.findall(r"(?:\([^)]*\)|[^|(])+", pattern))
    known = set().union(*ALTERNATIVES.values())
    classes = ("letters", "numbers", "others", "spaces")
    return alternatives <= known and all(alternatives & ALTERNATIVES[name] for name in classes)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
