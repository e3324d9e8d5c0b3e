"""What a run would take, before it begins: its steps are rehearsed on a few rows each, with answers as long as they may be.

What asks is the code that will ask: chains of thought, orders, rounds and samples are counted, not computed. A rehearsal's
answers are a mock labeler's, its tokens four characters each, and the estimate errs on the high side.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from rlaif.data import SUFFIXES, Item, read_rows
from rlaif.engines import INSTEAD, Engine
from rlaif.engines.mock import MockEngine
from rlaif.labeler import load_labeler
from rlaif.pipeline.lineage import USAGE, facts
from rlaif.pipeline.recipe import Parsed, Step, parse
from rlaif.pipeline.status import aligned
from rlaif.pipeline.work import Work
from rlaif.records import Completion, Request, RlaifError
from rlaif.rl.config import Online, Ppo, Rollouts
from rlaif.train.kinds import load_config
from rlaif.yamlfile import named

ROWS = 4
"""Rows of each file from outside that are rehearsed with."""

TOKEN = " abc"
"""Four characters."""

LOCAL = ("reward score", "reward groups", "icdpo")
"""Commands that score with a model of the run's own, and ask nobody."""

READS = ("align", "calibrate", "report", "check", "contrast")
"""Commands that only look."""


@dataclass(frozen=True)
class Estimate:
    """`calls`, tokens and cost of a step over all its rows; `remark`: why there is none, or what it leaves out."""

    usage: dict[str, float] | None
    remark: str = ""


