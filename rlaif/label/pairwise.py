"""The pairwise labeler of the RLAIF paper (arXiv 2309.00267, §2.1): soft labels from the log-probabilities of two choices."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rlaif.constitution import Bench, Principle
from rlaif.data import Item
from rlaif.label.exemplars import Shots
from rlaif.label.judge import Answer, Ask, Asking, Judge, Vote, dispersion, worst
from rlaif.prompts import Template
from rlaif.records import LABELLED, Completion, Label, Row, UsageError, digest

Order = Literal["ab", "ba"]


class Calibration(BaseModel):
    """What `rlaif calibrate` fitted: P(first shown) becomes σ((logit P − position_bias) / temperature).

    After Guo et al. (arXiv 1706.04599, §4.2), with an offset for the preference that a labeler has for a position.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    position_bias: float = Field(default=0.0, allow_inf_nan=False)

    def __call__(self, first: float) -> float:
        return sigmoid((logit(first) - self.position_bias) / self.temperature)


@dataclass(frozen=True)
class PairwiseLabeler:
    """Labels comparisons with one template.

    `both_orders` asks with the responses in either order and averages, which cancels a labeler's preference for a position.
    `bench` are the principles to judge by, for a template that asks by a `principle`; their soft labels are averaged.
    `clamp` bounds each vote's soft label, as constitutional AI does with chain of thought (arXiv 2212.08073, §4).

    Raises: UsageError for settings that do not go together.
    """

    template: Template
    asking: Asking = field(default_factory=Asking)
    both_orders: bool = True
    shots: Shots | None = None
    bench: Bench | None = None
    clamp: tuple[float, float] | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_bench(self.template, self.bench)
        if self.clamp is None:
            return
        low, high = self.clamp
        if not 0 <= low < 0.5 or abs(low + high - 1) > 1e-9:
            raise UsageError(
                f"--cot-clamp {low:g},{high:g}: two bounds that add up to 1, the lower first, or swapped responses would not "
                "swap the label"
            )
        if self.asking.cot == "off":
            raise UsageError("--cot-clamp goes with --cot two-call or one-call")

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a label."""
        return {
            "method": "pairwise",
            "template": self.template.name,
            "template_hash": self.template.hash,
            "both_orders": self.both_orders,
            **self.asking.settings(),
            "shots": self.shots.settings() if self.shots else None,
            "constitution": self.bench.settings() if self.bench else None,
            "clamp": list(self.clamp) if self.clamp else None,
            "calibration": self.calibration.model_dump() if self.calibration else None,
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _failed([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """The preference for one comparison: the columns of `rlaif.data.RESERVED`; `soft_label` is P(A is better)."""
        row = item.row
        drawn = digest([row["prompt"], sorted([row["response_a"], row["response_b"]])])  # the same for swapped responses
        bench = self.bench.sit(drawn) if self.bench else [(None, 1.0)]
        orders: tuple[Order, ...] = ("ab", "ba") if self.both_orders else ("ab",)
        votes = await asyncio.gather(
            *(self._votes(item, drawn, principle, order, ask) for principle, _ in bench for order in orders)
        )
        weights = {principle.name if principle else None: weight for principle, weight in bench}
        return combine([vote for found in votes for vote in found], weights, self.calibration)

    async def _votes(self, item: Item, drawn: str, principle: Principle | None, order: Order, ask: Ask) -> list[Vote]:
        row, name = item.row, principle.name if principle else None
        first, second = ("response_a", "response_b") if order == "ab" else ("response_b", "response_a")
        values = {
            "prompt": item.prompt,
            "response_1": row[first],
            "response_2": row[second],
            "row": row,
            "principle": principle.preference if principle else None,
            "exemplars": self.shots.choose(item.prompt, drawn, self.template, self.asking.cot) if self.shots else [],
        }
        hint = {
            "texts": (row[first], row[second]),
            "qualities": (row.get(first.replace("response", "quality")), row.get(second.replace("response", "quality"))),
            "aspect": name,
        }
        answers = await self._judge.answers(values, hint, ask)
        return [answer.vote(principle=name, order=order, soft_label=self._soft(answer, order)) for answer in answers]

    @property
    def _judge(self) -> Judge:
        choices = (self.template.choices[0], self.template.choices[1])
        return Judge(
            self.template,
            self.asking,
            lambda completion: choice_probability(completion, choices),
            lambda text: parse_verdict(text, choices),
        )

    def _soft(self, answer: Answer, order: Order) -> float | None:
        """P(A is better), in the row's own order whatever the order shown and the template's polarity."""
        if answer.value is None:
            return None
        p = float(answer.value)
        if (self.template.asks_for == "worse") != (order == "ba"):
            p = 1 - p
        return min(max(p, self.clamp[0]), self.clamp[1]) if self.clamp else p


def check_bench(template: Template, bench: Bench | None) -> None:
    """Raises: UsageError where a template asks by a principle and there is none, or the other way round."""
    if bench and "principle" not in template.variables:
        raise UsageError(
            f"template {template.name} has no {{{{ principle }}}} to ask by: with a constitution, use one that has"
        )
    if bench is None and "principle" in template.variables:
        raise UsageError(f"template {template.name} asks by a principle: give a --constitution")


def choice_probability(completion: Completion, choices: tuple[str, str]) -> float | None:
    """Softmax over the log-probabilities of the two choices: P(first choice).

    Servers report only the most probable tokens. A choice that is missing there has at most the probability of the least
    one reported (`floor`); with that bound the result lies nearer to .5 than the truth. It is taken only where the other
    choice is at least ten times as probable as the bound, so that the truth is within 1/11; otherwise None.
    """
    assert completion.logprobs is not None
    first, second = (completion.logprobs.get(choice) for choice in choices)
    if first is None or second is None:
        known = first if second is None else second
        if known is None or completion.floor is None or known - completion.floor < math.log(10):
            return None
        first = completion.floor if first is None else first
        second = completion.floor if second is None else second
    p = sigmoid(first - second)
    return None if math.isnan(p) else p  # numbers that overflowed, or are none, are no verdict


def sigmoid(x: float) -> float:
    """σ(x), such that σ(−x) is 1 − σ(x) to the last bit that matters and nothing overflows."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def logit(p: float) -> float:
    """The inverse of `sigmoid`, for p no nearer to 0 or 1 than a millionth."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p) - math.log1p(-p)


TIE = re.compile(
    r"(?:it'?s |it is )?(?:a )?tie|(?:they|both)(?: responses)? are equal(?:ly good)?|neither|equal", re.IGNORECASE
)


def parse_verdict(text: str, choices: tuple[str, str]) -> float | None:
    """A verdict that was spoken: 1 for the first choice, 0 for the second, .5 for a tie, None for anything else.

    The text, or else its first or its last line, must be a verdict and nothing more; a text that merely mentions a
    choice, or names both, is none.

    >>> parse_verdict("1", ("1", "2")), parse_verdict("**Response 2**.", ("1", "2")), parse_verdict("Tie", ("1", "2"))
    (1.0, 0.0, 0.5)
    >>> parse_verdict("2>\\n\\nIt is more precise.", ("1", "2"))
    0.0
    >>> parse_verdict("Response 1 is better than response 2", ("1", "2")) is None
    True
    >>> parse_verdict("12", ("1", "2")) is None
    True
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    verdicts = {v for line in (lines[0], lines[-1]) if (v := _verdict(line, choices)) is not None}
    return verdicts.pop() if len(verdicts) == 1 else None


