"""The runner: a sliding window of rows over one engine, with retries, a budget, clean stops and nothing asked twice."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlaif.engines import Engine
from rlaif.records import (
    STATUSES,
    BusyError,
    Completion,
    FatalError,
    NoLogprobsError,
    Request,
    RlaifError,
    Row,
    RowError,
    TransientError,
)
from rlaif.store import Store
from rlaif.window import Window

SENT_BACK = 0.1
"""Seconds for which a call that was sent back keeps its place: who refuses at once would be asked the more often for it."""


class StoppedError(RlaifError):
    """The run is stopping: no further call is sent, and the row stays as it was."""


class Item(Protocol):
    """One row to work on; `problem` says why it cannot be, or is None."""

    @property
    def problem(self) -> str | None: ...


class Method(Protocol):
    """A method: one async function over one item, given what answers requests; returns a result with its `status`.

    `settings` are everything about it that can change a result; `failed` is the result of an item that has a problem.
    """

    async def __call__(self, item: Any, ask: Callable[[Request], Awaitable[Completion]], /) -> Row: ...

    def settings(self) -> dict[str, Any]: ...

    def failed(self, problem: str | None) -> Row: ...


class StoredEngine:
    """In place of the engine that made a store: everything is answered from there, nothing is sent."""

    def __init__(self, identity: dict[str, Any]):
        self.identity = identity
        self.notes: list[str] = []

    async def complete(self, request: Request) -> Completion:
        raise StoppedError("not in the store")

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Limits:
    """How hard to press: rows and calls in flight, tries a call, seconds it may take, US dollars, prices per million tokens.

    `start`: calls in flight at first, where it is to be found out how many of `concurrency` the server takes (`Window`).
    `spent` are the US dollars of the budget `max_cost` that are gone already. `calls`: the most calls in flight, where that is
    not `concurrency`. `wait`: whether a stop waits for them; where it does not, they go on, and the next run has their answers.
    """

    concurrency: int = 32
    tries: int = 6
    timeout: float | None = 120.0
    max_cost: float | None = None
    prices: tuple[float, float] | None = None
    spent: float = 0.0
    start: int | None = None
    calls: int | None = None
    wait: bool = True

    def after(self, spent: float) -> Limits:
        """The limits of the next run within the same budget, of which so much is spent."""
        return replace(self, spent=self.spent + spent)


@dataclass
class Tally:
    """What a run has done so far, for the progress bar and the run file."""

    statuses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    rows: int = 0
    found: int = 0  # rows that an earlier run had finished
    calls: int = 0
    retries: int = 0
    slowed: int = 0  # calls that a server sent back because it had enough
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Rows a second, of those that this run worked on."""
        return (self.rows - self.found) / max(self.seconds, 1e-9)

    def facts(self) -> str:
        """Rate, tokens, cost and failures, in a few words."""
        failures = self.rows - self.statuses["ok"] - self.statuses["tie"]
        parts = [f"{self.rate:.1f} rows/s", f"{self.prompt_tokens + self.completion_tokens:,} tokens"]
        if self.cost:
            parts.append(f"${self.cost:.4f}")
        if failures:
            parts.append(f"{failures} without label")
        return " · ".join(parts)


class Budget:
    """US dollars that are spent, and the most that calls in flight can cost; runners may share one."""

    def __init__(self, spent: float = 0.0):
        self.spent = spent
        self.reserved: list[float] = []
        self.freed = asyncio.Condition()


