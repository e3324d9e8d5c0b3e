"""Checkpoints that a killed run can trust: only those that were written to their end count."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from rlaif.data import atomic

MANIFEST = "complete.json"
"""Written last: each file of the checkpoint with its size in bytes."""


class Trained(Exception):
    """The run's last step was made already."""


class Interrupt:
    """Takes note of Ctrl-C and SIGTERM, for the step to be finished first; the second time, they end the run at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {name: signal.signal(name, self._stop) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True


class Checkpoints(TrainerCallback):
    """Marks each checkpoint as complete once all its files are there, and only then lets an older one go.

    The newest `keep` stay. On Ctrl-C or SIGTERM the step is finished and a checkpoint written before the training stops.

    Raises: Trained where a run goes on from its last step, for transformers would make one more.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.interrupt = keep, Interrupt()

    @property
    def stopped(self) -> bool:
        return self.interrupt.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size == 1:  # several processes would not stop at the same step
            self.interrupt.__enter__()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise Trained

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True
        if control.should_save:
            control.should_log = True  # what the metrics sum up from one line to the next is in no checkpoint

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a part
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            seal(folder / f"checkpoint-{state.global_step}")
            for old in in_order(folder)[: -self.keep]:
                shutil.rmtree(old)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back."""
        self.interrupt.__exit__()


def seal(folder: Path) -> None:
    """Mark a checkpoint as complete."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({k: v for k, v in sizes.items() if k != MANIFEST}, indent=1), encoding="utf-8")


def in_order(folder: Path) -> list[Path]:
    """All checkpoints in a folder, complete or not, by their steps."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps of those that are complete; None where there is none."""
    return next((path for path in reversed(in_order(folder)) if is_complete(path)), None)


def clear(folder: Path) -> None:
    """Remove what was not written to its end, so that nothing of it can be taken for a part of a later checkpoint."""
    for path in in_order(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def is_complete(folder: Path) -> bool:
    """Whether there is a manifest, and every file that it lists is there with its size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
