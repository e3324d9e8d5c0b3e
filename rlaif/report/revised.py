"""The report on revised rows: what each round of revision does, by principle too, and every row with its rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from rlaif.data import read_rows, run_path
from rlaif.provenance import read_run
from rlaif.records import LABELLED, STATUSES, Row, UsageError
from rlaif.report import plots
from rlaif.report.common import Page, check_row, chosen, cost_of, facts, plain, prompt_of, text_of
from rlaif.revise import tally

REVISED = ("id", "prompt", "response", "revisions", "revised", "status")
"""The columns that a revised row has."""

MADE_OF = ("round", "principle", "status", "revision", "unchanged", "refusal")
"""What every round has."""

ROUND = (
    *("round", "principle", "critique", "revision", "status", "unchanged", "refusal", "text", "completion_tokens", "error"),
    "change",
)
"""What the page shows of a round, in the order in which it gets it; `change` is the distance from the text before it."""

OUTCOMES = ("changed", "declines", "unchanged", "failed")
"""What becomes of a round. One that declines is that, changed or not."""

Round = dict[str, Any]


def is_revised(name: str) -> bool:
    """Whether the first row is one that `rlaif revise` made. Raises: UsageError for a file that cannot be read."""
    _, row = next(read_rows(name), ("", {}))
    return "revisions" in row and "revised" in row


def page(name: str, title: str | None, max_rows: int, seed: int) -> Page:
    """The report on an output of `rlaif revise`; the rows that come first in the list are those without a final revision.

    Raises: UsageError for rows that cannot be read.
    """
    rows = _rows(name)
    short, run = PurePath(name).name, read_run(run_path(Path(name)))
    done = [_rounds(row) for row in rows]
    entries = [_entry(row, rounds) for row, rounds in zip(rows, done, strict=True)]
    kept, listing = chosen([n for n, row in enumerate(rows) if row["status"] != "ok"], len(rows), max_rows, seed)
    made = [one for rounds in done for one in rounds]
    principles = sorted({one["principle"] for one in made if one["principle"] is not None})
    statuses = [status for status in STATUSES if status != "tie"]
    settings = (run or {}).get("settings") or {}
    shown = {
        "output": facts(short, rows, run),
        "method": settings.get("method"),
        "constitution": (settings.get("constitution") or {}).get("constitution"),
        "statuses": statuses,
        "tally": tally(rows),
        "rounds": _by_round(rows, made),
        "outcomes": OUTCOMES,
        **_figures(rows, made, entries),
        "principles": _by_principle(made),
        "costs": [_cost(short, rows, made, run)],
    }
    data = {"statuses": statuses, "principles": principles, "round": ROUND, "rows": [entries[n] for n in kept]}
    return Page("revised", title or f"Revisions: {short}", listing, shown, data)


# ---------------------------------------------------------------- rows


def _rows(name: str) -> list[Row]:
    rows = []
    for number, (where, row) in enumerate(read_rows(name), 1):
        for column in REVISED:
            if column not in row:
                raise UsageError(f"{where}: no column '{column}'; is this an output of `rlaif revise`?")
        try:
            check_row(row, number)
            _check_revisions(row, number)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        rows.append(row)
    return rows


def _check_revisions(row: Row, number: int) -> None:
    if row["status"] == "tie":
        raise UsageError(f"row {number}, column 'status': 'tie' is none of a revision")
    rounds = row["revisions"]
    if rounds is not None and not (isinstance(rounds, list) and all(_is_round(one) for one in rounds)):
        raise UsageError(f"row {number}, column 'revisions': expected a list of rounds, each with {', '.join(MADE_OF)}")
    if row["revised"] is not None and not isinstance(row["revised"], str):
        raise UsageError(f"row {number}, column 'revised': expected text or null")


def _is_round(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and set(MADE_OF) <= one.keys()
        and isinstance(one["round"], int)
        and isinstance(one["principle"], str | None)
        and one["status"] in STATUSES
        and isinstance(one["revision"], str) == (one["status"] == "ok")
        and isinstance(one["unchanged"], bool)
        and isinstance(one["refusal"], bool)
        and isinstance(one.get("completion_tokens"), int | None)
    )


def _rounds(row: Row) -> list[Round]:
    """A row's rounds with all that `ROUND` names."""
    found, before = [], row["response"]
    for one in row["revisions"] or ():
        found.append({**dict.fromkeys(ROUND), **one, "change": _change(before, one["revision"])})
        before = one["revision"]
    return found


