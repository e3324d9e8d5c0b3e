"""Temperature scaling of a labeler's soft labels against human labels, with an offset for its preference for a position.

After Guo et al. (arXiv 1706.04599, §4.2) and Platt (1999). What is fitted on one part of the prompts is measured on the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from rlaif.constitution import load_constitution
from rlaif.data import run_path
from rlaif.evaluate.agreement import (
    A,
    Bools,
    Estimate,
    Floats,
    Ints,
    Sample,
    Statistic,
    Votes,
    check_votes,
    estimates,
    human_votes,
    majority,
    sample_of,
    statistics,
)
from rlaif.label.pairwise import Calibration, combine, first_shown, logit
from rlaif.labeler import Labeler
from rlaif.records import LABELLED, Row, UsageError
from rlaif.yamlfile import SUFFIXES, in_words

TEMPERATURES = (0.05, 50.0)
BIAS = 20.0
"""Bounds of what is fitted: of the temperature, and of the position bias to either side, in log-odds."""

STARTS = (0.5, 1.0, 5.0)
"""Temperatures that the search starts from."""

LEAST = 20
"""So many rows must be in either part."""

REFITS = 200
"""The most refits on resampled prompts; for the percentiles of two smooth parameters these do."""

TINY = 1e-6
"""Log loss takes no probability for smaller, as `logit` does not."""

COUNTED = ("brier", "ece", "accuracy")

Loss = Callable[[Floats], tuple[float, Floats]]


@dataclass(frozen=True)
class Part:
    rows: int
    prompts: int


@dataclass(frozen=True)
class Calibrated:
    """What was fitted, and what it is worth on the part that was held out.

    `rows` counts `all` rows, those left out because the human label is not a or b (`no_reference`), and those of the others
    left out because the labeler has no label (`no_label`). `metrics` holds `brier`, `ece`, `nll` (log loss, in nats) and
    `accuracy` of the rows `before`, `after`, and the `change`, which is after − before on the same resamples.
    """

    temperature: Estimate
    position_bias: Estimate
    rows: dict[str, int]
    fit: Part
    test: Part
    metrics: dict[str, dict[str, Estimate]]
    orders: list[str]
    notes: list[str]

    @property
    def calibration(self) -> Calibration:
        return _calibration(self.temperature, self.position_bias)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, numbers and None, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Questions:
    """What some rows were asked, one entry a principle and order, as `combine` averages them.

    `row` is the number of its row, `x` the logit of P(the response shown first is better), `side` 1 where the first shown is
    the one that the human prefers, else −1, `weight` its share in the row's soft label; a row's add up to 1.
    """

    row: Ints
    x: Floats
    side: Floats
    weight: Floats

    def margins(self, temperature: float, bias: float) -> Floats:
        """Calibrated log-odds of the response that the human prefers."""
        return np.asarray(self.side * (self.x - bias) / temperature)

    def preferred(self, temperature: float, bias: float) -> Floats:
        """By row, the calibrated P(what the human prefers is better)."""
        return _sums(self.row, self.weight * expit(self.margins(temperature, bias)))


# ---------------------------------------------------------------- calibrating


def calibrate(
    rows: Sequence[Row],
    human: str,
    holdout: float = 0.5,
    seed: int = 0,
    resamples: int = 1000,
    values: Mapping[str, str] | None = None,
    weights: Mapping[str | None, float] | None = None,
) -> Calibrated:
    """Fit a temperature and a position bias on some of the prompts, and measure them on the others.

    Rows count whose majority of human votes in the column `human` is a or b (as `human_votes` reads them by `values`) and
    that the votes label. `holdout` is the share of prompts, drawn by `seed`, to measure on; rows of a prompt stay together.
    `weights` are the principles' weights in the mean, 1 where one is not told. Votes are raw even where the labels in `rows`
    were calibrated already, as `combine` calibrates after them: what is fitted takes the place of that calibration.

    Raises: UsageError as `human_votes` does, for votes of several labelers (each needs a calibration of its own), and for
    fewer than 20 rows in either part.
    """
    if not 0 < holdout < 1:
        raise UsageError(f"--holdout {holdout:g}: a share above 0 and below 1")
    rows = [{**row, "votes": row.get("votes") or []} for row in rows]
    _check_votes(rows)
    humans = human_votes(rows, human, values)
    judged = [n for n, votes in enumerate(humans) if majority(votes) in ("a", "b")]
    usable = [n for n in judged if rows[n]["votes"] and combine(rows[n]["votes"], weights)["status"] in LABELLED]
    _check_size(len(rows), ("both parts", len(usable)))
    known = sample_of([rows[n] for n in usable], [humans[n] for n in usable], None)
    held = _held_out(known.prompts, holdout, seed)
    _check_size(len(rows), ("the fit part", int((~held).sum())), ("the test part", int(held.sum())))
    fit = _questions([rows[usable[n]]["votes"] for n in np.flatnonzero(~held)], known.human[~held] == A, weights)
    fitted = _fitted(fit, known.prompts[~held], resamples, seed)
    chosen = [usable[n] for n in np.flatnonzero(held)]
    calibration = _calibration(**fitted)
    orders = sorted({str(vote["order"]) for n in usable for vote in rows[n]["votes"]})
    return Calibrated(
        **fitted,
        rows={"all": len(rows), "no_reference": len(rows) - len(judged), "no_label": len(judged) - len(usable)},
        fit=_part(known.prompts[~held]),
        test=_part(known.prompts[held]),
        metrics=_metrics([rows[n] for n in chosen], [humans[n] for n in chosen], weights, calibration, resamples, seed),
        orders=orders,
        notes=_notes(orders, calibration),
    )


def _calibration(temperature: Estimate, position_bias: Estimate) -> Calibration:
    return Calibration.model_validate({"temperature": temperature.value, "position_bias": position_bias.value})


def _check_votes(rows: Sequence[Row]) -> None:
    check_votes(rows)
    if not any(row["votes"] for row in rows):
        raise UsageError("no row has votes: calibration needs an output of `rlaif label`")
    if any(vote.get("labeler") for row in rows for vote in row["votes"]):
        raise UsageError(
            "these are votes of several labelers: calibrate each labeler's own output, which stands in the folder OUT.labelers"
        )


def _held_out(prompts: Ints, share: float, seed: int) -> Bools:
    """Which rows are of the prompts that are held out."""
    distinct = np.unique(prompts)
    drawn = np.random.default_rng(seed).permutation(distinct)[: round(share * len(distinct))]
    return np.isin(prompts, drawn)


def _check_size(rows: int, *parts: tuple[str, int]) -> None:
    for name, count in parts:
        if count < LEAST:
            raise UsageError(
                f"{count} rows in {name}, of {rows} in all: at least {LEAST} whose reference is a or b and that have "
                "a label are needed in either part"
            )


def _part(prompts: Ints) -> Part:
    return Part(len(prompts), len(np.unique(prompts)))


def _notes(orders: Sequence[str], found: Calibration) -> list[str]:
    notes = []
    if len(orders) == 1:
        notes.append(
            f"one order only ({orders[0]}): the position bias also takes up any surplus of one side among the references"
        )
    if not TEMPERATURES[0] * 1.001 < found.temperature < TEMPERATURES[1] / 1.001:
        why = "no better than chance" if found.temperature > 1 else "right about every row it was fitted on, or nearly"
        notes.append(f"the temperature is at the bound of the search: the labeler is {why}")
    if abs(found.position_bias) > BIAS * 0.999:
        notes.append("the position bias is at the bound of the search")
    return notes


# ---------------------------------------------------------------- the fit


def _questions(votes: Sequence[Sequence[Row]], a_better: Bools, weights: Mapping[str | None, float] | None) -> Questions:
    """Rows' votes as arrays, by the rules of `combine`: a principle with an order that failed is left out."""
    found = [
        (number, logit(first_shown(order, group)), 1.0 if (order == "ab") == better else -1.0, share)
        for number, (some, better) in enumerate(zip(votes, a_better, strict=True))
        for order, group, share in _shares(some, weights or {})
    ]
    row, x, side, share = (np.array(column) for column in zip(*found, strict=True))
    return Questions(row, x, side, share)


