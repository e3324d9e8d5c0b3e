"""Where the command `rlaif` begins: its help is printed as it was kept in a file, before anything heavy is imported."""

import os
import sys

WIDTH = 80
"""Columns of the kept help, which Typer makes no wider."""


def main() -> None:
    if sys.argv[1:] == ["--help"] and _columns() >= WIDTH:
        # pathlib would take longer to import than all else here.
        with open(os.path.join(os.path.dirname(__file__), "help.txt"), encoding="utf-8") as file:  # noqa: PTH118, PTH120, PTH123
            sys.stdout.write(file.read())
        return
    from rlaif.cli import main as commands

    commands()


def _columns() -> int:
    if (told := os.environ.get("COLUMNS", "")).isdecimal():
        return int(told)
    try:
        return os.get_terminal_size(1).columns
    except OSError:  # no terminal
        return WIDTH
