"""The metrics of a run as pictures."""

from __future__ import annotations

from pathlib import Path


def write_curves(metrics: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
