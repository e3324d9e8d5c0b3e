"""The store beside an output: raw completions by request key and row results with their status, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlaif.records import RETRIED, Completion, RlaifError, Row, UsageError

VERSION = 1

PARTS = ("votes", "samples", "revisions")
"""Columns of a result that hold what was asked for it, each part with its `status` and its request's `key`."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- A completion is stored as it arrives, before it is parsed. `usable` is 0 once its row came to nothing with it: it is
-- then asked again on the next run, but still there to be parsed again.
CREATE TABLE IF NOT EXISTS completions (
    key TEXT PRIMARY KEY, usable INTEGER NOT NULL, value TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, status TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Calls answered, tokens read and written, and US dollars (None where no price is known)."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None


class Store:
    """Keeps what was paid for. Every write is committed at once (WAL), so that a killed process loses nothing it was given.

    Raises on opening: UsageError when another process works on the same output, RlaifError for a file that is no store,
    is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0)
        except sqlite3.Error as error:
            raise RlaifError(f"{path}: cannot be opened: {error}") from error
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            if "locked" in str(error):
                raise UsageError(f"{path}: another process works on this output; wait for it, or choose another -o") from None
            raise RlaifError(f"{path}: not a store that can be read ({error}); move it away to start anew") from error
        except RlaifError:
            self._db.close()
            raise

    def _open(self) -> None:
        # Exclusive: SQLite's own lock is then held until the process ends, however it ends.
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise RlaifError(f"{self.path}: written by a newer rlaif (store version {found}, this one knows {VERSION})")
        self._db.executescript(SCHEMA)
        self._db.execute(f"PRAGMA user_version={VERSION}")

    def close(self) -> None:
        self._db.close()

    def settings(self) -> dict[str, Any] | None:
        """The settings that the rows in here were made with; None in a new store."""
        found = self._read("SELECT value FROM meta WHERE name = 'settings'")
        return self._load(found[0]) if found else None

    def set_settings(self, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True)
        self._write("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (text,))

    def completion(self, key: str, even_failed: bool = False) -> Completion | None:
        """The stored answer to a request; one that its row failed with only when asked for."""
        query = "SELECT value FROM completions WHERE key = ?" + ("" if even_failed else " AND usable")
        found = self._read(query, key)
        return Completion(**self._load(found[0]), key=key) if found else None

    def add_completion(self, key: str, completion: Completion) -> None:
        value = asdict(completion)
        del value["key"]
        values = (key, _dump(value), completion.prompt_tokens, completion.completion_tokens, completion.cost)
        self._write("INSERT OR REPLACE INTO completions VALUES (?, 1, ?, ?, ?, ?)", values)

    def result(self, key: str) -> Row | None:
        """The stored result of a row, whatever its status."""
        found = self._read("SELECT value FROM rows WHERE key = ?", key)
        return self._load(found[0]) if found else None

    def status(self, key: str) -> str | None:
        """The stored status of a row; None for one that has no result."""
        found = self._read("SELECT status FROM rows WHERE key = ?", key)
        return str(found[0]) if found else None

    def finished(self, key: str) -> bool:
        """Whether the row needs no call any more."""
        status = self.status(key)
        return status is not None and status not in RETRIED

    def add_result(self, key: str, result: Row) -> None:
        """Store a row's result. The completions that a row failed with will be asked for again."""
        self._write("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", (key, result["status"], _dump(result)))
        if result["status"] in RETRIED:
            for part in (part for name in PARTS for part in result.get(name) or []):
                if part["status"] in RETRIED and part["key"]:
                    self._write("UPDATE completions SET usable = 0 WHERE key = ?", (part["key"],))

    def usage(self) -> Usage:
        """What all completions in the store cost, over all runs."""
        query = "SELECT count(*), total(prompt_tokens), total(completion_tokens), sum(cost) FROM completions"
        calls, prompt, completion, cost = self._read(query) or (0, 0, 0, None)
        return Usage(calls, int(prompt), int(completion), cost)

    def _read(self, query: str, *values: str) -> tuple[Any, ...] | None:
        try:
            found: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return found

    def _load(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> RlaifError:
        return RlaifError(f"{self.path}: damaged ({error}); move it away to start anew")

    def _write(self, query: str, values: tuple[Any, ...]) -> None:
        try:
            self._db.execute(query, values)
        except sqlite3.DatabaseError as error:  # disk full, read-only folder, damaged
            raise RlaifError(f"{self.path}: cannot be written: {error}") from error


def _dump(value: Any) -> str:
    # ASCII, so that a lone surrogate from a server can be stored too.
    return json.dumps(value, separators=(",", ":"))
