"""Rewards: what reward models, judges, rules and users' functions make of responses, weighted and added up.

A failure is never a number: a response that one term fails on has no reward at all.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from statistics import fmean, pvariance, stdev
from types import ModuleType
from typing import Any, Protocol, TypeVar

from rlaif.data import Item, as_text, is_dialogue, kind_of, split_response
from rlaif.engines import IN_PROCESS, Engine
from rlaif.labeler import Labeler, load_labeler
from rlaif.provenance import sha256
from rlaif.records import FatalError, RlaifError, Row, UsageError, digest
from rlaif.reward import Folder, Ratings, Scorer, read_folder, safety_counts, tag_problem
from rlaif.rl.config import Ensemble, Format, Function, Gate, Length, ModelReward, Rating, Rollouts, Term, Verdict
from rlaif.runner import Budget, Limits, Method, Runner, StoppedError
from rlaif.store import Store

AT_ONCE = 256
"""Responses that wait for a reward model at once: of many, batches are of more equal lengths."""

ON_A_DEVICE = ("embedded", "transformers")
"""Engines that take the device to compute on."""

SETTING = {
    "model": "model",
    "rating": "labeler",
    "pairwise": "labeler",
    "length": "most",
    "format": "pattern",
    "function": "function",
}
"""What a term of this kind names."""


SILENT = 3
"""Steps in a row in which no response could be judged, after which a run ends."""


class Reward(Protocol):
    """What a user's own reward is: a finite number for each response to its prompt, None for one that it cannot judge.

    A config names it as `file.py:name` or `package.module:name`. It may also be a plain function, which is run in a thread,
    once at a time. With a parameter `rows` it is also given the rows of the data, with all their columns. Prompts are texts
    or lists of messages.
    """

    async def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float | None]: ...


@dataclass(frozen=True)
class Scored:
    """What a response was judged to be.

    `value`: the weighted sum of the terms, None where any of them failed, as a sum over fewer would be another measure.
    `terms`: each one's own value, unweighted. `spread`: the standard deviation over an ensemble's members, over the members
    of a reward model's folder too; of several ensembles their mean; None without any. `error`: what failed.
    """

    value: float | None
    terms: dict[str, float | None]
    spread: float | None
    error: str | None


@dataclass(frozen=True)
class _Part:
    """What one term makes of a response: a value, or an error."""

    value: float | None
    error: str | None = None
    spread: float | None = None


_Source = Callable[[Sequence[Row], Sequence[str]], Awaitable[list[_Part]]]
_T = TypeVar("_T")


async def _all(tasks: Iterable[Awaitable[_T]]) -> list[_T]:
    """All results, in order; where one failed, its error, but only when all have ended."""
    found = await asyncio.gather(*tasks, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found  # type: ignore[return-value]


def _number(compute: Callable[[], float]) -> float | None:
    """A computed number; None where it is too large for a float."""
    try:
        found = float(compute())
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


# ---------------------------------------------------------------- terms


class _Judge:
    """An engine, the store of its answers, and the runner between them.

    The runner belongs to the event loop of the first call, and the store to its thread, so both are made there.
    """

    def __init__(self, engine: Engine, path: Path, limits: Limits, budget: Budget):
        self.engine, self.path, self.limits, self.budget = engine, path, limits, budget
        self.places = asyncio.Semaphore(limits.concurrency)  # rows in flight
        self._made: Runner | None = None
        with closing(Store(path)) as store:  # here, so that a file that is in the way shows before any training
            budget.spent += store.usage().cost_usd or 0.0

    @property
    def runner(self) -> Runner:
        if self._made is None:
            self._made = Runner(self.engine, Store(self.path), self.limits, self.budget)
        return self._made

    def fact(self, name: str) -> Any:
        return getattr(self._made.tally, name) if self._made else 0

    async def close(self) -> None:
        await self.runner.settle()
        await self.engine.close()
        self.runner.store.close()


@dataclass
class _Judged:
    """A labeler's ratings or verdicts, or a reward model's scores; `judge` is there once the engines are."""

    method: Method
    asked: Labeler | Folder
    against: str | None = None
    judge: _Judge | None = None

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        assert self.judge
        runner = self.judge.runner
        try:
            return await _all(self._one(self.judge, *each) for each in zip(rows, responses, strict=True))
        except RlaifError as error:
            raise runner.reason or error from None

    async def _one(self, judge: _Judge, row: Row, response: str) -> _Part:
        async with judge.places:
            item = _item(row, response, self.against)
            try:
                result = self.method.failed(item.problem) if item.problem else await self.method(item, judge.runner.ask)
            except StoppedError:
                raise
            except RlaifError as error:
                judge.runner.stop(error)
                raise
        return self._part(result)

    def _part(self, result: Row) -> _Part:
        value = result["score"] if self.against is None else result["soft_label"]
        if value is None:
            return _Part(None, result["error"] or f"{result['status']}: the judge's answer is no judgement")
        spread = result["dispersion"] if isinstance(self.asked, Folder) else None
        return _Part(value if self.against is None else 2 * value - 1, None, spread)

    def told(self) -> Row:
        if isinstance(self.asked, Folder):
            own: Row = {"model": self.asked.name, "weights": self.asked.weights}
        else:
            own = {"labeler": self.asked.name, "seed": self.asked.seed}
        return {**own, "engine": self.judge.engine.identity if self.judge else None, **self.method.settings()}


def _item(row: Row, response: str, against: str | None) -> Item:
    """What a method judges: a response, or a comparison of it, as A, with the row's own."""
    problem = None if response.strip() else "the response is empty"
    if against is None:
        more = {"response": response}
    else:
        other = _other(row, against)
        more = {"response_a": response, "response_b": other or ""}
        if not other:
            problem = f"column '{against}': no text to compare with"
        elif problem is None and other == response:
            problem = f"the response and column '{against}' are identical: there is nothing to compare"
    return Item({**row, **more}, as_text(row["prompt"]) or "", "", problem)


