"""Passes without padding and rows that come and go: what is shared is shared, and no answer depends on it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlaif.engines import cpu, packed, writing
from rlaif.engines.cpu import lay_out
from rlaif.engines.packed import PACKED, SHARED, Forest, Piece, Readers, _parts, lacking, packs, read, to_read
from rlaif.engines.transformers import TransformersEngine
from rlaif.records import Completion, FatalError, Request, RowError
from tests.engines.tiny import save_tiny, tiny_tokenizer

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 258,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def user(content: str, **how: Any) -> Request:
    return Request(({"role": "user", "content": content},), **how)


def make(folder: str, **how: Any) -> TransformersEngine:
    return TransformersEngine(folder, "fp32", "cpu", **how)


def ask(engine: Any, requests: list[Request], close: bool = True) -> list[Any]:
    async def all_of_them() -> list[Any]:
        try:
            return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)
        finally:
            if close:
                await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


# ------------------------------------------------------------ pieces


def text(draw: random.Random, parts: list[list[int]]) -> list[int]:
    return [token for _ in range(draw.randint(1, 4)) for token in draw.choice(parts)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3))
def test_pieces_make_up_their_prompts(seed: int, count: int, waves: int) -> None:
    """Prompts that begin alike, are equal, or begin another; in waves, so that kept beginnings are met again."""
    draw = random.Random(seed)
    parts = [[n] * draw.choice([1, 5, 15, 16, 17, 40]) for n in range(5)]
    forest = Forest()
    for _ in range(waves):
        prompts = [text(draw, parts) for _ in range(count)]
        planted = forest.plant(prompts)
        assert sorted(n for n, _ in planted) == list(range(count))
        assert len({leaf for _, leaf in planted}) == count
        for n, leaf in planted:
            assert [token for piece in leaf.path for token in piece.ids] == prompts[n]
            assert leaf.ids
        for one, first in planted:
            for other, second in planted:
                if one < other:
                    alike = next(
                        (n for n, (a, b) in enumerate(zip(prompts[one], prompts[other], strict=False)) if a != b), 10**6
                    )
                    alike = min(alike, len(prompts[one]) - 1, len(prompts[other]) - 1)
                    common = sum(len(piece.ids) for piece in first.path if piece in second.path)
                    assert common <= alike < common + 2 * SHARED  # a kept beginning may stop short of what a pair has


def test_beginnings_are_kept_for_prompts_to_come() -> None:
    """Two templates by turns; with one row in flight, whose prompts share more than their template, with the next row's too."""
    forest = Forest()
    waves = [[[t] * 100 + [n] * 20 + [m] for m in (10, 11)] for n in range(2, 6) for t in (0, 1)]
    roots = [[leaf.path[0] for _, leaf in forest.plant(wave)] for wave in waves]
    assert all(first is second for first, second in roots)
    assert len({first for first, _ in roots[2:]}) == 2
    assert all(len(first.ids) == 100 for first, _ in roots[2:])
    (_, alone), *_ = forest.plant([[1] * 100 + [7]])
    assert alone.parent is roots[-1][0]


def model(kind: Any, config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**SIZES, **more)).eval()


@torch.inference_mode()
def test_a_pass_is_as_good_as_alone() -> None:
    lm, draw, forest = model(LlamaForCausalLM, LlamaConfig), random.Random(0), Forest()
    begin = [[draw.randrange(256) for _ in range(n)] for n in (300, 30, 50)]  # longer than one block of queries
    prompts = [begin[0] + begin[n % 3] + [draw.randrange(256) for _ in range(draw.randint(1, 290))] for n in range(9)]
    for wave in (prompts[:6], prompts[3:]):
        planted = forest.plant(wave)
        pieces = lacking([leaf for _, leaf in planted])
        assert sum(len(piece.ids) for piece in pieces) < sum(map(len, wave)) - 300 * (len(wave) - 1) + 1
        for keep in (False, True):  # the second time only the leaves are left to compute
            found = read(lm, [leaf for _, leaf in planted], keep)
            for (n, _), logits in zip(planted, found, strict=True):
                assert torch.allclose(logits, lm(torch.tensor([wave[n]])).logits[0, -1], atol=1e-5)