class Runner:
    """Runs a method over rows. One runner serves one run.

    Stopping has one way whatever the reason (Ctrl-C, the budget, a fatal error): no new call is sent, those in flight are
    waited for and stored, and `run` raises. The same command then goes on from there.

    `budget`: one that is shared with others, in place of the runner's own.
    """

    def __init__(self, engine: Engine, store: Store, limits: Limits, budget: Budget | None = None):
        self.engine, self.store, self.limits = engine, store, limits
        self.budget = budget or Budget(limits.spent)
        self.offline = isinstance(engine, StoredEngine)
        self.tally = Tally()
        self.window = Window(limits.calls or limits.concurrency, limits.start)
        self._flying: dict[str, asyncio.Task[Completion]] = {}
        self._stop: RlaifError | None = None
        self._stopped = asyncio.Event()
        self._failures = 0  # calls given up since the last answer
        self.answers = 0

    async def run(self, items: Iterable[tuple[str, Item]], method: Method, on_row: Callable[[], None] = lambda: None) -> None:
        """Work through (key, item) pairs, each row's result stored under its key as soon as it is there.

        Finished rows are passed over. With a `StoredEngine` every row is done again, from stored completions, without a call.

        Raises: FatalError (the server refused), StoppedError (Ctrl-C or the budget), after what was in flight is stored.
        """
        pending = iter(items)
        async with self._signals():
            workers = [asyncio.create_task(self._work(pending, method, on_row)) for _ in range(self.limits.concurrency)]
            try:
                await asyncio.gather(*workers)
            except asyncio.CancelledError:  # the second Ctrl-C: what is in flight is given up
                self._give_up()
                if self._stop is None:
                    raise
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, *self._flying.values(), return_exceptions=True)
        if self._stop:
            raise self._stop

    def stop(self, reason: RlaifError) -> None:
        """Send nothing more; the first reason given is the one that `run` raises."""
        self._stop = self._stop or reason
        self._stopped.set()
        if not self.limits.wait:
            asyncio.get_running_loop().call_soon(self._give_up)  # after the calls whose answers are there already

    def _give_up(self) -> None:
        for call in self._flying.values():
            call.cancel()

    @property
    def reason(self) -> RlaifError | None:
        """Why it stopped; None while it goes on."""
        return self._stop

    @property
    def facts(self) -> str:
        """The tally in a few words, and how wide the window is where a server was found to have enough."""
        return self.tally.facts() + (f" · {int(self.window.width)} in flight" if self.tally.slowed else "")

    async def settle(self) -> None:
        """Wait until what is in flight is stored."""
        await asyncio.gather(*self._flying.values(), return_exceptions=True)

    async def _work(self, pending: Iterator[tuple[str, Item]], method: Method, on_row: Callable[[], None]) -> None:
        for key, item in pending:
            if self._stop:
                return
            if self.offline or not self.store.finished(key):
                try:
                    result = method.failed(item.problem) if item.problem else await method(item, self.ask)
                except StoppedError:  # nothing known about the row that was not known before
                    if not self.offline or self.store.status(key) is None:
                        continue
                    result = None
                except RlaifError as error:
                    self.stop(error)
                    return
                if result:
                    self.store.add_result(key, result)
            else:
                result = None
            self._count(key, result)
            on_row()
            # A row from the store never waits: let others, and the signal handler, have their turn.
            await asyncio.sleep(0)

    def _count(self, key: str, result: Row | None) -> None:
        status = result["status"] if result else self.store.status(key)
        assert status is not None
        self.tally.rows += 1
        self.tally.found += result is None
        self.tally.statuses[status] += 1

    # ------------------------------------------------------------ one request

    async def ask(self, request: Request) -> Completion:
        """Answer a request from the store, from the same request in flight, or from the engine."""
        key = request.key(self.engine.identity)
        stored = self.store.completion(key, even_failed=self.offline)
        if stored:
            return stored
        if self.offline:
            # No such answer: either the engine gave no log-probabilities, and its verdicts were sampled, or there is none.
            raise NoLogprobsError("not in the store") if request.choices else StoppedError("not in the store")
        if key not in self._flying:
            task = asyncio.create_task(self._fetch(key, request))
            self._flying[key] = task
            task.add_done_callback(lambda _: self._flying.pop(key, None))
        # Shielded: what is in flight is paid for, and is stored even when its row is given up.
        return await asyncio.shield(self._flying[key])

    async def _fetch(self, key: str, request: Request) -> Completion:
        async with self._budget(request):
            try:
                completion = await self._retried(request)
            except NoLogprobsError as error:
                if error.completion:
                    self._charge(error.completion)
                raise
            completion = replace(completion, key=key, cost=self._price(completion))
            self._charge(completion)
            self.store.add_completion(key, completion)
            return completion

    async def _retried(self, request: Request) -> Completion:
        failed = seen = 0
        while True:
            try:
                return await self._once(request)
            except FatalError as error:
                self.stop(error)
                raise StoppedError(str(error)) from error
            except TransientError as error:
                # To be sent back by a busy server that answers others is no failure: the call only waits for its turn.
                failed += not (isinstance(error, BusyError) and self.answers > seen)
                seen = self.answers
                if failed >= self.limits.tries:
                    raise self._given_up(error) from error
                self.tally.retries += 1
                await self._sleep(_pause(error, failed))

    async def _once(self, request: Request) -> Completion:
        async with self.window as number:
            if self._stop:
                raise StoppedError("stopping")
            try:
                answer = await asyncio.wait_for(self.engine.complete(request), self.limits.timeout)
            except TimeoutError as error:
                self.window.narrow(number)
                raise TransientError(f"no answer within {self.limits.timeout:g} s") from error
            except BusyError:
                self.tally.slowed += 1
                self.window.narrow(number)
                await self._sleep(random.uniform(0.5, 1.0) * SENT_BACK)
                raise
            self.window.widen(number)
        self._failures, self.answers = 0, self.answers + 1
        return answer

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return

    def _given_up(self, error: TransientError) -> RlaifError:
        """A call failed on every try: the row's own bad luck, unless no call gets through any more."""
        self._failures += 1
        if self.answers and self._failures < max(3, self.limits.concurrency):
            return RowError(f"{error} (gave up after {self.limits.tries} tries)")
        times = f"for {self._failures} calls in a row" if self.answers else "at all"
        self.stop(FatalError(f"no call gets through {times}: {error}"))
        return StoppedError(str(error))

    # ------------------------------------------------------------ cost

    def _price(self, completion: Completion) -> float | None:
        if completion.cost is not None or self.limits.prices is None:
            return completion.cost
        read, written = self.limits.prices
        return (completion.prompt_tokens * read + completion.completion_tokens * written) / 1e6

    def _charge(self, completion: Completion) -> None:
        self.tally.calls += 1
        self.tally.prompt_tokens += completion.prompt_tokens
        self.tally.completion_tokens += completion.completion_tokens
        cost = self._price(completion) or 0.0
        self.tally.cost += cost
        self.budget.spent += cost

    @asynccontextmanager
    async def _budget(self, request: Request) -> AsyncIterator[None]:
        """Reserve the most that a call can cost until it is known what it did: the budget is never exceeded.

        A token is at least one byte, so a prompt's bytes bound its tokens (with some room for a chat template's own).
        """
        if self.limits.max_cost is None or self.limits.prices is None:
            yield
            return
        size = sum(len(m["content"].encode("utf-8", "replace")) + 16 for m in request.messages) + len(request.prefix) + 64
        most = (size * self.limits.prices[0] + request.max_tokens * self.limits.prices[1]) / 1e6
        budget = self.budget
        async with budget.freed:
            await budget.freed.wait_for(lambda: self._stop or self._fits(most) or not budget.reserved)
            if not self._fits(most):
                self.stop(StoppedError(f"the budget of ${self.limits.max_cost:g} is spent (${budget.spent:.4f})"))
            if self._stop:
                raise StoppedError("stopping")
            budget.reserved.append(most)
        try:
            yield
        finally:
            async with budget.freed:
                budget.reserved.remove(most)
                budget.freed.notify_all()

    def _fits(self, most: float) -> bool:
        assert self.limits.max_cost is not None
        return self.budget.spent + sum(self.budget.reserved) + most <= self.limits.max_cost

    # ------------------------------------------------------------ Ctrl-C

    @asynccontextmanager
    async def _signals(self) -> AsyncIterator[None]:
        """First Ctrl-C (or SIGTERM): stop cleanly. Second: give up what is in flight."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def handle() -> None:
            if self._stop is None:
                self.stop(StoppedError("interrupted: the same command goes on from there"))
            elif task:
                task.cancel()

        names = (signal.SIGINT, signal.SIGTERM)
        try:
            for name in names:
                loop.add_signal_handler(name, handle)
        except (ValueError, RuntimeError, NotImplementedError):  # not the main thread: the caller's business
            yield
            return
        try:
            yield
        finally:
            for name in names:
                loop.remove_signal_handler(name)


def _pause(error: TransientError, failed: int) -> float:
    """Seconds until the next try: what the server asked for, else half a second, doubled by each failure, with jitter."""
    if error.retry_after is not None:
        return error.retry_after + random.uniform(0, 0.1)
    return min(30.0, 0.5 * 2.0 ** max(failed - 1, 0)) * random.uniform(0.5, 1.0)
