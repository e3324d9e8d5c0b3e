"""Training sets from several scored responses a prompt: the best ones, and pairs of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from rlaif.build.rows import Build, is_ranked, number, text_list, usable, written
from rlaif.label.pairwise import sigmoid
from rlaif.records import Row, UsageError, digest


@dataclass(frozen=True)
class Candidate:
    """A response with its score; `id` is its row's, of `rlaif rank` with its index."""

    id: str
    prompt: Any
    text: str
    score: float

    @property
    def stem(self) -> str:
        return self.id.rpartition("/")[0]


def candidates(rows: Iterable[Row], build: Build, column: str = "score") -> Iterator[Candidate]:
    """Every scored response of scored or ranked rows; those that failed are counted."""
    for row in rows:
        if is_ranked(row):
            if usable(row, build, "responses", "scores"):
                yield from _ranked(row)
        elif usable(row, build, "response", column):
            yield Candidate(str(row["id"]), row["prompt"], row["response"], number(row[column], row, column))


def _ranked(row: Row) -> Iterator[Candidate]:
    if len(row["responses"]) != len(row["scores"]):
        raise UsageError(f"row '{row['id']}': {len(row['responses'])} responses, but {len(row['scores'])} scores")
    for n, (text, value) in enumerate(zip(text_list(row), row["scores"], strict=True)):
        yield Candidate(f"{row['id']}/{n}", row["prompt"], text, number(value, row, "scores"))


def grouped(found: Iterable[Candidate]) -> list[list[Candidate]]:
    """The candidates of each prompt: ids `7/0`, `7/1` belong together where their prompts agree; else equal prompts do."""
    known = [(candidate, digest(candidate.prompt)) for candidate in found]
    prompts: dict[str, set[str]] = {}
    for candidate, prompt in known:
        prompts.setdefault(candidate.stem, set()).add(prompt)
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for candidate, prompt in known:
        together = candidate.stem and len(prompts[candidate.stem]) == 1
        groups.setdefault(("id", candidate.stem) if together else ("prompt", prompt), []).append(candidate)
    return list(groups.values())


def best_of_n(rows: Iterable[Row], build: Build, column: str = "score") -> Iterator[Row]:
    """Best of n (Stiennon et al., arXiv 2009.01325; as training data, the rejection sampling of arXiv 2307.09288, §3.2.3).

    `id`, `prompt`, `completion`, `score`, `n`: each prompt's response with the highest score, the first of equals; `n` counts
    those that have a score. The papers take a reward model's scores; here any column of scores will do.
    """
    for group in grouped(candidates(rows, build, column)):
        best = max(group, key=lambda candidate: candidate.score)
        example = written(build, best.id, best.prompt, completion=best.text)
        yield {**example, "score": best.score, "n": len(group)}


def best_worst(rows: Iterable[Row], build: Build, column: str = "score") -> Iterator[Row]:
    """Each prompt's response with the highest score against that with the lowest (as SimPO, Meng et al., arXiv 2405.14734).

    `id`, `prompt`, `chosen`, `rejected`, `margin` (the difference of scores), `soft_label` (its sigmoid). Of equals the first
    counts; prompts whose scores are all equal, or that have one response, are left out.
    """
    for group in grouped(candidates(rows, build, column)):
        best, worst = (pick(group, key=lambda candidate: candidate.score) for pick in (max, min))
        if best.score == worst.score:
            build.dropped["prompts without two different scores"] += 1
        else:
            yield from _reward_pair(build, best, worst)


def chosen_answers(rows: Iterable[Row], build: Build, column: str = "score") -> list[Row]:
    """Each prompt's response with the highest score as that prompt's answer: `id` (the prompt's own), `prompt`, `response`."""
    return [
        {"id": best.stem or best.id, "prompt": best.prompt, "response": best.text}
        for group in grouped(candidates(rows, build, column))
        for best in [max(group, key=lambda candidate: candidate.score)]
    ]


def rest(rows: Iterable[Row], build: Build, threshold: float, column: str = "score", most: int | None = None) -> Iterator[Row]:
    """One Improve step of ReST (Gulcehre et al., arXiv 2308.08998): the responses whose score is at least a threshold.

    `id`, `prompt`, `completion`, `score`. The paper raises the threshold from step to step within one Grow step, each
    fine-tuning the model before; which model is trained on which file is left to whoever trains. `most`: so many of a prompt
    are drawn where there are more, lest easy prompts outweigh the others (ReST-EM, Singh et al., arXiv 2312.06585, §5).
    """
    good = []
    for found in candidates(rows, build, column):
        if found.score >= threshold:
            good.append(found)
        else:
            build.dropped[f"below {threshold:g}"] += 1
    surplus = _surplus(good, build, most) if most else set()
    build.dropped[f"beyond {most} of a prompt"] += len(surplus)
    for n, found in enumerate(good):
        if n not in surplus:
            yield {**written(build, found.id, found.prompt, completion=found.text), "score": found.score}


