"""Model cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    path.write_text(f"# {report['kind']}\n", encoding="utf-8")
