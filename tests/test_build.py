"""`rlaif build`: each kind gives the examples that its paper says, counts what it leaves out, and TRL trains on its files."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.build import judged, revised, scored, unpaired
from rlaif.build.rows import Build
from rlaif.label.pairwise import hard_label, sigmoid
from rlaif.records import RlaifError, Row, UsageError
from tests.conftest import cli, in_process, read_jsonl, write_jsonl

HH = "Human: How?\n\nAssistant: What do you mean?\n\nHuman: Really how?"
TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Q?"}]


def built(*args: str | Path) -> str:
    return in_process("build", *args)


def columns(rows: list[Row]) -> list[str]:
    (names,) = {tuple(row) for row in rows}
    return list(names)


# ------------------------------------------------------------ planted rows


def round_(number: int, text: str | None, **changes: Any) -> Row:
    return {
        "round": number,
        "principle": "p",
        "critique": "c",
        "revision": text,
        "status": "ok" if text else "error",
        "unchanged": False,
        "refusal": False,
        **changes,
    }


def revised_row(name: str, *rounds: Row, status: str = "ok", **changes: Any) -> Row:
    last = rounds[-1]["revision"] if rounds and status == "ok" else None
    row = {"id": name, "prompt": f"Question {name}?", "response": f"First {name}.", "revisions": list(rounds)}
    return {**row, "revised": last, "status": status, "error": None, **changes}


def revisions() -> list[Row]:
    return [
        revised_row("0", round_(1, "One."), round_(2, "Two."), round_(3, "Three.")),
        revised_row("1", round_(1, "First 1.", unchanged=True), round_(2, "I cannot help with that.", refusal=True)),
        revised_row("2", round_(1, "Good."), round_(2, None), status="error"),
        revised_row("3", status="refused"),
        revised_row("4", round_(1, "First 4. ", unchanged=True)),
    ]


def label_row(name: str, soft: float | None, status: str | None = None, **changes: Any) -> Row:
    label = None if soft is None else hard_label(soft)
    status = status or ("error" if soft is None else "tie" if label == "tie" else "ok")
    row = {"id": name, "prompt": f"Question {name}?", "response_a": f"A {name}.", "response_b": f"B {name}."}
    return {**row, "status": status, "soft_label": soft, "label": label, **changes}


def labels() -> list[Row]:
    return [
        label_row("0", 0.9),
        label_row("1", 0.25),
        label_row("2", 0.5),
        label_row("3", None, "refused"),
        label_row("4", 0.6),
    ]


def score_row(name: str, score: float | None, status: str = "ok", **changes: Any) -> Row:
    prompt = f"Question {name.partition('/')[0]}?"
    return {"id": name, "prompt": prompt, "response": f"Answer {name}.", "status": status, "score": score, **changes}


def scores(*groups: list[float]) -> list[Row]:
    return [score_row(f"{i}/{j}", score) for i, group in enumerate(groups) for j, score in enumerate(group)]


FAILED = [score_row("9/0", None, "unparsed"), score_row("9/1", 1.0, "refused"), score_row("9/2", None)]
"""Rows that give nothing: two that failed, one of them with a score all the same, and one without a score."""


def rank_row(name: str, values: list[float], **changes: Any) -> Row:
    texts = [f"Answer {name}.{n}." for n in range(len(values))]
    order = sorted(range(len(values)), key=lambda n: -values[n])
    pairs = [
        {"chosen": i, "rejected": j, "soft_label": 0.75}
        for place, i in enumerate(order)
        for j in order[place + 1 :]
        if values[i] > values[j]
    ]
    row = {"id": name, "prompt": f"Question {name}?", "responses": texts, "ranking": order, "scores": values}
    return {**row, "pairs": pairs, "status": "ok", **changes}


# ------------------------------------------------------------ revisions


def test_sl_cai_takes_the_revisions_of_all_rounds(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "r.jsonl", revisions()), tmp_path / "t.jsonl"
    assert built("sl-cai", path, "-o", out) == f"{out}: 7 examples of 5 rows; left out: 1 error revisions, 1 refused\n"
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "completion", "source"]
    assert [(row["id"], row["completion"], row["source"]) for row in made[:3]] == [
        ("0/1", "One.", "round 1"),
        ("0/2", "Two.", "round 2"),
        ("0/3", "Three.", "round 3"),
    ]
    assert made[0]["prompt"] == "Question 0?"


@pytest.mark.parametrize(
    ("knobs", "count", "dropped"),
    [
        ({"rounds": 1}, 4, {"revisions of later rounds": 3}),
        ({"rounds": 2}, 6, {"revisions of later rounds": 1}),
        ({"drop_unchanged": True}, 5, {"unchanged revisions": 2}),
        ({"drop_refusals": True}, 6, {"revisions that decline": 1}),
        ({"drop_unchanged": True, "drop_refusals": True, "rounds": 2}, 3, {}),
    ],
)
def test_sl_cai_leaves_out_what_it_is_told_to(knobs: dict[str, Any], count: int, dropped: dict[str, int]) -> None:
    build = Build()
    assert len(list(revised.sl_cai(revisions(), build, **knobs))) == count
    assert dropped.items() <= build.dropped.items()
    assert build.dropped["error revisions"] == build.dropped["refused"] == 1


def test_sl_cai_mixes_helpfulness_samples_in(tmp_path: Path) -> None:
    samples = [
        {"prompt": f"h{n}", "response": "old", "responses": [f"s{n}.0", f"s{n}.1"], "samples": [], "status": "ok"}
        for n in range(4)
    ]
    samples += [{"prompt": "h", "responses": None, "samples": [], "status": "error"}, {"prompt": "g", "response": "plain"}]
    path, mix, out = (tmp_path / name for name in ("r.jsonl", "m.jsonl", "t.jsonl"))
    write_jsonl(path, revisions()), write_jsonl(mix, samples)
    said = built("sl-cai", path, "-o", out, "--mix", mix, "--ratio", "1.28", "--seed", "3")
    assert said == (
        f"{out}: 16 examples of 5 rows; left out: 1 error revisions, 1 refused, 1 error in the mix; "
        "9 of the examples are helpfulness samples\n"
    )
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "completion", "source"]
    mixed = [row["completion"] for row in made if row["source"] == "mix"]
    assert Counter(mixed) == Counter([*(f"s{n}.{m}" for n in range(4) for m in (0, 1)), "plain"])  # without replacement
    with pytest.raises(RlaifError, match=r"helpfulness samples: 9 there, but 14 wanted \(2 for each of 7 examples\)"):
        built("sl-cai", path, "-o", out, "--mix", mix, "--ratio", "2")
    with pytest.raises(UsageError, match="--ratio goes with --mix"):
        built("sl-cai", path, "-o", out, "--ratio", "2")


def test_clair_prefers_the_last_revision_to_what_it_revises() -> None:
    build = Build()
    made = list(revised.clair(revisions(), build))
    assert made == [
        {"id": "0", "prompt": "Question 0?", "chosen": "Three.", "rejected": "First 0."},
        {"id": "1", "prompt": "Question 1?", "chosen": "I cannot help with that.", "rejected": "First 1."},
    ]
    assert build.dropped == {"error": 1, "refused": 1, "unchanged": 1}


# ------------------------------------------------------------ judged pairs


def test_rl_cai_adds_human_pairs_with_certain_labels(tmp_path: Path) -> None:
    path, mix, out = (tmp_path / name for name in ("l.jsonl", "h.jsonl", "t.jsonl"))
    write_jsonl(path, labels())
    humans = [
        {"prompt": f"h{n}", "response_a": "x", "response_b": "y", "votes": v} for n, v in enumerate(("a", "b", "tie", None))
    ]
    write_jsonl(mix, [*humans, {"prompt": "h4", "response_a": "x", "response_b": "y", "votes": ["a", "b", "b"]}])
    said = built("rl-cai", path, "-o", out, "--mix", mix, "--human", "votes")
    assert said == (
        f"{out}: 7 examples of 5 rows; left out: 1 refused, 2 human rows without a usable preference; "
        "3 of the examples are human pairs\n"
    )
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "chosen", "rejected", "soft_label", "margin", "source"]
    assert [(row["soft_label"], row["source"]) for row in made] == [
        *((soft, "constitution") for soft in (0.9, 0.75, 0.5, 0.6)),
        *[(1.0, "human")] * 3,
    ]
    assert [(row["chosen"], row["margin"]) for row in made[4:]] == [("x", 1.0), ("y", 1.0), ("y", 1.0)]
    said = built("rl-cai", path, "-o", out, "--mix", mix, "--human", "votes", "--ratio", "1", "--drop-ties")
    assert said.startswith(f"{out}: 6 examples of 5 rows; left out: 1 tie, 1 refused")
    with pytest.raises(UsageError, match="--human COLUMN tells"):
        built("rl-cai", path, "-o", out, "--mix", mix)
    with pytest.raises(RlaifError, match="human pairs: 3 there, but 40 wanted"):
        built("rl-cai", path, "-o", out, "--mix", mix, "--human", "votes", "--ratio", "10")


def test_rl_cai_takes_chosen_and_rejected_dialogues(tmp_path: Path) -> None:
    path, mix, out = (tmp_path / name for name in ("l.jsonl", "h.jsonl", "t.jsonl"))
    start = "\n\nHuman: Hi\n\nAssistant:"
    dialogues = [{"chosen": f"{start} Good {n}.", "rejected": f"{start} Bad {n}."} for n in range(6)]
    write_jsonl(path, labels()), write_jsonl(mix, [*dialogues, {"chosen": f"{start} Same.", "rejected": f"{start} Same."}])
    assert "1 human rows without a usable preference" in built("rl-cai", path, "-o", out, "--mix", mix)
    made = [row for row in read_jsonl(out) if row["source"] == "human"]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made] == [
        (start.strip(), f" Good {n}.", f" Bad {n}.") for n in range(6)
    ]


@pytest.mark.parametrize("kind", [("judge-on-policy",), ("judge-off-policy", "--policy", "mine")])
def test_the_judges_pairs_are_those_that_have_a_preference(tmp_path: Path, kind: tuple[str, ...]) -> None:
    path, out = write_jsonl(tmp_path / "l.jsonl", labels()), tmp_path / "t.jsonl"
    said = built(*kind, path, "-o", out, "--min-confidence", "0.7")
    note = "; the origin of 5 rows could not be checked (no model_a, model_b or models)" if len(kind) > 1 else ""
    assert said == f"{out}: 2 examples of 5 rows; left out: 1 tie, 1 refused, 1 below the minimum confidence{note}\n"
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "chosen", "rejected", "soft_label", "margin"]
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A 0.", "B 0."), ("B 1.", "A 1.")]
    write_jsonl(path, [rank_row("0", [0.5, -0.5, 0.0]), rank_row("1", [1.0, 0.0, 0.0])])
    assert built(*kind, path, "-o", out).startswith(f"{out}: 5 examples of 2 rows")  # 3 choose 2, and one tie fewer
    assert columns(read_jsonl(out)) == ["id", "group", "prompt", "chosen", "rejected", "soft_label", "margin"]


@pytest.mark.parametrize("models", [{"model_a": "mine", "model_b": "x"}, {"model_a": "mine"}, {"models": ["x", "mine"]}])
def test_off_policy_pairs_have_no_response_of_the_policy(models: Row) -> None:
    others = [label_row("0", 0.9, model_a="x", model_b="y"), label_row("1", 0.9, models=["x", "y"])]
    build = Build()
    assert len(list(judged.judge_off_policy(others, build, "mine"))) == 2
    assert not build.notes
    with pytest.raises(UsageError, match=r"row '2': a response is of the policy itself, 'mine'"):
        judged.judge_off_policy([*others, label_row("2", 0.9, **models)], build, "mine")


def test_the_stronger_models_response_is_chosen(tmp_path: Path) -> None:
    weak = [{"id": n, "prompt": f"p{n}", "response": f"weak {n}"} for n in range(5)]
    strong = [{"id": n, "prompt": f"p{n}", "responses": [f"strong {n}", "other"], "status": "ok"} for n in range(1, 6)]
    strong[0] |= {"responses": None, "status": "refused"}
    strong[1] |= {"responses": ["weak 2"]}
    paths = write_jsonl(tmp_path / "w.jsonl", weak), write_jsonl(tmp_path / "s.jsonl", strong)
    out = tmp_path / "t.jsonl"
    said = built("stronger-preferred", *paths, "-o", out)
    assert said == f"{out}: 2 examples of 5 rows; left out: 2 in one file only, 1 refused (strong), 1 equal responses\n"
    assert read_jsonl(out) == [
        {"id": str(n), "prompt": f"p{n}", "chosen": f"strong {n}", "rejected": f"weak {n}"} for n in (3, 4)
    ]
    write_jsonl(paths[1], [{**row, "prompt": "p"} if row["id"] == 4 else row for row in strong])
    with pytest.raises(UsageError, match="row '4': the prompts of the two files differ"):
        built("stronger-preferred", *paths, "-o", out)
    write_jsonl(paths[0], [*weak, weak[3]])
    with pytest.raises(UsageError, match="row '3': its id is there twice in the weak file"):
        built("stronger-preferred", *paths, "-o", out)


# ------------------------------------------------------------ scores


def test_best_of_n_takes_the_highest_score_and_the_first_of_equals(tmp_path: Path) -> None:
    path, out = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    write_jsonl(path, scores([0.1, 0.7, 0.7], [-0.5], [0.0, -1.0]) + FAILED)
    said = built("best-of-n", path, "-o", out)
    assert said == f"{out}: 3 examples of 9 rows; left out: 1 unparsed, 1 refused, 1 without score\n"
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "completion", "score", "n"]
    assert [(row["id"], row["score"], row["n"]) for row in made] == [("0/1", 0.7, 3), ("1/0", -0.5, 1), ("2/0", 0.0, 2)]
    write_jsonl(path, [rank_row("0", [0.5, 1.5, 1.5]), rank_row("1", [], status="error", scores=None, responses=None)])
    assert built("best-of-n", path, "-o", out) == f"{out}: 1 examples of 2 rows; left out: 1 error\n"
    assert read_jsonl(out)[0]["completion"] == "Answer 0.1."


def test_best_worst_pairs_the_two_ends(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", scores([0.1, 0.9, -0.5, 0.9], [0.3, 0.3], [0.2]))
    out = tmp_path / "t.jsonl"
    assert built("best-worst", path, "-o", out).endswith("left out: 2 prompts without two different scores\n")
    (row,) = read_jsonl(out)
    assert (row["id"], row["margin"], row["soft_label"]) == ("0/1-2", pytest.approx(1.4), pytest.approx(sigmoid(1.4)))
    texts = {one["id"]: one["response"] for one in read_jsonl(path)}
    assert (row["chosen"], row["rejected"]) == (texts["0/1"], texts["0/2"])


def test_completions_are_all_samples_as_they_are(tmp_path: Path) -> None:
    drawn: Row = {"samples": [], "status": "ok", "error": None}
    rows = [
        {"id": "7", "prompt": "Q?", "responses": ["One.", " ", "Two."], **drawn},
        {"id": "8", "prompt": "R?", "responses": ["Three."], **drawn},
        {"id": "9", "prompt": "S?", "responses": [], **drawn, "status": "error"},
    ]
    out = tmp_path / "t.jsonl"
    said = built("completions", write_jsonl(tmp_path / "s.jsonl", rows), "-o", out)
    assert "3 examples of 3 rows" in said
    assert "1 empty responses" in said
    assert "1 error" in said
    found = [(row["id"], row["prompt"], row["completion"]) for row in read_jsonl(out)]
    assert found == [("7/0", "Q?", "One."), ("7/2", "Q?", "Two."), ("8", "R?", "Three.")]


def test_scores_are_grouped_by_id_where_prompts_agree_and_else_by_prompt() -> None:
    def groups(*rows: tuple[str, str]) -> list[list[str]]:
        found = [scored.Candidate(name, prompt, "t", 0.0) for name, prompt in rows]
        return [[candidate.id for candidate in group] for group in scored.grouped(found)]

    assert groups(("0/0", "p"), ("1/0", "p"), ("0/1", "p")) == [["0/0", "0/1"], ["1/0"]]
    assert groups(("hh/0", "p"), ("hh/1", "q"), ("hh/2", "p")) == [["hh/0", "hh/2"], ["hh/1"]]
    assert groups(("0", "p"), ("1", "p"), ("2", "q")) == [["0", "1"], ["2"]]


def test_the_best_of_n_uniform_scores_is_expected_at_n_of_n_plus_1() -> None:
    draw = random.Random(0)
    for n in (1, 2, 4, 8):
        made = scored.best_of_n(scores(*([draw.random() for _ in range(n)] for _ in range(1500))), Build())
        best = [row["score"] for row in made]
        deviation = math.sqrt(n / ((n + 1) ** 2 * (n + 2)) / len(best))
        assert len(best) == 1500
        assert abs(np.mean(best) - n / (n + 1)) < 4 * deviation


def test_rest_takes_at_most_so_many_of_a_prompt(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "s.jsonl", scores([1.0, 0.0, 1.0, 1.0, 1.0], [0.0, 1.0])), tmp_path / "t.jsonl"

    def ids(*options: Any) -> list[str]:
        built("rest", path, "-o", out, "--thresholds", "1", *options)
        return [row["id"] for row in read_jsonl(tmp_path / "t.1.jsonl")]

    whole = ids()
    draws = [ids("--most", 2, "--seed", seed) for seed in range(12)]
    assert all(len(draw) == 3 and whole[-1] in draw for draw in draws)
    assert all(sorted(draw, key=whole.index) == draw for draw in draws)
    assert {one for draw in draws for one in draw} == set(whole)
    assert ids("--most", 4) == whole
    assert "left out: 2 below 1, 2 beyond 2 of a prompt" in built("rest", path, "-o", out, "--thresholds", "1", "--most", 2)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rest_writes_a_file_a_threshold(tmp_path: Path, ending: str) -> None:
    path, out = write_jsonl(tmp_path / "s.jsonl", scores([0.1, 0.3], [0.9, -0.2]) + FAILED), tmp_path / f"t{ending}"
    said = built("rest", path, "-o", out, "--thresholds", "0.0,0.3,0.6").splitlines()
    failed = "1 unparsed, 1 refused, 1 without score"
    expected = [f"{tmp_path / f't.{n}{ending}'}: {4 - n} examples of 7 rows; left out: {n} below" for n in (1, 2, 3)]
    assert [line.rpartition(" below")[0] + " below" for line in said] == expected
    assert all(line.endswith(f", {failed}") for line in said)
    assert not out.exists()
    if ending == ".jsonl.gz":
        made = [json.loads(line) for line in gzip.decompress((tmp_path / "t.2.jsonl.gz").read_bytes()).splitlines()]
        assert columns(made) == ["id", "prompt", "completion", "score"]
        assert [row["score"] for row in made] == [0.3, 0.9]


@pytest.mark.parametrize("thresholds", ["0.3,0.0", "0.3,0.3", "a", "nan", "inf", ""])
def test_thresholds_grow(tmp_path: Path, thresholds: str) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", scores([0.1]))
    with pytest.raises(UsageError, match="--thresholds"):
        built("rest", path, "-o", tmp_path / "t.jsonl", "--thresholds", thresholds)


def test_a_threshold_above_all_scores_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", scores([0.1]))
    with pytest.raises(RlaifError, match=r"no row gives an example of score 0\.5 or more"):
        built("rest", path, "-o", tmp_path / "t.jsonl", "--thresholds", "0,0.5")
    assert list(tmp_path.iterdir()) == [path]


def test_rs_dpo_takes_all_pairs_with_a_gap(tmp_path: Path) -> None:
    path, out = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    write_jsonl(path, scores([0.0, 1.0, 0.25], [0.5, 0.5], [0.5]) + FAILED)
    said = built("rs-dpo", path, "-o", out, "--gap", "0.25", "--temperature", "0.5")
    failed = "1 unparsed, 1 refused, 1 without score"
    assert said == f"{out}: 2 examples of 9 rows; left out: {failed}, 2 prompts without such a gap\n"
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "chosen", "rejected", "margin", "soft_label"]
    assert [(row["id"], row["margin"], row["soft_label"]) for row in made] == [
        ("0/1-0", 1.0, sigmoid(2.0)),
        ("0/1-2", 0.75, sigmoid(1.5)),
    ]
    write_jsonl(path, scores([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert built("rs-dpo", path, "-o", out, "--gap", "0").startswith(f"{out}: 10 examples")  # 5 choose 2


def test_one_text_with_two_scores_is_no_pair() -> None:
    build = Build()
    rows = [{**row, "response": "Same."} for row in scores([0.0, 1.0])]
    assert list(scored.rs_dpo(rows, build, 0.0)) == []
    assert build.dropped["pairs of equal responses"] == 1


@pytest.mark.parametrize(("tournament", "count"), [((), 4), (("--pairs", "tournament"), 7)])
def test_rso_pairs_the_accepted_responses(tmp_path: Path, tournament: tuple[str, ...], count: int) -> None:
    path, out = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    write_jsonl(path, scores(*([n / 20 + m for m in range(20)] for n in range(3))) + FAILED)
    said = built("rso", path, "-o", out, "--beta", "5", "--keep", "8", *tournament)
    assert said.startswith(f"{out}: {3 * count} examples of 63 rows; left out: 1 unparsed")
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "chosen", "rejected", "margin", "soft_label"]
    for row in made:
        assert row["margin"] > 0
        assert row["soft_label"] == sigmoid(row["margin"])
    for prompt in {row["prompt"] for row in made}:
        texts = [row[side] for row in made if row["prompt"] == prompt for side in ("chosen", "rejected")]
        assert len(set(texts)) == 8
        lost = [row["rejected"] for row in made if row["prompt"] == prompt]
        assert len(set(lost)) == count  # who has lost plays no more


def test_a_tournament_of_an_odd_number_has_a_bye() -> None:
    players = [scored.Candidate(str(n), "p", str(n), float(n)) for n in range(7)]
    for seed in range(20):
        played = list(scored.matches(players, random.Random(seed), tournament=True))
        assert len(played) == 6
        assert {loser.id for _, loser in played} == {str(n) for n in range(6)}  # all but the best
        assert len(list(scored.matches(players, random.Random(seed)))) == 3


def first_accepted_law(rewards: list[float], beta: float) -> list[float]:
    """P(i is the first to be accepted), ∫ a_i Π (1 − t·a_j) dt: i comes at a uniform time t, and none before it was accepted.

    In a random order each other one comes before t with probability t. Gauss's quadrature is exact for such a polynomial.
    """
    chances = np.exp((np.array(rewards) - max(rewards)) / beta)
    nodes, weights = np.polynomial.legendre.leggauss(len(rewards))
    passed = 1 - np.outer((nodes + 1) / 2, chances)
    others = [np.delete(passed, n, axis=1).prod(axis=1) for n in range(len(rewards))]
    return [float(chance * (weights / 2 * other).sum()) for chance, other in zip(chances, others, strict=True)]


def test_rso_accepts_with_the_probability_of_the_closed_form() -> None:
    from scipy.stats import chisquare

    for seed, (rewards, beta) in enumerate([([1.0, 0.0], 1.0), ([1.0, 0.5, 0.2, -1.0], 0.5), ([0.0, 2.0, 2.0, 1.0, 3.0], 2.0)]):
        law, draw = first_accepted_law(rewards, beta), random.Random(seed)
        assert sum(law) == pytest.approx(1.0)
        counts = Counter(scored.accepted(rewards, beta, 1, draw)[0] for _ in range(20_000))
        observed = [counts[n] for n in range(len(rewards))]
        assert chisquare(observed, [20_000 * p for p in law]).pvalue > 1e-3
    # Of two, the lower one is first only if it comes first and is accepted: half of exp((r − r_max)/β).
    assert first_accepted_law([1.0, 0.0], 1.0)[1] == pytest.approx(math.exp(-1) / 2)


def test_the_first_accepted_of_many_fresh_candidates_follows_the_optimal_policy() -> None:
    from scipy.stats import chisquare

    levels, beta = [0.0, 0.5, 1.0], 0.7
    draw, many = random.Random(5), 120
    optimal = np.exp(np.array(levels) / beta)
    optimal /= optimal.sum()
    # Exactly: P(level) for an equal number of candidates of each; the difference vanishes with their number.
    off = []
    for each in (2, 8, 32):
        law = first_accepted_law([level for level in levels for _ in range(each)], beta)
        by_level = np.array(law).reshape(3, each).sum(axis=1)
        off.append(float(np.abs(by_level - optimal).max()))
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.003
    counts: Counter[float] = Counter()
    for _ in range(5000):
        rewards = [draw.choice(levels) for _ in range(many)]  # one of the highest is among them, but for (2/3)^120
        counts[rewards[scored.accepted(rewards, beta, 1, draw)[0]]] += 1
    assert chisquare([counts[level] for level in levels], 5000 * optimal).pvalue > 1e-3


def test_rso_keeps_the_best_for_a_small_beta_and_all_where_there_are_few() -> None:
    draw = random.Random(0)
    assert scored.accepted([0.0, 3.0, 1.0, 2.0], 1e-6, 3, draw) == [1, 3, 2]  # a pass each: the highest of those left
    assert sorted(scored.accepted([0.0, 3.0, 1.0], 1.0, 8, draw)) == [0, 1, 2]
    picks = Counter(scored.accepted([0.0, 3.0, 1.0, 2.0], 1e9, 1, draw)[0] for _ in range(4000))
    assert all(850 < picks[n] < 1150 for n in range(4))  # for a large one any is as good


# ------------------------------------------------------------ one response at a time


def test_kto_takes_both_responses_of_a_comparison(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "l.jsonl", labels()), tmp_path / "t.jsonl"
    said = built("kto", path, "-o", out)
    assert said == f"{out}: 6 examples of 5 rows; left out: 1 tie, 1 refused; 3 desirable, 3 undesirable\n"
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "completion", "label"]
    assert {row["completion"]: row["label"] for row in made} == {
        "A 0.": True,
        "B 0.": False,
        "B 1.": True,
        "A 1.": False,
        "A 4.": True,
        "B 4.": False,
    }
    with pytest.raises(UsageError, match="--threshold goes with scores"):
        built("kto", path, "-o", out, "--threshold", "0.5")


def test_kto_takes_scores_from_a_threshold_on(tmp_path: Path) -> None:
    path, out = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    write_jsonl(path, scores([0.1, 0.5, 0.9, -0.5]) + FAILED)
    said = built("kto", path, "-o", out, "--threshold", "0.5")
    assert said.startswith(f"{out}: 4 examples of 7 rows; left out: 1 unparsed, 1 refused, 1 without score; 2 desirable")
    assert sum(row["label"] for row in read_jsonl(out)) == 2
    with pytest.raises(UsageError, match="scores need it"):
        built("kto", path, "-o", out)
    write_jsonl(path, labels() + scores([0.1]))
    with pytest.raises(UsageError, match="comparisons and scores in one file"):
        built("kto", path, "-o", out)


def kto_examples(good: int, bad: int) -> list[Row]:
    return [{"id": str(n), "prompt": "p", "completion": "c", "label": n < good} for n in range(good + bad)]


@pytest.mark.parametrize(
    ("good", "bad", "left"), [(30, 3, (4, 3)), (3, 30, (3, 3)), (8, 6, (8, 6)), (9, 6, (8, 6)), (5, 6, (5, 5))]
)
def test_kto_is_balanced_within_its_papers_bounds(good: int, bad: int, left: tuple[int, int]) -> None:
    build = Build()
    made = unpaired.balanced(kto_examples(good, bad), build)
    count = sum(row["label"] for row in made)
    assert (count, len(made) - count) == left
    assert build.dropped["by balancing"] == good + bad - sum(left)
    assert 1 <= left[0] / left[1] <= 4 / 3
    with pytest.raises(RlaifError, match="no example is undesirable"):
        unpaired.balanced(kto_examples(3, 0), build)


@given(good=st.integers(1, 400), bad=st.integers(1, 400))
def test_the_weights_that_are_suggested_for_kto_are_within_its_papers_bounds(good: int, bad: int) -> None:
    build = Build()
    unpaired.suggest_weights(kto_examples(good, bad), build)
    said = next((note for note in build.notes if "desirable_weight" in note), "desirable_weight=1, undesirable_weight=1")
    weights = dict(part.split("=") for part in said.removeprefix("train with ").split(", "))
    ratio = good * float(weights["desirable_weight"]) / (bad * float(weights["undesirable_weight"]))
    assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9


def test_hir_gives_each_response_the_instruction_that_it_fits(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "s.jsonl", scores([0.1, 0.5], [0.9, -0.5], [0.2, 0.3]) + FAILED), tmp_path / "t.jsonl"
    assert built("hir", path, "-o", out).startswith(f"{out}: 6 examples of 9 rows; left out: 1 unparsed")
    made = read_jsonl(out)
    assert columns(made) == ["id", "prompt", "completion", "level"]
    assert [row["level"] for row in made] == ["poor", "good", "good", "poor", "poor", "good"]
    assert made[0]["prompt"] == "Question 0?\n\nGive a poor answer."
    texts = tmp_path / "i.yaml"
    texts.write_text("poor: Badly, please.\nfair: So so.\n")
    built("hir", path, "-o", out, "--levels", "3", "--instructions", texts)
    made = read_jsonl(out)
    assert Counter(row["level"] for row in made) == {"poor": 2, "fair": 2, "good": 2}
    assert {row["prompt"].partition("\n\n")[2] for row in made} == {"Badly, please.", "So so.", "Give a good answer."}
    texts.write_text("poor: Same.\nfair: Same.\n")
    with pytest.raises(UsageError, match="poor, fair and good must differ"):
        built("hir", path, "-o", out, "--instructions", texts)
    with pytest.raises(RlaifError, match="no response is poor: too many of the 4 scores are equal"):
        list(unpaired.hir(scores([0.1, 0.1, 0.1, 0.2]), Build()))


def test_an_instruction_stands_at_the_end_of_the_last_user_turn() -> None:
    rows = [score_row("0", 0.0, prompt=HH), score_row("1", 1.0, prompt=TURNS)]
    plain, talk = unpaired.hir(rows, Build())
    assert plain["prompt"] == HH + "\n\nGive a poor answer.\n\nAssistant:"
    assert plain["completion"] == " Answer 0."
    assert talk["prompt"].endswith("Human: Q?\n\nGive a good answer.\n\nAssistant:")
    _, talk = unpaired.hir(rows, Build(conversational=True))
    assert talk["prompt"] == [*TURNS[:2], {"role": "user", "content": "Q?\n\nGive a good answer."}]
    assert TURNS[-1]["content"] == "Q?"


# ------------------------------------------------------------ forms and mistakes


def test_prompts_and_completions_in_both_forms(tmp_path: Path) -> None:
    path, out = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    write_jsonl(path, [score_row("0/0", 1.0, prompt=TURNS), score_row("1/0", 1.0, prompt=HH), score_row("2/0", 1.0)])
    built("best-of-n", path, "-o", out, "--form", "conversational")
    talks = read_jsonl(out)
    assert talks[0]["prompt"] == TURNS
    assert [len(row["prompt"]) for row in talks] == [3, 3, 1]
    assert talks[2]["completion"] == [{"role": "assistant", "content": "Answer 2/0."}]
    built("best-of-n", path, "-o", out)
    plain = read_jsonl(out)
    assert plain[1]["prompt"] == HH + "\n\nAssistant:"
    assert (plain[1]["completion"], plain[2]["completion"]) == (" Answer 1/0.", "Answer 2/0.")


def test_kto_of_a_dialogue_opens_the_assistants_turn_once() -> None:
    good, bad = sorted(unpaired.kto([label_row("0", 0.9, prompt=HH)], Build()), key=lambda row: not row["label"])
    assert good["prompt"] == bad["prompt"] == HH + "\n\nAssistant:"
    assert (good["completion"], bad["completion"]) == (" A 0.", " B 0.")


def test_another_column_holds_the_scores(tmp_path: Path) -> None:
    rows = [{**row, "reward": -row["score"]} for row in scores([0.1, 0.9])]
    path, out = write_jsonl(tmp_path / "s.jsonl", rows), tmp_path / "t.jsonl"
    built("best-of-n", path, "-o", out, "--score", "reward")
    assert read_jsonl(out)[0]["id"] == "0/0"
    with pytest.raises(UsageError, match=r"s.jsonl line 1: no column 'nothing'"):
        built("best-of-n", path, "-o", out, "--score", "nothing")


KINDS: dict[str, tuple[Callable[[], list[Row]], tuple[str, ...]]] = {
    "sl-cai": (revisions, ("prompt", "revisions", "status")),
    "clair": (revisions, ("response", "revised")),
    "judge-on-policy": (labels, ("soft_label", "label", "response_b")),
    "best-of-n": (lambda: scores([0.1]), ("id", "response", "score")),
    "kto": (labels, ("label",)),
}


@pytest.mark.parametrize(("kind", "column"), [(kind, column) for kind, (_, names) in KINDS.items() for column in names])
def test_a_missing_column_is_named_with_file_and_line(tmp_path: Path, kind: str, column: str) -> None:
    rows = KINDS[kind][0]()
    path = write_jsonl(tmp_path / "i.jsonl", [*rows, {name: value for name, value in rows[0].items() if name != column}])
    with pytest.raises(UsageError, match=rf"i.jsonl line {len(rows) + 1}: no column '{column}'; is this an output of"):
        built(kind, path, "-o", tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{"score": "high"}, {"score": True}, {"score": float("nan")}, {"response": 3}, {"prompt": 3}, {"prompt": []}]
)
def test_a_value_of_another_kind_is_refused(changes: Row) -> None:
    with pytest.raises(UsageError, match=rf"row '0/0': column '{next(iter(changes))}': expected"):
        list(scored.best_of_n([score_row("0/0", 1.0) | changes], Build()))


# ------------------------------------------------------------ two models, side by side


def answers_of(qualities: list[float], word: str) -> list[Row]:
    rows = [{"id": str(n), "prompt": f"Question {n}?"} for n in range(len(qualities))]
    drawn: Row = {"samples": [], "status": "ok", "error": None}
    return [
        {**row, "responses": [f"{word} {row['id']} [q={q}]", "Unused."], **drawn}
        for row, q in zip(rows, qualities, strict=True)
    ]


def test_a_judge_of_comparisons_gives_the_share_in_which_after_wins(tmp_path: Path) -> None:
    draw = random.Random(3)
    first, second = ([round(draw.gauss(mean, 1), 2) for _ in range(60)] for mean in (0.0, 0.7))
    wins = sum(b > a for a, b in zip(first, second, strict=True)) / 60
    before, after = (
        write_jsonl(tmp_path / f"{word}.jsonl", answers_of(qualities, word))
        for word, qualities in (("before", first), ("after", second))
    )
    out = tmp_path / "c.jsonl"
    assert built("comparisons", before, after, "-o", out) == f"{out}: 60 examples of 60 rows\n"
    rows = read_jsonl(out)
    assert columns(rows) == ["id", "prompt", "response_a", "response_b", "after"]
    for row in rows:
        sides = {row["response_a"].split()[0]: "a", row["response_b"].split()[0]: "b"}
        assert sides["after"] == row["after"]
        assert len(sides) == 2
    assert 18 < sum(row["after"] == "a" for row in rows) < 42
    done = cli("label", out, "-o", tmp_path / "j.jsonl", "--engine", "mock", "-E", "k=9")
    assert done.returncode == 0, done.stderr
    measured = json.loads(cli("align", tmp_path / "j.jsonl", "--human", "after", "--json").stdout)
    found = next(one for one in measured if not one["baseline"])["metrics"]["accuracy"]["value"]
    assert found == pytest.approx(wins)
    assert 0.55 < wins < 0.9  # turned round it would be another number
    run = json.loads((tmp_path / "c.jsonl.run.json").read_text())
    assert run["made_by"] == "rlaif build comparisons"
    assert [source["source"] for source in run["sources"]] == [str(before), str(after)]


def test_the_best_of_scored_responses_is_compared(tmp_path: Path) -> None:
    before = [{"id": str(n), "prompt": f"Question {n}?", "response": "Plain."} for n in range(3)]
    after = [
        {"id": f"{n}/{i}", "prompt": f"Question {n}?", "response": f"{n} at {i}", "score": score, "status": status}
        for n in range(3)
        for i, (score, status) in enumerate([(0.1, "ok"), (0.7 - n, "ok"), (None, "error")])
    ]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("before", before), ("after", after))]
    out = tmp_path / "c.jsonl"
    assert "left out: 3 error" in built("comparisons", *files, "-o", out, "--best-by", "score")
    sides = {row["id"]: row[f"response_{row['after']}"] for row in read_jsonl(out)}
    assert sides == {"0": "0 at 1", "1": "1 at 0", "2": "2 at 0"}
    with pytest.raises(UsageError, match="no column 'reward'"):
        built("comparisons", *files, "-o", out, "--best-by", "reward")


def test_comparisons_leave_out_and_count_what_cannot_be_compared() -> None:
    before = [{"id": n, "prompt": f"p{n}", "response": f"old {n}"} for n in range(6)]
    after = [{**row, "response": f"new {n}"} for n, row in enumerate(before)]
    after[0]["response"] = "old 0"
    after[1] = {**after[1], "response": None, "status": "refused"}
    before[2]["response"] = " "
    build = Build()
    made = list(judged.comparisons(before[:5], after[:4] + after[5:], build))
    assert [row["id"] for row in made] == ["3"]
    assert dict(build.dropped) == {
        "in one file only": 2,
        "without response (before)": 1,
        "refused (after)": 1,
        "equal responses": 1,
    }
    with pytest.raises(UsageError, match="row '0': the prompts of the two files differ"):
        list(judged.comparisons(before, [{**row, "prompt": "another"} for row in after], Build()))


def test_the_side_is_drawn_by_seed_and_content() -> None:
    before = [{"id": n, "prompt": f"p{n}", "response": "No."} for n in range(200)]
    after = [{**row, "response": "Yes."} for row in before]

    def sides(rows: list[Row], seed: int) -> dict[str, str]:
        return {row["prompt"]: row["after"] for row in judged.comparisons(rows, after, Build(seed=seed))}

    assert sides(before, 0) == sides(before[::-1], 0) != sides(before, 1)
    assert 70 < sum(side == "a" for side in sides(before, 0).values()) < 130


def test_a_ranking_with_fewer_scores_than_responses_is_refused() -> None:
    with pytest.raises(UsageError, match="row '0': 2 responses, but 1 scores"):
        list(scored.best_of_n([rank_row("0", [0.1, 0.2], scores=[0.1])], Build()))


def test_the_command_line_refuses_what_would_be_lost_and_says_what_gives_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", FAILED)
    done = cli("build", "best-of-n", path, "-o", tmp_path / "t.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"rlaif: {path}: no row gives an example (1 unparsed, 1 refused, 1 without score)\n"
    done = cli("build", "best-of-n", path, "-o", path)
    assert (done.returncode, done.stderr) == (2, f"rlaif: {path}: the training set would overwrite what it is made from\n")
    numbered = write_jsonl(tmp_path / "t.2.jsonl", scores([0.1]))
    done = cli("build", "rest", numbered, "-o", tmp_path / "t.jsonl", "--thresholds", "0,0.05")
    assert done.returncode == 2
    assert read_jsonl(numbered) == scores([0.1])


# ------------------------------------------------------------ properties

SCORE = st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 0.5])
GROUPS = st.lists(st.lists(st.tuples(SCORE, st.sampled_from(["ok", "ok", "refused", "error"])), max_size=6), max_size=5)


def planted(groups: list[list[tuple[float, str]]]) -> list[Row]:
    """Scored rows; the failed ones have a score all the same."""
    return [score_row(f"{i}/{j}", s, status) for i, group in enumerate(groups) for j, (s, status) in enumerate(group)]


def of_scores(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    def hir() -> Iterator[Row]:
        try:
            yield from unpaired.hir(rows, Build(seed=seed))
        except RlaifError:  # too many equal scores
            return

    return {
        "best-of-n": list(scored.best_of_n(rows, Build(seed=seed))),
        "best-worst": list(scored.best_worst(rows, Build(seed=seed))),
        "rest": list(scored.rest(rows, Build(seed=seed), 0.0)),
        "rs-dpo": list(scored.rs_dpo(rows, Build(seed=seed), 0.1)),
        "rso": list(scored.rso(rows, Build(seed=seed), 0.5, 4)),
        "rso tournament": list(scored.rso(rows, Build(seed=seed), 0.5, 4, True)),
        "kto": unpaired.kto(rows, Build(seed=seed), 0.0),
        "hir": list(hir()),
    }


@settings(deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 3))
def test_no_failed_row_gives_an_example_and_the_chosen_score_is_the_higher_one(
    groups: list[list[tuple[float, str]]], seed: int
) -> None:
    rows = planted(groups)
    good = {row["response"]: row["score"] for row in rows if row["status"] == "ok"}
    for kind, made in of_scores(rows, seed).items():
        for row in made:
            assert {row[name] for name in ("completion", "chosen", "rejected") if name in row} <= good.keys(), kind
            if "chosen" in row:
                assert good[row["chosen"]] > good[row["rejected"]]
                assert row["margin"] == good[row["chosen"]] - good[row["rejected"]]
                assert 0.5 <= row["soft_label"] < 1
    assert len(of_scores(rows, seed)["kto"]) == len(good)
    assert len(of_scores(rows, seed)["best-of-n"]) == sum(any(status == "ok" for _, status in group) for group in groups)


@settings(deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 3))
def test_the_same_seed_gives_the_same_examples(groups: list[list[tuple[float, str]]], seed: int) -> None:
    assert of_scores(planted(groups), seed) == of_scores(planted(groups), seed)


def test_the_same_seed_writes_the_same_file_and_another_one_another(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", scores(*([m / 10 for m in range(10)] for _ in range(10))))
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for kind in (("rso", "--beta", "1", "--keep", "4"), ("kto", "--threshold", "0.8", "--balance")):
        for out, seed in zip(files, "112", strict=True):
            built(kind[0], path, "-o", out, *kind[1:], "--seed", seed)
        first, again, other = (out.read_bytes() for out in files)
        assert first == again != other


SOFT = st.floats(0, 1).filter(lambda soft: abs(soft - 0.5) > 1e-6)


@given(softs=st.lists(st.none() | SOFT | st.just(0.5), max_size=12))
def test_swapping_the_two_responses_gives_the_same_pairs(softs: list[float | None]) -> None:
    rows = [label_row(str(n), soft) for n, soft in enumerate(softs)]
    swapped = [
        label_row(row["id"], None if soft is None else 1 - soft, response_a=row["response_b"], response_b=row["response_a"])
        for row, soft in zip(rows, softs, strict=True)
    ]

    def kinds(rows: list[Row]) -> list[list[Row]]:
        human = [{"prompt": "p", "response_a": "x", "response_b": "y", "h": "a"}]
        found = [
            list(judged.judge_on_policy(rows, Build())),
            list(judged.judge_off_policy(rows, Build(), "mine")),
            judged.rl_cai(rows, human, "h", Build(), drop_ties=True),
            unpaired.kto(rows, Build()),
        ]
        exact = ("soft_label", "margin")
        return [[{name: row[name] for name in row if name not in exact} for row in made] for made in found]

    assert kinds(rows) == kinds(swapped)
    count = sum(soft is not None and soft != 0.5 for soft in softs)
    assert [len(made) for made in kinds(rows)] == [count, count, count + 1, 2 * count]


# ------------------------------------------------------------ TRL takes the files as they are

TRAINED = {
    "sl-cai": "SFT",
    "best-of-n": "SFT",
    "completions": "SFT",
    "rest": "SFT",
    "hir": "SFT",
    "rl-cai": "DPO",
    "clair": "DPO",
    "judge-on-policy": "DPO",
    "stronger-preferred": "DPO",
    "best-worst": "DPO",
    "rs-dpo": "DPO",
    "rso": "DPO",
    "kto": "KTO",
}


def training_files(folder: Path) -> dict[str, Path]:
    """A file of every kind, by the command line, half of them of messages, of eight rows or more."""
    many = [score_row(f"{i}/{j}", (i * 7 + j * 3) % 10 / 10) for i in range(8) for j in range(4)]
    inputs: dict[str, list[Row]] = {
        "revised": [revised_row(str(n), round_(1, f"One {n}."), round_(2, f"Two {n}.")) for n in range(8)],
        "labels": [label_row(str(n), 0.9 if n % 3 else 0.2) for n in range(8)],
        "human": [{"prompt": HH, "response_a": f"x{n}", "response_b": f"y{n}", "h": "ab"[n % 2]} for n in range(8)],
        "scores": many,
        "weak": [{"id": n, "prompt": f"p{n}", "response": f"weak {n}"} for n in range(8)],
        "strong": [{"id": n, "prompt": f"p{n}", "response": f"strong {n}"} for n in range(8)],
    }
    at = {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in inputs.items()}
    kinds: dict[str, list[str]] = {
        "sl-cai": [at["revised"], "--mix", at["weak"], "--ratio", "0.5"],
        "best-of-n": [at["scores"], "--form", "conversational"],
        "completions": [at["weak"], "--form", "conversational"],
        "best-worst": [at["scores"], "--form", "conversational"],
        "rest": [at["scores"], "--thresholds", "0.2,0.5"],
        "hir": [at["scores"], "--form", "conversational"],
        "rl-cai": [at["labels"], "--mix", at["human"], "--human", "h"],
        "clair": [at["revised"], "--form", "conversational"],
        "judge-on-policy": [at["labels"]],
        "stronger-preferred": [at["weak"], at["strong"], "--form", "conversational"],
        "rs-dpo": [at["scores"], "--gap", "0.2"],
        "rso": [at["scores"], "--beta", "1", "--keep", "4", "--form", "conversational"],
        "kto": [at["labels"]],
    }
    for kind, args in kinds.items():
        built(kind, *args, "-o", folder / f"{kind}.out.jsonl")
    return {kind: folder / ("rest.out.2.jsonl" if kind == "rest" else f"{kind}.out.jsonl") for kind in kinds}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """What a step of each kind's trainer did: all in one place, for importing and saving take longer than the steps."""
    pytest.importorskip("trl")
    from tests.engines.tiny import save_tiny

    folder = tmp_path_factory.mktemp("build")
    model = str(save_tiny(folder / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # what trl's trainers honour
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # read once, maybe before
        return {kind: step(kind, path, model, folder) for kind, path in training_files(folder).items()}


def step(kind: str, path: Path, model: str, folder: Path) -> Row:
    import datasets
    import trl

    data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    knobs: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "max_length": 256,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    name = TRAINED[kind]
    training = getattr(trl, f"{name}Trainer")(model=model, args=getattr(trl, f"{name}Config")(**knobs), train_dataset=data)
    before = {name: weight.detach().clone() for name, weight in training.model.named_parameters()}
    loss = training.train().training_loss
    changed = any(not weight.equal(before[name]) for name, weight in training.model.named_parameters())
    rows = (len(read_jsonl(path)), len(data), len(training.train_dataset))
    return {"loss": loss, "steps": training.state.global_step, "changed": changed, "rows": rows}


@pytest.mark.parametrize("kind", TRAINED)
def test_trl_trains_on_the_file_as_it_is(trained: dict[str, Row], kind: str) -> None:
    done = trained[kind]
    assert done["steps"] == 1
    assert math.isfinite(done["loss"])
    assert done["loss"] > 0.1
    assert done["changed"]
    assert len(set(done["rows"])) == 1  # rows over the length would be dropped in silence
    assert done["rows"][0] >= 8
