"""Rewards: planted judges, a real server, tiny reward models and users' functions; a failure is never a number."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
import yaml
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlaif.data import Item
from rlaif.engines.mock import MockEngine
from rlaif.labeler import load_labeler
from rlaif.records import FatalError, RlaifError, Row, UsageError
from rlaif.reward import FACTS, weights_hash
from rlaif.rl.config import Ensemble, Format, Function, Gate, Length, ModelReward, Rating, Term, Verdict
from rlaif.rl.rewards import Background, Rewards, Scored, check
from rlaif.runner import StoppedError
from tests.engines.tiny import tiny_tokenizer
from tests.server import Server, error

FUNCTIONS = """
import dataclasses

@dataclasses.dataclass
class Seen:
    name: str

def a(prompts, responses, rows):
    return [row["a"] for row in rows]

def b(prompts, responses, rows):
    return [row["b"] for row in rows]

def c(prompts, responses, rows):
    return [row["c"] for row in rows]

def letters(prompts, responses):
    return [len(prompt) + len(response) / 10 for prompt, response in zip(prompts, responses)]

async def slow(prompts, responses):
    import asyncio
    await asyncio.sleep(0.01)
    return [float(len(response)) for response in responses]

def too_few(prompts, responses):
    return [1.0]

def truth(prompts, responses):
    return [True for _ in responses]

def words(prompts, responses):
    return responses

def nothing(prompts, responses):
    return None

def broken(prompts, responses):
    return [1 / 0 for _ in responses]

number = 3
"""


def judge(folder: Path, name: str = "judge", **more: Any) -> str:
    """A labeler's file; a mock engine's unless told otherwise."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"engine": "mock", **more}), encoding="utf-8")
    return str(path)


def remote(folder: Path, server: Server, **more: Any) -> str:
    return judge(folder, "remote", engine="openai", base_url=server.url, model=server.model, **more)


def rating(labeler: str, **more: Any) -> Rating:
    return Rating(kind="rating", labeler=labeler, **more)


def verdict(labeler: str, against: str = "other", **more: Any) -> Verdict:
    return Verdict(kind="pairwise", labeler=labeler, against=against, **more)


def function(folder: Path, which: str, **more: Any) -> Function:
    path = folder / "functions.py"
    path.write_text(FUNCTIONS, encoding="utf-8")
    return Function(kind="function", function=f"{path}:{which}", **more)


def make(folder: Path, *terms: Term, **more: Any) -> Rewards:
    return Rewards(terms, folder / "judged", **{"tries": 6, "timeout": 30.0, **more})


def score(rewards: Rewards, rows: list[Row], responses: list[str]) -> list[Scored]:
    async def go() -> list[Scored]:
        try:
            return await rewards(rows, responses)
        finally:
            await rewards.close()

    return asyncio.run(go())


def asked(count: int, **more: Any) -> list[Row]:
    return [{"prompt": f"Question {n}?", **more} for n in range(count)]


def said(*qualities: float) -> list[str]:
    return [f"Answer {n} [q={q}]" for n, q in enumerate(qualities)]


def calls(rewards: Rewards) -> int:
    """Requests that reached the mock engines."""
    return sum(own.engine.calls for own in rewards._judges.values())  # type: ignore[attr-defined]


def values(found: list[Scored]) -> list[float]:
    numbers = [one.value for one in found if one.value is not None]
    assert len(numbers) == len(found), [one.error for one in found]
    return numbers


# ---------------------------------------------------------------- judges


def test_a_rating_is_the_expected_mark(tmp_path: Path) -> None:
    qualities = [-1.5, -0.4, 0.0, 0.3, 2.0]
    found = score(make(tmp_path, rating(judge(tmp_path, options={"k": 2.0}))), asked(5), said(*qualities))
    for q, value in zip(qualities, values(found), strict=True):
        centre = 1 + 9 / (1 + math.exp(-2 * q))
        masses = [math.exp(-((mark - centre) ** 2) / 2) for mark in range(1, 11)]
        mean = sum(mark * mass for mark, mass in enumerate(masses, 1)) / sum(masses)
        assert value == pytest.approx(2 * (mean - 1) / 9 - 1)
    assert found[0].terms == {"rating": found[0].value}
    assert found[0].spread is None


def test_a_labelers_own_attributes_and_constitution_count(tmp_path: Path) -> None:
    options = {"attributes": {"helpful": 3.0, "harmless": 1.0}, "cot": "two-call", "samples": 2}
    for name in (judge(tmp_path, "attributes", **options), judge(tmp_path, "principles", constitution="general", principles=2)):
        low, high = values(score(make(tmp_path / Path(name).stem, rating(name)), asked(2), said(-1.0, 1.0)))
        assert -1 <= low < 0 < high <= 1


