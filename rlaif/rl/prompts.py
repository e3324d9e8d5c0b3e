"""The prompts of a run: read and checked before a model loads, turned into tokens, and dealt out step by step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

from rlaif.data import ASSISTANT, as_messages, as_text, kind_of, read_rows, split_response
from rlaif.engines.chat import Chat
from rlaif.pairs import texts
from rlaif.records import Message, Request, Row, RowError, UsageError
from rlaif.rl.config import Rollouts
from rlaif.train.data import BadRow, Rows, guarded
from rlaif.train.run import read_both


def read(config: Rollouts) -> tuple[Rows, Rows | None]:
    """Rows of `prompt`, and those held out; or of whole dialogues, `chosen`, whose last answer is taken off.

    All other columns stay, for rewards to read.

    Raises: UsageError naming file, row and column of a prompt that is missing, empty or no text.
    """
    return read_both(config, partial(_read, config))


def _read(config: Rollouts, source: str, limit: int | None) -> Rows:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for where, row in islice(read_rows(source), limit):
        try:
            rows.append(_with_prompt(config, row, where))
        except BadRow:
            if config.bad_rows == "stop":
                raise
            dropped["that cannot be trained on"] += 1
    if not rows:
        raise UsageError(f"{source}: no rows" + (f" that can be trained on, of {dropped.total()}" if dropped else ""))
    return Rows(source, rows, dropped)


def _with_prompt(config: Rollouts, row: Row, where: str) -> Row:
    if "prompt" not in row and "chosen" not in row:
        raise UsageError(f"{where}: no column 'prompt'; there are: {', '.join(row)}")
    given = "prompt" in row
    prompt = row["prompt"] if given else split_response(row["chosen"], None)[0]
    column, expected = ("prompt", "text or messages") if given else ("chosen", "a dialogue ending with an assistant turn")
    text = as_text(prompt)
    if text is None:
        raise BadRow(f"{where}: column '{column}': expected {expected}, got {kind_of(row[column])}")
    if not text.strip():
        raise BadRow(f"{where}: column '{column}' {'is' if given else 'has a prompt that is'} empty")
    if config.form == "conversational" or (config.form == "auto" and not (given and isinstance(prompt, str))):
        prompt = as_messages(prompt.removesuffix(ASSISTANT) if isinstance(prompt, str) else prompt)
    elif not (given and isinstance(prompt, str)):
        prompt = texts(prompt, False)["prompt"]
    return {**row, "prompt": prompt}


def fitting(found: Rows, config: Rollouts, tokenizer: Any) -> Rows:
    """The rows whose prompts leave room for a response; the others are counted. No message can end its own turn.

    Raises: UsageError where none is left.
    """
    most, encode = config.max_length - config.max_new_tokens, Encoder(tokenizer)

    def problem(row: Row) -> str | None:
        try:
            return f"over {most} tokens" if len(encode(row["prompt"])) > most else None
        except RowError:
            return "with a control token"

    problems = [problem(row) for row in found.rows]
    kept = [row for row, wrong in zip(found.rows, problems, strict=True) if not wrong]
    dropped = Counter(wrong for wrong in problems if wrong)
    if not kept:
        why = ", ".join(f"{count} {wrong}" for wrong, count in dropped.items())
        raise UsageError(f"{found.source}: no prompt that leaves room for max_new_tokens in max_length: {why}")
    left = replace(found, rows=kept, dropped=found.dropped + dropped)
    safe = guarded(replace(left, rows=[{"prompt": row["prompt"]} for row in kept]), tokenizer).rows
    return replace(left, rows=[{**row, **own} for row, own in zip(kept, safe, strict=True)])


class Encoder:
    """Tokens of a prompt that a response is to follow: messages by the chat template, texts as they are."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer, str(tokenizer.name_or_path))

    def __call__(self, prompt: Any) -> list[int]:
        """Raises: UsageError for messages without a chat template; RowError for a control token that cannot be broken."""
        if not isinstance(prompt, list):
            return list(self._tokenizer(prompt.encode("utf-8", "replace").decode())["input_ids"])
        if not self._tokenizer.chat_template:
            raise UsageError(f"{self._chat.model} has no chat template, which messages need: take texts, as with form: plain")
        return self._chat.render(Request(cast(tuple[Message, ...], tuple(prompt))))


def deal(count: int, start: int, number: int, seed: int) -> list[int]:
    """Places in a list of `count` rows of the prompts `start` to `start + number` of an endless series.

    Each time through, all rows come in an order of their own; it depends on nothing but the seed, so that a run which goes
    on from a checkpoint, or on other processes, meets the same prompts.

    >>> sorted(deal(3, 0, 3, 0)), deal(3, 1, 2, 0) == deal(3, 0, 3, 0)[1:]
    ([0, 1, 2], True)
    """
    return list(islice(_series(count, start, seed), number))


def _series(count: int, start: int, seed: int) -> Iterator[int]:
    through, place = divmod(start, count)
    while True:
        order = list(range(count))
        random.Random(f"{seed}/{through}").shuffle(order)
        yield from order[place:]
        through, place = through + 1, 0
