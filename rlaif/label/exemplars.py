"""Few-shot exemplars: chosen for a row, with their sides balanced."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from rlaif.prompts import Template
from rlaif.records import UsageError, digest
from rlaif.yamlfile import YamlFile, load, named

Choose = Literal["fixed", "random", "nearest"]


class Exemplar(BaseModel):
    """A comparison with its verdict; in the rationale, {better} and {worse} stand for the names the responses are shown by."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    prompt: str = Field(min_length=1)
    better: str = Field(min_length=1)
    worse: str = Field(min_length=1)
    rationale: str = Field(min_length=1)

    @field_validator("rationale")
    @classmethod
    def _names_both(cls, text: str) -> str:
        if "{better}" not in text or "{worse}" not in text:
            raise ValueError("must name both {better} and {worse}, for their sides change")
        return text


class Exemplars(YamlFile):
    """A file of exemplars."""

    exemplars: tuple[Exemplar, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Shots:
    """`count` exemplars a prompt.

    how: `fixed`, the file's first ones, the same for all rows (which engines compute once); `random`, drawn by `seed` and
    the row; `nearest`, those whose prompts are most like the row's by TF-IDF cosine, the nearest last. The better
    response stands first in half of the exemplars shown (of an odd number, in one more or less). Choice and sides are the
    same for both orders of a row. An exemplar with the row's own prompt is passed over.

    Raises: UsageError for more exemplars than there are.
    """

    file: Exemplars
    count: int
    how: Choose = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.count <= len(self.file.exemplars):
            raise UsageError(f"--shots {self.count}: there are {len(self.file.exemplars)} exemplars in {self.file.name}")

    def settings(self) -> dict[str, Any]:
        return {"exemplars": self.file.name, "hash": self.file.hash, "count": self.count, "how": self.how}

    def choose(self, prompt: str, row: str, template: Template, cot: str) -> list[dict[str, str]]:
        """The exemplars for a row of this prompt and digest: prompt, response_1, response_2, choice, rationale."""
        others = [e for e in self.file.exemplars if e.prompt != prompt.strip()]
        draw = random.Random(digest([self.seed, "shots", None if self.how == "fixed" else row]))
        if self.how == "nearest":
            alike = self._likeness(prompt)
            others.sort(key=lambda e: alike[e.prompt], reverse=True)
            chosen = others[: self.count][::-1]
        else:
            chosen = draw.sample(others, min(self.count, len(others))) if self.how == "random" else others[: self.count]
        sides = [n % 2 == 0 for n in range(len(chosen))]
        if len(chosen) % 2 and draw.random() < 0.5:
            sides = [not side for side in sides]
        draw.shuffle(sides)
        return [shown(e, first, template, cot) for e, first in zip(chosen, sides, strict=True)]

    def _likeness(self, prompt: str) -> dict[str, float]:
        vectorizer, matrix = self._index
        found = np.asarray((matrix @ vectorizer.transform([prompt]).T).todense()).ravel()
        return {e.prompt: float(x) for e, x in zip(self.file.exemplars, found, strict=True)}

    @cached_property
    def _index(self) -> tuple[Any, Any]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(sublinear_tf=True, analyzer=_words)
        return vectorizer, vectorizer.fit_transform([e.prompt for e in self.file.exemplars])


def _words(text: str) -> list[str]:
    """What likeness is counted by: words of two characters or more; the characters of a prompt that has none."""
    return re.findall(r"\w\w+", text.lower()) or re.findall(r"\S", text)


def shown(exemplar: Exemplar, better_first: bool, template: Template, cot: str) -> dict[str, str]:
    """An exemplar as a template shows it; its rationale only where the row gets one too."""
    first, second = (exemplar.better, exemplar.worse) if better_first else (exemplar.worse, exemplar.better)
    better, worse = ("Response 1", "Response 2") if better_first else ("Response 2", "Response 1")
    rationale = exemplar.rationale.replace("{better}", better).replace("{worse}", worse)
    return {
        "prompt": exemplar.prompt,
        "response_1": first,
        "response_2": second,
        "choice": template.choices[0 if better_first == (template.asks_for == "better") else 1],
        "rationale": rationale if cot != "off" else "",
    }


def load_exemplars(name: str) -> Exemplars:
    """A shipped exemplar file by its name, or a user's by its path.

    Raises: UsageError for an unknown name, or naming the file, exemplar and field that is wrong.
    """
    return load(Exemplars, named("prompts/exemplars", name))
