"""Pairs by a judge, by humans, or by which of two models is the stronger one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlaif.build.rows import Build, answers, drawn, usable, written
from rlaif.data import as_text
from rlaif.pairs import training_pairs
from rlaif.records import Row, UsageError

AFTER = "after"
"""The column of `comparisons` that tells which side the later model's response stands on."""


def rl_cai(
    rows: Iterable[Row], human: Sequence[Row], column: str, build: Build, ratio: float | None = None, drop_ties: bool = False
) -> list[Row]:
    """Constitutional AI's preference set (Bai et al., arXiv 2212.08073, §4): the constitution's soft labels, and human ones.

    `id`, `prompt`, `chosen`, `rejected`, `soft_label`, `margin`, `source` ("constitution", "human"). Humans' soft labels are 1;
    where they disagree, the majority's. All human pairs are taken, as in the paper, or `ratio` for each constitutional one.

    Raises: RlaifError where there are too few.
    """
    judged = [
        {**pair, "id": str(pair["id"]), "source": "constitution"}
        for pair in training_pairs(rows, build.pairs(drop_ties=drop_ties))
    ]
    pairs = list(_human_pairs(human, column, build))
    if ratio is None:
        build.notes.append(f"{len(pairs):,} of the examples are human pairs")
        return judged + pairs
    return judged + drawn(pairs, ratio, len(judged), "human pairs", build)


def _human_pairs(rows: Sequence[Row], column: str, build: Build) -> Iterator[Row]:
    from rlaif.evaluate.agreement import human_votes, majority

    for number, (row, votes) in enumerate(zip(rows, human_votes(rows, column), strict=True)):
        label = majority(votes)
        if label not in ("a", "b"):
            build.dropped["human rows without a usable preference"] += 1
        elif usable({**row, "status": "ok"}, build, "response_a", "response_b", among=" (human)"):
            certain = {
                "status": "ok",
                "label": label,
                "soft_label": float(label == "a"),
                "id": f"human/{row.get('id', number)}",
            }
            yield from ({**pair, "source": "human"} for pair in training_pairs([{**row, **certain}], build.pairs()))


def judge_on_policy(rows: Iterable[Row], build: Build, min_confidence: float = 0.5) -> Iterator[Row]:
    """The judge on samples of the policy itself (the on-policy judge of arXiv 2408.06266): its preferred one is chosen.

    `id` (and `group`, of a ranking), `prompt`, `chosen`, `rejected`, `soft_label`, `margin`. Ties have no preferred one, and
    are left out. The paper compares two samples a prompt; a ranking gives all pairs of its several ones.
    """
    for pair in training_pairs(rows, build.pairs(min_confidence=min_confidence, drop_ties=True)):
        yield {**pair, "id": str(pair["id"])}


def judge_off_policy(rows: Sequence[Row], build: Build, policy: str, min_confidence: float = 0.5) -> Iterator[Row]:
    """The judge on responses of two other models (the off-policy judge of arXiv 2408.06266); else as `judge_on_policy`.

    Raises: UsageError for a row with a response of the policy's own, where rows tell their models.
    """
    unknown = 0
    for row in rows:
        models = _models(row)
        if policy in models:
            raise UsageError(f"row '{row['id']}': a response is of the policy itself, '{policy}': that is not off-policy")
        unknown += not models or None in models
    if unknown:
        build.notes.append(f"the origin of {unknown:,} rows could not be checked (no model_a, model_b or models)")
    return judge_on_policy(rows, build, min_confidence)


def _models(row: Row) -> list[Any]:
    """The models that wrote the row's responses, null for one that it does not tell."""
    named = row.get("models")
    if named is None:
        return [row.get("model_a"), row.get("model_b")]
    return named if isinstance(named, list) else [named]


def stronger_preferred(weak: Sequence[Row], strong: Sequence[Row], build: Build) -> Iterator[Row]:
    """Stronger preferred (arXiv 2408.06266): the stronger model's response is chosen, the weaker one's rejected, unseen.

    `id`, `prompt`, `chosen`, `rejected`. Rows are joined by id; of several samples the first is taken.

    Raises: UsageError for prompts that differ, or an id that is there twice.
    """
    for name, prompt, rejected, chosen in _joined({"weak": weak, "strong": strong}, build):
        yield written(build, name, prompt, chosen=chosen, rejected=rejected)


def comparisons(before: Sequence[Row], after: Sequence[Row], build: Build) -> Iterator[Row]:
    """Comparisons of two models' responses, as `rlaif label` takes them; joined as in `stronger_preferred`, raises as there.

    `id`, `prompt`, `response_a`, `response_b`, and `after`, "a" or "b": the side of `after`, drawn by seed and content.
    """
    for name, prompt, one, other in _joined({"before": before, "after": after}, build):
        side = "a" if build.draw(prompt, one, other).random() < 0.5 else "b"
        a, b = (other, one) if side == "a" else (one, other)
        yield {"id": name, "prompt": prompt, "response_a": a, "response_b": b, AFTER: side}


def _joined(files: dict[str, Sequence[Row]], build: Build) -> Iterator[tuple[str, Any, str, str]]:
    """(id, prompt, response, the other's response) of two files, by their names; what cannot be compared is counted."""
    one, other = ({str(row["id"]) for row in rows} for rows in files.values())
    build.dropped["in one file only"] += len(one ^ other)
    first, second = (
        _by_id([row for row in rows if str(row["id"]) in one & other], build, which) for which, rows in files.items()
    )
    for name in (name for name in first if name in second):
        (prompt, response), (prompt_too, response_too) = first[name], second[name]
        if as_text(prompt) != as_text(prompt_too):
            raise UsageError(f"row '{name}': the prompts of the two files differ")
        if response == response_too:
            build.dropped["equal responses"] += 1
        else:
            yield name, prompt, response, response_too


def _by_id(rows: Sequence[Row], build: Build, which: str) -> dict[str, tuple[Any, str]]:
    names = Counter(str(row["id"]) for row in rows)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"row '{twice}': its id is there twice in the {which} file, so rows cannot be joined by it")
    return {name: (row["prompt"], found[0]) for row, name, found in answers(rows, build, f" ({which})")}
