"""The pairwise labeler of the RLAIF paper (arXiv 2309.00267, §2.1): soft labels from the log-probabilities of two choices."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlaif.data import Comparison
from rlaif.prompts import Template
from rlaif.records import (
    LABELLED,
    Completion,
    Label,
    NoLogprobsError,
    RefusedError,
    Request,
    Row,
    RowError,
    Status,
)

Ask = Callable[[Request], Awaitable[Completion]]
"""What a method calls to have a request answered; it does not know by which engine, or whether from the store."""

Order = Literal["ab", "ba"]
Vote = dict[str, Any]

FAILURES: tuple[Status, ...] = ("error", "refused", "unparsed")
"""Failures, the one that decides a row's status first."""

REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am) (?:really |very |so |truly )?sorry|sorry\b|i (?:can ?not|can'?t|won'?t|will not|must decline)|"
    r"i(?:'m| am) (?:not able|unable|not comfortable)|as an ai\b|i (?:do not|don'?t) feel comfortable)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PairwiseLabeler:
    """Labels comparisons with one template.

    `both_orders` asks with the responses in either order and averages, which cancels a labeler's preference for a position.
    `samples` verdicts are drawn per order where an engine gives no log-probabilities; the share of each is then the label.
    """

    template: Template
    both_orders: bool = True
    temperature: float = 0.0
    samples: int = 8
    max_tokens: int = 32
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a label."""
        return {
            "method": "pairwise",
            "template": self.template.name,
            "template_hash": self.template.hash,
            "both_orders": self.both_orders,
            "temperature": self.temperature,
            "samples": self.samples,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }

    async def __call__(self, item: Comparison, ask: Ask) -> Row:
        """The preference for one comparison: `status`, `soft_label` (P(A is better)), `label`, `votes`, `error`."""
        orders: tuple[Order, ...] = ("ab", "ba") if self.both_orders else ("ab",)
        votes = await asyncio.gather(*(self._votes(item, order, ask) for order in orders))
        return combine([list(v) for v in votes])

    async def _votes(self, item: Comparison, order: Order, ask: Ask) -> list[Vote]:
        """The votes of one order: one from log-probabilities, else `samples` spoken ones."""
        request = self._request(item, order)
        try:
            completion = await ask(request)
            vote = self._vote(order, completion)
            if vote["soft_label"] is not None or vote["status"] == "refused":
                return [vote]
            # Log-probabilities came, but not those of the choices: what does the model say when let speak?
            return [vote, await self._spoken(order, ask, self._speaking(request, 0, self.temperature))]
        except NoLogprobsError:
            warm = self.temperature or 1.0
            speaking = (self._speaking(request, n, warm) for n in range(self.samples))
            return list(await asyncio.gather(*(self._spoken(order, ask, s) for s in speaking)))
        except (RowError, RefusedError) as error:
            return [self._failed(order, error)]

    def _request(self, item: Comparison, order: Order) -> Request:
        a, b = item.row["response_a"], item.row["response_b"]
        first, second = (a, b) if order == "ab" else (b, a)
        messages, prefix = self.template.render(prompt=item.prompt, response_1=first, response_2=second, row=item.row)
        qualities = [item.row.get("quality_a"), item.row.get("quality_b")]
        return Request(
            messages,
            prefix,
            choices=self.template.choices,
            temperature=self.temperature,
            seed=self.seed,
            hint={
                "texts": (first, second),
                "qualities": tuple(qualities if order == "ab" else reversed(qualities)),
                "choices": self.template.choices,
                "asks_for": self.template.asks_for,
            },
        )

    def _speaking(self, request: Request, sample: int, temperature: float) -> Request:
        return Request(
            request.messages,
            request.prefix,
            max_tokens=self.max_tokens,
            temperature=temperature,
            seed=self.seed,
            sample=sample,
            hint=request.hint,
        )

    async def _spoken(self, order: Order, ask: Ask, request: Request) -> Vote:
        try:
            return self._vote(order, await ask(request))
        except (RowError, RefusedError) as error:
            return self._failed(order, error)

    def _vote(self, order: Order, completion: Completion) -> Vote:
        """What one completion says, in the row's own order whatever the order shown and the template's polarity."""
        status: Status = "ok"
        probability = None
        if completion.logprobs is not None:
            probability = choice_probability(completion, self.template.choices)
        elif not completion.refusal:
            probability = parse_verdict(completion.text, self.template.choices)
        if completion.refusal or completion.finish == "content_filter":
            status, probability = "refused", None
        elif probability is None:
            status = "refused" if completion.logprobs is None and REFUSAL.match(completion.text) else "unparsed"
        elif self.template.asks_for == "worse":
            probability = 1 - probability
        if probability is not None and order == "ba":
            probability = 1 - probability
        logprobs = None
        if completion.logprobs is not None:
            logprobs = {choice: completion.logprobs.get(choice) for choice in self.template.choices}
        return {
            "order": order,
            "status": status,
            "soft_label": probability,
            "logprobs": logprobs,
            "text": completion.refusal or completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "error": None,
            "key": completion.key,
        }

    def _failed(self, order: Order, error: Exception) -> Vote:
        status = "refused" if isinstance(error, RefusedError) else "error"
        empty = {"soft_label": None, "logprobs": None, "text": "", "prompt_tokens": 0, "completion_tokens": 0}
        return {"order": order, "status": status, **empty, "error": str(error), "key": ""}


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
    return _sigmoid(first - second)


def _sigmoid(x: float) -> float:
    """σ(x), such that σ(−x) is 1 − σ(x) to the last bit that matters and nothing overflows."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


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
        said = rf"(?:{lead}){{0,2}}(?:response_?\W?)?{re.escape(choice)}(?: is {ADJECTIVE})?"
        if re.fullmatch(said, bare, re.IGNORECASE):
            return value
    return 0.5 if TIE.fullmatch(bare) else None


def combine(orders: list[list[Vote]]) -> Row:
    """One preference from the votes of each order: the mean over orders of the mean of an order's votes.

    An order all of whose votes failed fails the row: without it, the preference for a position would not cancel.
    """
    votes = [vote for order in orders for vote in order]
    labels = [[v["soft_label"] for v in order if v["status"] in LABELLED] for order in orders]
    if not all(labels):
        failed = {v["status"] for order, good in zip(orders, labels, strict=True) if not good for v in order}
        status = next(s for s in FAILURES if s in failed)
        error = next((v["error"] for v in votes if v["error"]), None)
        return {"status": status, "soft_label": None, "label": None, "votes": votes, "error": error}
    soft = sum(sum(good) / len(good) for good in labels) / len(labels)
    label = hard_label(soft)
    return {
        "status": "tie" if label == "tie" else "ok",
        "soft_label": soft,
        "label": label,
        "votes": votes,
        "error": None,
    }


def hard_label(soft: float) -> Label:
    """The argmax of a soft label; `tie` where neither response is preferred."""
    if abs(soft - 0.5) < 1e-9:
        return "tie"
    return "a" if soft > 0.5 else "b"