def _other(row: Row, column: str) -> str | None:
    """The response in a column: its text, the last answer of messages or of a whole dialogue, or the first of the texts that
    `rlaif sample` drew; None for an empty one.
    """
    value = row.get(column)
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    whole = isinstance(value, str) and is_dialogue(value)
    text = split_response(value, None if whole else row["prompt"])[1]
    return text if text and text.strip() else None


@dataclass
class _Called:
    """A user's function."""

    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        try:
            self._wants_rows = "rows" in inspect.signature(self.function).parameters
        except ValueError:  # some that are written in C
            self._wants_rows = False

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        prompts = [row["prompt"] for row in rows]
        more = {"rows": list(rows)} if self._wants_rows else {}
        try:
            async with self._one_at_a_time:
                found = await asyncio.to_thread(self.function, prompts, list(responses), **more)
            values = list(await found if inspect.isawaitable(found) else found)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name} line {at.lineno}"
            raise RlaifError(f"{self.name} failed: {type(error).__name__}: {error} ({where})") from error
        if len(values) != len(responses):
            raise RlaifError(f"{self.name} gave {len(values)} rewards for {len(responses)} responses")
        return [self._part(value) for value in values]

    def _part(self, value: Any) -> _Part:
        if value is None:
            return _Part(None, "the function gave none")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise RlaifError(f"{self.name} gave {value!r:.40}, a {type(value).__name__}, which is neither a number nor None")
        number = _number(lambda: float(value))
        return _Part(number, None if number is not None else f"the function gave {value!r:.40}, which is not finite")

    def told(self) -> Row:
        return {"function": self.name, "sha256": sha256(self.name.rpartition(":")[0])}


@dataclass
class _Rule:
    """A number that the response's text alone tells."""

    term: Length | Format
    function: Callable[[str], float]

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        return [_Part(self.function(response)) for response in responses]

    def told(self) -> Row:
        return self.term.model_dump(exclude={"name", "weight", "kind"})


