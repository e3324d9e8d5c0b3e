"""Processes that run the command line and begin at once: forked from one that has everything imported already."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.survival.warm"])


def run(said: Path, words: list[str], env: dict[str, str], setup: str) -> None:
    """The command line, in a process of its own; what it says goes to a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        os.environ.pop(name, None)
    os.environ |= env
    exec(setup, {})
    from rlaif.cli import command_line
    from rlaif.records import RlaifError

    try:
        command_line()(words)
    except RlaifError as error:  # as the command line's own `main`, which would make the tree of commands anew
        print(f"rlaif: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def start(said: Path, *words: str | Path, env: dict[str, str] | None = None, setup: str = "") -> ForkServerProcess:
    """Begin a command; `setup` is code that it runs first."""
    process = FORKS.Process(target=run, args=(said, [*map(str, words)], env or {}, setup))
    process.start()
    return process


def finished(said: Path, *words: str | Path, env: dict[str, str] | None = None, setup: str = "", timeout: float = 30) -> int:
    """Run a command to its end, and give its exit code; negative for a signal."""
    process = start(said, *words, env=env, setup=setup)
    process.join(timeout)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive, f"not finished within {timeout:g} s"
    assert process.exitcode is not None
    return process.exitcode
