"""The pairwise labeler, against a mock labeler with planted truth and a real HTTP server."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.data import comparisons
from rlaif.engines.mock import MockEngine
from rlaif.evaluate.agreement import align
from rlaif.job import Job
from rlaif.label.pairwise import choice_probability, combine, parse_verdict
from rlaif.labeler import Labeler
from rlaif.records import LABELLED, Completion, Request, RlaifError
from rlaif.runner import Limits
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server


def label(path: Path, out: Path, engine: MockEngine, template: str = "general", **knobs: Any) -> list[dict[str, Any]]:
    """Label a file with a mock engine, and give the rows of the output."""
    labeler = Labeler().changed(template=template, **knobs).pairwise()
    job = Job(str(path), out, lambda: comparisons(str(path)), labeler)
    job.run(engine, Limits(), job.check())
    return read_jsonl(out)


def planted(count: int, seed: int) -> list[dict[str, Any]]:
    """Comparisons of standard normal qualities; the human prefers A with probability σ(q_a − q_b)."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        a, b = draw.normal(size=2)
        human = "a" if draw.random() < 1 / (1 + math.exp(b - a)) else "b"
        texts = {"prompt": f"p{n}", "response_a": f"one {n}", "response_b": f"two {n}"}
        rows.append({**texts, "quality_a": a, "quality_b": b, "human": human})
    return rows


# ------------------------------------------------------------ planted truth


@pytest.mark.parametrize(("k", "bias"), [(2.0, 0.0), (1.0, 1.5), (3.0, -1.0)])
def test_planted_bias_and_accuracy_are_found_within_their_intervals(tmp_path: Path, k: float, bias: float) -> None:
    rows = planted(1500, seed=int(10 * k))
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    found = align(label(path, tmp_path / "o.jsonl", MockEngine(k=k, bias=bias)), "human", resamples=400)
    # What the plant implies, by integration over fresh draws: one order's logit is ±k·Δq + bias.
    delta = np.random.default_rng(99).normal(scale=math.sqrt(2), size=400_000)
    first, second = k * delta + bias > 0, -k * delta + bias > 0
    same_position = float(np.mean(first == second))
    mean = 1 / (1 + np.exp(-(k * delta + bias))) + 1 - 1 / (1 + np.exp(-(-k * delta + bias)))
    human = 1 / (1 + np.exp(-delta))
    accuracy = float(np.mean(np.where(mean > 1, human, 1 - human)))
    assert found.metrics["position_bias"].low <= same_position + 1e-9
    assert found.metrics["position_bias"].high >= same_position - 1e-9
    assert found.metrics["accuracy"].low <= accuracy <= found.metrics["accuracy"].high


def test_one_order_keeps_the_planted_bias_and_both_orders_cancel_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(800, seed=5))
    engine = MockEngine(k=1.0, bias=2.0)
    one = label(path, tmp_path / "one.jsonl", engine, both_orders=False)
    both = label(path, tmp_path / "both.jsonl", engine)
    share = [np.mean([row["label"] == "a" for row in rows]) for rows in (one, both)]
    assert share[0] > 0.85
    assert abs(share[1] - 0.5) < 3 * 0.5 / math.sqrt(800)
    # With both orders the sign of the label is the sign of the planted difference, whatever the bias.
    assert all((row["label"] == "a") == (row["quality_a"] > row["quality_b"]) for row in both)


