"""Constitutions: principles in YAML, each with a critique request, a revision request and a preference question."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rlaif.records import UsageError, digest
from rlaif.yamlfile import YamlFile, load, named

Choice = Literal["one", "all"] | int
"""Which principles judge a row: one drawn, all of them, or so many drawn."""


class Principle(BaseModel):
    """One principle; `weight` is its share in a draw, and in a mean over all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    critique: str = Field(min_length=1)
    revision: str = Field(min_length=1)
    preference: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1e9, allow_inf_nan=False)

    @field_validator("preference")
    @classmethod
    def _asks(cls, text: str) -> str:
        if not text.endswith("?"):
            raise ValueError("a preference question ends with '?'")
        return text


class Constitution(YamlFile):
    """Principles to judge and to revise by (Bai et al., arXiv 2212.08073, §3 and §4)."""

    principles: tuple[Principle, ...] = Field(min_length=1)

    @field_validator("principles")
    @classmethod
    def _distinct(cls, principles: tuple[Principle, ...]) -> tuple[Principle, ...]:
        for name, texts in (
            ("name", [p.name for p in principles]),
            ("preference question", [p.preference for p in principles]),
        ):
            twice = [text for text, count in Counter(texts).items() if count > 1]
            if twice:
                raise ValueError(f"the {name} '{twice[0]}' is there twice")
        return principles

    def drawn(self, seed: list[Any], row: str, count: int) -> list[Principle]:
        """So many principles, by seed and row, without replacement and by their weights (Efraimidis and Spirakis, 2006)."""
        draw = random.Random(digest([*seed, row]))
        # Their u^(1/w) by its logarithm, for small weights would make it 0.
        return sorted(self.principles, key=lambda p: math.log(draw.random() or math.ulp(0.0)) / p.weight, reverse=True)[:count]


@dataclass(frozen=True)
class Bench:
    """The principles that judge: `choice` of a constitution's, drawn by `seed` and the row.

    Raises: UsageError for more principles than there are.
    """

    constitution: Constitution
    choice: Choice = "one"
    seed: int = 0

    def __post_init__(self) -> None:
        count = len(self.constitution.principles)
        if isinstance(self.choice, int) and not 1 <= self.choice <= count:
            raise UsageError(f"--principles {self.choice}: the constitution {self.constitution.name} has {count}")

    def sit(self, row: str) -> list[tuple[Principle, float]]:
        """The principles for the row of this digest, with their weights in the mean.

        Drawn ones were drawn by their weights already: each counts once.
        """
        if self.choice == "all":
            return [(p, p.weight) for p in self.constitution.principles]
        count = 1 if self.choice == "one" else self.choice
        return [(p, 1.0) for p in self.constitution.drawn([self.seed, "principles"], row, count)]

    def settings(self) -> dict[str, object]:
        return {"constitution": self.constitution.name, "hash": self.constitution.hash, "principles": self.choice}


def load_constitution(name: str) -> Constitution:
    """A shipped constitution by its name, or a user's by its path.

    Raises: UsageError for an unknown name, or naming the file, principle and field that is wrong.
    """
    return load(Constitution, named("constitutions", name))


def write_example(path: Path) -> None:
    """Copy the short example constitution to `path`, to begin one's own with."""
    if path.exists():
        raise UsageError(f"{path} is there already")
    try:
        path.write_text(named("constitutions", "example").read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error
