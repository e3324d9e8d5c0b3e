"""Ablations: one labeler with its knobs turned, over the same rows, measured against humans (as in RLAIF, arXiv 2309.00267)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rlaif.data import Item, atomic, read_rows, run_path
from rlaif.engines import Engine
from rlaif.evaluate import agreement, tables
from rlaif.job import Job
from rlaif.labeler import Labeler
from rlaif.records import RlaifError, UsageError
from rlaif.runner import Limits
from rlaif.yamlfile import YamlFile

ENGINE = ("engine", "model", "base_url", "options")
"""Fields that need another engine where they differ."""

SHORT = {"cot": "{}", "shots": "{} shots", "samples": "{} samples", "temperature": "T {}", "rationale_tokens": "{} tokens"}
"""How a field's value reads in a cell's name; others read as they are."""


class Grid(YamlFile):
    """What to turn: each entry of `grids` stands for all combinations of its values, fields of a labeler."""

    grids: tuple[dict[str, list[Any]], ...] = Field(min_length=1)

    @field_validator("grids")
    @classmethod
    def _known(cls, grids: tuple[dict[str, list[Any]], ...]) -> tuple[dict[str, list[Any]], ...]:
        for grid in grids:
            for name, values in grid.items():
                if name not in Labeler.model_fields or name in ("name", "description"):
                    raise ValueError(f"a labeler has no field '{name}'")
                if not values:
                    raise ValueError(f"'{name}' has no values")
        return grids

    def cells(self, base: Labeler) -> dict[str, Labeler]:
        """Each combination's labeler by its name, in the file's order; a combination that is there twice counts once.

        Raises: UsageError for values that are wrong or do not go together.
        """
        found: dict[str, Labeler] = {}
        for grid in self.grids:
            for values in product(*grid.values()):
                turned = dict(zip(grid, values, strict=True))
                found[_title(turned)] = base.changed(**turned)
        for labeler in found.values():
            labeler.pairwise()
        return found


def _title(turned: Mapping[str, Any]) -> str:
    shown = {name: "off" if value is False else value for name, value in turned.items()}
    plain = {"shots": 0, "cot": "off", "samples": None}
    words = [
        SHORT.get(name, f"{name} {{}}" if name != "template" else "{}").format(value)
        for name, value in shown.items()
        if plain.get(name, "") != value
    ]
    return ", ".join(words).replace("1 shots", "1 shot") or "as it is"


@dataclass
class Ablation:
    """The cells of a grid over one source, each an output of its own in `folder`, continued like any other."""

    source: str
    items: Callable[[], Iterator[Item]]
    cells: Mapping[str, Labeler]
    folder: Path
    human: str
    values: Mapping[str, str] | None = None
    facts: Mapping[str, Any] | None = None

    def jobs(self) -> dict[str, Job]:
        """Raises: UsageError where two cells' names make the same file."""
        jobs: dict[str, Job] = {}
        for number, (name, labeler) in enumerate(self.cells.items(), 1):
            out = self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}.jsonl"
            if any(job.out == out for job in jobs.values()):
                raise UsageError(f"two cells of the grid would be written to {out}")
            what = f"{number}/{len(self.cells)} {name}"
            facts = {"labeler": labeler.model_dump(mode="json", exclude_defaults=True), **(self.facts or {})}
            jobs[name] = Job(self.source, out, self.items, labeler.pairwise(), facts, what)
        return jobs

    async def run(self, limits: Callable[[Labeler], Limits], keep_bad: bool, redo: bool) -> None:
        """Work through all cells, one engine at a time, the same one for all cells that share it.

        Raises: as `Job.check` and `Job.work` do; all cells are checked before the first is worked on.
        """
        jobs, spent = self.jobs(), 0.0
        totals = {name: job.check(keep_bad) for name, job in jobs.items()}
        pressed = {name: limits(labeler) for name, labeler in self.cells.items()}
        engine: Engine | None = None
        made: Any = None
        try:
            for name, labeler in self.cells.items():
                wanted = labeler.model_dump(include=set(ENGINE))
                if engine is None or wanted != made:
                    if engine:
                        await engine.close()
                    engine, made = labeler.make_engine(pressed[name]), wanted
                report = await jobs[name].work(engine, pressed[name].after(spent), totals[name], redo)
                spent += report["this_run"]["cost_usd"] or 0.0
        finally:
            if engine:
                await engine.close()

    def measure(self, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """What the finished cells came to: {"cells": […], "baselines": […]}, ready for JSON."""
        rows, runs = {}, {}
        for name, job in self.jobs().items():
            if run_path(job.out).exists() and job.out.exists():
                rows[name] = [row for _, row in read_rows(str(job.out))]
                runs[name] = json.loads(run_path(job.out).read_text(encoding="utf-8"))
        if not rows:
            raise RlaifError("no cell of the grid is finished")
        results = agreement.leaderboard(rows, self.human, resamples=resamples, seed=seed, values=self.values)
        by_name = {result["name"]: result for result in results}
        cells = [
            {**by_name[name], "cot": self.cells[name].cot, "complete": runs[name]["complete"], "cost": _cost(runs[name])}
            for name in rows
        ]
        return {"cells": cells, "baselines": [result for result in results if result["baseline"]]}

    def write(self, found: Mapping[str, Any], title: str) -> str:
        """Write ablation.json, ablation.md and ablation.svg into the folder; returns the table."""
        table = tables.ablation(found)
        with atomic(self.folder / "ablation.json") as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        with atomic(self.folder / "ablation.md") as temporary:
            temporary.write_text(f"{title}\n\n{table}\n", encoding="utf-8")
        with atomic(self.folder / "ablation.svg") as temporary:
            temporary.write_bytes(plot(found, title))
        return table


def _cost(run: Mapping[str, Any]) -> dict[str, float | None]:
    """What 1,000 labels cost, over all runs: calls, tokens, US dollars where a price is known."""
    labels = run["statuses"]["ok"] + run["statuses"]["tie"]
    usage = run["all_runs"]
    tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    found = {"calls": usage["calls"], "tokens": tokens, "usd": usage["cost_usd"]}
    return {name: None if value is None or not labels else 1000 * value / labels for name, value in found.items()}


def plot(found: Mapping[str, Any], title: str) -> bytes:
    """Agreement with humans against the cost of 1,000 labels, with 95 % intervals and the baselines, as SVG.

    Cells with chain of thought are orange, those without it blue.
    """
    from io import BytesIO

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    priced = all(cell["cost"]["usd"] for cell in found["cells"])
    axis = "usd" if priced else "tokens"
    cells = [cell for cell in found["cells"] if cell["metrics"]["accuracy_all"]["value"] is not None and cell["cost"][axis]]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, cell in enumerate(sorted(cells, key=lambda cell: cell["cost"][axis]), 1):
        estimate, cost = cell["metrics"]["accuracy_all"], cell["cost"][axis]
        axes.plot(
            [cost, cost], [estimate["low"] or estimate["value"], estimate["high"] or estimate["value"]], color="#9aa5b1", lw=1
        )
        colour = "#1f5fa8" if cell["cot"] == "off" else "#c2570c"
        axes.plot(cost, estimate["value"], "o", color=colour, ms=5, label=f"{number}  {cell['name']}")
        axes.annotate(
            str(number), (cost, estimate["value"]), xytext=(4, 3 + 9 * (number % 3)), textcoords="offset points", fontsize=8
        )
    for result, style in zip(found["baselines"], ("--", ":", "-."), strict=False):
        value = result["metrics"]["accuracy_all"]["value"]
        if value is not None:
            axes.axhline(value, color="#777777", lw=1, ls=style, label=result["name"])
    axes.set_xscale("log")
    axes.set_xlabel("US dollars per 1,000 labels" if priced else "tokens per 1,000 labels")
    axes.set_ylabel("agreement with the humans' majority (95 % interval)")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False, handlelength=1.2)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlaif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