@dataclass
class _Together:
    """An ensemble. Members count with their weights, which bring them to one scale.

    `uncertainty` takes off the variance over k members, not k − 1, as the paper has it.
    """

    term: Ensemble
    members: dict[str, tuple[float, _Source]]

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        found = await _all(source(rows, responses) for _, source in self.members.values())
        return [self._part(parts) for parts in zip(*found, strict=True)]

    def _part(self, parts: Sequence[_Part]) -> _Part:
        if errors := _errors(self.members, parts):
            return _Part(None, errors)
        weights = [weight for weight, _ in self.members.values()]
        values = [weight * part.value for weight, part in zip(weights, parts, strict=True) if part.value is not None]
        combined, spread = _number(lambda: self._combined(values)), _number(lambda: stdev(values))
        if combined is None or spread is None:
            return _Part(None, "the members' numbers are too large to combine")
        return _Part(combined, None, spread)

    def _combined(self, values: list[float]) -> float:
        if self.term.combine == "worst":
            return min(values)
        return fmean(values) - (self.term.penalty * pvariance(values) if self.term.combine == "uncertainty" else 0.0)


@dataclass
class _Either:
    """A gate: `safety` of all responses, then `helpful` of those for which it counts. Weights bring them to logits."""

    term: Gate
    members: dict[str, tuple[float, _Source]]

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        found = await self._asked("safety", rows, responses)
        for n, row in enumerate(rows):
            if problem := tag_problem(row, self.term.tagged):
                found[n] = _Part(None, problem)
        passed = [n for n, (row, part) in enumerate(zip(rows, found, strict=True)) if self._passes(row, part)]
        if passed:
            helpful = await self._asked("helpful", [rows[n] for n in passed], [responses[n] for n in passed])
            for n, part in zip(passed, helpful, strict=True):
                found[n] = part
        return found

    async def _asked(self, name: str, rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
        weight, source = self.members[name]
        return [_weighed(name, weight, part) for part in await source(rows, responses)]

    def _passes(self, row: Row, safety: _Part) -> bool:
        tagged = self.term.tagged and row.get(self.term.tagged)
        return safety.value is not None and not safety_counts(safety.value, bool(tagged), self.term.below)


def _weighed(name: str, weight: float, part: _Part) -> _Part:
    own = part.value
    if own is None:
        return _Part(None, f"{name}: {part.error}")
    value = _number(lambda: weight * own)
    return replace(part, value=value, error=None if value is not None else f"{name}: weighted, it is too large a number")


def _members(term: Term) -> dict[str, Term]:
    """The terms that a term is made of, by name; none for a leaf."""
    if isinstance(term, Ensemble):
        return _named(term.of)
    return {"safety": term.safety, "helpful": term.helpful} if isinstance(term, Gate) else {}


def _errors(names: Iterable[str], parts: Sequence[_Part]) -> str | None:
    """What failed, by name."""
    return "; ".join(f"{name}: {part.error}" for name, part in zip(names, parts, strict=True) if part.value is None) or None


def _words_over(term: Length, response: str) -> float:
    count = len(response.split())
    over = max(0, count - term.most) / term.most if term.most else 0.0
    under = max(0, term.least - count) / term.least if term.least else 0.0
    return -over - under


# ---------------------------------------------------------------- from a config to these


_Leaf = _Judged | _Called | _Rule


def _leaf(term: Term, seed: int = 0) -> _Leaf:
    """A term that has no members, but for its engine. Raises: UsageError for what is missing or wrong in what it names."""
    if isinstance(term, ModelReward):
        folder = read_folder(Path(term.model))
        return _Judged(Ratings(Scorer((folder,), term.head, folder.combine)), folder)
    if isinstance(term, Rating | Verdict):
        labeler = load_labeler(term.labeler)
        labeler = labeler.changed(seed=labeler.seed + seed)
        if isinstance(term, Rating):
            return _Judged(labeler.rater(), labeler)
        return _Judged(labeler.pairwise(), labeler, term.against)
    if isinstance(term, Function):
        return _Called(term.function, load_function(term.function))
    if isinstance(term, Format):
        pattern, forbidden = _pattern(term.pattern), term.forbidden
        return _Rule(term, lambda response: 0.0 if bool(pattern.search(response)) != forbidden else -1.0)
    assert isinstance(term, Length)
    length = term
    return _Rule(term, lambda response: _words_over(length, response))


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"'{text}' is no regular expression: {error}") from error