@torch.inference_mode()
def test_a_pass_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(LlamaForCausalLM, LlamaConfig)
    root = Piece(list(range(20)))
    leaves = [Piece([1, 2], root), Piece([3], root)]
    expected = read(lm, [Piece(list(range(20)) + leaf.ids) for leaf in leaves])
    causal, calls = packed._causal, []

    def failing(*given: Any) -> torch.Tensor:
        calls.append(given)
        return causal(*given) if len(calls) < 5 else 1 / 0  # in the second layer

    with monkeypatch.context() as patch:
        patch.setattr(packed, "_causal", failing)
        with pytest.raises(ZeroDivisionError):
            read(lm, leaves)
    assert lm.config._attn_implementation == "sdpa"
    assert root.keys == []
    assert torch.allclose(read(lm, leaves), expected, atol=1e-5)


@pytest.fixture
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_cores")
def test_readers_beside_each_other_give_what_one_gives() -> None:
    """With pieces that several of them want at the same time, and not yet."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    draw = random.Random(3)
    parts = [[draw.randrange(259) for _ in range(20)] for _ in range(6)]
    prompts = [[*parts[0], *text(draw, parts), n] for n in range(60)]
    with torch.inference_mode():
        alone = torch.cat([read(model, [Piece(prompt)]) for prompt in prompts])
    readers = Readers(torch.device("cpu"))
    assert (readers.count, torch.get_num_threads()) == (3, 3)
    for most in (1, 40, 200, 10**6):
        planted = Forest().plant(prompts)
        found = readers.read(model, [leaf for _, leaf in planted], most)
        assert torch.allclose(found, alone[[n for n, _ in planted]], atol=1e-5)
    assert model.config._attn_implementation != PACKED
    readers.close()


@pytest.mark.usefixtures("three_cores")
def test_each_reader_has_its_share_of_the_cores() -> None:
    """In threads that begin to compute only afterwards; with more, all of them would sleep between loops."""
    torch.set_num_threads(3)
    readers = Readers(torch.device("cpu"))
    found = [readers._pool.submit(lambda: (torch.ones(10**6).sum().item(), torch.get_num_threads())[1]) for _ in range(9)]
    assert {each.result() for each in found} == {1}
    assert torch.get_num_threads() == 3
    readers.close()


@pytest.mark.usefixtures("three_cores")
def test_a_failure_is_raised_when_no_reader_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, running, most = model(LlamaForCausalLM, LlamaConfig), 0, 0

    def reading(lm: Any, leaves: list[Piece], keep: bool) -> torch.Tensor:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            if leaves[0].ids == [1]:
                raise ValueError("no")
            time.sleep(0.2)
            return torch.zeros(1, 1)
        finally:
            running -= 1

    monkeypatch.setattr(packed, "read", reading)
    readers = Readers(torch.device("cpu"))
    with pytest.raises(ValueError, match="no"):
        readers.read(lm, [Piece([n]) for n in range(3)], 1)
    assert (running, most > 1) == (0, True)
    assert lm.config._attn_implementation != PACKED
    readers.close()


needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU with instructions for bf16"
)


@needs_bf16
@torch.inference_mode()
def test_weights_laid_out_give_the_same() -> None:
    lm, rows = model(LlamaForCausalLM, LlamaConfig, attention_bias=True).bfloat16(), torch.arange(60).reshape(3, 20)
    with packed.float32_head(lm):
        expected = lm(rows).logits
    lay_out(lm)
    assert lm.model.layers[0].mlp.up_proj.weight.device.type == "meta"  # kept once, not twice
    with packed.float32_head(lm):
        assert torch.allclose(lm(rows).logits, expected, atol=0.05)
        assert not torch.allclose(lm(rows + 1).logits, expected, atol=0.5)
    laid_out = lm(rows).logits
    assert laid_out.dtype == torch.bfloat16  # the last layer is laid out again, too
    assert torch.allclose(laid_out.float(), expected, atol=0.1)


@needs_bf16
@torch.inference_mode()
def test_a_model_that_wants_its_weights_keeps_them() -> None:
    class Own(LlamaForCausalLM):
        def forward(self, input_ids: Any, **how: Any) -> Any:
            return super().forward(input_ids + int(self.model.layers[0].mlp.up_proj.weight.sum() * 0), **how)

    lm, rows = model(Own, LlamaConfig).bfloat16(), torch.arange(20)[None]
    expected = lm(rows).logits
    lay_out(lm)
    assert torch.equal(lm(rows).logits, expected)


@pytest.mark.usefixtures("three_cores")
def test_an_engine_of_several_readers_gives_the_same_labels(tiny: str) -> None:
    requests = [user(f"{'The same for all. ' * 5}Number {n % 7}? {'x' * n}", choices=("1", "2")) for n in range(40)]
    several = make(tiny, max_batch_tokens=64)
    assert several._readers.count == 3
    torch.set_num_threads(1)
    one = make(tiny)
    assert one._readers.count == 1
    for mine, other in zip(ask(several, requests), ask(one, requests), strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), max_size=12), st.integers(1, 300), st.integers(1, 4))
def test_parts_of_a_batch(families: list[tuple[int, int]], most: int, readers: int) -> None:
    """Each leaf is in one part, siblings are in the same one, and parts are neither long nor longest at the end."""
    root = Piece(list(range(20)), keys=[torch.zeros(1)])
    leaves = [Piece([n, m], question) for n, (length, several) in enumerate(families)
              for question in [Piece([n] * length, root)] for m in range(several)]  # fmt: skip
    parts = _parts(leaves, most, readers)
    assert sorted(id(leaf) for part in parts for leaf in part) == sorted(map(id, leaves))
    for part in parts:
        questions = {leaf.parent for leaf in part}
        assert sum(leaf.parent in questions for leaf in leaves) == len(part)
        assert len(questions) == 1 or to_read(part) <= most
    if parts:
        left = to_read(parts[-1])
        assert readers == 1 or len({leaf.parent for leaf in parts[-1]}) == 1 or left <= to_read(leaves) / (2 * readers)
        assert left <= to_read(parts[0]) or most < to_read(parts[0]) + left


def test_leaves_of_what_is_read_go_apart() -> None:
    read_already = Piece(list(range(20)), keys=[torch.zeros(1)])
    leaves = [Piece([n] * 10, read_already) for n in range(6)]
    assert [len(part) for part in _parts(leaves, 20, 1)] == [2, 2, 2]
    assert [len(part) for part in _parts(leaves, 20, 2)] == [1] * 6
    assert _parts([], 20, 2) == []


@needs_bf16
@torch.inference_mode()
@pytest.mark.parametrize("loud", [0.3, 1.0, 40.0], ids=["like a model's", "loud", "beyond e to them"])
@pytest.mark.parametrize(("before", "count"), [(0, 1), (0, 37), (5, 16), (300, 70), (64, 300)])
def test_attention_in_bf16(before: int, count: int, loud: float) -> None:
    """As in float32, whether or not e to a score is still a number; what is to come is not seen."""
    torch.manual_seed(1)
    queries = (torch.randn(2, count, 3, 16) * loud).bfloat16()
    keys, values = (torch.randn(2, before + count, 16) * loud).bfloat16(), torch.randn(2, before + count, 16).bfloat16()
    parts = [[part[:, :before], part[:, before:]] for part in (keys, values)]
    found = cpu.causal(queries, *parts)
    hidden = torch.ones(count, before + count).triu(before + 1).bool()
    scores = torch.einsum("hngw,hmw->hgnm", queries.float(), keys.float()).masked_fill(hidden, -torch.inf)
    exact = torch.einsum("hgnm,hmw->hngw", scores.softmax(-1), values.float())
    assert found.shape == queries.shape
    if loud < 10:  # beyond, the scores' own rounding moves all
        assert (found.float() - exact).abs().max() <= (0.03 if loud < 1 else 0.1)
    assert found.isfinite().all()
    keys[:, -1], values[:, -1] = 0, 50  # which only the last one sees
    assert count == 1 or torch.equal(cpu.causal(queries, *parts)[:, :-1], found[:, :-1])


@torch.inference_mode()
@pytest.mark.parametrize(("before", "count", "groups"), [(0, 1, 3), (0, 37, 1), (300, 70, 3), (64, 300, 2)])
def test_attention_on_other_devices_is_the_same(before: int, count: int, groups: int) -> None:
    torch.manual_seed(1)
    queries, keys = torch.randn(2, count, groups, 16), [torch.randn(2, n, 16) for n in (before, count)]
    values = [torch.randn(2, n, 16) for n in (before, count)]
    assert torch.allclose(packed._by_torch(queries, keys, values), cpu.causal(queries, keys, values), atol=1e-5)


@torch.inference_mode()
def test_shapes_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's library makes a program for each shape of a product: prompts of all lengths must not have one each."""
    seen = set()
    carefully = cpu._carefully

    def watched(queries: torch.Tensor, before: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        seen.add((queries.shape[1], keys.shape[2]))
        return carefully(queries, before, keys, values)

    monkeypatch.setattr(cpu, "_carefully", watched)
    lm = model(LlamaForCausalLM, LlamaConfig)
    for n in range(1, 49):
        read(lm, [Piece(list(range(n)))])
    assert seen == {(16, 32), (32, 32), (48, 64)}


@torch.inference_mode()
def test_which_models_pack() -> None:
    assert packs(model(LlamaForCausalLM, LlamaConfig))
    assert packs(model(Qwen2ForCausalLM, Qwen2Config))
    assert packs(model(MistralForCausalLM, MistralConfig, sliding_window=None))
    assert not packs(model(MistralForCausalLM, MistralConfig, sliding_window=4096))
    assert not packs(model(Gemma2ForCausalLM, Gemma2Config))
    assert not packs(model(Gemma2ForCausalLM, Gemma2Config, layer_types=["full_attention"] * 2))  # softcap


@torch.inference_mode()
def test_a_model_with_ways_of_its_own_does_not_pack() -> None:
    """One that mixes neighbours, as recurrent layers do, would mix what stands behind each other in a pass."""
    lm = model(LlamaForCausalLM, LlamaConfig)
    lm.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + out.roll(1, dims=1))
    assert not packs(lm)


