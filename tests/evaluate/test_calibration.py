"""Calibration: planted temperatures and biases, against `combine` and brute force, and through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad

from rlaif.evaluate import calibration as module
from rlaif.evaluate import tables
from rlaif.evaluate.agreement import align, human_votes, sample_of
from rlaif.evaluate.calibration import Calibrated, calibrate, fit, principle_weights
from rlaif.label.pairwise import Calibration, combine, sigmoid
from rlaif.labeler import load_labeler
from rlaif.records import LABELLED, UsageError
from tests.conftest import cli, read_jsonl, write_jsonl

Row = dict[str, Any]
MIRROR = {"a": "b", "b": "a", "tie": "tie", "ab": "ba", "ba": "ab"}


def vote(order: str, soft: float | None, status: str = "ok", principle: str | None = None, spoken: bool = False) -> Row:
    """A vote as `rlaif label` keeps it; `soft` is P(A is better), whatever the order."""
    logprobs = None if spoken else {"1": 0.0}
    return {"principle": principle, "order": order, "status": status, "soft_label": soft, "logprobs": logprobs, "error": None}


def planted(
    count: int,
    k: float,
    human: float = 1.0,
    bias: float = 0.0,
    noise: float = 0.0,
    orders: tuple[str, ...] = ("ab", "ba"),
    seed: int = 0,
) -> list[Row]:
    """The mock engine's labeler (log-odds of the first shown k·Δq + bias + noise·ε) and humans who choose A by σ(human·Δq)."""
    draw = np.random.default_rng([seed, int(100 * k)])
    rows = []
    for n in range(count):
        delta = draw.normal(scale=math.sqrt(2))
        firsts = {order: sigmoid((k if order == "ab" else -k) * delta + bias + noise * draw.normal()) for order in orders}
        votes = [vote(order, first if order == "ab" else 1 - first) for order, first in firsts.items()]
        label = "a" if draw.random() < sigmoid(human * delta) else "b"
        texts = {"id": str(n), "prompt": f"p{n // 2}", "response_a": f"one {n}", "response_b": f"two {n}"}
        rows.append({**texts, "human": label, **combine(votes)})
    return rows


def mirrored(row: Row) -> Row:
    """The same judgement of the same two responses, the other way round."""
    votes = [
        {**v, "order": MIRROR[v["order"]], "soft_label": None if v["soft_label"] is None else 1 - v["soft_label"]}
        for v in row["votes"]
    ]
    texts = {"response_a": row["response_b"], "response_b": row["response_a"]}
    return {**row, **texts, "human": MIRROR[row["human"]], **combine(votes)}


def values(found: Calibrated, when: str) -> dict[str, float]:
    return {name: estimate.value for name, estimate in found.metrics[when].items() if estimate.value is not None}


# ---------------------------------------------------------------- planted truth


@pytest.mark.parametrize(
    ("k", "human", "bias", "orders"),
    [
        (2.0, 1.0, 0.7, ("ab", "ba")),
        (0.5, 1.0, -1.0, ("ab", "ba")),
        (3.0, 0.6, 2.0, ("ab", "ba")),
        (2.0, 1.0, 0.7, ("ab",)),
        (1.5, 1.0, -0.5, ("ba",)),
    ],
)
def test_planted_temperature_and_bias_are_recovered(k: float, human: float, bias: float, orders: tuple[str, ...]) -> None:
    """With 3,600 rows to fit on, the temperature has a standard error of 3 to 4 % (both orders or one), and the bias of one
    order a standard error near 0.04·T; both orders pin the bias down, as it shifts both answers alike."""
    rows = planted(4000, k, human, bias, orders=orders)
    found = calibrate(rows, "human", holdout=0.1, resamples=0)
    truth = k / human
    assert found.temperature.value == pytest.approx(truth, rel=0.14)
    assert found.position_bias.value == pytest.approx(bias, abs=0.02 if len(orders) == 2 else 0.16 * truth)
    assert found.orders == sorted(orders)
    assert any("one order only" in note for note in found.notes) == (len(orders) == 1)