def load_function(name: str) -> Callable[..., Any]:
    """The function that is named as `file.py:name` or `package.module:name`."""
    where, mark, own = name.rpartition(":")
    if not (where and mark and own):
        raise UsageError(f"expected file.py:name or package.module:name, got '{name}'")
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"no such file: {where}")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # it is its author's program
        raise UsageError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, own, None)
    if not callable(found):
        raise UsageError(f"{where} has no function '{own}'")
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    name = f"reward_{path.stem}_{digest(str(path.resolve()))[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names, a second one of a kind with -2 at its end.

    >>> _unique(["rating", "length", "rating"])
    ('rating', 'length', 'rating-2')
    """
    found: list[str] = []
    for name in names:
        number, one = 1, name
        while one in found:
            number += 1
            one = f"{name}-{number}"
        found.append(one)
    return tuple(found)


def _named(terms: Sequence[Term]) -> dict[str, Term]:
    return dict(zip(_unique(term.name or term.kind for term in terms), terms, strict=True))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors begin with the term, and what of it is wrong."""
    try:
        yield
    except RlaifError as error:
        raise type(error)(f"reward {what}: {error}") from error


def silence(scored: Sequence[Scored]) -> str:
    """What to say where no response of `SILENT` steps in a row had a score; `scored` are those of the last one."""
    why = next((one.error for one in scored if one.error), "the judge gave no score")
    return f"no response of {SILENT} steps could be judged: {why}"


