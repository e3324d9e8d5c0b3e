"""Groups of votes and rows: planted principles, agreement against the libraries, and `align --by`."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from rlaif.evaluate import tables
from rlaif.evaluate.agreement import align, among, baselines, leaderboard_by, split_votes
from rlaif.label.pairwise import combine
from rlaif.records import UsageError
from tests.conftest import cli, read_jsonl, write_jsonl

Row = dict[str, Any]
MIRROR = {"a": "b", "b": "a", "tie": "tie", None: None}


def vote(soft: float | None, order: str = "ab", principle: str | None = None, status: str = "ok", **more: Any) -> Row:
    told = {"order": order, "status": status, "soft_label": soft, "logprobs": {}, "error": None}
    return {"principle": principle, **told, **more}


def row(number: int, votes: list[Row], **columns: Any) -> Row:
    texts = {"id": str(number), "prompt": f"p{number}", "response_a": "one", "response_b": "two", "human": "a"}
    return {**texts, **combine(votes), **columns}


def labelled(labels: list[str | None]) -> list[Row]:
    """Rows with these labels, and nothing else that matters."""
    statuses = {"a": "ok", "b": "ok", "tie": "tie", None: "unparsed"}
    return [{"id": n, "prompt": f"p{n}", "status": statuses[label], "label": label} for n, label in enumerate(labels)]


# ---------------------------------------------------------------- splitting


def test_votes_are_split_by_name_and_rows_stay_in_place() -> None:
    rows = [
        row(0, [vote(0.9, principle="kind"), vote(0.2, principle="brief"), vote(0.7, "ba", "kind")]),
        row(1, [vote(0.4, principle="short")]),
        row(2, [vote(0.6, principle="brief"), vote(None, principle="kind", status="refused")]),
        {**row(3, [vote(0.5)]), "votes": [], "status": "error"},
    ]
    found = split_votes(rows, "principle")
    assert list(found) == ["kind", "brief", "short"]
    for some in found.values():
        assert [r["id"] for r in some] == ["0", "1", "2", "3"]
    assert [r["soft_label"] for r in found["kind"]] == [pytest.approx(0.8), None, None, None]
    assert [r["status"] for r in found["kind"]] == ["ok", "error", "refused", "error"]
    assert [r["label"] for r in found["brief"]] == ["b", None, "a", None]
    assert [len(r["votes"]) for r in found["brief"]] == [1, 0, 1, 0]
    assert found["short"][0]["error"] == "not judged by the principle short"
    by_order = split_votes(rows, "order")
    assert list(by_order) == ["ab", "ba"]
    assert [r["label"] for r in by_order["ba"]] == ["a", None, None, None]


@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["ok", "unparsed"])), min_size=1, max_size=4), min_size=1))
def test_all_the_votes_of_one_name_give_the_rows_own_result(drawn: list[list[tuple[float, str]]]) -> None:
    rows = [row(n, [vote(p, principle="only", status=status) for p, status in votes]) for n, votes in enumerate(drawn)]
    assert split_votes(rows, "principle") == {"only": rows}
    assert split_votes(rows, "order") == {"ab": rows}


@given(st.lists(st.sampled_from(["x", "y", None, 1, 1.0, True, ["z"]]), min_size=1))
def test_a_column_parts_the_rows(values: list[Any]) -> None:
    rows = [row(n, [vote(0.9)], kind=value) for n, value in enumerate(values)]
    found = split_votes(rows, "kind")
    assert sorted((r["id"] for some in found.values() for r in some), key=int) == [r["id"] for r in rows]
    texts = {"x": "x", "y": "y", "null": None, "1": 1, "true": True, '["z"]': ["z"]}
    for name, some in found.items():
        assert all(r["kind"] == texts[name] for r in some)


@pytest.mark.parametrize(
    ("votes", "field", "words"),
    [
        ([vote(0.9)], "principle", "no vote in these rows tells its principle"),
        ([vote(0.9)], "labeler", "no vote in these rows tells its labeler"),
        ([], "order", "no vote in these rows tells its order"),
        ([vote(0.9)], "colour", "no column 'colour'"),
        ("ab", "order", "row 1, column 'votes'"),
        ([{"order": "ab"}], "order", "row 1, column 'votes'"),
        ([vote(1.1)], "order", "1.1 is not a probability"),
    ],
)
def test_what_cannot_be_split_is_refused(votes: Any, field: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        split_votes([{**row(0, [vote(0.9)]), "votes": votes}], field)
    assert words in str(error.value)


# ---------------------------------------------------------------- agreement among them

labels = st.sampled_from(["a", "b", "tie", None])
tables_of_labels = st.integers(2, 4).flatmap(
    lambda count: st.lists(st.lists(labels, min_size=count, max_size=count), min_size=1, max_size=25)
)


def named(table: list[list[str | None]]) -> dict[str, list[Row]]:
    return {f"l{n}": labelled(list(column)) for n, column in enumerate(zip(*table, strict=True))}


def kappas(found: dict[str, Any]) -> dict[frozenset[str], Any]:
    return {frozenset((pair["first"], pair["second"])): pair["kappa"] for pair in found["pairs"]}


@settings(max_examples=100, deadline=None)
@given(tables_of_labels)
def test_values_are_the_libraries(table: list[list[str | None]]) -> None:
    found = among(named(table), resamples=0)
    codes = {"a": 0.0, "b": 1.0, "tie": 2.0, None: np.nan}
    columns = [[codes[label] for label in column] for column in zip(*table, strict=True)]
    paired = [r for r in table if sum(label is not None for label in r) > 1]
    assert found["alpha"]["n"] == len(paired)
    if len({label for r in paired for label in r if label}) > 1:
        expected = krippendorff.alpha(np.array(columns), level_of_measurement="nominal")
        assert found["alpha"]["value"] == pytest.approx(expected, abs=1e-12)
    for pair, (i, j) in zip(found["pairs"], combinations(range(len(columns)), 2), strict=True):
        both = [(r[i], r[j]) for r in table if r[i] and r[j]]
        assert (pair["first"], pair["second"]) == (f"l{i}", f"l{j}")
        assert pair["kappa"]["n"] == pair["agreement"]["n"] == len(both)
        if both:
            assert pair["agreement"]["value"] == pytest.approx(sum(x == y for x, y in both) / len(both))
        if len({label for two in both for label in two}) > 1:
            assert pair["kappa"]["value"] == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)), abs=1e-12)
        else:
            assert pair["kappa"]["value"] is None


@settings(max_examples=40, deadline=None)
@given(tables_of_labels)
def test_names_order_and_exchanged_labels_change_nothing(table: list[list[str | None]]) -> None:
    some = named(table)
    found = among(some, resamples=20)
    turned = among(dict(reversed(some.items())), resamples=20)
    mirrored = among({k: labelled([MIRROR[r["label"]] for r in rows]) for k, rows in some.items()}, resamples=20)
    for other in (turned, mirrored):
        assert other["alpha"] == pytest.approx(found["alpha"], abs=1e-12)
        for pair, kappa in kappas(found).items():
            assert kappas(other)[pair] == pytest.approx(kappa, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(labels, min_size=2, max_size=30))
def test_a_labeler_agrees_with_itself(column: list[str | None]) -> None:
    found = among({"one": labelled(column), "same": labelled(column)}, resamples=0)
    several = len({label for label in column if label}) > 1
    (pair,) = found["pairs"]
    assert pair["kappa"]["value"] == (1 if several else None)
    assert pair["agreement"]["value"] == (1 if any(column) else None)
    assert found["alpha"]["value"] == (1 if several else None)


def test_intervals_are_of_prompts_and_of_the_seed() -> None:
    draw = random.Random(0)
    one = [draw.choice("ab") for _ in range(300)]
    other = [label if draw.random() < 0.8 else MIRROR[label] for label in one]
    some = {"one": labelled(one), "other": labelled(other)}
    (pair,) = among(some, resamples=200)["pairs"]
    assert pair["agreement"]["low"] < 0.8 < pair["agreement"]["high"]
    assert among(some, 50, seed=1) == among(some, 50, seed=1) != among(some, 50, seed=2)
    (alone,) = among({k: [{**r, "prompt": "p"} for r in rows] for k, rows in some.items()}, resamples=50)["pairs"]
    assert (alone["kappa"]["value"], alone["kappa"]["low"]) == (pair["kappa"]["value"], None)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: rows[::-1],
        lambda rows: [{**r, "id": "x"} for r in rows],
        lambda rows: [{**r, "response_a": "x"} for r in rows],
    ],
)
def test_other_rows_are_refused(change: Any) -> None:
    rows = labelled(["a", "b", "a"])
    with pytest.raises(UsageError, match="one and other do not have the same rows in the same order"):
        among({"one": rows, "other": change(rows)}, resamples=0)


# ---------------------------------------------------------------- tables


def many(count: int, rows: int = 30) -> dict[str, Any]:
    draw = random.Random(count)
    return among({f"principle-{n}": labelled([draw.choice("ab") for _ in range(rows)]) for n in range(count)}, resamples=0)


@pytest.mark.parametrize("count", [2, 8])
def test_few_names_make_a_matrix(count: int) -> None:
    found = many(count)
    lines = tables.among(found, "principles").split("\n")
    assert max(map(len, lines)) <= 100
    assert f"Krippendorff's alpha {found['alpha']['value']:.3f}" in lines[0]
    cells = [line.split()[2:] for line in lines if "principle-" in line]
    for i, j in combinations(range(count), 2):
        expected = f"{kappas(found)[frozenset((f'principle-{i}', f'principle-{j}'))]['value']:.3f}"
        assert cells[i][j - 1] == cells[j][i] == expected


def test_many_names_make_a_list_of_extremes() -> None:
    found = many(9)
    text = tables.among(found, "principles")
    shown = [line.split()[2] for line in text.split("\n") if line.startswith("principle-")]
    ranked = sorted(pair["kappa"]["value"] for pair in found["pairs"])
    assert shown == [f"{value + 0.0:.3f}" for value in ranked[:10] + ranked[-10:]]
    assert max(map(len, text.split("\n"))) <= 100


def test_few_pairs_of_many_names_are_each_shown_once() -> None:
    found = many(9)
    for pair in found["pairs"][12:]:
        pair["kappa"] = {"value": None, "low": None, "high": None, "n": 0}
    text = tables.among(found, "principles")
    shown = [tuple(line.split()[:2]) for line in text.split("\n") if line.startswith("principle-")]
    assert len(shown) == len(set(shown)) == 12


# ---------------------------------------------------------------- leaderboards


def test_a_column_is_measured_value_by_value() -> None:
    """A group counts as the same rows alone; what a human value means is read off all rows, baselines are of all rows."""
    draw = random.Random(3)
    rows = [row(n, [vote(draw.random())], kind="xyz"[n % 3], human=str(draw.randrange(3))) for n in range(120)]
    for r in rows:
        if r["kind"] == "x":  # only 0 and 1 here, which alone could mean two things
            r["human"] = str(min(int(r["human"]), 1))
        if r["kind"] == "z":
            r["human"] = None
    found = leaderboard_by(rows, "kind", "human", resamples=50)
    assert found["among"] is None
    results = {r["name"]: r for r in found["results"]}
    for name in ("x", "y"):
        some = [r for r in rows if r["kind"] == name]
        alone = align(some, "human", resamples=50, name=name, values={"0": "tie", "1": "a", "2": "b"})
        assert results[name] == alone.as_dict()
    assert results["z"]["metrics"]["accuracy_all"] == {"value": None, "low": None, "high": None, "n": 0}
    assert results["always first"] == baselines(rows, "human", resamples=50)[0].as_dict()
    text = tables.grouped(found, "kind")
    assert text.startswith("kind ")
    assert "agreement among" not in text


def test_names_of_groups_are_not_taken_for_paths() -> None:
    rows = [row(n, [vote(0.9)], kind=("maths/sums", "maths/sets")[n % 2]) for n in range(10)]
    assert "maths/sums" in tables.grouped(leaderboard_by(rows, "kind", "human", resamples=0), "kind")


def test_principles_that_judged_some_rows_are_measured_on_these() -> None:
    rows = [row(n, [vote(0.9 if n % 2 else 0.1, principle=("kind", "brief", "kind")[n % 3])]) for n in range(30)]
    rows[0] = {**rows[0], **combine([vote(None, principle="kind", status="unparsed")])}
    found = leaderboard_by(rows, "principle", "human", resamples=0)
    results = {r["name"]: r["metrics"]["accuracy_all"] for r in found["results"]}
    assert (results["brief"]["value"], results["brief"]["n"]) == (0.5, 10)
    assert (results["kind"]["value"], results["kind"]["n"]) == (0.5, 20)  # the failure is a wrong one, of 20
    assert found["among"]["alpha"]["n"] == 0
    assert "no row has labels of two of them" in tables.grouped(found, "principle")


def test_votes_are_not_split_where_another_column_is_measured() -> None:
    rows = [row(n, [vote(0.9)], verdict="a") for n in range(4)]
    with pytest.raises(UsageError, match="not with the column 'verdict'"):
        leaderboard_by(rows, "order", "human", "verdict", resamples=0)
    assert leaderboard_by(rows, "response_a", "human", "verdict", resamples=0)["results"]


# ---------------------------------------------------------------- the command line

CONSTITUTION = """
principles:
  - {name: kind, critique: c, revision: r, preference: "Which is kinder?"}
  - {name: brief, critique: c, revision: r, preference: "Which is shorter?"}
