"""What a reward model makes of held-out rows: how often it prefers what they prefer, and how well it is calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlaif.data import Item, as_text, read_rows
from rlaif.engines.reward import RewardEngine
from rlaif.evaluate import agreement
from rlaif.evaluate.agreement import Estimate, Floats, Statistic
from rlaif.job import Job
from rlaif.label.pairwise import hard_label
from rlaif.records import LABELLED, Row, digest
from rlaif.reward import Comparisons, Ratings, Scorer, read_folder
from rlaif.runner import Limits
from rlaif.train.config import Reward
from rlaif.train.data import Rows

FILE = "held-out.jsonl"
"""The rows with the model's scores and the column `reference`, what the data says of them; in the run's folder."""

REFERENCE = "reference"
RESAMPLES = 1000
"""Of the bootstrap."""

METRICS = ("accuracy", "accuracy_no_ties", "kappa", "ece", "brier")


def evaluate(config: Reward, held: Rows, model: Path, folder: Path) -> dict[str, Any]:
    """Score the held-out rows with the model in a folder, into FILE, and measure the scores against the data.

    Comparisons are measured as a labeler's, by `rlaif.evaluate.agreement`, each by the head that it belongs to; single
    responses as `singles` says. Returns the figures by name, each with its 95 % interval.
    """
    trained = read_folder(model)
    scorer = Scorer((trained,), combine=trained.combine, own_head=len(trained.heads) > 1)
    paired = "chosen" in held.rows[0]
    made = [_item(number, row, trained.heads, paired) for number, row in enumerate(held.rows, 1)]
    method = (Comparisons if paired else Ratings)(scorer)
    job = Job(held.source, folder / FILE, lambda: iter(made), method, what="held out")
    engine = RewardEngine(
        (trained,),
        None if config.dtype == "auto" else config.dtype,
        None if config.device == "auto" else config.device,
        config.trust_remote_code,
    )
    report = job.run(engine, Limits(concurrency=256, timeout=None), len(made), redo=True)
    rows = [row for _, row in read_rows(str(folder / FILE))]
    found = {"file": FILE, "rows": len(rows), "failed": sum(report["statuses"][name] for name in ("error", "refused"))}
    return found | (comparisons if paired else singles)(rows)


def _item(number: int, row: Row, heads: tuple[str, ...], paired: bool) -> Item:
    prompt = row["prompt"]
    made: Row = {"id": str(number), "prompt": prompt}
    if len(heads) > 1:
        made["head"] = heads[row["head"]]
    if paired:
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        drawn = int(digest([prompt, sorted([chosen, rejected])])[0], 16) < 8  # which side is which tells nothing
        a, b = sorted([chosen, rejected], reverse=drawn)
        soft = row.get("soft_label", 1.0)
        soft = soft if a == chosen else 1 - soft
        made |= {"response_a": a, "response_b": b, REFERENCE: hard_label(soft), "reference_soft": soft}
    else:
        made |= {"response": _text(row["completion"]), REFERENCE: row["label"]}
    return Item(made, as_text(prompt) or "", f"held-out row {number}", None)


def _text(response: Any) -> str:
    return str(response[0]["content"] if isinstance(response, list) else response)


# ---------------------------------------------------------------- measuring


def comparisons(rows: list[Row]) -> dict[str, Any]:
    """Of comparisons: the metrics of `agreement.statistics`, of each head and member too, and the accuracy of baselines."""

    def measured(some: list[Row]) -> dict[str, Any]:
        return _metrics(agreement.align(some, REFERENCE, resamples=RESAMPLES).metrics)

    found = measured(rows)
    found["baselines"] = {
        own.name: _metrics(own.metrics, METRICS[:2]) for own in agreement.baselines(rows, REFERENCE, RESAMPLES)
    }
    if "head" in rows[0]:
        found["heads"] = {name: measured(some) for name, some in agreement.split_votes(rows, "head").items()}
    if len({vote["labeler"] for row in rows for vote in row["votes"]}) > 1:
        found["members"] = {name: measured(some) for name, some in agreement.split_votes(rows, "labeler").items()}
    return found


def _metrics(found: Mapping[str, Estimate], names: tuple[str, ...] = METRICS) -> dict[str, Any]:
    return {name: asdict(found[name]) for name in names if found[name].n}


def singles(rows: list[Row]) -> dict[str, Any]:
    """Of single responses, each good or bad: what `_single` measures, of each head or member too."""
    rows = [row for row in rows if row["status"] in LABELLED]
    if not rows:
        return {}
    found = _single(rows)
    if "head" in rows[0]:
        found["heads"] = {name: _single(some) for name, some in agreement.split_votes(rows, "head").items()}
    elif len(rows[0]["scores"]) > 1:
        members = {name: [{**row, "score": row["scores"][name]} for row in rows] for name in rows[0]["scores"]}
        found["members"] = {name: _single(some) for name, some in members.items()}
    return found


def _single(rows: list[Row]) -> dict[str, Any]:
    """`accuracy` of score > 0, `auc` (how often a good one's score is above a bad one's), `brier` of σ(score), and the accuracy
    of taking all for good, or all for bad.
    """
    from scipy.special import expit
    from sklearn.metrics import roc_auc_score

    good = np.array([row[REFERENCE] for row in rows], dtype=np.bool_)
    score = np.array([row["score"] for row in rows], dtype=np.float64)
    everyone = np.ones_like(good)

    def auc(weights: Floats) -> float:
        drawn = good[weights > 0]
        return float(roc_auc_score(good, score, sample_weight=weights)) if drawn.any() and not drawn.all() else math.nan

    def brier(weights: Floats) -> float:
        return float(np.average((expit(score) - good) ** 2, weights=weights))

    prompts = np.unique([digest(row["prompt"]) for row in rows], return_inverse=True)[1]
    measures = {
        "accuracy": agreement.share((score > 0) == good, everyone),
        "auc": Statistic(len(rows), auc),
        "brier": Statistic(len(rows), brier),
        "all good": agreement.share(good, everyone),
        "all bad": agreement.share(~good, everyone),
    }
    found = {name: asdict(own) for name, own in agreement.estimates(measures, prompts, RESAMPLES, 0).items()}
    trivial = {name: {"accuracy": found.pop(name)} for name in ("all good", "all bad")}
    return {**found, "baselines": trivial}