# ------------------------------------------------------------ writing

MIXED = [
    user(f"Tell me about {'this and ' * (n % 4)}{n}.", **how, sample=n)
    for n in range(6)
    for how in (
        {"max_tokens": 30},
        {"max_tokens": 7 * n + 1, "temperature": 1.0, "seed": 3},
        {"max_tokens": 25, "temperature": 4.0, "top_p": 0.9, "seed": 4, "logprob": True},
        {"max_tokens": 40, "temperature": 0.8, "seed": 5, "stop": ("e", "a1")},
        {"choices": ("1", "2")},
    )
]


def same(one: Completion, other: Completion) -> bool:
    return (one.text, one.finish, one.completion_tokens) == (other.text, other.finish, other.completion_tokens)


@pytest.mark.parametrize("room", [None, 300], ids=["all at once", "few at a time"])
def test_plain_passes_give_the_same(tiny: str, room: int | None) -> None:
    """Requests of all kinds at the same time, with what is shared and without, in batches and row by row."""
    plain = make(tiny)
    assert plain._forest
    plain._forest = None
    for one, other in zip(ask(make(tiny, max_batch_tokens=room), MIXED), ask(plain, MIXED), strict=True):
        assert same(one, other)
        assert one.logprobs == (other.logprobs and pytest.approx(other.logprobs, abs=1e-5))
        assert one.logprob == (other.logprob and pytest.approx(other.logprob, abs=1e-4))