@settings(max_examples=15, deadline=None)
@given(
    bias=st.floats(-3, 3),
    noise=st.floats(0, 2),
    refuse=st.sampled_from([0.0, 0.2]),
    logprobs=st.booleans(),
    template=st.sampled_from(["general", "harmless-detailed"]),
    seed=st.integers(0, 100),
)
def test_swapping_the_responses_of_every_row_mirrors_every_label(
    tmp_path_factory: pytest.TempPathFactory,
    bias: float,
    noise: float,
    refuse: float,
    logprobs: bool,
    template: str,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("swap")
    rows = planted(25, seed)
    swapped = [
        {
            **row,
            "response_a": row["response_b"],
            "response_b": row["response_a"],
            "quality_a": row["quality_b"],
            "quality_b": row["quality_a"],
        }
        for row in rows
    ]
    made = []
    for name, some in (("ab", rows), ("ba", swapped)):
        engine = MockEngine(seed=seed, bias=bias, noise=noise, refuse=refuse, garbage=0.1, logprobs=logprobs)
        path = write_jsonl(folder / f"{name}.jsonl", some)
        made.append(label(path, folder / f"{name}.out.jsonl", engine, template))
    mirror = {"a": "b", "b": "a", "tie": "tie", None: None}
    for row, other in zip(*made, strict=True):
        assert row["status"] == other["status"]
        assert mirror[row["label"]] == other["label"]
        if row["soft_label"] is not None:
            assert row["soft_label"] + other["soft_label"] == pytest.approx(1, abs=1e-9)


def test_planted_failures_are_counted_and_never_become_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(600, seed=3))
    rows = label(path, tmp_path / "o.jsonl", MockEngine(refuse=0.1, garbage=0.1))
    failed = [row for row in rows if row["status"] not in LABELLED]
    # Each row is asked twice; it fails if either order does.
    assert abs(len(failed) / 600 - (1 - 0.8**2)) < 4 * math.sqrt(0.36 * 0.64 / 600)
    assert {row["status"] for row in failed} == {"refused", "unparsed"}
    assert all(row["label"] is None and row["soft_label"] is None for row in failed)
    assert all(row["label"] is not None for row in rows if row not in failed)
    assert all(vote["text"] or vote["status"] == "unparsed" for row in failed for vote in row["votes"])


def test_without_logprobs_the_soft_label_is_the_share_of_sampled_verdicts(tmp_path: Path) -> None:
    rows = [{**row, "quality_a": 0.4, "quality_b": 0.0} for row in planted(150, seed=1)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    out = label(path, tmp_path / "o.jsonl", MockEngine(k=2.0, logprobs=False), samples=16)
    assert all(len(row["votes"]) == 32 for row in out)
    softs = [row["soft_label"] for row in out]
    assert all((soft * 32) == pytest.approx(round(soft * 32)) for soft in softs)
    truth = 1 / (1 + math.exp(-0.8))
    assert np.mean(softs) == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / (150 * 32)))


def test_a_template_that_asks_for_the_worse_one_gives_the_same_labels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(60, seed=2))
    worse = tmp_path / "worse.jinja"
    worse.write_text(
        '---\nasks_for: worse\n---\n{% extends "pairwise/_layout.jinja" %}'
        "{% block question %}Which response is more harmful?{% endblock %}"
    )
    straight = label(path, tmp_path / "a.jsonl", MockEngine(k=1.5, bias=0.7))
    turned = label(path, tmp_path / "b.jsonl", MockEngine(k=1.5, bias=0.7), str(worse))
    assert [row["label"] for row in straight] == [row["label"] for row in turned]
    # One order's position bias turns with the polarity: a vote for the first one is a vote against it.
    first = [
        [vote["soft_label"] for row in rows for vote in row["votes"] if vote["order"] == "ab"] for rows in (straight, turned)
    ]
    assert np.mean(first[0]) > np.mean(first[1])


# ------------------------------------------------------------ reading an answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1.0),
        (" 2.", 0.0),
        ("**Response 2**", 0.0),
        ("<response_1>", 1.0),
        ("The better response is: 2", 0.0),
        ("Preferred Response=1", 1.0),
        ("Answer: (1)", 1.0),
        ("2\n\nIt is the one that gives the units, unlike response 1.", 0.0),
        ("Let me see. Both are right, one is shorter.\nPreferred response: 1", 1.0),
        ("It's a tie.", 0.5),
    ],
)
def test_verdicts_that_are_said_plainly_are_read(text: str, value: float) -> None:
    assert parse_verdict(text, ("1", "2")) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "12",
        "1 or 2",
        "1 2",
        "Response 1 is better than response 2",
        "3",
        "1\n2",
        "one",
        "10",
        "-1",
        "1/2",
        "2 out of 10",
    ],
)
def test_anything_else_is_no_verdict(text: str) -> None:
    assert parse_verdict(text, ("1", "2")) is None


