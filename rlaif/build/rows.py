"""What every kind of training set shares: its input rows, read and checked, and how an example is written down."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlaif.data import as_text, check_columns, comparisons, read_rows
from rlaif.pairs import COMPARED, PairSettings, texts
from rlaif.records import LABELLED, RlaifError, Row, UsageError, digest

REVISED = ("id", "prompt", "response", "revisions", "revised", "status")
SCORED = ("id", "prompt", "response", "status")
RANKED = ("id", "prompt", "responses", "ranking", "scores", "status")
"""Columns that a revised row has, a scored one (beside its score), and a ranked one."""


@dataclass
class Build:
    """How examples are written down, and what became none.

    `conversational`: lists of messages instead of texts. `seed` draws what is drawn. `dropped` counts what gives no example
    by the reason why; `notes` are what else a user should know.
    """

    conversational: bool = False
    seed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def draw(self, *what: Any) -> random.Random:
        """Random numbers for one purpose: the same whatever else is drawn."""
        return random.Random(digest([self.seed, *what]))

    def pairs(self, **knobs: Any) -> PairSettings:
        return PairSettings(**knobs, conversational=self.conversational, dropped=self.dropped)


# ---------------------------------------------------------------- reading


def read(source: str, columns: Callable[[Row], Sequence[str]], made_by: str) -> list[Row]:
    """All rows of a source. Raises: UsageError naming file, line and column, where a row lacks one that it must have."""
    rows = []
    for where, row in read_rows(source):
        check_columns(row, columns(row), where, made_by)
        rows.append(row)
    if not rows:
        raise UsageError(f"{source}: no rows")
    return rows


def read_revised(source: str) -> list[Row]:
    return read(source, lambda _: REVISED, "`rlaif revise`")


def read_scored(source: str, score: str = "score", or_ranked: bool = False, or_labelled: bool = False) -> list[Row]:
    """Rows of `rlaif score`, or of another command where that will do. Raises: as `read` does."""

    def columns(row: Row) -> tuple[str, ...]:
        if or_ranked and is_ranked(row):
            return RANKED
        return COMPARED if or_labelled and is_labelled(row) else (*SCORED, score)

    made_by = "`rlaif score`" + (" or `rlaif rank`" if or_ranked else " or `rlaif label`" if or_labelled else "")
    rows = read(source, columns, made_by)
    if or_labelled and len({is_labelled(row) for row in rows}) > 1:
        raise UsageError(f"{source}: comparisons and scores in one file")
    return rows


def read_answers(source: str, with_id: bool) -> list[Row]:
    """Rows with responses, of `rlaif sample`, `rlaif score` or a file of `prompt` and `response`. Raises: as `read` does."""
    identity = ("id",) if with_id else ()
    return read(
        source,
        lambda row: (*identity, "prompt", _answered_in(row)),
        "`rlaif sample`, or rows of prompt and response",
    )


def read_human(source: str, human: str | None) -> tuple[list[Row], str]:
    """Human comparisons, of either form that `rlaif label` reads, and the column of their labels.

    Where `chosen` and `rejected` cannot be compared (they are equal, say), the label is null.
    Raises: UsageError for a missing column, or comparisons without `human`.
    """
    first = next((row for _, row in read_rows(source)), {})
    if "chosen" in first and "response_a" not in first:
        items = list(comparisons(source))
        return [{**item.row, **({"human_label": None} if item.problem else {})} for item in items], "human_label"
    if human is None:
        raise UsageError(f"{source}: with response_a and response_b, --human COLUMN tells which one was chosen")
    return read(source, lambda _: ("prompt", "response_a", "response_b", human), "human comparisons"), human


def _answered_in(row: Row) -> str:
    """The column of the row's responses; what `rlaif sample` drew, even where its input had a `response`."""
    return "responses" if "responses" in row and ("samples" in row or "response" not in row) else "response"


def is_ranked(row: Row) -> bool:
    return "ranking" in row


def is_labelled(row: Row) -> bool:
    """Whether the row is one of `rlaif label`."""
    return "soft_label" in row


KINDS = {
    "response": str,
    "revised": str,
    "response_a": str,
    "response_b": str,
    "responses": list,
    "revisions": list,
    "scores": list,
}
"""What the columns of those rows hold."""


def usable(row: Row, build: Build, *columns: str, among: str = "") -> bool:
    """Whether a row can give examples; where it failed, or one of these columns is null or empty, that is counted.

    Raises: UsageError for a prompt, a text or a list that is of another kind.
    """
    reason = _failure(row, columns)
    if reason:
        build.dropped[f"{reason}{among}"] += 1
        return False
    if not (as_text(row["prompt"]) or "").strip():
        raise UsageError(f"row '{row.get('id')}': column 'prompt': expected text or messages, got {row['prompt']!r}")
    for name in columns:
        if name in KINDS and not isinstance(row[name], KINDS[name]):
            expected = "a list" if KINDS[name] is list else "text"
            raise UsageError(f"row '{row.get('id')}': column '{name}': expected {expected}, got {row[name]!r}")
    return True


def _failure(row: Row, columns: Iterable[str]) -> str | None:
    status = row.get("status", "ok")
    if status not in LABELLED:
        return str(status or "without a status")
    empty = next((name for name in columns if _is_empty(row[name])), None)
    return f"without {empty}" if empty else None


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_list(row: Row) -> list[str]:
    """The row's `responses`. Raises: UsageError where one is no text."""
    wrong = next((n for n, text in enumerate(row["responses"]) if not isinstance(text, str)), None)
    if wrong is not None:
        raise UsageError(f"row '{row.get('id')}': column 'responses': the one at index {wrong} is no text")
    return list(row["responses"])


def number(value: Any, row: Row, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"row '{row['id']}': column '{column}': expected a number, got {value!r}")
    return float(value)


def written(build: Build, name: Any, prompt: Any, **responses: str) -> Row:
    return {"id": str(name), **texts(prompt, build.conversational, **responses)}


def answers(rows: Iterable[Row], build: Build, among: str) -> Iterator[tuple[Row, str, list[str]]]:
    """Rows that can give examples, each with its name and its responses: one, or all its samples."""
    for place, row in enumerate(rows):
        column = _answered_in(row)
        if usable(row, build, column, among=among):
            yield row, str(row.get("id", place)), [row["response"]] if column == "response" else text_list(row)


def drawn(rows: list[Row], ratio: float, count: int, what: str, build: Build) -> list[Row]:
    """`ratio` rows for each of `count` examples, without replacement, in their own order. Raises: RlaifError for too few."""
    wanted = round(ratio * count)
    if wanted > len(rows):
        raise RlaifError(f"{what}: {len(rows):,} there, but {wanted:,} wanted ({ratio:g} for each of {count:,} examples)")
    build.notes.append(f"{wanted:,} of the examples are {what}")
    return [rows[n] for n in sorted(build.draw("mix").sample(range(len(rows)), wanted))]
