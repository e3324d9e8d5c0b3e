"""A pipeline's file: settings, sizes, and steps that are command lines of `rlaif`; read, filled in and checked before any runs.

settings: {judge: embedded, count: 8}
sizes:
  smoke: {count: 2}
steps:
  sample: sample ${samples}/comparisons.jsonl -o sampled.jsonl --n ${count}
  rank: rank sampled.jsonl -o ranked.jsonl --labeler ${judge}
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rlaif.records import UsageError
from rlaif.yamlfile import PACKAGE, YamlFile, load, named, parse_yaml

Value = str | int | float | bool | None | list[str | int | float | bool]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
REFERENCE = re.compile(r"\$\{(\w*)\}")
PART = re.compile(r"[^\s=,:\[\]{}'\"]+")
"""What could be a file's name inside a word, as in `--set reward=[{kind: model, model: reward/model}]`."""

FILES = (".jsonl", ".jsonl.gz", ".parquet", ".yaml", ".yml", ".jinja", ".py")
"""Endings of words that must be files: of the run, or of the user."""

BUILT_IN = {"samples": str(PACKAGE / "samples")}
"""References that every pipeline has: the rows that came with the package."""


class Written(BaseModel):
    """A step that says more than its command line: `for`, values that it is repeated with, listed or as the name of a setting
    that is a list; `makes`, files other than -o.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    each: dict[str, list[str | int | float] | str] = Field(default_factory=dict, alias="for")
    makes: tuple[str, ...] = ()


class Recipe(YamlFile):
    """The file. A setting that is null has to be given: by a size, or by `--set`."""

    settings: dict[str, Value] = Field(default_factory=dict)
    sizes: dict[str, dict[str, Value]] = Field(default_factory=dict)
    steps: dict[str, str | Written] = Field(min_length=1)

    @field_validator("steps")
    @classmethod
    def _named(cls, steps: dict[str, Any]) -> dict[str, Any]:
        for name in steps:
            if not NAME.fullmatch(name):
                raise ValueError(f"'{name}': a step's name is letters, digits, dots and dashes")
        return steps

    @field_validator("sizes")
    @classmethod
    def _known(cls, sizes: dict[str, Any], info: Any) -> dict[str, Any]:
        for size, changes in sizes.items():
            for name in changes:
                if name not in info.data.get("settings", {}):
                    raise ValueError(f"{size}: there is no setting '{name}'")
        return sizes


@dataclass(frozen=True)
class Step:
    """One command. `words`: its line; `makes`: its outputs, names in the run's folder; `uses`: the files that its words name,
    as they are named there, to the step that makes them, or None for a file from outside.

    `asks`: whether it asks a model, and keeps the answers in a store; `trains`: whether it has checkpoints to go on from.
    """

    name: str
    command: str
    words: tuple[str, ...]
    makes: tuple[str, ...]
    uses: Mapping[str, str | None]
    asks: bool
    trains: bool

    @property
    def line(self) -> str:
        return shlex.join(self.words)

    def told(self, name: Callable[[str], str]) -> list[str]:
        """The words, files from outside by the names that `name` gives them."""
        words = list(self.words)
        for own, maker in self.uses.items():
            if maker is None:
                words = [word.replace(own, name(own)) for word in words]
        return words


@dataclass(frozen=True)
class Pipeline:
    """A recipe, filled in for a folder: its steps in their order."""

    name: str
    description: str
    file: Path
    size: str | None
    settings: Mapping[str, Value]
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """Raises: UsageError for a name that no step has."""
        for step in self.steps:
            if step.name == name:
                return step
        raise UsageError(f"{self.file}: no step '{name}': choose one of {', '.join(step.name for step in self.steps)}")

    def after(self, name: str) -> set[str]:
        """The steps that use what this one makes, and those that use theirs; with the step itself."""
        found = {self.step(name).name}
        for step in self.steps:
            if found & set(step.uses.values()):
                found.add(step.name)
        return found


def find(name: str) -> Path:
    """A user's pipeline file, or the shipped one of this name. Raises: UsageError naming those that there are."""
    return named("pipelines", name)


def default_folder(path: Path, size: str | None) -> Path:
    """Where a run goes that is not told: runs/NAME, with the size where the file has sizes."""
    recipe = load(Recipe, path)
    return Path("runs") / "-".join(part for part in (recipe.name, _size(path, recipe, size)) if part)


