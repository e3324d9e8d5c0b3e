"""Rankings: planted orders and strengths, brackets, listwise prompts and what is no ranking, failures, the command."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.data import Item, response_lists
from rlaif.engines.mock import MockEngine
from rlaif.job import Job
from rlaif.label.ranking import Pair, Ranker, bradley_terry, cycles, parse_ranking
from rlaif.labeler import Labeler
from rlaif.records import Completion, Request, Row, RowError
from rlaif.runner import Limits
from tests.conftest import cli, read_jsonl, write_jsonl

METHODS = ("pairs", "tournament", "listwise")


def lists(qualities: Sequence[Sequence[float]]) -> list[Row]:
    return [
        {"id": str(n), "prompt": f"p{n}", "responses": [f"r{n}.{m}" for m in range(len(some))], "qualities": list(some)}
        for n, some in enumerate(qualities)
    ]


def ranked(ranker: Ranker, engine: MockEngine, rows: Sequence[Row]) -> list[Row]:
    async def all_of_them() -> list[Row]:
        return await asyncio.gather(*(ranker(Item(row, row["prompt"], "here", None), engine.complete) for row in rows))

    return asyncio.run(all_of_them())


def drawn(count: int, least: int = 2, most: int = 7, seed: int = 0) -> list[Row]:
    """Lists of several lengths, of standard normal qualities."""
    draw = np.random.default_rng(seed)
    return lists([draw.normal(size=draw.integers(least, most + 1)).tolist() for _ in range(count)])


def by_quality(row: Row) -> list[int]:
    return sorted(range(len(row["qualities"])), key=lambda index: -row["qualities"][index])


# ------------------------------------------------------------ Bradley and Terry's model

STRENGTHS = [0.7, -1.6, 1.5, 0.0, -0.6]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def soft_pairs(strengths: Sequence[float]) -> list[Pair]:
    return [(i, j, sigmoid(strengths[i] - strengths[j])) for i, j in combinations(range(len(strengths)), 2)]


def test_many_soft_pairs_give_the_planted_strengths_themselves() -> None:
    assert bradley_terry(5, soft_pairs(STRENGTHS) * 2000) == pytest.approx(STRENGTHS, abs=0.005)
    # Once each, the prior draws them together, and the order stays.
    scores = bradley_terry(5, soft_pairs(STRENGTHS))
    assert np.argsort(scores).tolist() == np.argsort(STRENGTHS).tolist()
    assert max(scores) - min(scores) < max(STRENGTHS) - min(STRENGTHS)


def test_many_hard_pairs_give_the_planted_strengths_within_their_error() -> None:
    draw = np.random.default_rng(1)
    pairs = [(i, j, float(draw.random() < p)) for i, j, p in soft_pairs(STRENGTHS) * 1500]
    scores = bradley_terry(5, pairs)
    assert np.argsort(scores).tolist() == np.argsort(STRENGTHS).tolist()
    assert scores == pytest.approx(STRENGTHS, abs=0.15)


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 1.0])
def test_two_responses_have_the_scores_that_can_be_worked_out_by_hand(p: float) -> None:
    """The derivative of the posterior at scores (x, −x) is zero where x = p − σ(2x)."""
    x, _ = bradley_terry(2, [(0, 1, p)])
    assert x == pytest.approx(p - sigmoid(2 * x), abs=1e-5)
    assert (x > 0) == (p > 0.5)


def test_one_that_wins_all_has_a_finite_score_and_nothing_preferred_is_zero() -> None:
    scores = bradley_terry(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)])
    assert scores == sorted(scores, reverse=True)
    assert all(abs(score) < 3 for score in scores)
    assert bradley_terry(3, [(0, 1, 0.5), (1, 2, 0.5)]) == [0, 0, 0]


COMPARED = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0, 1), min_size=n * (n - 1) // 2, max_size=n * (n - 1) // 2), st.permutations(range(n))
    )
)


@settings(max_examples=60, deadline=None)
@given(COMPARED)
def test_other_names_for_the_responses_permute_the_scores_which_sum_to_zero(given: tuple[list[float], list[int]]) -> None:
    wins, names = given
    count = len(names)
    pairs = [(i, j, p) for (i, j), p in zip(combinations(range(count), 2), wins, strict=True)]
    scores = bradley_terry(count, pairs)
    assert math.fsum(scores) == pytest.approx(0, abs=1e-9)
    renamed = bradley_terry(count, [(names[i], names[j], p) for i, j, p in pairs])
    assert [renamed[names[n]] for n in range(count)] == pytest.approx(scores, abs=1e-4)
    turned = bradley_terry(count, [(j, i, 1 - p) for i, j, p in pairs])
    assert turned == pytest.approx(scores, abs=1e-4)


@given(COMPARED)
def test_cycles_are_the_circular_triads(given: tuple[list[float], list[int]]) -> None:
    wins, names = given
    wins = [round(2 * p) / 2 for p in wins]  # wins, losses and ties
    pairs = [(i, j, p) for (i, j), p in zip(combinations(range(len(names)), 2), wins, strict=True)]
    beats = {(i, j) if p > 0.5 else (j, i) for i, j, p in pairs if p != 0.5}
    circular = [
        1
        for a, b, c in combinations(range(len(names)), 3)
        if {(a, b), (b, c), (c, a)} <= beats or {(b, a), (c, b), (a, c)} <= beats
    ]
    assert cycles(len(names), pairs) == len(circular)


# ------------------------------------------------------------ planted truth


@pytest.mark.parametrize("method", ["pairs", "listwise"])
def test_the_planted_order_is_found(method: str) -> None:
    rows = drawn(30)
    for row, found in zip(rows, ranked(Labeler().ranker(method), MockEngine(), rows), strict=True):
        assert found["status"] == "ok"
        assert found["ranking"] == by_quality(row)
        assert math.fsum(found["scores"]) == pytest.approx(0, abs=1e-9)
        assert np.argsort(found["scores"])[::-1].tolist() == found["ranking"]
        assert found["cycles"] == 0
        count = len(row["responses"])
        assert len(found["pairs"]) == count * (count - 1) // 2
        for pair in found["pairs"]:
            better, worse = (row["qualities"][pair[name]] for name in ("chosen", "rejected"))
            assert better > worse
            expected = sigmoid(2 * (better - worse)) if method == "pairs" else 1.0
            assert pair["soft_label"] == pytest.approx(expected, abs=1e-9)


def test_cycles_that_a_noisy_labeler_makes_are_counted_from_its_pairs() -> None:
    rows = drawn(60, 4, 6)
    found = ranked(Labeler().ranker("pairs"), MockEngine(k=0, noise=3.0), rows)
    for result in found:
        pairs = [(pair["chosen"], pair["rejected"], pair["soft_label"]) for pair in result["pairs"]]
        assert result["cycles"] == cycles(len(result["ranking"]), pairs)
    assert sum(result["cycles"] for result in found) > 20


def test_a_labeler_that_prefers_nothing_makes_a_tie() -> None:
    for method in ("pairs", "tournament"):
        (found,) = ranked(Labeler().ranker(method), MockEngine(k=0), lists([[1.0, 2.0, 3.0]]))
        assert found["status"] == "tie"
        assert found["scores"] == [0, 0, 0]
        assert sorted(found["ranking"]) == [0, 1, 2]
        assert {pair["soft_label"] for pair in found["pairs"]} == {0.5}


@pytest.mark.parametrize("count", range(2, 10))
def test_a_tournament_is_n_minus_1_matches_and_the_best_wins(count: int) -> None:
    for row in lists(np.random.default_rng(count).normal(size=(8, count)).tolist()):
        engine = MockEngine(bias=0.5)
        (found,) = ranked(Labeler().ranker("tournament"), engine, [row])
        matches = {frozenset((vote["a"], vote["b"])) for vote in found["votes"]}
        assert len(matches) == len(found["pairs"]) == count - 1
        assert engine.calls == len(found["votes"]) == 2 * (count - 1)
        assert found["ranking"][0] == by_quality(row)[0]
        assert sorted(found["ranking"]) == list(range(count))
        assert found["cycles"] is None
        # Each but the winner lost once, and to a better one.
        assert sorted(pair["rejected"] for pair in found["pairs"]) == sorted(found["ranking"][1:])
        assert all(row["qualities"][pair["chosen"]] > row["qualities"][pair["rejected"]] for pair in found["pairs"])


def test_a_tournaments_bracket_is_drawn_by_the_seed() -> None:
    (row,) = drawn(1, 8, 8)
    brackets = set()
    for seed in range(6):
        first, again = ranked(Labeler(seed=seed).ranker("tournament"), MockEngine(), [row, row])
        assert first == again
        brackets.add(tuple((vote["a"], vote["b"]) for vote in first["votes"]))
    assert len(brackets) > 3


# ------------------------------------------------------------ listwise


def upsets(row: Row, found: Row) -> int:
    """Pairs of which the worse response is preferred."""
    return sum(row["qualities"][pair["chosen"]] < row["qualities"][pair["rejected"]] - 1e-9 for pair in ties_out(found))


def ties_out(found: Row) -> list[Row]:
    return [pair for pair in found["pairs"] if abs(pair["soft_label"] - 0.5) > 1e-9]


def test_both_orders_cancel_a_planted_position_bias_and_one_keeps_it() -> None:
    rows = drawn(80, 3, 5)
    engine = MockEngine(bias=20.0)
    one = ranked(Labeler(both_orders=False).ranker("listwise"), engine, rows)
    assert all(found["ranking"][0] == 0 for found in one)
    assert sum(upsets(row, found) for row, found in zip(rows, one, strict=True)) > 40
    both = ranked(Labeler().ranker("listwise"), engine, rows)
    assert sum(upsets(row, found) for row, found in zip(rows, both, strict=True)) == 0
    for found in both:
        forward, backward = (vote["order"] for vote in found["votes"])
        assert forward == backward[::-1]
        ends = next(p for p in found["pairs"] if {p["chosen"], p["rejected"]} == {forward[0], forward[-1]})
        assert ends["soft_label"] == 0.5


def test_samples_make_shares_of_a_listwise_ranking() -> None:
    rows = lists([[0.4, 0.0]] * 60)
    found = ranked(Labeler(samples=8).ranker("listwise"), MockEngine(), rows)
    assert all(len(result["votes"]) == 16 for result in found)
    ahead = [p["soft_label"] if p["chosen"] == 0 else 1 - p["soft_label"] for result in found for p in result["pairs"]]
    assert all(share * 16 == pytest.approx(round(share * 16)) for share in ahead)
    truth = sigmoid(2 * 0.4)  # Plackett and Luce's model of two is Bradley and Terry's
    assert np.mean(ahead) == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / (60 * 16)))


def test_a_template_that_asks_for_the_worst_first_gives_the_same_ranking(tmp_path: Path) -> None:
    class Obedient(MockEngine):
        """Ranks the worst first where it is asked to."""

        async def complete(self, request: Request) -> Completion:
            answer = await super().complete(request)
            assert request.hint
            worst_first = request.hint["asks_for"] == "worse"
            return Completion(" > ".join(answer.text.split(" > ")[::-1]) if worst_first else answer.text)

    template = tmp_path / "worst.jinja"
    template.write_text(
        '---\nasks_for: worse\n---\n{% extends "ranking/_layout.jinja" %}{% block question %}Which is the worst?{% endblock %}'
    )
    rows = drawn(20)
    found = ranked(Labeler(template=str(template)).ranker("listwise"), Obedient(), rows)
    assert [result["ranking"] for result in found] == [by_quality(row) for row in rows]


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ("3 > 1 > 2", [2, 0, 1]),
        ("3>1>2.", [2, 0, 1]),
        ("3, 1, 2", [2, 0, 1]),
        ("Ranking: 3 > 1 > 2", [2, 0, 1]),
        ("My final ranking is: **3 > 1 > 2**", [2, 0, 1]),
        ("Response 3 > Response 1 > Response 2", [2, 0, 1]),
        ("#3 > #1 > #2", [2, 0, 1]),
        ("3 then 1 then 2", [2, 0, 1]),
        ("[3] > [1] > [2]", [2, 0, 1]),
        ("3 > 1 > 2\n\nThe third is the only one with a source, 1 is vague.", [2, 0, 1]),
        ("Let me think: 2 is rude.\nOrder: 3 > 1 > 2", [2, 0, 1]),
        ("", None),
        ("\n", None),
        ("3", None),
        ("3 > 1", None),
        ("3 > 1 > 1", None),
        ("3 > 1 > 2 > 4", None),
        ("0 > 1 > 2", None),
        ("3 > 1 = 2", None),
        ("3 > 1 >= 2", None),
        ("3 < 1 < 2", None),
        ("3 > -1 > 2", None),
        ("3 > 1 > 2.5", None),
        ("312", None),
        ("3 1 2", None),
        ("3 > 1 > 2 or 3 > 2 > 1", None),
        ("3 > 1 > 2\n1 > 3 > 2", None),
        ("Worst to best: 3 > 1 > 2", None),
        ("Ranking (worst to best): 3 > 1 > 2", None),
        ("3 is the best", None),
        ("³ > ¹ > ²", None),
    ],
)
def test_a_ranking_is_read_or_is_none(text: str, ranking: list[int] | None) -> None:
    assert parse_ranking(text, 3) == ranking


LEADS = st.sampled_from(["", "Ranking: ", "The ranking is ", "My final ranking: ", "Order - ", "**"])
NAMES = st.sampled_from(["{}", "Response {}", "#{}", "({})", "**{}**", "response_{}"])


@given(
    order=st.integers(2, 12).flatmap(lambda n: st.permutations(range(n))),
    lead=LEADS,
    name=NAMES,
    between=st.sampled_from([" > ", ">", ", ", ",", " then "]),
    end=st.sampled_from(["", ".", "**", "\n\nThe first 1 is best."]),
)
def test_any_order_is_read_back_from_every_style(order: list[int], lead: str, name: str, between: str, end: str) -> None:
    assert parse_ranking(lead + between.join(name.format(n + 1) for n in order) + end, len(order)) == order


@given(count=st.integers(2, 5), numbers=st.lists(st.integers(0, 7), max_size=7), name=NAMES)
def test_what_is_no_permutation_is_no_ranking(count: int, numbers: list[int], name: str) -> None:
    found = parse_ranking(" > ".join(name.format(n) for n in numbers), count)
    permutation = sorted(numbers) == list(range(1, count + 1))
    assert found == ([n - 1 for n in numbers] if permutation else None)


@given(st.text(max_size=30) | st.text(alphabet="123 >,.\n", max_size=14), st.integers(2, 3))
def test_any_text_gives_a_permutation_or_none(text: str, count: int) -> None:
    found = parse_ranking(text, count)
    assert found is None or sorted(found) == list(range(count))


def test_refusals_and_garbage_never_become_rankings() -> None:
    rows = drawn(150, 3, 3)
    found = ranked(Labeler().ranker("listwise"), MockEngine(refuse=0.1, garbage=0.1), rows)
    failed = [result for result in found if result["status"] != "ok"]
    assert len(failed) / 150 == pytest.approx(0.36, abs=4 * math.sqrt(0.36 * 0.64 / 150))
    assert {result["status"] for result in failed} == {"refused", "unparsed"}
    for result in failed:
        assert [result[name] for name in ("ranking", "scores", "pairs", "cycles")] == [None] * 4
        assert all(vote["ranking"] is None for vote in result["votes"] if vote["status"] != "ok")


# ------------------------------------------------------------ permuted input


@settings(max_examples=30, deadline=None)
@given(
    names=st.integers(2, 6).flatmap(lambda n: st.permutations(range(n))),
    method=st.sampled_from(["pairs", "listwise"]),
    bias=st.floats(-2, 2),
    noise=st.floats(0, 2),
    seed=st.integers(0, 50),
    constitution=st.sampled_from([None, "example"]),
)
def test_permuting_the_responses_permutes_the_ranking(
    names: list[int], method: str, bias: float, noise: float, seed: int, constitution: str | None
) -> None:
    texts = [f"answer {seed} {n}" for n in range(len(names))]
    engine = MockEngine(seed=seed, bias=bias, noise=noise)
    ranker = Labeler(seed=seed, constitution=constitution).ranker(method)
    rows = [{"id": "0", "prompt": "p", "responses": some} for some in (texts, [texts[n] for n in names])]
    one, other = ranked(ranker, engine, rows)
    scores, others = (
        dict(zip(row["responses"], found["scores"], strict=True)) for row, found in zip(rows, (one, other), strict=True)
    )
    assert others == pytest.approx(scores, abs=1e-4)
    assert one["cycles"] == other["cycles"]
    in_order = sorted(scores.values())
    if all(b - a > 1e-3 for a, b in pairwise(in_order)):  # else the place in the input decides
        first, second = ([row["responses"][n] for n in found["ranking"]] for row, found in zip(rows, (one, other), strict=True))
        assert first == second


@pytest.mark.parametrize("method", ["pairs", "listwise"])
def test_permuted_responses_are_judged_by_the_same_drawn_principle(method: str) -> None:
    ranker = Labeler(constitution="general").ranker(method)
    drawn_for = []
    for texts in (["one", "two", "three"], ["three", "one", "two"]):
        rows = [{"id": "0", "prompt": f"p{n}", "responses": texts} for n in range(20)]
        found = ranked(ranker, MockEngine(), rows)
        drawn_for.append([sorted(vote["principle"] for vote in result["votes"]) for result in found])
    assert drawn_for[0] == drawn_for[1]
    assert len({names[0] for names in drawn_for[0]}) > 3


# ------------------------------------------------------------ failures


class Ill(MockEngine):
    """Until it is healed, fails each call about both of two responses: with an error, or with words that are no verdict."""

    def __init__(self, texts: set[str], words: str | None = None):
        super().__init__()
        self.texts, self.words, self.healed = texts, words, False
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        assert request.hint
        self.asked.append(request)
        if not self.healed and self.texts <= set(request.hint["texts"]):
            if self.words is None:
                raise RowError("too long")
            return Completion(self.words, {} if request.choices else None)
        return await super().complete(request)


@pytest.mark.parametrize(("words", "status"), [(None, "error"), ("Purple.", "unparsed")])
def test_a_pair_that_failed_fails_the_row_and_it_alone_is_asked_again(tmp_path: Path, words: str | None, status: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", lists([[0.3, 1.0, -1.0, 0.0], [2.0, 1.0, 0.5]]))
    engine = Ill({"r0.1", "r0.3"}, words)

    def run() -> list[Row]:
        engine.asked.clear()
        job = Job(str(path), tmp_path / "o.jsonl", lambda: response_lists(str(path)), Labeler().ranker("pairs"))
        job.run(engine, Limits(), job.check())
        return read_jsonl(tmp_path / "o.jsonl")

    failed, fine = run()
    assert failed["status"] == status
    assert [failed[name] for name in ("ranking", "scores", "pairs", "cycles")] == [None] * 4
    assert failed["error"] == ("too long" if words is None else None)
    assert {(v["a"], v["b"]) for v in failed["votes"] if v["status"] == status} == {(1, 3)}
    assert fine["ranking"] == [0, 1, 2]
    engine.healed = True
    healed, same = run()
    assert healed["ranking"] == [1, 0, 3, 2]
    assert same == fine
    assert [set(request.hint["texts"]) for request in engine.asked if request.hint] == [engine.texts] * 2
    run()
    assert engine.asked == []


@pytest.mark.parametrize("method", ["tournament", "listwise"])
def test_a_failure_fails_the_row_whatever_the_method(method: str) -> None:
    (row,) = lists([[0.3, 1.0]])
    (found,) = ranked(Labeler().ranker(method), Ill({"r0.0", "r0.1"}), [row])
    assert (found["status"], found["error"]) == ("error", "too long")
    assert [found[name] for name in ("ranking", "scores", "pairs", "cycles")] == [None] * 4
    assert found["votes"]


# ------------------------------------------------------------ the command


@pytest.mark.parametrize("method", METHODS)
def test_the_command_ranks_and_continues(tmp_path: Path, method: str) -> None:
    rows = [{**row, "tag": 7} for row in drawn(8, 3, 5)]
    path, out = write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o.jsonl"
    command = ("rank", path, "-o", out, "--method", method, "--engine", "mock")
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 8 of 8 rows (8 ok)" in done.stdout
    found = read_jsonl(out)
    for row, result in zip(rows, found, strict=True):
        assert result["tag"] == 7
        assert result["ranking"][0] == by_quality(row)[0]
        if method != "tournament":
            assert result["ranking"] == by_quality(row)
    counts = [len(row["responses"]) for row in rows]
    calls = {"pairs": sum(n * (n - 1) for n in counts), "tournament": sum(2 * (n - 1) for n in counts), "listwise": 16}
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert report["settings"]["method"] == f"ranking by {method}"
    assert report["this_run"]["calls"] == calls[method]
    for more in ((), ("--reparse",)):
        assert cli(*command, *more).returncode == 0
        assert json.loads((tmp_path / "o.jsonl.run.json").read_text())["this_run"]["calls"] == 0
        assert read_jsonl(out) == found


@pytest.mark.parametrize("method", METHODS)
def test_a_parquet_file_holds_rankings_and_failures_alike(tmp_path: Path, method: str) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", drawn(12, 2, 4)), tmp_path / "o.parquet"
    done = cli("rank", path, "-o", out, "--method", method, "--engine", "mock", "-E", "garbage=0.15", "-E", "seed=4")
    assert done.returncode == 0, done.stderr
    found = pq.read_table(out).to_pylist()
    assert {row["status"] for row in found} == {"ok", "unparsed"}
    for row in found:
        assert (row["ranking"] is None) == (row["scores"] is None) == (row["pairs"] is None) == (row["status"] != "ok")
        if row["ranking"]:
            assert row["ranking"][0] == by_quality(row)[0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({}, "no column 'responses'"),
        ({"responses": "one"}, "column 'responses': expected a list of texts, got text"),
        ({"responses": ["one", 2]}, "column 'responses': expected a list of texts"),
        ({"responses": ["one"]}, "column 'responses': 1 response: there is nothing to rank"),
        ({"responses": ["one", " "]}, "column 'responses': the one at index 1 is empty"),
        ({"responses": ["one", "two", "one"]}, "column 'responses': the one at index 2 is there twice"),
        ({"responses": ["one", "two"], "pairs": []}, "column 'pairs' is one that the output adds"),
    ],
)
def test_bad_input_stops_the_command_naming_line_and_column(tmp_path: Path, bad: Row, words: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q?", "responses": ["one", "two"]}, {"prompt": "Q?", **bad}])
    done = cli("rank", path, "-o", tmp_path / "o.jsonl", "--engine", "mock")
    assert done.returncode == 2
    assert done.stderr.startswith(f"rlaif: {path} line 2: {words}")
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--shots", "2"), "no use for shots"),
        (("--cot", "two-call", "--cot-clamp", "0.4,0.6"), "no use for cot-clamp"),
        (("--template", "helpful-detailed"), "helpful-detailed"),
        (("--template", "constitution"), "give a --constitution"),
    ],
)
def test_options_that_go_with_comparisons_are_refused_by_a_listwise_ranking(
    tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", drawn(1))
    done = cli("rank", path, "-o", tmp_path / "o.jsonl", "--engine", "mock", "--method", "listwise", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
