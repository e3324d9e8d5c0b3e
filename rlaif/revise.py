"""Revisions: critique and revision by the principles of a constitution, and CLAIR's minimal improvements."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rlaif.constitution import Constitution, Principle, load_constitution
from rlaif.data import Item
from rlaif.label.judge import REFUSAL, Ask
from rlaif.prompts import Template, load_template
from rlaif.records import Completion, Message, RefusedError, Request, Row, RowError, Status, UsageError, digest
from rlaif.yamlfile import YamlFile, load, named


class Critiqued(BaseModel):
    """An exemplar: a response, what was asked about it, its critique and its revision (the same text where all is well)."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    conversation: str = Field(min_length=1)
    response: str = Field(min_length=1)
    request: str = Field(min_length=1)
    critique: str = Field(min_length=1)
    revision_request: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class Critiques(YamlFile):
    """A file of exemplars for critique and revision."""

    exemplars: tuple[Critiqued, ...] = Field(min_length=1)


def load_critiques(name: str) -> Critiques:
    """A shipped file of exemplars by its name, or a user's by its path. Raises: UsageError naming file, exemplar and field."""
    return load(Critiques, named("prompts/critiques", name))


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn; `tokens` are the most of a critique, a revision or, for CLAIR, of both sections together."""

    temperature: float = 1.0
    top_p: float = 1.0
    tokens: int = 512
    seed: int = 0


CLAIR = Drawing(0.7, 1.0, 4096)
"""As the CLAIR paper draws its revisions."""


@dataclass(frozen=True)
class CritiqueReviser:
    """Constitutional AI's supervised stage (Bai et al., arXiv 2212.08073, §3): rounds of critique and revision.

    Each round has a principle drawn afresh, by its weight, the seed and the row; it criticises the response that the round
    before left, and revises it. Without `critique` the revision is asked for straight away (§3.5). `shots` exemplars of the
    file precede each call, fixed; some of them need no change.

    Raises: UsageError for more exemplars than there are, or a template without what is asked.
    """

    constitution: Constitution
    template: Template
    rounds: int = 4
    critique: bool = True
    shots: int = 0
    exemplars: Critiques | None = None
    drawing: Drawing = Drawing()

    def __post_init__(self) -> None:
        there = len(self.exemplars.exemplars) if self.exemplars else 0
        if self.shots > there:
            raise UsageError(f"--shots {self.shots}: there are {there} exemplars")
        for block in ("thinking", "ending"):
            if block not in self.template.blocks:
                raise UsageError(f"template {self.template.name}: critique and revision need a block '{block}'")

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a revision."""
        return {
            "method": "critique and revision",
            "constitution": {"constitution": self.constitution.name, "hash": self.constitution.hash},
            "template": self.template.name,
            "template_hash": self.template.hash,
            "rounds": self.rounds,
            "critique": self.critique,
            "shots": {"count": self.shots, "hash": self.exemplars.hash} if self.exemplars and self.shots else None,
            **asdict(self.drawing),
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _result([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`revisions`, one entry a round; `revised`, the last round's text; `status`, `error`.

        A round that fails ends the row, which keeps the rounds before it; they are asked for again only where they failed.
        """
        drawn = digest([item.row["prompt"], item.row["response"]])
        response, rounds = item.row["response"], []
        for number in range(1, self.rounds + 1):
            principle = self.constitution.drawn([self.drawing.seed, "revision", number], drawn, 1)[0]
            done = await self._round(item, response, principle, number, ask)
            rounds.append(done)
            if done["status"] != "ok":
                return _result(rounds, done["status"], done["error"])
            response = done["revision"]
        return _result(rounds, "ok", None)

    async def _round(self, item: Item, response: str, principle: Principle, number: int, ask: Ask) -> dict[str, Any]:
        values = self._values(item, response, principle)
        criticised, written = None, 0
        hint = {"text": response, "aspect": principle.name}
        if self.critique:
            messages, _ = self.template.render("thinking", **values)
            criticised, failure = await _drawn(messages, "", self.drawing, number, {**hint, "form": "critique"}, ask)
            written = criticised.completion_tokens
            status = failure[0] if failure else _status(criticised, may_be_cut=True)
            if status == "ok" and REFUSAL.match(criticised.text):
                status = "refused"
            if status != "ok":
                error = failure[1] if failure else None
                return _entry(number, principle, response, criticised.text, criticised, None, status, error)
            messages, prefix = self.template.render("thinking", rationale=criticised.text, **values)
        else:
            messages, prefix = self.template.render(**values)
        revised, failure = await _drawn(messages, prefix, self.drawing, number, {**hint, "form": "revision"}, ask)
        status, error = failure or (_status(revised), None)
        text = bare(revised.text)
        entry = _entry(
            number, principle, response, criticised.text.strip() if criticised else None, revised, text, status, error
        )
        return {**entry, "completion_tokens": revised.completion_tokens + written}

    def _values(self, item: Item, response: str, principle: Principle) -> dict[str, Any]:
        exemplars = [e.model_dump() for e in self.exemplars.exemplars[: self.shots]] if self.exemplars else []
        if not self.critique:
            exemplars = [{**e, "critique": ""} for e in exemplars]
        return {
            "prompt": item.prompt,
            "response": response,
            "row": item.row,
            "critique_request": principle.critique,
            "revision_request": principle.revision,
            "exemplars": exemplars,
        }


@dataclass(frozen=True)
class ClairReviser:
    """CLAIR's reviser (D'Oosterlinck et al., arXiv 2408.06266): reasoning, then a minimally improved response, in one call."""

    template: Template
    drawing: Drawing = CLAIR

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a revision."""
        return {
            "method": "clair",
            "template": self.template.name,
            "template_hash": self.template.hash,
            **asdict(self.drawing),
        }

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be worked on."""
        return _result([], "error", problem)

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`revisions`, with the one entry; `revised`, its text; `status`, `error`."""
        response = item.row["response"]
        messages, prefix = self.template.render(prompt=item.prompt, response=response, row=item.row)
        hint = {"text": response, "form": "clair"}
        said, failure = await _drawn(messages, prefix, self.drawing, 1, hint, ask)
        sections = parse_clair(prefix + said.text) if failure is None and said.finish != "length" else None
        status: Status = failure[0] if failure else _status(said)
        if status == "ok" and sections is None:
            status = "refused" if REFUSAL.match(said.text) else "unparsed"
        reasoning, text = sections if sections and status == "ok" else (None, None)
        entry = _entry(1, None, response, reasoning, said, text, status, failure[1] if failure else None)
        return _result([entry], status, entry["error"])


async def _drawn(
    messages: tuple[Message, ...], prefix: str, drawing: Drawing, number: int, hint: dict[str, Any], ask: Ask
) -> tuple[Completion, tuple[Status, str] | None]:
    """A text; or what became of the call instead, beside an empty one."""
    request = Request(
        messages,
        prefix,
        max_tokens=drawing.tokens,
        temperature=drawing.temperature,
        top_p=drawing.top_p,
        seed=drawing.seed,
        sample=number,
        hint=hint,
    )
    try:
        return await ask(request), None
    except RowError as error:
        return Completion(""), ("error", str(error))
    except RefusedError as error:
        return Completion(""), ("refused", str(error))


def _status(said: Completion, may_be_cut: bool = False) -> Status:
    """An empty text is none, nor is a revision that was cut off; one that declines may be what the principle asks for."""
    if said.refusal or said.finish == "content_filter":
        return "refused"
    cut = said.finish == "length" and not may_be_cut
    return "unparsed" if cut or not said.text.strip() else "ok"


def _entry(
    number: int,
    principle: Principle | None,
    before: str,
    critique: str | None,
    said: Completion,
    text: str | None,
    status: Status,
    error: str | None,
) -> dict[str, Any]:
    """A round as it is kept. `unchanged`: the text is the one before; `refusal`: it declines. Raw text where it failed."""
    good = status == "ok" and text is not None
    return {
        "round": number,
        "principle": principle.name if principle else None,
        "critique": critique,
        "revision": text if good else None,
        "status": status,
        "unchanged": good and text is not None and text.strip() == before.strip(),
        "refusal": bool(good and text is not None and REFUSAL.match(text)),
        "text": None if good else said.refusal or said.text,
        "completion_tokens": said.completion_tokens,
        "error": error,
        "key": said.key,
    }


def _result(revisions: list[dict[str, Any]], status: Status, error: str | None) -> Row:
    revised = revisions[-1]["revision"] if revisions and status == "ok" else None
    return {"revisions": revisions, "revised": revised, "status": status, "error": error}


def reviser(
    method: str, constitution: str | None, template: str | None, drawing: Mapping[str, Any], **chosen: Any
) -> CritiqueReviser | ClairReviser:
    """The reviser of this method (`critique` or `clair`); what is None in `drawing` and `chosen` is its default.

    Raises: UsageError for files that are missing, and for what the method has no use for.
    """
    drawn = {name: value for name, value in drawing.items() if value is not None}
    given = {name: value for name, value in chosen.items() if value is not None}
    loaded = load_template(template or method, "revision")
    if method == "clair":
        if given or constitution:
            name = next(iter(given), "constitution")
            raise UsageError(f"--method clair has no use for --{name}, which goes with --method critique")
        return ClairReviser(loaded, replace(CLAIR, **drawn))
    if constitution is None:
        raise UsageError("--method critique needs --constitution")
    file = given.pop("exemplars", None)
    if file and not given.get("shots"):
        raise UsageError("--exemplars goes with --shots")
    if given.get("shots"):
        source = file or loaded.exemplars
        if source is None:
            raise UsageError(f"--shots {given['shots']}: the template {loaded.name} names no exemplars: give --exemplars")
        given["exemplars"] = load_critiques(source)
    return CritiqueReviser(load_constitution(constitution), loaded, drawing=replace(Drawing(), **drawn), **given)


# ---------------------------------------------------------------- reading

LEAD = re.compile(r"\A\s*(?:\**\s*(?:revision|revised response|response)\s*:\s*\**)\s*", re.IGNORECASE)
TAG = re.compile(r"\A\s*<(response|revision)>\s*(.*?)\s*</\1>\s*\Z", re.IGNORECASE | re.DOTALL)


def bare(text: str) -> str:
    """A revision without the label or the tags that a model may put around it.

    >>> bare("Revision: Take the train."), bare("<response>\\nTake the train.\\n</response>")
    ('Take the train.', 'Take the train.')
    """
    tagged = TAG.match(text)
    return (tagged[2] if tagged else LEAD.sub("", text)).strip()


SECTION = re.compile(
    r"^[ \t]*[*#_` ]*\{(teacher_reasoning|corrected_student_solution)\}[*_`]*[ \t]*:?[*_`]*[ \t]*", re.MULTILINE
)


def parse_clair(text: str) -> tuple[str, str] | None:
    """(reasoning, improved answer) of a reviser's output; None unless both sections are there, once each, in this order.

    A section begins with its name in braces at the beginning of a line, with or without a colon, and goes on in that line or
    the next.

    >>> parse_clair("{teacher_reasoning}: too short.\\n\\n{corrected_student_solution}:\\nYes, it is.")
    ('too short.', 'Yes, it is.')
    """
    marks = list(SECTION.finditer(text))
    if [mark[1] for mark in marks] != ["teacher_reasoning", "corrected_student_solution"] or text[: marks[0].start()].strip():
        return None
    reasoning, answer = text[marks[0].end() : marks[1].start()].strip(), text[marks[1].end() :].strip()
    return (reasoning, answer) if reasoning and answer else None


def tally(rows: Iterable[Row]) -> dict[str, int]:
    """Revisions in all, those that left the response unchanged, and those that decline."""
    made = [entry for row in rows for entry in row["revisions"] or () if entry["status"] == "ok"]
    return {"rounds": len(made), **{name: sum(entry[name] for entry in made) for name in ("unchanged", "refusal")}}