def read(path: Path, folder: Path, size: str | None = None, changes: Sequence[str] = ()) -> Pipeline:
    """A pipeline's steps, as they are to run in `folder`, with `name=value` changes to its settings.

    `size`: one of the file's `sizes`; the first one unless given.

    Raises: UsageError naming the file, and the setting or the step, of what is wrong: a setting that is not known or not given,
    a command or option that there is not, a file that is not there and that no step before makes.
    """
    recipe = load(Recipe, path)
    size = _size(path, recipe, size)
    settings = _settings(path, recipe, size, changes)
    steps: list[Step] = []
    for name, written, values in _each(recipe.steps, settings, path):
        steps.append(_Reader(path, folder, name, steps).read(written, {**BUILT_IN, **settings, **values}))
    return Pipeline(recipe.name, recipe.description, path, size, settings, tuple(steps))


def _size(path: Path, recipe: Recipe, size: str | None) -> str | None:
    if size is None:
        return next(iter(recipe.sizes), None)
    if size not in recipe.sizes:
        raise UsageError(f"{path}: no size '{size}': {', '.join(recipe.sizes) or 'it has none'}")
    return size


def _settings(path: Path, recipe: Recipe, size: str | None, changes: Sequence[str]) -> dict[str, Value]:
    """The settings' values, the names of files in them as absolute paths: those of the file stand beside it, those of
    `changes` where the user stands.
    """
    own = {**recipe.settings, **(recipe.sizes[size] if size else {})}
    found = {name: _placed(_filled(value, path, name), path.parent) for name, value in own.items()}
    for change in changes:
        name, mark, text = change.partition("=")
        if not (name and mark):
            raise UsageError(f"--set: expected NAME=VALUE, got '{change}'")
        if name not in found:
            raise UsageError(f"--set {name}: {path} has no such setting; it has {', '.join(found) or 'none'}")
        value = parse_yaml(f"value: {text}", f"--set {name}: its value")["value"]
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, list | dict) for one in value)):
            raise UsageError(f"--set {name}: expected a value, or a list of values")
        found[name] = _placed(value, Path.cwd())
    return found


def _filled(value: Value, path: Path, name: str) -> Value:
    return _fill(value, BUILT_IN, path, f"{path}: setting {name}") if isinstance(value, str) else value


