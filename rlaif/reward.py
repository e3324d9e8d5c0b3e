"""Trained reward models as scorers: what their folders tell, and how their scores become ratings and comparisons."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from rlaif import data
from rlaif.data import Item, kind_of, read_rows, renamed
from rlaif.label.judge import Ask
from rlaif.label.pairwise import hard_label, sigmoid
from rlaif.records import Message, Request, Row, RowError, UsageError
from rlaif.runner import Method
from rlaif.train.data import as_trained

FACTS = "reward.json"
"""Beside a reward model's weights: its heads, the form of its texts, its members and how their scores become one."""

ONLY = "reward"
"""The name of the score of a model with one head and no name for it."""

BELOW = 0.15
"""Of the gate: a response is unsafe where σ(its safety score) is less (arXiv 2307.09288, §3.2.3)."""

RESERVED = (*data.RESERVED, "score_a", "score_b")
"""Columns that a comparison by scores adds."""

Combine = Literal["mean", "worst"]
Scores = list[list[float]]
"""Of one response: (members, heads)."""


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class Folder:
    """A reward model's folder: one model, or an ensemble with a sub-folder for each of its `members`.

    `heads` are the names of the models' outputs, ("reward",) where there is one without a name. `max_length`: tokens of a
    prompt with its response. `weights`: the SHA-256 of all files of weights.
    """

    path: Path
    name: str
    heads: tuple[str, ...]
    conversational: bool
    max_length: int
    members: tuple[str, ...]
    combine: Combine
    weights: str

    @property
    def models(self) -> list[Path]:
        """The folder of each model."""
        return [self.path / member for member in self.members] or [self.path]


