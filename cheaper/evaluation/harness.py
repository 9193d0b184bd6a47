"""Our models in EleutherAI's evaluation harness, without a detour over ``transformers``.

Log-likelihoods make logits only where a continuation is, in chunks; texts are generated with keys and values kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from composer.utils import dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cheaper.data.formats import UnusableRow
from cheaper.errors import UserError
from cheaper.evaluation.processes import is_first, share, together
from cheaper.generation import Sampling, next_tokens
from cheaper.language_model import LanguageModel, load_model
from cheaper.models.decoder import whole

CHUNK = 512  # tokens whose logits exist at once
MAX_NEW_TOKENS = 256  # where neither the task nor the user says; the harness's own

Scored = tuple[Any, list[int], list[int]]  # what was asked, and the tokens of its context and continuation


@register_model("cheaper")
class CheaperLM(TemplateLM):
    """A decoder of ours as the harness wants it: ``lm_eval --model cheaper`` once this module is imported.

    Every text begins with BOS where the tokenizer has one, as in training and as Llama 3's tokenizer does by itself in
    ``transformers``. A text that spells a special token stays text; only the chat template writes special tokens.

    Under ``torchrun`` the processes share the requests, and all have all answers: to the harness they are one process,
    so that examples are drawn and rows are batched as in one.

    Args:
        pretrained: A model, or where one lies, see ``load_model``.
        tokenizer: Instead of the model's own.
        batch_size: Rows at once.
        device: By default the process's GPU where there is one.
        max_new_tokens: Instead of what the tasks say.
        seed: Of the draws, where a task draws.
        divides: Whether processes share the requests; each has all of them where the model is divided instead.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        tokenizer: str | None = None,
        batch_size: int = 16,
        device: str | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        divides: bool = True,
    ):
        super().__init__()
        self.divides = divides
        if isinstance(pretrained, str):
            if device is None and torch.cuda.is_available():
                device = f"cuda:{dist.get_local_rank()}"
            pretrained = load_model(pretrained, tokenizer, device)
        self.model, self.decoder, self.words = pretrained, pretrained.decoder, pretrained.tokenizer
        self.batch_size, self.max_new_tokens, self.seed = int(batch_size), max_new_tokens, seed
        self.max_length = self.decoder.config.max_position_embeddings
        self._device = self.decoder.device
        self._chats: dict[str, list[int]] = {}  # token ids of the chats that the harness knows as text

    # What the harness asks of every model.

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.words.eos_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer_source.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat up to the assistant's turn, or with a turn of the assistant's that has only begun."""
        begun = [] if add_generation_prompt else [chat_history[-1]]
        try:
            ids = self.model.template.prompt(chat_history[: len(chat_history) - len(begun)]).tolist()
        except UnusableRow as error:
            raise UserError(f"{self.model.template.name}: {error}") from None
        for message in begun:
            ids += self.words.encode(message["content"]).tolist()
        text = self.words.decode(ids)
        self._chats[text] = ids
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a chat or, after BOS, of a text."""
        if string in self._chats:
            return list(self._chats[string])
        start = [] if add_special_tokens is False else self.model.start
        return start + self.words.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:
            return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
        return super()._encode_pair(context, continuation)

    # Log-likelihoods.

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is the most likely, token by token."""
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)  # the requests that a row of tokens answers
        for number, (_, context, continuation) in enumerate(requests):
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        batches = list(_batches(sorted(sharing, key=len, reverse=True), self.batch_size))
        answers: dict[int, tuple[float, bool]] = {}
        for rows in self._progress("log-likelihoods", self._mine(batches), disable_tqdm):
            asked = [(row, number) for row, tokens in enumerate(rows) for number in sharing[tokens]]
            continuations = [requests[number][2][-len(rows[row]) :] for row, number in asked]
            scores = self._score(rows, [row for row, _ in asked], continuations)
            answers |= {number: score for (_, number), score in zip(asked, scores, strict=True)}
        return list(_in_order(together(answers) if self.divides else answers))

    @torch.inference_mode()
    def _score(
        self, rows: Sequence[Sequence[int]], owners: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Scores continuations, each of which ends one token after the row that its owner names."""
        hidden_BTD = self.decoder.hidden(self._padded(rows))
        places = [
            (owner, place)
            for owner, words in zip(owners, continuations, strict=True)
            for place in range(len(rows[owner]) - len(words), len(rows[owner]))
        ]
        rows_N, places_N = torch.tensor(places, device=self.device).T
        words_N = torch.tensor([word for words in continuations for word in words], device=self.device)
        hidden_ND, weight_VD = hidden_BTD[rows_N, places_N], whole(self.decoder.output_weight)
        log_p_N, greedy_N = word_log_probabilities(hidden_ND, weight_VD, words_N)
        lengths = [len(words) for words in continuations]
        parts = zip(log_p_N.cpu().split(lengths), greedy_N.cpu().split(lengths), strict=True)
        return [(log_p.sum().item(), greedy.all().item()) for log_p, greedy in parts]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows where it is longer than the context."""
        windows: list[tuple[int, Scored]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((number, (None, *make_disjoint_window(window))))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
        for (number, _), (log_p, _) in zip(windows, scores, strict=True):
            totals[number] += log_p
        return totals

    # Texts.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context as its task says, up to the first of the task's ends."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1]) + str(request.args[0] in self._chats)].append(number)
        batches = [batch for numbers in groups.values() for batch in self._longest_first(requests, numbers)]
        texts: dict[int, str] = {}
        for batch_number, numbers in self._progress("texts", self._mine(list(enumerate(batches))), disable_tqdm):
            contexts, settings = [requests[number].args[0] for number in numbers], requests[numbers[0]].args[1]
            answers = self._continue(contexts, settings, self.seed + batch_number)
            texts |= dict(zip(numbers, answers, strict=True))
        return list(_in_order(together(texts) if self.divides else texts))

    def _longest_first(self, requests: list[Instance], numbers: list[int]) -> Iterator[Sequence[int]]:
        """Batches, those of the longest contexts first: what is too large fails at once."""
        by_length = sorted(numbers, key=lambda number: len(requests[number].args[0]), reverse=True)
        return _batches(by_length, self.batch_size)

    def _continue(self, contexts: list[str], settings: dict[str, Any], seed: int) -> list[str]:
        wanted = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        most = self.max_new_tokens or wanted["max_gen_toks"]
        room = self.max_length - most if most < self.max_length else self.max_length // 2
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        sampling = Sampling(
            max_new_tokens=min(most, self.max_length - max(map(len, prompts))),
            temperature=wanted["temperature"] if wanted["do_sample"] else 0.0,
            top_p=wanted.get("top_p", 1.0),
            stop_ids=[self.words.eos_id, self.model.template.end_of_turn_id if contexts[0] in self._chats else None],
            seed=seed,
        )
        until = [end for end in wanted["until"] if end]
        return [_before(text, until) for text in self._texts(prompts, sampling, until)]

    def _texts(self, prompts: list[list[int]], sampling: Sampling, until: list[str]) -> list[str]:
        """Continuations as far as one of ``until`` at least, without special tokens and ids that are no words."""
        special = set(self.words.special_tokens.values())
        ids: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        tail = max((len(end.encode()) for end in until), default=0) + 4  # tokens; each has a byte or more
        for tokens in next_tokens(self.decoder, prompts, sampling):
            for number, token in enumerate(tokens):
                if token is None:
                    ended[number] = True
                elif not ended[number] and token not in special and token < self.words.vocab_size:
                    ids[number].append(token)
                    newest = self.words.decode(ids[number][-tail:]) if until else ""
                    ended[number] = any(end in newest for end in until)
            if all(ended):
                break
        return [self.words.decode(text) for text in ids]

    def _mine(self, batches: Sequence[Any]) -> Sequence[Any]:
        return share(batches) if self.divides else batches

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)

    def _progress(self, what: str, batches: Sequence[Any], disable: bool) -> tqdm:
        return tqdm(batches, desc=what, unit="batch", disable=disable or not is_first())


def word_log_probabilities(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, words_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model gives to each word, with the logits of ``CHUNK`` tokens at a time.

    Args:
        hidden_ND: Hidden states that predict the words.
        weight_VD: The output matrix.
        words_N: int64 token ids.

    Returns:
        Log-probabilities in nats, fp32 [N], and whether each word is the most likely, bool [N].
    """
    log_p, greedy = [], []
    for hidden, words in zip(hidden_ND.split(CHUNK), words_N.split(CHUNK), strict=True):
        logits_CV = F.linear(hidden, weight_VD).float()
        log_p.append(logits_CV.gather(1, words[:, None])[:, 0] - logits_CV.logsumexp(1))
        greedy.append(logits_CV.argmax(1) == words)
    return torch.cat(log_p), torch.cat(greedy)


def _before(text: str, until: list[str]) -> str:
    return text[: min((place for place in map(text.find, until) if place >= 0), default=None)]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _in_order(answers: dict[int, Any]) -> Iterator[Any]:
    return (answers[number] for number in range(len(answers)))
