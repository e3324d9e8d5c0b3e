"""What a run tells while it trains: metrics, line by line, and a progress bar."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlaif.progress import Progress
from rlaif.train.lines import append, lines, take_back

__all__ = ["Recorder", "lines", "take_back", "tokens_read"]

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
        for name in ("loss", "eval_loss", "reward", "kl"):
            if isinstance(figures.get(name), int | float):  # TRL has none where no response could be judged
                self.tell(name, f"{name.replace('_', ' ')} {figures[name]:.4f}")
        line = {"part": self.part, "step": state.global_step, "epoch": state.epoch, **figures}
        append(self.path, line)
        self._show(state.global_step)

    def tell(self, name: str, what: str) -> None:
        """Show something beside the bar, in the place of what was shown by this name."""
        self._last[name] = what

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


def tokens_read(path: Path, part: str, step: int) -> int:
    """How many tokens a part had read by a step; 0 where its metrics do not tell."""
    counts = [
        line["num_tokens"] for line in lines(path) if line["part"] == part and line["step"] <= step and "num_tokens" in line
    ]
    return int(max(counts, default=0))