def _shares(votes: Sequence[Row], weights: Mapping[str | None, float]) -> list[tuple[str, list[Row], float]]:
    """A row's questions that count: order, votes, share in the soft label."""
    asked: dict[str | None, dict[str, list[Row]]] = {}
    for vote in votes:
        asked.setdefault(vote.get("principle"), {}).setdefault(vote["order"], []).append(vote)
    whole = {
        principle: orders
        for principle, orders in asked.items()
        if all(any(vote["status"] in LABELLED for vote in group) for group in orders.values())
    }
    total = sum(weights.get(principle, 1.0) for principle in whole)
    return [
        (order, group, weights.get(principle, 1.0) / total / len(orders))
        for principle, orders in whole.items()
        for order, group in orders.items()
    ]


def _fitted(questions: Questions, prompts: Ints, resamples: int, seed: int) -> dict[str, Estimate]:
    """Both values with their intervals; rounded to six digits, for so they are written down, and measured."""
    best = fit(questions, np.ones(len(prompts)), STARTS)

    @lru_cache(maxsize=1)
    def refit(weights: bytes) -> tuple[float, float]:
        return fit(questions, np.frombuffer(weights), (best[0],))

    both = {
        name: Statistic(len(prompts), lambda weights, place=place: refit(weights.tobytes())[place])  # type: ignore[misc]
        for place, name in enumerate(("temperature", "position_bias"))
    }
    found = estimates(both, prompts, min(resamples, REFITS), seed)
    return {
        name: Estimate(round(point, 6) + 0.0, found[name].low, found[name].high, found[name].n)
        for name, point in zip(both, best, strict=True)
    }