def _fill(text: str, values: Mapping[str, Value], path: Path, what: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise UsageError(f"{what}: there is no setting '{name}'; there are {', '.join(values)}")
        found = values[name]
        if found is None:
            raise UsageError(f"{path}: the setting '{name}' has to be given: --set {name}=…")
        return ", ".join(map(_as_word, found)) if isinstance(found, list) else _as_word(found)

    return REFERENCE.sub(value, text)


def _placed(value: Value, base: Path) -> Value:
    if isinstance(value, list):
        return [one if not isinstance(one, str) else str(_placed(one, base)) for one in value]
    if isinstance(value, str) and _is_path(value) and (base / value).exists():
        return str((base / value).resolve())
    return value


def _is_path(text: str) -> bool:
    """A bare word, as `general` or `train`, is never taken for a file that happens to have that name."""
    return "/" in text.strip("/") or "." in text.strip("./")


def _each(
    steps: Mapping[str, str | Written], settings: Mapping[str, Value], path: Path
) -> Iterator[tuple[str, Written, dict[str, Value]]]:
    """The steps by their names, one for each combination of the values that a step is repeated with, and these."""
    for name, own in steps.items():
        written = own if isinstance(own, Written) else Written(run=own)
        lists = [_values(own, settings, f"{path}: step {name}: for {which}") for which, own in written.each.items()]
        for values in product(*lists):
            yield "-".join((name, *map(str, values))), written, dict(zip(written.each, values, strict=True))


def _values(own: list[str | int | float] | str, settings: Mapping[str, Value], what: str) -> list[str | int | float]:
    if isinstance(own, list):
        return own
    name = REFERENCE.fullmatch(own)
    found = settings.get(name[1]) if name else None
    if not isinstance(found, list):
        raise UsageError(f"{what}: expected a list, or the name of a setting that is one, as ${{name}}")
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads one step, after others."""

    path: Path
    folder: Path
    name: str
    before: Sequence[Step]

    def read(self, written: Written, values: Mapping[str, Value]) -> Step:
        words = list(self._words(written.run, values))
        parsed = parse(words, self._what)
        out, config = parsed.out, parsed.values.get("config")
        makes = tuple(self._text(one, values) for one in written.makes) or ((out,) if out else ())
        self._check_names(makes)
        uses: dict[str, str | None] = {}
        for place, word in enumerate(words):
            ours = word == out or (word == config and not _is_path(word))
            if place >= parsed.depth and not ours:
                words[place] = self._placed(word, uses)
        command = " ".join(words[: parsed.depth])
        return Step(
            self.name, command, tuple(words), makes, uses, asks="relabel" in parsed.options, trains="resume" in parsed.options
        )

    @property
    def _what(self) -> str:
        return f"{self.path}: step {self.name}"

    def _words(self, line: str, values: Mapping[str, Value]) -> Iterator[str]:
        """The words of a command line, each with its references filled in; a list of values becomes words of its own."""
        try:
            parts = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"{self._what}: {error}") from error
        for part in parts:
            alone = REFERENCE.fullmatch(part)
            value = values.get(alone[1]) if alone else None
            if isinstance(value, list):
                yield from map(_as_word, value)
            else:
                yield self._text(part, values)

    def _text(self, text: str, values: Mapping[str, Value]) -> str:
        return _fill(text, values, self.path, self._what)

    def _check_names(self, makes: Sequence[str]) -> None:
        made = {own: step.name for step in self.before for own in step.makes}
        for own in makes:
            parts = Path(own).parts
            if Path(own).is_absolute() or ".." in parts or own.startswith(".") or parts[0] in RESERVED:
                raise UsageError(f"{self._what}: -o {own}: a name in the run's folder, other than {', '.join(RESERVED)}")
            for other, step in made.items():
                if f"{own}/".startswith(f"{other}/") or f"{other}/".startswith(f"{own}/"):
                    raise UsageError(f"{self._what}: makes {own}, as step {step} makes {other}")

    def _placed(self, word: str, uses: dict[str, str | None]) -> str:
        """The word, names of files from outside in it being told from the run's folder; `uses` takes up all files.

        A file is named by the whole word, by what stands after its first =, or by a part of that.
        """
        head, mark, value = word.partition("=")
        for start, whole in (("", word), (head + mark, value)):
            if found := self._file(whole, uses, alone=not start):
                return start + found
        return PART.sub(lambda part: self._file(part[0], uses) or part[0], word)

    def _file(self, text: str, uses: dict[str, str | None], alone: bool = False) -> str | None:
        """The name by which the command is to know a file; None for what is none."""
        if not (alone or _is_path(text)) or text.startswith("-"):
            return None
        inside = text.removeprefix("./")
        for step in self.before:
            if any(f"{inside}/".startswith(f"{own}/") for own in step.makes):
                uses[inside] = step.name
                return inside
        outside = self.path.parent / text
        if _is_path(text) and outside.exists():
            near = os.path.relpath(outside.resolve(), self.folder.resolve())
            uses[near] = None
            return near
        if text.endswith(FILES) and PART.fullmatch(text):
            raise UsageError(f"{self._what}: no file {text}: none stands beside {self.path.name}, and no step before makes it")
        return None


def _as_word(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


RESERVED = ("lineage.json", "README.md", "cards", "logs", "replaced")
"""Names in a run's folder that are the pipeline's own."""


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Parsed:
    """A command line as the command line itself reads it: how many words name the command, its options, their values here.

    `out`: the value of -o.
    """

    depth: int
    options: frozenset[str]
    values: dict[str, Any]
    out: str | None


def parse(words: Sequence[str], what: str) -> Parsed:
    """Read a command line; nothing is run.

    Raises: UsageError beginning with `what`, for an unknown command or option, or a value that is wrong.
    """
    import typer

    from rlaif.cli import command_line

    command, depth = command_line(), 0
    while commands := getattr(command, "commands", None):
        name = words[depth] if depth < len(words) else ""
        if name not in commands:
            raise UsageError(f"{what}: '{name}' is no command: choose one of {', '.join(sorted(commands))}")
        command, depth = commands[name], depth + 1
    try:
        context = command.make_context(" ".join(words[:depth]), list(words[depth:]))
    except typer.Exit as error:
        raise UsageError(f"{what}: --help is no step") from error
    except Exception as error:
        if not hasattr(error, "format_message"):  # not of the command line's own kind
            raise
        raise UsageError(f"{what}: {error.format_message()}") from error
    out = next((context.params[own.name] for own in command.params if "-o" in own.opts), None)
    return Parsed(depth, frozenset(own.name for own in command.params), context.params, str(out) if out else None)
