"""Our wrapper beside the harness's own one of ``transformers``, on the same weights."""

import dataclasses
import random

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance

from cheaper.evaluation.benchmarks import find_benchmarks, load_tasks
from cheaper.evaluation.harness import CheaperLM, word_log_probabilities
from tests.evaluation.conftest import sentence


@pytest.fixture(scope="module")
def ours(model_folder):
    return CheaperLM(str(model_folder), batch_size=8)


@pytest.fixture(scope="module")
def theirs(model_folder):
    pytest.importorskip("accelerate", reason="the harness's wrapper of transformers needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(model_folder), batch_size=8, device="cpu", dtype="float32", max_length=1024)


def requests(kind, *arguments):
    return [Instance(kind, {}, argument, idx) for idx, argument in enumerate(arguments)]


@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "mmlu"])
def test_same_log_likelihoods_and_accuracy(name, ours, theirs, data_dir):
    (benchmark,) = find_benchmarks([name])
    scores, log_ps = [], []
    for lm in (ours, theirs):
        loaded = load_tasks(benchmark, data_dir, seed=0)
        figures = evaluator.evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)
        answers = [sample["resps"] for task in sorted(figures["samples"]) for sample in figures["samples"][task]]
        log_ps.append(torch.tensor([[choice[0][0] for choice in answer] for answer in answers]))
        scores.append(figures["results"][name][f"{benchmark.metric},none"])
    assert len(log_ps[0]) >= 200
    torch.testing.assert_close(log_ps[0], log_ps[1], atol=1e-3, rtol=0)
    assert scores[0] == scores[1]


def test_same_answers_of_gsm8k(ours, theirs, data_dir):
    (benchmark,) = find_benchmarks(["gsm8k"])
    benchmark = dataclasses.replace(benchmark, max_new_tokens=6)
    texts, scores = [], []
    for lm in (ours, theirs):
        loaded = load_tasks(benchmark, data_dir, seed=0)
        figures = evaluator.evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)
        texts.append([sample["resps"][0][0] for sample in figures["samples"]["gsm8k"]])
        scores.append(figures["results"]["gsm8k"]["math_verify,samples"])
    assert len(texts[0]) == 200
    assert texts[0] == texts[1]
    assert scores[0] == scores[1]


def test_same_greedy_texts(ours, theirs):
    rng = random.Random(1)
    contexts, settings = [sentence(rng, 40) for _ in range(24)], {"max_gen_toks": 20, "do_sample": False}
    free = ours.generate_until(requests("generate_until", *((context, settings) for context in contexts)))
    settings = {**settings, "until": [free[0][5:7], free[1][8:11]]}
    asked = [(context, settings) for context in contexts]
    texts = ours.generate_until(requests("generate_until", *asked))
    assert texts == theirs.generate_until(requests("generate_until", *asked))
    assert free[0].startswith(texts[0])
    assert len(texts[0]) <= 5
    assert len(set(texts)) > 1


def test_same_greedy_answers(ours, theirs):
    contexts = ["the model", "a", "tokens and learns which word", " ß 7"]
    settings = {"until": [], "max_gen_toks": 1, "do_sample": False}
    words = ours.generate_until(requests("generate_until", *((context, settings) for context in contexts)))
    asked = requests("loglikelihood", *zip(contexts, words, strict=True))
    answers = ours.loglikelihood(asked)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in theirs.loglikelihood(asked)]
    assert any(greedy for _, greedy in answers)


def test_texts_longer_than_the_context(ours, theirs):
    rng = random.Random(2)
    long = " ".join(sentence(rng) for _ in range(400))
    assert len(ours.tok_encode(long)) > 1024
    rolling = requests("loglikelihood_rolling", (long,), ("the model",))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-2)
    pairs = requests("loglikelihood", (long, " the model"), ("", "the model"))
    ours_answers, theirs_answers = ours.loglikelihood(pairs), theirs.loglikelihood(pairs)
    assert [p for p, _ in ours_answers] == pytest.approx([p for p, _ in theirs_answers], abs=1e-3)


def test_rows_that_answer_several_requests_are_computed_once(ours, monkeypatch):
    rows = []
    hidden = ours.decoder.hidden
    monkeypatch.setattr(ours.decoder, "hidden", lambda ids: rows.append(len(ids)) or hidden(ids))
    ours.loglikelihood(requests("loglikelihood", *(("the model", choice) for choice in ".,:;")))
    assert sum(rows) == 1


def test_words_are_scored_in_chunks(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, words = torch.randn(11, 8), torch.randn(50, 8), torch.randint(50, (11,))
    monkeypatch.setattr("cheaper.evaluation.harness.CHUNK", 4)
    log_p, greedy = word_log_probabilities(hidden, weight, words)
    logits = hidden @ weight.T
    torch.testing.assert_close(log_p, logits.log_softmax(-1)[torch.arange(11), words])
    assert greedy.equal(logits.argmax(-1) == words)


def test_a_chat_is_the_template_s_tokens(ours):
    messages = [{"role": "user", "content": "1 + 1? </s>"}]
    text = ours.apply_chat_template(messages)
    assert text == "<s>user: 1 + 1? </s></s>assistant: "
    ids = ours.tok_encode(text)
    assert ids == ours.model.template.prompt(messages).tolist()
    assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, 1)  # BOS once; what the user spells is no EOS
    assert ours._encode_pair(text, "2") == (ids, ours.words.encode("2").tolist())


def test_drawn_samples_differ_and_a_seed_repeats_them(ours):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *[("the model", settings)] * 20)
    texts = ours.generate_until(asked)
    assert len(set(texts)) > 10
    assert texts == ours.generate_until(asked)
