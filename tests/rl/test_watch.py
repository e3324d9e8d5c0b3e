"""Over-optimisation is seen where it was planted and nowhere else; figures of responses are what they say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.rl.config import StopWhen
from rlaif.rl.watch import Samples, figures, reason
from tests.conftest import read_jsonl

Line = dict[str, Any]

RESPONSES = st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=6)


# ---------------------------------------------------------------- figures of responses


def test_figures_of_responses_that_can_be_counted_by_hand() -> None:
    found = figures([[1, 2, 1, 2, 1, 2], [3, 1]])
    assert found["length"] == 4
    assert found["distinct_1"] == pytest.approx(3 / 8)
    assert found["distinct_2"] == pytest.approx(3 / 6)  # 12, 21, 31 of 12 21 12 21 12 31
    assert found["repetition"] == pytest.approx((1 / 3 + 0) / 2)  # 1212, 2121, 1212; and no passage of 4 tokens


def test_a_response_that_says_one_thing_forever_repeats_itself() -> None:
    found = figures([[7] * 103])
    assert found == {"length": 103, "distinct_1": 1 / 103, "distinct_2": 1 / 102, "repetition": pytest.approx(0.99)}


@given(RESPONSES)
def test_shares_are_shares_and_nothing_is_no_error(responses: list[list[int]]) -> None:
    found = figures(responses)
    assert list(found) == ["length", "distinct_1", "distinct_2", "repetition"]
    assert all(0 <= found[name] <= 1 for name in ("distinct_1", "distinct_2", "repetition"))
    assert (found["distinct_1"] > 0) == any(responses)
    assert (found["distinct_2"] > 0) == any(len(response) > 1 for response in responses)


@given(RESPONSES, st.randoms(use_true_random=False))
def test_neither_the_order_of_responses_nor_the_names_of_tokens_count(responses: list[list[int]], draw: random.Random) -> None:
    others = [[(token * 5 + 3) * 1000 for token in response] for response in responses]
    draw.shuffle(others)
    assert figures(others) == pytest.approx(figures(responses))


@given(RESPONSES.filter(any))
def test_the_same_responses_twice_are_half_as_diverse_and_as_repetitive(responses: list[list[int]]) -> None:
    once, twice = figures(responses), figures(responses * 2)
    assert twice["distinct_1"] == pytest.approx(once["distinct_1"] / 2)
    assert (twice["length"], twice["repetition"]) == pytest.approx((once["length"], once["repetition"]))


# ---------------------------------------------------------------- planted runs


def run(steps: int, every: int = 10, **series: Callable[[int], Any]) -> list[Line]:
    """The lines of a run; figures of held-out prompts each so many steps, on lines of their own."""
    found = []
    for step in range(1, steps + 1):
        own = {name: value(step) for name, value in series.items() if name != "held_out"}
        found.append({"part": "train", "step": step, "epoch": 0.1, **own})
        if "held_out" in series and step % every == 0:
            found.append({"part": "train", "step": step, "epoch": 0.1, "held_out/reward": series["held_out"](step)})
    return found


def stop(lines: Sequence[Line], **rules: Any) -> tuple[int, str] | None:
    """The step at which a run with these lines stops, and why."""
    for n, line in enumerate(lines, 1):
        if why := reason(StopWhen(**rules), lines[:n]):
            return line["step"], why
    return None


def overoptimised(seed: int = 0) -> list[Line]:
    """KL grows, the reward climbs with it, and what is held out falls from step 50 on; all with some noise."""
    draw = random.Random(seed)
    return run(
        120,
        kl=lambda step: 0.1 * step + draw.uniform(-0.04, 0.04),
        reward=lambda step: 0.02 * step + draw.gauss(0, 0.05),
        length=lambda step: 50 + 2 * max(0, step - 20),
        held_out=lambda step: 1 - 0.01 * abs(step - 50) + draw.uniform(-0.02, 0.02),
    )


def healthy(seed: int) -> list[Line]:
    """A run that converges: everything has noise, and the held-out reward rises with the reward."""
    draw = random.Random(seed)
    return run(
        300,
        kl=lambda step: 4 * (1 - 0.98**step) + draw.gauss(0, 0.3),
        reward=lambda step: 1 - 0.99**step + draw.gauss(0, 0.1),
        length=lambda step: 60 + draw.gauss(0, 8),
        held_out=lambda step: 1 - 0.99**step + draw.gauss(0, 0.01),
    )


@pytest.mark.parametrize("seed", range(5))
def test_each_rule_stops_an_overoptimised_run_at_its_step(seed: int) -> None:
    lines = overoptimised(seed)
    at, why = stop(lines, kl=5.05) or (0, "")
    assert at == next(line["step"] for line in lines if line.get("kl", 0) > 5.05) in (51, 50)
    assert f"at step {at}: above 5.05" in why
    at, why = stop(lines, length=1.5) or (0, "")
    assert at == 35  # 50 + 2·(15 − 2) = 76 is the first mean above 75
    assert "is 76 tokens at steps 31 to 35, and was 50 at the first 5" in why
    for signs, step in ((1, 60), (3, 80), (5, 100)):
        at, why = stop(lines, held_out=signs) or (0, "")
        assert at == step
        assert f"(steps 50 to {step})" in why
    assert stop(lines) is None  # no rule
    assert (stop(lines, kl=5.05, length=1.5, held_out=1) or (0,))[0] == 35  # the first sign ends it


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_goes_on(seed: int) -> None:
    assert stop(healthy(seed)[::], kl=6, length=1.5, held_out=3) is None


def test_responses_that_shrink_stop_a_run_too() -> None:
    lines = run(60, length=lambda step: 60 - 2 * max(0, step - 20) if step < 45 else 12)
    assert (stop(lines, length=1.5) or (0,))[0] == 33  # 60 − 2·(13 − 2) = 38 is the first mean below 40
    assert stop(run(60, length=lambda step: 40 if step % 2 else 50), length=1.5) is None
    assert stop(run(4, length=lambda step: 10**step), length=1.5) is None  # too few to tell


def test_held_out_rewards_that_fall_with_the_reward_are_no_sign() -> None:
    falls = run(100, reward=lambda step: -step, held_out=lambda step: -step)
    assert stop(falls, held_out=1) is None
    level = run(100, reward=lambda step: 1.0, held_out=lambda step: -step)
    assert stop(level, held_out=1) is None
    same = run(100, reward=lambda step: step, held_out=lambda step: 1.0)
    assert stop(same, held_out=1) is None


def test_signs_must_come_in_a_row() -> None:
    lines = run(200, reward=lambda step: step, held_out=lambda step: {0: 3.0, 1: 2.0, 2: 1.0}[step // 10 % 3])
    assert stop(lines, held_out=3) is None
    assert (stop(lines, held_out=2) or (0,))[0] == 50


def test_the_reward_is_that_of_the_whole_stretch_between_evaluations() -> None:
    lines = run(30, reward=lambda step: 9.0 if step in (10, 20) else step, held_out=lambda step: -step)
    assert (stop(lines, held_out=1) or (0,))[0] == 20  # the steps of the evaluations alone are level
    lines = run(30, reward=lambda step: 100 if step == 20 else 0, held_out=lambda step: -step)
    assert (stop(lines, held_out=1) or (0,))[0] == 20  # but they count
    lines = run(30, reward=lambda step: 100 if step <= 10 else step, held_out=lambda step: -step)
    assert (stop(lines, held_out=1) or (0,))[0] == 30


def test_an_evaluation_before_the_first_step_has_no_reward_to_compare() -> None:
    lines = [{"part": "train", "step": 0, "held_out/reward": 9.0}, *run(40, reward=float, held_out=lambda step: -step)]
    assert (stop(lines, held_out=1) or (0,))[0] == 20
    assert (stop(lines, held_out=2) or (0,))[0] == 30


@pytest.mark.parametrize("missing", [None, "nan", "inf", float("nan"), float("inf")])
def test_what_is_no_number_is_no_sign(missing: Any) -> None:
    lines = run(
        100,
        kl=lambda step: missing if step == 50 else 1.0,
        length=lambda step: missing if step % 7 == 0 else 50,
        reward=lambda step: missing if step % 3 == 0 else step,
        held_out=lambda step: missing if step == 60 else 2.0 if step < 50 else 1 - step / 100,
    )
    assert stop(lines, kl=5, length=1.5) is None
    assert (stop(lines, held_out=3) or (0,))[0] == 80  # it fell at 50, 70 and 80
    assert stop(run(100, reward=lambda _: missing, held_out=lambda step: -step), held_out=1) is None
    assert reason(StopWhen(kl=1, length=2, held_out=1), []) is None


@given(st.integers(0, 2**16), st.integers(1, 120))
def test_a_run_that_goes_on_from_a_checkpoint_decides_as_before(seed: int, step: int) -> None:
    rules = StopWhen(kl=8, length=2, held_out=4)
    lines = overoptimised(seed % 7)
    until = [line for line in lines if line["step"] <= step]
    read_back = [json.loads(json.dumps(line)) for line in until]
    assert reason(rules, read_back) == reason(rules, until)
    shuffled = sorted(until, key=lambda line: (line["step"], "held_out/reward" not in line))  # the evaluation's line first
    assert reason(rules, shuffled) == reason(rules, until)


# ---------------------------------------------------------------- samples


def test_samples_are_lines_that_can_be_taken_back(tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.jsonl")
    for step in (10, 20, 30):
        samples.append(
            step, [{"response": f"r{n} \ud800\u2028", "reward": None, "terms": {"a": float("nan")}} for n in range(2)]
        )
    with samples.path.open("a") as file:
        file.write('{"part": "train", "st')  # cut off by a kill
    samples.take_back(20)
    samples.append(30, [{"response": "again", "reward": 0.5, "terms": {}}])
    found = read_jsonl(samples.path)
    assert [(line["step"], line["response"][:2]) for line in found] == [
        *((step, f"r{n}") for step in (10, 20) for n in range(2)),
        (30, "ag"),
    ]
    assert found[0] == {"part": "train", "step": 10, "response": "r0 \ud800\u2028", "reward": None, "terms": {"a": "nan"}}
    samples.take_back(0)
    assert read_jsonl(samples.path) == []


def test_watching_needs_no_heavy_package() -> None:
    code = "import sys, rlaif.rl.watch; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
