"""What tests of training share: one thread, for a tiny model is faster so; no word of it to anybody; and few pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from rlaif.train import curves

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

WRITE_CURVES = curves.write_curves


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def no_pictures() -> Iterator[None]:
    """Runs draw nothing, for that takes several times as long as a tiny model's training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "write_curves", lambda metrics, folder: None)
        yield


@pytest.fixture
def pictures(no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of this test do; there is one for each kind of training."""
    monkeypatch.setattr(curves, "write_curves", WRITE_CURVES)