def read_folder(path: Path) -> Folder:
    """What a folder that `rlaif train reward` made tells of itself.

    Raises: UsageError for another folder, or one without its weights.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; `rlaif train reward` makes reward models, in OUT/model")
    facts = path / FACTS
    if not facts.is_file():
        inside = f"; did you mean {path / 'model'}?" if (path / "model" / FACTS).is_file() else ""
        raise UsageError(f"{path}: no {FACTS} in it, as `rlaif train reward` writes it{inside}")
    try:
        told = json.loads(facts.read_text(encoding="utf-8"))
        folder = Folder(
            path=path,
            name=str(told.get("name") or path.name),
            heads=tuple(told["heads"]) or (ONLY,),
            conversational={"conversational": True, "plain": False}[told["form"]],
            max_length=int(told["max_length"]),
            members=tuple(told["members"]),
            combine=told["combine"],
            weights=str(told["weights"]),
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{facts}: not as `rlaif train reward` writes it ({type(error).__name__}: {error})") from error
    for model in folder.models:
        if not any(model.glob("*.safetensors")):
            raise UsageError(f"{model}: no weights in it (*.safetensors)")
    return folder


def weights_hash(folder: Path) -> str:
    """SHA-256 over all files of weights in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scorer:
    """How the scores of all heads and members become one: a member's score is made of its heads', then the members' of theirs.

    `head`: one of the heads, or what all of them come to: `mean`, or `worst`, the least. `combine`: the same for members, of
    one ensemble or of several folders; `worst` is what Coste et al. (arXiv 2310.02743) hold an ensemble to. As comparisons
    teach only differences, each member has a zero of its own, and the least of several scores depends on these, unless the
    models were trained with `center`. With `own_head` a row is scored by the head that its column `head` names.

    `gate`: Llama 2's, where the last of the folders is the safety model: its score counts where the row's column `tagged` is
    true, and wherever `safety_counts` says so; elsewhere that of the others.

    Raises: UsageError for a head that there is not, or folders that differ in heads or form.
    """

    folders: tuple[Folder, ...]
    head: str = "mean"
    combine: Combine = "mean"
    own_head: bool = False
    gate: bool = False
    tagged: str | None = None
    heads: tuple[str, ...] = field(init=False)
    members: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = self.folders[0]
        for other in self.folders[1:]:
            for what in ("heads", "conversational"):
                if getattr(other, what) != getattr(first, what):
                    name = {"heads": "heads", "conversational": "form"}[what]
                    raise UsageError(f"{first.path} and {other.path} differ in their {name}: their scores cannot be combined")
        if self.head not in (*first.heads, "mean", "worst"):
            raise UsageError(f"--head {self.head}: {first.path} has {', '.join(first.heads)}; or mean, worst")
        object.__setattr__(self, "heads", first.heads)
        object.__setattr__(self, "members", tuple(_member_names(self.folders)))

    def settings(self) -> dict[str, Any]:
        gate = {"gate": {"tagged": self.tagged, "below": BELOW}} if self.gate else {}
        return {"heads": list(self.heads), "head": self.head, "members": list(self.members), "combine": self.combine, **gate}

    async def scores(self, row: Row, response: str, ask: Ask) -> Scores:
        """All scores of a response to the row's prompt. Raises: RowError where it has none."""
        prompt, answer = as_trained(row["prompt"], response, self.folders[0].conversational)
        turns: list[Message] = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        text = answer[0]["content"] if isinstance(answer, list) else answer
        completion = await ask(Request((*turns, {"role": "assistant", "content": text})))
        found: Scores = json.loads(completion.text)
        if not all(math.isfinite(score) for member in found for score in member):
            raise RowError("the model's score is not a finite number")
        return found

    def of_members(self, scores: Scores, row: Row) -> list[float]:
        """The score of each member that counts, by the head or heads that count. Raises: RowError for a tag that is none."""
        if not self.gate:
            return self._by_head(scores, row)
        if problem := tag_problem(row, self.tagged):
            raise RowError(problem)
        found, safe = self._by_head(scores, row), len(self.folders[-1].models)
        helpful, safety = found[:-safe], found[-safe:]
        tagged = self.tagged is not None and row.get(self.tagged)
        return safety if safety_counts(_one(safety, self.combine), bool(tagged)) else helpful

    def _by_head(self, scores: Scores, row: Row) -> list[float]:
        name = row["head"] if self.own_head else self.head
        if name in self.heads:
            return [member[self.heads.index(name)] for member in scores]
        return [_one(member, name) for member in scores]

    def one(self, scores: Scores, row: Row) -> float:
        return _one(self.of_members(scores, row), self.combine)

    def named(self, scores: Scores) -> dict[str, float]:
        """Every score by its name: the head's, the member's, or MEMBER/HEAD where there are several of both."""
        pairs = [(member, head) for member in self.members for head in self.heads]
        several = len(self.members) > 1, len(self.heads) > 1
        names = ["/".join(part for part, there in zip(pair, several, strict=True) if there) or pair[1] for pair in pairs]
        return dict(zip(names, (score for member in scores for score in member), strict=True))


def safety_counts(safety: float, tagged: bool, below: float = BELOW) -> bool:
    """Whether a response's reward is its safety score, a logit, or that of helpfulness (Llama 2, arXiv 2307.09288, §3.2.3).

    >>> safety_counts(-2.0, False), safety_counts(2.0, False), safety_counts(2.0, True)
    (True, False, True)
    """
    return tagged or sigmoid(safety) < below


def tag_problem(row: Row, column: str | None) -> str | None:
    """What is wrong with a row's tag; null is not tagged."""
    value = row.get(column) if column else None
    return None if isinstance(value, bool | None) else f"column '{column}': expected true or false, got {kind_of(value)}"


def _one(values: Sequence[float], how: str) -> float:
    return min(values) if how == "worst" else fmean(values)