def fit(questions: Questions, weights: Floats, starts: Sequence[float]) -> tuple[float, float]:
    """Temperature and position bias of the greatest likelihood, `weights` counting the rows; `starts` are temperatures.

    In two steps. The bias is that of the single answers: each question by itself predicts the human label, which is logistic
    regression and has one optimum. The temperature is then that of the soft labels, the mean over a row's questions. To fit
    both by the soft labels would be no good: with two orders the mean hardly changes where the bias is off by as much to one
    side as to the other, so that their likelihood is flat in it. Planted at 0.7 and sought so in 4,000 rows, it was found with
    a standard deviation of 0.8 (and pulled the temperature down with it), by these steps with one under 0.02.
    """
    middle = float(np.clip(np.average(questions.x, weights=questions.weight * weights[questions.row] + 1e-12), -BIAS, BIAS))
    bounds = [(float(np.log(TEMPERATURES[0])), float(np.log(TEMPERATURES[1])))]
    first = _least(_answers_loss(questions, weights), [[np.log(t), middle] for t in starts], [*bounds, (-BIAS, BIAS)])
    bias = float(first[1])
    second = _least(_labels_loss(questions, weights, bias), [[first[0]], *([np.log(t)] for t in starts)], bounds)
    return float(np.exp(second[0])), bias


