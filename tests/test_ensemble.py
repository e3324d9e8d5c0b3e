"""Several labelers together: labels combined by hand, weights learnt from humans, the command and what it keeps."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.data import Item
from rlaif.engines.mock import MockEngine
from rlaif.label.ensemble import Combine, combine_labels, learn_weights, names_of
from rlaif.label.pairwise import hard_label
from rlaif.labeler import Labeler
from rlaif.records import LABELLED, Row, UsageError
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl


def result(soft: float | None, status: str | None = None, error: str | None = None) -> Row:
    """What a labeler made of a row; without a soft label, a failure."""
    label = None if soft is None else hard_label(soft)
    status = status or ("unparsed" if label is None else "tie" if label == "tie" else "ok")
    vote = {"order": "ab", "status": status, "soft_label": soft}
    return {"status": status, "soft_label": soft, "label": label, "dispersion": None, "votes": [vote], "error": error}


def results(*softs: float | None) -> dict[str, Row]:
    return {"abcdefgh"[n]: result(soft) for n, soft in enumerate(softs)}


# ------------------------------------------------------------ combined by hand


@pytest.mark.parametrize(
    ("how", "softs", "soft", "label"),
    [
        ("mean", (0.9, 0.6, 0.3), 0.6, "a"),
        ("mean", (0.9, 0.1), 0.5, "tie"),
        ("mean", (0.4, 0.2, 0.6), 0.4, "b"),
        ("majority", (0.9, 0.4, 0.4), 1 / 3, "b"),
        ("majority", (0.51, 0.99, 0.0), 2 / 3, "a"),
        ("majority", (0.9, 0.5, 0.5), 2 / 3, "a"),
        ("majority", (0.9, 0.1, 0.5), 0.5, "tie"),
        ("weighted", (0.9, 0.6, 0.3), (2 * 0.9 + 0.6 + 0 * 0.3) / 3, "a"),
        ("weighted", (0.2, 0.9, 0.9), (2 * 0.2 + 0.9) / 3, "b"),
    ],
)
def test_labels_are_combined_as_by_hand(how: Combine, softs: tuple[float, ...], soft: float, label: str) -> None:
    found = combine_labels(results(*softs), how, {"a": 2.0, "b": 1.0, "c": 0.0})
    assert found["soft_label"] == pytest.approx(soft, abs=1e-12)
    assert (found["label"], found["status"]) == (label, "tie" if label == "tie" else "ok")
    assert found["dispersion"] == pytest.approx(np.std(softs, ddof=1))
    assert [vote["labeler"] for vote in found["votes"]] == list("abc"[: len(softs)])


@pytest.mark.parametrize(
    ("how", "softs", "soft"),
    [
        ("mean", (0.9, None, 0.6), 0.75),
        ("majority", (0.9, None, 0.6), 1.0),
        ("mean", (0.9, None), None),
        ("mean", (0.9, None, None), None),
        ("mean", (0.9, 0.8, None, None), None),
        ("weighted", (0.9, None, None), 0.9),  # two thirds of the weight
        ("weighted", (None, 0.9, 0.9), None),  # a third of it
        ("weighted", (0.9, None, 0.1), 0.9),
    ],
)
def test_a_failed_labeler_is_left_out_while_more_than_half_of_the_weight_remains(
    how: Combine, softs: tuple[float | None, ...], soft: float | None
) -> None:
    found = combine_labels(results(*softs), how, {"a": 2.0, "b": 1.0, "c": 0.0})
    assert found["soft_label"] == (None if soft is None else pytest.approx(soft))
    assert found["status"] == ("unparsed" if soft is None else "ok")
    assert (found["label"] is None) == (soft is None)
    assert len(found["votes"]) == len(softs)


def test_a_failed_row_says_whose_error_it_was() -> None:
    named = {"one": result(None, "refused"), "two": result(None, "error", "too long"), "three": result(0.9)}
    found = combine_labels(named, "mean", {})
    assert (found["status"], found["error"], found["label"]) == ("error", "two: too long", None)


SOFT = st.floats(0, 1).map(lambda p: round(p, 3)) | st.sampled_from([0.0, 0.5, 1.0])
NAMED = st.lists(st.none() | SOFT, min_size=1, max_size=6)


@given(softs=NAMED, how=st.sampled_from(["mean", "majority", "weighted"]), weights=st.lists(st.integers(1, 4), min_size=6))
def test_swapping_every_label_mirrors_the_combined_one(softs: list[float | None], how: Combine, weights: list[int]) -> None:
    heavy = dict(zip("abcdefgh", map(float, weights), strict=False))
    one = combine_labels(results(*softs), how, heavy)
    other = combine_labels(results(*(None if soft is None else 1 - soft for soft in softs)), how, heavy)
    assert one["status"] == other["status"]
    assert other["label"] == {"a": "b", "b": "a", "tie": "tie", None: None}[one["label"]]
    if one["soft_label"] is not None:
        assert one["soft_label"] + other["soft_label"] == pytest.approx(1, abs=1e-12)
        known = [soft for soft in softs if soft is not None]
        assert (one["dispersion"] is None) == (len(known) < 2)
        if how != "majority":
            assert min(known) - 1e-12 <= one["soft_label"] <= max(known) + 1e-12


@given(softs=NAMED, how=st.sampled_from(["mean", "majority"]))
def test_equal_weights_are_the_mean_and_the_order_of_labelers_is_nothing(softs: list[float | None], how: Combine) -> None:
    named = results(*softs)
    backwards = dict(reversed(named.items()))
    one, other = combine_labels(named, how, {}), combine_labels(backwards, how, {})
    assert (one["soft_label"] or 0) == pytest.approx(other["soft_label"] or 0, abs=1e-12)
    assert one["status"] == other["status"]
    if how == "mean":
        weighted = combine_labels(named, "weighted", dict.fromkeys(named, 0.7))
        assert (one["soft_label"] or 0) == pytest.approx(weighted["soft_label"] or 0, abs=1e-12)
        assert one["status"] == weighted["status"]


# ------------------------------------------------------------ weights


def planted(count: int, seed: int = 0) -> list[Row]:
    """Comparisons of standard normal qualities; the human prefers the better one."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        a, b = draw.normal(size=2)
        texts = {"id": str(n), "prompt": f"p{n}", "response_a": f"one {n}", "response_b": f"two {n}"}
        rows.append({**texts, "quality_a": a, "quality_b": b, "human": "a" if a > b else "b"})
    return rows


