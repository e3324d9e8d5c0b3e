"""Watching for over-optimisation: what a step's responses look like, whether a run should stop, and samples to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rlaif.rl.config import StopWhen
from rlaif.rl.rewards import Scored
from rlaif.train.lines import append, number, take_back

Lines = Sequence[Mapping[str, Any]]

STRETCH = 5
"""Lines of metrics whose mean length is compared."""

REPEATED = 4
"""Tokens of a passage that counts as repeated."""


# ---------------------------------------------------------------- what responses look like


def figures(responses: Sequence[Sequence[int]]) -> dict[str, float]:
    """Figures of a step's responses, each the ids of its tokens.

    `length`: mean tokens of a response. `distinct_1`, `distinct_2`: different tokens, and pairs of neighbours, as a share of
    all, over all responses together (Li et al., arXiv 1510.03055, §5.2). `repetition`: the share of a response's passages
    of 4 tokens that it had before; its mean. A share of nothing is 0.
    """
    return {
        "length": _mean([len(response) for response in responses]),
        "distinct_1": _distinct([gram for response in responses for gram in _grams(response, 1)]),
        "distinct_2": _distinct([gram for response in responses for gram in _grams(response, 2)]),
        "repetition": _mean([_repeated(_grams(response, REPEATED)) for response in responses]),
    }


def judgement(scored: Sequence[Scored]) -> dict[str, float]:
    """How responses were judged: `asked` and `failed`, numbers of them; of the others the mean `reward` and its deviation,
    `reward/std`, `reward/TERM` where there are several terms, and `reward/spread`, the mean spread of ensembles' members.
    """
    scores = [one.value for one in scored if one.value is not None]
    found: dict[str, float] = {"asked": len(scored), "failed": len(scored) - len(scores)}
    if scores:
        found |= {"reward": fmean(scores), "reward/std": pstdev(scores)}
    for name in scored[0].terms if len(scored[0].terms) > 1 else ():
        values = [value for one in scored if (value := one.terms.get(name)) is not None]
        found |= {f"reward/{name}": fmean(values)} if values else {}
    spreads = [one.spread for one in scored if one.spread is not None]
    return found | ({"reward/spread": fmean(spreads)} if spreads else {})


def _grams(response: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(response[n : n + size]) for n in range(len(response) - size + 1)]


def _distinct(grams: Sequence[tuple[int, ...]]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0


def _repeated(grams: Sequence[tuple[int, ...]]) -> float:
    return 1 - _distinct(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


# ---------------------------------------------------------------- whether to stop


def reason(rules: StopWhen, lines: Lines) -> str | None:
    """Why a run should stop, in a sentence with the figures; None where it should go on.

    `lines` are those of its metrics so far, and nothing else counts, so that a run that is resumed decides as before.
    A figure that is missing, or no finite number, is passed over as if its line were not there.

    `kl`: the newest line with `kl` has one above the limit.
    `length`: the mean `length` of the newest 5 lines with one is more than the factor times that of the first 5, or less
    than that divided by the factor.
    `held_out`, K: at each of the newest K evaluations (lines with `held_out/reward`), that was below what the evaluation
    before had, while the training reward rose. That is the mean `reward` over the steps after the evaluation before, up to
    and with this one's; it rose when it is above that of the stretch before. The first evaluation has none before it, and a
    stretch without a reward has no mean: neither is a sign.
    """
    return _kl(rules.kl, lines) or _length(rules.length, lines) or _held_out(rules.held_out, lines)


def _series(lines: Lines, name: str) -> list[tuple[int, float]]:
    """A figure with its steps, in their order; of two at one step, the later line's."""
    found = {line["step"]: value for line in lines if (value := number(line.get(name))) is not None}
    return sorted(found.items())


def _kl(most: float | None, lines: Lines) -> str | None:
    series = _series(lines, "kl") if most is not None else []
    if most is None or not series or series[-1][1] <= most:
        return None
    step, kl = series[-1]
    return f"the KL from the reference is {kl:.4g} nats a response at step {step}: above {most:g} (stop_when kl)"


def _length(factor: float | None, lines: Lines) -> str | None:
    series = _series(lines, "length") if factor is not None else []
    if factor is None or not series:
        return None
    first, last = (fmean(length for _, length in some) for some in (series[:STRETCH], series[-STRETCH:]))
    if first / factor <= last <= first * factor:
        return None
    return (
        f"the mean length of responses is {last:.4g} tokens at steps {series[-STRETCH][0]} to {series[-1][0]}, and was "
        f"{first:.4g} at the first {STRETCH}: apart by more than the factor {factor:g} (stop_when length)"
    )


def _held_out(signs: int | None, lines: Lines) -> str | None:
    evaluations = _series(lines, "held_out/reward") if signs is not None else []
    if signs is None or len(evaluations) <= signs:
        return None
    rewards = _stretches(_series(lines, "reward"), [step for step, _ in evaluations])
    newest = range(len(evaluations) - signs, len(evaluations))
    if not all(evaluations[n][1] < evaluations[n - 1][1] and _rose(rewards[n - 1], rewards[n]) for n in newest):
        return None
    held, trained = (
        f"from {values[0]:.4g} to {values[-1]:.4g}"
        for values in ([value for _, value in evaluations[-signs - 1 :]], [r for r in rewards[-signs - 1 :] if r is not None])
    )
    steps = f"{evaluations[-signs - 1][0]} to {evaluations[-1][0]}"
    times = f"{signs} evaluations in a row" if signs > 1 else "one evaluation"
    return f"at {times} (steps {steps}) the held-out reward fell, {held}, while the reward rose, {trained} (stop_when held_out)"


def _stretches(series: Iterable[tuple[int, float]], ends: Sequence[int]) -> list[float | None]:
    """The mean of what came after the end before, up to and with each end."""
    series = list(series)
    starts = [-1, *ends[:-1]]
    values = [[value for step, value in series if start < step <= end] for start, end in zip(starts, ends, strict=True)]
    return [fmean(some) if some else None for some in values]


def _rose(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


# ---------------------------------------------------------------- samples


def sample(prompt: Any, response: str, scored: Scored | None, kl: float | None, tokens: int, ended: bool) -> dict[str, Any]:
    """A response as it is told: with its score, None for one that could not be judged, its KL in nats and its tokens."""
    scored = scored or Scored(None, {}, None, None)
    return {
        "prompt": prompt,
        "response": response,
        "reward": scored.value,
        "terms": dict(scored.terms),
        "kl": kl,
        "tokens": tokens,
        "ended": ended,
        "error": scored.error,
    }


class Samples:
    """The file of samples that a run shows: a line for each, with the run's part and the step."""

    def __init__(self, path: Path, part: str = "train"):
        self.path, self.part = path, part

    def append(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        for sample in samples:
            append(self.path, {"part": self.part, "step": step, **sample})

    def take_back(self, step: int) -> None:
        """Remove what came after a step, for a run that goes on from there; all of it for step 0."""
        take_back(self.path, self.part, step)