class Rehearsing(MockEngine):
    """A mock labeler whose free text is as long as it may be."""

    def __init__(self, name: str, model: str | None) -> None:
        super().__init__(seed=1)
        self.identity = {"engine": name, "model": model}

    async def complete(self, request: Request) -> Completion:
        answer = await super().complete(request)
        if request.choices:
            return answer
        longer = answer.text
        if (request.hint or {}).get("form") in ("sample", "thinking", "critique", "revision", "clair"):
            longer += TOKEN * max(request.max_tokens - len(answer.text) // 4, 0)
        return replace(answer, text=longer, completion_tokens=request.max_tokens)


def render(work: Work) -> str:
    """The plan: each step with why it is to be run, and what it will take."""
    due = {own.step.name: own.reason for own in work.plan()}
    found = rehearse(work)
    table: list[tuple[str, ...]] = [("step", "", "calls", "tokens read", "written, at most", "cost", "command")]
    whole = dict.fromkeys(USAGE, 0.0)
    for step in work.pipeline.steps:
        reason, own = due[step.name], found[step.name]
        usage = own.usage if reason else None
        whole = {name: whole[name] + (usage or {}).get(name, 0.0) for name in USAGE}
        state = reason or "done before"
        table.append((step.name, state, *_figures(usage), f"rlaif {step.line}" if not own.remark else own.remark))
    table.append(("in all", "", *_figures(whole), ""))
    lines = [f"{work.pipeline.name}: {work.pipeline.description}", f"in {work.folder}", "", *aligned(table, left=(0, 1, 6))]
    if not whole["cost_usd"]:
        lines += [
            "",
            "cost: none of the labelers has a price (US dollars per million tokens read and written: `price` in its file)",
        ]
    return "\n".join(lines)


def _figures(usage: dict[str, float] | None) -> tuple[str, str, str, str]:
    if usage is None:
        return "", "", "", ""
    cost = f"${usage['cost_usd']:,.2f}" if usage["cost_usd"] else ""
    return f"{usage['calls']:,.0f}", f"{usage['prompt_tokens']:,.0f}", f"{usage['completion_tokens']:,.0f}", cost


def rehearse(work: Work) -> dict[str, Estimate]:
    """What each step will take, whether or not it is due."""
    with tempfile.TemporaryDirectory() as temporary, _quiet(), _instead():
        rehearsal = _Rehearsal(work, Path(temporary))
        with chdir(temporary):
            return {step.name: rehearsal.step(step) for step in work.pipeline.steps}


@contextmanager
def _instead() -> Iterator[None]:
    token = INSTEAD.set(lambda name, model: Rehearsing(name, model))
    try:
        yield
    finally:
        INSTEAD.reset(token)


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


@dataclass
class _Rehearsal:
    work: Work
    folder: Path
    scales: dict[str, float | None] = field(default_factory=dict)
    """For each step, how many rows stand for one of the rehearsal; None where that is not known."""

    def step(self, step: Step) -> Estimate:
        words = step.told(lambda name: str((self.work.folder / name).resolve()))
        parsed = parse(words, step.name)
        limit = parsed.values.get("limit")
        rows = {name: maker for name, maker in step.uses.items() if name.endswith(SUFFIXES)}
        scales = [self._outside(name, limit) if maker is None else self.scales[maker] for name, maker in rows.items()]
        known = [scale for scale in scales if scale is not None]
        scale = max(known, default=1.0) if None not in scales else None
        self.scales[step.name] = scale
        if step.command in READS or (step.trains and not step.command.endswith(("ppo", "online"))):
            return Estimate(None)
        if scale is None:
            return Estimate(None, "not known: it follows from what a step before it makes")
        try:
            if step.trains:
                return self._judged(words, parsed, scale)
            return self._run(step, words, parsed, scale)
        except RlaifError as error:
            self.scales[step.name] = None
            return Estimate(None, f"not known: {error}")

    def _run(self, step: Step, words: list[str], parsed: Parsed, scale: float) -> Estimate:
        from rlaif.cli import app

        if step.command in LOCAL:
            words = ["score", *words[parsed.depth : parsed.depth + 1], "-o", str(parsed.out), "--engine", "mock"]
        elif "limit" in parsed.options:
            words += ["--limit", str(min(parsed.values["limit"] or ROWS, ROWS))]
        if step.asks:
            words += ["--max-errors", "1"]
        app(words, standalone_mode=False)
        usage = facts(self.folder, step)["usage"]
        if not usage or step.command in LOCAL:
            return Estimate(None)
        return Estimate({name: (usage.get(name) or 0.0) * scale for name in USAGE})

    def _outside(self, name: str, limit: int | None) -> float:
        """How many of a file's rows stand for one that is rehearsed with."""
        rows = sum(1 for _ in islice(read_rows(str((self.work.folder / name).resolve())), limit))
        return max(rows / ROWS, 1.0)

    def _judged(self, words: list[str], parsed: Parsed, scale: float) -> Estimate:
        """Verdicts while a policy learns."""
        kind = words[parsed.depth - 1]
        path = named("pipelines/train", parsed.values["config"])
        config: Any = load_config(kind, path, [*(parsed.values["changes"] or []), "out=out"])
        asked = list(_labelers(config))
        if not asked:
            return Estimate(None)
        steps = config.max_steps or self._steps(config, scale)
        pairs = config.judge is not None if isinstance(config, Online) else False
        times = steps * config.rollouts / (2 if pairs else 1)
        prompt = next(iter(read_rows(config.data)))[1]
        usage = dict.fromkeys(USAGE, 0.0)
        for name, comparing in asked:
            own = asyncio.run(_one(name, comparing, prompt, config.max_new_tokens))
            usage = {key: usage[key] + own[key] * times for key in USAGE}
        return Estimate(usage)

    def _steps(self, config: Rollouts, scale: float) -> float:
        rows = sum(1 for _ in read_rows(config.data)) * scale * (1 - config.eval_share)
        return config.epochs * rows * getattr(config, "a_prompt", 2) / config.rollouts


def _labelers(config: Ppo | Online) -> Iterator[tuple[str, bool]]:
    """The labelers that judge in each step, and whether they compare."""
    if isinstance(config, Online) and config.judge:
        yield config.judge, True
    waiting: list[Any] = list(config.reward)
    while waiting:
        term = waiting.pop()
        if hasattr(term, "labeler"):
            yield term.labeler, term.kind == "pairwise"
        waiting += [*getattr(term, "of", ()), *(own for name in ("safety", "helpful") if (own := getattr(term, name, None)))]


async def _one(name: str, comparing: bool, row: dict[str, Any], tokens: int) -> dict[str, float]:
    """What one verdict takes."""
    labeler = load_labeler(name)
    text = TOKEN * tokens
    own = {**row, "response": text, "response_a": text, "response_b": text + TOKEN}
    engine: Engine = Rehearsing(labeler.engine, labeler.model)
    usage = dict.fromkeys(USAGE, 0.0)

    async def ask(request: Request) -> Completion:
        answer = await engine.complete(request)
        price = labeler.price or (0.0, 0.0)
        usage["calls"] += 1
        usage["prompt_tokens"] += answer.prompt_tokens
        usage["completion_tokens"] += answer.completion_tokens
        usage["cost_usd"] += (answer.prompt_tokens * price[0] + answer.completion_tokens * price[1]) / 1e6
        return answer

    prompt = row.get("prompt", "")
    item = Item(own, prompt if isinstance(prompt, str) else str(prompt), "rehearsal", None)
    await (labeler.pairwise() if comparing else labeler.rater())(item, ask)
    return usage