def _surplus(found: Sequence[Candidate], build: Build, most: int) -> set[int]:
    """Places of those that are left out, so that at most so many of a prompt stay."""
    place = {id(candidate): n for n, candidate in enumerate(found)}
    groups = [[place[id(candidate)] for candidate in group] for group in grouped(found)]
    return {n for group in groups for n in build.draw("rest", found[group[0]].id).sample(group, max(0, len(group) - most))}


def rs_dpo(rows: Iterable[Row], build: Build, gap: float, temperature: float = 1.0, column: str = "score") -> Iterator[Row]:
    """RS-DPO (Khaki et al., arXiv 2402.10038): all pairs of a prompt's responses whose scores are further apart than `gap`.

    `id`, `prompt`, `chosen`, `rejected`, `margin` (the gap), `soft_label` (σ(gap / temperature)). The paper bounds
    σ(gap / τ) by η; as σ grows, that is a gap of more than τ·logit(η).
    """
    for group in grouped(candidates(rows, build, column)):
        wide = [(one, two) for one, two in permutations(group, 2) if one.score - two.score > max(gap, 0.0)]
        build.dropped["prompts without such a gap"] += not wide
        for chosen, rejected in wide:
            yield from _reward_pair(build, chosen, rejected, temperature)


def _reward_pair(build: Build, chosen: Candidate, rejected: Candidate, temperature: float = 1.0) -> Iterator[Row]:
    if chosen.text == rejected.text:  # a judge may score one text in two ways
        build.dropped["pairs of equal responses"] += 1
        return
    gap = chosen.score - rejected.score
    name = f"{chosen.id}-{rejected.id.rpartition('/')[2]}"
    example = written(build, name, chosen.prompt, chosen=chosen.text, rejected=rejected.text)
    yield {**example, "margin": gap, "soft_label": sigmoid(gap / temperature)}


def rso(
    rows: Iterable[Row], build: Build, beta: float, keep: int, tournament: bool = False, column: str = "score"
) -> Iterator[Row]:
    """Statistical rejection sampling (RSO, Liu et al., arXiv 2309.06657): pairs of samples of the estimated optimal policy.

    `id`, `prompt`, `chosen`, `rejected`, `margin` (r_w − r_l), `soft_label` (σ(r_w − r_l), Bradley and Terry's probability
    with the scores as log-strengths). From each prompt's responses `keep` are drawn as `accepted` says, and paired as
    `matches` says; pairs of equal scores or equal texts are left out. The paper goes over the responses in the order given,
    which favours the first ones in the last pass; here each pass has a random order. The labels of its pairs are hard.
    """
    for group in grouped(candidates(rows, build, column)):
        draw = build.draw("rso", group[0].id)
        kept = [group[n] for n in accepted([candidate.score for candidate in group], beta, keep, draw)]
        build.dropped["prompts with a single response"] += len(kept) == 1
        for chosen, rejected in matches(kept, draw, tournament):
            if chosen.score == rejected.score:
                build.dropped["pairs of equal scores"] += 1
            else:
                yield from _reward_pair(build, chosen, rejected)


def accepted(rewards: Sequence[float], beta: float, keep: int, draw: random.Random) -> list[int]:
    """Indices of accepted responses, in the order of acceptance: `keep` of them, or all where there are fewer.

    Passes over those that are left, each in a random order: each is accepted with probability exp((r − r_max)/β), r_max being
    the highest reward of those left when the pass begins. So every pass accepts at least one, and the first of n candidates
    to be accepted is i with probability a_i · ∫₀¹ Π_{j≠i} (1 − t·a_j) dt, where a = exp((r − r_max)/β): for many
    candidates that is near softmax(r/β), the optimal policy's choice among them.
    """
    left, found = list(range(len(rewards))), list[int]()
    while left and len(found) < keep:
        highest = max(rewards[n] for n in left)
        order = draw.sample(left, len(left))
        found += [n for n in order if draw.random() < math.exp((rewards[n] - highest) / beta)]
        taken = set(found)
        left = [n for n in left if n not in taken]
    return found[:keep]


def matches(players: list[Candidate], draw: random.Random, tournament: bool = False) -> Iterator[tuple[Candidate, Candidate]]:
    """(winner, loser) of disjoint random pairs; in a tournament the winners go on, and of an odd number the last has a bye.

    Of n players, ⌊n/2⌋ pairs, or n − 1. Equal scores let the first one drawn go on.
    """
    order = draw.sample(players, len(players))
    while len(order) > 1:
        played = [
            (one, two) if one.score >= two.score else (two, one) for one, two in zip(order[::2], order[1::2], strict=False)
        ]
        yield from played
        order = [winner for winner, _ in played] + order[len(played) * 2 :]
        if not tournament:
            return
