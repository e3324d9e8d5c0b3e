"""Training rows: read, checked before any model loads, and split into what is trained on and what is held out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import jinja2

from rlaif.data import ASSISTANT, as_text, kind_of, read_rows, split_response
from rlaif.pairs import texts
from rlaif.provenance import sha256
from rlaif.records import Row, RowError, UsageError, digest

Form = Literal["auto", "plain", "conversational"]


@dataclass
class Rows:
    """Checked rows of a source, all in one form. `dropped` counts those that are left out, by the reason why.

    `files` are its files where it has several.

    Pairs have `prompt`, `chosen`, `rejected`, and `soft_label`, `margin`, `group`, `head` where these are wanted and there;
    unpaired rows `prompt`, `completion` and perhaps `label`; documents `text`. Texts, or lists of messages, as TRL takes them.
    """

    source: str
    rows: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    files: tuple[str, ...] = ()

    @property
    def conversational(self) -> bool:
        return isinstance(next(iter(self.rows[0].values())), list)

    def facts(self) -> dict[str, Any]:
        found = [sha256(name) for name in self.files or (self.source,)]
        hashes = ", ".join(value or "?" for value in found) if any(found) else None
        return {"source": self.source, "sha256": hashes, "rows": len(self.rows), "left_out": dict(self.dropped)}


class BadRow(UsageError):
    """A row that cannot be trained on; with `bad_rows: drop` it is left out, and counted."""


# ---------------------------------------------------------------- reading


def pairs(
    source: str, form: Form = "auto", limit: int | None = None, wanted: Sequence[str] = (), drop_bad: bool = False
) -> Rows:
    """Rows of `chosen` and `rejected`, with `prompt` or as whole dialogues, and the columns `wanted` where there are such.

    With `drop_bad`, rows that cannot be trained on are left out, and counted.

    Raises: UsageError naming file, row and column of what is missing or wrong, or a file without rows.
    """

    def pair(row: Row, where: str) -> Row:
        prompt, chosen, rejected = _sides(row, where)
        if chosen == rejected:
            raise BadRow(f"{where}: columns 'chosen' and 'rejected' are identical: there is nothing to compare")
        made = _formed(row, _form(form, row, "chosen"), prompt, chosen=chosen, rejected=rejected)
        return made | {name: row[name] for name in wanted if name in row}

    return _read(source, limit, pair, wanted, drop_bad)


def answers(source: str, form: Form = "auto", limit: int | None = None, labelled: bool = False, drop_bad: bool = False) -> Rows:
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
            raise BadRow(f"{where}: column 'label': expected true or false, got {kind_of(row['label'])}")
        return made | ({"label": row["label"]} if labelled else {})

    found = _read(source, limit, answer, (), drop_bad)
    if labelled:
        check_classes(found)
    return found


def check_classes(found: Rows) -> None:
    """Raises: UsageError where all rows of `label` have the same."""
    if len({row["label"] for row in found.rows}) < 2:
        only = "desirable" if found.rows[0]["label"] else "undesirable"
        raise UsageError(f"{found.source}: column 'label': every row is {only}; there is nothing to tell apart")


def documents(source: str, limit: int | None = None, drop_bad: bool = False) -> Rows:
    """Rows of `text` alone. Raises: as `pairs`."""

    def document(row: Row, where: str) -> Row:
        _require(row, where, ("text",))
        if not isinstance(row["text"], str):
            raise BadRow(f"{where}: column 'text': expected text, got {kind_of(row['text'])}")
        if not row["text"].strip():
            raise BadRow(f"{where}: column 'text' is empty")
        return {"text": row["text"]}

    return _read(source, limit, document, (), drop_bad)


def points(source: str, form: Form = "auto", limit: int | None = None, drop_bad: bool = False, grouped: bool = True) -> Rows:
    """Rows of `prompt`, `response`, `score` and `group`, as `rlaif build groups` writes them. Raises: as `pairs`.

    Without `grouped` a row need have no group; it is then "".
    """

    def point(row: Row, where: str) -> Row:
        _require(row, where, ("prompt", "response", "score", *(("group",) if grouped else ())))
        _check_prompt(row, where)
        _check_response(row["response"] if isinstance(row["response"], str) else None, row["response"], where, "response")
        score, group = row["score"], row.get("group", "")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise BadRow(f"{where}: column 'score': expected a number, got {score!r}")
        if isinstance(group, bool) or not isinstance(group, str | int) or (grouped and not str(group).strip()):
            raise BadRow(f"{where}: column 'group': expected a group's name, got {group!r}")
        conversational = form == "conversational" or (form == "auto" and isinstance(row["prompt"], list))
        prompt, response = as_trained(row["prompt"], row["response"], conversational)
        return {"prompt": prompt, "response": response, "group": str(group), "score": float(score)}

    return _read(source, limit, point, (), drop_bad)


def is_unpaired(source: str) -> bool:
    """Whether the first row is one of `completion` and `label`, not of `chosen` and `rejected`."""
    first = _first(source)
    return "completion" in first and "chosen" not in first


def is_documents(source: str) -> bool:
    """Whether the first row has `text`, and nothing that would make it a prompt with an answer."""
    first = _first(source)
    return "text" in first and not first.keys() & {"prompt", "completion", "messages"}


def _first(source: str) -> Row:
    return next((row for _, row in read_rows(source)), {})


def _read(source: str, limit: int | None, made: Callable[[Row, str], Row], numbers: Sequence[str], drop_bad: bool) -> Rows:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    columns: set[str] | None = None
    for where, row in islice(read_rows(source), limit):
        try:
            one = made(row, where)
            _check_values(one, where, numbers)
        except BadRow:
            if not drop_bad:
                raise
            dropped["that cannot be trained on"] += 1
            continue
        if columns is not None and set(one) != columns:
            name = sorted(columns ^ set(one))[0]
            raise UsageError(f"{where}: column '{name}' is in some rows and not in others")
        columns = set(one)
        if rows and isinstance(one.get("prompt"), list) != isinstance(rows[0].get("prompt"), list):
            raise UsageError(f"{where}: texts and lists of messages in one file: choose a form")
        rows.append(one)
    if not rows:
        raise UsageError(f"{source}: no rows" + (f" that can be trained on, of {dropped.total()}" if dropped else ""))
    return Rows(source, rows, dropped)


def _sides(row: Row, where: str) -> tuple[Any, str, str]:
    _require(row, where, ("chosen", "rejected"))
    if "prompt" in row:
        _check_prompt(row, where)
    first, chosen = split_response(row["chosen"], row.get("prompt"))
    second, rejected = split_response(row["rejected"], row.get("prompt"))
    _check_response(chosen, row["chosen"], where, "chosen")
    _check_response(rejected, row["rejected"], where, "rejected")
    if first != second:
        raise BadRow(f"{where}: columns 'chosen' and 'rejected' answer different prompts")
    return first, str(chosen), str(rejected)


def _require(row: Row, where: str, columns: Iterable[str]) -> None:
    for name in columns:
        if name not in row:
            made_by = "`rlaif pairs` and `rlaif build` write such files"
            raise UsageError(f"{where}: no column '{name}'; there are: {', '.join(row)} ({made_by})")


def _check_prompt(row: Row, where: str) -> None:
    text = as_text(row["prompt"])
    if text is None:
        raise BadRow(f"{where}: column 'prompt': expected text or messages, got {kind_of(row['prompt'])}")
    if not text.strip():
        raise BadRow(f"{where}: column 'prompt' is empty")


def _check_response(text: str | None, value: Any, where: str, column: str) -> None:
    if text is None:
        raise BadRow(
            f"{where}: column '{column}': expected text, or messages ending with the assistant's, got {kind_of(value)}"
        )
    if not text.strip():
        raise BadRow(f"{where}: column '{column}' is empty")


def _check_values(row: Row, where: str, columns: Iterable[str]) -> None:
    for name in {"soft_label", "margin"} & set(columns) & set(row):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadRow(f"{where}: column '{name}': expected a number, got {value!r}")
        if name == "soft_label" and not 0 <= value <= 1:
            raise BadRow(f"{where}: column 'soft_label': expected a probability from 0 to 1, got {value!r}")
    if "group" in columns and "group" in row and type(row["group"]) not in (str, int):
        raise BadRow(f"{where}: column 'group': expected text or a whole number, got {kind_of(row['group'])}")


def _from_messages(row: Row, where: str) -> Row:
    prompt, completion = split_response(row["messages"], None)
    if completion is None or not prompt:
        raise BadRow(f"{where}: column 'messages': expected turns that end with the assistant's")
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
        responses = {name: text.removeprefix(" ") for name, text in responses.items()}
    return texts(prompt, conversational, **responses)


def as_trained(prompt: Any, response: str, conversational: bool) -> tuple[Any, Any]:
    """A row's prompt and response in the form of a model's training rows, for that model to score.

    A dialogue's text gets the beginning of the assistant's turn, as `rlaif pairs` writes it, where neither of them has it.
    """
    turn = ASSISTANT.strip()
    begun = isinstance(prompt, str) and (prompt.rstrip().endswith(turn) or response.lstrip().startswith(turn))
    if conversational or begun:
        made = _formed({"prompt": prompt}, conversational, prompt, response=response)
    else:
        made = texts(prompt, False, response=response)
    return made["prompt"], made["response"]


# ---------------------------------------------------------------- parts


def held_out(found: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """What is trained on, and about that share of the prompts, all rows of a prompt on one side; None for a share of 0.

    Raises: UsageError where one side would be empty.
    """
    if not share:
        return found, None
    keys = [digest(row.get("prompt", row)) for row in found.rows]
    numbers = {key: int(digest([seed, key])[:12], 16) / 16**12 for key in set(keys)}
    kept, held = replace(found, rows=[]), replace(found, rows=[], dropped=Counter())
    for row, key in zip(found.rows, keys, strict=True):
        (held if numbers[key] < share else kept).rows.append(row)
    if not kept.rows or not held.rows:
        raise UsageError(f"{found.source}: eval_share {share:g} of {len(numbers)} prompts leaves one side empty")
    return kept, held


Encode = Callable[[Any, Any], list[int]]
"""(prompt, response) to the tokens of both together."""


def encoder(tokenizer: Any) -> Encode:
    """Tokens of a prompt with its response, by the chat template for messages; plain texts end with the EOS token.

    No message can end its own turn: what would be a control token or a marker of the template in it is broken, as for
    labelers. Plain texts may hold such tokens, for they are their author's own rendering.

    Raises: UsageError for messages where the tokenizer has no chat template; RowError where that refuses them.
    """
    from rlaif.engines.chat import Chat

    name = str(tokenizer.name_or_path)
    guard = Chat(tokenizer, name).guard

    def encode(prompt: Any, response: Any) -> list[int]:
        if isinstance(prompt, list):
            if not tokenizer.chat_template:
                raise UsageError(f"{name} has no chat template, which messages need: take texts, as with form: plain")
            turns = [{**turn, "content": guard(turn["content"])} for turn in prompt + response]
            try:
                return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
            except jinja2.TemplateError as error:
                raise RowError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from error
        text = (prompt + response).encode("utf-8", "replace").decode()  # no tokenizer takes lone surrogates
        end = tokenizer.eos_token or ""
        return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])

    return encode


def ready(found: Rows, config: Any, tokenizer: Any) -> Rows:
    """The rows that `max_length` holds, guarded. Raises: UsageError where none is left."""
    row = found.rows[0]
    columns = ("chosen", "rejected") if "chosen" in row else ("text",) if "text" in row else ("completion",)
    return guarded(fitting(found, columns, config.max_length, encoder(tokenizer)), tokenizer)


def guarded(found: Rows, tokenizer: Any) -> Rows:
    """The rows as an encoder reads them, for trainers that make tokens of them by themselves."""
    from rlaif.engines.chat import Chat

    guard = Chat(tokenizer, str(tokenizer.name_or_path)).guard

    def safe(value: Any) -> Any:
        if isinstance(value, list):
            return [{**turn, "content": guard(turn["content"])} for turn in value]
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    rows = [{name: safe(value) for name, value in row.items()} for row in found.rows]
    return replace(found, rows=rows)


def fitting(found: Rows, columns: Sequence[str], most: int, encode: Encode) -> Rows:
    """The rows whose responses, each with its prompt, have at most so many tokens; the others are counted.

    Raises: UsageError where none is left.
    """
    fits = [all(len(encode(row.get("prompt", ""), row[name])) <= most for name in columns) for row in found.rows]
    if not any(fits):
        raise UsageError(f"{found.source}: all {len(fits)} rows are longer than max_length, {most} tokens")
    left = replace(found, rows=[row for row, fit in zip(found.rows, fits, strict=True) if fit])
    left.dropped[f"over {most} tokens"] += len(fits) - sum(fits)
    return left
