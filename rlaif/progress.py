"""The progress of long work on stderr: a bar with its facts and the time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Shows how far work is while the `with` block lasts; call `update` after each part of it."""

    def __init__(self, total: int, what: str):
        self.total, self.what = total, what
        self._console = Console(stderr=True)
        self._begun = self._last = time.monotonic()
        self._first: int | None = None
        self._done, self._facts = 0, ""
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

    def update(self, done: int, facts: str) -> None:
        """`done` of the total are finished; `facts` say what they came to."""
        if self._first is None:
            self._first = done  # what an earlier run had done says nothing of this one's speed
        self._done, self._facts = done, facts
        if self._bar:
            self._bar.update(self._task, completed=done, facts=facts)
        elif time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            self._line()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._line()

    def _line(self) -> None:
        made, left = self._done - (self._first or 0), self.total - self._done
        seconds = time.monotonic() - self._begun
        until = f" · {left * seconds / made:.0f} s left" if left and made else ""
        facts = f" · {self._facts}" if self._facts else ""
        print(f"{self.what} {self._done}/{self.total}{facts}{until}", file=sys.stderr, flush=True)
