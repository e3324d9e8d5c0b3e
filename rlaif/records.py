"""The nouns that flow through the toolkit: requests, completions, votes, preferences, and the errors that stop them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Row = dict[str, Any]
"""One row of input data: column name to value."""

Status = Literal["ok", "tie", "unparsed", "refused", "error"]
"""What became of a judgement. Only `ok` and `tie` carry a label; the others are failures, kept and counted."""

Label = Literal["a", "b", "tie"]

STATUSES: tuple[Status, ...] = ("ok", "tie", "unparsed", "refused", "error")
LABELLED: frozenset[str] = frozenset({"ok", "tie"})
RETRIED: frozenset[str] = frozenset({"unparsed", "error"})


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One call to a language model.

    `prefix` begins the assistant's turn where the engine can continue a turn, and is dropped where it cannot.
    `choices` are the texts of which the log-probability as the next token is wanted (empty: none wanted).
    `sample` tells repeated draws of one prompt apart. `stop` are texts before the first of which the answer ends. `logprob`
    asks for the log-probability of the answer as a whole. `hint` carries planted facts to the mock engine; no other engine
    reads it, and it is not part of the key.
    """

    messages: tuple[Message, ...]
    prefix: str = ""
    choices: tuple[str, ...] = ()
    max_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    sample: int = 0
    stop: tuple[str, ...] = ()
    logprob: bool = False
    hint: Mapping[str, Any] | None = None

    def key(self, engine: Mapping[str, Any]) -> str:
        """SHA-256 of everything that can change the answer; `engine` is the engine's `identity`."""
        content = {
            "engine": dict(engine),
            "messages": self.messages,
            "prefix": self.prefix,
            "choices": self.choices,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "sample": self.sample,
        }
        if self.stop:
            content["stop"] = self.stop
        if self.logprob:
            content["logprob"] = True
        return digest(content)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered, before anything is read into it.

    `logprobs` maps each choice to its natural log-probability as the first token of the answer; a choice that the
    server did not report is missing. `None` means that the engine gives no log-probabilities at all.
    `logprob` is the natural log-probability of all generated tokens together, under the model itself (temperature 1,
    top_p 1), where the request wants it and the engine can tell. What ended the answer counts too: the end-of-turn token,
    and the tokens of the stop text, though `text` ends before it.
    `floor` is the least log-probability the server reported, so a bound for a missing choice.
    `cost` is in US dollars where the server or the given prices tell it.
    """

    text: str
    logprobs: dict[str, float] | None = None
    floor: float | None = None
    finish: str | None = None
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    logprob: float | None = None
    key: str = ""


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class RlaifError(Exception):
    """A failure that a user can act on: shown as one line, without a traceback."""

    exit_code = 1


class UsageError(RlaifError):
    """Bad arguments or bad input, found before any money or time is spent."""

    exit_code = 2


class FatalError(RlaifError):
    """A failure that every further call would meet too (wrong key, unknown model): the run stops at once."""


class RowError(RlaifError):
    """A failure that belongs to one row only (its prompt exceeds the context): the row's status becomes `error`."""


class RefusedError(RlaifError):
    """The server refused this content (a filter): the row's status becomes `refused`."""


class NoLogprobsError(RlaifError):
    """The engine gives no log-probabilities; `completion` is what it answered instead, None where it was not asked."""

    def __init__(self, message: str, completion: Completion | None = None):
        super().__init__(message)
        self.completion = completion


class TransientError(RlaifError):
    """A failure that may pass (rate limit, server fault, time-out, dropped connection): tried again.

    `retry_after` is the wait in seconds that the server asked for.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class BusyError(TransientError):
    """The server has enough (429): fewer calls are sent at once, and this one again; no failure while others get through."""
