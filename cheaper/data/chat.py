"""Chats as tokens, with loss on what the assistant says and nowhere else.

A chat is a list of messages with a ``role`` and a ``content``; a Jinja template decides their text. Loss lies on what
the template puts between its tags ``{% generation %}`` and ``{% endgeneration %}``, which are taken at their word. A
template without them is rendered up to each assistant's turn, with its generation prompt, and up to that turn's end:
what is added in between is the assistant's, as far as its last special token where only white space follows.

Text becomes tokens piece by piece. A piece ends at each special token, and where loss begins or ends, for there the
model begins at inference, after a prompt that ended just so. Only special tokens that the *template* writes become
their ids; a message that spells one stays text.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np
from jinja2 import nodes

from cheaper.data.formats import UnusableRow
from cheaper.data.tokenize import Tokenizer
from cheaper.errors import UserError, did_you_mean

SHIPPED = Path(__file__).parent / "chat_templates"
BEGINS, ENDS = "_generation_begins", "_generation_ends"  # variables of a template, see _Marks
# Code points that are no characters; a chat rarely has one, and never all.
PRIVATE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class EncodedChat:
    """A chat's tokens, and which of them the model learns."""

    ids: np.ndarray  # uint32 [T]
    loss: np.ndarray  # bool [T]


class ChatTemplate:
    """Turns chats into tokens. May be pickled.

    Args:
        source: The template in Jinja; its variables are those that ``transformers`` gives.
        tokenizer: What its text becomes tokens with.
        name: Where it came from, for messages.

    Raises:
        UserError: The template does not compile.

    Example::

        template = ChatTemplate.load("llama3", "data/sample/tokenizer", tokenizer)
        chat = template.encode([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}])
        tokenizer.decode(chat.ids[chat.loss])  # "2<|eot_id|>"
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "chat template"):
        self.source, self.tokenizer, self.name = source, tokenizer, name
        try:
            tree = _environment().parse(source)
            self._template = _environment().from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno}: {_one_line(error)}") from None
        self._has_tags = any(variable.name == BEGINS for variable in tree.find_all(nodes.Name))
        boundaries = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._variables = {key: tokenizer.decode([id]) for key, id in boundaries.items() if id is not None}
        self._special = tokenizer.special_tokens | {text: boundaries[key] for key, text in self._variables.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        spellings = "|".join(map(re.escape, longest_first))
        self._spelled = re.compile(f"({spellings})")
        self._spelling_begins = re.compile(f"(?={spellings}).", re.DOTALL)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.source, self.tokenizer, self.name)  # a compiled template cannot be pickled

    @classmethod
    def load(cls, name_or_path: str, tokenizer_source: str, tokenizer: Tokenizer) -> ChatTemplate:
        """Finds a template.

        Args:
            name_or_path: ``llama3``, ``tokenizer`` for the tokenizer's own, or a ``.jinja`` file.
            tokenizer_source: Where the tokenizer came from: a folder, or a hub id.
            tokenizer: What it will be used with.

        Raises:
            UserError: There is no such template, it does not compile, or the tokenizer lacks its special tokens.
        """
        if name_or_path == "tokenizer":
            return cls(_own_template(tokenizer_source), tokenizer, f"chat template of {tokenizer_source}")
        shipped = {path.stem: path for path in SHIPPED.glob("*.jinja")}
        path = shipped.get(name_or_path, Path(name_or_path))
        if path.suffix != ".jinja":
            hint = did_you_mean(name_or_path, [*shipped, "tokenizer"])
            raise UserError(f"chat template {name_or_path}: no such template and no .jinja file{hint}")
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat template {path} cannot be read ({_one_line(error)})") from None
        if name_or_path in shipped:
            missing = sorted(set(re.findall(r"<\|\w+\|>", source)) - tokenizer.special_tokens.keys())
            if missing:
                raise UserError(
                    f"chat template {name_or_path} writes {missing[0]}, which is no special token of tokenizer"
                    f" {tokenizer.name}; choose one that fits it, such as its own: tokenizer"
                )
        return cls(source, tokenizer, f"chat template {name_or_path}")

    def encode(self, messages: list[Mapping[str, Any]]) -> EncodedChat:
        """The tokens of a whole chat; BOS comes first even if the template writes none, and EOS only if it does.

        Args:
            messages: Dicts with ``role`` and ``content``, both text. Other keys are left out.

        Raises:
            UnusableRow: It is no such list, the template refuses it or rewrites earlier turns, or nothing has loss.
        """
        chat, marks = self._protect(messages)
        if all(message["role"] != "assistant" for message in chat):
            raise UnusableRow("no assistant turn")
        encoded = self._tokenise(self._split(chat, self._render(chat, marks), marks), marks)
        if not encoded.loss.any():
            raise UnusableRow("no token has loss: the chat template marks nothing of what the assistant says")
        return encoded

    def prompt(self, messages: list[Mapping[str, Any]]) -> np.ndarray:
        """Token ids, uint32, after which the model is to answer: ``encode``'s as far as that answer's first token.

        Raises:
            UnusableRow: It is no list of messages, or the template refuses it.
        """
        chat, marks = self._protect(messages)
        text = self._render(chat, marks, add_generation_prompt=True)
        try:
            parts = self._split(chat, text, marks)
        except UnusableRow:  # rewritten turns are fine in a prompt; nothing was learned after them
            parts = [(text, False)]
        return self._tokenise(parts, marks).ids

    @functools.cached_property
    def end_of_turn_id(self) -> int | None:
        """The special token that ends what the assistant says, if the template ends it with one.

        Raises:
            UserError: The template refuses even the plainest chat.
        """
        chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        try:
            encoded = self.encode(chat)
        except UnusableRow as error:
            raise UserError(f"{self.name}: {error}") from None
        last = int(encoded.ids[encoded.loss][-1])
        return last if last in self._special.values() else None

    def _protect(self, messages: Any) -> tuple[list[dict[str, str]], _Marks]:
        """Checks a chat and breaks what it spells of special tokens."""
        if not isinstance(messages, list):
            raise UnusableRow(f"messages are {type(messages).__name__}, expected a list")
        if not messages:
            raise UnusableRow("no messages")
        for message in messages:
            if not isinstance(message, Mapping):
                raise UnusableRow(f"a message is {type(message).__name__}, expected a role and a content")
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    kind = type(message[key]).__name__ if key in message else "missing"
                    raise UnusableRow(f"the {key} of a message is {kind}, expected text")
        text = "".join(message[key] for message in messages for key in ("role", "content"))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell lone surrogates, which are no text
            raise UnusableRow(_one_line(error)) from None
        marks = _Marks.absent_from(text + self.source)
        chat = [{key: self._break(message[key], marks) for key in ("role", "content")} for message in messages]
        return chat, marks

    def _break(self, text: str, marks: _Marks) -> str:
        # The first search is many times faster than the second, and hardly ever finds anything.
        return self._spelling_begins.sub(rf"\g<0>{marks.breaks}", text) if self._spelled.search(text) else text

    def _render(self, chat: list[dict[str, str]], marks: _Marks, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=chat,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
                **{BEGINS: marks.begins, ENDS: marks.ends},
            )
        except Exception as error:  # whatever a template can raise
            raise UnusableRow(f"the chat template refuses it: {_one_line(error)}") from None

    def _split(self, chat: list[dict[str, str]], text: str, marks: _Marks) -> list[tuple[str, bool]]:
        """Cuts a rendered chat where loss begins and ends: pieces of text, and whether they have loss."""
        if self._has_tags:
            parts = re.split(f"[{marks.begins}{marks.ends}]", text)
            return [(part, i % 2 == 1) for i, part in enumerate(parts)]
        parts, done = [], 0
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._render(chat[:i], marks, add_generation_prompt=True)
            after = self._render(chat[: i + 1], marks)
            if not after.startswith(before):
                raise UnusableRow("the chat template does not begin an assistant's turn with its generation prompt")
            if not text.startswith(after) or len(before) < done:
                raise UnusableRow("the chat template rewrites earlier turns")
            end = len(before) + self._length_of_turn(after[len(before) :])
            parts += [(text[done : len(before)], False), (text[len(before) : end], True)]
            done = end
        return [*parts, (text[done:], False)]

    def _length_of_turn(self, text: str) -> int:
        """Without the white space that the template, not the model, writes after the end-of-turn token."""
        *_, end = 0, *(match.end() for match in self._spelled.finditer(text))
        return end if end and not text[end:].strip() else len(text)

    def _tokenise(self, parts: Iterable[tuple[str, bool]], marks: _Marks) -> EncodedChat:
        pieces = [
            (piece.replace(marks.breaks, ""), i % 2 == 1, loss)
            for text, loss in parts
            for i, piece in enumerate(self._spelled.split(text))  # text, special token, text, …
            if piece
        ]
        encoded = iter(self.tokenizer.encode_batch([text for text, special, _ in pieces if not special]))
        ids = [np.array([self._special[text]], np.uint32) if special else next(encoded) for text, special, _ in pieces]
        loss = [loss for _, _, loss in pieces]
        if self._lacks_bos(ids):
            ids, loss = [np.array([self.tokenizer.bos_id], np.uint32), *ids], [False, *loss]
        lengths = np.array([len(piece) for piece in ids], np.int64)
        return EncodedChat(np.concatenate([*ids, np.empty(0, np.uint32)]), np.repeat(np.array(loss, bool), lengths))

    def _lacks_bos(self, ids: list[np.ndarray]) -> bool:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        looked_at = ids[:1] if bos == eos else ids  # where it is EOS too, one further on begins nothing
        return bos is not None and not any(bos in piece for piece in looked_at)


@dataclass(frozen=True)
class _Marks:
    """Characters that are nowhere in a chat. They come and go between a message and its tokens."""

    breaks: str  # in what a message spells of special tokens, so that it is none
    begins: str  # where {% generation %} stands
    ends: str  # where {% endgeneration %} stands

    @classmethod
    def absent_from(cls, text: str) -> _Marks:
        return cls(*itertools.islice((chr(code) for code in PRIVATE if chr(code) not in text), 3))


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``: writes a mark before and after."""

    tags = {"generation"}  # noqa: RUF012  jinja2 has it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (nodes.Output([nodes.Name(name, "load")]) for name in (BEGINS, ENDS))
        return nodes.Scope([begins, *body, ends]).set_lineno(line)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates written for ``transformers`` expect."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes for HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _own_template(tokenizer_source: str) -> str:
    """The template that comes with a tokenizer."""
    template = _file_of(tokenizer_source, "chat_template.jinja")
    if template is None:
        try:
            template = json.loads(_file_of(tokenizer_source, "tokenizer_config.json") or "{}").get("chat_template")
            if isinstance(template, list):
                template = {each["name"]: each["template"] for each in template}.get("default")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"tokenizer_config.json is not what it should be ({error})"
            raise UserError(f"chat template tokenizer: {tokenizer_source}: {why}") from None
    if not isinstance(template, str):
        raise UserError(f"chat template tokenizer: {tokenizer_source} has none; choose llama3 or a .jinja file")
    return template


def _file_of(tokenizer_source: str, name: str) -> str | None:
    """What a file of a tokenizer's folder or hub repository holds, if it is there."""
    path = Path(tokenizer_source)
    if path.exists() or tokenizer_source.startswith((".", "/")):
        return (path / name).read_text(encoding="utf-8") if (path / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(tokenizer_source, name)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise UserError(f"chat template tokenizer: {tokenizer_source} cannot be read ({_one_line(error)})") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
