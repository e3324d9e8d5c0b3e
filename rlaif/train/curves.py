"""The metrics of a run as pictures: one SVG for each family of figures that the trainer logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlaif.data import atomic
from rlaif.report.plots import BLUE, GREY, INK, ORANGE, RC, RED, WIDTH
from rlaif.train.record import lines

FAMILIES = {
    "loss": ("loss", "nll_loss"),
    "accuracy": ("accuracy", "mean_token_accuracy", "rewards/accuracies", "rewards/soft_accuracies"),
    "margins": ("margin", "rewards/margins"),
    "rewards": ("reward", "rewards/chosen", "rewards/rejected"),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "kl": ("kl",),
    "entropy": ("entropy",),
    "learning-rate": ("learning_rate",),
    "gradient-norm": ("grad_norm",),
}
"""A picture's name, and the figures it shows, each of them with its `eval_` form where it was logged."""

COLOURS = (BLUE, ORANGE, GREY, RED, "#3b8a5a", "#7a58a6", "#a08119", INK)
NO_FIGURES, TIME = ("part", "step", "epoch"), ("_runtime", "_per_second")
FEW = 12
"""Up to so many points are marked one by one."""

Curve = tuple[str, list[int], list[float]]
"""A name, the steps, and the values at them."""


def write_curves(metrics: Path, folder: Path) -> None:
    """Draw what a run's metrics file holds into a folder; what was not logged has no picture."""
    logged = list(lines(metrics))
    folder.mkdir(exist_ok=True)
    for family, names in FAMILIES.items():
        found = curves(logged, names)
        if found:
            with atomic(folder / f"{family}.svg") as temporary:
                temporary.write_bytes(picture(found, family.replace("-", " ")))


def curves(logged: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Curve]:
    """Each part's line of each figure; a part's name is left out where there is one part."""
    parts = list(dict.fromkeys(line["part"] for line in logged))
    found = []
    for part in parts:
        for name in (lead + name for name in names for lead in ("", "eval_")):
            points = [(line["step"], float(line[name])) for line in logged if line["part"] == part and name in line]
            if points:  # a figure that became NaN was written as text, and is a gap
                label = name if len(parts) == 1 else f"{part} {name}"
                found.append((label, [step for step, _ in points], [value for _, value in points]))
    return found


def picture(found: Sequence[Curve], title: str) -> bytes:
    """The curves over the steps as SVG, the same bytes for the same curves; those of held-out rows are dashed."""
    from io import BytesIO

    with matplotlib.rc_context(RC):
        figure = Figure((1.5 * WIDTH, 3.2), layout="constrained")
        axes: Axes = figure.subplots()
        plain = dict.fromkeys(label.replace("eval_", "") for label, _, _ in found)
        colours = {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(plain)}
        for label, steps, values in found:
            axes.plot(
                steps,
                values,
                color=colours[label.replace("eval_", "")],
                linestyle="--" if "eval_" in label else "-",
                marker="o" if len(steps) <= FEW else "",
                markersize=3,
                linewidth=1.2,
                label=label,
            )
        axes.set_xlabel("step")
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
        if len(found) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), handlelength=2.4)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    return buffer.getvalue()


def last(metrics: Path) -> dict[str, dict[str, Any]]:
    """Each part's figures as they were logged last; without those of time."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(metrics):
        figures = {name: value for name, value in line.items() if name not in NO_FIGURES and not name.endswith(TIME)}
        found.setdefault(line["part"], {}).update(figures)
    return found
