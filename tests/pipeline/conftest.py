"""What tests of pipelines share: one process that steps are forked from, a tiny model, a labeler, and how to run a pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from rlaif.pipeline import recipe
from rlaif.pipeline.child import Steps
from rlaif.pipeline.lineage import Lineage
from rlaif.pipeline.work import Work
from tests.engines.tiny import save_tiny

Run = Callable[..., Lineage]


@pytest.fixture(scope="session")
def steps() -> Iterator[Steps]:
    """With the heavy packages loaded, one thread, no key and no hub."""
    with Steps() as running:
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}):
            running.begin(heavy=True)
        yield running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", context=4096)  # examples in context are 3,000 bytes


@pytest.fixture(scope="session")
def labeler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelers") / "mock.yaml"
    path.write_text("engine: mock\noptions: {k: 2}\n")
    return path


@pytest.fixture
def run(steps: Steps) -> Run:
    """Run a pipeline's file in a folder, with changes to its settings."""

    def run(
        file: Path, folder: Path, changes: Sequence[str] = (), anew: frozenset[str] = frozenset(), size: str | None = None
    ) -> Lineage:
        return Work(recipe.read(file, folder, size, changes), folder, anew).run(steps)

    return run
