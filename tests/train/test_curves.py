"""A run's pictures: the figures that were logged and no others, each line where its values are, the same bytes each time."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rlaif.train.curves import COLOURS, FAMILIES, curves, frontier, last, picture, pictures, write_curves

SVG = "{http://www.w3.org/2000/svg}"


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def line(part: str, step: int, **figures: Any) -> dict[str, Any]:
    return {"part": part, "step": step, "epoch": step / 10, **{k.replace("__", "/"): v for k, v in figures.items()}}


def words(svg: bytes) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def paths(svg: bytes) -> list[tuple[str, list[tuple[float, float]], bool]]:
    """The curves of a picture: colour, points, and whether each is dashed."""
    found = []
    for element in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        style = element.get("style", "")
        if "stroke-width: 1.2" in style and "stroke: " in style:
            numbers = [float(word) for word in element.attrib["d"].split() if word not in ("M", "L")]
            colour = style.partition("stroke: ")[2].partition(";")[0]
            found.append((colour, list(zip(numbers[::2], numbers[1::2], strict=True)), "stroke-dasharray" in style))
    return found


def coordinates(path: ElementTree.Element) -> list[float]:
    return [float(word) for word in path.attrib["d"].split() if word not in ("M", "L", "z")]


def test_each_family_that_was_logged_has_a_picture_and_no_other(tmp_path: Path) -> None:
    logged = [line("train", n, loss=1 / n, grad_norm=1.0, learning_rate=1e-5, rewards__margins=n / 9) for n in range(1, 4)]
    metrics = write(tmp_path / "m.jsonl", *logged, line("train", 3, eval_loss=0.5, eval_runtime=2.0))
    write_curves(metrics, tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "loss.svg",
        "gradient-norm.svg",
        "learning-rate.svg",
        "margins.svg",
    }
    said = words((tmp_path / "plots" / "loss.svg").read_bytes())
    assert {"loss", "eval_loss", "step"} <= set(said)


def test_a_curve_goes_through_the_values_that_were_logged() -> None:
    values = [0.9, 0.4, 0.6, 0.1]
    ((_, points, dashed), *_) = paths(picture([("loss", [1, 2, 4, 8], values)], "loss"))
    xs, ys = zip(*points, strict=True)
    assert not dashed
    assert [(x - xs[0]) / (xs[-1] - xs[0]) for x in xs] == pytest.approx([0, 1 / 7, 3 / 7, 1], abs=1e-4)
    assert [(y - ys[0]) / (ys[-1] - ys[0]) for y in ys] == pytest.approx([0, 5 / 8, 3 / 8, 1], abs=1e-4)


def test_parts_are_lines_of_their_own_and_held_out_rows_are_dashed_in_their_colour() -> None:
    logged = [line(part, n, loss=n, eval_loss=n + 1) for part in ("stage-1", "stage-2") for n in (1, 2)]
    found = curves(logged, FAMILIES["loss"])
    assert found == [
        ("stage-1 loss", [1, 2], [1, 2]),
        ("stage-1 eval_loss", [1, 2], [2, 3]),
        ("stage-2 loss", [1, 2], [1, 2]),
        ("stage-2 eval_loss", [1, 2], [2, 3]),
    ]
    svg = picture(found, "loss")
    lines = [(colour, dashed) for colour, points, dashed in paths(svg) if len(points) == 2 and points[0][1] != points[1][1]]
    assert lines == [(COLOURS[0], False), (COLOURS[1], False), (COLOURS[0], True), (COLOURS[1], True)]  # few points above many
    assert {name for name, _, _ in found} <= set(words(svg))


def test_a_value_that_is_no_number_is_a_gap() -> None:
    logged = [line("train", 1, loss=1.0), line("train", 2, loss="nan"), line("train", 3, loss=2.0), line("train", 4, loss=3.0)]
    ((_, steps, values),) = curves(logged, FAMILIES["loss"])
    assert steps == [1, 2, 3, 4]
    assert math.isnan(values[1])
    lines = list(ElementTree.fromstring(picture([("loss", steps, values)], "loss")).iter(f"{SVG}path"))
    (drawn,) = [e.attrib["d"] for e in lines if "stroke-width: 1.2" in e.get("style", "") and e.attrib["d"].count("M") == 2]
    assert drawn.count("L") == 1
    picture([("loss", [1], [math.nan]), ("eval_loss", [1], [math.inf])], "loss")  # nothing to draw, and no error


def test_the_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    metrics = write(tmp_path / "m.jsonl", *(line("train", n, loss=1 / n, accuracy=n / 9) for n in range(1, 9)))
    for name in ("first", "second"):
        write_curves(metrics, tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert b"<dc:date>" not in path.read_bytes()


def test_a_run_that_logged_nothing_has_no_picture(tmp_path: Path) -> None:
    write_curves(tmp_path / "none.jsonl", tmp_path / "plots")
    assert list((tmp_path / "plots").iterdir()) == []
    assert last(tmp_path / "none.jsonl") == {}


def test_the_last_figures_of_each_part_are_told(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "m.jsonl",
        line("stage-1", 1, loss=1.0, grad_norm=3.0),
        line("stage-1", 2, loss=0.5),
        line("stage-1", 2, eval_loss=0.25, eval_runtime=1.5, eval_samples_per_second=3.0),
        line("stage-2", 1, loss="nan"),
    )
    with metrics.open("a") as file:
        file.write('{"part": "stage-2", "lo')  # cut off by a kill
    assert last(metrics) == {"stage-1": {"loss": 0.5, "grad_norm": 3.0, "eval_loss": 0.25}, "stage-2": {"loss": "nan"}}


# ---------------------------------------------------------------- reinforcement learning


def optimised() -> list[dict[str, Any]]:
    """Nine steps whose KL is the square of the step and whose reward is the step; two evaluations."""
    logged = [
        line("train", n, reward=float(n), reward__judge=n / 2, reward__std=0.1, kl=float(n * n), kl__update=0.01, failed=0)
        for n in range(1, 10)
    ]
    return [*logged[:3], line("train", 3, held_out__reward=2.0), *logged[3:], line("train", 9, held_out__reward=1.0)]


def test_the_terms_of_a_reward_are_with_it_and_what_has_a_picture_of_its_own_is_not() -> None:
    found = curves(optimised(), FAMILIES["reward"])
    assert [name for name, _, _ in found] == ["reward", "held_out/reward", "reward/judge"]
    assert found[1][1:] == ([3, 9], [2.0, 1.0])
    drawn = paths(picture(found, "reward"))
    colours = {
        dashed: {colour for colour, points, own in drawn if own == dashed and len(points) > 1} for dashed in (True, False)
    }
    assert colours[True] == {COLOURS[0]}
    assert colours[False] == {COLOURS[0], COLOURS[1]}
    assert [drawn.name for drawn in pictures(optimised())] == [
        "reward",
        "frontier",
        "reward-spread",
        "kl",
        "failed",
        "update-kl",
    ]


def test_the_frontier_is_the_reward_by_the_kl_of_its_step() -> None:
    logged = optimised()
    assert frontier(logged, "reward") == [(n, n * n, n) for n in range(1, 10)]
    assert frontier(logged, "held_out/reward") == [(3, 9.0, 2.0), (9, 81.0, 1.0)]
    logged[1] |= {"kl": "nan"}
    logged[2] |= {"reward": None}
    assert [step for step, _, _ in frontier(logged, "reward")] == [1, *range(4, 10)]
    assert frontier([line("train", 0, held_out__reward=1.0), *logged], "held_out/reward")[0] == (3, 9.0, 2.0)
    sparse = [
        line("train", 5, kl=1.0, reward=0.0),
        line("train", 7, held_out__reward=2.0),
        line("train", 10, kl=4.0, reward=0.0),
    ]
    assert frontier(sparse, "held_out/reward") == [(7, 1.0, 2.0)]


def test_the_frontier_goes_by_the_root_of_the_kl_and_shows_the_order_of_steps(tmp_path: Path) -> None:
    write_curves(write(tmp_path / "m.jsonl", *optimised(), line("train", 10, reward=0.0, kl=-0.5)), tmp_path / "plots")
    svg = (tmp_path / "plots" / "frontier.svg").read_bytes()
    (drawn,) = [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("id", "").startswith("PathCollection")]
    points = list(drawn.iter(f"{SVG}use"))
    xs = [float(point.attrib["x"]) for point in points]
    gaps = [after - before for before, after in pairwise(xs[:9])]
    assert gaps == pytest.approx([gaps[0]] * 8, abs=1e-3)  # KL n² at step n
    assert xs[9] == pytest.approx(xs[0] - gaps[0], abs=1e-3)  # an estimate below 0 is drawn at 0
    strengths = [float(point.attrib["style"].partition("fill-opacity: ")[2] or 1) for point in points]
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.2
    assert any("square root" in word for word in words(svg))
    assert {"reward, later steps stronger", "held_out/reward, in order"} <= set(words(svg))


def test_shares_of_time_are_stacked_and_the_judge_is_beside_them(tmp_path: Path) -> None:
    shares = {"time__generation": 0.5, "time__training": 0.25, "time__judging": 0.9, "time__step": 3.0}
    write_curves(write(tmp_path / "m.jsonl", *(line("train", n, **shares) for n in (1, 2, 3))), tmp_path / "plots")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"time", "step-time"}
    svg = (tmp_path / "plots" / "time.svg").read_bytes()
    tree = ElementTree.fromstring(svg)
    areas = [group.find(f".//{SVG}path") for group in tree.iter(f"{SVG}g") if group.get("id", "").startswith("FillBetween")]
    ups = [{float(up) for up in numbers[1::2]} for numbers in (coordinates(area) for area in areas if area is not None)]
    generation, training = ((min(up), max(up)) for up in ups)
    assert generation[0] == pytest.approx(training[1])  # one upon the other
    assert generation[1] - generation[0] == pytest.approx(2 * (training[1] - training[0]), abs=1e-4)
    assert {"time/generation", "time/training", "time/judging", "share of a step"} <= set(words(svg))