def test_a_verdict_is_the_doubled_probability(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "other": "The other one [q=0.5]"}
    found = score(make(tmp_path, verdict(judge(tmp_path, options={"k": 2.0}))), [row] * 3, said(-1.0, 0.5, 1.5))
    expected = [2 / (1 + math.exp(-2 * (q - 0.5))) - 1 for q in (-1.0, 0.5, 1.5)]
    assert values(found) == pytest.approx(expected)


def test_swapped_responses_have_the_opposite_verdict(tmp_path: Path) -> None:
    """Whatever the judge's preference for a position."""
    pairs = list(zip(said(-1.0, 0.2, 1.0, 3.0), [f"Other {text}" for text in said(0.5, 0.1, -2.0, 2.9)], strict=True))
    rewards = make(tmp_path, verdict(judge(tmp_path, options={"bias": 1.3, "noise": 0.2})))
    rows = [{"prompt": "Which?", "other": two} for one, two in (*pairs, *((b, a) for a, b in pairs))]
    found = values(score(rewards, rows, [one for one, _ in pairs] + [two for _, two in pairs]))
    assert found[:4] == pytest.approx([-value for value in found[4:]])
    assert len({round(value, 6) for value in found}) == 8


@pytest.mark.parametrize(
    "other",
    [
        "An answer [q=1.0]",
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "An answer [q=1.0]"}],
        "Human: Hi\n\nAssistant: An answer [q=1.0]",
        ["An answer [q=1.0]", "Another one"],
    ],
)
def test_the_other_response_may_stand_in_messages_dialogues_or_samples(tmp_path: Path, other: Any) -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "other": other}
    (found,) = score(make(tmp_path, verdict(judge(tmp_path, options={"k": 2.0}))), [row], said(0.0))
    assert values([found]) == pytest.approx([2 / (1 + math.exp(2)) - 1])
    assert check([verdict(judge(tmp_path))], row) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("options", [{"garbage": 0.3}, {"refuse": 0.3}, {"garbage": 0.2, "refuse": 0.2, "logprobs": False}])
def test_what_a_judge_does_not_answer_has_no_reward(tmp_path: Path, options: dict[str, Any]) -> None:
    name, rows, responses = judge(tmp_path, options=options), asked(30), said(*(n / 10 for n in range(30)))
    rater = load_labeler(name).rater()

    async def alone() -> list[Row]:
        engine = MockEngine(**options)
        items = [Item({**row, "response": text}, row["prompt"], "", None) for row, text in zip(rows, responses, strict=True)]
        return [await rater(item, engine.complete) for item in items]

    expected = asyncio.run(alone())
    failed = [row["status"] for row in expected if row["score"] is None]
    rewards = make(tmp_path, rating(name))
    found = score(rewards, rows, responses)
    assert [one.value for one in found] == [row["score"] for row in expected]
    assert 3 <= len(failed) <= 25
    assert all(one.error for one in found if one.value is None)
    assert rewards.facts()["failed"] == len(failed)


def test_calls_that_fail_on_every_try_leave_their_responses_without_a_reward(tmp_path: Path) -> None:
    rewards = make(tmp_path, rating(judge(tmp_path, options={"faults": 0.3, "seed": 2})), tries=1)
    found = score(rewards, asked(40), said(*range(40)))
    lost = [one for one in found if one.value is None]
    assert len(lost) == calls(rewards) - rewards.facts()["calls"] > 3
    assert all("planted fault (gave up after 1 tries)" in str(one.error) for one in lost)
    again = make(tmp_path, rating(judge(tmp_path, options={"seed": 2})))
    assert values(score(again, asked(40), said(*range(40))))  # no failure was stored
    assert calls(again) == len(lost)


@pytest.mark.parametrize("response", ["", " \n"])
def test_an_empty_response_has_no_judgement(tmp_path: Path, response: str) -> None:
    name, row = judge(tmp_path), {"prompt": "Hi?", "other": "Yes."}
    rewards = make(tmp_path, rating(name), verdict(name), Length(kind="length", least=2))
    (found,) = score(rewards, [row], [response])
    assert found.value is None
    assert found.terms == {"rating": None, "pairwise": None, "length": -1.0}
    assert found.error == "rating: the response is empty; pairwise: the response is empty"
    assert calls(rewards) == 0


def test_nothing_to_compare_with_is_a_failure_of_the_row(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "Hi?", "other": other} for other in ("Yes.", "", None, 3)] + [{"prompt": "Hi?"}]
    found = score(make(tmp_path, verdict(judge(tmp_path))), rows, ["Yes."] * 5)
    assert [one.value for one in found] == [None] * 5
    assert "identical" in str(found[0].error)
    assert all("column 'other': no text" in str(one.error) for one in found[1:])


# ---------------------------------------------------------------- asked once