def judged(rows: Sequence[Row], engine: MockEngine) -> list[Row]:
    labeler = Labeler().pairwise()

    async def all_of_them() -> list[Row]:
        return await asyncio.gather(*(labeler(Item(row, row["prompt"], "here", None), engine.complete) for row in rows))

    return [{**row, **found} for row, found in zip(rows, asyncio.run(all_of_them()), strict=True)]


def right(count: int, accuracy: float, seed: int = 0) -> list[Row]:
    """Rows of a labeler that is right with this probability."""
    draw = np.random.default_rng(seed)
    humans = ["ab"[n % 2] for n in range(count)]
    return [{"label": h if draw.random() < accuracy else {"a": "b", "b": "a"}[h], "human": h} for h in humans]


@pytest.mark.parametrize("accuracy", [0.6, 0.8, 0.95])
def test_a_good_labeler_weighs_the_log_odds_of_its_accuracy(accuracy: float) -> None:
    count = 4000
    weight = learn_weights({"it": right(count, accuracy)}, "human")["it"]
    assert weight.n == count
    error = 1 / math.sqrt(count * accuracy * (1 - accuracy))  # of a log-odds
    assert weight.weight == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=4 * error)


def test_the_accuracy_has_one_right_and_one_wrong_row_added() -> None:
    rows = [{"label": "a", "human": "a"}] * 6 + [{"label": "a", "human": "b"}] * 2
    weight = learn_weights({"it": rows}, "human")["it"]
    assert (weight.accuracy, weight.n) == (0.7, 8)
    assert weight.weight == pytest.approx(math.log(7 / 3))
    perfect = learn_weights({"it": rows[:6]}, "human")["it"]
    assert perfect.weight == pytest.approx(math.log(7))


def test_ties_and_failures_teach_nothing() -> None:
    rows = [{"label": "a", "human": "a"}] * 5
    idle = [{"label": "tie", "human": "a"}, {"label": None, "human": "b"}, {"label": "b", "human": "tie"}]
    split = [{"label": "b", "human": ["a", "b"]}]
    assert learn_weights({"it": rows + idle + split}, "human") == learn_weights({"it": rows}, "human")
    several = [{"label": "b", "human": ["b", "a", "b"]}]
    assert learn_weights({"it": rows + several}, "human")["it"].n == 6


def test_noise_weighs_nearly_nothing_and_one_worse_than_chance_nothing() -> None:
    rows = planted(400)
    good, noise = judged(rows, MockEngine(k=3, noise=0.5)), judged(rows, MockEngine(k=0, noise=2, seed=1))
    weights = learn_weights({"good": good, "noise": noise, "worse": right(400, 0.2)}, "human")
    assert weights["good"].weight > 2
    assert weights["noise"].n == 400
    assert weights["noise"].weight < 4 / math.sqrt(400 / 4)
    assert weights["worse"].weight == 0
    assert weights["worse"].accuracy < 0.3


def test_where_no_labeler_is_better_than_chance_nothing_is_weighted() -> None:
    with pytest.raises(UsageError, match=r"no labeler is better than chance .*\(x 0\.\d+ of 200, y 0\.\d+ of 200\)"):
        learn_weights({"x": right(200, 0.2), "y": right(200, 0.3)}, "human")


def test_two_good_labelers_and_three_bad_ones_do_better_weighted_than_averaged() -> None:
    engines = {f"good {n}": MockEngine(k=2, noise=0.7, seed=n) for n in range(2)}
    engines |= {f"bad {n}": MockEngine(k=0, noise=3, seed=10 + n) for n in range(3)}
    calibration, rows = planted(150, seed=1), planted(300, seed=2)
    weights = learn_weights({name: judged(calibration, engine) for name, engine in engines.items()}, "human")
    members = {name: judged(rows, engine) for name, engine in engines.items()}
    plain = {name: weight.weight for name, weight in weights.items()}
    hits = {}
    for how in ("mean", "weighted"):
        found = [combine_labels({name: some[n] for name, some in members.items()}, how, plain) for n in range(len(rows))]
        hits[how] = np.array([one["label"] == row["human"] for one, row in zip(found, rows, strict=True)], float)
    better = hits["weighted"] - hits["mean"]
    assert better.mean() > 4 * better.std() / math.sqrt(len(rows))
    assert hits["weighted"].mean() > 0.85


def test_names_must_be_distinct_and_fit_for_files() -> None:
    assert names_of([Labeler(name="a"), Labeler(name="b")]) == ["a", "b"]
    with pytest.raises(UsageError, match="two labelers are called 'a'"):
        names_of([Labeler(name="a"), Labeler(name="b"), Labeler(name="a")])
    for name in ("", "a/b", "..", "a\\b"):
        with pytest.raises(UsageError, match="cannot be a file's name"):
            names_of([Labeler(name=name), Labeler(name="b")])


# ------------------------------------------------------------ the command


def labeler_file(folder: Path, name: str, lines: str = "", **options: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"engine: mock\noptions: {json.dumps(options)}\n{lines}")
    return path


def run_file(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(path.name + ".run.json").read_text())
    return found


def calls(out: Path, *names: str) -> list[int]:
    """Calls of the last run, by labeler."""
    return [run_file(Path(f"{out}.labelers") / f"{name}.jsonl")["this_run"]["calls"] for name in names]