"""


@pytest.fixture(scope="module")
def opposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two principles of opposite planted qualities, of which humans follow the first."""
    folder = tmp_path_factory.mktemp("opposed")
    rows = []
    for n in range(60):
        q = ((n * 37) % 59 - 29) / 10 + 0.05
        texts = {"prompt": f"p{n}", "response_a": f"one {n}", "response_b": f"two {n}"}
        qualities = {"quality_a": {"kind": q, "brief": -q}, "quality_b": {"kind": 0.0, "brief": 0.0}}
        rows.append({**texts, **qualities, "human": "a" if q > 0 else "b", "kind": "xy"[n % 2]})
    write_jsonl(folder / "d.jsonl", rows)
    (folder / "two.yaml").write_text(CONSTITUTION)
    for choice in ("all", "one"):
        options = ("--engine", "mock", "-E", "bias=0.5", "--constitution", "two.yaml", "--principles", choice)
        done = cli("label", "d.jsonl", "-o", f"{choice}.jsonl", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_opposed_principles_have_opposite_accuracy(opposed: Path) -> None:
    done = cli("align", "all.jsonl", "--human", "human", "--by", "principle", "--resamples", "100", "--json", cwd=opposed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    accuracy = {r["name"]: r["metrics"]["accuracy_all"] for r in found["results"] if not r["baseline"]}
    assert (accuracy["kind"]["value"], accuracy["kind"]["n"]) == (1, 60)
    assert (accuracy["brief"]["value"], accuracy["brief"]["n"]) == (0, 60)
    (pair,) = found["among"]["pairs"]
    assert pair["kappa"]["value"] == pytest.approx(-1, abs=0.01)
    assert all(r["label"] == "tie" for r in read_jsonl(opposed / "all.jsonl"))
    text = cli("align", "all.jsonl", "--human", "human", "--by", "principle", "--resamples", "100", cwd=opposed).stdout
    assert text.index("kind  ") < text.index("brief  ") < text.index("agreement among 2 principles")


def test_drawn_principles_share_the_rows(opposed: Path) -> None:
    done = cli("align", "one.jsonl", "--human", "human", "--by", "principle", "--resamples", "100", "--json", cwd=opposed)
    found = json.loads(done.stdout)
    accuracy = {r["name"]: r["metrics"]["accuracy_all"] for r in found["results"] if not r["baseline"]}
    assert (accuracy["kind"]["value"], accuracy["brief"]["value"]) == (1, 0)
    assert accuracy["kind"]["n"] + accuracy["brief"]["n"] == 60
    assert min(accuracy["kind"]["n"], accuracy["brief"]["n"]) > 15


def test_orders_of_a_labeler_that_follows_quality(opposed: Path) -> None:
    done = cli("align", "one.jsonl", "--human", "human", "--by", "order", "--resamples", "100", "--json", cwd=opposed)
    found = json.loads(done.stdout)
    assert found["among"]["names"] == ["ab", "ba"]
    assert found["among"]["alpha"]["n"] == 60


def test_a_column_by_the_command(opposed: Path) -> None:
    done = cli("align", "all.jsonl", "--human", "human", "--by", "kind", "--resamples", "100", "--json", cwd=opposed)
    found = json.loads(done.stdout)
    assert found["among"] is None
    assert {r["name"] for r in found["results"] if not r["baseline"]} == {"x", "y"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("all.jsonl", "one.jsonl", "--by", "principle"), "--by takes one OUT"),
        (("all.jsonl", "--by", "labeler"), "no vote in these rows tells its labeler"),
        (("all.jsonl", "--by", "colour"), "no column 'colour'"),
        (("all.jsonl", "--by", "order", "--label", "kind"), "not with the column 'kind'"),
        (("all.jsonl", "--by", "kind", "--label", "prompt"), "'p0' is not a label"),
        (("d.jsonl", "--by", "order"), "no vote in these rows tells its order"),
    ],
)
def test_bad_calls_are_usage_errors(opposed: Path, args: tuple[str, ...], words: str) -> None:
    done = cli("align", *args, "--human", "human", "--resamples", "100", cwd=opposed)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr
