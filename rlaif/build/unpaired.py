"""Training sets of one response at a time: as it is, desirable or not (KTO), and with the instruction that it fits (HIR)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import Field, model_validator

from rlaif.build.rows import Build, answers, written
from rlaif.build.scored import candidates
from rlaif.pairs import training_pairs
from rlaif.records import RlaifError, Row
from rlaif.yamlfile import YamlFile

RATIO = 4 / 3
"""The most weight of KTO's desirable examples to that of its undesirable ones."""


def completions(rows: Iterable[Row], build: Build) -> Iterator[Row]:
    """All responses as they are, to learn a model's answers from (context distillation, Askell et al., arXiv 2112.00861, §2.1).

    `id`, `prompt`, `completion`; the id of one of several samples has its index: 7/0, 7/1.
    """
    for row, name, texts in answers(rows, build, ""):
        for n, text in enumerate(texts):
            if text.strip():
                own = f"{name}/{n}" if len(texts) > 1 else name
                yield written(build, own, row["prompt"], completion=text)
            else:
                build.dropped["empty responses"] += 1


def kto(rows: Sequence[Row], build: Build, threshold: float | None = None, column: str = "score") -> list[Row]:
    """KTO (Ethayarajh et al., arXiv 2402.01306): responses that are desirable or not.

    `id`, `prompt`, `completion`, `label`. Of a comparison the preferred response is desirable and the other one is not, a
    tie gives nothing; a scored response is desirable from `threshold` on. In a random order, for TRL estimates the
    divergence from each prompt with its neighbour's response, which should not be an answer to the same prompt.
    """
    if threshold is None:
        pairs = training_pairs(rows, build.pairs(drop_ties=True))
        found = [example for pair in pairs for example in _two(pair)]
    else:
        found = [
            {**written(build, one.id, one.prompt, completion=one.text), "label": one.score >= threshold}
            for one in candidates(rows, build, column)
        ]
    return build.draw("kto").sample(found, len(found))


def balanced(examples: list[Row], build: Build, ratio: float = RATIO) -> list[Row]:
    """With fewer of the larger class, so that desirable to undesirable examples are from 1 to `ratio` (KTO, §4).

    The paper bounds that ratio for weighted examples; these are of weight 1. Raises: RlaifError where one class is empty.
    """
    good, bad = _classes(examples)
    if not good or not bad:
        raise RlaifError(f"nothing to balance: no example is {'undesirable' if good else 'desirable'}")
    most_good = math.floor(ratio * len(bad) + 1e-9)  # 4/3 of 3 is 4, whatever its binary fraction says
    kept = set(good[:most_good]) | set(bad[: len(good)])  # a random order already
    build.dropped["by balancing"] += len(examples) - len(kept)
    return [example for n, example in enumerate(examples) if n in kept]


def suggest_weights(examples: list[Row], build: Build, ratio: float = RATIO) -> None:
    """Notes the weights that make desirable and undesirable examples weigh the same, where their ratio is not 1 to `ratio`."""
    good, bad = (len(numbers) for numbers in _classes(examples))
    build.notes.append(f"{good:,} desirable, {bad:,} undesirable")
    if not good or not bad:
        build.notes.append("KTO needs both")
    elif good < bad:  # rounded so that the ratio is 1 at least
        build.notes.append(f"train with desirable_weight={math.ceil(100 * bad / good) / 100:g}, undesirable_weight=1")
    elif good > ratio * bad:
        build.notes.append(f"train with desirable_weight=1, undesirable_weight={math.floor(100 * good / bad) / 100:g}")


def _two(pair: Row) -> Iterator[Row]:
    for name in ("chosen", "rejected"):
        yield {
            "id": f"{pair['id']}/{name}",
            "prompt": pair["prompt"],
            "completion": pair[name],
            "label": name == "chosen",
        }


def _classes(examples: list[Row]) -> tuple[list[int], list[int]]:
    good = [n for n, example in enumerate(examples) if example["label"]]
    return good, [n for n, example in enumerate(examples) if not example["label"]]


class Instructions(YamlFile):
    """What asks for an answer of each level; `fair` only where there are three."""

    poor: str = Field(default="Give a poor answer.", min_length=1)
    fair: str = Field(default="Give a fair answer.", min_length=1)
    good: str = Field(default="Give a good answer.", min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Instructions:
        if len({self.poor, self.fair, self.good}) < 3:
            raise ValueError("poor, fair and good must differ")
        return self


def hir(
    rows: Iterable[Row], build: Build, levels: int = 2, instructions: Instructions | None = None, column: str = "score"
) -> Iterator[Row]:
    """Hindsight instruction relabelling (HIR, Zhang et al., arXiv 2302.05206): each response answers the instruction it fits.

    `id`, `prompt` (with the instruction of the response's level after it), `completion`, `level`. Levels are halves or thirds
    of this file's scores, lowest first, and equal scores are of one level. The paper relabels by feedback on the task, and
    adds a contrastive and an entropy term to the loss; here is the data alone, for supervised fine-tuning.

    Raises: RlaifError where so many scores are equal that a level stays empty.
    """
    found = list(candidates(rows, build, column))
    names = ("poor", "good") if levels == 2 else ("poor", "fair", "good")
    ordered = sorted(candidate.score for candidate in found)
    cuts = [ordered[n * len(ordered) // levels] for n in range(1, levels)] if ordered else []
    known = [names[sum(candidate.score >= cut for cut in cuts)] for candidate in found]
    empty = next((name for name in names if found and name not in known), None)
    if empty:
        raise RlaifError(f"no response is {empty}: too many of the {len(found):,} scores are equal")
    asked = (instructions or Instructions()).model_dump()
    for candidate, level in zip(found, known, strict=True):
        example = written(build, candidate.id, _instructed(candidate.prompt, asked[level]), completion=candidate.text)
        yield {**example, "level": level}


def _instructed(prompt: Any, instruction: str) -> Any:
    """The prompt with the instruction at the end of its last user turn."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}"
    *before, last = prompt
    if last["role"] != "user":
        return [*prompt, {"role": "user", "content": instruction}]
    return [*before, {**last, "content": f"{last['content']}\n\n{instruction}"}]