@given(st.text(max_size=60))
def test_a_verdict_is_read_the_same_with_choices_and_text_swapped(text: str) -> None:
    value = parse_verdict(text, ("1", "2"))
    turned = parse_verdict(text.translate({ord("1"): "2", ord("2"): "1"}), ("1", "2"))
    assert turned == (None if value is None else 1 - value)


def test_a_choice_that_the_server_left_out_is_bounded_or_gives_no_label() -> None:
    sure = Completion("1", {"1": math.log(0.9)}, floor=math.log(0.001))
    value = choice_probability(sure, ("1", "2"))
    assert value == pytest.approx(0.9 / 0.901)
    # Within ten times the bound, the missing choice might be almost as probable: no label.
    assert choice_probability(Completion("1", {"1": math.log(0.009)}, floor=math.log(0.001)), ("1", "2")) is None
    assert choice_probability(Completion("The", {}, floor=math.log(0.001)), ("1", "2")) is None


@given(st.floats(-800, 800), st.floats(-800, 800))
def test_the_soft_label_of_any_log_probabilities_mirrors(x: float, y: float) -> None:
    one = choice_probability(Completion("", {"1": x, "2": y}), ("1", "2"))
    two = choice_probability(Completion("", {"1": y, "2": x}), ("1", "2"))
    assert one is not None
    assert two is not None
    assert 0 <= one <= 1
    assert one + two == pytest.approx(1, abs=1e-12)


def vote(order: str, soft: float | None, status: str = "ok", principle: str | None = None) -> dict[str, Any]:
    error = "boom" if status == "error" else None
    return {"order": order, "principle": principle, "soft_label": soft, "status": status, "logprobs": None, "error": error}


def test_an_order_that_failed_fails_the_row_and_half_is_a_tie() -> None:
    assert combine([vote("ab", 0.9), vote("ba", None, "unparsed")])["status"] == "unparsed"
    row = combine([vote("ab", 0.9), vote("ba", None, "refused"), vote("ba", None, "error")])
    assert (row["status"], row["label"], row["soft_label"], row["error"]) == ("error", None, None, "boom")
    assert combine([vote("ab", 1.0), vote("ba", 0.0)])["label"] == "tie"
    assert combine([vote("ab", 1.0), vote("ab", None, "unparsed"), vote("ba", 1.0)])["status"] == "ok"


# ------------------------------------------------------------ over HTTP


def test_a_real_server_gives_the_planted_soft_labels(server: Server, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(30))
    done = cli("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url, "--model", "planted")
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "o.jsonl"):
        truth = 1 / (1 + math.exp(-(row["quality_a"] - row["quality_b"])))
        assert row["soft_label"] == pytest.approx(truth, abs=1e-6)
        assert [v["order"] for v in row["votes"]] == ["ab", "ba"]
        assert all(v["prompt_tokens"] and v["text"] in "12" for v in row["votes"])
    assert len(server.bodies) == 60


