"""Engines: what answers a request. A new backend is one file with a class that has the four members of `Engine`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from rlaif.records import Completion, FatalError, Request, UsageError


class Engine(Protocol):
    """Answers requests. Made by `make_engine`; closed once at the end of a run.

    `identity` holds what, beside the request, can change an answer (engine's name, model, base URL, number format);
    it is part of each request's key and of the run file, so it never holds a secret.
    `notes` are remarks for the run file that the engine made on its way, each at most once.
    """

    identity: dict[str, Any]
    notes: list[str]

    async def complete(self, request: Request) -> Completion:
        """Answer one request; many run at once.

        Raises: TransientError (worth another try), RowError or RefusedError (this request only), FatalError (any request).
        """
        ...

    async def close(self) -> None:
        """Free what the engine holds (connections, processes, memory)."""
        ...


ENGINES = {
    "embedded": ("rlaif.engines.embedded", "EmbeddedEngine"),
    "mock": ("rlaif.engines.mock", "MockEngine"),
    "openai": ("rlaif.engines.openai", "OpenAIEngine"),
    "transformers": ("rlaif.engines.transformers", "TransformersEngine"),
    "vllm": ("rlaif.engines.vllm", "VllmEngine"),
}
"""Engine name to its module and class; imported only when asked for, for their packages are heavy."""

IN_PROCESS = ("embedded", "transformers", "vllm")
"""Engines that compute in this process, and so want its GPU or its cores."""

BATCHES = ("rlaif.engines.batch", "BatchEngine")
"""In place of the openai engine where it is given a `ledger`."""

INSTEAD: ContextVar[Callable[[str, str | None], Engine] | None] = ContextVar("instead", default=None)
"""What makes the engine in place of all of these, of a name and a model, while a run is only rehearsed."""


def make_engine(name: str, **settings: Any) -> Engine:
    """The engine of this name; `settings` are its constructor's arguments, those that are None left out.

    Raises: UsageError for an unknown name or setting, FatalError where the engine cannot start (package or model missing).
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}': choose one of {', '.join(sorted(ENGINES))}")
    if instead := INSTEAD.get():
        return instead(name, settings.get("model"))
    if name == "transformers" and settings.get("model") == "embedded":
        name = "embedded"
    module, cls = BATCHES if name == "openai" and settings.get("ledger") else ENGINES[name]
    try:
        made = getattr(import_module(module), cls)
    except ModuleNotFoundError as error:
        raise FatalError(f"engine {name}: the package {error.name} is not installed: pip install 'rlaif[{name}]'") from error
    given = {k: v for k, v in settings.items() if v is not None}
    known = inspect.signature(made).parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(f"engine {name} has no setting '{unknown[0]}'; it has {', '.join(known)}")
    try:
        engine: Engine = made(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"engine {name}: {error}") from error
    return engine


def beginnings(choices: tuple[str, ...]) -> dict[str, str]:
    """Choices that begin with another one, to the longest such other.

    >>> beginnings(("1", "2", "10"))
    {'10': '1'}
    """
    found = {c: [o for o in choices if c != o and c.startswith(o)] for c in choices}
    return {choice: max(others, key=len) for choice, others in found.items() if others}


async def whole_choices(
    request: Request, split: Mapping[str, str], complete: Callable[[Request], Awaitable[Completion]], first: Completion
) -> Completion:
    """The log-probabilities of choices that are not one token but begin with another choice, as `10` begins with `1`.

    `split` gives these and their beginnings, `first` the answer to the request without them. For each beginning one more
    request asks how probable it is to go on, by making it the beginning of the answer:
    P(10) = P(1)·P(0 | 1), and P(1) becomes P(1)·(1 − P(0 | 1)).
    """
    if first.logprobs is None:
        return first
    logprobs = dict(first.logprobs)
    read, written, cost = first.prompt_tokens, first.completion_tokens, first.cost
    for start in sorted(set(split.values())):  # `1` before `10`, which `100` begins with
        if start not in logprobs:
            continue
        tails = {choice[len(start) :]: choice for choice, own in split.items() if own == start}
        more = await complete(replace(request, prefix=request.prefix + start, choices=tuple(tails)))
        read, written = read + more.prompt_tokens, written + more.completion_tokens
        cost = cost if more.cost is None else (cost or 0.0) + more.cost
        if more.logprobs is None:
            continue
        base, found = logprobs[start], {tail: value for tail, value in more.logprobs.items() if tail in tails}
        logprobs |= {tails[tail]: base + value for tail, value in found.items()}
        logprobs[start] = base + math.log(max(1 - math.fsum(math.exp(value) for value in found.values()), 1e-12))
        if len(found) < len(tails) and more.floor is not None:
            # So improbable that the server does not report it: bounded by the least that it does.
            logprobs |= {tails[tail]: base + more.floor for tail in tails if tail not in found}
    return replace(first, logprobs=logprobs, prompt_tokens=read, completion_tokens=written, cost=cost)
