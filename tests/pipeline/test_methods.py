"""docs/methods.md: every recipe stands in its tables, and all that they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlaif.pipeline.recipe import find, parse
from rlaif.train.kinds import load_config
from rlaif.yamlfile import listed, named

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "methods.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
METHODS = [row for row in ROWS if row[0] != "method" and not set(row[0]) <= set("-")]
COMMANDS = sorted({command for row in METHODS for command in re.findall(r"`rlaif ([^`]*)`", " ".join(row))})
LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")


def test_every_recipe_stands_in_the_table_and_is_called_by_its_name() -> None:
    links = [link for row in METHODS if len(row) == 6 for link in LINK.findall(row[2])]
    assert {name for name, _ in links} == set(listed("pipelines"))
    for name, path in links:
        assert find(name).samefile(DOCS / path)


def test_every_row_names_its_code_and_its_recipe_has_its_commands() -> None:
    assert len(METHODS) > 50
    for row in METHODS:
        assert LINK.search(row[-1]), row[0]
        for command in re.findall(r"`rlaif ([^`]*)`", row[3]) if len(row) == 6 else ():
            words = shlex.split(command)
            steps = (DOCS / LINK.findall(row[2])[0][1]).read_text(encoding="utf-8")
            assert re.search(rf"\b{' '.join(words[: parse(words, command).depth])} ", steps), command


def test_every_file_that_is_named_is_there() -> None:
    for name, path in LINK.findall(TEXT):
        assert not path or path.startswith("#") or (DOCS / path.partition("#")[0]).exists(), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_with_such_options_and_settings(command: str) -> None:
    words = shlex.split(command)
    values = parse(words, command).values
    if words[0] == "train":
        load_config(words[1], named("pipelines/train", values["config"]), values["changes"])
