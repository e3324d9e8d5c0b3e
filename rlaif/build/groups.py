"""Rows of group preferences: whose score a response has, for `rlaif train gpo` (Zhao et al., arXiv 2310.11523)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean

from rlaif.build.rows import Build, number, read, read_scored, usable
from rlaif.records import LABELLED, Row, UsageError, digest

ASKED = "`rlaif score --attribute constitution --constitution FILE --principles all` asks by principles"


def read_grouped(source: str, column: str | None, score: str = "score") -> list[Row]:
    """Rows of `rlaif score` with their votes; with a `column` of groups, any rows of prompt, response and score.

    Raises: UsageError naming file, line and column of what is missing.
    """
    if column is None:
        return read_scored(source, "votes")
    return read(source, lambda _: ("prompt", "response", score, column), "`rlaif score`, or rows of prompt, response, score")


def groups(rows: Iterable[Row], build: Build, column: str | None = None, score: str = "score") -> Iterator[Row]:
    """`id`, `group`, `prompt`, `response`, `score`: what each group holds of a response.

    A group is a principle, whose score of a response is the mean of its votes; or, with `column`, what stands there (an
    annotator, a country), whose score is the row's. Where a group scored one response several times, that is their mean.
    Rows and votes that failed are left out. Raises: UsageError for a group or score that is none.
    """
    found: dict[tuple[str, str], tuple[Row, list[float]]] = {}
    for place, row in enumerate(rows):
        named = {"id": str(place), **row}
        for group, value in _by_column(named, build, column, score) if column else _by_principle(named, build):
            key = (group, digest([row["prompt"], row["response"]]))
            found.setdefault(key, (named, []))[1].append(value)
    for (group, _), (row, values) in found.items():
        yield {
            "id": str(row["id"]),
            "group": group,
            "prompt": row["prompt"],
            "response": row["response"],
            "score": fmean(values),
        }


def _by_column(row: Row, build: Build, column: str, score: str) -> Iterator[tuple[str, float]]:
    if usable(row, build, "response", score, column):
        group = row[column]
        if isinstance(group, bool) or not isinstance(group, str | int):
            raise UsageError(f"row '{row['id']}': column '{column}': expected a group's name, got {group!r}")
        yield str(group).strip(), number(row[score], row, score)


def _by_principle(row: Row, build: Build) -> Iterator[tuple[str, float]]:
    if not usable(row, build, "response", "votes"):
        return
    known: dict[str, list[float]] = {}
    for vote in row["votes"]:
        principle = vote.get("principle") if isinstance(vote, dict) else None
        if not principle:
            raise UsageError(f"row '{row['id']}': column 'votes': a vote names no principle; {ASKED}")
        if vote.get("status") in LABELLED:
            known.setdefault(str(principle), []).append(number(vote.get("score"), row, "votes"))
        else:
            build.dropped["votes that failed"] += 1
    yield from ((principle, fmean(values)) for principle, values in known.items())
