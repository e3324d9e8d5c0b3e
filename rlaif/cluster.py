"""One job on many machines: its source in shards, each a job of its own in the folder beside OUT, done by Ray Data's workers.

A worker that dies loses nothing but its calls in flight: Ray Data runs its shard again, in the same or another process, and
the shard's store has what was answered until then. Nothing but paths and settings goes through Ray; rows, answers and
results stand in the folder, which every machine must see.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import platform
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlaif import __version__
from rlaif.data import Item, atomic, chunks
from rlaif.engines import IN_PROCESS, Engine
from rlaif.job import Job, agree, versions
from rlaif.labeler import Labeler
from rlaif.progress import Progress
from rlaif.records import Completion, FatalError, Request, RlaifError, Row, UsageError, digest
from rlaif.runner import Limits, Method
from rlaif.store import HeldError, Store

WINDOWS = 40
"""Rows of a shard for each one in flight, unless told otherwise: at its end a worker waits for the last ones, half idle."""

TRIES = 6
"""How often a shard is begun whose workers die: then it is something in it that kills them."""

HELD = 180.0
"""Seconds to wait for a shard's store that a lost worker holds: NFS frees a dead client's locks after 90."""

ENGINE = ("engine", "model", "base_url")


@dataclass(frozen=True)
class Spread:
    """Where a job runs: a cluster's address (`local`: one on this machine), workers (None: by its machines), rows a shard."""

    address: str
    workers: int | None = None
    shard_rows: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know of the whole; pickled to each. `token` is what it must find in `folder`."""

    folder: Path
    token: str
    source: str
    method: Method
    labeler: Labeler | None
    limits: Limits
    redo: bool
    where: Path
    version: str = __version__

    def shard(self, number: int) -> Job:
        """The job of one shard; its rows are those that the driver read, in a file of their own."""
        items = partial(_unpickled, self._items(number))
        return Job(self.source, self.folder / f"{number:05}.jsonl", items, self.method, what=f"shard {number}")

    def _items(self, number: int) -> Path:
        return self.folder / f"{number:05}.items"

    def _tries(self, number: int) -> Path:
        """As many bytes as the shard was begun in this run."""
        return self.folder / f"{number:05}.tries"

    def count_try(self, number: int) -> None:
        """Raises: FatalError for a shard that was begun too often."""
        with self._tries(number).open("ab") as file:
            if file.tell() >= TRIES:
                raise FatalError(f"shard {number}: its worker died {TRIES} times; the logs of Ray on that machine tell why")
            file.write(b".")

    def write(self, items: Iterator[Item], rows: int) -> int:
        """Write the shards' rows, so many each; returns how many shards there are."""
        count = 0
        for count, chunk in enumerate(chunks(items, rows), 1):
            with atomic(self._items(count - 1)) as temporary:
                temporary.write_bytes(pickle.dumps(chunk))
            self._tries(count - 1).unlink(missing_ok=True)
        return count

    def tidy(self, count: int) -> None:
        """Remove what OUT and its source hold too: the stores stay."""
        for number in range(count):
            for path in (self._items(number), self._tries(number), self.shard(number).out):
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------ stopping

    @property
    def _reason(self) -> Path:
        return self.folder / "stop.json"

    def stop(self, why: Mapping[str, Any]) -> None:
        """Every worker sends nothing more, waits for its calls in flight, and returns. The first reason stands."""
        with suppress(OSError), self._reason.open("x", encoding="utf-8") as file:
            json.dump(why, file)

    def stopped(self) -> RlaifError | None:
        """Why the run stops; None while it goes on."""
        if not self._reason.exists():
            return None
        try:
            why = json.loads(self._reason.read_text(encoding="utf-8"))
        except ValueError:  # it is being written
            return RlaifError("stopped")
        return (UsageError if why["usage"] else RlaifError)(why["message"])

    def begin(self) -> None:
        self._reason.unlink(missing_ok=True)
        self.proof.write_text(self.token, encoding="utf-8")

    @property
    def proof(self) -> Path:
        return self.folder / "seen-by-all.txt"