ADJECTIVE = r"(?:preferred|better|best|more helpful|less harmful)"
NOUN = r"(?:response|answer|summary|choice|option|number|verdict)"


def _verdict(line: str, choices: tuple[str, str]) -> float | None:
    bare = line.strip(" \t*_`'\"()[]<>.:!")
    lead = rf"(?:the )?(?:{ADJECTIVE} )?{NOUN}\W{{0,3}}(?:is\b)?\W{{0,3}}"
    for value, choice in ((1.0, choices[0]), (0.0, choices[1])):
        # Neither −1 nor .1 is a choice.
        said = rf"(?:{lead}){{0,2}}(?:response_?\W?)?(?<![-−.]){re.escape(choice)}(?: is {ADJECTIVE})?"
        if re.fullmatch(said, bare, re.IGNORECASE):
            return value
    return 0.5 if TIE.fullmatch(bare) else None


def combine(
    votes: Sequence[Vote],
    weights: Mapping[str | None, float] | None = None,
    calibration: Calibration | None = None,
) -> Row:
    """One preference from votes: the weighted mean over principles of the mean over orders of the mean over samples.

    An order all of whose votes failed fails its principle, for without it the preference for a position would not cancel.
    Principles with at least half of the weight failing fail the row: one that is left over must not speak for all.
    """
    orders: dict[str | None, list[float]] = {}
    lost: set[str | None] = set()
    samples = []
    for (principle, order), group in _grouped(votes).items():
        good = [vote["soft_label"] for vote in group if vote["status"] in LABELLED]
        samples.append(good)
        orders.setdefault(principle, [])
        if good:
            orders[principle].append(_calibrated(order, group, calibration))
        else:
            lost.add(principle)
    heavy = {principle: (weights or {}).get(principle, 1.0) for principle in orders}
    known = sum(heavy[principle] for principle in orders if principle not in lost)
    if known <= sum(heavy.values()) / 2:
        return _failed(votes, *worst(votes))
    soft = sum(heavy[p] * fmean(softs) for p, softs in orders.items() if p not in lost) / known
    label = hard_label(soft)
    return {
        "status": "tie" if label == "tie" else "ok",
        "soft_label": soft,
        "label": label,
        "dispersion": dispersion(samples),
        "votes": list(votes),
        "error": None,
    }


def _failed(votes: Sequence[Vote], status: str, error: str | None) -> Row:
    nothing = {"soft_label": None, "label": None, "dispersion": None}
    return {"status": status, **nothing, "votes": list(votes), "error": error}


def _grouped(votes: Sequence[Vote]) -> dict[tuple[str | None, str], list[Vote]]:
    """Votes by principle and order: samples of one and the same question."""
    groups: dict[tuple[str | None, str], list[Vote]] = {}
    for vote in votes:
        groups.setdefault((vote.get("principle"), vote["order"]), []).append(vote)
    return groups


def _calibrated(order: str, group: Sequence[Vote], calibration: Calibration | None) -> float:
    """The mean soft label of one question's votes."""
    if calibration is None:
        return fmean(vote["soft_label"] for vote in group if vote["status"] in LABELLED)
    first = calibration(first_shown(order, group))
    return first if order == "ab" else 1 - first


def first_shown(order: str, group: Sequence[Vote]) -> float:
    """P(the response shown first is better) by one question's votes, as `Calibration` takes it.

    Spoken verdicts are counted with half a vote for either side more (Krichevsky and Trofimov), so that a share of all
    or nothing is no certainty.
    """
    good = [vote for vote in group if vote["status"] in LABELLED]
    total = sum(vote["soft_label"] for vote in good)
    spoken = all(vote["logprobs"] is None for vote in good)
    a = float((total + 0.5) / (len(good) + 1) if spoken else total / len(good))
    return a if order == "ab" else 1 - a


def hard_label(soft: float) -> Label:
    """The argmax of a soft label; `tie` where neither response is preferred."""
    if abs(soft - 0.5) < 1e-9:
        return "tie"
    return "a" if soft > 0.5 else "b"
