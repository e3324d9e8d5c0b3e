"""The metrics of a run as pictures: one SVG for each family of figures that the trainer logged.

Two are more than curves over the steps: `time`, what a step's time went into, and `frontier`, the reward by how far the
policy has moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from rlaif.data import atomic
from rlaif.report.plots import BLUE, GREY, INK, ORANGE, PAPER, RC, RED, WIDTH, short
from rlaif.train.lines import lines, number

FAMILIES = {
    "reward": ("reward", "reward/*"),
    "reward-spread": ("reward/std", "reward/spread"),
    "kl": ("kl",),
    "beta": ("beta",),
    "loss": ("loss", "nll_loss"),
    "policy-loss": ("loss/policy",),
    "value-loss": ("loss/value",),
    "pretraining-loss": ("loss/ptx",),
    "squared-error": ("mse",),
    "correlation": ("correlation",),
    "accuracy": ("accuracy", "mean_token_accuracy", "rewards/accuracies", "rewards/soft_accuracies"),
    "margins": ("margin", "rewards/margins"),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "entropy": ("entropy",),
    "length": ("length",),
    "ended": ("ended",),
    "repetition": ("repetition", "distinct_1", "distinct_2"),
    "failed": ("failed",),
    "update-kl": ("kl/update",),
    "clipped": ("clipped",),
    "value-explained": ("value/explained",),
    "learning-rate": ("learning_rate",),
    "gradient-norm": ("grad_norm",),
    "step-time": ("time/step",),
}
"""A picture's name, and the figures it shows, each with its held-out form where it was logged. `x/*`: all others of x."""

UNITS = {
    "kl": "nats a response",
    "update-kl": "nats a token",
    "entropy": "nats a token",
    "length": "tokens a response",
    "ended": "share of responses",
    "repetition": "share",
    "failed": "responses without a score",
    "clipped": "share of tokens",
    "value-explained": "share of the variance",
    "step-time": "seconds a step",
}

TIMES = {"time/generation": BLUE, "time/scoring": "#7a58a6", "time/training": ORANGE, "time/waiting": GREY}
"""Shares of a step, one after the other, with their colours; what is left is other work."""
JUDGING = "time/judging"
"""The share of a step during which the judge works, beside the others."""

HELD_OUT = ("eval_", "held_out/")
COLOURS = (BLUE, ORANGE, GREY, RED, "#3b8a5a", "#7a58a6", "#a08119", INK)
NO_FIGURES, TIME = ("part", "step", "epoch"), ("_runtime", "_per_second")
FEW = 12
"""Up to so many points are marked one by one."""
HEIGHT = 2.7

Curve = tuple[str, list[int], list[float]]
"""A name, the steps, and the values at them."""
Point = tuple[int, float, float]
"""A step, its KL and its reward."""


@dataclass(frozen=True)
class Picture:
    """`said`: what it shows, in words, for those who do not see it."""

    name: str
    figure: Figure
    said: str

    @property
    def title(self) -> str:
        return self.name.replace("-", " ").replace("kl", "KL")


def write_curves(metrics: Path, folder: Path) -> None:
    """Draw what a run's metrics file holds into a folder; what was not logged has no picture."""
    folder.mkdir(exist_ok=True)
    for drawn in pictures(list(lines(metrics))):
        with atomic(folder / f"{drawn.name}.svg") as temporary:
            temporary.write_bytes(_svg(drawn.figure, drawn.title))


def pictures(logged: Sequence[dict[str, Any]]) -> Iterator[Picture]:
    """All pictures of what was logged, without titles; their names are those of files."""
    for family, names in FAMILIES.items():
        found = curves(logged, names)
        if found:
            yield Picture(family, _over_steps(found, UNITS.get(family, "")), _said(found))
        if family == "reward" and (points := frontier(logged, "reward")):
            held_out = frontier(logged, "held_out/reward")
            yield Picture("frontier", _frontier(points, held_out), _said_points(points, held_out))
    shares = curves(logged, tuple(TIMES))
    if shares:
        judging = curves(logged, (JUDGING,))
        yield Picture("time", _stacked(shares, judging), _said([*shares, *judging]))


# ---------------------------------------------------------------- what was logged


def curves(logged: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Curve]:
    """Each part's line of each figure; a part's name is left out where there is one part. What is no number is NaN, a gap."""
    parts = list(dict.fromkeys(line["part"] for line in logged))
    found = []
    for part in parts:
        for name in (lead + name for name in _named(logged, names) for lead in ("", *HELD_OUT)):
            points = [(line["step"], number(line[name])) for line in logged if line["part"] == part and name in line]
            if points:
                label = name if len(parts) == 1 else f"{part} {name}"
                values = [math.nan if value is None else value for _, value in points]
                found.append((label, [step for step, _ in points], values))
    return found