def of_run(terms: Sequence[Term], config: Rollouts, folder: Path, seed: int) -> Rewards:
    """The rewards of this process of a run, with answers in `folder`; several processes share what they may cost."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    return Rewards(
        terms,
        folder if world == 1 else folder.with_name(f"{folder.name}-{rank}"),
        tries=config.judge_tries,
        timeout=config.judge_timeout,
        max_cost=config.max_cost / world if config.max_cost else None,
        device="cpu" if config.device == "cpu" else None,
        seed=seed,
    )


def check(terms: Sequence[Term], first: Row) -> None:
    """What can be known to be wrong before any engine starts. `first`: a row of the data.

    Raises: UsageError naming the term and its setting.
    """
    if as_text(first.get("prompt")) is None:
        raise UsageError(f"column 'prompt': expected text or messages, got {kind_of(first.get('prompt'))}")
    _check(_named(terms), first, "")


def _check(terms: dict[str, Term], first: Row, lead: str) -> None:
    for name, term in terms.items():
        if isinstance(term, Gate):
            with _naming(f"{lead}{name}, tagged"):
                _check_tag(term, first)
        if isinstance(term, Ensemble | Gate):
            _check(_members(term), first, f"{lead}{name}/")
            continue
        with _naming(f"{lead}{name}, {SETTING[term.kind]}"):
            _leaf(term)
        if isinstance(term, Verdict):
            with _naming(f"{lead}{name}, against"):
                _check_column(term.against, first)


def _check_tag(term: Gate, first: Row) -> None:
    if term.tagged:
        _check_there(term.tagged, first)
    if problem := tag_problem(first, term.tagged):
        raise UsageError(problem)


def _check_there(column: str, first: Row) -> None:
    if column not in first:
        raise UsageError(f"no column '{column}' in the data; there are: {', '.join(first)}")


def _check_column(column: str, first: Row) -> None:
    _check_there(column, first)
    if _other(first, column) is None:
        raise UsageError(f"column '{column}': expected the text of a response, got {kind_of(first[column])}, or an empty one")


# ---------------------------------------------------------------- all of them


class Rewards:
    """What the terms of a config come to.

    Engines are made here; their answers, reward models' scores among them, are stored in `folder`, so that nothing is asked
    twice, over the whole run and when it goes on from a checkpoint. No two processes, nor two of these, may share a folder.
    tries, timeout (seconds; for engines over HTTP): of each call. max_cost: US dollars, for all judges together and all of
    the run, with what the stores say was spent before. device: of what computes in this process, unless a labeler says
    another. seed: is added to each labeler's own, so that runs of other seeds draw other principles and samples.

    All calls, and `close`, belong to one event loop.

    Raises: UsageError, or FatalError where an engine cannot start, naming the term.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        folder: Path,
        *,
        tries: int,
        timeout: float | None,
        max_cost: float | None = None,
        device: str | None = None,
        seed: int = 0,
    ) -> None:
        self._folder, self._tries, self._timeout = folder, tries, timeout
        self._max_cost, self._device, self._seed = max_cost, device, seed
        self._judges: dict[str, _Judge] = {}
        self._budget = Budget()
        self._batches: set[asyncio.Task[list[Scored]]] = set()
        self._reason: Exception | None = None
        self._failed = 0
        self.in_process = False
        folder.mkdir(parents=True, exist_ok=True)
        named = _named(terms)
        self.names = tuple(named)
        self._weights = [term.weight for term in terms]
        made = [self._made(name, term) for name, term in named.items()]
        self._sources, self._told = [source for source, _ in made], [told for _, told in made]

    # ------------------------------------------------------------ making them

    def _made(self, name: str, term: Term) -> tuple[_Source, Row]:
        """What computes a term, and what there is to tell about it."""
        if isinstance(term, Ensemble | Gate):
            made = {own: (member.weight, *self._made(f"{name}/{own}", member)) for own, member in _members(term).items()}
            members = {own: (weight, source) for own, (weight, source, _) in made.items()}
            source: _Source = _Together(term, members) if isinstance(term, Ensemble) else _Either(term, members)
            more: Row = term.model_dump(exclude={"name", "weight", "kind", "of", "safety", "helpful"})
            more["of"] = {own: told for own, (_, _, told) in made.items()}
        else:
            with _naming(name):
                leaf = _leaf(term, self._seed)
                if isinstance(leaf, _Judged):
                    leaf.judge = self._judge(leaf.asked)
            source, more = self._stopping(name, leaf), leaf.told()
        return source, {"kind": term.kind, "weight": term.weight, **more}

    def _judge(self, asked: Labeler | Folder) -> _Judge:
        """The judge; terms that need the same engine, at the same pace, share it."""
        if isinstance(asked, Folder):
            key, limits = asked.weights, Limits(AT_ONCE, self._tries, None)
            here, make = True, partial(_reward_engine, asked, self._device)
        else:
            pace = asked.pace
            if self._max_cost is not None and pace.timeout and pace.prices is None:
                raise UsageError(f"max_cost needs a price in the labeler {asked.name}, for prices change and are not guessed")
            timeout = self._timeout if pace.timeout else None
            limits = replace(pace, tries=self._tries, timeout=timeout, max_cost=self._max_cost)
            if self._device and asked.engine in ON_A_DEVICE:
                asked = asked.changed(options={"device": self._device, **asked.options})
            key = digest([asked.engine, asked.model, asked.base_url, asked.options, pace.concurrency, pace.prices])
            here, make = asked.engine in IN_PROCESS, partial(asked.make_engine, limits)
        self.in_process = self.in_process or here
        if key not in self._judges:
            engine = make()
            name = f"{engine.identity['engine']}-{digest(engine.identity)[:12]}"
            taken = [judge.path.stem for judge in self._judges.values()]
            path = self._folder / f"{_unique([*taken, name])[-1]}.store"
            self._judges[key] = _Judge(engine, path, limits, self._budget)
        return self._judges[key]

    # ------------------------------------------------------------ judging

    async def __call__(self, rows: Sequence[Row], responses: Sequence[str]) -> list[Scored]:
        """What each response is, to the row's `prompt`.

        Raises: RlaifError with the reason, where a judge is gone, the budget is spent or a function failed, once what was in
        flight is stored. Nothing is asked after that.
        """
        batch = asyncio.create_task(self._scored(rows, responses))
        self._batches.add(batch)
        batch.add_done_callback(self._batches.discard)
        return await batch

    async def _scored(self, rows: Sequence[Row], responses: Sequence[str]) -> list[Scored]:
        if self._reason:
            raise self._reason
        if not responses:
            return []
        try:
            found = await _all(source(rows, responses) for source in self._sources)
        except Exception as error:
            for judge in self._judges.values():
                await judge.runner.settle()
            raise self._reason or error from None
        scored = [self._one(parts) for parts in zip(*found, strict=True)]
        self._failed += sum(one.value is None for one in scored)
        return scored

    def _one(self, parts: Sequence[_Part]) -> Scored:
        terms = {name: part.value for name, part in zip(self.names, parts, strict=True)}
        if errors := _errors(self.names, parts):
            return Scored(None, terms, None, errors)
        known = [part.value for part in parts if part.value is not None]
        value = _number(lambda: sum(weight * own for weight, own in zip(self._weights, known, strict=True)))
        spreads = [part.spread for part in parts if part.spread is not None]
        error = "the weighted sum is too large a number" if value is None else None
        return Scored(value, terms, fmean(spreads) if spreads else None, error)

    def _stopping(self, name: str, source: _Source) -> _Source:
        """The term, but that an error of it stops all others too."""

        async def stopping(rows: Sequence[Row], responses: Sequence[str]) -> list[_Part]:
            try:
                return await source(rows, responses)
            except RlaifError as error:
                if self._reason is None:
                    self._stop(type(error)(f"reward {name}: {error}"))
                raise
            except Exception as error:
                self._stop(error)
                raise

        return stopping

    def _stop(self, reason: Exception) -> None:
        self._reason = self._reason or reason
        for judge in self._judges.values():
            judge.runner.stop(StoppedError("stopping"))

    async def close(self) -> None:
        """Stop asking, wait until what is in flight is stored, and free the engines."""
        self._stop(StoppedError("the rewards are closed"))
        await asyncio.gather(*self._batches, return_exceptions=True)
        for judge in self._judges.values():
            await judge.close()

    # ------------------------------------------------------------ telling

    def settings(self) -> dict[str, Any]:
        """Each term by its name, with everything that can change its values."""
        return dict(zip(self.names, self._told, strict=True))

    def facts(self) -> dict[str, Any]:
        """What was done so far by this process: calls answered, of reward models too, and responses left without a reward."""
        names = ("calls", "prompt_tokens", "completion_tokens", "cost", "retries")
        return {**{name: sum(judge.fact(name) for judge in self._judges.values()) for name in names}, "failed": self._failed}


