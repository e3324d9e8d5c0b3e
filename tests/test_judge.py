"""Chain of thought, self-consistency and the clamp: what is asked, what is read from it, and what several samples are worth."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rlaif.data import Item
from rlaif.engines.mock import MockEngine
from rlaif.label.judge import DRAWS, Asking, dispersion
from rlaif.label.pairwise import PairwiseLabeler
from rlaif.labeler import Labeler
from rlaif.prompts import load_template
from rlaif.records import LABELLED, Completion, NoLogprobsError, RefusedError, Request, Row, RowError, UsageError
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server
from tests.test_label import label, planted

SYSTEM = '{% extends "pairwise/_layout.jinja" %}{% block system %}You judge.{% endblock %}'
WORSE = (
    '---\nasks_for: worse\n---\n{% extends "pairwise/PARENT.jinja" %}'
    "{% block preamble %}You look for the worse of two responses.{% endblock %}"
)
ROW = {"id": "0", "prompt": "Why?", "response_a": "Because.", "response_b": "Who knows."}

Say = Callable[[Request], Completion]


class Recorder(MockEngine):
    """The mock engine, with what it was asked and what it answered."""

    def __init__(self, **plant: Any):
        super().__init__(**plant)
        self.seen: list[tuple[Request, Completion | None]] = []

    async def complete(self, request: Request) -> Completion:
        try:
            answer = await super().complete(request)
        except NoLogprobsError:
            self.seen.append((request, None))
            raise
        self.seen.append((request, answer))
        return answer


def judged(say: Say, row: Row = ROW, **knobs: Any) -> tuple[Row, list[Request]]:
    """The result of one row in one order, each request answered by the function, and the requests in their order."""
    sent: list[Request] = []

    async def ask(request: Request) -> Completion:
        sent.append(request)
        return say(request)

    labeler = Labeler().changed(**{"both_orders": False, **knobs}).pairwise()
    result = asyncio.run(labeler(Item(row, row["prompt"], "here", None), ask))
    return result, sent


def thinking(text: str, p: float = 0.8, **how: Any) -> Say:
    """Says the text where a rationale is asked for, and gives P(first) where log-probabilities are."""

    def say(request: Request) -> Completion:
        if request.choices:
            return Completion("1", {"1": math.log(p), "2": math.log(1 - p)}, None, "length", None, 20, 1)
        return Completion(text, **{"finish": "stop", "prompt_tokens": 10, "completion_tokens": 5, **how})

    return say


def saying(text: str, **how: Any) -> Say:
    return lambda _: Completion(text, **{"finish": "stop", **how})


def raising(error: Exception) -> Say:
    def say(_: Request) -> Completion:
        raise error

    return say


# ------------------------------------------------------------ two calls


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("system", [False, True])
def test_two_calls_a_sample_and_order_the_second_with_the_rationale_of_the_first(
    tmp_path: Path, samples: int | None, system: bool
) -> None:
    (tmp_path / "system.jinja").write_text(SYSTEM)
    name = str(tmp_path / "system.jinja") if system else "helpful-base"
    path, engine = write_jsonl(tmp_path / "d.jsonl", planted(5, seed=1)), Recorder(noise=1.0)
    rows = label(path, tmp_path / "o.jsonl", engine, name, cot="two-call", samples=samples, rationale_tokens=77)
    count = samples or 1
    assert engine.calls == 5 * 2 * 2 * count
    lead = ["system"] if system else []
    first = [(r, a) for r, a in engine.seen if len(r.messages) == len(lead) + 1]
    second = [(r, a) for r, a in engine.seen if len(r.messages) > len(lead) + 1]
    assert len(first) == len(second) == 5 * 2 * count
    for request, _ in first:
        assert [m["role"] for m in request.messages] == [*lead, "user"]
        assert (request.choices, request.prefix, request.max_tokens) == ((), "", 77)
        assert "Before you answer, think" in request.messages[-1]["content"]
    prefix = load_template(name).render(prompt="", response_1="", response_2="")[1]
    for request, _ in second:
        assert [m["role"] for m in request.messages] == [*lead, "user", "assistant", "user"]
        assert (request.choices, request.prefix) == (("1", "2"), prefix)
        assert prefix
        assert request.messages[-1]["content"].endswith("Reply with its number alone, 1 or 2.")
        # The question goes on from the very message that the rationale answers.
        said = request.messages[-2]["content"]
        assert request.messages[:-2] in [r.messages for r, a in first if a and a.text == said]
    votes = [vote for row in rows for vote in row["votes"]]
    assert [vote["sample"] for vote in rows[0]["votes"]] == 2 * list(range(count))
    for vote in votes:
        thought = next(a for _, a in first if a and a.text == vote["rationale"])
        answer = next(a for r, a in second if a and r.messages[-2]["content"] == vote["rationale"])
        assert vote["prompt_tokens"] == thought.prompt_tokens + answer.prompt_tokens
        assert vote["completion_tokens"] == thought.completion_tokens + answer.completion_tokens
        assert vote["logprobs"] == answer.logprobs
        p = math.exp(vote["logprobs"]["1"]) / sum(map(math.exp, vote["logprobs"].values()))
        assert vote["soft_label"] == pytest.approx(p if vote["order"] == "ab" else 1 - p)
    assert len({vote["rationale"] for vote in votes}) == len(votes)


def test_the_label_after_a_rationale_is_that_of_the_log_probabilities_whatever_the_rationale_says() -> None:
    row, sent = judged(thinking("The answer is 1. Response 1 is better.\n1", p=0.3), cot="two-call")
    assert len(sent) == 2
    assert (row["label"], row["soft_label"]) == ("b", pytest.approx(0.3))
    (vote,) = row["votes"]
    assert (vote["prompt_tokens"], vote["completion_tokens"], vote["text"]) == (30, 6, "1")


def test_a_shown_exemplar_has_its_rationale_only_where_the_row_gets_one() -> None:
    for cot, there in (("off", False), ("two-call", True), ("one-call", True)):
        _, sent = judged(thinking("x"), cot=cot, shots=2, template="helpful-base")
        text = sent[0].messages[0]["content"]
        shown = text.partition("Now the comparison that you are to judge.")[0]
        assert (shown.count("Response 1") >= 2) == there
        assert shown.count("<example>") == 2


# ------------------------------------------------------------ one call


@pytest.mark.parametrize(
    "before",
    [
        "The answer is 1.",
        "1",
        "Response 1 is better.",
        "Preferred response: <response_1>",
        "1\n1\n1",
        "1\n\n",
        "It says:\u20281\u2028so it is 1.",
        "\r1\r",
        "1\x0c1\x85",
    ],
)
def test_of_one_text_only_the_last_line_is_the_verdict(before: str) -> None:
    for last, soft in (("2", 0.0), ("1", 1.0), ("Preferred response: <response_2>", 0.0)):
        row, sent = judged(saying(f"{before}\n{last}\n"), cot="one-call")
        assert len(sent) == 1
        assert (row["soft_label"], row["votes"][0]["rationale"]) == (soft, before.strip())
    for last in ("Both are fine.", "1 or 2", "Response 1 is better than response 2.", "1\u2028or so", "1\rthen", "1\x0bthen"):
        row, _ = judged(saying(f"{before}\n{last}"), cot="one-call")
        assert (row["status"], row["label"], row["soft_label"]) == ("unparsed", None, None)


@settings(deadline=None, max_examples=50)
@given(
    before=st.lists(st.sampled_from(["1", "the answer is 1", "\n", "\r", "\u2028", "\x0b", " ", "\x1c", "x", "2"])).map("".join)
)
def test_no_rationale_changes_the_verdict_of_the_last_line(before: str) -> None:
    assert judged(saying(before + "\n2"), cot="one-call")[0]["soft_label"] == 0.0


def test_one_call_asks_for_rationale_and_answer_in_one_text_and_for_no_log_probabilities() -> None:
    _, (request,) = judged(saying("A thought.\n1"), cot="one-call", rationale_tokens=100)
    assert (request.choices, request.prefix, request.max_tokens, request.temperature) == ((), "", 132, 0.0)
    assert "alone on the last line" in request.messages[0]["content"]


def test_a_text_that_was_cut_off_is_unparsed_whatever_its_last_line() -> None:
    row, _ = judged(saying("A long thought.\n1", finish="length"), cot="one-call")
    assert (row["status"], row["label"], row["soft_label"]) == ("unparsed", None, None)
    assert row["votes"][0]["text"] == "A long thought.\n1"


# ------------------------------------------------------------ failures


FAILING: list[tuple[Say, str]] = [
    (thinking(""), "unparsed"),
    (thinking(" \n\t"), "unparsed"),
    (thinking("I'm sorry, but I can't help with that."), "refused"),
    (thinking("", refusal="I must decline."), "refused"),
    (thinking("Response 1 is", finish="content_filter"), "refused"),
    (raising(RowError("too long")), "error"),
    (raising(RefusedError("filtered")), "refused"),
]


@pytest.mark.parametrize(("say", "status"), FAILING)
@pytest.mark.parametrize("cot", ["two-call", "one-call"])
def test_a_rationale_that_failed_is_never_a_label(say: Say, status: str, cot: str) -> None:
    row, sent = judged(say, cot=cot)
    assert (row["status"], row["label"], row["soft_label"], row["dispersion"]) == (status, None, None, None)
    assert len(sent) == 1  # nothing is asked about a rationale that is not there
    assert [vote["soft_label"] for vote in row["votes"]] == [None]


@pytest.mark.parametrize(
    ("say", "status"),
    [
        (raising(RowError("too long")), "error"),
        (raising(RefusedError("filtered")), "refused"),
        (lambda r: Completion("Neither of them matters.", {} if r.choices else None), "unparsed"),
        (lambda r: Completion("I cannot judge this.", {} if r.choices else None), "refused"),
        (lambda _: Completion("1", None, None, "content_filter"), "refused"),
        (lambda _: Completion("", None, None, "stop", "I must decline."), "refused"),
    ],
)
def test_an_answer_that_failed_after_a_good_rationale_is_never_a_label(say: Say, status: str) -> None:
    row, _ = judged(lambda r: say(r) if len(r.messages) > 1 else thinking("The answer is 1.")(r), cot="two-call")
    assert (row["status"], row["label"], row["soft_label"]) == (status, None, None)
    assert all(vote["rationale"] == "The answer is 1." for vote in row["votes"] if status != "error")


@pytest.mark.parametrize("cot", ["two-call", "one-call"])
def test_samples_that_failed_are_left_out_while_one_is_good(cot: str) -> None:
    def say(request: Request) -> Completion:
        if request.sample == 1:
            raise RowError("boom")
        if request.choices:
            p = {"Thought 0": 0.6, "Thought 2": 0.9}[request.messages[-2]["content"]]
            return Completion("1", {"1": math.log(p), "2": math.log(1 - p)})
        return Completion(f"Thought {request.sample}" + ("\n1" if cot == "one-call" else ""), None, None, "stop")

    row, _ = judged(say, cot=cot, samples=3)
    assert [vote["status"] for vote in row["votes"]] == ["ok", "error", "ok"]
    assert [vote["sample"] for vote in row["votes"]] == [0, 1, 2]
    softs = [0.6, 0.9] if cot == "two-call" else [1.0, 1.0]
    assert row["soft_label"] == pytest.approx(sum(softs) / 2)
    assert row["dispersion"] == pytest.approx(np.std(softs, ddof=1))


def test_planted_failures_of_rationales_and_answers_never_become_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(150, seed=4))
    for cot, calls in (("two-call", 2), ("one-call", 1)):
        rows = label(path, tmp_path / f"{cot}.jsonl", MockEngine(refuse=0.05, garbage=0.05), cot=cot)
        failed = [row for row in rows if row["status"] not in LABELLED]
        assert all(row["label"] is None and row["soft_label"] is None for row in failed)
        assert {row["status"] for row in failed} == {"refused", "unparsed"}
        # Garbage in place of a rationale is a rationale, but for the empty one of five kinds; a refusal never is one.
        lost = 1 - 0.94 * 0.9 if cot == "two-call" else 0.1
        share = 1 - (1 - lost) ** 2
        assert abs(len(failed) / 150 - share) < 4 * math.sqrt(share * (1 - share) / 150), (cot, calls)


# ------------------------------------------------------------ self-consistency

SIGMA = 1.5
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)


def moments(deltas: Any) -> tuple[Any, Any, Any]:
    """Mean, variance and kurtosis of σ(Δ + SIGMA·ε) for each Δ, ε standard normal, by Gauss–Hermite quadrature."""
    share = WEIGHTS / WEIGHTS.sum()
    values = 1 / (1 + np.exp(-(np.asarray(deltas)[:, None] + SIGMA * NODES)))
    mean = values @ share
    away = values - mean[:, None]
    return mean, away**2 @ share, (away**4 @ share) / (away**2 @ share) ** 2


def test_several_rationales_lower_planted_noise_at_the_rate_of_the_mean_and_dispersion_tells_its_size(tmp_path: Path) -> None:
    count = 120
    rows = planted(count, seed=8)
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    mean, var, kurtosis = moments([row["quality_a"] - row["quality_b"] for row in rows])
    ratios = []
    for n in (1, 4, 16):
        engine = MockEngine(k=1.0, noise=SIGMA, seed=n)
        out = label(path, tmp_path / f"{n}.jsonl", engine, "summary-base", cot="two-call", samples=n, both_orders=False)
        away = np.array([row["soft_label"] for row in out]) - mean
        # The variance of a mean of n draws is 1/n of one draw's: each row's squared distance, in these terms, is 1 in the mean.
        # Tolerance: four standard errors, from the kurtosis of a mean of n draws.
        error = math.sqrt(float(np.mean((kurtosis - 3) / n + 2)) / count)
        ratios.append(float(np.mean(away**2 / (var / n))))
        assert ratios[-1] == pytest.approx(1, abs=4 * error), n
        assert abs(np.mean(away / np.sqrt(var / n))) < 4 / math.sqrt(count)
        found = [row["dispersion"] for row in out]
        if n == 1:
            assert found == [None] * count
        else:
            error = math.sqrt(2 / ((n - 1) * count))
            assert np.mean(np.square(found) / var) == pytest.approx(1, abs=4 * error)
    # Without the fall, the ratio at 16 samples would be 16, and 4 where it fell by the root.
    assert max(ratios) < 2


def test_without_noise_every_rationale_gives_the_same_label(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(10, seed=8))
    rows = label(path, tmp_path / "o.jsonl", MockEngine(k=1.0), cot="two-call", samples=3)
    for row in rows:
        assert row["soft_label"] == pytest.approx(1 / (1 + math.exp(row["quality_b"] - row["quality_a"])))
        assert row["dispersion"] == pytest.approx(0, abs=1e-9)


def test_dispersion_is_by_hand_the_pooled_standard_deviation() -> None:
    assert dispersion([[0.1, 0.5], [0.2, 0.2, 0.8], [0.9], []]) == pytest.approx(math.sqrt((0.08 + 0.12) / 2))
    assert dispersion([[0.4], [0.6]]) is None


# ------------------------------------------------------------ samples and temperatures


def test_several_samples_at_temperature_zero_are_refused() -> None:
    with pytest.raises(UsageError, match="2 samples at temperature 0 would all be the same"):
        Asking(samples=2, temperature=0.0)
    assert Asking(samples=1, temperature=0.0).rationales == 1
    with pytest.raises(UsageError, match="temperature 0"):
        Labeler(samples=4, temperature=0, cot="two-call").pairwise()


@pytest.mark.parametrize(
    ("samples", "temperature", "warm"), [(None, None, 0.0), (1, None, 0.0), (3, None, 1.0), (1, 0.4, 0.4), (3, 0.4, 0.4)]
)
@pytest.mark.parametrize("cot", ["two-call", "one-call"])
def test_one_rationale_is_drawn_at_temperature_0_and_several_at_1_unless_told(
    cot: str, samples: int | None, temperature: float | None, warm: float
) -> None:
    _, sent = judged(thinking("A thought.\n1"), cot=cot, samples=samples, temperature=temperature, seed=6)
    thoughts = [request for request in sent if not request.choices]
    assert [request.temperature for request in thoughts] == [warm] * (samples or 1)
    assert sorted(request.sample for request in thoughts) == list(range(samples or 1))
    assert {request.temperature for request in sent if request.choices} <= {0.0}
    assert {request.seed for request in sent} == {6}


def test_the_same_rationale_drawn_twice_is_asked_about_once(tmp_path: Path) -> None:
    class Parrot(Recorder):
        async def complete(self, request: Request) -> Completion:
            answer = await super().complete(request)
            return answer if request.choices else Completion("Same thought.", None, None, "stop", None, 3, 1)

    engine = Parrot()
    path = write_jsonl(tmp_path / "d.jsonl", planted(2, seed=1))
    rows = label(path, tmp_path / "o.jsonl", engine, cot="two-call", samples=4, both_orders=False)
    assert engine.calls == 2 * (4 + 1)
    assert all(len(row["votes"]) == 4 and row["dispersion"] == 0 for row in rows)


def test_without_log_probabilities_each_of_several_rationales_gives_one_verdict(tmp_path: Path) -> None:
    path, engine = write_jsonl(tmp_path / "d.jsonl", planted(4, seed=1)), Recorder(logprobs=False)
    rows = label(path, tmp_path / "o.jsonl", engine, cot="two-call", samples=5)
    for row in rows:
        assert len(row["votes"]) == 10
        assert all(vote["logprobs"] is None and vote["soft_label"] in (0.0, 1.0) for vote in row["votes"])
        assert [vote["sample"] for vote in row["votes"]] == 2 * list(range(5))
        assert len({vote["rationale"] for vote in row["votes"]}) == 10
    spoken = [request for request, _ in engine.seen if len(request.messages) == 3 and not request.choices]
    assert {request.temperature for request in spoken} == {0.0}


def test_without_log_probabilities_one_rationale_gives_drawn_verdicts(tmp_path: Path) -> None:
    path, engine = write_jsonl(tmp_path / "d.jsonl", planted(4, seed=1)), Recorder(logprobs=False)
    rows = label(path, tmp_path / "o.jsonl", engine, cot="two-call")
    for row in rows:
        assert len(row["votes"]) == 2 * DRAWS
        assert len({vote["rationale"] for vote in row["votes"]}) == 2
    spoken = [request for request, _ in engine.seen if len(request.messages) == 3 and not request.choices]
    assert {request.temperature for request in spoken} == {1.0}
    assert {request.sample for request in spoken} == set(range(DRAWS))


def test_one_call_gives_a_verdict_a_sample_and_their_share_is_the_label(tmp_path: Path) -> None:
    rows = [{**row, "quality_a": 0.4, "quality_b": 0.0} for row in planted(40, seed=1)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    engine = MockEngine(k=2.0)
    out = label(path, tmp_path / "o.jsonl", engine, cot="one-call", samples=8)
    assert engine.calls == 40 * 2 * 8
    for row in out:
        assert row["soft_label"] == pytest.approx(np.mean([vote["soft_label"] for vote in row["votes"]]))
        assert {vote["rationale"] for vote in row["votes"]} == {"A thought."}
    truth = 1 / (1 + math.exp(-0.8))
    assert np.mean([row["soft_label"] for row in out]) == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 640))


# ------------------------------------------------------------ the clamp


@pytest.mark.parametrize("asks_for", ["better", "worse"])
@pytest.mark.parametrize("cot", ["two-call", "one-call"])
def test_every_vote_stays_within_the_clamp_and_the_middle_is_untouched(tmp_path: Path, cot: str, asks_for: str) -> None:
    (tmp_path / "worse.jinja").write_text(WORSE.replace("PARENT", "general"))
    name = str(tmp_path / "worse.jinja") if asks_for == "worse" else "general"
    path, engine = write_jsonl(tmp_path / "d.jsonl", planted(40, seed=2)), MockEngine(k=1.0, noise=1.0)
    free = label(path, tmp_path / "free.jsonl", engine, name, cot=cot)
    held = label(path, tmp_path / "held.jsonl", engine, name, cot=cot, cot_clamp=(0.4, 0.6))
    free_votes, held_votes = ([vote for row in rows for vote in row["votes"]] for rows in (free, held))
    softs = [(f["soft_label"], h["soft_label"]) for f, h in zip(free_votes, held_votes, strict=True)]
    assert all(h == min(max(f, 0.4), 0.6) for f, h in softs)
    assert {0.4, 0.6} <= {h for _, h in softs}
    if cot == "two-call":
        assert any(0.4 < h < 0.6 for _, h in softs)
    assert all(0.4 <= row["soft_label"] <= 0.6 for row in held)
    # What the model said is kept as it was.
    assert [vote["logprobs"] for vote in free_votes] == [vote["logprobs"] for vote in held_votes]


@pytest.mark.parametrize(
    "clamp", [(0.4, 0.7), (0.3, 0.6), (0.6, 0.4), (0.5, 0.5), (-0.1, 1.1), (0.4, 0.5), (math.nan, math.nan), (0.0, math.inf)]
)
def test_a_clamp_that_is_not_symmetric_around_a_half_is_refused(clamp: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="two bounds that add up to 1, the lower first"):
        PairwiseLabeler(load_template("general"), Asking("two-call"), clamp=clamp)


def test_a_clamp_without_chain_of_thought_is_refused() -> None:
    with pytest.raises(UsageError, match="--cot-clamp goes with --cot"):
        Labeler(cot_clamp=(0.4, 0.6)).pairwise()
    assert Labeler(cot_clamp=(0.0, 1.0), cot="one-call").pairwise().clamp == (0.0, 1.0)


def test_a_template_without_the_block_that_asks_for_a_rationale_is_refused(tmp_path: Path) -> None:
    bare = tmp_path / "bare.jinja"
    bare.write_text(
        "{% block sample %}{{ prompt }} {{ response_1 }} {{ response_2 }}{% endblock %}{% block ending %}?{% endblock %}"
    )
    assert judged(thinking("x"), template=str(bare))[0]["status"] == "ok"
    for cot, block in (("two-call", "thinking"), ("one-call", "reasoned")):
        with pytest.raises(UsageError, match=f"--cot {cot} needs a block '{block}'"):
            judged(thinking("x"), template=str(bare), cot=cot)


# ------------------------------------------------------------ swapping


def turned(row: Row) -> Row:
    """The same comparison with A and B the other way round."""
    sides = {"response_a": "response_b", "response_b": "response_a", "quality_a": "quality_b", "quality_b": "quality_a"}
    return {name: row[sides.get(name, name)] for name in row}


# Not shrunk, which would take minutes: the example that is found says enough.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate])
@given(
    knobs=st.fixed_dictionaries(
        {
            "cot": st.sampled_from(["off", "two-call", "one-call"]),
            "samples": st.sampled_from([None, 1, 2, 3]),
            "temperature": st.sampled_from([None, 0.7]),
            "shots": st.sampled_from([0, 1, 3, 4]),
            "choose": st.sampled_from(["fixed", "random", "nearest"]),
            "constitution": st.sampled_from([None, "example"]),
            "principles": st.sampled_from(["one", "all", 2]),
            "calibration": st.sampled_from([None, {"temperature": 1.7, "position_bias": -0.6}]),
            "seed": st.integers(0, 3),
        }
    ),
    clamp=st.sampled_from([None, (0.4, 0.6)]),
    asks_for=st.sampled_from(["better", "worse"]),
    plant=st.fixed_dictionaries(
        {
            "bias": st.sampled_from([0.0, 1.3]),
            "noise": st.sampled_from([0.0, 1.0]),
            "refuse": st.sampled_from([0.0, 0.03]),
            "garbage": st.sampled_from([0.0, 0.05]),
            "logprobs": st.booleans(),
            "seed": st.integers(0, 3),
        }
    ),
)
def test_swapping_the_responses_mirrors_every_label_whatever_the_method(
    tmp_path_factory: pytest.TempPathFactory,
    knobs: dict[str, Any],
    clamp: tuple[float, float] | None,
    asks_for: str,
    plant: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("swap")
    template = "constitution" if knobs["constitution"] else "general"
    if asks_for == "worse":
        (folder / "worse.jinja").write_text(WORSE.replace("PARENT", template))
        template = str(folder / "worse.jinja")
    if knobs["cot"] != "off":
        knobs = {**knobs, "cot_clamp": clamp}
    rows = planted(6, seed=plant["seed"])
    made = []
    for name, some in (("ab", rows), ("ba", [turned(row) for row in rows])):
        path = write_jsonl(folder / f"{name}.jsonl", some)
        made.append(label(path, folder / f"{name}.out.jsonl", MockEngine(k=1.0, **plant), template, **knobs))
    mirror = {"a": "b", "b": "a", "tie": "tie", None: None}
    for row, other in zip(*made, strict=True):
        assert row["status"] == other["status"]
        assert mirror[row["label"]] == other["label"]
        assert (row["soft_label"] is None) == (other["soft_label"] is None) == (row["status"] not in LABELLED)
        if row["soft_label"] is not None:
            assert row["soft_label"] + other["soft_label"] == pytest.approx(1, abs=1e-9)
        assert row["dispersion"] == pytest.approx(other["dispersion"], abs=1e-9)


# ------------------------------------------------------------ over HTTP


def test_two_calls_over_http_give_the_planted_labels_with_the_servers_rationales(server: Server, tmp_path: Path) -> None:
    server.speak = lambda p: f"I see [q=9] and [q=-9] in it, and {p:.6f}."
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(8))
    arguments = ("--engine", "openai", "--base-url", server.url, "--cot", "two-call", "--rationale-tokens", "99")
    done = cli("label", path, "-o", tmp_path / "o.jsonl", *arguments)
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "o.jsonl"):
        p = 1 / (1 + math.exp(row["quality_b"] - row["quality_a"]))
        assert row["soft_label"] == pytest.approx(p, abs=1e-6)
        said = [f"I see [q=9] and [q=-9] in it, and {q:.6f}." for q in (p, 1 - p)]
        assert [vote["rationale"] for vote in row["votes"]] == said
    assert len(server.bodies) == 8 * 2 * 2
    first = [body for body in server.bodies if not body.get("logprobs")]
    second = [body for body in server.bodies if body.get("logprobs")]
    assert len(first) == len(second)
    assert {(body["temperature"], body["max_tokens"]) for body in first} == {(0.0, 99)}
    assert {tuple(m["role"] for m in body["messages"]) for body in second} == {("user", "assistant", "user")}
    report = (tmp_path / "o.jsonl.run.json").read_text()
    assert '"cot": "two-call"' in report


def test_one_call_over_http_takes_the_last_line(server: Server, tmp_path: Path) -> None:
    server.speak = lambda p: "The answer is 1.\n1 is better.\n" + ("1" if p > 0.5 else "2")
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(8))
    arguments = (
        "--engine",
        "openai",
        "--base-url",
        server.url,
        "--cot",
        "one-call",
        "--samples",
        "2",
        "--cot-clamp",
        "0.2,0.8",
    )
    done = cli("label", path, "-o", tmp_path / "o.jsonl", *arguments)
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "o.jsonl"):
        assert row["soft_label"] == pytest.approx(0.8 if row["quality_a"] > row["quality_b"] else 0.2)
        assert {vote["rationale"] for vote in row["votes"]} == {"The answer is 1.\n1 is better."}
    assert len(server.bodies) == 8 * 2 * 2
    assert not any(body.get("logprobs") for body in server.bodies)
    assert {body["temperature"] for body in server.bodies} == {1.0}
    assert len({body["seed"] for body in server.bodies}) == 2


def test_several_samples_at_temperature_zero_are_refused_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    arguments = ("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url)
    for options, words in (
        (("--cot", "two-call", "--samples", "3", "--temperature", "0"), "3 samples at temperature 0"),
        (("--cot-clamp", "0.4,0.6"), "--cot-clamp goes with --cot"),
        (("--cot", "one-call", "--cot-clamp", "0.4,0.9"), "add up to 1"),
        (("--cot", "one-call", "--cot-clamp", "0.4"), "expected two numbers, LOW,HIGH"),
    ):
        done = cli(*arguments, *options)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not server.bodies