def test_the_same_question_is_asked_once_over_calls_terms_and_runs(tmp_path: Path) -> None:
    name = judge(tmp_path)
    terms = (rating(name, name="one"), rating(name, name="two", weight=2.0))

    async def twice(rewards: Rewards) -> list[list[Scored]]:
        batches = await asyncio.gather(*(rewards(asked(1) * 20, ["Same [q=0.3]"] * 20) for _ in range(3)))
        later = await rewards(asked(1), ["Same [q=0.3]"])
        await rewards.close()
        return [*batches, later]

    first, second = make(tmp_path, *terms), make(tmp_path / "other", *terms)
    found = asyncio.run(twice(first))
    assert calls(first) == 1
    assert len({one.value for batch in found for one in batch}) == 1
    assert len(list((tmp_path / "judged").glob("*.store"))) == 1
    resumed = make(tmp_path, *terms)
    assert asyncio.run(twice(resumed)) == found
    assert calls(resumed) == 0
    asyncio.run(twice(second))
    assert calls(second) == 1


def test_judges_of_one_engine_have_their_own_pace(tmp_path: Path) -> None:
    terms = [rating(judge(tmp_path, f"j{n}", concurrency=n, options={"k": 3.0})) for n in (1, 2)]
    rewards = make(tmp_path, *terms)
    one, two = values(score(rewards, asked(2), said(0.1, 0.9)))
    assert one < two
    assert rewards.names == ("rating", "rating-2")
    assert calls(rewards) == 4
    assert len(list((tmp_path / "judged").glob("*.store"))) == 2


def test_another_seed_draws_other_principles(tmp_path: Path) -> None:
    term = rating(judge(tmp_path, constitution="general", principles=1, options={"noise": 1.0}))
    zero, other = (score(make(tmp_path / str(n), term, seed=n), asked(20), said(*[0.0] * 20)) for n in (0, 1))
    assert values(zero) != values(other)


def test_a_store_in_use_shows_before_anything_is_asked(tmp_path: Path) -> None:
    from rlaif.store import Store

    score(make(tmp_path, rating(judge(tmp_path))), asked(1), said(0.0))
    (path,) = (tmp_path / "judged").glob("*.store")
    held = Store(path)
    with pytest.raises(UsageError, match="another process"):
        make(tmp_path, rating(judge(tmp_path)))
    held.close()


# ---------------------------------------------------------------- a server


def test_a_slow_server_meets_no_more_calls_than_asked_for(server: Server, tmp_path: Path) -> None:
    server.latency, server.digits = 0.05, [0.1] * 10
    rewards = make(tmp_path, rating(remote(tmp_path, server, concurrency=3)))
    score(rewards, asked(12), said(*range(12)))
    assert server.most_flying == 3
    assert not rewards.in_process


def test_a_response_is_finished_before_more_are_begun_than_asked_for(server: Server, tmp_path: Path) -> None:
    term = verdict(remote(tmp_path, server, both_orders=False, cot="two-call", rationale_tokens=99, concurrency=1))
    score(make(tmp_path, term), asked(4, other="No."), said(*range(4)))
    assert [body.get("max_tokens") for body in server.bodies] == [99, 1] * 4


def test_what_is_in_flight_is_stored_when_the_reason_comes(server: Server, tmp_path: Path) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        if len(server.bodies) > 1:
            return error(401, "no such key")
        await asyncio.sleep(0.7)
        return None

    server.fault = fault
    rewards = make(tmp_path, verdict(remote(tmp_path, server)))

    async def go() -> None:
        with pytest.raises(FatalError, match="no such key"):
            await rewards(asked(1, other="No."), ["Yes."])  # asked in both orders at once
        assert rewards.facts()["calls"] == 1
        await rewards.close()

    asyncio.run(go())


def test_a_rate_limit_is_waited_for(server: Server, tmp_path: Path) -> None:
    met: Counter[str] = Counter()

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        name = json.dumps(body["messages"])
        met[name] += 1
        return error(429, "slow down", headers={"Retry-After": "0.9"}) if met[name] == 1 else None

    server.fault = fault
    rewards = make(tmp_path, verdict(remote(tmp_path, server, both_orders=False)))
    begun = time.monotonic()
    found = score(rewards, asked(5, other="The other [q=0.5]"), said(*range(5)))
    assert time.monotonic() - begun >= 0.9
    assert values(found) == pytest.approx([2 / (1 + math.exp(0.5 - q)) - 1 for q in range(5)])
    assert (rewards.facts()["retries"], rewards.facts()["calls"]) == (5, 5)


def test_a_call_that_takes_too_long_is_given_up(server: Server, tmp_path: Path) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        if "stall" in body["messages"][-1]["content"]:
            await asyncio.sleep(2)
        return None

    server.fault = fault
    term = verdict(remote(tmp_path, server, both_orders=False, concurrency=1))
    found = score(make(tmp_path, term, tries=1, timeout=1.0), asked(3, other="No."), ["fine", "stall", "fine too"])
    assert [one.value is None for one in found] == [False, True, False]
    assert "gave up after 1 tries" in str(found[1].error)