def test_the_temperature_of_a_noisy_labeler_is_that_of_its_averaged_labels() -> None:
    """Averaging two noisy answers takes noise away. Fitted to single answers, labels come out too timid: the temperature
    must be lower than that, and no other one on a grid may have a greater likelihood on the part that was fitted."""
    rows = planted(3000, 2.0, bias=0.7, noise=2.0)
    found = calibrate(rows, "human", holdout=0.02, resamples=0)
    held = held_out(rows, 0.02)
    fitted = [row for row, out in zip(rows, held, strict=True) if not out]
    bias = found.position_bias.value
    grid = {t: loss(fitted, Calibration(temperature=t, position_bias=bias)) for t in np.arange(1.5, 4, 0.05)}
    best = min(grid, key=lambda t: grid[t])
    assert found.temperature.value == pytest.approx(best, abs=0.05)
    assert loss(fitted, found.calibration) <= grid[best] + 1e-9
    questions = questions_of(fitted)
    single = module._least(module._answers_loss(questions, np.ones(len(fitted))), [[0.0, 0.0]], [(-3, 3), (-20, 20)])
    assert math.exp(single[0]) > found.temperature.value * 1.15


def test_intervals_hold_the_planted_values_about_as_often_as_they_say() -> None:
    """One order, so that both values have a sampling error. Of 12 intervals of 95 %, fewer than 8 hold in 1 of 5,000 cases."""
    covered = {"temperature": 0, "position_bias": 0}
    for seed in range(12):
        rows = planted(200, 2.0, bias=0.7, orders=("ab",), seed=seed)
        found = module._fitted(questions_of(rows), np.arange(200), 40, seed)
        for name, truth in (("temperature", 2.0), ("position_bias", 0.7)):
            covered[name] += found[name].low < truth < found[name].high
    assert min(covered.values()) >= 8


def test_intervals_narrow_with_the_square_root_of_the_rows() -> None:
    widths = []
    for count in (300, 2700):
        rows = planted(count, 2.0, bias=0.7, orders=("ab",))
        found = module._fitted(questions_of(rows), np.arange(count), 100, 0)
        widths.append([found[name].high - found[name].low for name in ("temperature", "position_bias")])
    assert [few / many for few, many in zip(*widths, strict=True)] == pytest.approx([3, 3], rel=0.4)


def test_a_calibrated_labeler_is_left_as_it_is() -> None:
    found = calibrate(planted(4000, 1.0), "human", resamples=200)
    assert found.temperature.value == pytest.approx(1, abs=0.15)
    assert found.position_bias.value == pytest.approx(0, abs=0.02)
    for name in ("brier", "nll", "accuracy"):
        assert found.metrics["change"][name].value == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize(("k", "bias"), [(5.0, 0.0), (0.2, 0.0), (5.0, 2.0)])
def test_held_out_soft_labels_become_better(k: float, bias: float) -> None:
    """Too sure, too timid, too sure with a bias: on prompts that were not fitted on, with intervals clear of no change."""
    found = calibrate(planted(3000, k, bias=bias), "human", resamples=200)
    for name in ("brier", "ece", "nll"):
        assert found.metrics["change"][name].high < 0, name
        assert values(found, "after")[name] < values(found, "before")[name], name
    # With both orders the side that is preferred stays, whatever the calibration.
    assert found.metrics["change"]["accuracy"].value == 0


def test_with_one_order_calibration_takes_the_bias_out_of_the_labels() -> None:
    found = calibrate(planted(3000, 2.0, bias=2.0, orders=("ab",)), "human", resamples=200)
    assert found.metrics["change"]["accuracy"].low > 0


def test_metrics_are_those_of_align_and_change_is_their_difference() -> None:
    rows = planted(600, 3.0, bias=0.5)
    found = calibrate(rows, "human", resamples=0)
    held = [row for row, out in zip(rows, held_out(rows, 0.5), strict=True) if out]
    after = [{**row, **combine(row["votes"], calibration=found.calibration)} for row in held]
    for when, some in (("before", held), ("after", after)):
        expected = align(some, "human", resamples=0).metrics
        for name in ("brier", "ece", "accuracy"):
            assert values(found, when)[name] == pytest.approx(expected[name].value, abs=1e-12)
    assert values(found, "after")["nll"] == pytest.approx(loss(held, found.calibration), abs=1e-12)
    for name, change in values(found, "change").items():
        assert change == pytest.approx(values(found, "after")[name] - values(found, "before")[name], abs=1e-12)
    assert (found.test.rows, found.fit.rows + found.test.rows) == (len(held), 600)


