"""Which of Hugging Face's byte-level BPE tokenizers tiktoken can replace, id for id."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import tiktoken
import tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def as_tiktoken(raw: dict[str, Any]) -> tiktoken.Encoding | None:
    """The same tokenizer for tiktoken, several times faster, or ``None`` where the two could differ.

    Both split by a pattern and then merge pairs of neighbours. Hugging Face merges the pair that comes first in its
    list; tiktoken merges the pair whose union has the lowest id, the leftmost of equals, and takes a piece that is a
    word whole. They do the same on every text if

    1. the list holds every pair of words whose union is a word, ordered by the id of the union,
    2. of two pairs with one union that can overlap, (x, y) and (y, z), the left one comes first in the list, and
    3. a piece that is a word is taken whole (``ignore_merges``), or merging the piece gives that word.

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
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    words = {word: id for word, id in model["vocab"].items() if word not in special}
    if any(character not in to_byte for word in words for character in word):
        return None
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if not _same_merges(words, merges) or not (model.get("ignore_merges") or _words_merge_whole(words, merges)):
        return None
    ranks = {bytes(to_byte[character] for character in word): id for word, id in words.items()}
    if any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    return tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of a byte-level pre-tokenizer that only splits."""
    if not pre_tokenizer:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    byte_level = steps[-1]
    if byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    if len(steps) == 1 and byte_level["use_regex"]:
        return GPT2_PATTERN
    if len(steps) == 2 and steps[0]["type"] == "Split" and not byte_level["use_regex"]:
        split = steps[0]
        plain = split["behavior"] in ("Isolated", "Removed") and split["invert"] == (split["behavior"] == "Removed")
        return split["pattern"].get("Regex") if plain else None
    return None


def _same_merges(words: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Conditions 1 and 2 of ``as_tiktoken``."""
    unions = [words.get(a + b, -1) for a, b in merges]
    if -1 in unions or unions != sorted(unions):
        return False
    listed = {merge: position for position, merge in enumerate(merges)}
    by_union = defaultdict(list)
    for word in words:
        for cut in range(1, len(word)):
            pair = (word[:cut], word[cut:])
            if pair[0] in words and pair[1] in words:
                if pair not in listed:
                    return False
                by_union[word].append(pair)
    return not any(
        left[1] == right[0] and listed[left] > listed[right]
        for pairs in by_union.values()
        for left in pairs
        for right in pairs
    )


def _words_merge_whole(words: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether merging the characters of each word gives that one word."""
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=merges))
    encodings = bare.encode_batch_fast(list(words), add_special_tokens=False)
    return all(encoding.ids == [id] for encoding, id in zip(encodings, words.values(), strict=True))


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
