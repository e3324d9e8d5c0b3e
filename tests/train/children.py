"""Training in processes of their own, which start in no time: each is forked from one that has the heavy packages loaded.

A child can be told to send itself a signal, `kill -9` as a rule, at the n-th call of any function.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.records import RlaifError

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    [
        *("peft", "sklearn.metrics", "scipy.stats", "matplotlib.backends.backend_agg", "matplotlib.figure"),
        *("rlaif.train.reward", "rlaif.train.sft", "rlaif.train.preference", "rlaif.train.held_out", "rlaif.report.plots"),
        *("rlaif.rl.ppo", "rlaif.rl.online"),
    ]
)
KILLED = -signal.SIGKILL
STEP = "transformers.Trainer.training_step"
"""Called for each batch."""


@dataclass(frozen=True)
class Death:
    """The signal comes with the `call`-th call of the function of this name: before it does anything, or when it returns."""

    where: str
    call: int = 1
    after: bool = False
    by: signal.Signals = signal.SIGKILL


def start(
    kind: str,
    settings: dict[str, Any],
    resume: bool = False,
    death: Death | None = None,
    batches: Path | None = None,
    env: dict[str, str] | None = None,
) -> Callable[[], tuple[int, str]]:
    """Begin a run; the function that comes back waits for it, and returns its exit code with what it said on stderr.

    `batches`: a file that gets a line for each batch that is trained on, the name of its part.
    """
    with tempfile.NamedTemporaryFile(suffix=".stderr", delete=False) as file:
        says = Path(file.name)
    child = CHILDREN.Process(target=_train, args=(kind, settings, resume, death, batches, env or {}, says))
    child.start()

    def wait() -> tuple[int, str]:
        child.join(120)
        if child.exitcode is None:
            child.kill()
        text = says.read_text(encoding="utf-8")
        says.unlink()
        assert child.exitcode is not None, f"the child hangs: {text}"
        return child.exitcode, text

    return wait


def train(kind: str, settings: dict[str, Any], **told: Any) -> tuple[int, str]:
    """A whole run: its exit code, and what it said on stderr."""
    return start(kind, settings, **told)()


def train_together(kind: str, settings: dict[str, Any], deaths: Sequence[Death | None], **told: Any) -> list[tuple[int, str]]:
    """One run in several processes, as many as `deaths`, with what a launcher tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(deaths)), "OMP_NUM_THREADS": "1"}
    started = [
        start(kind, settings, death=death, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **told)
        for rank, death in enumerate(deaths)
    ]
    return [wait() for wait in started]


def _train(
    kind: str,
    settings: dict[str, Any],
    resume: bool,
    death: Death | None,
    batches: Path | None,
    env: dict[str, str],
    says: Path,
) -> None:
    gc.freeze()  # all that was there before the run is never garbage: to look through it takes longer than the run
    os.environ.update(env)
    os.dup2(os.open(says, os.O_WRONLY), 2)
    import torch

    from rlaif.train import curves
    from rlaif.train.kinds import KINDS
    from rlaif.train.run import run

    torch.set_num_threads(1)
    curves.write_curves = lambda metrics, folder: None  # see conftest.py
    if batches:
        around(STEP, lambda trainer, *_: _note(batches, trainer))
    if death:
        kill(death)
    try:
        run(kind, KINDS[kind].model_validate(settings), resume)
    except RlaifError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _note(batches: Path, trainer: Any) -> None:
    part = Path(trainer.args.output_dir).parent
    with batches.open("a", encoding="utf-8") as file:
        file.write(str(part).partition("/parts/")[2] + "\n")


def kill(death: Death) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == death.call:
            os.kill(os.getpid(), death.by)

    around(death.where, count, death.after)


def around(where: str, extra: Callable[..., None], after: bool = False) -> None:
    """Call `extra` with the arguments of each call of a function, before it or after it."""
    owner, name = _owner(where)
    own = getattr(owner, name)

    @functools.wraps(own)
    def wrapped(*args: Any, **named: Any) -> Any:
        if not after:
            extra(*args)
        found = own(*args, **named)
        if after:
            extra(*args)
        return found

    setattr(owner, name, wrapped)


def _owner(where: str) -> tuple[Any, str]:
    """The module or class that a dotted name's last part belongs to."""
    *path, name = where.split(".")
    for end in range(len(path), 0, -1):
        try:
            owner = importlib.import_module(".".join(path[:end]))
        except ModuleNotFoundError:
            continue
        for inner in path[end:]:
            owner = getattr(owner, inner)
        return owner, name
    raise ModuleNotFoundError(where)
