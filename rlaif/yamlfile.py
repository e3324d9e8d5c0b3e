"""Small YAML files that users write (constitutions, exemplars, labelers, grids): found by name or path, checked, hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rlaif.records import UsageError, digest

PACKAGE = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")


def shipped(kind: str) -> Path:
    """The folder of this kind (`prompts`) that came with the package: inside a wheel, or beside it in a checkout."""
    inside = PACKAGE / "_shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


DEEPEST = 50
"""Levels of lists and mappings within each other; our own files have six at most."""

STARTS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class YamlFile(BaseModel):
    """What such a file holds; fields that are not known are refused. `name` is the file's own, unless it says another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    description: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the content, but for name and description, which change nothing."""
        return digest(self.model_dump(mode="json", exclude={"name", "description"}))


File = TypeVar("File", bound=YamlFile)


def named(kind: str, name: str) -> Path:
    """The path of a user's file, or of the shipped one of this kind and name.

    Raises: UsageError naming those that there are.
    """
    path = Path(name)
    if path.suffix in SUFFIXES or path.is_file():
        if not path.is_file():
            raise UsageError(f"no such file: {name}")
        return path
    if name not in listed(kind):
        raise UsageError(f"no file '{name}', and none of that name among the shipped {kind}: {', '.join(listed(kind))}")
    return (shipped(kind) / f"{name}.yaml").resolve()


def beside(file: Path, name: str) -> str:
    """The path of what a file names, where it stands beside that file; else the name as it is."""
    return str(file.parent / name) if (file.parent / name).is_file() else name


def listed(kind: str) -> list[str]:
    """Names of the shipped files of this kind."""
    return sorted(path.stem for path in shipped(kind).glob("*.yaml"))


def load(form: type[File], path: Path) -> File:
    """Read and check a file.

    Raises: UsageError naming the file and the field, for what is not YAML, has an unknown field, lacks one or has a bad one.
    """
    content = {"name": path.stem, **read_yaml(path)}
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {in_words(error, content)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The `name: value` lines of a file.

    Raises: UsageError naming the file, where it cannot be read or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, f"{path}: its lines")


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice, of which PyYAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is there twice", node.start_mark)
        return found


def parse_yaml(text: str, what: str) -> dict[str, Any]:
    """The `name: value` lines of a text. Aliases are refused, as a few lines of them can stand for gigabytes.

    Raises: UsageError beginning with `what`, a plural.
    """
    try:
        aliases = _has_alias(text)
        content = {} if aliases else yaml.load(text, _Loader)  # a SafeLoader
    except Exception as error:  # beside YAMLError, whatever int() and their like raise in PyYAML
        raise UsageError(f"{what} are not YAML: {' '.join(str(error).split())}") from error
    if aliases:
        raise UsageError(f"{what} hold an alias (*name): write it out")
    if not isinstance(content, dict | None):
        raise UsageError(f"{what} must be 'name: value' lines")
    return content or {}


def _has_alias(text: str) -> bool:
    """Raises: YAMLError for what is nested deeper than DEEPEST, on which PyYAML would spend minutes."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, STARTS) - isinstance(token, ENDS)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        if isinstance(token, yaml.AliasToken):
            return True
    return False


def in_words(error: ValidationError, content: Any) -> str:
    """The first mistake: where it is, by the names of list items where they have one, and what it is."""
    first = error.errors()[0]
    place: list[str] = []
    for part in first["loc"]:
        index = isinstance(part, int) and isinstance(content, list)  # else a number that stands where a name should
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            content = None
        label = content.get("name") if index and isinstance(content, dict) else None
        number = str(int(part) + 1 if index else part)
        place.append(f"{number} ({label})" if label else number)
    more = len(error.errors()) - 1
    words = first["msg"].removeprefix("Value error, ")
    return f"{' '.join(place)}: {words}" + (f" (and {more} more)" if more else "")
