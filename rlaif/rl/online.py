"""Online preference learning: the policy's own responses, compared by a judge as they come, and learnt from at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlaif.label.pairwise import sigmoid
from rlaif.records import Row
from rlaif.rl import objectives
from rlaif.rl.config import Online, Verdict
from rlaif.rl.generate import Sampler
from rlaif.rl.loop import Loop
from rlaif.rl.ppo import finish
from rlaif.rl.prompts import fitting
from rlaif.rl.prompts import read as read_prompts
from rlaif.rl.rewards import Background, Scored, check
from rlaif.rl.step import Clock, Sample, Sums
from rlaif.train.data import Rows
from rlaif.train.run import Part

__all__ = ["finish", "fitting", "read", "trainer"]

RIVAL = "rlaif_rival"
"""The column in which the judge finds the other response."""

HARD = ("hinge", "apo_zero", "apo_down")
"""Losses that take a side, so that a tie teaches nothing."""


def read(config: Online) -> tuple[Rows, Rows | None]:
    """The prompts. Raises: UsageError, for what is wrong with judges and rewards too."""
    train, held = read_prompts(config)
    check(_terms(config), {**train.rows[0], RIVAL: _as_answer("another response")})
    check(config.held_out, (held or train).rows[0])
    return train, held


def trainer(part: Part) -> Any:
    """The loop, ready to run."""
    return OnlineLoop(part)


def _terms(config: Online) -> tuple[Any, ...]:
    return (Verdict(name="judge", kind="pairwise", labeler=config.judge, against=RIVAL),) if config.judge else config.reward


def _as_answer(text: str) -> list[Row]:
    """A response as a message: of a text that looks like a whole dialogue the judge would be shown the last turn alone."""
    return [{"role": "assistant", "content": text}]


class OnlineLoop(Loop):
    """Two responses to a prompt, 2i and 2i + 1; a pair that could not be judged is left out.

    Nobody is asked which of two identical responses is better. Preference losses learn nothing from them: they are left out
    too. For Nash-MD P(y beats y) is ½ (arXiv 2312.00886, §3), and they stay: without them the weight of the KL would fall with
    a response's probability, and a policy that has collapsed would never be held back.
    """

    def __init__(self, part: Part) -> None:
        super().__init__(part, mixture=part.config.mixture)

    @property
    def a_prompt(self) -> int:
        return 2

    @property
    def _terms(self) -> Any:
        return _terms(self.config)

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra(self, state: dict[str, Any]) -> None:
        """Nothing that the policy, the optimizer and the reference do not tell."""

    def sampler_of(self, number: int) -> Sampler:
        """Nash-MD's first response is the policy's own; with a mixture, all others come from that."""
        own = not self.config.mixture or (self.config.loss == "nash_md" and number == 0)
        return self.sampler if own else self.mixer

    # ------------------------------------------------------------ judgement

    def submit(self, samples: list[Sample]) -> Future[list[Any]]:
        """Scores for both of each pair: a verdict for one is the contrary verdict for the other."""
        if not self.config.judge:
            return super().submit(samples)
        pairs = list(zip(samples[0::2], samples[1::2], strict=True))
        asked = [(a, b) for a, b in pairs if a.text != b.text]
        inner = self.judge.submit([{**a.row, RIVAL: _as_answer(b.text)} for a, b in asked], [a.text for a, _ in asked])
        alike = TIE if self.config.loss == "nash_md" else IDENTICAL
        outer: Future[list[Any]] = Future()
        inner.add_done_callback(partial(_pass_on, outer, [None if a.text != b.text else alike for a, b in pairs]))
        return outer

    def _can_rate(self, judge: Background) -> bool:
        return judge is not self.judge or not self.config.judge

    def _figures(self, samples: list[Sample]) -> dict[str, float]:
        figures = super()._figures(samples)
        if self.config.judge:  # the rewards of a pair add up to nothing
            return {name: value for name, value in figures.items() if not name.startswith("reward")}
        return figures

    # ------------------------------------------------------------ a step

    def learn(self, samples: list[Sample], clock: Clock) -> dict[str, float]:
        with clock.on("training"):
            pairs = {a.number: (a, b, p) for a, b, p in self._verdicts(samples)}
            numbers = self.world.all(list(pairs))
            confident = self.world.all([abs(2 * p - 1) for *_, p in pairs.values()])
            found: dict[str, float] = {"pairs": len(numbers)}
            if not numbers:
                return found
            for update in range(self.config.updates):
                sums: Sums = defaultdict(float)
                norms = []
                for minibatch in self.minibatches([n for number in numbers for n in (number, number + 1)], update, 2):
                    self._gradients([pairs[n] for n in minibatch if n in pairs], len(minibatch) // 2, sums)
                    norms.append(self.update())
                found |= self.means(sums, len(pairs)) | {"grad_norm": sum(norms) / len(norms)}
            return found | {"confidence": sum(confident) / len(confident)}

    def _verdicts(self, samples: list[Sample]) -> list[tuple[Sample, Sample, float]]:
        """Pairs with P(the first is better)."""
        by_number = {sample.number: sample for sample in samples}
        found = []
        for number, first in by_number.items():
            second = by_number.get(number + 1)
            if number % 2 or second is None:
                continue
            p = self._first_wins(first, second)
            learns = first.text != second.text or self.config.loss == "nash_md"
            if learns and (self.config.loss not in HARD or abs(p - 0.5) > 1e-9):
                found.append((first, second, p))
        return found

    def _first_wins(self, first: Sample, second: Sample) -> float:
        if first.text == second.text:
            return 0.5
        return (first.score + 1) / 2 if self.config.judge else sigmoid(first.score - second.score)

    def _gradients(self, pairs: Sequence[tuple[Sample, Sample, float]], count: int, sums: Sums) -> None:
        """This process's part of a minibatch of so many pairs in all processes."""
        size = max(1, self.config.batch_size // 2)
        for start in range(0, len(pairs), size):
            some = pairs[start : start + size]
            torch.autograd.backward(self._loss(some, sums) / count)

    def _loss(self, pairs: Sequence[tuple[Sample, Sample, float]], sums: Sums) -> Tensor:
        p = torch.tensor([p for *_, p in pairs], device=self.accelerator.device)
        alone = self.config.loss == "nash_md"
        samples = [sample for a, b, _ in pairs for sample in ((a,) if alone else (a, b))]
        logprobs = self.actor.logprobs(self.batch(samples)).sum(1)
        ratios = logprobs - torch.tensor([float(s.reference.sum()) for s in samples], device=logprobs.device)
        if alone:
            losses = objectives.nash_md_loss(logprobs, ratios, p, self.config.beta)
            sums["won"] += float(p.sum())
        else:
            first, second = ratios[0::2], ratios[1::2]
            losses = objectives.preference_loss(self.config.loss, first, second, p, self.config.beta)
            sums["accuracy"] += float((((first - second) > 0) == (p > 0.5)).sum())
        sums["loss/policy"] += float(losses.detach().sum())
        return losses.sum()


def _pass_on(outer: Future[list[Any]], told: Sequence[Scored | None], inner: Future[list[Scored]]) -> None:
    """The verdicts for both of each pair; `told`: of each pair, what stands in for the verdict of a judge, or None."""
    try:
        scored = iter(inner.result())
        outer.set_result([one for known in told for one in ([known, known] if known else _both(next(scored)))])
    except BaseException as error:
        outer.set_exception(error)


IDENTICAL = Scored(None, {}, None, "the two responses are identical")
TIE = Scored(0.0, {}, None, None)


def _both(first: Scored) -> list[Scored]:
    contrary = {name: None if value is None else -value for name, value in first.terms.items()}
    return [first, replace(first, value=None if first.value is None else -first.value, terms=contrary)]
