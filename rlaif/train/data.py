"""Training rows: read, checked before any model loads, and split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlaif.data import ASSISTANT, as_messages, as_text, kind_of, read_rows, split_response
from rlaif.pairs import texts
from rlaif.records import Row, UsageError, digest

Form = Literal["auto", "plain", "conversational"]


@dataclass
class Rows:
    """Checked rows of one source, all in one form. `dropped` counts those that are left out, by the reason why.

    Pairs have `prompt`, `chosen`, `rejected`, and `soft_label`, `margin`, `group`, `head` where these are wanted and there;
    unpaired rows `prompt`, `completion` and perhaps `label`. Texts, or lists of messages, as TRL takes them.
    """

    source: str
    rows: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def conversational(self) -> bool:
        return isinstance(next(iter(self.rows[0].values())), list)

    def facts(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": sha256(self.source), "rows": len(self.rows), "left_out": dict(self.dropped)}


def sha256(source: str) -> str | None:
    """Of a file's bytes; None for what is no file (a hub name, a saved dataset)."""
    path = Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- reading


def pairs(source: str, form: Form = "auto", limit: int | None = None, wanted: Sequence[str] = ()) -> Rows:
    """Rows of `chosen` and `rejected`, with `prompt` or as whole dialogues, and the columns `wanted` where there are such.

    Raises: UsageError naming file, row and column of what is missing or wrong, or a file without rows.
    """

    def pair(row: Row, where: str) -> Row:
        prompt, chosen, rejected = _sides(row, where)
        if chosen == rejected:
            raise UsageError(f"{where}: columns 'chosen' and 'rejected' are identical: there is nothing to compare")
        made = _formed(row, _form(form, row, "chosen"), prompt, chosen=chosen, rejected=rejected)
        return made | {name: row[name] for name in wanted if name in row}

    return _read(source, limit, pair, wanted)


def answers(source: str, form: Form = "auto", limit: int | None = None, labelled: bool = False) -> Rows:
    """Rows of `prompt` and `completion`, or `messages`; with `labelled`, of `label` too, true or false. Raises: as `pairs`."""

    def answer(row: Row, where: str) -> Row:
        if "messages" in row and "completion" not in row and not labelled:
            row = _from_messages(row, where)
        _require(row, where, ("prompt", "completion", *(("label",) if labelled else ())))
        prompt, completion = split_response(row["completion"], row["prompt"])
        _check_prompt(row, where)
        _check_response(completion, row["completion"], where, "completion")
        made = _formed(row, _form(form, row, "completion"), prompt, completion=str(completion))
        if labelled and not isinstance(row["label"], bool):
            raise UsageError(f"{where}: column 'label': expected true or false, got {kind_of(row['label'])}")
        return made | ({"label": row["label"]} if labelled else {})

    found = _read(source, limit, answer, ())
    if labelled and len({row["label"] for row in found.rows}) < 2:
        only = "desirable" if found.rows[0]["label"] else "undesirable"
        raise UsageError(f"{source}: column 'label': every row is {only}; there is nothing to tell apart")
    return found


def is_unpaired(source: str) -> bool:
    """Whether the first row is one of `completion` and `label`, not of `chosen` and `rejected`."""
    first = next((row for _, row in read_rows(source)), {})
    return "completion" in first and "chosen" not in first


def _read(source: str, limit: int | None, made: Callable[[Row, str], Row], numbers: Sequence[str]) -> Rows:
    rows: list[Row] = []
    columns: set[str] | None = None
    for where, row in islice(read_rows(source), limit):
        one = made(row, where)
        if columns is not None and set(one) != columns:
            name = sorted(columns ^ set(one))[0]
            raise UsageError(f"{where}: column '{name}' is in some rows and not in others")
        columns = set(one)
        if rows and isinstance(one["prompt"], str) != isinstance(rows[0]["prompt"], str):
            raise UsageError(f"{where}: texts and lists of messages in one file: choose a form")
        _check_numbers(one, where, numbers)
        rows.append(one)
    if not rows:
        raise UsageError(f"{source}: no rows")
    return Rows(source, rows)


def _sides(row: Row, where: str) -> tuple[Any, str, str]:
    _require(row, where, ("chosen", "rejected"))
    if "prompt" in row:
        _check_prompt(row, where)
    first, chosen = split_response(row["chosen"], row.get("prompt"))
    second, rejected = split_response(row["rejected"], row.get("prompt"))
    _check_response(chosen, row["chosen"], where, "chosen")
    _check_response(rejected, row["rejected"], where, "rejected")
    if first != second:
        raise UsageError(f"{where}: columns 'chosen' and 'rejected' answer different prompts")
    return first, str(chosen), str(rejected)


