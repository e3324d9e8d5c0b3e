"""A project of one's own to begin with: a pipeline, with all the files that it names."""

from __future__ import annotations

from pathlib import Path

from rlaif.records import UsageError
from rlaif.yamlfile import PACKAGE

FILES = PACKAGE / "project"
HIDDEN = {"gitignore": ".gitignore"}
"""Files that stand in the package under another name, for there they would have their effect."""


def create(folder: Path) -> list[Path]:
    """Copy the project into a folder that is not there yet, or empty; returns its files.

    Raises: UsageError for a folder that is not empty, or cannot be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder}: {'the folder is not empty' if folder.is_dir() else 'is a file'}: choose another name")
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(FILES.iterdir()):
            made.append(folder / HIDDEN.get(source.name, source.name))
            made[-1].write_bytes(source.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    return made