def _named(logged: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """The names, with `x/*` as all figures of x that no family names."""
    for name in names:
        if name.endswith("/*"):
            known = {name for family in FAMILIES.values() for name in family}
            found = dict.fromkeys(figure for line in logged for figure in line)
            yield from (figure for figure in found if figure.startswith(name[:-1]) and figure not in known)
        else:
            yield name


def frontier(logged: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """Each value of a reward with the KL of its step, or of the last step before it that has one."""
    found, kl = [], None
    for line in sorted(logged, key=lambda line: (line["step"], "kl" not in line)):  # an evaluation after its step's line
        kl = number(line.get("kl")) if "kl" in line else kl
        reward = number(line.get(name))
        if kl is not None and reward is not None:
            found.append((line["step"], kl, reward))
    return found


def last(metrics: Path) -> dict[str, dict[str, Any]]:
    """Each part's figures as they were logged last; without those of time."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(metrics):
        figures = {name: value for name, value in line.items() if name not in NO_FIGURES and not name.endswith(TIME)}
        found.setdefault(line["part"], {}).update(figures)
    return found


# ---------------------------------------------------------------- drawing


def picture(found: Sequence[Curve], title: str) -> bytes:
    """The curves over the steps as SVG, the same bytes for the same curves; those of held-out rows are dashed."""
    return _svg(_over_steps(found, ""), title)


def _svg(figure: Figure, title: str) -> bytes:
    with matplotlib.rc_context(RC):
        figure.axes[0].set_title(title, loc="left", fontsize=9, fontweight="bold")
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    return buffer.getvalue()


def _over_steps(found: Sequence[Curve], unit: str) -> Figure:
    with matplotlib.rc_context(RC):
        figure, axes = _figure("step", unit)
        plain = dict.fromkeys(_plain(label) for label, _, _ in found)
        colours = {label: COLOURS[n % len(COLOURS)] for n, label in enumerate(plain)}
        for label, steps, values in found:
            held_out = label != _plain(label)
            axes.plot(
                steps,
                values,
                color=colours[_plain(label)],
                linestyle="--" if held_out else "-",
                marker="o" if len(steps) <= FEW else "",
                markersize=3,
                linewidth=1.2,
                zorder=3 if held_out else 2,
                label=short(label, 40),
            )
        if len(found) > 1:
            _legend(figure, [label for label, _, _ in found])
    return figure


def _plain(label: str) -> str:
    """A curve's name without what says that it is of held-out rows."""
    for lead in HELD_OUT:
        label = label.replace(lead, "")
    return label


def _stacked(shares: Sequence[Curve], judging: Sequence[Curve]) -> Figure:
    """Shares of each step's time, one upon the other, and that of the judge as a line."""
    with matplotlib.rc_context(RC):
        figure, axes = _figure("step", "share of a step")
        steps = sorted({step for _, steps, _ in shares for step in steps})
        bottom = [0.0] * len(steps)
        for label, own, values in shares:
            at = {step: value for step, value in zip(own, values, strict=True) if value > 0}  # NaN is not
            top = [low + at.get(step, 0.0) for low, step in zip(bottom, steps, strict=True)]
            colour = TIMES[label.split()[-1]]
            axes.fill_between(steps, bottom, top, color=colour, linewidth=0, alpha=0.75, label=short(label))
            bottom = top
        for label, own, values in judging:
            axes.plot(own, values, color=INK, linewidth=1.2, linestyle="--", label=short(label))
        axes.set_ylim(0, 1)
        _legend(figure, [label for label, _, _ in [*shares, *judging]])
    return figure


def _frontier(points: Sequence[Point], held_out: Sequence[Point]) -> Figure:
    """Rewards by the KL from the reference, on a scale of its square root, by which Gao et al. (arXiv 2210.10760) plot.

    A point for each logged step, the later the stronger; evaluations are joined in their order. An estimate below 0 is at 0.
    """
    with matplotlib.rc_context(RC):
        figure, axes = _figure("KL from the reference, nats a response (scale: square root)", "")
        names = ("reward, later steps stronger", "held_out/reward, in order")[: 2 if held_out else 1]
        steps = [step for step, _, _ in points]
        late = [0.15 + 0.85 * (step - steps[0]) / max(1, steps[-1] - steps[0]) for step in steps]
        axes.scatter(
            [kl for _, kl, _ in points],
            [reward for _, _, reward in points],
            s=11,
            color=[to_rgba(BLUE, share) for share in late],
            linewidth=0,
        )
        axes.plot([], [], "o", color=BLUE, markersize=4, label=names[0])
        if held_out:
            axes.plot(
                [kl for _, kl, _ in held_out],
                [reward for _, _, reward in held_out],
                "o--",
                color=ORANGE,
                markerfacecolor=PAPER,
                markersize=4,
                linewidth=1.2,
                label=names[1],
            )
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xlim(left=0)
        _legend(figure, names)
    return figure


def _root(values: Any) -> Any:
    return values.clip(0) ** 0.5


def _square(values: Any) -> Any:
    return values.clip(0) ** 2


def _figure(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Below the axes, in as many columns as there is room for; each line of it makes the figure taller."""
    columns = max(1, min(4, 72 // (9 + max(map(len, labels)))))
    figure.set_figheight(HEIGHT + 0.17 * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", ncols=columns, handlelength=2.4)


# ---------------------------------------------------------------- in words


def _said(found: Sequence[Curve]) -> str:
    return "; ".join(
        f"{label}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}" for label, steps, values in found
    )


def _said_points(points: Sequence[Point], held_out: Sequence[Point]) -> str:
    return "; ".join(
        f"{name}: {some[0][2]:.4g} at a KL of {some[0][1]:.4g}, {some[-1][2]:.4g} at {some[-1][1]:.4g}"
        for name, some in (("reward", points), ("held_out/reward", held_out))
        if some
    )