def _reward_engine(folder: Folder, device: str | None) -> Engine:
    try:
        from rlaif.engines.reward import RewardEngine
    except ModuleNotFoundError as error:
        raise FatalError(f"the package {error.name} is not installed: pip install 'rlaif[transformers]'") from error
    return RewardEngine((folder,), device=device)


# ---------------------------------------------------------------- beside the main thread


class Background:
    """An event loop in a thread of its own, so that responses are judged while the main thread generates the next ones."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._futures: set[Future[list[Scored]]] = set()
        self._judging, self._since, self._seconds = 0, 0.0, 0.0
        self._closed = False

    def submit(self, rows: Sequence[Row], responses: Sequence[str]) -> Future[list[Scored]]:
        """The rewards of these responses, later; what `Rewards` raises comes out of the future."""
        if self._closed:
            raise StoppedError("the rewards are closed")
        future = asyncio.run_coroutine_threadsafe(self._judge(list(rows), list(responses)), self._loop)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    async def _judge(self, rows: list[Row], responses: list[str]) -> list[Scored]:
        self._count(1)
        try:
            return await self._rewards(rows, responses)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._judging:
                self._seconds += now - self._since
            self._judging, self._since = self._judging + change, now

    def busy(self) -> float:
        """Seconds so far in which at least one batch was being judged; batches at the same time count once."""
        with self._lock:
            return self._seconds + (time.monotonic() - self._since if self._judging else 0.0)

    def close(self) -> None:
        """Stop judging, wait until what is in flight is stored, free the engines and end the thread; once is enough."""
        if self._closed:
            return
        self._closed = True
        try:
            asyncio.run_coroutine_threadsafe(self._rewards.close(), self._loop).result()
            wait(list(self._futures))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
