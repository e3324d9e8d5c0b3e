"""What a run tells while it trains: metrics, line by line, and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlaif.data import atomic
from rlaif.progress import Progress

SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss")
"""What a trainer says once at its end, about its time more than about the model."""


class Recorder(TrainerCallback):
    """Writes each logged line of metrics to a file, with its part's name and step, and shows the last ones beside the bar.

    A run that goes on from a checkpoint takes back the lines of its part that came after that.
    """

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part
        self._progress: Progress | None = None
        self._last: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            take_back(self.path, self.part, state.global_step)
            self._progress = Progress(state.max_steps, self.part).__enter__()
            self._progress.update(state.global_step, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        figures = {k: v for k, v in (logs or {}).items() if k not in (*SUMMARY, "epoch")}
        if not state.is_world_process_zero or not figures:
            return
        for name in ("loss", "eval_loss"):
            if name in figures:
                self._last[name] = f"{name.replace('_', ' ')} {figures[name]:.4f}"
        line = {"part": self.part, "step": state.global_step, "epoch": state.epoch, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _finite(v) for k, v in line.items()}) + "\n")
        self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def _show(self, step: int) -> None:
        if self._progress:
            rate = (step - self._first) / max(time.monotonic() - self._begun, 1e-9)
            self._progress.update(step, " · ".join((*self._last.values(), f"{rate:.2f} steps/s")))


def _finite(value: Any) -> Any:
    """JSON has no NaN; a loss that became one must show."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The metrics that were written; a last line that was cut off by a kill is passed over."""
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


def tokens_read(path: Path, part: str, step: int) -> int:
    """How many tokens a part had read by a step; 0 where its metrics do not tell."""
    counts = [
        line["num_tokens"] for line in lines(path) if line["part"] == part and line["step"] <= step and "num_tokens" in line
    ]
    return int(max(counts, default=0))
