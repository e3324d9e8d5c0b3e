"""A labeler with planted truth: known quality, noise, position bias, refusals, garbage and faults, all from a seed."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from rlaif.records import Completion, NoLogprobsError, Request, TransientError, UsageError, digest

GARBAGE = ("Purple, most likely.", "1 2 1 2", "", "Both have their merits and their faults.", "{'verdict': null}")
REFUSALS = ("I'm sorry, but I can't help with that.", "I cannot compare these responses.")


class MockEngine:
    """Chooses the first response shown with probability σ(k·(q₁ − q₂) + bias + noise·ε), ε standard normal.

    A response's quality q is the row's `quality_a` / `quality_b` where it has them, else drawn from the text, standard
    normal. Everything is drawn from `seed` and the request, so that the same request meets the same fate, except `faults`,
    which are drawn anew each time it is sent, as a server's are.

    k: slope; bias: preference for the first position (log-odds); noise: standard deviation (log-odds); refuse, garbage:
    share of prompts answered so; faults: share of calls that fail for a while; logprobs: whether it gives any;
    latency: mean seconds a call takes, lognormal with σ = `spread`.
    """

    def __init__(
        self,
        model: str = "planted",
        seed: int = 0,
        k: float = 2.0,
        bias: float = 0.0,
        noise: float = 0.0,
        refuse: float = 0.0,
        garbage: float = 0.0,
        faults: float = 0.0,
        logprobs: bool = True,
        latency: float = 0.0,
        spread: float = 1.0,
    ):
        numbers = {"seed": seed, "k": k, "bias": bias, "noise": noise, "latency": latency, "spread": spread}
        shares = {"refuse": refuse, "garbage": garbage, "faults": faults}
        for name, value in (numbers | shares).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UsageError(f"mock engine: {name} is a number, not {value}")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(f"mock engine: {name} is a share, from 0 to 1, not {share}")
        if min(noise, latency, spread) < 0:
            raise UsageError("mock engine: noise, latency and spread cannot be negative")
        if not isinstance(logprobs, bool):
            raise UsageError(f"mock engine: logprobs is true or false, not {logprobs}")
        self.k, self.bias, self.noise = k, bias, noise
        self.refuse, self.garbage, self.faults = refuse, garbage, faults
        self.logprobs, self.latency, self.spread = logprobs, latency, spread
        self.seed = seed
        self.identity: dict[str, Any] = {
            "engine": "mock",
            "model": model,
            "planted": {
                "seed": seed,
                "k": k,
                "bias": bias,
                "noise": noise,
                "refuse": refuse,
                "garbage": garbage,
                "logprobs": logprobs,
            },
        }
        self.notes: list[str] = []
        self.calls = 0
        self._faults = random.Random(seed)

    async def complete(self, request: Request) -> Completion:
        self.calls += 1
        if self.latency:
            mean = math.log(self.latency) - self.spread**2 / 2
            await asyncio.sleep(self._faults.lognormvariate(mean, self.spread))
        if self._faults.random() < self.faults:
            raise TransientError("mock engine: planted fault")
        return self._answer(request)

    async def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Completion:
        fate = random.Random(digest([self.seed, "fate", request.messages]))
        draw = fate.random()
        tokens = sum(len(m["content"]) for m in request.messages) // 4
        if draw < self.refuse:
            return self._said(request, fate.choice(REFUSALS), tokens)
        if draw < self.refuse + self.garbage:
            return self._said(request, fate.choice(GARBAGE), tokens)
        first, second = self._choices(request)
        p = self._probability(request, fate)
        if request.choices:
            if not self.logprobs:
                raise NoLogprobsError("mock engine: no log-probabilities")
            logprobs = {first: _log(p), second: _log(1 - p)}
            return Completion(first if p > 0.5 else second, logprobs, None, "length", None, tokens, 1)
        spoken = random.Random(digest([self.seed, request.messages, request.sample, request.seed, request.temperature]))
        share = p if request.temperature else float(p > 0.5)
        return Completion(first if spoken.random() < share else second, None, None, "stop", None, tokens, 1)

    def _said(self, request: Request, text: str, tokens: int) -> Completion:
        """A text that holds no choice; asked for log-probabilities, none of the choices is among them."""
        if request.choices and not self.logprobs:
            raise NoLogprobsError("mock engine: no log-probabilities")
        return Completion(text, {} if request.choices else None, None, "stop", None, tokens, len(text) // 4)

    def _choices(self, request: Request) -> tuple[str, str]:
        hint = request.hint or {}
        first, second = hint.get("choices") or request.choices or ("1", "2")
        return str(first), str(second)

    def _probability(self, request: Request, fate: random.Random) -> float:
        """P(the first response shown is the choice)."""
        hint = request.hint or {}
        texts = hint.get("texts", ("", ""))
        planted = hint.get("qualities", (None, None))
        first, second = (self._quality(text) if q is None else float(q) for text, q in zip(texts, planted, strict=True))
        slope = -self.k if hint.get("asks_for") == "worse" else self.k
        logit = slope * (first - second) + self.bias + self.noise * fate.gauss()
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, logit))))

    def _quality(self, text: str) -> float:
        return random.Random(digest([self.seed, "quality", text])).gauss()


def _log(p: float) -> float:
    return math.log(max(p, 1e-300))