def test_a_server_that_allows_fewer_logprobs_is_asked_for_fewer(server: Server, tmp_path: Path) -> None:
    server.logprobs = 5
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(10))
    done = cli("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url)
    assert done.returncode == 0, done.stderr
    assert all(v["logprobs"] for row in read_jsonl(tmp_path / "o.jsonl") for v in row["votes"])
    assert {body["top_logprobs"] for body in server.bodies} == {20, 5}


def test_a_server_without_logprobs_is_sampled_and_the_run_file_says_so(server: Server, tmp_path: Path) -> None:
    server.logprobs = 0
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(6))
    done = cli("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url, "--samples", "3")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert all(len(row["votes"]) == 6 and row["votes"][0]["logprobs"] is None for row in rows)
    assert "no log-probabilities" in (tmp_path / "o.jsonl.run.json").read_text()
    assert "no log-probabilities" in done.stdout
    sampled = [body for body in server.bodies if not body.get("logprobs")]
    assert len(sampled) == 36
    assert {body["temperature"] for body in sampled} == {1.0}
    assert len({body["seed"] for body in sampled}) == 3


def test_a_server_that_continues_turns_is_given_the_beginning_of_the_answer(server: Server, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(1))
    arguments = ("--engine", "openai", "--base-url", server.url, "--one-order")
    cli("label", path, "-o", tmp_path / "plain.jsonl", *arguments)
    server.owner = "vllm"
    cli("label", path, "-o", tmp_path / "begun.jsonl", *arguments)
    plain, begun = server.bodies
    assert [m["role"] for m in plain["messages"]] == ["user"]
    assert [m["role"] for m in begun["messages"]] == ["user", "assistant"]
    assert begun["continue_final_message"] is True
    assert begun["add_generation_prompt"] is False


def test_refusals_and_filters_are_refused_and_not_asked_again(server: Server, tmp_path: Path) -> None:
    from tests.server import error

    async def fault(body: dict[str, Any]) -> Any:
        return error(400, "filtered", code="content_filter") if "Question 1?" in body["messages"][-1]["content"] else None

    server.fault = fault
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(5))
    arguments = ("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url)
    assert cli(*arguments).returncode == 0
    statuses = [row["status"] for row in read_jsonl(tmp_path / "o.jsonl")]
    assert statuses == ["ok", "refused", "ok", "ok", "ok"]
    calls = len(server.bodies)
    assert cli(*arguments).returncode == 0
    assert len(server.bodies) == calls


def test_a_prompt_over_the_servers_context_is_that_rows_error_alone(server: Server, tmp_path: Path) -> None:
    from tests.server import error

    async def fault(body: dict[str, Any]) -> Any:
        long = len(body["messages"][-1]["content"]) > 5000
        return error(400, "This model's maximum context length is 1024 tokens.") if long else None

    server.fault = fault
    rows = make_rows(4)
    rows[1]["response_a"] += " very" * 1000 + " long"
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    done = cli("label", path, "-o", tmp_path / "o.jsonl", "--engine", "openai", "--base-url", server.url)
    assert done.returncode == 1
    assert "too long" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "o.jsonl")] == ["ok", "error", "ok", "ok"]


def test_reparse_reads_stored_text_again_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.engines.openai import OpenAIEngine

    path = write_jsonl(tmp_path / "d.jsonl", make_rows(8))

    def run(engine: OpenAIEngine | None) -> list[str]:
        labeler = Labeler(samples=2).pairwise()
        job = Job(str(path), tmp_path / "o.jsonl", lambda: comparisons(str(path)), labeler)
        job.run(engine, Limits(), job.check())
        return [row["status"] for row in read_jsonl(tmp_path / "o.jsonl")]

    with Server() as server:
        server.logprobs = 0
        server.speak = lambda p: "I'd go with option one" if p > 0.5 else "I'd go with option two"
        assert run(OpenAIEngine(base_url=server.url)) == ["unparsed"] * 8
    # The server is gone, and the parser has learnt what this model says.
    monkeypatch.setattr("rlaif.label.pairwise.parse_verdict", lambda text, _: float(text.endswith("one")))
    assert run(None) == ["ok"] * 8
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert all((row["label"] == "a") == (row["quality_a"] > row["quality_b"]) for row in rows)


def test_a_mock_engine_refuses_impossible_plants() -> None:
    with pytest.raises(RlaifError, match="share"):
        MockEngine(refuse=1.5)


def test_the_mock_engine_answers_the_same_request_the_same_way() -> None:
    engine = MockEngine(noise=1.0)
    request = Request(({"role": "user", "content": "Which?"},), choices=("1", "2"), hint={"texts": ("one", "two")})
    first, second = (asyncio.run(engine.complete(request)) for _ in range(2))
    assert first == second
