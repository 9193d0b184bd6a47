"""A model and the words it speaks, from wherever it lies: a run, a checkpoint, a ``transformers`` folder or the hub."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cheaper.checkpoints import find_model, is_checkpoint, load_decoder, model_record
from cheaper.data.chat import ChatTemplate
from cheaper.data.formats import UnusableRow
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.errors import UserError
from cheaper.generation import Sampling, continuations, next_tokens
from cheaper.models.decoder import Decoder

Prompt = str | list[dict[str, str]]  # text to continue, or the messages of a chat to answer
UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


@dataclass
class LanguageModel:
    """What generation, evaluation and export need of a model.

    Args:
        decoder: In eval mode.
        tokenizer: With the words it was trained on.
        tokenizer_source: Where the tokenizer came from.
        template_name: As ``data.chat_template`` has it.
        source: The checkpoint or folder of the weights.
        begins_with_bos: Whether BOS comes before every text, as in this package's training.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    tokenizer_source: str
    template_name: str
    source: Path
    begins_with_bos: bool = True

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """How chats become tokens.

        Raises:
            UserError: The model has no chat template.
        """
        return ChatTemplate.load(self.template_name, self.tokenizer_source, self.tokenizer)

    @property
    def start(self) -> list[int]:
        """What comes before every text: BOS or nothing."""
        return [self.tokenizer.bos_id] if self.begins_with_bos and self.tokenizer.bos_id is not None else []

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, after BOS if the model has one, or of a chat up to the assistant's turn.

        Raises:
            UserError: The chat template refuses the messages.
        """
        if isinstance(prompt, str):
            ids = self.start + self.tokenizer.encode(prompt).tolist()
            if not ids:
                raise UserError("the prompt is empty, and the model's tokenizer has no token that begins a text")
            return ids
        try:
            return self.template.prompt(prompt).tolist()
        except UnusableRow as error:
            raise UserError(f"{self.template.name}: {error}") from None

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """Continues texts and answers chats, all in one batch.

        Args:
            prompts: Texts, or lists of messages with ``role`` and ``content``.
            max_new_tokens: How many tokens to add to each at most.
            temperature: 0 takes the most likely token each time.
            top_p: The mass of the most likely words that are drawn from.
            stop: Texts before which a continuation ends.
            seed: Of the draws.

        Returns:
            What comes after each prompt, without the token that ended it.
        """
        words = self.tokenizer.vocab_size
        sampling = Sampling(max_new_tokens, temperature, top_p, self._stop_ids(prompts), seed, words)
        texts = continuations(self.decoder, [self.encode(prompt) for prompt in prompts], sampling)
        return [_until(self.tokenizer.decode(text), stop)[0] for text in texts]

    def stream(self, prompt: Prompt, sampling: Sampling, stop: Sequence[str] = ()) -> Iterator[str]:
        """Continues one prompt piece by piece, each as soon as its characters are whole and cannot begin a ``stop``."""
        words = self.tokenizer.vocab_size
        sampling = dataclasses.replace(sampling, stop_ids=self._stop_ids([prompt]), words=words)
        tokens = (token for (token,) in next_tokens(self.decoder, [self.encode(prompt)], sampling))
        text, shown, held = "", 0, max((len(text) for text in stop), default=1) - 1
        for piece in self._pieces(tokens):
            text, stopped = _until(text + piece, stop)
            if stopped:
                break
            if len(text) - held > shown:
                yield text[shown : len(text) - held]
                shown = len(text) - held
        if text[shown:]:
            yield text[shown:]

    def _pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token adds, as soon as its characters are whole.

        A token may read otherwise at the beginning of a text, so each is decoded after the tokens of the piece before.
        """
        ids: list[int] = []
        before = after = 0  # where the former piece and the new one begin
        for token in tokens:
            ids.append(token)
            piece = self._added(ids[before:], after - before)
            if not piece.endswith(UNFINISHED):
                yield piece
                before, after = after, len(ids)
        yield self._added(ids[before:], after - before)

    def _added(self, ids: list[int], known: int) -> str:
        """What the tokens after the first ``known`` add to their text."""
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(ids[:known])) :]

    def _stop_ids(self, prompts: Sequence[Prompt]) -> list[int | None]:
        is_chat = any(not isinstance(prompt, str) for prompt in prompts)
        return [self.tokenizer.eos_id, *([self.template.end_of_turn_id] if is_chat else [])]


def generate(model: str | LanguageModel, prompts: Sequence[Prompt], **settings: Any) -> list[str]:
    """Continues texts and answers chats; ``settings`` are those of ``LanguageModel.generate``.

    Args:
        model: A model, or where one lies, see ``load_model``.
        prompts: Texts, or lists of messages with ``role`` and ``content``.
        settings: Such as ``max_new_tokens`` and ``temperature``.

    Returns:
        What comes after each prompt.
    """
    return (load_model(model) if isinstance(model, str) else model).generate(prompts, **settings)


def _until(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """``text`` as far as the first of ``stop``, and whether there is one."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def load_model(
    path: str, tokenizer: str | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Loads a model with its tokenizer.

    Args:
        path: A run folder (its newest checkpoint), a checkpoint, a ``transformers`` folder or a hub id.
        tokenizer: Instead of the model's own: a folder, a hub id or a tiktoken ``.model`` file.
        device: Such as ``cuda``; by default a GPU where there is one.
        dtype: Of the weights; by default bf16 on a GPU, else as they are.

    Raises:
        UserError: Nothing is there, it is not readable, or it has no tokenizer.

    Example::

        model = load_model("runs/quickstart-reasoning-sft")
        print(model.generate([[{"role": "user", "content": "What is 7 + 8 + 5?"}]])[0])
    """
    source = find_model(path, "model")
    tokenizer_source, template = _speaks(source, tokenizer)
    words = load_tokenizer(tokenizer_source)
    decoder = load_decoder(source)
    if words.vocab_size > decoder.config.vocab_size:
        has = f"has {decoder.config.vocab_size} words, its tokenizer {tokenizer_source} {words.vocab_size}"
        raise UserError(f"model {path}: {has}; expected at least as many")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else decoder.output_weight.dtype)
    decoder = decoder.to(device, dtype).requires_grad_(False).eval()
    begins = model_record(source).get("begins_with_bos", True) if is_checkpoint(source) else words.adds_bos
    return LanguageModel(decoder, words, tokenizer_source, template, source, begins)


def _speaks(source: Path, tokenizer: str | None) -> tuple[str, str]:
    """The tokenizer of the model at ``source``, and its chat template."""
    if not is_checkpoint(source):
        if tokenizer is None and not (source / "tokenizer.json").is_file():
            raise UserError(f"model {source}: has no tokenizer.json; name a tokenizer with --tokenizer")
        return tokenizer or str(source), "tokenizer"
    if (run := source.parent / "run.yaml").is_file():
        data = yaml.safe_load(run.read_text())["data"]
        return tokenizer or data["tokenizer"], data["chat_template"]
    if tokenizer is None:
        raise UserError(f"model {source}: there is no {run} that says its tokenizer; name one with --tokenizer")
    return tokenizer, "llama3"