def _require(row: Row, where: str, columns: Iterable[str]) -> None:
    for name in columns:
        if name not in row:
            made_by = "`rlaif pairs` and `rlaif build` write such files"
            raise UsageError(f"{where}: no column '{name}'; there are: {', '.join(row)} ({made_by})")


def _check_prompt(row: Row, where: str) -> None:
    text = as_text(row["prompt"])
    if text is None:
        raise UsageError(f"{where}: column 'prompt': expected text or messages, got {kind_of(row['prompt'])}")
    if not text.strip():
        raise UsageError(f"{where}: column 'prompt' is empty")


def _check_response(text: str | None, value: Any, where: str, column: str) -> None:
    if text is None:
        raise UsageError(
            f"{where}: column '{column}': expected text, or messages ending with the assistant's, got {kind_of(value)}"
        )
    if not text.strip():
        raise UsageError(f"{where}: column '{column}' is empty")


def _check_numbers(row: Row, where: str, columns: Iterable[str]) -> None:
    for name in {"soft_label", "margin"} & set(columns) & set(row):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{where}: column '{name}': expected a number, got {value!r}")
        if name == "soft_label" and not 0 <= value <= 1:
            raise UsageError(f"{where}: column 'soft_label': expected a probability from 0 to 1, got {value!r}")


def _from_messages(row: Row, where: str) -> Row:
    prompt, completion = split_response(row["messages"], None)
    if completion is None or not prompt:
        raise UsageError(f"{where}: column 'messages': expected turns that end with the assistant's")
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


# ---------------------------------------------------------------- forms


def _form(form: Form, row: Row, column: str) -> bool:
    """Whether the row becomes messages."""
    if form == "auto":
        return isinstance(row[column], list) or "prompt" not in row
    return form == "conversational"


def _formed(row: Row, conversational: bool, prompt: Any, **responses: str) -> Row:
    """The row's texts in one form; those that are in it already stay as they are."""
    was_plain = isinstance(row.get("prompt"), str)
    if was_plain and not conversational:
        return {"prompt": prompt, **responses}
    if was_plain and str(prompt).endswith(ASSISTANT):  # as `rlaif pairs` ends the prompt of a dialogue
        prompt = str(prompt).removesuffix(ASSISTANT)
        responses = {name: text.strip() for name, text in responses.items()}
    return texts(prompt, conversational, **responses) if conversational else texts(as_messages(prompt), False, **responses)


# ---------------------------------------------------------------- parts


def held_out(found: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """What is trained on, and about that share of the prompts, all rows of a prompt on one side; None for a share of 0.

    Raises: UsageError where one side would be empty.
    """
    if not share:
        return found, None
    numbers = {key: int(digest([seed, key])[:12], 16) / 16**12 for key in {digest(row["prompt"]) for row in found.rows}}
    kept, held = Rows(found.source, [], found.dropped), Rows(found.source, [])
    for row in found.rows:
        (held if numbers[digest(row["prompt"])] < share else kept).rows.append(row)
    if not kept.rows or not held.rows:
        raise UsageError(f"{found.source}: eval_share {share:g} of {len(numbers)} prompts leaves one side empty")
    return kept, held


Encode = Callable[[Any, Any], list[int]]
"""(prompt, response) to the tokens of both together."""


def encoder(tokenizer: Any) -> Encode:
    """Tokens of a prompt with its response, by the chat template for messages; plain texts end with the EOS token."""

    def encode(prompt: Any, response: Any) -> list[int]:
        if isinstance(prompt, list):
            return list(tokenizer.apply_chat_template(prompt + response, tokenize=True, return_dict=True)["input_ids"])
        text = prompt + response
        end = tokenizer.eos_token or ""
        return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])

    return encode


def fitting(found: Rows, columns: Sequence[str], most: int, encode: Encode) -> Rows:
    """The rows whose responses, each with its prompt, have at most so many tokens; the others are counted.

    Raises: UsageError where none is left.
    """
    fits = [all(len(encode(row["prompt"], row[name])) <= most for name in columns) for row in found.rows]
    if not any(fits):
        raise UsageError(f"{found.source}: all {len(fits)} rows are longer than max_length, {most} tokens")
    left = Rows(found.source, [row for row, fit in zip(found.rows, fits, strict=True) if fit], found.dropped)
    left.dropped[f"over {most} tokens"] += len(fits) - sum(fits)
    return left
