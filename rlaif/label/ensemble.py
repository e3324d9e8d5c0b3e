"""Several labelers over the same rows: each into an output of its own, their soft labels combined into one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

from rlaif.data import RESERVED, atomic, read_rows, run_path, write_rows
from rlaif.evaluate.agreement import human_votes, majority
from rlaif.label.judge import worst
from rlaif.label.pairwise import hard_label
from rlaif.records import LABELLED, STATUSES, Row, UsageError

Combine = Literal["mean", "majority", "weighted"]


@dataclass(frozen=True)
class Weight:
    """What a labeler's word counts: `weight` = max(0, log(accuracy / (1 − accuracy))).

    The weight of a vote in the best weighted majority of independent voters (Nitzan and Paroush, 1982); one that is no
    better than chance counts nothing. `accuracy` is that on `n` rows where humans and labeler prefer one response, with one
    right and one wrong row added (Laplace), so that it is never 0 or 1.
    """

    accuracy: float
    n: int
    weight: float


def learn_weights(rows: Mapping[str, Sequence[Row]], human: str) -> dict[str, Weight]:
    """Each labeler's weight, from its rows of a human-labelled calibration set.

    Raises: UsageError where no labeler is better than chance, as no weighted mean can then be trusted.
    """
    weights = {}
    for name, some in rows.items():
        humans = [majority(votes) for votes in human_votes(some, human)]
        pairs = [(row["label"], vote) for row, vote in zip(some, humans, strict=True)]
        judged = [(ours, theirs) for ours, theirs in pairs if {ours, theirs} <= {"a", "b"}]
        right = sum(ours == theirs for ours, theirs in judged)
        accuracy = (right + 1) / (len(judged) + 2)
        weights[name] = Weight(accuracy, len(judged), max(0.0, math.log(accuracy / (1 - accuracy))))
    if not any(weight.weight for weight in weights.values()):
        found = ", ".join(f"{name} {w.accuracy:.3f} of {w.n}" for name, w in weights.items())
        raise UsageError(f"no labeler is better than chance on the calibration set ({found}): there is nothing to weight")
    return weights


def combine_labels(named: Mapping[str, Row], how: Combine, weights: Mapping[str, float]) -> Row:
    """One preference from the labelers' results for one row.

    `mean` and `weighted`: the (weighted) mean of soft labels; `majority`: the share of labelers that prefer A, a tie counting
    half. `dispersion` is the standard deviation of the labelers' soft labels. Labelers with at least half of the weight
    failing fail the row: the rest must not speak for all. Each vote tells its labeler.
    """
    votes = [{"labeler": name, **vote} for name, result in named.items() for vote in result["votes"]]
    softs = {name: result["soft_label"] for name, result in named.items() if result["status"] in LABELLED}
    heavy = {name: weights.get(name, 1.0) if how == "weighted" else 1.0 for name in named}
    known = sum(heavy[name] for name in softs)
    if known <= sum(heavy.values()) / 2:
        status, _ = worst([{"status": result["status"], "error": None} for result in named.values()])
        error = next((f"{name}: {result['error']}" for name, result in named.items() if result["error"]), None)
        return {"status": status, "soft_label": None, "label": None, "dispersion": None, "votes": votes, "error": error}
    values = softs if how != "majority" else {name: _hard(soft) for name, soft in softs.items()}
    soft = sum(heavy[name] * value for name, value in values.items()) / known
    label = hard_label(soft)
    return {
        "status": "tie" if label == "tie" else "ok",
        "soft_label": soft,
        "label": label,
        "dispersion": stdev(softs.values()) if len(softs) > 1 else None,
        "votes": votes,
        "error": None,
    }


def _hard(soft: float) -> float:
    return {"a": 1.0, "tie": 0.5, "b": 0.0}[hard_label(soft)]


def names_of(labelers: Sequence[Any]) -> list[str]:
    """The labelers' names, by which their outputs and votes go.

    Raises: UsageError where two have the same, or one cannot be a file's name.
    """
    names = [labeler.name for labeler in labelers]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"two labelers are called '{twice[0]}': give one another name: in its file")
    bad = next((name for name in names if not name or set(name) & set("/\\") or name.startswith(".")), None)
    if bad is not None:
        raise UsageError(f"labeler name '{bad}' cannot be a file's name")
    return names


def write_combined(
    out: Path,
    members: Mapping[str, Path],
    how: Combine,
    weights: Mapping[str, Weight],
    among: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the combined rows and their run file, with the labelers' agreement with one another; returns the latter."""
    counts: Counter[str] = Counter()
    plain = {name: weight.weight for name, weight in weights.items()}

    def rows() -> Iterator[Row]:
        counts.clear()
        for row, results in _together(members):
            result = combine_labels(results, how, plain)
            counts[result["status"]] += 1
            yield {**row, **result}

    write_rows(out, rows)
    runs = {name: json.loads(run_path(path).read_text(encoding="utf-8")) for name, path in members.items()}
    report = {
        "source": next(iter(runs.values()))["source"],
        "complete": all(run["complete"] for run in runs.values()),
        "rows": counts.total(),
        "statuses": {status: counts[status] for status in STATUSES},
        "settings": {"method": "ensemble", "combine": how, "labelers": {name: run["settings"] for name, run in runs.items()}},
        "weights": {name: asdict(weight) for name, weight in weights.items()},
        "agreement": among,
        "members": {name: str(path) for name, path in members.items()},
        "all_runs": _sums([run["all_runs"] for run in runs.values()]),
    }
    with atomic(run_path(out)) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _together(members: Mapping[str, Path]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Each input row with every member's result for it; the members' outputs have the same rows in the same order."""
    for found in zip(*(read_rows(str(path)) for path in members.values()), strict=True):
        rows = dict(zip(members, (row for _, row in found), strict=True))
        plain = {key: value for key, value in found[0][1].items() if key not in RESERVED}
        yield plain, {name: {key: row[key] for key in RESERVED} for name, row in rows.items()}


def _sums(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    costs = [usage["cost_usd"] for usage in usages if usage["cost_usd"] is not None]
    whole: dict[str, Any] = {name: sum(u[name] for u in usages) for name in ("calls", "prompt_tokens", "completion_tokens")}
    return {**whole, "cost_usd": sum(costs) if costs else None}