def _unpickled(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        return iter(pickle.load(file))


class Worker:
    """What Ray Data keeps alive on a machine: one engine, and an event loop of its own, for one shard after the other."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._loop = asyncio.Runner()
        self._engine: Engine | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of one shard's number to its report, as JSON; or to `failed`, where it is not finished."""
        try:
            if why := self.plan.stopped():
                raise why
            report = self._work(int(batch["number"][0]))
        except RlaifError as error:
            failed = {"message": f"{error} (on {platform.node()})", "usage": isinstance(error, UsageError)}
            self.plan.stop(failed)  # at once: the driver may hear of it late
            report = {"failed": failed}
        return {"number": batch["number"], "report": [json.dumps(report)]}

    def _work(self, number: int) -> dict[str, Any]:
        self._see()
        if self._engine is None and self.plan.labeler:
            self._engine = _Stoppable(self.plan.labeler.make_engine(self.plan.limits), self.plan)
        self.plan.count_try(number)
        shard = self.plan.shard(number)
        total = sum(1 for _ in shard.items())
        until = time.monotonic() + HELD
        while True:
            try:
                return self._loop.run(shard.work(self._engine, self.plan.limits, total, self.plan.redo))
            except HeldError:
                if time.monotonic() > until:
                    raise
                time.sleep(1)

    def _see(self) -> None:
        """Raises: FatalError where this machine sees another folder than the driver, or runs another rlaif."""
        plan = self.plan
        if plan.version != __version__:
            raise FatalError(f"rlaif {__version__} is installed here, and {plan.version} where the command was given")
        try:
            found = plan.proof.read_text(encoding="utf-8")
        except OSError:
            found = ""
        if found != plan.token:
            raise FatalError(f"{plan.folder} is not seen here: OUT must be in a folder that all machines of the cluster share")
        if plan.where.is_dir():
            os.chdir(plan.where)  # so that a model's relative path means the same


class _Stoppable:
    """An engine that refuses to answer once the run stops: its runner then stops as cleanly as by Ctrl-C."""

    def __init__(self, engine: Engine, plan: Plan):
        self.identity, self.notes = engine.identity, engine.notes
        self._engine, self._plan = engine, plan
        self._looked = 0.0

    async def complete(self, request: Request) -> Completion:
        if time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            if self._plan.stopped():
                raise FatalError("the run is stopping")
        return await self._engine.complete(request)

    async def close(self) -> None:
        await self._engine.close()


# ---------------------------------------------------------------- the driver


def run(job: Job, labeler: Labeler | None, limits: Limits, total: int, spread: Spread, redo: bool = False) -> dict[str, Any]:
    """Work through all shards and write OUT and its run file, which is returned; `labeler` None reads stored answers anew.

    OUT appears once every shard is done. What was answered until a stop stands in the shards' stores, and the same command
    goes on from there.

    Raises: UsageError for other settings than those that the shards were begun with, a budget, or an address without a
    cluster; FatalError where Ray is not installed; RlaifError for what stopped the run.
    """
    if limits.max_cost is not None:
        raise UsageError("--max-cost does not go with --ray: workers cannot share a budget as they spend it")
    with _cluster(spread) as ray:
        workers = spread.workers or _room(ray, labeler, spread.address)
        job.shards.mkdir(exist_ok=True)
        with closing(Store(job.shards / "shards.store")) as store:  # held: no other process works on this output
            found = store.meta("settings") or {}
            rows = spread.shard_rows or found.get("shard_rows", min(WINDOWS * limits.concurrency, -(-total // workers)))
            engine = {name: getattr(labeler, name) for name in ENGINE} if labeler else found.get("engine")
            settings = {"source": Path(job.source).name, "shard_rows": rows, "engine": engine, **job.method.settings()}
            agree(store, settings, job.out, redo)
            plan = Plan(job.shards.resolve(), secrets.token_hex(), job.source, job.method, labeler, limits, redo, Path.cwd())
            plan.begin()
            count = plan.write(job.items(), rows)
            sums = _done(ray, plan, count, total, workers, job.what)
            return _written(job, plan, count, total, sums)


def _done(ray: Any, plan: Plan, count: int, total: int, workers: int, what: str) -> dict[str, Any]:
    """The sums of all shards' reports. Raises: RlaifError for what stopped the run."""
    sums: dict[str, Any] = {"workers": workers}
    done, began = 0, time.monotonic()
    with _interrupts(plan), Progress(total, what) as progress:
        try:
            for row in _reports(ray, plan, count, workers):
                report = json.loads(row["report"])
                if "failed" in report:
                    plan.stop(report["failed"])
                    continue
                sums, done = _add(sums, report), done + 1
                rate = sums["rows"] / (time.monotonic() - began)
                progress.update(sums["rows"], f"{rate:.1f} rows/s · {done}/{count} shards")
        except ray.exceptions.RayActorError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise RlaifError(f"workers cannot start: {first}; {_kept(done, count)}") from error
    if why := plan.stopped():
        raise type(why)(f"{why}; {_kept(done, count)}")
    if done < count:
        raise RlaifError(f"{count - done} of {count} shards are missing: the same command goes on")
    sums["wall_seconds"] = round(time.monotonic() - began, 3)
    return sums


def _kept(done: int, count: int) -> str:
    return f"{done} of {count} shards are finished: the same command goes on from there"


def _reports(ray: Any, plan: Plan, count: int, workers: int) -> Iterator[Row]:
    """Each shard's number and report, in the order in which they are done."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
    wanted = _resources(ray, workers, plan.labeler)
    done = numbers.map_batches(
        Worker,
        fn_constructor_args=(plan,),
        batch_size=1,
        # One shard at a time: a second would wait for a worker that is busy while others are idle.
        compute=ray.data.ActorPoolStrategy(size=min(workers, count), max_tasks_in_flight_per_actor=1),
        **wanted,
    )
    return iter(done.iter_rows())


def _resources(ray: Any, workers: int, labeler: Labeler | None) -> dict[str, Any]:
    """What each worker takes up: a GPU, or its share of its machine's cores where it computes on them."""
    local = labeler is not None and labeler.engine in IN_PROCESS
    if local and ray.cluster_resources().get("GPU"):
        return {"num_gpus": 1}
    cores = _cores(ray)
    each = min(cores) // -(-workers // len(cores)) if local and cores else 1
    return {"num_cpus": max(1, int(each))}


def _cores(ray: Any) -> list[float]:
    """The cores of each machine that has any for us."""
    found = (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return [cores for cores in found if cores]


def _room(ray: Any, labeler: Labeler | None, address: str) -> int:
    """How many workers the cluster has room for: one a GPU, else one a machine."""
    gpus = int(ray.cluster_resources().get("GPU", 0)) if labeler and labeler.engine in IN_PROCESS else 0
    found = gpus or len(_cores(ray))
    if not found:
        raise UsageError(f"--ray {address}: no GPUs or cores there yet: say how many --workers it will have")
    return found


@contextmanager
def _cluster(spread: Spread) -> Iterator[Any]:
    """Ray, connected to the cluster. Raises: UsageError where there is none."""
    _reach(spread.address)
    ray = _ray()
    here = {"num_cpus": max(spread.workers or 1, os.cpu_count() or 1), "include_dashboard": False}
    more = here if spread.address == "local" else {}
    try:
        ray.init(address=spread.address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(f"--ray {spread.address}: no cluster there: {first}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises: UsageError for an address at which nobody listens, of which Ray itself would say so after many minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UsageError(f"--ray {address}: HOST:PORT of a cluster's head, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray {address}: no cluster there: {error}") from error


def _ray() -> Any:
    """Ray, quiet and without telemetry. Raises: FatalError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise FatalError(f"--ray: the package {error.name} is not installed: pip install 'rlaif[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


@contextmanager
def _interrupts(plan: Plan) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): workers finish what is in flight. Second: they are ended."""

    def handle(*_: object) -> None:
        if plan.stopped():
            raise KeyboardInterrupt
        plan.stop({"message": "interrupted", "usage": False})

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, handle) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)


# ---------------------------------------------------------------- what was made


def _add(sums: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The sums with one more shard's report. Raises: RlaifError where it was made with other settings than the others."""
    if not sums.get("settings"):
        return {**sums, **{name: report[name] for name in ("settings", "rows", "statuses", "notes", "this_run", "all_runs")}}
    if sums["settings"] != report["settings"]:
        raise RlaifError("some shards were made with other settings than the rest: --relabel makes them anew")
    return {
        **sums,
        "rows": sums["rows"] + report["rows"],
        "notes": list(dict.fromkeys([*sums["notes"], *report["notes"]])),
        **{name: _plus(sums[name], report[name]) for name in ("statuses", "this_run", "all_runs")},
    }


def _plus(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Sums by name; None, an unknown cost, counts nothing beside a known one. What is in flight is no sum, but the most."""
    sums = {name: other[name] if held is None else held + (other[name] or 0) for name, held in one.items()}
    return sums | {"in_flight": max(one["in_flight"], other["in_flight"])} if "in_flight" in one else sums


def _written(job: Job, plan: Plan, count: int, total: int, sums: dict[str, Any]) -> dict[str, Any]:
    """OUT, of the shards in the source's order, and its run file."""
    key = digest(sums["settings"])
    if sums["rows"] != total:
        raise RlaifError(f"{job.out}: {total} rows when it was checked, and {sums['rows']} then")

    def rows() -> Iterator[Row]:
        for number in range(count):
            shard = plan.shard(number)
            with closing(Store(shard.store_path)) as store:
                yield from shard.results(store, key)

    report = {
        "source": job.source,
        "complete": True,
        "stopped": None,
        "rows": total,
        "of_rows": total,
        "statuses": sums["statuses"],
        "settings": sums["settings"],
        **job.facts,
        "shards": {"count": count, "workers": sums["workers"]},
        "versions": {"python": platform.python_version(), **versions(), **versions(["ray"])},
        "notes": sums["notes"],
        "this_run": {**sums["this_run"], "wall_seconds": sums["wall_seconds"]},
        "all_runs": sums["all_runs"],
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    job.write(rows, report)
    plan.tidy(count)
    return report