def _change(before: Any, after: Any) -> float | None:
    """Characters to insert, delete or replace, as a share of the longer text's; None where there are no two texts."""
    if not isinstance(before, str) or not isinstance(after, str):
        return None
    return round(Levenshtein.normalized_distance(before, after), 6)


def _entry(row: Row, rounds: Sequence[Round]) -> dict[str, Any]:
    """A row as the page gets it."""
    return {
        "id": str(row["id"]),
        "prompt": prompt_of(row),
        "response": text_of(row["response"]),
        "revised": row["revised"],
        "status": row["status"],
        "error": text_of(row.get("error")),
        "change": _change(row["response"], row["revised"]),
        "rounds": [[plain(one[name]) for name in ROUND] for one in rounds],
    }


# ---------------------------------------------------------------- figures


def _outcome(one: Round) -> str:
    if one["status"] != "ok":
        return "failed"
    return "declines" if one["refusal"] else "unchanged" if one["unchanged"] else "changed"


def _outcomes(rounds: Iterable[Round]) -> dict[str, int]:
    found = [_outcome(one) for one in rounds]
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def _grouped(rounds: Iterable[Round], name: str) -> dict[Any, list[Round]]:
    groups: dict[Any, list[Round]] = {}
    for one in rounds:
        groups.setdefault(one[name], []).append(one)
    return dict(sorted(groups.items()))


def _by_round(rows: Sequence[Row], made: Sequence[Round]) -> list[dict[str, Any]]:
    """The table's lines: the original responses, then each round."""
    originals = [len(row["response"]) for row in rows if isinstance(row["response"], str)]
    lines: list[dict[str, Any]] = [{"round": 0, "rows": len(originals), "length": _middle(originals)}]
    for number, some in _grouped(made, "round").items():
        counts = _outcomes(some)
        lines.append(
            {
                "round": number,
                "rows": len(some),
                "counts": counts,
                "change": _middle(_changes(some)),
                "length": _middle(_lengths(some)),
            }
        )
    return lines


def _changes(rounds: Iterable[Mapping[str, Any]]) -> list[float]:
    return [one["change"] for one in rounds if one["change"] is not None]


def _lengths(rounds: Iterable[Round]) -> list[int]:
    return [len(one["revision"]) for one in rounds if one["revision"] is not None]


def _middle(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The median with both quartiles."""
    if not values:
        return None
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return median, low, high


def _figures(rows: Sequence[Row], made: Sequence[Round], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    groups = _grouped(made, "round")
    counts = [(f"round {number}", tuple(_outcomes(some).values())) for number, some in groups.items()]
    changes = [(str(number), _changes(some)) for number, some in groups.items()]
    if len(groups) > 1:
        changes.append(("in all", _changes(entries)))
    lengths = [("original", [len(row["response"]) for row in rows if isinstance(row["response"], str)])]
    lengths += [(str(number), _lengths(some)) for number, some in groups.items()]
    return {
        "outcome_plot": plots.outcomes("outcomes", counts, OUTCOMES) if counts else None,
        "change_plot": plots.spreads("changes", changes, "share of characters", "Changes", 1) if _any(changes) else None,
        "length_plot": plots.spreads("lengths", lengths, "characters", "Lengths", None) if _any(lengths) else None,
    }


def _any(groups: Sequence[tuple[str, Sequence[float]]]) -> bool:
    return any(values for _, values in groups)


def _by_principle(made: Sequence[Round]) -> list[dict[str, Any]]:
    return [_principle(name, some) for name, some in _grouped((m for m in made if m["principle"]), "principle").items()]


def _principle(name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    good = [one for one in rounds if one["status"] == "ok"]
    return {
        "name": name,
        "rounds": len(rounds),
        "failed": _share(len(rounds) - len(good), len(rounds)),
        "unchanged": _share(sum(bool(one["unchanged"]) for one in good), len(good)),
        "declines": _share(sum(bool(one["refusal"]) for one in good), len(good)),
        "change": _middle(_changes(good)),
    }


def _share(hits: int, n: int) -> dict[str, Any]:
    low, high = plots.wilson(hits, n) if n else (None, None)
    return {"hits": hits, "n": n, "value": hits / n if n else None, "low": low, "high": high}


# ---------------------------------------------------------------- cost


def _cost(name: str, rows: Sequence[Row], made: Sequence[Round], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the output cost; without its run file, what its rounds say."""
    revised = sum(row["status"] in LABELLED for row in rows)
    if run is not None:
        return cost_of(name, run, revised)
    spent = {"completion_tokens": sum(one["completion_tokens"] or 0 for one in made)}
    return cost_of(name, {"all_runs": spent}, revised) | {"counted": True}
