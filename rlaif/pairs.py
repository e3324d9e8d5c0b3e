"""Training sets from labelled or ranked rows, in the preference columns that TRL's trainers take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlaif.data import ASSISTANT, as_messages, as_text, is_dialogue
from rlaif.label.pairwise import hard_label
from rlaif.records import LABELLED, Row, UsageError

COMPARED = ("id", "prompt", "response_a", "response_b", "status", "soft_label", "label")
RANKED = ("id", "prompt", "responses", "status", "pairs")
"""Columns that a labelled row has, and those of a ranked one."""


@dataclass
class PairSettings:
    """Which rows become pairs, and how.

    `min_confidence`: the least P(chosen is better), from .5 to 1. `hard`: every pair's soft label is 1 (ties then have
    no place). `drop_ties`: leave ties out; else their soft label is .5 and response A stands as chosen.
    `conversational`: lists of messages instead of plain text.
    """

    min_confidence: float = 0.5
    hard: bool = False
    drop_ties: bool = False
    conversational: bool = False
    dropped: Counter[str] = field(default_factory=Counter)


def training_pairs(rows: Iterable[Row], settings: PairSettings) -> Iterator[Row]:
    """Pairs with `id`, `prompt`, `chosen`, `rejected`, `soft_label` (P(chosen is better), at least .5) and `margin`.

    The margin is how far the labeler prefers the chosen response, 2·P − 1 of its own soft label, in [0, 1]. Each pair of a
    ranked row is one, with the row's id as its `group`, for what is learnt from them must be learnt from all together
    (InstructGPT, arXiv 2203.02155, §3.5); its `id` adds the indices of the two responses. What gives no pair is counted in
    `settings.dropped` by the reason why.

    Raises: UsageError for a labelled row whose label is not that of its soft label, for then one of them is not ours.
    """
    for row in rows:
        ranked = is_ranked(row)
        for comparison in _comparisons(row) if ranked else [row]:
            reason = _reason(comparison, settings)
            if reason:
                settings.dropped[reason] += 1
                continue
            pair = _pair(comparison, settings)
            yield {"id": pair["id"], "group": row["id"], **pair} if ranked else pair


def is_ranked(row: Row) -> bool:
    """Whether the row is one of `rlaif rank`, not of `rlaif label`."""
    return "pairs" in row and "soft_label" not in row


def _comparisons(row: Row) -> list[Row]:
    """Each pair of a ranked row as a labelled row; the row itself where it failed and has none."""
    if row["status"] not in LABELLED:
        return [row]
    return [_comparison(row, pair) for pair in row["pairs"]]


def _comparison(row: Row, pair: Row) -> Row:
    try:
        i, j, soft = pair["chosen"], pair["rejected"], pair["soft_label"]
        if min(i, j) < 0 or i == j or not 0.5 - 1e-9 <= soft <= 1:
            raise ValueError
        texts = {"prompt": row["prompt"], "response_a": row["responses"][i], "response_b": row["responses"][j]}
    except (KeyError, IndexError, TypeError, ValueError):
        raise UsageError(f"row '{row['id']}': {pair} is no pair of its responses, or not with the better one chosen") from None
    return {"id": f"{row['id']}/{i}-{j}", **texts, "status": "ok", "soft_label": soft, "label": hard_label(soft)}


def _reason(row: Row, settings: PairSettings) -> str | None:
    if row["status"] not in LABELLED:
        return str(row["status"])
    soft = row["soft_label"]
    if not isinstance(soft, float | int) or not 0 <= soft <= 1 or row["label"] != hard_label(soft):
        raise UsageError(f"row '{row['id']}': label {row['label']!r} and soft_label {soft!r} do not belong together")
    if row["label"] == "tie" and (settings.drop_ties or settings.hard):
        return "tie"
    if max(soft, 1 - soft) < settings.min_confidence:
        return "below the minimum confidence"
    return None


def _pair(row: Row, settings: PairSettings) -> Row:
    a_is_chosen = row["label"] != "b"
    soft = row["soft_label"] if a_is_chosen else 1 - row["soft_label"]
    # A tie is .5 but for rounding: never less than an even chance of what stands as chosen.
    soft = max(0.5, soft)
    chosen, rejected = (row["response_a"], row["response_b"]) if a_is_chosen else (row["response_b"], row["response_a"])
    return {
        "id": row["id"],
        **texts(row["prompt"], settings.conversational, chosen=chosen, rejected=rejected),
        "soft_label": 1.0 if settings.hard else soft,
        "margin": 2 * soft - 1,
    }


def texts(prompt: Any, conversational: bool, **responses: str) -> dict[str, Any]:
    """`prompt` and the responses, under their names, as TRL takes them: texts, or lists of messages.

    >>> texts("Human: Hi", False, completion="Yes?")
    {'prompt': 'Human: Hi\\n\\nAssistant:', 'completion': ' Yes?'}
    """
    if not conversational:
        text = as_text(prompt) or ""
        if is_dialogue(text):
            # Trainers put prompt and response together as they are: the turn begins as in hh-rlhf's own dialogues.
            text, responses = text + ASSISTANT, {name: f" {response}" for name, response in responses.items()}
        return {"prompt": text, **responses}
    answers = {name: [{"role": "assistant", "content": response}] for name, response in responses.items()}
    return {"prompt": as_messages(prompt), **answers}
