"""Parts of a file of rows: by the order of a column, or at random without tearing a prompt's rows apart."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from rlaif.data import as_text, split_response
from rlaif.records import Row, UsageError, digest

Placed = tuple[str, Row]
"""A row with its place, for messages."""


def by_column(rows: Sequence[Placed], column: str, shares: Sequence[float], ascending: bool = False) -> list[list[Row]]:
    """Parts in the order of a column of numbers, the greatest first unless `ascending`; equal ones stay in their order.

    By their `margin`, pairs are then in the order of stepwise DPO: the easy ones first (sDPO, Kim et al., arXiv 2403.19270).
    Raises: UsageError naming the place of a row without such a number, or where there are fewer rows than parts.
    """
    values = [_value(row, column, where) for where, row in rows]
    order = sorted(range(len(rows)), key=lambda n: values[n] if ascending else -values[n])
    ends = _ends(len(rows), shares)
    return [[rows[n][1] for n in order[start:end]] for start, end in zip([0, *ends], ends, strict=False)]


def at_random(rows: Sequence[Placed], shares: Sequence[float], seed: int = 0) -> list[list[Row]]:
    """Parts drawn by `seed` and content, all rows of a prompt in the same one; each part keeps the file's order.

    A prompt goes to the part in which its first row falls, so that parts are as large as asked for but for one prompt's rows.
    Raises: UsageError where a part stays empty.
    """
    groups: dict[str, list[int]] = {}
    for n, (_, row) in enumerate(rows):
        groups.setdefault(_prompt(row), []).append(n)
    names = sorted(groups)  # so that the draw does not depend on the rows' order
    random.Random(seed).shuffle(names)
    ends, parts, done = _ends(len(rows), shares), [list[int]() for _ in shares], 0
    for name in names:
        parts[sum(end <= done for end in ends)] += groups[name]
        done += len(groups[name])
    if not all(parts):
        raise UsageError(f"{len(groups)} prompts cannot be {len(shares)} such parts: one would be empty")
    return [[rows[n][1] for n in sorted(part)] for part in parts]


def _prompt(row: Row) -> str:
    """What rows of one prompt have in common; of one without, as whole dialogues are, what it begins with."""
    prompt, _ = split_response(row.get("chosen") or row.get("messages"), row.get("prompt"))
    return digest(as_text(prompt) or row)


def _value(row: Row, column: str, where: str) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        found = f"expected a number, got {value!r}" if column in row else f"is not there; there are: {', '.join(row)}"
        raise UsageError(f"{where}: column '{column}': {found}")
    return float(value)


def _ends(count: int, shares: Sequence[float]) -> list[int]:
    """Where each part ends."""
    ends = [round(count * math.fsum(shares[: n + 1]) / math.fsum(shares)) for n in range(len(shares))]
    if any(start >= end for start, end in zip([0, *ends], ends, strict=False)):
        raise UsageError(f"{count} rows cannot be {len(shares)} such parts: one would be empty")
    return ends