def test_long_answers_to_prompts_that_begin_in_two_ways(tiny: str) -> None:
    """Rows that share a beginning are written beside others, and go on beyond the room that they had at first."""
    begin = ["Criticise this answer, by the principle that ", "Rewrite the answer so that it follows "]
    requests = [
        user(begin[n % 2] + "ab" * n, max_tokens=230 + 5 * n, temperature=t, seed=7) for n in range(6) for t in (0.0, 1.0)
    ]
    requests.append(user("Something else", max_tokens=writing.ROOM + 20))
    plain, ours = make(tiny), make(tiny)
    for engine in (plain, ours):
        engine._ends = engine._writer.ends = []
    plain._forest = None
    rooms: set[int] = set()
    put = writing.Slots.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing.Slots, "put", lambda self, *given: rooms.add(self.room) or put(self, *given))
        answers = ask(ours, requests)
    assert len(rooms) > 1
    for one, other in zip(answers, ask(plain, requests), strict=True):
        assert one.completion_tokens > 200
        assert same(one, other)


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    lm = model(MistralForCausalLM, MistralConfig, sliding_window=8)
    lm.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = make(str(tmp_path))
    assert engine._forest is None
    requests = [user("Which one? " * 9 + str(n), choices=("1", "2")) for n in range(4)]
    ids = [engine._chat.render(request) for request in requests]
    for own, answer in zip(ids, ask(engine, requests), strict=True):
        with torch.no_grad():
            logprobs = lm(torch.tensor([own])).logits[0, -1].log_softmax(-1)
        assert answer.logprobs == pytest.approx({c: logprobs[ord(c) - ord("!")].item() for c in "12"}, abs=1e-4)