@pytest.mark.parametrize("combine", ["mean", "majority"])
def test_the_command_combines_keeps_each_labeler_and_asks_nothing_again(tmp_path: Path, combine: str) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", [{**row, "tag": 7} for row in make_rows(12)]), tmp_path / "o.jsonl"
    for n, garbage in enumerate((0.0, 0.3, 0.0)):
        labeler_file(tmp_path, f"l{n}", k=1, seed=n, noise=1, garbage=garbage)
    names = ("l0", "l1", "l2")
    command = ["label", path, "-o", out, "--combine", combine]
    command += [word for name in names for word in ("--labeler", tmp_path / f"{name}.yaml")]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert "agreement among 3 labelers" in done.stdout
    assert f"{out}: 12 of 12 rows" in done.stdout
    members = {name: read_jsonl(Path(f"{out}.labelers") / f"{name}.jsonl") for name in names}
    found = read_jsonl(out)
    lost = 0
    for n, row in enumerate(found):
        own = {name: some[n] for name, some in members.items()}
        expected = combine_labels(own, combine, {})
        assert {name: row[name] for name in expected} == expected
        assert row["tag"] == 7
        assert {vote["labeler"] for vote in row["votes"]} == set(names)
        lost += sum(one["status"] not in LABELLED for one in own.values())
    assert lost > 0
    report = run_file(out)
    assert report["settings"]["combine"] == combine
    assert set(report["settings"]["labelers"]) == set(names)
    assert sum(report["statuses"].values()) == report["rows"] == 12
    assert report["complete"] is True
    first = calls(out, *names)
    assert first[0] == first[2] == 24
    assert report["all_runs"]["calls"] == sum(first)
    assert cli(*command).returncode == 0
    again = calls(out, *names)
    assert (again[0], again[2]) == (0, 0)
    # What could not be read is asked again, and that alone: the probabilities, and the verdict that was to stand in for them.
    assert again[1] == 2 * (first[1] - 24)
    assert read_jsonl(out) == found