def _least(loss: Loss, starts: Sequence[Sequence[float]], bounds: Sequence[tuple[float, float]]) -> Floats:
    found = [minimize(loss, np.array(start), jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    return np.asarray(min(found, key=lambda result: float(result.fun)).x)


def _answers_loss(questions: Questions, weights: Floats) -> Loss:
    """Negative log-likelihood of the human labels by single answers, of (log temperature, bias), with its gradient."""
    heavy = questions.weight * weights[questions.row] / weights.sum()

    def loss(at: Floats) -> tuple[float, Floats]:
        temperature = float(np.exp(at[0]))
        margins = questions.margins(temperature, float(at[1]))
        wrong = heavy * expit(-margins)
        gradient = np.array([(wrong * margins).sum(), (wrong * questions.side).sum() / temperature])
        return -float((heavy * log_expit(margins)).sum()), gradient

    return loss


def _labels_loss(questions: Questions, weights: Floats, bias: float) -> Loss:
    """The same by soft labels, of (log temperature); no probability is taken for smaller than 1e-12."""
    heavy = weights / weights.sum()

    def loss(at: Floats) -> tuple[float, Floats]:
        margins = questions.margins(float(np.exp(at[0])), bias)
        right = expit(margins)
        slopes = _sums(questions.row, -questions.weight * right * expit(-margins) * margins)
        soft = np.maximum(_sums(questions.row, questions.weight * right), 1e-12)
        return -float((heavy * np.log(soft)).sum()), np.array([-(heavy * slopes / soft).sum()])

    return loss


def _sums(rows: Ints, values: Floats) -> Floats:
    """By row, the sum of its values."""
    return np.bincount(rows, values).astype(np.float64)


# ---------------------------------------------------------------- what it is worth


def _metrics(
    rows: Sequence[Row],
    humans: Sequence[Votes],
    weights: Mapping[str | None, float] | None,
    calibration: Calibration,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Estimate]]:
    measured: dict[tuple[str, str], Statistic] = {}
    for when, applied in (("before", None), ("after", calibration)):
        sample = sample_of([{**row, **combine(row["votes"], weights, applied)} for row in rows], humans, "label")
        measured |= {(when, name): statistic for name, statistic in _worth(sample).items()}
    names = [name for when, name in measured if when == "before"]
    measured |= {("change", name): _difference(measured["after", name], measured["before", name]) for name in names}
    found = estimates(measured, sample.prompts, resamples, seed)
    return {when: {name: found[when, name] for name in names} for when in ("before", "after", "change")}


def _worth(sample: Sample) -> dict[str, Statistic]:
    known = statistics(sample)
    losses = -np.log(np.clip(np.where(sample.human == A, sample.soft, 1 - sample.soft), TINY, 1 - TINY))
    nll = Statistic(len(losses), lambda weights: float(np.average(losses, weights=weights)))
    return {**{name: known[name] for name in COUNTED}, "nll": nll}


def _difference(after: Statistic, before: Statistic) -> Statistic:
    return Statistic(after.n, lambda weights: after.of(weights) - before.of(weights))


# ---------------------------------------------------------------- the labeler file


def principle_weights(out: Path) -> dict[str | None, float]:
    """The weights in the mean over principles that the labeler of this output had, by its run file; {} where all count alike.

    Raises: UsageError where its constitution is gone or has changed, for then its weights are not known.
    """
    run = _run(out) if run_path(out).is_file() else {}
    labeler = run.get("labeler") or {}
    if labeler.get("principles") != "all" or not labeler.get("constitution"):
        return {}
    found = load_constitution(labeler["constitution"])
    if found.hash != (run["settings"].get("constitution") or {}).get("hash"):
        raise UsageError(f"constitution {found.name} has changed since {out} was made: the weights it had are not known")
    return {principle.name: principle.weight for principle in found.principles}


def labeler_settings(out: Path, file: Path) -> dict[str, Any]:
    """What the labeler file `file` should hold, but for the calibration: the fields of the labeler that made `out`.

    The name is left out, so that the file gives it. Paths are taken from the folder that the command runs in, and written so
    that they hold from the file's.

    Raises: UsageError where `file` is there already or could not be written, where `out` has no run file or this one tells no
    labeler, and for a path that leads nowhere.
    """
    if file.suffix not in SUFFIXES:
        raise UsageError(f"{file}: a labeler file ends in {' or '.join(SUFFIXES)}")
    if file.exists():
        raise UsageError(f"{file} is there already: choose another -o")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: no such folder: {file.parent}")
    settings = _run(out).get("labeler")
    if not isinstance(settings, dict):
        raise UsageError(f"{run_path(out)} does not tell the labeler that made {out}")
    try:
        Labeler.model_validate(settings)
    except ValidationError as error:
        raise UsageError(f"{run_path(out)}: labeler {in_words(error, settings)}") from error
    settings = {name: value for name, value in settings.items() if name not in ("name", "calibration")}
    return settings | {name: _path(name, str(settings[name]), file.parent) for name in PATHS if settings.get(name)}


PATHS = {"template": (".jinja",), "exemplars": SUFFIXES, "constitution": SUFFIXES, "model": ()}
"""Fields that may be a path, and the endings that say so."""


def _path(field: str, value: str, folder: Path) -> str:
    path = Path(value)
    if path.is_file():
        return os.path.relpath(path.resolve(), folder.resolve())
    if path.is_dir() and field == "model":  # which is not looked for beside a labeler file
        return str(path.resolve())
    if path.suffix in PATHS[field]:
        raise UsageError(f"no such {field} file from this folder: {value}; run this where `rlaif label` ran")
    return value


def _run(out: Path) -> dict[str, Any]:
    path = run_path(out)
    if not path.is_file():
        raise UsageError(f"no run file {path}, which tells the labeler that made {out}")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(run, dict):
        raise UsageError(f"{path}: not a run file")
    return run


def write_labeler(file: Path, settings: Mapping[str, Any], found: Calibrated, human: str) -> None:
    """Write a labeler file with the calibration, and a comment on what it was fitted on.

    Raises: UsageError where the file is there already, or cannot be written.
    """
    brier = [found.metrics[when]["brier"].value for when in ("before", "after")]
    comment = (
        f"# `rlaif calibrate` fitted the calibration on {found.fit.rows} rows, column {human!r}; Brier score on "
        f"{found.test.rows} held-out rows: {brier[0]:.4f} before, {brier[1]:.4f} after.\n"
    )
    content = {**settings, "calibration": found.calibration.model_dump()}
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    except FileExistsError:
        raise UsageError(f"{file} is there already: choose another -o") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error}") from error
