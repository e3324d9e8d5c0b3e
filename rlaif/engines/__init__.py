"""Engines: what answers a request. A new backend is one file with a class that has the four members of `Engine`."""

from __future__ import annotations

import inspect
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


def make_engine(name: str, **settings: Any) -> Engine:
    """The engine of this name; `settings` are its constructor's arguments, those that are None left out.

    Raises: UsageError for an unknown name or setting, FatalError where the engine cannot start (package or model missing).
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}': choose one of {', '.join(sorted(ENGINES))}")
    module, cls = ENGINES[name]
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
