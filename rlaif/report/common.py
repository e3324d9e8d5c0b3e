"""What reports of every kind share: which rows are listed, what a run file says, and values as the page gets them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from rlaif.data import as_text
from rlaif.records import STATUSES, Row, UsageError

SPENT = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Listing:
    """What the page lists: `rows` of `total` rows, `first` of `all_first` of those that come first; `what` they are."""

    rows: int
    total: int
    first: int
    all_first: int
    what: str = "rows"


@dataclass(frozen=True)
class Page:
    """A page before it is written: `kind` names its template and its script, `values` are the template's.

    `data` is what the script gets; its `rows` are those of `listing`.
    """

    kind: str
    title: str
    listing: Listing
    values: dict[str, Any]
    data: dict[str, Any]


def chosen(first: Sequence[int], total: int, most: int, seed: int) -> tuple[list[int], Listing]:
    """Which of `total` rows are listed, in their order: those of `first` before others, drawn where they are too many."""
    draw = random.Random(seed)
    kept = list(first) if len(first) <= most else draw.sample(first, most)
    rest = sorted({*range(total)} - {*first})
    kept = sorted([*kept, *(rest if total <= most else draw.sample(rest, most - len(kept)))])
    return kept, Listing(len(kept), total, len({*kept} & {*first}), len(first))


# ---------------------------------------------------------------- rows


def check_row(row: Row, number: int) -> None:
    """Raises: UsageError for an id or a status that no output has."""
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise UsageError(f"row {number}, column 'id': {row['id']!r} is neither text nor a whole number")
    if row["status"] not in STATUSES:
        raise UsageError(f"row {number}, column 'status': {row['status']!r} is none of {', '.join(STATUSES)}")


def prompt_of(row: Row) -> str | None:
    return as_text(row["prompt"]) or text_of(row["prompt"])


def text_of(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def plain(value: Any) -> Any:
    """A value for JSON; NaN, which JSON has not, is nothing."""
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value if isinstance(value, int) else text_of(value)


# ---------------------------------------------------------------- runs and costs


def facts(name: str, rows: Sequence[Row], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """An output's counts by status, and what its run file says of how it was made."""
    there, run = run is not None, run or {}
    settings = run.get("settings") or {}
    several = settings.get("labelers") or {"": settings}
    return {
        "name": name,
        "counts": Counter(str(row["status"]) for row in rows),
        "rows": len(rows),
        "run": there,
        "model": _listed_of((one.get("engine") or {}).get("model") for one in several.values()),
        "template": _listed_of(one.get("template") for one in several.values()),
        "source": PurePath(str(run.get("source", ""))).name,
        "finished": str(run.get("finished_at") or "").replace("T", " ").replace("Z", " UTC"),
        "stopped": None if run.get("complete", True) else run.get("stopped") or "it did not finish",
        "notes": list(run.get("notes") or ()),
        "settings": [*_flat(settings), *_flat({"versions": run.get("versions") or {}})],
    }


def _listed_of(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _flat(settings: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{lead}{name}.")
        elif value is not None:
            yield f"{lead}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cost_of(name: str, run: Mapping[str, Any], made: int) -> dict[str, Any]:
    """A line of the cost table, for `made` labels or revisions."""
    usage = run.get("all_runs") or {}
    cost = usage.get("cost_usd")
    return {
        "name": name,
        **{key: usage.get(key) for key in ("calls", *SPENT)},
        "cost": cost,
        "made": made,
        "per_thousand": 1000 * cost / made if cost is not None and made else None,
        "seconds": (run.get("this_run") or {}).get("wall_seconds"),
        "counted": False,
        "member": False,
    }