def test_a_server_that_goes_away_ends_it_with_the_reason_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(503, "gone for good") if len(server.bodies) > 12 else None

    server.fault = fault
    term = verdict(remote(tmp_path, server, both_orders=False, concurrency=4))
    rows, responses = asked(40, other="No."), said(*range(40))
    with pytest.raises(FatalError, match=r"reward pairwise: no call gets through for 4 calls in a row.*gone for good"):
        score(make(tmp_path, term, tries=1), rows, responses)
    assert len(server.bodies) <= 12 + 8
    server.fault = None
    assert len(values(score(make(tmp_path, term), rows, responses))) == 40
    assert len(server.answered) == 40
    assert max(server.answered.values()) == 1


def test_one_judge_that_is_gone_stops_the_others_even_in_an_ensemble(server: Server, tmp_path: Path) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(401, "no such key")

    server.fault = fault
    slow = rating(judge(tmp_path, concurrency=1, options={"latency": 0.2, "spread": 0.0}))
    both = Ensemble(kind="ensemble", of=(rating(remote(tmp_path, server), name="hosted"), slow))
    rewards = make(tmp_path, both)

    async def go() -> None:
        for _ in range(2):  # and the same again, without a call
            with pytest.raises(FatalError, match=r"reward ensemble/hosted: .*no such key"):
                await rewards(asked(50), said(*range(50)))
        await rewards.close()

    begun = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - begun < 5
    assert len(server.bodies) <= 50  # the first ones in flight
    assert rewards._judges


def test_a_server_that_is_not_there_shows_before_training(tmp_path: Path) -> None:
    with Server() as server:
        term = rating(remote(tmp_path, server))
    with pytest.raises(FatalError, match="reward rating: no server answers"):
        make(tmp_path, term)


def test_one_budget_holds_for_all_judges_and_when_the_run_goes_on(tmp_path: Path) -> None:
    price = {"price": [100.0, 100.0], "concurrency": 1}
    terms = [rating(judge(tmp_path, f"j{n}", **price, options={"k": float(n), "latency": 0.005})) for n in (1, 2)]
    rewards = make(tmp_path, *terms, max_cost=0.5)
    with pytest.raises(StoppedError, match=r"reward rating(-2)?: the budget of \$0.5 is spent"):
        score(rewards, asked(40), said(*range(40)))
    spent = rewards.facts()["cost"]
    assert 0.1 < spent <= 0.5
    shares = [own.fact("cost") for own in rewards._judges.values()]
    assert all(0 < share < spent for share in shares)
    again = make(tmp_path, *terms, max_cost=0.5)
    with pytest.raises(StoppedError, match="budget"):
        score(again, asked(40), said(*range(40)))
    assert spent + again.facts()["cost"] <= 0.5
    assert len(values(score(make(tmp_path, *terms, max_cost=50.0), asked(40), said(*range(40))))) == 40