def loss(rows: list[Row], calibration: Calibration) -> float:
    """Mean negative log-likelihood of the human labels, straight from `combine`."""
    softs = [combine(row["votes"], calibration=calibration)["soft_label"] for row in rows]
    return -sum(math.log(p if row["human"] == "a" else 1 - p) for p, row in zip(softs, rows, strict=True)) / len(rows)


def questions_of(rows: list[Row], weights: dict[str | None, float] | None = None) -> module.Questions:
    return module._questions([row["votes"] for row in rows], np.array([row["human"] == "a" for row in rows]), weights)


def held_out(rows: list[Row], share: float, seed: int = 0) -> list[bool]:
    prompts = sample_of(rows, human_votes(rows, "human"), None).prompts
    return list(module._held_out(prompts, share, seed))


# ---------------------------------------------------------------- the parts


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.floats(0.05, 0.95), st.integers(0, 5))
def test_rows_of_a_prompt_stay_together(prompts: list[int], share: float, seed: int) -> None:
    numbers = np.array(prompts)
    held = module._held_out(numbers, share, seed)
    assert not set(numbers[held]) & set(numbers[~held])
    assert len(set(numbers[held])) == round(share * len(set(prompts)))


def test_nothing_of_the_held_out_part_reaches_the_fit() -> None:
    rows = planted(400, 2.0, bias=0.5)
    held = held_out(rows, 0.5)
    turned = [{**row, "human": MIRROR[row["human"]]} if out else row for row, out in zip(rows, held, strict=True)]
    before, after = calibrate(rows, "human", resamples=0), calibrate(turned, "human", resamples=0)
    assert (after.temperature, after.position_bias) == (before.temperature, before.position_bias)
    assert values(after, "after")["accuracy"] == pytest.approx(1 - values(before, "after")["accuracy"])


def test_the_seed_draws_the_parts() -> None:
    rows = planted(400, 2.0)
    one, again, other = (calibrate(rows, "human", seed=seed, resamples=0) for seed in (1, 1, 2))
    assert one == again
    assert one.temperature != other.temperature


def test_rows_without_a_reference_or_a_label_are_left_out_and_counted() -> None:
    rows = planted(200, 2.0)
    failed = {**rows[0], **combine([vote("ab", 0.9), vote("ba", None, "unparsed")])}
    more = [
        {**rows[0], "human": "tie"},
        {**rows[0], "human": ["a", "b"]},
        {**rows[0], "human": None},
        failed,
        {**failed, "votes": []},
        {**failed, "votes": None},
    ]
    found = calibrate(rows + more, "human", resamples=0)
    assert found.rows == {"all": 206, "no_reference": 3, "no_label": 3}
    assert found.fit.rows + found.test.rows == 200
    alone = calibrate(rows, "human", resamples=0)
    assert (found.temperature, found.metrics) == (alone.temperature, alone.metrics)


# ---------------------------------------------------------------- against combine

probabilities = st.floats(0.001, 0.999)


