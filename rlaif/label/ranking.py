"""Rankings of several responses to a prompt: by all pairs, by a single-elimination tournament, or by a listwise prompt."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from rlaif.constitution import Bench, Principle
from rlaif.data import Item
from rlaif.label.judge import Ask, Asking, Judge, Vote, worst
from rlaif.label.pairwise import PairwiseLabeler, check_bench
from rlaif.prompts import Template
from rlaif.records import LABELLED, Row, digest

Pair = tuple[int, int, float]
"""Two responses by their index, and P(the first one is better)."""

PRIOR = 1.0
"""Standard deviation of the normal prior on a Bradley–Terry score: it keeps the scores finite where one response wins all."""


@dataclass(frozen=True)
class Pairs:
    """Compares every two responses: n(n−1)/2 comparisons, each as the pairwise labeler makes them.

    The result's columns: `ranking`, indices from the best to the worst; `scores`, Bradley–Terry log-strengths by index;
    `pairs`, the K-choose-2 pairs of InstructGPT (arXiv 2203.02155, §3.5), each the indices of `chosen` and `rejected`
    with the `soft_label` P(chosen is better); `cycles`, circular triads (a beats b beats c beats a; Kendall and Babington
    Smith, 1940); `status`, `votes`, `error`. A pair that failed fails the row, and only such pairs are asked again.
    """

    labeler: PairwiseLabeler

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a ranking."""
        return {**self.labeler.settings(), "method": f"ranking by {type(self).__name__.lower()}"}

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _failed([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        count = len(item.row["responses"])
        found = await asyncio.gather(*(self._compare(item, i, j, ask) for i, j in combinations(range(count), 2)))
        votes = [vote for _, some in found for vote in some]
        pairs = [pair for pair, _ in found if pair]
        if len(pairs) < len(found):
            return _failed(votes, *worst([v for pair, some in found if not pair for v in some]))
        scores = bradley_terry(count, pairs)
        return _result(_by(scores), scores, pairs, cycles(count, pairs), votes)

    async def _compare(self, item: Item, i: int, j: int, ask: Ask) -> tuple[Pair | None, list[Vote]]:
        """One comparison, as a row of its own; its votes tell which responses they are about."""
        row, qualities = item.row, item.row.get("qualities")
        texts = {"prompt": row["prompt"], "response_a": row["responses"][i], "response_b": row["responses"][j]}
        planted = {"quality_a": qualities[i], "quality_b": qualities[j]} if qualities else {}
        result = await self.labeler(Item({**row, **texts, **planted}, item.prompt, item.where, None), ask)
        votes = [{"a": i, "b": j, **vote} for vote in result["votes"]]
        return (None if result["soft_label"] is None else (i, j, result["soft_label"])), votes


class Tournament(Pairs):
    """A single-elimination tournament as in SLiC-HF (arXiv 2305.10425): n−1 comparisons.

    The bracket is drawn by the labeler's seed and the row; where a round has an odd number, one goes on unopposed. A draw is
    decided by lot. The ranking is by the round that a response got to, then by its score; `pairs` are the n−1 that were
    compared, and there are no `cycles` to count (null).
    """

    async def __call__(self, item: Item, ask: Ask) -> Row:
        texts = item.row["responses"]
        draw = random.Random(digest([self.labeler.asking.seed, "bracket", item.row["prompt"], texts]))
        left = draw.sample(range(len(texts)), len(texts))
        votes: list[Vote] = []
        pairs: list[Pair] = []
        reached = dict.fromkeys(left, 0)
        while len(left) > 1:
            matches = list(zip(left[::2], left[1::2], strict=False))
            found = await asyncio.gather(*(self._compare(item, i, j, ask) for i, j in matches))
            votes += [vote for _, some in found for vote in some]
            if not all(pair for pair, _ in found):
                return _failed(votes, *worst([v for pair, some in found if not pair for v in some]))
            won = [self._winner(pair, draw) for pair, _ in found if pair]
            pairs += [pair for pair, _ in found if pair]
            left = won + (left[-1:] if len(left) % 2 else [])
            for index in left:
                reached[index] += 1
        scores = bradley_terry(len(texts), pairs)
        ranking = sorted(reached, key=lambda index: (-reached[index], -scores[index], index))
        return _result(ranking, scores, pairs, None, votes)

    def _winner(self, pair: Pair, draw: random.Random) -> int:
        i, j, p = pair
        return draw.choice((i, j)) if abs(p - 0.5) < 1e-9 else i if p > 0.5 else j


@dataclass(frozen=True)
class Listwise:
    """Shows all responses at once and asks for the whole order.

    `both_orders` asks again with the responses in reverse, so that a preference for a position decides no pair. A pair's soft
    label is then the share of the answers that place its first response before the other; samples and principles count
    likewise.
    """

    template: Template
    asking: Asking = field(default_factory=Asking)
    both_orders: bool = True
    bench: Bench | None = None

    def __post_init__(self) -> None:
        check_bench(self.template, self.bench)

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a ranking."""
        return {
            "method": "ranking by listwise",
            "template": self.template.name,
            "template_hash": self.template.hash,
            "both_orders": self.both_orders,
            **self.asking.settings(),
            "constitution": self.bench.settings() if self.bench else None,
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _failed([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        texts = item.row["responses"]
        bench = self.bench.sit(digest([item.row["prompt"], sorted(texts)])) if self.bench else [(None, 1.0)]
        # Which way round comes first depends on the responses, not on their places in the row.
        forward = sorted(range(len(texts)), key=lambda n: digest([self.asking.seed, texts[n]]))
        orders = [forward, forward[::-1]] if self.both_orders else [list(range(len(texts)))]
        asked = [(principle, weight, order) for principle, weight in bench for order in orders]
        found = await asyncio.gather(*(self._votes(item, principle, order, ask) for principle, _, order in asked))
        votes = [vote for some in found for vote in some]
        shares: list[tuple[float, list[list[int]]]] = []
        for (_, weight, _), some in zip(asked, found, strict=True):
            rankings = [vote["ranking"] for vote in some if vote["status"] in LABELLED]
            if not rankings:  # without this order, or this principle, the others would speak for it
                return _failed(votes, *worst(some))
            shares.append((weight, rankings))
        pairs = _shares(len(texts), shares)
        scores = bradley_terry(len(texts), pairs)
        return _result(_by(scores), scores, pairs, cycles(len(texts), pairs), votes)

    async def _votes(self, item: Item, principle: Principle | None, order: list[int], ask: Ask) -> list[Vote]:
        row, name = item.row, principle.name if principle else None
        texts, qualities = [row["responses"][n] for n in order], row.get("qualities")
        values: dict[str, Any] = {"prompt": item.prompt, "responses": texts, "row": row}
        values["principle"] = principle.preference if principle else None
        planted = [qualities[n] for n in order] if qualities else None
        hint = {"texts": texts, "qualities": planted, "aspect": name, "ranks": True}
        asking = replace(self.asking, answer_tokens=self.asking.answer_tokens + 8 * len(texts))
        judge = Judge(self.template, asking, lambda _: None, lambda text: parse_ranking(text, len(texts)))
        worse = self.template.asks_for == "worse"
        votes = []
        for answer in await judge.answers(values, hint, ask):
            ranking = None if answer.value is None else [order[n] for n in answer.value]
            votes.append(answer.vote(principle=name, order=order, ranking=ranking[::-1] if ranking and worse else ranking))
        return votes


def _shares(count: int, groups: Sequence[tuple[float, list[list[int]]]]) -> list[Pair]:
    """P(i before j) for every pair: the weighted mean over groups of the share of a group's rankings."""
    whole = sum(weight for weight, _ in groups)
    before = np.zeros((count, count))
    for weight, rankings in groups:
        for ranking in rankings:
            place = np.argsort(ranking)
            before += weight / len(rankings) * (place[:, None] < place[None, :])
    return [(i, j, float(before[i, j] / whole)) for i, j in combinations(range(count), 2)]


# ---------------------------------------------------------------- scores


def bradley_terry(count: int, pairs: Sequence[Pair]) -> list[float]:
    """Log-strengths s, of mean 0, such that P(i beats j) = σ(s_i − s_j) (Bradley and Terry, 1952).

    The maximum a posteriori of soft outcomes under a standard normal prior, found by logistic regression.
    """
    from sklearn.linear_model import LogisticRegression

    if not pairs or all(abs(p - 0.5) < 1e-9 for *_, p in pairs):
        return [0.0] * count
    design = np.zeros((len(pairs), count))
    for row, (i, j, _) in enumerate(pairs):
        design[row, i], design[row, j] = 1, -1
    wins = np.array([p for *_, p in pairs])
    fit = LogisticRegression(C=PRIOR**2, fit_intercept=False, max_iter=1000, tol=1e-8)
    fit.fit(np.vstack([design, design]), np.repeat([1, 0], len(pairs)), np.concatenate([wins, 1 - wins]))
    scores = fit.coef_[0] - fit.coef_[0].mean()
    return [float(score) for score in scores]


def cycles(count: int, pairs: Sequence[Pair]) -> int:
    """Circular triads among the hard preferences of all pairs; a triad with a tie is none.

    >>> cycles(3, [(0, 1, 0.9), (1, 2, 0.9), (0, 2, 0.1)])
    1
    """
    beats = np.zeros((count, count), dtype=np.int64)
    for i, j, p in pairs:
        if abs(p - 0.5) > 1e-9:
            beats[(i, j) if p > 0.5 else (j, i)] = 1
    return int(np.trace(beats @ beats @ beats)) // 3


def _by(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def _result(ranking: list[int], scores: list[float], pairs: Sequence[Pair], found: int | None, votes: list[Vote]) -> Row:
    """The row's result; `tie` where nothing is preferred to anything."""
    tie = all(abs(p - 0.5) < 1e-9 for *_, p in pairs)
    turned = [(i, j, p) if p >= 0.5 else (j, i, 1 - p) for i, j, p in pairs]
    return {
        "status": "tie" if tie else "ok",
        "ranking": ranking,
        "scores": scores,
        "pairs": [{"chosen": i, "rejected": j, "soft_label": p} for i, j, p in turned],
        "cycles": found,
        "votes": votes,
        "error": None,
    }


def _failed(votes: list[Vote], status: str, error: str | None) -> Row:
    nothing: Mapping[str, None] = dict.fromkeys(("ranking", "scores", "pairs", "cycles"))
    return {"status": status, **nothing, "votes": votes, "error": error}


def parse_ranking(text: str, count: int) -> list[int] | None:
    """An order that was spoken, best first, as indices from 0; None unless it names every response once.

    The text, or else its first or its last line, must be the order and nothing more.

    >>> parse_ranking("Ranking: 3 > 1 > 2", 3), parse_ranking("3 > 1", 3), parse_ranking("1 is best", 1)
    ([2, 0, 1], None, None)
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    found = [order for line in (lines[:1] + lines[-1:]) if (order := _order(line, count)) is not None]
    return found[0] if found and all(order == found[0] for order in found) else None


LEAD = re.compile(r"^(?:the |my )?(?:final )?(?:ranking|order)\W{0,3}(?:is\b)?\W{0,3}", re.IGNORECASE)

NAMED = re.compile(r"[^\w=<.−-]*(?:response[\W_]?)?#?(\d+)[^\w=<]*", re.IGNORECASE)
"""One response's number in whatever dress; `=`, `<` and a minus sign are none."""


def _order(line: str, count: int) -> list[int] | None:
    bare = LEAD.sub("", line.strip(" \t*_`'\"()."))
    parts = [NAMED.fullmatch(part) for part in re.split(r"[>,]|\bthen\b", bare)]
    numbers = [int(part[1]) - 1 for part in parts if part]
    return numbers if len(numbers) == len(parts) and sorted(numbers) == list(range(count)) else None


Ranker = Pairs | Listwise
"""What ranks; a tournament is a way of comparing pairs."""