def test_a_budget_needs_a_price_of_what_costs(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reward rating: max_cost needs a price in the labeler remote"):
        make(tmp_path, rating(remote(tmp_path, server)), max_cost=1.0)
    make(tmp_path, rating(judge(tmp_path)), max_cost=1.0)


# ---------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plain`, a reward model of random weights, and `several`, an ensemble of two."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()

    def save(path: Path, seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=1,
        )
        LlamaForSequenceClassification(config).save_pretrained(path)
        tokenizer.save_pretrained(path)

    def tell(path: Path, members: list[str]) -> None:
        facts = {"name": path.name, "heads": [], "form": "plain", "max_length": 60, "members": members, "combine": "mean"}
        (path / FACTS).write_text(json.dumps({**facts, "weights": weights_hash(path)}))

    save(folder / "plain", 0)
    tell(folder / "plain", [])
    for n in (1, 2):
        save(folder / "several" / f"member-{n}", n)
    tell(folder / "several", ["member-1", "member-2"])
    return folder


def by_hand(folder: Path, text: str) -> float:
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = tiny_tokenizer()(text + "<|end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def model(path: Path, **more: Any) -> ModelReward:
    return ModelReward(kind="model", model=str(path), **more)


def test_a_reward_models_scores_are_its_own_and_computed_once(models: Path, tmp_path: Path) -> None:
    rewards = make(tmp_path, model(models / "plain"), device="cpu")
    texts = ["yes", "no", "yes", "perhaps", "yes"]
    found = values(score(rewards, [{"prompt": "Hi? "}] * 5, texts))
    assert found == pytest.approx([by_hand(models / "plain", f"Hi? {text}") for text in texts], abs=1e-5)
    assert len(set(found)) == 3
    assert rewards.facts()["calls"] == 3
    assert rewards.in_process
    again = make(tmp_path, model(models / "plain"), device="cpu")
    assert values(score(again, [{"prompt": "Hi? "}] * 5, texts)) == found
    assert again.facts()["calls"] == 0


def test_members_of_a_reward_models_folder_have_a_spread(models: Path, tmp_path: Path) -> None:
    (found,) = score(make(tmp_path, model(models / "several"), device="cpu"), asked(1), ["yes"])
    own = [by_hand(models / "several" / f"member-{n}", "Question 0?yes") for n in (1, 2)]
    assert found.value == pytest.approx(fmean(own), abs=1e-5)
    assert found.spread == pytest.approx(stdev(own), abs=1e-5)


def test_what_a_reward_model_cannot_take_is_a_failure(models: Path, tmp_path: Path) -> None:
    found = score(make(tmp_path, model(models / "plain"), device="cpu"), asked(3), ["x" * 80, "", "x"])
    assert [one.value is None for one in found] == [True, True, False]
    assert "tokens" in str(found[0].error)
    assert "empty" in str(found[1].error)


def test_reward_models_in_an_ensemble(models: Path, tmp_path: Path) -> None:
    parts = (model(models / "plain"), model(models / "several", weight=0.5))
    (found,) = score(make(tmp_path, Ensemble(kind="ensemble", of=parts, combine="worst"), device="cpu"), asked(1), ["yes"])
    one = by_hand(models / "plain", "Question 0?yes")
    two = 0.5 * fmean(by_hand(models / "several" / f"member-{n}", "Question 0?yes") for n in (1, 2))
    assert found.value == pytest.approx(min(one, two), abs=1e-5)
    assert found.spread == pytest.approx(stdev([one, two]), abs=1e-5)


# ---------------------------------------------------------------- rules and sums


@pytest.mark.parametrize(
    ("rule", "words", "expected"),
    [
        ({"most": 4}, 4, 0.0),
        ({"most": 4}, 5, -0.25),
        ({"most": 4}, 12, -2.0),
        ({"least": 4}, 4, 0.0),
        ({"least": 4}, 1, -0.75),
        ({"least": 4}, 0, -1.0),
        ({"most": 4, "least": 2}, 3, 0.0),
        ({"most": 4, "least": 2}, 1, -0.5),
    ],
)
def test_lengths(tmp_path: Path, rule: dict[str, int], words: int, expected: float) -> None:
    (found,) = score(make(tmp_path, Length(kind="length", **rule)), asked(1), ["word\n" * words])
    assert found.value == expected


def test_formats(tmp_path: Path) -> None:
    terms = [Format(kind="format", pattern=r"^\d+$"), Format(kind="format", pattern="sorry", forbidden=True)]
    found = score(make(tmp_path, *terms), asked(3), ["12", "a 12", "so sorry"])
    assert [one.terms for one in found] == [
        {"format": 0.0, "format-2": 0.0},
        {"format": -1.0, "format-2": 0.0},
        {"format": -1.0, "format-2": -1.0},
    ]
    assert [one.value for one in found] == [0.0, -1.0, -2.0]


def test_an_ensemble_by_hand(tmp_path: Path) -> None:
    row = {"prompt": "p", "a": 1.0, "b": 4.0, "c": -1.0}
    of = tuple(function(tmp_path, name, weight={"c": 2.0}.get(name, 1.0)) for name in "abc")  # 1, 4, −2
    for combine, penalty, expected in (("mean", 1.0, 1.0), ("worst", 1.0, -2.0), ("uncertainty", 0.5, 1.0 - 0.5 * 6.0)):
        term = Ensemble(kind="ensemble", of=of, combine=combine, penalty=penalty, weight=3.0)
        (found,) = score(make(tmp_path, term, Length(kind="length", most=1)), [row], ["two words"])
        assert found.terms == {"ensemble": pytest.approx(expected), "length": -1.0}
        assert found.value == pytest.approx(3 * expected - 1)
        assert found.spread == pytest.approx(3.0)
        assert found.error is None


def gate(safety: Term, helpful: Term, **more: Any) -> Gate:
    return Gate(kind="gate", safety=safety, helpful=helpful, **more)


LIMIT = math.log(0.15 / 0.85)
"""The logit of 0.15."""


@pytest.mark.parametrize(
    ("safe", "helpful", "tag", "expected"),
    [
        (2.0, -3.0, False, -3.0),
        (2.0, -3.0, None, -3.0),  # no tag is none
        (2.0, -3.0, True, 2.0),
        (LIMIT + 1e-9, 5.0, False, 5.0),
        (LIMIT - 1e-9, 5.0, False, LIMIT - 1e-9),
        (-900.0, 5.0, False, -900.0),
        (-1.0, 5.0, True, -1.0),
    ],
)
def test_a_gate_chooses_as_llama_2_does(tmp_path: Path, safe: float, helpful: float, tag: bool | None, expected: float) -> None:
    term = gate(function(tmp_path, "a"), function(tmp_path, "b"), tagged="risky", weight=2.0)
    row = {"prompt": "p", "a": safe, "b": helpful, "risky": tag}
    (found,) = score(make(tmp_path, term), [row], ["yes"])
    assert found == Scored(2 * expected, {"gate": expected}, None, None)


def test_a_gates_bound_weights_and_rows(tmp_path: Path) -> None:
    """One batch, in which each row goes its own way; the weight brings the safety reward to a logit."""
    term = gate(function(tmp_path, "a", weight=0.5), function(tmp_path, "b", weight=3.0), below=0.5)
    rows = [{"prompt": "p", "a": a, "b": b, "safety": True} for a, b in ((2.0, 1.0), (-2.0, 2.0), (0.0, 3.0), (-1e-9, 4.0))]
    found = values(score(make(tmp_path, term), rows, ["r"] * 4))
    assert found == pytest.approx([3.0, -1.0, 9.0, 0.0], abs=1e-6)  # without `tagged`, no column is read


def test_a_gate_needs_what_counts_and_no_more(tmp_path: Path) -> None:
    term = gate(function(tmp_path, "a"), function(tmp_path, "b"), tagged="risky")
    cases: list[tuple[Any, Any, Any, str | None]] = [
        (None, 1.0, False, "gate: safety: the function gave none"),
        (None, 1.0, True, "gate: safety: the function gave none"),
        (2.0, None, False, "gate: helpful: the function gave none"),
        (2.0, math.nan, True, None),
        (-5.0, None, False, None),
        (2.0, 1.0, "yes", "gate: column 'risky': expected true or false, got"),
        (-5.0, 1.0, 1, "gate: column 'risky': expected true or false, got"),
    ]
    rows = [{"prompt": "p", "a": a, "b": b, "risky": tag} for a, b, tag, _ in cases]
    for found, (safe, _, _, words) in zip(score(make(tmp_path, term), rows, ["r"] * len(rows)), cases, strict=True):
        assert found.value == (None if words else safe)
        assert found.terms == {"gate": found.value}
        assert (found.error or "").startswith(words or "")
        assert bool(found.error) == bool(words)


def test_a_gate_asks_the_second_judge_only_where_it_counts(tmp_path: Path) -> None:
    """Ratings are in [−1, 1], where this bound stands at 0."""
    judges = [rating(judge(tmp_path, name, model=name, options={"spread": 0.0})) for name in ("safe", "kind")]
    rewards = make(tmp_path, gate(*judges, below=0.5, tagged="risky"))
    rows = [{"prompt": f"Question {n}?", "risky": n == 0} for n in range(4)]
    found = values(score(rewards, rows, said(2.0, -2.0, 2.0, -2.0)))
    own = {judge.engine.identity["model"]: judge.engine.calls for judge in rewards._judges.values()}  # type: ignore[attr-defined]
    assert own == {"safe": 4, "kind": 1}
    assert [number > 0 for number in found] == [True, False, True, False]


def test_reward_models_behind_a_gate_have_their_spread(models: Path, tmp_path: Path) -> None:
    parts = (model(models / "several"), model(models / "plain"))
    rows = [{"prompt": "Question 0?", "risky": tag} for tag in (True, False)]
    safe, helpful = score(make(tmp_path, gate(*parts, below=0.0, tagged="risky"), device="cpu"), rows, ["yes", "yes"])
    own = [by_hand(models / "several" / f"member-{n}", "Question 0?yes") for n in (1, 2)]
    assert safe.value == pytest.approx(fmean(own), abs=1e-5)
    assert safe.spread == pytest.approx(stdev(own), abs=1e-5)
    assert helpful.value == pytest.approx(by_hand(models / "plain", "Question 0?yes"), abs=1e-5)
    assert helpful.spread is None or helpful.spread == 0


def is_number(value: Any) -> bool:
    try:
        return value is not None and math.isfinite(float(value))
    except OverflowError:
        return False


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Rewards:
    """Three ensembles of a and b, and c with a weight."""
    folder = tmp_path_factory.mktemp("sums")
    of = (function(folder, "a"), function(folder, "b"))
    ensembles = [Ensemble(kind="ensemble", name=how, of=of, combine=how) for how in ("mean", "worst", "uncertainty")]
    return make(folder, *ensembles, function(folder, "c", name="c", weight=-2.5))


NUMBERS = st.none() | st.floats() | st.floats(-10, 10) | st.sampled_from([0, 3, 10**400, -(10**400)])


@settings(max_examples=40, deadline=None)
@given(table=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_a_failure_never_becomes_a_number(sums: Rewards, table: list[Any]) -> None:
    rows = [{"prompt": "p", **dict(zip("abc", row, strict=True))} for row in table]
    for (a, b, c), found in zip(table, asyncio.run(sums(rows, ["r"] * len(rows))), strict=True):
        assert set(found.terms) == {"mean", "worst", "uncertainty", "c"}
        assert is_number(found.terms["c"]) == is_number(c)
        for how in ("mean", "worst", "uncertainty"):
            assert found.terms[how] is None or (is_number(a) and is_number(b) and is_number(found.terms[how]))
        assert (found.value is None) == (found.error is not None)
        if found.value is None:
            assert not all(is_number(x) and abs(x) < 1e100 for x in (a, b, c))
        else:
            mean, half = a / 2 + b / 2, abs(a / 2 - b / 2)
            assert found.value == pytest.approx(mean + min(a, b) + (mean - half**2) - 2.5 * c, rel=1e-6, abs=1e-6)
            assert found.spread == pytest.approx(half * 2**0.5)


# ---------------------------------------------------------------- functions


def test_functions_are_given_prompts_responses_and_rows_if_they_want_them(tmp_path: Path) -> None:
    terms = [function(tmp_path, name, name=name) for name in ("letters", "slow", "a")]
    found = score(make(tmp_path, *terms), [{"prompt": "abc", "a": 7}, {"prompt": "", "a": None}], ["yes", "no"])
    assert found[0].terms == {"letters": 3.3, "slow": 3.0, "a": 7.0}
    assert found[0].value == pytest.approx(13.3)
    assert found[1].terms == {"letters": 0.2, "slow": 2.0, "a": None}
    assert found[1].value is None
    assert found[1].error == "a: the function gave none"


def test_a_function_of_a_package(tmp_path: Path) -> None:
    found = score(make(tmp_path, Function(kind="function", function="tests.rl.test_rewards:plain")), asked(2), ["a", "bc"])
    assert values(found) == [1.0, 2.0]


def plain(prompts: Any, responses: list[str]) -> Any:
    import numpy as np

    return np.array([len(response) for response in responses], dtype=np.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_a_number_that_is_none_is_a_failed_response(tmp_path: Path, value: float) -> None:
    found = score(make(tmp_path, function(tmp_path, "a")), [{"prompt": "p", "a": value}, {"prompt": "p", "a": 1}], ["r"] * 2)
    assert [one.value for one in found] == [None, 1.0]
    assert "not finite" in str(found[0].error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("too_few", "gave 1 rewards for 2 responses"),
        ("truth", "gave True, a bool"),
        ("words", "gave 'r', a str"),
        ("nothing", "'NoneType' object is not iterable"),
        ("broken", r"ZeroDivisionError: division by zero \(functions.py line \d+\)"),
    ],
)
def test_a_function_that_breaks_its_promise_ends_it(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(RlaifError, match=rf"reward function: .*functions.py:{name} .*{words}"):
        score(make(tmp_path, function(tmp_path, name)), asked(2), ["r", "r"])


# ---------------------------------------------------------------- what is checked, and told


def test_what_is_wrong_shows_before_an_engine_starts(models: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nowhere_at_all\n")
    good, first = judge(tmp_path), {"prompt": "Hi?", "number": 3, "other": "Yes."}
    length = Length(kind="length", most=3)
    wrong: list[tuple[Term, str]] = [
        (rating("no-such-labeler"), "reward rating, labeler: no file 'no-such-labeler'"),
        (rating(judge(tmp_path, "bad", price="free")), "reward rating, labeler: .*bad.yaml: price"),
        (rating(judge(tmp_path, "t", attributes={"no-such": 1})), "reward rating, labeler: .*no-such"),
        (verdict(judge(tmp_path, "v", template="no-such")), "reward pairwise, labeler: .*no-such"),
        (verdict(good, against="gone"), "reward pairwise, against: no column 'gone'"),
        (verdict(good, against="number"), "reward pairwise, against: column 'number': expected the text"),
        (model(tmp_path / "nowhere"), "reward model, model: .*no such folder"),
        (model(models / "plain", head="best"), "reward model, model: .*head best"),
        (Format(kind="format", pattern="(", name="style"), "reward style, pattern: '\\(' is no regular expression"),
        (Function(kind="function", function="nowhere"), "reward function, function: expected file.py:name"),
        (Function(kind="function", function="nowhere.py:f"), "reward function, function: no such file: nowhere.py"),
        (Function(kind="function", function="no.such.package:f"), "reward function, function: .*cannot be imported"),
        (Function(kind="function", function=f"{tmp_path}/bad.py:f"), "cannot be imported: ModuleNotFoundError"),
        (function(tmp_path, "absent"), "has no function 'absent'"),
        (function(tmp_path, "number"), "has no function 'number'"),
        (Ensemble(kind="ensemble", of=(length, rating("gone"))), "reward ensemble/rating, labeler: no file 'gone'"),
        (gate(model(tmp_path / "nowhere"), length), "reward gate/safety, model: .*no such folder"),
        (gate(length, model(tmp_path / "nowhere"), name="two"), "reward two/helpful, model: .*no such folder"),
        (gate(length, length, tagged="risky"), "reward gate, tagged: no column 'risky' in the data; there are: prompt, number"),
        (gate(length, length, tagged="number"), "reward gate, tagged: column 'number': expected true or false, got"),
    ]
    for term, words in wrong:
        with pytest.raises(UsageError, match=words):
            check([length, term], first)
    for row in ({}, {"prompt": None}, {"prompt": [3]}):
        with pytest.raises(UsageError, match="column 'prompt': expected text or messages"):
            check([length], row)
    check([length, rating(good), verdict(good), model(models / "plain"), function(tmp_path, "a")], first)
    assert not (tmp_path / "judged").exists()


def test_settings_tell_whatever_can_change_a_value(models: Path, tmp_path: Path) -> None:
    terms = [
        rating(judge(tmp_path, cot="two-call"), weight=2.0),
        model(models / "plain"),
        function(tmp_path, "a"),
        Ensemble(kind="ensemble", of=(Length(kind="length", most=3), Format(kind="format", pattern="x"))),
        gate(Length(kind="length", most=3), Format(kind="format", pattern="x"), tagged="risky"),
    ]
    rewards = make(tmp_path, *terms, device="cpu")
    told = json.loads(json.dumps(rewards.settings()))
    asyncio.run(rewards.close())
    assert list(told) == list(rewards.names) == ["rating", "model", "function", "ensemble", "gate"]
    assert told["rating"]["labeler"] == "judge"
    assert told["rating"]["weight"] == 2.0
    assert told["rating"]["cot"] == "two-call"
    assert len(told["rating"]["template_hashes"]["overall"]) == 64
    assert told["rating"]["engine"]["engine"] == "mock"
    assert told["model"]["weights"] == weights_hash(models / "plain")
    assert len(told["function"]["sha256"]) == 64
    form = {"kind": "format", "weight": 1.0, "pattern": "x", "forbidden": False}
    assert told["ensemble"]["of"]["format"] == form
    assert told["gate"] == {
        "kind": "gate",
        "weight": 1.0,
        "below": 0.15,
        "tagged": "risky",
        "of": {"safety": {"kind": "length", "weight": 1.0, "most": 3, "least": None}, "helpful": form},
    }


# ---------------------------------------------------------------- beside the main thread


def slow(folder: Path, seconds: float, **more: Any) -> Rating:
    return rating(judge(folder, options={"latency": seconds, "spread": 0.0}, **more))


def test_judging_goes_on_while_the_main_thread_works(tmp_path: Path) -> None:
    background = Background(make(tmp_path, slow(tmp_path, 0.5)))
    try:
        begun = time.monotonic()
        future = background.submit(asked(8), said(*range(8)))
        assert not future.done()
        while time.monotonic() - begun < 0.5:
            torch.ones(200, 200) @ torch.ones(200, 200)
        assert len(values(future.result(10))) == 8
        assert time.monotonic() - begun < 0.9
    finally:
        background.close()


def test_busy_counts_batches_at_the_same_time_once(tmp_path: Path) -> None:
    background = Background(make(tmp_path, slow(tmp_path, 0.4)))
    try:
        assert background.busy() == 0.0
        futures = []
        for n in range(3):
            futures.append(background.submit(asked(2), [f"{n} one", f"{n} two"]))
            time.sleep(0.2)
        assert 0.5 < background.busy() < 0.8  # also while it is judging
        for future in futures:
            future.result(10)
        once = background.busy()
        assert 0.8 <= once < 1.2  # from the first one's start to the last one's end; one after the other it were 1.2
        time.sleep(0.1)
        assert background.busy() == once
        background.submit(asked(1), ["later"]).result(10)
        assert once + 0.4 <= background.busy() < once + 0.8
    finally:
        background.close()


def test_what_goes_wrong_comes_out_of_the_future(tmp_path: Path) -> None:
    background = Background(make(tmp_path, function(tmp_path, "broken")))
    with pytest.raises(RlaifError, match=r"reward function: .*ZeroDivisionError"):
        background.submit(asked(1), ["r"]).result(10)
    background.close()


def test_closing_keeps_what_is_in_flight_and_may_be_done_twice(tmp_path: Path) -> None:
    term = slow(tmp_path, 0.4, concurrency=2)
    rewards = make(tmp_path, term)
    background = Background(rewards)
    future = background.submit(asked(10), said(*range(10)))
    while calls(rewards) < 2:
        time.sleep(0.01)
    background.close()
    background.close()
    with pytest.raises(StoppedError, match="closed"):
        future.result(0)
    with pytest.raises(StoppedError, match="closed"):
        background.submit(asked(1), ["r"])
    assert calls(rewards) == 2
    assert rewards.facts()["calls"] == 2
    assert not background._thread.is_alive()
    again = make(tmp_path, term)
    score(again, asked(10), said(*range(10)))
    assert calls(again) == 8


def test_closing_without_a_call(tmp_path: Path) -> None:
    Background(make(tmp_path, rating(judge(tmp_path)))).close()
