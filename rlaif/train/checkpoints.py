"""Checkpoints that a killed run can trust: only those that were written to their end count."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from rlaif.data import atomic

MANIFEST = "complete.json"
"""Written last: each file of the checkpoint with its size in bytes."""


class Checkpoints(TrainerCallback):
    """Marks each checkpoint as complete once all its files are there; on Ctrl-C, lets one be written before the run stops."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a part
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size == 1:  # several processes would not stop at the same step
            self._before = {name: signal.signal(name, self._stop) for name in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:  # the second time, at once
            raise KeyboardInterrupt
        self.stopped = True


def seal(folder: Path) -> None:
    """Mark a checkpoint as complete."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({k: v for k, v in sizes.items() if k != MANIFEST}, indent=1), encoding="utf-8")


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps of those that are complete; None where there is none."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if re.search(r"-\d+$", path.name)}
    return next((found[step] for step in sorted(found, reverse=True) if is_complete(found[step])), None)


def is_complete(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