@st.composite
def voted(draw: st.DrawFn) -> Row:
    """A row of several principles, orders, samples and failures that has a label."""
    spoken = draw(st.booleans())
    votes = [
        vote(order, draw(probabilities), draw(st.sampled_from(["ok", "ok", "ok", "unparsed"])), principle, spoken)
        for principle in draw(st.sampled_from([(None,), ("x", "y"), ("x", "y", "z")]))
        for order in draw(st.sampled_from([("ab",), ("ba",), ("ab", "ba")]))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return {"human": draw(st.sampled_from(["a", "b"])), "votes": votes}


WEIGHTS: dict[str | None, float] = {"x": 2.0, "y": 1.0, "z": 0.5}


@settings(max_examples=100, deadline=None)
@given(st.lists(voted(), min_size=1, max_size=6), st.floats(0.3, 8), st.floats(-2, 2))
def test_the_arrays_of_the_fit_give_what_combine_gives(rows: list[Row], temperature: float, bias: float) -> None:
    rows = [row for row in rows if combine(row["votes"], WEIGHTS)["status"] in LABELLED]
    if not rows:
        return
    found = questions_of(rows, WEIGHTS).preferred(temperature, bias)
    calibration = Calibration(temperature=temperature, position_bias=bias)
    softs = [combine(row["votes"], WEIGHTS, calibration)["soft_label"] for row in rows]
    expected = [p if row["human"] == "a" else 1 - p for p, row in zip(softs, rows, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_losses(seed: int) -> None:
    rows = planted(60, 2.0, bias=0.5, noise=1.0)
    questions, draw = questions_of(rows), np.random.default_rng(seed)
    weights = draw.integers(0, 4, len(rows)).astype(float)
    at = draw.normal(size=2)
    for loss_of, point in (
        (module._answers_loss(questions, weights), at),
        (module._labels_loss(questions, weights, 0.4), at[:1]),
    ):
        assert check_grad(lambda x, f=loss_of: f(x)[0], lambda x, f=loss_of: f(x)[1], point) < 1e-6


def test_a_weight_counts_as_so_many_rows() -> None:
    """What the intervals rely on."""
    rows = planted(150, 2.0, bias=0.5, noise=1.0)
    weights = np.random.default_rng(0).integers(0, 4, len(rows))
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    weighted = fit(questions_of(rows), weights.astype(float), module.STARTS)
    assert weighted == pytest.approx(fit(questions_of(repeated), np.ones(len(repeated)), module.STARTS), rel=1e-3)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_swapping_responses_mirrors_the_calibrated_labels(data: st.DataObject) -> None:
    rows = planted(120, data.draw(st.sampled_from([0.5, 3.0])), bias=data.draw(st.floats(-1, 1)), noise=0.5)
    swaps = data.draw(st.one_of(st.just([True] * 120), st.lists(st.booleans(), min_size=120, max_size=120)))
    swapped = [mirrored(row) if swap else row for row, swap in zip(rows, swaps, strict=True)]
    one, other = (calibrate(some, "human", resamples=0) for some in (rows, swapped))
    assert other.temperature.value == pytest.approx(one.temperature.value, rel=1e-3)
    assert other.position_bias.value == pytest.approx(one.position_bias.value, abs=1e-3)
    assert values(other, "after") == pytest.approx(values(one, "after"), abs=1e-3)
    for row, turned, swap in zip(rows, swapped, swaps, strict=True):
        p, q = (combine(r["votes"], calibration=one.calibration)["soft_label"] for r in (row, turned))
        assert q == pytest.approx(1 - p if swap else p, abs=1e-12)


# ---------------------------------------------------------------- what cannot be fitted


def test_bounds_are_told() -> None:
    rows = planted(400, 2.0)
    right = [{**row, "human": row["label"]} for row in rows]
    wrong = [{**row, "human": MIRROR[row["label"]]} for row in rows]
    best, worst = (calibrate(some, "human", resamples=0) for some in (right, wrong))
    assert best.temperature.value == pytest.approx(0.05)
    assert any("right about every row" in note for note in best.notes)
    assert worst.temperature.value == pytest.approx(50)
    assert any("no better than chance" in note for note in worst.notes)
    assert all(math.isfinite(x) for found in (best, worst) for when in found.metrics for x in values(found, when).values())


def test_constant_answers_give_numbers_all_the_same() -> None:
    rows = [{**row, **combine([vote("ab", 1.0), vote("ba", 0.0)])} for row in planted(100, 1.0)]
    found = calibrate(rows, "human", resamples=50)
    json.dumps(found.as_dict(), allow_nan=False)
    assert values(found, "after")["brier"] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "holdout", "words"),
    [
        ({}, 0.1, "10 rows in the test part, of 100 in all: at least 20"),
        ({}, 0.9, "10 rows in the fit part"),
        ({}, 0.0, "--holdout 0"),
        ({}, 1.0, "--holdout 1"),
        ({}, math.nan, "--holdout nan"),
        ({"human": "good"}, 0.5, "'good' is not a human label"),
        ({"human": None}, 0.5, "no human label in any row"),
        ({"human": "tie"}, 0.5, "0 rows in both parts"),
        ({"votes": None}, 0.5, "no row has votes"),
        ({"votes": [{**vote("ab", 0.5), "labeler": "one"}]}, 0.5, "several labelers"),
        ({"votes": ["a"]}, 0.5, "row 1, column 'votes'"),
        ({"votes": [{"order": "ab"}]}, 0.5, "row 1, column 'votes'"),
        ({"votes": [vote("ab", 1.5)]}, 0.5, "1.5 is not a probability"),
        ({"votes": [vote("ab", None)]}, 0.5, "None is not a probability"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change: Row, holdout: float, words: str) -> None:
    rows = [{**row, **change} for row in planted(100, 1.0)]
    with pytest.raises(UsageError) as error:
        calibrate(rows, "human", holdout=holdout, resamples=0)
    assert words in str(error.value)


def test_the_table_holds_what_was_found() -> None:
    found = calibrate(planted(200, 3.0, orders=("ab",)), "human", resamples=100)
    text = tables.calibrated(found.as_dict(), "human")
    assert max(map(len, text.split("\n"))) <= 100
    (brier,) = (line for line in text.split("\n") if line.startswith("Brier score"))
    assert brier.split()[2] == f"{values(found, 'before')['brier']:.3f}"
    assert f"{found.temperature.value:.3f}" in text
    assert "note: one order only (ab)" in text
    assert "None" not in text


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of `rlaif label` by an overconfident, biased mock labeler, whose soft labels are of planted qualities."""
    folder = tmp_path_factory.mktemp("calibrate")
    draw = np.random.default_rng(7)
    rows = []
    for n in range(400):
        a, b = (round(float(q), 3) for q in draw.normal(size=2))
        human = "a" if draw.random() < sigmoid(a - b) else "b"
        texts = {"prompt": f"p{n}", "response_a": f"one {n}", "response_b": f"two {n}"}
        rows.append({**texts, "quality_a": a, "quality_b": b, "human": human})
    write_jsonl(folder / "d.jsonl", rows)
    (folder / "mine.jinja").write_text('{% extends "pairwise/_layout.jinja" %}{% block question %}Which one?{% endblock %}')
    options = ("--engine", "mock", "-E", "k=3", "-E", "bias=0.8", "-E", "garbage=0.03", "--template", "mine.jinja")
    done = cli("label", "d.jsonl", "-o", "o.jsonl", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_fitted_labeler_is_applied_by_label(labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "fitted.yaml"
    done = cli("calibrate", "o.jsonl", "--human", "human", "--resamples", "100", "-o", file, "--json", cwd=labelled)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"]["change"]["brier"]["value"] < 0
    labeler = load_labeler(str(file))
    assert labeler.calibration is not None
    assert labeler.calibration.temperature == found["temperature"]["value"]
    assert labeler.calibration.position_bias == found["position_bias"]["value"] == pytest.approx(0.8, abs=0.01)
    assert (labeler.name, labeler.engine, labeler.options["k"]) == ("fitted", "mock", 3)
    head = file.read_text().split("\n")[0]
    assert f"on {found['fit']['rows']} rows, column 'human'" in head
    assert f"{found['metrics']['before']['brier']['value']:.4f} before" in head
    # From another folder, the template is still found.
    done = cli("label", labelled / "d.jsonl", "-o", "new.jsonl", "--labeler", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    old, new = read_jsonl(labelled / "o.jsonl"), read_jsonl(tmp_path / "new.jsonl")
    assert {row["status"] for row in new} == {"ok", "unparsed"}
    for before, after in zip(old, new, strict=True):
        expected = combine(before["votes"], calibration=labeler.calibration)
        assert (after["status"], after["label"]) == (expected["status"], expected["label"])
        assert after["soft_label"] == pytest.approx(expected["soft_label"], abs=1e-12)
    # Votes are raw in both, so that calibrating the calibrated output finds the same.
    again = cli("calibrate", "new.jsonl", "--human", "human", "--resamples", "100", "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == found
    assert Path(labeler.template or "").resolve() == (labelled / "mine.jinja").resolve()


def test_the_command_prints_a_table_and_writes_nothing_unasked(labelled: Path) -> None:
    before = sorted(path.name for path in labelled.iterdir())
    done = cli("calibrate", "o.jsonl", "--human", "human", "--resamples", "100", "--holdout", "0.3", cwd=labelled)
    assert done.returncode == 0, done.stderr
    assert "position bias  0.8" in done.stdout
    assert sorted(path.name for path in labelled.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("o.jsonl", "--human", "votes_of_humans"), "no column 'votes_of_humans'"),
        (("o.jsonl", "--human", "human", "--holdout", "0.99"), "rows in the fit part"),
        (("o.jsonl", "--human", "human", "--holdout", "2"), "--holdout 2"),
        (("o.jsonl", "--human", "human", "--human-values", "a=x"), "'x' is not a, b or tie"),
        (("o.jsonl", "--human", "human", "-o", "mine.jinja"), "ends in .yaml"),
        (("o.jsonl", "--human", "human", "-o", "there.yaml"), "is there already"),
        (("o.jsonl", "--human", "human", "-o", "no/f.yaml"), "no such folder"),
        (("bare.jsonl", "--human", "human", "-o", "f.yaml"), "no run file bare.jsonl.run.json"),
        (("other.jsonl", "--human", "human", "-o", "f.yaml"), "does not tell the labeler"),
        (("gone.jsonl", "--human", "human", "-o", "f.yaml"), "no such template file from this folder: gone.jinja"),
        (("d.jsonl", "--human", "human"), "d.jsonl line 1: no column 'id'"),
        (("none.jsonl", "--human", "human"), "no such file"),
    ],
)
def test_bad_calls_are_usage_errors(labelled: Path, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    for name in ("o.jsonl", "d.jsonl", "o.jsonl.run.json"):
        (tmp_path / name).write_bytes((labelled / name).read_bytes())
    for name in ("bare", "other", "gone"):
        (tmp_path / f"{name}.jsonl").write_bytes((labelled / "o.jsonl").read_bytes())
    (tmp_path / "other.jsonl.run.json").write_text('{"settings": {}}')
    (tmp_path / "gone.jsonl.run.json").write_text('{"labeler": {"template": "gone.jinja"}}')
    (tmp_path / "mine.jinja").write_text("")
    (tmp_path / "there.yaml").write_text("kept")
    done = cli("calibrate", *args, "--resamples", "100", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there.yaml").read_text() == "kept"
    assert not (tmp_path / "f.yaml").exists()


CONSTITUTION = """
principles:
  - {name: kind, critique: c, revision: r, preference: "Which is kinder?", weight: 3.0}
  - {name: brief, critique: c, revision: r, preference: "Which is shorter?"}
"""


def test_weights_of_principles_are_the_labelers(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"p{n}",
            "response_a": f"one {n}",
            "response_b": f"two {n}",
            "quality_a": {"kind": n / 50 - 1, "brief": (n * 7 % 100) / 50 - 1},
            "quality_b": {"kind": 0.01, "brief": 0.01},
            "human": "ab"[n * 3 % 5 % 2],
        }
        for n in range(100)
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    file = tmp_path / "two.yaml"
    file.write_text(CONSTITUTION)
    options = ("--engine", "mock", "--constitution", file, "--principles", "all")
    done = cli("label", "d.jsonl", "-o", "o.jsonl", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = principle_weights(tmp_path / "o.jsonl")
    assert weights == {"kind": 3.0, "brief": 1.0}
    out = read_jsonl(tmp_path / "o.jsonl")
    softs = [row["soft_label"] for row in out]
    assert [combine(row["votes"], weights)["soft_label"] for row in out] == pytest.approx(softs, abs=1e-12)
    assert [combine(row["votes"])["soft_label"] for row in out] != pytest.approx(softs, abs=0.01)  # they do count
    file.write_text(CONSTITUTION.replace("3.0", "2.0"))
    done = cli("calibrate", "o.jsonl", "--human", "human", cwd=tmp_path)
    assert (done.returncode, "has changed since" in done.stderr) == (2, True)
