"""Putting a template's question to a model: straight or after a rationale, once or several times, and reading the answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean, variance
from typing import Any, Literal

from rlaif.prompts import Template
from rlaif.records import (
    LABELLED,
    Completion,
    NoLogprobsError,
    RefusedError,
    Request,
    RowError,
    Status,
    UsageError,
)

Ask = Callable[[Request], Awaitable[Completion]]
"""What a method calls to have a request answered; it does not know by which engine, or whether from the store."""

Cot = Literal["off", "two-call", "one-call"]
Vote = dict[str, Any]

DRAWS = 8
"""Spoken answers to draw where an engine gives no log-probabilities, unless told otherwise."""

FAILURES: tuple[Status, ...] = ("error", "refused", "unparsed")
"""Failures, the one that decides a row's status first."""

REFUSAL = re.compile(
    r"^\W*(?:(?:i'?m|i am) (?:really |very |so |truly )?sorry|sorry\b|i (?:can ?not|can'?t|won'?t|will not|must decline)|"
    r"i(?:'m| am) (?:not able|unable|not comfortable)|as an ai\b|i (?:do not|don'?t) feel comfortable)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Asking:
    """How a question is put.

    cot: `off`; `two-call` as in the RLAIF paper (arXiv 2309.00267, §2.1.2: a rationale is written, then the answer is read
    from log-probabilities); `one-call`, rationale and answer in one text, for models without log-probabilities.
    samples: rationales drawn, the distributions of which are averaged (self-consistency); without chain of
    thought, answers drawn where the engine gives no log-probabilities (with them, one call tells the whole distribution).
    Unset: one rationale, or 8 such answers. temperature: of whatever is drawn; unset: 0 for one, 1 for several.
    rationale_tokens, answer_tokens: the most of each.

    Raises: UsageError for several samples at temperature 0, which would all be the same.
    """

    cot: Cot = "off"
    samples: int | None = None
    temperature: float | None = None
    rationale_tokens: int = 512
    answer_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.samples or 1) > 1:
            raise UsageError(f"{self.samples} samples at temperature 0 would all be the same: give a temperature above 0")

    @property
    def rationales(self) -> int:
        return self.samples or 1

    @property
    def draws(self) -> int:
        """Spoken answers to one question, where they stand in for log-probabilities."""
        return self.samples or (1 if self.temperature == 0 else DRAWS)

    def warmth(self, several: bool) -> float:
        """The temperature of a draw."""
        return float(several) if self.temperature is None else self.temperature

    def settings(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """One answer: `value` is what was read from it (None: a failure), in the terms of whoever asked."""

    status: Status
    value: Any = None
    logprobs: dict[str, float | None] | None = None
    text: str = ""
    rationale: str | None = None
    sample: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    key: str = ""

    def vote(self, **leading: Any) -> Vote:
        """The answer as it is kept in a row; `leading` is what the asker knows and made of it."""
        return {**leading, "status": self.status, **{name: getattr(self, name) for name in KEPT}}


KEPT = tuple(field.name for field in fields(Answer) if field.name not in ("status", "value"))


@dataclass(frozen=True)
class Judge:
    """Asks one template's question.

    `read` makes a value of a completion with log-probabilities, `parse` of a text; both give None for what they cannot
    read. A failure stays a failure: it is never a value.
    """

    template: Template
    asking: Asking
    read: Callable[[Completion], Any]
    parse: Callable[[str], Any]

    def __post_init__(self) -> None:
        needed = {"two-call": "thinking", "one-call": "reasoned"}.get(self.asking.cot)
        if needed and needed not in self.template.blocks:
            raise UsageError(f"template {self.template.name}: --cot {self.asking.cot} needs a block '{needed}' in it")

    async def answers(self, values: Mapping[str, Any], hint: Mapping[str, Any], ask: Ask) -> list[Answer]:
        """All answers to the question about `values`; at least one, failures included."""
        hint = {**hint, "choices": self.template.choices, "asks_for": self.template.asks_for}
        if self.asking.cot == "off":
            return await self._verdicts(*self.template.render(**values), hint, ask, self.asking.draws)
        one = self._two_calls if self.asking.cot == "two-call" else self._one_call
        found = await asyncio.gather(*(one(values, hint, ask, n) for n in range(self.asking.rationales)))
        return [answer for answers in found for answer in answers]

    # ------------------------------------------------------------ the answer itself

    async def _verdicts(self, messages: Any, prefix: str, hint: Mapping[str, Any], ask: Ask, draws: int) -> list[Answer]:
        """The answer from log-probabilities, else `draws` spoken ones."""
        if not self.template.choices:
            return await self._drawn(messages, prefix, hint, ask, draws if self.asking.samples else 1)
        request = Request(messages, prefix, choices=self.template.choices, seed=self.asking.seed, hint=hint)
        try:
            answer = self._seen(await ask(request))
        except NoLogprobsError:
            return await self._drawn(messages, prefix, hint, ask, draws)
        except (RowError, RefusedError) as error:
            return [_failed(error)]
        if answer.status in ("ok", "refused"):
            return [answer]
        # Log-probabilities came, but not those of the choices: what does the model say when let speak?
        return [answer, *await self._drawn(messages, prefix, hint, ask, draws if self.asking.samples else 1)]

    async def _drawn(self, messages: Any, prefix: str, hint: Mapping[str, Any], ask: Ask, draws: int) -> list[Answer]:
        warm = self.asking.warmth(draws > 1)
        tokens, seed = self.asking.answer_tokens, self.asking.seed
        requests = (
            Request(messages, prefix, max_tokens=tokens, temperature=warm, seed=seed, sample=n, hint=hint) for n in range(draws)
        )
        return list(await asyncio.gather(*(self._spoken(request, ask) for request in requests)))

    async def _spoken(self, request: Request, ask: Ask) -> Answer:
        try:
            completion = await ask(request)
        except (RowError, RefusedError) as error:
            return _failed(error, request.sample)
        return self._heard(completion, self.parse(completion.text), request.sample)

    def _seen(self, completion: Completion) -> Answer:
        """What log-probabilities say; an engine may also have answered by refusing."""
        if completion.logprobs is None:
            return self._heard(completion, self.parse(completion.text), 0)
        refused = completion.refusal or completion.finish == "content_filter"
        value = None if refused else self.read(completion)
        logprobs = {choice: completion.logprobs.get(choice) for choice in self.template.choices}
        status: Status = "refused" if refused else "unparsed" if value is None else "ok"
        return _answer(completion, status, value, logprobs)

    def _heard(self, completion: Completion, value: Any, sample: int) -> Answer:
        status = "ok" if value is not None else "refused" if REFUSAL.match(completion.text) else "unparsed"
        if completion.refusal or completion.finish == "content_filter":
            status, value = "refused", None
        return _answer(completion, status, value, sample=sample)

    # ------------------------------------------------------------ chain of thought

    async def _two_calls(self, values: Mapping[str, Any], hint: Mapping[str, Any], ask: Ask, n: int) -> list[Answer]:
        """A rationale, then the answer given it."""
        messages, _ = self.template.render("thinking", **values)
        try:
            thought = await ask(self._thinking(messages, hint, n, self.asking.rationale_tokens, "thinking"))
        except (RowError, RefusedError) as error:
            return [_failed(error, n)]
        refused = thought.refusal or thought.finish == "content_filter" or REFUSAL.match(thought.text)
        if refused or not thought.text.strip():
            return [replace(self._heard(thought, None, n), rationale=thought.text)]
        rendered = self.template.render("thinking", rationale=thought.text, **values)
        draws = 1 if self.asking.samples else self.asking.draws
        answers = await self._verdicts(*rendered, hint, ask, draws)
        found = [replace(a, rationale=thought.text, sample=n if draws == 1 else a.sample) for a in answers]
        read, written = thought.prompt_tokens, thought.completion_tokens  # counted once, with the first
        found[0] = replace(
            found[0],
            prompt_tokens=found[0].prompt_tokens + read,
            completion_tokens=found[0].completion_tokens + written,
        )
        return found

    async def _one_call(self, values: Mapping[str, Any], hint: Mapping[str, Any], ask: Ask, n: int) -> list[Answer]:
        """Rationale and answer in one text: its last line alone is the answer, and none if the text was cut off."""
        messages, _ = self.template.render("reasoned", **values)
        most = self.asking.rationale_tokens + self.asking.answer_tokens
        try:
            said = await ask(self._thinking(messages, hint, n, most, "reasoned"))
        except (RowError, RefusedError) as error:
            return [_failed(error, n)]
        # As `parse` counts lines, so that none but the last one is left for it to read.
        *thought, last = said.text.strip().splitlines(keepends=True) or [""]
        answer = self._heard(said, None if said.finish == "length" else self.parse(last), n)
        return [replace(answer, rationale="".join(thought).strip())]

    def _thinking(self, messages: Any, hint: Mapping[str, Any], n: int, tokens: int, form: str) -> Request:
        warm = self.asking.warmth(self.asking.rationales > 1)
        hint = {**hint, "form": form}
        return Request(messages, max_tokens=tokens, temperature=warm, seed=self.asking.seed, sample=n, hint=hint)


def _answer(
    completion: Completion, status: Any, value: Any, logprobs: dict[str, float | None] | None = None, sample: int = 0
) -> Answer:
    return Answer(
        status,
        value,
        logprobs,
        completion.refusal or completion.text,
        None,
        sample,
        completion.prompt_tokens,
        completion.completion_tokens,
        None,
        completion.key,
    )


def _failed(error: Exception, sample: int = 0) -> Answer:
    return Answer("refused" if isinstance(error, RefusedError) else "error", sample=sample, error=str(error))


# ---------------------------------------------------------------- what votes come to


def worst(votes: Sequence[Vote]) -> tuple[Status, str | None]:
    """The status of a row that these votes fail, and what went wrong."""
    failed = {vote["status"] for vote in votes} - LABELLED
    return next(s for s in FAILURES if s in failed), next((v["error"] for v in votes if v["error"]), None)


def dispersion(groups: Sequence[Sequence[float]]) -> float | None:
    """Root mean square, over groups of samples of the same question, of their standard deviation; None without several.

    >>> dispersion([[0.2, 0.4], [0.5]])
    0.14142135623730953
    """
    found = [variance(group) for group in groups if len(group) > 1]
    return fmean(found) ** 0.5 if found else None
