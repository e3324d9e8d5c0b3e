"""Files that a run adds lines to while it trains (metrics, samples): each a JSON object with its `part` and `step`.

A kill cannot spoil them, and a run that goes on from a checkpoint takes back what came after that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif.data import atomic


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line; a number that is not finite, which JSON has not, becomes text."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(line)) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(own) for name, own in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written; a last one that was cut off by a kill is passed over."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            yield json.loads(text)
        except ValueError:
            continue


def take_back(path: Path, part: str, step: int) -> None:
    """Remove the lines of a part that came after a step; all of them for step 0, where it begins anew."""
    kept = [line for line in lines(path) if line["part"] != part or (step and line["step"] <= step)]
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def number(value: Any) -> float | None:
    """A figure of a line, where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
