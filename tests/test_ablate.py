"""Ablation grids, against the mock labeler."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlaif.ablate import Ablation, Grid
from rlaif.data import comparisons
from rlaif.labeler import Labeler
from rlaif.runner import Limits
from rlaif.yamlfile import listed, load, named
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl

GRID = """
grids:
  - template: [helpful-base, helpful-detailed]
    shots: [0, 2]
  - template: [helpful-base]
    cot: [off, two-call]
    samples: [3]
    temperature: [0.7]
"""


def data(folder: Path, count: int = 30) -> Path:
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(count)]
    return write_jsonl(folder / "d.jsonl", rows)


def grid(folder: Path, text: str = GRID) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def ablate(folder: Path, *more: str | Path, text: str = GRID) -> Any:
    arguments = ("--human", "human", "--grid", grid(folder, text), "-o", folder / "out", "--engine", "mock")
    return cli("ablate", data(folder), *arguments, *more)


def test_each_shipped_grid_has_cells_that_work() -> None:
    for name in listed("labelers/grids"):
        cells = load(Grid, named("labelers/grids", name)).cells(Labeler())
        assert len(cells) >= 10
        assert {labeler.cot for labeler in cells.values()} == {"off", "two-call"}


def test_a_grid_stands_for_all_combinations_of_its_values(tmp_path: Path) -> None:
    cells = load(Grid, grid(tmp_path)).cells(Labeler(engine="mock", seed=5))
    assert list(cells) == [
        "helpful-base",
        "helpful-base, 2 shots",
        "helpful-detailed",
        "helpful-detailed, 2 shots",
        "helpful-base, 3 samples, T 0.7",
        "helpful-base, two-call, 3 samples, T 0.7",
    ]
    last = cells["helpful-base, two-call, 3 samples, T 0.7"]
    assert (last.cot, last.samples, last.temperature, last.engine, last.seed) == ("two-call", 3, 0.7, "mock", 5)


def test_cells_are_measured_as_align_does_and_cost_what_they_cost(tmp_path: Path) -> None:
    done = ablate(tmp_path, "-E", "noise=2", "--price", "1,1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert len(found["cells"]) == 6
    for cell in found["cells"]:
        out = tmp_path / "out" / (cell["name"].replace(", ", "-").replace(" ", "-") + ".jsonl")
        (alone, *_) = [
            result for result in json.loads(cli("align", out, "--human", "human", "--json").stdout) if not result["baseline"]
        ]
        assert cell["metrics"] == alone["metrics"]
        votes = [vote for row in read_jsonl(out) for vote in row["votes"]]
        tokens = sum(vote["prompt_tokens"] + vote["completion_tokens"] for vote in votes)
        if "two-call" in cell["name"]:
            assert cell["cost"]["calls"] == pytest.approx(1000 * 2 * len(votes) / 30)
            assert all(vote["rationale"] for vote in votes)
        else:
            assert cell["cost"]["calls"] == pytest.approx(1000 * len(votes) / 30)
        assert cell["cost"]["tokens"] == pytest.approx(1000 * tokens / 30)
        assert cell["cost"]["usd"] == pytest.approx(cell["cost"]["tokens"] / 1e6)
        assert cell["name"] in done.stdout
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "(longer response)" in table
    plot = (tmp_path / "out" / "ablation.svg").read_text()
    assert "US dollars per 1,000 labels" in plot
    assert "two-call" in plot


def test_noise_that_is_averaged_away_shows_in_the_table(tmp_path: Path) -> None:
    text = "grids: [{cot: [two-call], samples: [1, 16], temperature: [1]}]"
    done = ablate(tmp_path, "-E", "noise=4", "-E", "k=1", "--one-order", text=text)
    assert done.returncode == 0, done.stderr
    one, many = json.loads((tmp_path / "out" / "ablation.json").read_text())["cells"]
    assert many["metrics"]["accuracy_all"]["value"] > one["metrics"]["accuracy_all"]["value"]


def test_the_same_command_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    assert ablate(tmp_path).returncode == 0
    first = json.loads((tmp_path / "out" / "ablation.json").read_text())
    (tmp_path / "out" / "helpful-detailed.jsonl").unlink()
    done = ablate(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == first
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.run.json")]
    assert len(runs) == 6
    assert all(run["this_run"]["calls"] == 0 for run in runs)


def test_a_grid_stays_within_one_budget_and_keeps_what_is_finished(tmp_path: Path) -> None:
    done = ablate(tmp_path, "--price", "1,1", "--max-cost", "0.05")
    assert done.returncode == 1
    assert "the budget of $" in done.stderr
    runs = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.run.json")]
    assert 0.02 < sum(run["this_run"]["cost_usd"] for run in runs) <= 0.05
    assert len(runs) < 6
    assert "(unfinished)" in done.stdout


class Closing:
    """The mock engine, counting how often it was made and closed."""

    made = closed = 0

    def __init__(self, inner: Any):
        self.inner, self.identity, self.notes = inner, inner.identity, inner.notes
        Closing.made += 1

    async def complete(self, request: Any) -> Any:
        return await self.inner.complete(request)

    async def close(self) -> None:
        Closing.closed += 1


def test_cells_of_one_engine_share_it_and_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Labeler.make_engine
    monkeypatch.setattr(Labeler, "make_engine", lambda self, limits: Closing(make(self, limits)))
    path = data(tmp_path, 5)
    (tmp_path / "out").mkdir()
    cells = load(Grid, grid(tmp_path, "grids: [{model: [one, two], shots: [0, 1]}]")).cells(Labeler(engine="mock"))
    ablation = Ablation(str(path), lambda: comparisons(str(path)), cells, tmp_path / "out", "human")
    asyncio.run(ablation.run(lambda _: Limits(), False, False))
    assert (Closing.made, Closing.closed) == (2, 2)
    assert [cell["name"] for cell in ablation.measure(100)["cells"]] == list(cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grids: []", "grid.yaml: grids: .*at least 1"),
        ("grids: [{shot: [1]}]", "grid.yaml: grids: a labeler has no field 'shot'"),
        ("grids: [{shots: []}]", "grid.yaml: grids: 'shots' has no values"),
        ("grids: [{shots: 2}]", "grid.yaml: grids 1 shots: .*list"),
        ("grids: [{shots: [99]}]", "--shots 99: there are 10 exemplars in helpful"),
        ("grids: [{cot: [loud]}]", "cot: .*'off', 'two-call' or 'one-call'"),
        ("grids: [{template: [kindness]}]", "unknown template 'kindness'"),
        ("grids: [{samples: [4], temperature: [0], cot: [two-call]}]", "4 samples at temperature 0"),
        ("shots: [1]", "grid.yaml: "),
    ],
)
def test_a_wrong_grid_is_one_line_before_anything_is_asked(tmp_path: Path, text: str, message: str) -> None:
    done = ablate(tmp_path, text=text)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out").exists()
