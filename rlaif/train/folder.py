"""A run's folder: what it was begun with, whether it may go on, and the one process that writes to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlaif.data import atomic, held
from rlaif.records import UsageError, digest
from rlaif.train.data import Rows
from rlaif.yamlfile import read_yaml

CONFIG, DATA = "config.yaml", "data.json"
LOCK = ".rlaif.lock"
"""Made before anything else: a folder that has it is ours."""
FREE = ("name", "description", "out")
"""Settings that may differ where a run goes on: they change no number, and the folder may have moved."""


@dataclass(frozen=True)
class Folder:
    """The folder of a run with these settings on rows with these hashes."""

    path: Path
    settings: Mapping[str, Any]
    hashes: Mapping[str, str | None]
    resume: bool

    def report(self) -> dict[str, Any] | None:
        """What a finished run left; None for one that is still to be trained.

        Raises: UsageError where the folder is of something else, or of a run that this one cannot go on with.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file; out is a folder")
        if not self._trained:
            ours = (self.path / LOCK).exists()
            if self.resume and not ours:
                raise UsageError(f"{self.path}: there is no run to resume")
            if not ours and self.path.is_dir() and any(self.path.iterdir()):
                raise UsageError(f"{self.path}: the folder is not empty, and holds no run")
            return None
        if not self.resume:
            raise UsageError(f"{self.path} holds a run already: --resume goes on with it, or choose another out")
        before = read_yaml(self.path / CONFIG)
        changed = [name for name in self.settings if self.settings[name] != before.get(name) and name not in FREE]
        if changed:
            raise UsageError(f"{self.path} was begun with other settings ({', '.join(changed)}): choose another out")
        if _read(self.path / DATA) != self.hashes:
            raise UsageError(f"{self.path}: the data has changed since the run began: choose another out")
        finished = self.path / "run.json"
        return _read(finished) if finished.exists() and (self.path / "model").is_dir() else None

    @property
    def _trained(self) -> bool:
        """Whether there is anything that could be lost: a run that failed before its first step may begin otherwise."""
        return any((self.path / name).exists() for name in ("parts", "run.json"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the folder. Raises: UsageError where another one has it, or it cannot be written to."""
        with held(self.path, LOCK, "another process trains here; wait for it, or choose another out"):
            self.report()  # again: another process may have been here in between
            if not self._trained:
                self._begin()
            yield

    def _begin(self) -> None:
        with atomic(self.path / CONFIG) as temporary:
            temporary.write_text(as_yaml(self.settings), encoding="utf-8")
        with atomic(self.path / DATA) as temporary:
            temporary.write_text(json.dumps(self.hashes, indent=2) + "\n", encoding="utf-8")


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, all but ASCII escaped: some control characters (U+0085) would be read back as others."""
    return yaml.safe_dump(dict(settings), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return found


def hashes(rows: Mapping[str, tuple[Rows, Rows | None]]) -> dict[str, str | None]:
    """SHA-256 of all rows, as they were read, of each part: those that are trained on, and those held out."""
    return {
        f"{name}/{side}": _hash(found) if found else None
        for name, both in rows.items()
        for side, found in zip(("train", "held_out"), both, strict=True)
    }


def _hash(rows: Rows) -> str:
    found = hashlib.sha256()
    for row in rows.rows:
        found.update(digest(row).encode())
    return found.hexdigest()
