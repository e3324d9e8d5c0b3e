"""What tests share: real data where it is there, files of rows, and the command line as a user runs it."""

from __future__ import annotations

import gc
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """What was imported until now is never garbage: to look through it costs half a second each time that a trainer does."""
    gc.freeze()


def shared_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the real data that stands beside a checkout; skips the test where it does not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, which is not beside this checkout")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def make_rows(count: int, prompts: int | None = None) -> list[dict[str, Any]]:
    """Comparisons whose responses carry their planted quality, for the mock engine and for the test server alike."""
    rows = []
    for n in range(count):
        a, b = ((n * 37) % 41 - 20) / 10, ((n * 53) % 43 - 21) / 10 + 0.05  # never equal
        rows.append(
            {
                "prompt": f"Question {n % (prompts or count)}?",
                "response_a": f"First answer {n} [q={a}]",
                "response_b": f"Second answer {n} [q={b}]",
                "quality_a": a,
                "quality_b": b,
            }
        )
    return rows


def cli(
    *args: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `rlaif` as a user does, in a process of its own, without any key of the environment's."""
    return subprocess.run(
        [sys.executable, "-m", "rlaif.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=clean_env(env),
        cwd=cwd,
        timeout=timeout,
    )


def in_process(*args: str | Path) -> str:
    """Run `rlaif` in this process, and return what it printed. Raises: what the command raises."""
    from typer.testing import CliRunner

    from rlaif.cli import app

    done = CliRunner().invoke(app, [*map(str, args)])
    if isinstance(done.exception, SystemExit):
        raise AssertionError(done.output)
    if done.exception:
        raise done.exception
    return done.stdout


def clean_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("OPENAI_API_KEY", "OPENAI_BASE_URL")}
    return {**env, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1", **(extra or {})}


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., Path]:
    def write(count: int = 20, **changes: Any) -> Path:
        return write_jsonl(tmp_path / "data.jsonl", [{**row, **changes} for row in make_rows(count)])

    return write


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