def test_a_row_that_ends_makes_room(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time: while the long one is written, the short ones take turns beside it."""
    engine, steps = make(tiny), []
    engine._ends = engine._writer.ends = []
    engine._writer._fit = 2
    step = engine._writer._step
    monkeypatch.setattr(engine._writer, "_step", lambda: steps.append(len(engine._writer._rows)) or step())
    requests = [user(f"{n}", max_tokens=10 if n else 60) for n in range(7)]  # they are taken in the order of their texts
    answers = ask(engine, requests)
    assert [answer.completion_tokens for answer in answers] == [60] + [10] * 6
    assert len(steps) == 59
    assert sum(steps) == 59 + 6 * 9
    assert max(steps) == 2


def test_who_comes_later_need_not_wait(tiny: str) -> None:
    """A question that is asked while answers are written is answered before they are, and joins them if it is one of theirs."""

    async def story() -> list[str]:
        engine, order = make(tiny), []
        engine._ends = engine._writer.ends = []

        async def asked(name: str, request: Request) -> None:
            await engine.complete(request)
            order.append(name)

        long = asyncio.create_task(asked("long", user("x" * 99, max_tokens=300)))
        while not engine._writer._rows:
            await asyncio.sleep(0.001)
        await asyncio.gather(asked("label", user("y", choices=("1", "2"))), asked("short", user("z", max_tokens=20)), long)
        await engine.close()
        return order

    assert asyncio.run(asyncio.wait_for(story(), 30)) == ["label", "short", "long"]


def test_memory_that_runs_out_while_writing(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = [user(f"{n}" * 9, max_tokens=5 + n, temperature=1.0, seed=1) for n in range(12)]
    hopeless = user("x" * 300, max_tokens=20)
    expected = ask(make(tiny), sampled)
    forward, sizes = writing.forward, []

    def short_of_memory(lm: Any, ids: list[int], places: list[int], *others: Any) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > 3 or max(places) > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(lm, ids, places, *others)

    monkeypatch.setattr(writing, "forward", short_of_memory)
    *answers, failed = ask(make(tiny), [*sampled, hopeless])
    assert isinstance(failed, RowError)
    assert "not enough memory" in str(failed)
    assert all(same(one, other) for one, other in zip(answers, expected, strict=True))
    assert sizes[:3] == [13, 6, 3]


def test_a_failure_while_writing_is_told_and_over(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = make(tiny), [user(f"{n}", max_tokens=9) for n in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "forward", lambda *given: 1 / 0)
        failed = ask(engine, requests, close=False)
    assert all(isinstance(answer, FatalError) and "division by zero" in str(answer) for answer in failed)
    assert all(isinstance(answer, Completion) for answer in ask(engine, requests))


def test_what_is_given_up_is_written_no_further(tiny: str) -> None:
    async def story() -> None:
        engine = make(tiny)
        engine._ends = engine._writer.ends = []
        given_up = asyncio.create_task(engine.complete(user("x", max_tokens=10**2 * 4)))
        other = asyncio.create_task(engine.complete(user("y", max_tokens=100, temperature=1.0, seed=1)))
        while not engine._writer._rows:
            await asyncio.sleep(0.001)
        given_up.cancel()
        answer = await other
        assert engine._begun == []
        assert not engine._writer._rows
        assert same(answer, await engine.complete(user("y", max_tokens=100, temperature=1.0, seed=1)))
        await engine.close()

    asyncio.run(asyncio.wait_for(story(), 30))
