"""Sampling responses to prompts, from any engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rlaif.data import Item, as_messages
from rlaif.label.judge import Ask, worst
from rlaif.prompts import Template, fence, load_template
from rlaif.records import Completion, Message, RefusedError, Request, Row, RowError, UsageError
from rlaif.yamlfile import YamlFile, load, named


class Answered(BaseModel):
    """A question with a good answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Answers(YamlFile):
    """A file of such questions, for in-context alignment."""

    exemplars: tuple[Answered, ...] = Field(min_length=1)


@dataclass(frozen=True)
class InContext:
    """A template that shows such questions before the prompt (URIAL, Lin et al., arXiv 2312.01552)."""

    template: Template
    answers: Answers

    def settings(self) -> dict[str, Any]:
        return {"template": self.template.name, "template_hash": self.template.hash, "exemplars_hash": self.answers.hash}


def load_icl(name: str) -> InContext:
    """A shipped template of the kind `sample` by its name, or a user's by its path, with the exemplars that it names.

    Raises: UsageError for an unknown name, or a template that names no exemplars.
    """
    template = load_template(name, "sample")
    if template.exemplars is None:
        raise UsageError(f"template {name}: names no exemplars")
    return InContext(template, load(Answers, named("prompts/answers", template.exemplars)))


@dataclass(frozen=True)
class Sampler:
    """Draws `count` responses a prompt.

    A prompt's turns are sent as a conversation, after `system` where the prompt has no such turn of its own; with `icl` they
    become one text after its preamble and questions with answers, so that a base model can be sampled.
    `unique` leaves out what an earlier response of the row says word for word.

    Raises: UsageError for settings that do not go together.
    """

    count: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    system: str | None = None
    stop: tuple[str, ...] = ()
    icl: InContext | None = None
    unique: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count > 1 and self.temperature == 0:
            raise UsageError(f"{self.count} samples at temperature 0 would all be the same: give a temperature above 0")
        if self.icl and self.system:
            raise UsageError("--system does not go with --icl, whose preamble stands in its place")

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a response."""
        return {
            "method": "sample",
            "count": self.count,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "system": self.system,
            "stop": list(self.stop),
            "icl": self.icl.settings() if self.icl else None,
            "unique": self.unique,
            "seed": self.seed,
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return {"responses": None, "samples": [], "status": "error", "error": problem}

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`responses`, texts; `samples`, all that was drawn, each with its status; `status`, `error`.

        An empty text is no response. A row fails where a call failed, or where no response came of it.
        """
        messages, prefix = self._messages(item)
        stop = (*self.stop, *(self.icl.template.stop if self.icl else ()))
        requests = (
            Request(
                messages,
                prefix,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                sample=n,
                stop=stop,
                logprob=True,
                hint={"form": "sample"},
            )
            for n in range(self.count)
        )
        samples = await asyncio.gather(*(_sample(request, ask) for request in requests))
        texts = [sample["text"] for sample in samples if sample["status"] == "ok"]
        if not texts or any(sample["status"] == "error" for sample in samples):
            status, error = worst(samples)
            return {"responses": None, "samples": list(samples), "status": status, "error": error}
        responses = list(dict.fromkeys(texts)) if self.unique else texts
        return {"responses": responses, "samples": list(samples), "status": "ok", "error": None}

    def _messages(self, item: Item) -> tuple[tuple[Message, ...], str]:
        if self.icl:
            exemplars = [e.model_dump() for e in self.icl.answers.exemplars]
            return self.icl.template.render(prompt=item.prompt, row=item.row, exemplars=exemplars)
        turns = as_messages(item.row["prompt"])
        if self.system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        return conversation(turns), ""


def conversation(turns: list[dict[str, str]]) -> tuple[Message, ...]:
    """Turns as messages whose contents cannot pass for a control token."""
    return tuple({"role": turn["role"], "content": fence(turn["content"], frozenset())} for turn in turns)  # type: ignore[typeddict-item]


async def _sample(request: Request, ask: Ask) -> dict[str, Any]:
    """One draw: `status`, `text`, `finish`, `completion_tokens`, `logprob`, `error`, `key`."""
    try:
        completion = await ask(request)
    except (RowError, RefusedError) as error:
        status = "refused" if isinstance(error, RefusedError) else "error"
        return _drawn(status, Completion(""), str(error))
    text = completion.text.strip()
    refused = completion.refusal or completion.finish == "content_filter"
    return _drawn("refused" if refused else "ok" if text else "unparsed", completion, None)


def _drawn(status: str, completion: Completion, error: str | None) -> dict[str, Any]:
    return {
        "status": status,
        "text": completion.refusal or completion.text.strip(),
        "finish": completion.finish,
        "completion_tokens": completion.completion_tokens,
        "logprob": completion.logprob,
        "error": error,
        "key": completion.key,
    }