def test_weights_are_learnt_from_a_calibration_file_and_told(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", planted(40, seed=1)), tmp_path / "o.jsonl"
    labeler_file(tmp_path, "good", k=3, noise=0.5)
    labeler_file(tmp_path, "noise", k=0, noise=3, seed=1)
    labeler_file(tmp_path, "worse", k=-3, noise=0.5, seed=2)
    known = write_jsonl(tmp_path / "known.jsonl", planted(60, seed=2))
    names = ("good", "noise", "worse")
    command = ["label", path, "-o", out, "--combine", "weighted", "--calibration", known, "--human", "human"]
    command += [word for name in names for word in ("--labeler", tmp_path / f"{name}.yaml")]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    folder = Path(f"{out}.labelers")
    rows = {name: read_jsonl(folder / f"{name}.calibration.jsonl") for name in names}
    weights = learn_weights(rows, "human")
    assert weights["good"].weight > 1.5
    assert weights["worse"].weight == 0
    report = run_file(out)
    assert report["weights"] == {
        name: {"accuracy": w.accuracy, "n": w.n, "weight": pytest.approx(w.weight)} for name, w in weights.items()
    }
    for name, weight in weights.items():
        assert f"{name}: weight {weight.weight:.3f}, accuracy {weight.accuracy:.3f} on 60 calibration rows" in done.stdout
    found = read_jsonl(out)
    assert np.mean([row["label"] == row["human"] for row in found]) > 0.8
    members = {name: read_jsonl(folder / f"{name}.jsonl") for name in names}
    plain = {name: weight.weight for name, weight in weights.items()}
    for n, row in enumerate(found):
        expected = combine_labels({name: some[n] for name, some in members.items()}, "weighted", plain)
        assert row["soft_label"] == pytest.approx(expected["soft_label"])
    assert cli(*command).returncode == 0
    assert calls(out, *names, *(f"{name}.calibration" for name in names)) == [0] * 6


def test_labelers_of_different_seeds_see_the_same_response_as_a(tmp_path: Path) -> None:
    """Which side of chosen and rejected is A is drawn by a seed: with one each, labels of different sides would be mixed."""
    rows = [{"prompt": f"p{n}", "chosen": f"good answer {n}", "rejected": f"bad answer {n}"} for n in range(24)]
    path, out = write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o.jsonl"
    for n in range(2):
        labeler_file(tmp_path, f"l{n}", f"seed: {n}\n", k=3)
    done = cli("label", path, "-o", out, "--labeler", tmp_path / "l0.yaml", "--labeler", tmp_path / "l1.yaml")
    assert done.returncode == 0, done.stderr
    members = [read_jsonl(Path(f"{out}.labelers") / f"l{n}.jsonl") for n in range(2)]
    # The planted qualities are the same for both, and so are their labels of the same comparison.
    for row, one, other in zip(read_jsonl(out), *members, strict=True):
        assert one["response_a"] == other["response_a"] == row["response_a"]
        assert row["label"] == one["label"] == other["label"]
        assert row["soft_label"] == pytest.approx(one["soft_label"])
    assert {row["human_label"] for row in members[0]} == {"a", "b"}


def test_the_budget_is_one_for_all_labelers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(10))
    files = [labeler_file(tmp_path, f"l{n}", "price: [1.0, 1.0]\nconcurrency: 1\n", seed=n) for n in range(3)]
    labelers = [word for file in files for word in ("--labeler", file)]
    free = tmp_path / "free.jsonl"
    assert cli("label", path, "-o", free, *labelers).returncode == 0
    costs = [run_file(Path(f"{free}.labelers") / f"l{n}.jsonl")["this_run"]["cost_usd"] for n in range(3)]
    budget = costs[0] + costs[1] / 2
    out = tmp_path / "o.jsonl"
    done = cli("label", path, "-o", out, *labelers, "--max-cost", budget)
    assert done.returncode == 1
    assert "budget" in done.stderr
    assert not out.exists()
    folder = Path(f"{out}.labelers")
    spent = [run_file(folder / f"l{n}.jsonl")["this_run"]["cost_usd"] for n in range(2)]
    assert spent[0] == pytest.approx(costs[0])
    assert spent[1] > 0
    assert sum(spent) <= budget
    assert not (folder / "l2.jsonl").exists()
    assert cli("label", path, "-o", out, *labelers).returncode == 0
    assert calls(out, "l0", "l2") == [0, 20]
    assert 0 < calls(out, "l1")[0] < 20
    assert read_jsonl(out) == read_jsonl(free)


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    other = write_jsonl(tmp_path / "o.jsonl", [{"dear": "to somebody"}])
    labelers = [word for n in range(2) for word in ("--labeler", labeler_file(tmp_path, f"l{n}"))]
    for out, words in ((path, "the output is the input"), (other, "is there already")):
        before = out.read_text()
        done = cli("label", path, "-o", out, *labelers)
        assert done.returncode == 2
        assert words in done.stderr
        assert out.read_text() == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--labeler", "a.yaml", "--labeler", "sub/a.yaml"), "two labelers are called 'a'"),
        (("--labeler", "a.yaml", "--labeler", "none.yaml"), "no such file: none.yaml"),
        (("--labeler", "a.yaml", "--labeler", "b.yaml", "--combine", "weighted"), "needs --calibration FILE and --human"),
        (("--labeler", "a.yaml", "--labeler", "b.yaml", "--calibration", "d.jsonl", "--human", "human"), "--combine weighted"),
        (("--labeler", "a.yaml", "--combine", "majority"), "goes with several --labeler"),
        (
            ("--labeler", "a.yaml", "--labeler", "b.yaml", "--combine", "weighted", "--calibration", "d.jsonl", "--human", "x"),
            "no column 'x'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    (tmp_path / "sub").mkdir()
    for folder, name in ((tmp_path, "a"), (tmp_path, "b"), (tmp_path / "sub", "a")):
        labeler_file(folder, name)
    write_jsonl(tmp_path / "d.jsonl", planted(3))
    done = cli("label", "d.jsonl", "-o", "o.jsonl", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_bad_rows_stop_all_labelers_before_anything_is_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*make_rows(2), {**make_rows(1)[0], "response_b": ""}])
    labelers = [word for n in range(2) for word in ("--labeler", labeler_file(tmp_path, f"l{n}"))]
    out = tmp_path / "o.jsonl"
    done = cli("label", path, "-o", out, *labelers)
    assert done.returncode == 2
    assert "line 3: column 'response_b' is empty" in done.stderr
    assert not list(Path(f"{out}.labelers").glob("*.store"))
