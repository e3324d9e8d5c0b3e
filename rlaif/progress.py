"""The progress of long work on stderr: a bar with rate, time left, tokens and cost; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rlaif.runner import Tally

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Shows a run's tally while the `with` block lasts; call `update` after each row."""

    def __init__(self, total: int, tally: Tally, what: str = "labelling"):
        self.total, self.tally, self.what = total, tally, what
        self._console = Console(stderr=True)
        self._last = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self.what, total=self.total, facts="")
            self._bar.start()
        return self

    def update(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.tally.rows, facts=self._facts())
        elif time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            self._line()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self.update()
            self._bar.stop()
        else:
            self._line()

    def _line(self) -> None:
        left = self.total - self.tally.rows
        until = f" · {left / self.tally.rate:.0f} s left" if left and self.tally.rate else ""
        print(f"{self.what} {self.tally.rows}/{self.total} · {self._facts()}{until}", file=sys.stderr, flush=True)

    def _facts(self) -> str:
        tally = self.tally
        failures = tally.rows - tally.statuses["ok"] - tally.statuses["tie"]
        parts = [
            f"{tally.rate:.1f} rows/s",
            f"{tally.prompt_tokens + tally.completion_tokens:,} tokens",
        ]
        if tally.cost:
            parts.append(f"${tally.cost:.4f}")
        if failures:
            parts.append(f"{failures} without label")
        return " · ".join(parts)
