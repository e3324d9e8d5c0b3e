"""Steps in processes of their own, forked from one that has the heavy packages loaded already: each begins at once.

`python -m rlaif.pipeline.child` reads a line of JSON for each step, and answers with two: the process that runs it, and how
that ended. When the one that asks dies, however it dies, so do this process and the step.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

HEAVY = (
    *("peft", "sklearn.metrics", "scipy.stats", "matplotlib.backends.backend_agg", "matplotlib.figure", "rlaif.report.plots"),
    *("rlaif.engines.transformers", "rlaif.train.reward", "rlaif.train.sft", "rlaif.train.preference", "rlaif.train.held_out"),
    *("rlaif.rl.ppo", "rlaif.rl.online"),
)
"""What training imports: ten seconds, spent once for all steps."""

GPU = Path("/dev/nvidiactl")
"""Where there is one, nothing is loaded before a step's process begins: CUDA does not survive a fork."""

LOCK = ".step.lock"
"""Held by a step's process, so that no two of them are ever at work in a folder."""

DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG, of Linux's prctl."""


@dataclass(frozen=True)
class Ended:
    """`code`: the exit code, negative for a signal; `error`: what was wrong, in words."""

    code: int
    error: str | None


class Steps:
    """Runs steps, one after the other. Use as a context."""

    def __init__(self) -> None:
        self.pid, self._heavy = 0, False
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def begin(self, heavy: bool) -> None:
        """Start the process that steps are forked from; `heavy`: the next one trains. One that has all loaded stays."""
        heavy = heavy and not GPU.exists()
        if self._process and (self._heavy or not heavy):
            return
        self._end()
        words = [sys.executable, "-m", "rlaif.pipeline.child", *(["heavy"] if heavy else [])]
        # A group of its own: Ctrl-C reaches the step through `interrupt` alone, and once.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", process_group=0
        )
        self._heavy = heavy

    def _end(self) -> None:
        if self._process:
            self._process.communicate()  # closes what it reads from, at which it ends
            self._process = None

    def run(self, words: Sequence[str], folder: Path, said: Path) -> Ended:
        """Run a command line in a folder; what it prints goes into the file `said`, its progress to this process's stderr."""
        assert self._process
        assert self._process.stdin
        told = {"words": list(words), "folder": str(folder), "said": str(said)}
        try:
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            self.pid = self._read()["pid"]
            return Ended(**self._read())
        except (OSError, EOFError):
            return Ended(-signal.SIGKILL, "the process that starts the steps was killed")
        finally:
            self.pid = 0

    def interrupt(self, by: int) -> None:
        """Pass a signal on to the step at work."""
        if self.pid:
            os.kill(self.pid, by)

    def _read(self) -> dict[str, Any]:
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        found: dict[str, Any] = json.loads(line)
        return found


# ---------------------------------------------------------------- the process that forks


def serve(asked: IO[str], answer: Callable[[dict[str, Any]], None]) -> None:
    for line in asked:
        _step(json.loads(line), answer)


def _step(told: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os._exit(_work(told, ours))
    os.close(ours)
    answer({"pid": pid})
    with os.fdopen(theirs, encoding="utf-8") as pipe:
        error = pipe.read() or None
    answer({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "error": error})


def _work(told: dict[str, Any], error: int) -> int:
    """A step, in its own process; the exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["folder"])
    said = os.open(told["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    os.dup2(said, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    lock = os.open(LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until the step of a run that was killed just now has ended
    code, text = _run(told["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(error, text.encode("utf-8", "replace"))
    return code


def _run(words: list[str]) -> tuple[int, str]:
    from rlaif.cli import app
    from rlaif.records import RlaifError

    sys.argv = ["rlaif", *words]
    try:
        app(words, standalone_mode=False)
    except RlaifError as error:
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except SystemExit as error:
        return (error.code, "") if isinstance(error.code, int) else (1, str(error.code or ""))
    except BaseException as error:
        if hasattr(error, "format_message"):
            return 2, str(error.format_message())
        sys.excepthook(type(error), error, error.__traceback__)
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def die_with_parent() -> None:
    """Let this process be killed when the one that forked it dies. Where that cannot be asked for, the lock stays held."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing but answers goes there
    for name in HEAVY if "heavy" in sys.argv[1:] else ("rlaif.cli",):
        try:
            import_module(name)
        except ImportError:
            continue  # an extra that is not installed: the step that needs it says so

    def answer(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