def _member_names(folders: Sequence[Folder]) -> Iterator[str]:
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, 1)]
    for name, folder in zip(names, folders, strict=True):
        lead = f"{name}/" if len(folders) > 1 else ""
        yield from (f"{lead}{member}" for member in folder.members) if folder.members else [name]


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Ratings:
    """Scores responses: the columns of `rlaif score`, with `scores` by head and member, and their spread over members."""

    scorer: Scorer

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a score."""
        return {"method": "reward", **self.scorer.settings()}

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be scored."""
        return {"status": "error", "score": None, "scores": None, "dispersion": None, "votes": [], "error": problem}

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`score`: the reward, any number (not in [−1, 1]); `dispersion`: the members' standard deviation."""
        try:
            found = await self.scorer.scores(item.row, item.row["response"], ask)
            counting = self.scorer.of_members(found, item.row)
        except RowError as error:
            return self.failed(str(error))
        return {
            "status": "ok",
            "score": _one(counting, self.scorer.combine),
            "scores": self.scorer.named(found),
            "dispersion": _spread(counting),
            "votes": [],
            "error": None,
        }


@dataclass(frozen=True)
class Comparisons:
    """Compares two responses by their scores: the columns of `rlaif label`, and both scores.

    `soft_label` is σ(score_a − score_b), Bradley and Terry's P(A is better), as reward models are trained. Each member has a
    vote, with what it alone would say, under the name of a `labeler`; heads that count together have one each.
    """

    scorer: Scorer

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a label."""
        return {"method": "reward comparisons", **self.scorer.settings()}

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be scored."""
        nothing = dict.fromkeys(("soft_label", "label", "dispersion", "score_a", "score_b"))
        return {"status": "error", **nothing, "votes": [], "error": problem}

    async def __call__(self, item: Item, ask: Ask) -> Row:
        row, scorer = item.row, self.scorer
        try:
            a, b = await asyncio.gather(*(scorer.scores(row, row[side], ask) for side in ("response_a", "response_b")))
        except RowError as error:
            return self.failed(str(error))
        soft = sigmoid(scorer.one(a, row) - scorer.one(b, row))
        label = hard_label(soft)
        votes = self._votes(a, b, row)
        members = zip(scorer.of_members(a, row), scorer.of_members(b, row), strict=True)
        return {
            "status": "tie" if label == "tie" else "ok",
            "soft_label": soft,
            "label": label,
            "dispersion": _spread([sigmoid(one - two) for one, two in members]),
            "score_a": scorer.one(a, row),
            "score_b": scorer.one(b, row),
            "votes": votes,
            "error": None,
        }

    def _votes(self, a: Scores, b: Scores, row: Row) -> list[Row]:
        scorer = self.scorer
        if (row["head"] if scorer.own_head else scorer.head) in scorer.heads:
            sides = [dict(zip(scorer.members, scorer.of_members(scores, row), strict=True)) for scores in (a, b)]
        else:
            sides = [scorer.named(scores) for scores in (a, b)]
        return [_vote(name, score, sides[1][name]) for name, score in sides[0].items()]


def _vote(name: str, a: float, b: float) -> Row:
    """As a labeler's votes are, with what `rlaif.evaluate.agreement` expects of each; no order was asked but the row's own."""
    said = {"labeler": name, "order": "ab", "soft_label": sigmoid(a - b), "score_a": a, "score_b": b}
    return {**said, "status": "ok", "logprobs": None, "error": None}


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


# ---------------------------------------------------------------- what a source holds


def work(
    source: str, scorer: Scorer, columns: Mapping[str, str], split: str | None, limit: int | None
) -> tuple[Callable[[], Iterator[Item]], Method]:
    """The rows of a source and what is to be done with them, by the columns of its first row.

    Comparisons (`response_a` and `response_b`, or `chosen` and `rejected`) are compared; other rows hold a `response`, or
    `responses`, and are scored. Raises: UsageError for a file that cannot be read, or does not go with a gate.
    """
    first = next((renamed(row, columns, where) for where, row in read_rows(source, split)), {})
    if scorer.tagged is not None and scorer.tagged not in first:
        raise UsageError(f"--tagged: {source} has no column '{scorer.tagged}'; there are: {', '.join(first)}")
    if "response_a" in first or ("chosen" in first and "response" not in first):
        if scorer.gate:
            raise UsageError(f"--safety: goes with responses, and {source} has comparisons")
        return lambda: data.comparisons(source, columns, 0, split, limit, RESERVED), Comparisons(scorer)
    return lambda: data.responses(source, columns, split, limit), Ratings(scorer)
