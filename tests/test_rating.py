"""Ratings: the expectation of a planted scale, what is no rating, several attributes and principles, the command."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.data import Item, responses
from rlaif.engines.mock import MockEngine
from rlaif.engines.openai import OpenAIEngine
from rlaif.job import Job
from rlaif.label.rating import UNSURE, Rater, expectation, parse_rating, scaled
from rlaif.labeler import Labeler
from rlaif.records import Completion, Request
from rlaif.runner import Limits
from tests.conftest import cli, read_jsonl, write_jsonl
from tests.server import Server

MARKS = tuple(str(n) for n in range(1, 11))

CONSTITUTION = "principles:\n" + "".join(
    f"- {{name: {name}, weight: {weight}, critique: C., revision: R., preference: 'Which is more {name}?'}}\n"
    for name, weight in (("kind", 3), ("brief", 1), ("exact", 2))
)


def chances(quality: float, k: float = 2.0, count: int = 10) -> list[float]:
    """The probabilities of the marks that the mock engine plants."""
    centre = 1 + (count - 1) / (1 + math.exp(-k * quality))
    masses = [math.exp(-((mark - centre) ** 2) / 2) for mark in range(1, count + 1)]
    return [mass / sum(masses) for mass in masses]


def planted(quality: float, k: float = 2.0, count: int = 10) -> float:
    """The score that the planted quality comes to."""
    found = chances(quality, k, count)
    return sum(p * (2 * n / (count - 1) - 1) for n, p in enumerate(found))


def rows(qualities: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"id": str(n), "prompt": f"p{n}", "response": f"r{n}", "quality": q} for n, q in enumerate(qualities)]


def rate(rater: Rater, engine: MockEngine, given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    async def all_of_them() -> list[dict[str, Any]]:
        return await asyncio.gather(*(rater(Item(row, row["prompt"], "here", None), engine.complete) for row in given))

    return asyncio.run(all_of_them())


class Deaf(MockEngine):
    """Says nothing that can be read where it is asked about one of `aspects`."""

    def __init__(self, aspects: set[str], **plants: Any):
        super().__init__(**plants)
        self.aspects = aspects

    async def complete(self, request: Request) -> Completion:
        assert request.hint
        if request.hint["aspect"] in self.aspects:
            return Completion("Purple.", {} if request.choices else None)
        return await super().complete(request)


# ------------------------------------------------------------ planted truth


@pytest.mark.parametrize("k", [0.0, 0.7, 2.0])
def test_the_score_is_the_planted_expectation(k: float) -> None:
    qualities = [-3.0, -0.5, 0.0, 0.1, 1.2, 4.0]
    found = rate(Labeler().rater(), MockEngine(k=k), rows(qualities))
    for quality, result in zip(qualities, found, strict=True):
        assert result["status"] == "ok"
        assert result["score"] == pytest.approx(planted(quality, k), abs=1e-9)
        assert result["scores"] == {"overall": result["score"]}
        assert [vote["score"] for vote in result["votes"]] == [result["score"]]
        assert set(result["votes"][0]["logprobs"]) == set(MARKS)


def test_the_score_grows_with_the_quality_from_near_minus_one_to_near_one() -> None:
    found = [result["score"] for result in rate(Labeler().rater(), MockEngine(k=3), rows(np.linspace(-4, 4, 9).tolist()))]
    assert found == sorted(found)
    assert len(set(found)) == 9
    assert -1 < found[0] < -0.85
    assert found[4] == pytest.approx(0, abs=1e-9)
    assert 0.85 < found[-1] < 1


def test_a_scale_of_five_is_spread_over_the_same_range(tmp_path: Path) -> None:
    template = tmp_path / "five.jinja"
    template.write_text('---\nchoices: ["1", "2", "3", "4", "5"]\n---\n{% extends "rating/_layout.jinja" %}')
    (result,) = rate(Labeler(attributes={str(template): 1.0}).rater(), MockEngine(k=1), rows([1.5]))
    assert result["score"] == pytest.approx(planted(1.5, 1, 5), abs=1e-9)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_the_marks_are_spaced_evenly_from_minus_one_to_one(count: int) -> None:
    places = [scaled(mark, count) for mark in range(count)]
    assert (places[0], places[-1]) == (-1.0, 1.0)
    assert np.diff(places) == pytest.approx([2 / (count - 1)] * (count - 1))


def test_several_attributes_are_averaged_by_their_weights() -> None:
    rater = Labeler(attributes={"helpful": 3.0, "honest": 1.0}).rater()
    (result,) = rate(rater, MockEngine(), rows([{"helpful": 1.0, "honest": -0.5}]))
    assert result["scores"] == pytest.approx({"helpful": planted(1.0), "honest": planted(-0.5)}, abs=1e-9)
    assert result["score"] == pytest.approx((3 * planted(1.0) + planted(-0.5)) / 4, abs=1e-9)
    assert [vote["attribute"] for vote in result["votes"]] == ["helpful", "honest"]


def test_an_attribute_that_fails_fails_the_row() -> None:
    rater = Labeler(attributes={"helpful": 9.0, "honest": 1.0}).rater()
    (result,) = rate(rater, Deaf({"honest"}), rows([1.0]))
    assert (result["status"], result["score"], result["scores"]) == ("unparsed", None, None)
    assert [vote["status"] for vote in result["votes"]] == ["ok", "unparsed", "unparsed"]
    assert [vote["score"] is None for vote in result["votes"]] == [False, True, True]


def test_a_template_that_asks_for_the_worse_one_turns_the_sign(tmp_path: Path) -> None:
    template = tmp_path / "harmful.jinja"
    template.write_text(
        '---\nasks_for: worse\n---\n{% extends "rating/_layout.jinja" %}{% block question %}How harmful is it?{% endblock %}'
    )
    given = rows([-1.0, 0.3, 2.0])
    for engine in (MockEngine(), MockEngine(logprobs=False)):
        turned = rate(Labeler(attributes={str(template): 1.0}, temperature=0).rater(), engine, given)
        straight = rate(Labeler(temperature=0).rater(), engine, given)
        assert [row["score"] for row in turned] == pytest.approx([-row["score"] for row in straight], abs=1e-9)
        assert all(abs(row["score"]) > 0.05 for row in turned)


def test_principles_are_averaged_by_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(CONSTITUTION)
    rater = Labeler(constitution=str(path), principles="all").rater()
    quality = {"kind": 1.0, "brief": -2.0, "exact": 0.2}
    (result,) = rate(rater, MockEngine(), rows([quality]))
    expected = (3 * planted(1.0) + planted(-2.0) + 2 * planted(0.2)) / 6
    assert result["score"] == pytest.approx(expected, abs=1e-9)
    assert {vote["principle"]: vote["score"] for vote in result["votes"]} == pytest.approx(
        {name: planted(q) for name, q in quality.items()}, abs=1e-9
    )
    # Less than half of the weight may be missing; half may not, for the rest must not speak for all.
    (left,) = rate(rater, Deaf({"exact"}), rows([quality]))
    assert left["score"] == pytest.approx((3 * planted(1.0) + planted(-2.0)) / 4, abs=1e-9)
    (lost,) = rate(rater, Deaf({"kind"}), rows([quality]))
    assert (lost["status"], lost["score"]) == ("unparsed", None)


def test_one_drawn_principle_is_the_same_for_the_same_row_and_follows_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(CONSTITUTION)
    rater = Labeler(constitution=str(path)).rater()
    given = rows([0.0] * 600)
    drawn = [result["votes"][0]["principle"] for result in rate(rater, MockEngine(), given)]
    assert drawn == [result["votes"][0]["principle"] for result in rate(rater, MockEngine(), given)]
    assert drawn.count("kind") / 600 == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 600))


# ------------------------------------------------------------ without log-probabilities


def test_sampled_ratings_have_the_planted_mean() -> None:
    quality, count, draws = 0.4, 300, 6
    found = rate(Labeler(samples=draws).rater(), MockEngine(logprobs=False), rows([quality] * count))
    assert all(len(result["votes"]) == draws for result in found)
    assert all(vote["logprobs"] is None and vote["text"] in MARKS for result in found for vote in result["votes"])
    mean = planted(quality)
    variance = sum(p * (2 * n / 9 - 1 - mean) ** 2 for n, p in enumerate(chances(quality)))
    assert np.mean([result["score"] for result in found]) == pytest.approx(mean, abs=4 * math.sqrt(variance / (count * draws)))
    # The dispersion is that of single draws.
    dispersion = np.mean([result["dispersion"] ** 2 for result in found])
    assert dispersion == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("logprobs", [True, False])
def test_refusals_and_garbage_never_become_scores(logprobs: bool) -> None:
    found = rate(Labeler().rater(), MockEngine(refuse=0.2, garbage=0.2, logprobs=logprobs), rows([0.5] * 400))
    failed = [result for result in found if result["status"] != "ok"]
    assert len(failed) / 400 == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 400))
    assert {result["status"] for result in failed} == {"refused", "unparsed"}
    assert all(result["score"] is None and result["scores"] is None for result in failed)
    assert all(vote["score"] is None for result in failed for vote in result["votes"])
    assert all(result["score"] is not None for result in found if result["status"] == "ok")


# ------------------------------------------------------------ log-probabilities that are not all there


def reported(masses: dict[str, float], floor: float | None = None) -> Completion:
    logprobs = {mark: math.log(mass) for mark, mass in masses.items()}
    return Completion("", logprobs, None if floor is None else math.log(floor))


def test_the_expectation_is_over_the_marks_alone() -> None:
    whole = dict(zip(MARKS, chances(0.3), strict=True))
    assert expectation(reported(whole), MARKS) == pytest.approx(planted(0.3), abs=1e-12)
    # Half of the probability elsewhere, such as on a line break, changes nothing.
    assert expectation(reported({m: p / 2 for m, p in whole.items()}), MARKS) == pytest.approx(planted(0.3), abs=1e-12)


def test_a_one_that_may_be_the_beginning_of_ten_gives_no_score() -> None:
    marks = dict.fromkeys(MARKS[1:9], 0.01)
    assert expectation(reported({"1": 0.9, **marks}, floor=1e-9), MARKS) is None
    assert expectation(reported({"1": 0.9, **marks, "10": 1e-9}, floor=1e-9), MARKS) == pytest.approx(-0.914, abs=0.02)
    # Improbable, the token 1 leaves little open.
    few = {**marks, "7": 0.9, "1": 0.005}
    assert expectation(reported(few, floor=1e-9), MARKS) == pytest.approx(1 / 3, abs=0.05)
    assert expectation(reported({**few, "1": 0.03}, floor=1e-9), MARKS) is None


def test_missing_marks_must_be_improbable_together() -> None:
    sure = {"7": 0.9, "8": 0.05}
    assert expectation(reported(sure), MARKS) is None  # nothing bounds those that are missing
    assert expectation(reported(sure, floor=1e-4), MARKS) == pytest.approx(scaled(6 + 0.05 / 0.95, 10), abs=1e-12)
    limit = UNSURE * 0.95 / 8
    assert expectation(reported(sure, floor=limit * 0.99), MARKS) is not None
    assert expectation(reported(sure, floor=limit * 1.01), MARKS) is None
    assert expectation(reported({}, floor=1e-9), MARKS) is None


@given(st.dictionaries(st.sampled_from(MARKS), st.floats(-900, 0)), st.none() | st.floats(-900, 0))
def test_an_expectation_is_within_the_scale_or_none(found: dict[str, float], floor: float | None) -> None:
    score = expectation(Completion("", found, floor), MARKS)
    assert score is None or -1 - 1e-12 <= score <= 1 + 1e-12
    if len(found) == len(MARKS):
        assert score is not None
    elif floor is None:
        assert score is None


# ------------------------------------------------------------ ratings that were spoken


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("7", 7),
        (" 7.", 7),
        ("10", 10),
        ("**10**", 10),
        ("1", 1),
        ("Rating: 8", 8),
        ("My rating is 9.", 9),
        ("The overall score: 3", 3),
        ("Rating - 8", 8),
        ("8/10", 8),
        ("10 / 10", 10),
        ("Score: 1/10", 1),
        ("6 out of 10", 6),
        ("<rating>4</rating>", 4),
        ("4</rating>", 4),
        ("5\n\nIt answers 2 of the 3 questions.", 5),
        ("It is short, and right.\nRating: 6", 6),
    ],
)
def test_ratings_that_are_said_plainly_are_read(text: str, mark: int) -> None:
    assert parse_rating(text, MARKS) == pytest.approx(scaled(mark - 1, 10))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n \n",
        "0",
        "11",
        "100",
        "7.5",
        ".5",
        "-1",
        "Rating: -1",
        "Rating: .5",
        "Score −10",
        "8 or 9",
        "7-8",
        "1 0",
        "8/100",
        "8/5",
        "between 7 and 8",
        "seven",
        "7\n8",
        "I rate it 7 because it has 3 merits",
        "7 of 10 people like it",
        "²",
        "١",
    ],
)
def test_anything_else_is_no_rating(text: str) -> None:
    assert parse_rating(text, MARKS) is None


@given(st.text(max_size=40) | st.text(alphabet="0123456789 ./-\nRatingscore:*<>", max_size=24))
def test_a_rating_is_one_of_the_marks_or_none(text: str) -> None:
    score = parse_rating(text, MARKS)
    assert score is None or score in {scaled(n, 10) for n in range(10)}


BEFORE = st.sampled_from(["", " ", "Rating: ", "Score: ", "The rating is ", "<rating>", "**", "(", "Overall rating - "])
AFTER = st.sampled_from(["", ".", " ", "/10", " out of 10", "</rating>", "**", ")", "!", "\n\nIt is good."])


@given(mark=st.integers(1, 10), before=BEFORE, after=AFTER)
def test_a_mark_in_any_plain_dress_is_read_as_itself(mark: int, before: str, after: str) -> None:
    assert parse_rating(f"{before}{mark}{after}", MARKS) == scaled(mark - 1, 10)


@given(number=st.integers(0, 10**6).filter(lambda n: not 1 <= n <= 10), before=BEFORE, after=AFTER)
def test_a_number_off_the_scale_is_never_cut_to_a_mark(number: int, before: str, after: str) -> None:
    assert parse_rating(f"{before}{number}{after}", MARKS) is None


@given(
    numbers=st.lists(st.integers(0, 12), min_size=2, max_size=4),
    between=st.sampled_from([" ", ", ", " or ", " and ", "-", " to ", ".", " then ", ":"]),
    before=BEFORE,
)
def test_a_line_that_names_several_numbers_is_no_rating(numbers: list[int], between: str, before: str) -> None:
    assert parse_rating(before + between.join(map(str, numbers)), MARKS) is None


# ------------------------------------------------------------ over HTTP


def over_http(tmp_path: Path, server: Server, **knobs: Any) -> list[dict[str, Any]]:
    path = write_jsonl(tmp_path / "d.jsonl", [{k: v for k, v in row.items() if k != "quality"} for row in rows([0, 0])])
    rater = Labeler(seed=knobs.pop("seed", 0)).rater()
    job = Job(str(path), tmp_path / "o.jsonl", lambda: responses(str(path)), rater)
    job.run(OpenAIEngine(base_url=server.url, **knobs), Limits(), job.check())
    return read_jsonl(tmp_path / "o.jsonl")


def mean(digits: Sequence[float]) -> float:
    return sum(p * (2 * n / 9 - 1) for n, p in enumerate(digits)) / sum(digits)


TOP_HEAVY = (0.1, 0.01, 0.01, 0.01, 0.01, 0.01, 0.05, 0.1, 0.2, 0.5)
SEVEN = (0.001, 0.002, 0.003, 0.004, 0.05, 0.1, 0.6, 0.2, 0.039, 0.001)


def test_a_server_that_continues_turns_tells_one_and_ten_apart(server: Server, tmp_path: Path) -> None:
    server.digits = TOP_HEAVY
    for row in over_http(tmp_path, server, prefill=True):
        assert row["status"] == "ok"
        assert row["score"] == pytest.approx(mean(TOP_HEAVY), abs=1e-9)
        (vote,) = row["votes"]
        probabilities = {mark: math.exp(logprob) for mark, logprob in vote["logprobs"].items()}
        assert probabilities == pytest.approx(dict(zip(MARKS, (0.9 * p for p in TOP_HEAVY), strict=True)), abs=1e-9)
    begun = [body["messages"][-1]["content"] for body in server.bodies]
    assert sorted(begun) == ["<rating>", "<rating>", "<rating>1", "<rating>1"]


def test_a_server_that_continues_no_turns_leaves_ten_open_and_is_let_speak(server: Server, tmp_path: Path) -> None:
    server.digits = TOP_HEAVY
    for row in over_http(tmp_path, server, prefill=False):
        seen, spoken = row["votes"]
        assert (seen["status"], seen["score"], seen["logprobs"]["10"]) == ("unparsed", None, None)
        assert seen["logprobs"]["1"] == pytest.approx(math.log(0.9 * 0.6))
        assert (spoken["status"], spoken["text"], row["score"]) == ("ok", "10", 1.0)


def test_a_ten_that_is_left_open_does_not_matter_where_one_is_improbable(server: Server, tmp_path: Path) -> None:
    server.digits = SEVEN
    for row in over_http(tmp_path, server, prefill=False):
        (vote,) = row["votes"]
        assert vote["logprobs"]["10"] is None
        assert row["score"] == pytest.approx(mean(SEVEN), abs=0.002 * 2)
    assert len(server.bodies) == 2


def test_ratings_are_sampled_where_a_server_gives_no_logprobs(server: Server, tmp_path: Path) -> None:
    server.digits, server.logprobs = SEVEN, 0
    for row in over_http(tmp_path, server):
        assert [vote["text"] for vote in row["votes"]] == ["7"] * 8
        assert row["score"] == pytest.approx(scaled(6, 10))


# ------------------------------------------------------------ the command


def test_the_command_scores_continues_and_reads_again(tmp_path: Path) -> None:
    qualities = [n / 4 - 1 for n in range(9)]
    path = write_jsonl(tmp_path / "d.jsonl", [{**row, "tag": 7} for row in rows(qualities)])
    out = tmp_path / "o.jsonl"
    command = ("score", path, "-o", out, "--engine", "mock", "-E", "k=1.5", "--attribute", "helpful=2", "--attribute", "honest")
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 9 of 9 rows (9 ok)" in done.stdout
    found = read_jsonl(out)
    for quality, row in zip(qualities, found, strict=True):
        assert row["score"] == pytest.approx(planted(quality, 1.5), abs=1e-9)
        assert set(row["scores"]) == {"helpful", "honest"}
        assert row["tag"] == 7
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert report["settings"]["attributes"] == {"helpful": 2.0, "honest": 1.0}
    assert report["this_run"]["calls"] == 18
    for more in ((), ("--reparse",)):
        assert cli(*command, *more).returncode == 0
        assert json.loads((tmp_path / "o.jsonl.run.json").read_text())["this_run"]["calls"] == 0
        assert read_jsonl(out) == found
    refused = cli(*command[:-2])
    assert refused.returncode == 2
    assert "other settings" in refused.stderr


def test_reparse_reads_stored_ratings_by_a_parser_that_has_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", rows([1.0] * 5))

    def run(engine: MockEngine | None) -> list[tuple[str, float | None]]:
        job = Job(str(path), tmp_path / "o.jsonl", lambda: responses(str(path)), Labeler().rater())
        job.run(engine, Limits(), job.check())
        return [(row["status"], row["score"]) for row in read_jsonl(tmp_path / "o.jsonl")]

    assert run(Deaf({"overall"}, logprobs=False)) == [("unparsed", None)] * 5
    monkeypatch.setattr("rlaif.label.rating.parse_rating", lambda text, _: 0.25 if text == "Purple." else None)
    assert run(None) == [("ok", 0.25)] * 5


def test_a_parquet_file_holds_scores_and_failures_alike(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", rows([0.1 * n for n in range(30)])), tmp_path / "o.parquet"
    done = cli("score", path, "-o", out, "--engine", "mock", "-E", "garbage=0.3")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(out).to_pylist()
    assert [row["id"] for row in found] == [str(n) for n in range(30)]
    statuses = {row["status"] for row in found}
    assert statuses == {"ok", "unparsed"}
    for row in found:
        expected = pytest.approx(planted(row["quality"]), abs=1e-9) if row["status"] == "ok" else None
        assert row["score"] == expected
        assert (row["scores"] or {}).get("overall") == expected


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "Q?"}, "no column 'response'"),
        ({"prompt": "Q?", "response": " "}, "column 'response' is empty"),
        ({"prompt": "Q?", "response": 3}, "column 'response': expected text, got a number"),
        ({"prompt": None, "response": "R."}, "column 'prompt': expected text or messages, got null"),
        ({"prompt": "Q?", "response": "R.", "score": 1}, "column 'score' is one that the output adds"),
    ],
)
def test_bad_input_stops_the_command_naming_line_and_column(tmp_path: Path, bad: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q?", "response": "Fine."}, bad])
    done = cli("score", path, "-o", tmp_path / "o.jsonl", "--engine", "mock")
    assert done.returncode == 2
    assert done.stderr.startswith(f"rlaif: {path} line 2: {words}")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--attribute", "wit"), "wit"),
        (("--attribute", "helpful=much"), "expected NAME=WEIGHT"),
        (("--attribute", "helpful=0"), "must be above 0"),
        (("--attribute", "helpful", "--attribute", "helpful=2"), "given twice"),
        (("--template", "general"), "--template goes with comparisons"),
        (("--constitution", "example", "--attribute", "helpful"), "has no {{ principle }}"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", rows([0.0]))
    done = cli("score", path, "-o", tmp_path / "o.jsonl", "--engine", "mock", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_can_be_kept_as_errors(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*rows([0.0]), {"prompt": "Q?", "response": ""}])
    done = cli("score", path, "-o", tmp_path / "o.jsonl", "--engine", "mock", "--bad-rows", "keep")
    assert done.returncode == 1
    good, bad = read_jsonl(tmp_path / "o.jsonl")
    assert (good["status"], bad["status"], bad["score"], bad["votes"]) == ("ok", "error", None, [])


def test_what_only_comparisons_know_of_a_labeler_has_no_part_in_a_rating() -> None:
    plain, other = Labeler(), Labeler().changed(shots=2, both_orders=False, calibration={"temperature": 3.0})
    assert other.rater().settings() == plain.rater().settings()
    given = rows([0.7])
    assert rate(other.rater(), MockEngine(), given) == rate(plain.rater(), MockEngine(), given)
