"""Ratings as in direct RLAIF (arXiv 2309.00267, §2.2.2): the expectation over the marks of a scale, scaled to [−1, 1]."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rlaif.constitution import Bench, Principle
from rlaif.data import Item
from rlaif.label.judge import Ask, Asking, Judge, Vote, dispersion, worst
from rlaif.label.pairwise import check_bench
from rlaif.prompts import Template
from rlaif.records import LABELLED, Completion, Row, digest

UNSURE = 0.02
"""The most probability that may be left open: of marks that a server did not report, or of `1` that may go on to `10`."""


@dataclass(frozen=True)
class Rater:
    """Rates a response by one attribute or several.

    `attributes` are (name, rating template, weight); the score is their weighted mean. `bench` are principles, for templates
    that ask by one; each attribute's score is then their weighted mean.
    """

    attributes: tuple[tuple[str, Template, float], ...]
    asking: Asking = field(default_factory=Asking)
    bench: Bench | None = None

    def __post_init__(self) -> None:
        for _, template, _ in self.attributes:
            check_bench(template, self.bench)

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a score."""
        return {
            "method": "rating",
            "attributes": {name: weight for name, _, weight in self.attributes},
            "template_hashes": {name: template.hash for name, template, _ in self.attributes},
            **self.asking.settings(),
            "constitution": self.bench.settings() if self.bench else None,
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _failed([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`score`, `scores` (by attribute), both in [−1, 1], `status`, `dispersion`, `votes`, `error`."""
        bench = self.bench.sit(digest([item.row["prompt"], item.row["response"]])) if self.bench else [(None, 1.0)]
        asked = [(name, template, principle) for name, template, _ in self.attributes for principle, _ in bench]
        found = await asyncio.gather(*(self._votes(item, *one, ask) for one in asked))
        votes = [vote for some in found for vote in some]
        weights = {principle.name if principle else None: weight for principle, weight in bench}
        scores = {name: _score(votes, name, weights) for name, _, _ in self.attributes}
        known = {name: score for name, score in scores.items() if score is not None}
        if len(known) < len(scores):  # a mean over fewer attributes would be another measure
            return _failed(votes, *worst(votes))
        whole = sum(weight for *_, weight in self.attributes)
        return {
            "status": "ok",
            "score": sum(weight * known[name] for name, _, weight in self.attributes) / whole,
            "scores": scores,
            "dispersion": dispersion([[v["score"] for v in some if v["status"] in LABELLED] for some in found]),
            "votes": votes,
            "error": None,
        }

    async def _votes(self, item: Item, attribute: str, template: Template, principle: Principle | None, ask: Ask) -> list[Vote]:
        values = {
            "prompt": item.prompt,
            "response": item.row["response"],
            "row": item.row,
            "principle": principle.preference if principle else None,
        }
        hint = {
            "texts": (item.row["response"],),
            "qualities": (item.row.get("quality"),),
            "aspect": principle.name if principle else attribute,
        }
        marks = template.choices
        judge = Judge(
            template,
            self.asking,
            lambda completion: expectation(completion, marks),
            lambda text: parse_rating(text, marks),
        )
        turned = -1.0 if template.asks_for == "worse" else 1.0
        answers = await judge.answers(values, hint, ask)
        name = principle.name if principle else None
        return [
            answer.vote(attribute=attribute, principle=name, score=None if answer.value is None else turned * answer.value)
            for answer in answers
        ]


def _score(votes: list[Vote], attribute: str, weights: Mapping[str | None, float]) -> float | None:
    """One attribute's score: the weighted mean over principles of the mean over samples.

    None where principles with at least half of the weight have none.
    """
    means: dict[str | None, float] = {}
    for principle in weights:
        own = [vote for vote in votes if (vote["attribute"], vote["principle"]) == (attribute, principle)]
        scores = [vote["score"] for vote in own if vote["status"] in LABELLED]
        if scores:
            means[principle] = fmean(scores)
    known = sum(weights[principle] for principle in means)
    if known <= sum(weights.values()) / 2:
        return None
    return sum(weights[principle] * mean for principle, mean in means.items()) / known


def _failed(votes: list[Vote], status: str, error: str | None) -> Row:
    return {"status": status, "score": None, "scores": None, "dispersion": None, "votes": votes, "error": error}


def scaled(mark: float, count: int) -> float:
    """The place of a mark, counted from 0, on a scale of so many: −1 the least, 1 the most.

    >>> scaled(0, 10), scaled(9, 10), scaled(4.5, 10)
    (-1.0, 1.0, 0.0)
    """
    return 2 * mark / (count - 1) - 1


def expectation(completion: Completion, marks: tuple[str, ...]) -> float | None:
    """Σ i·P(i) over the marks, renormalised over them and scaled to [−1, 1]; None where too much is unknown.

    In many vocabularies `10` is two tokens, so the probability of the token `1` is that of `1` and of `10`. Engines therefore
    ask again, with `1` as the answer's beginning, where they can (`rlaif.engines.whole_choices`). A server that cannot do that
    leaves `10` out: then `1` must be improbable for the score to count. The same holds for all marks that a server did
    not report: together they must be improbable, given the least probability that it did report.
    """
    assert completion.logprobs is not None
    found = {mark: completion.logprobs[mark] for mark in marks if mark in completion.logprobs}
    if not found:
        return None
    top = max(found.values())
    masses = {mark: math.exp(value - top) for mark, value in found.items()}
    total = sum(masses.values())
    missing = [mark for mark in marks if mark not in found]
    open_ended = {mark for mark in found if any(other.startswith(mark) for other in missing)}
    unknown = sum(masses[mark] for mark in open_ended)
    if missing:
        if completion.floor is None:
            return None
        unknown += len(missing) * math.exp(min(completion.floor - top, 0.0))
    if unknown > UNSURE * total:
        return None
    mean = scaled(sum(marks.index(mark) * mass for mark, mass in masses.items()) / total, len(marks))
    return None if math.isnan(mean) else mean  # numbers that overflowed, or are none, are no rating


DRESS = " \t*_`'\"()[]<>:!"
LEAD = r"(?:(?:my |the |overall )*(?:rating|score)\W{0,3}(?:is\b)?\W{0,3})?"


def parse_rating(text: str, marks: tuple[str, ...]) -> float | None:
    """A rating that was spoken, scaled to [−1, 1]; None for anything else.

    The text, or else its first or its last line, must be a mark and nothing more.

    >>> marks = tuple(str(n) for n in range(1, 11))
    >>> parse_rating("10", marks), parse_rating("Rating: 1/10", marks), parse_rating("I give it an 8 or a 9", marks)
    (1.0, -1.0, None)
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    found = {v for line in (lines[:1] + lines[-1:]) if (v := _mark(line, marks)) is not None}
    return found.pop() if len(found) == 1 else None


def _mark(line: str, marks: tuple[str, ...]) -> float | None:
    bare = re.sub(r"^\W*<rating>|</?rating>\W*$", "", line.strip(), flags=re.IGNORECASE)
    bare = bare.lstrip(DRESS).rstrip(DRESS + ".")
    limit = rf"(?: ?/ ?{re.escape(marks[-1])}| out of {re.escape(marks[-1])})?"
    for place, mark in enumerate(marks):
        if re.fullmatch(LEAD + r"(?<![-−.])" + re.escape(mark) + limit, bare, re.IGNORECASE):  # −1 and .5 are no marks
            return scaled(place, len(marks))
    return None
