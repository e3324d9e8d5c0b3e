"""What a step is made of: its samples, the processes that share it, and what its time was spent on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlaif.records import Row
from rlaif.rl import watch
from rlaif.rl.rewards import Scored

FACTS = "facts.json"
"""In the folder of a run's part: how responses were judged, and why it ended."""

Sums = dict[str, float]
"""Figures of a minibatch's pieces, added up."""


@dataclass
class Sample:
    """A response of a step: `number` counts the step's responses over all processes.

    `logprobs` of the policy that drew it, `reference` and `values`, one for each of its tokens, float32.
    """

    number: int
    row: Row
    prompt: list[int]
    response: list[int]
    text: str
    ended: bool
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    scored: Scored | None = None

    @property
    def score(self) -> float:
        assert self.scored
        assert self.scored.value is not None
        return self.scored.value

    @property
    def kl(self) -> float:
        """log π/π_ref of the whole response, nats: an estimate of the KL."""
        return float((self.logprobs - self.reference).sum())

    def line(self) -> dict[str, Any]:
        """As it is told in samples.jsonl."""
        return watch.sample(self.row["prompt"], self.text, self.scored, self.kl, len(self.response), self.ended)


@dataclass
class Rolled:
    """This process's responses of a step, and the judgement of each that is on its way."""

    step: int
    samples: list[Sample]
    judged: list[Future[list[Any]]]


class World:
    """The processes of a run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process

    def all(self, values: Sequence[Any]) -> list[Any]:
        """The values of all processes, those of the first one first."""
        return list(gather_object(list(values))) if self.size > 1 else list(values)

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size == 1:
            return values
        found: Tensor = self._accelerator.reduce(values.to(self._accelerator.device), "sum")
        return found.to(values.device)  # NCCL adds up what is on GPUs alone

    def same(self, value: Any) -> Any:
        """What the main process has."""
        return self.all([value])[0]


class Clock:
    """Seconds of a step by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.begun = time.monotonic()

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - begun

    def figures(self, judging: float) -> dict[str, float]:
        """The step's seconds, and the share of each part of it."""
        whole = time.monotonic() - self.begun
        shares = {f"time/{what}": self.seconds[what] / whole for what in ("generation", "scoring", "training", "waiting")}
        return {"time/step": whole, **shares, "time/judging": min(judging / whole, 1.0)}
