"""Where training rows come from: a run file beside them names their sources, by hash, and who labelled those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlaif import __version__
from rlaif.data import atomic, run_path
from rlaif.records import UsageError

AGREEMENT = ("accuracy", "accuracy_all", "kappa", "coverage")
"""What is told of a labeler's agreement with humans, as `rlaif.evaluate.agreement.statistics` names it."""


def sha256(source: str | Path) -> str | None:
    """Of a file's bytes; None for what is no file (a hub name, a saved dataset)."""
    path = Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_run(path: Path) -> dict[str, Any] | None:
    """A run file, None where there is none. Raises: UsageError for what is no run file."""
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(run, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return run


def run_of(source: str | Path) -> dict[str, Any]:
    """What the run file beside a file tells of its rows; nothing where there is none, or where they were changed since."""
    path = Path(source)
    run = read_run(run_path(path)) if path.is_file() else None
    return run if run and run.get("sha256") in (None, sha256(path)) else {}


def write_run(
    out: Path, made_by: str, options: Mapping[str, Any], sources: Iterable[str | None], **counts: int | Mapping[str, int]
) -> None:
    """Write the run file of rows that a command made, by its options, from sources; None is one that was not given.

    Of each source it tells the hash, and what its own run file knows: the settings of the model's work that made it
    (`labeled_by`), or the sources that it was made from itself.
    """
    given = [source for source in sources if source]
    report = {
        "made_by": made_by,
        "settings": {name: value for name, value in options.items() if str(value) not in (*given, str(out))},
        "sources": [_source(source) for source in given],
        **counts,
        "sha256": sha256(out),
        "versions": {"rlaif": __version__},
    }
    with atomic(run_path(out)) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _source(source: str) -> dict[str, Any]:
    run = run_of(source)
    known = {"sources": run["sources"]} if "sources" in run else {"labeled_by": run.get("settings")}
    return {"source": source, "sha256": sha256(source), **known}


# ---------------------------------------------------------------- for training


def labelers(files: Iterable[str], human: str | None = None) -> list[dict[str, Any]]:
    """Who labelled the rows of training files, as their run files tell it: `data`, `labels` (the labelled file), `settings`,
    and `agreement` with the labelled file's column `human`: a metric's name to its estimate, None without such a column.

    Raises: UsageError where there is no labelled file that could be measured, it has changed, or has no such column.
    """
    files = list(dict.fromkeys(files))
    found = [_labeler(name, source, human) for name in files for source in _labelled(run_of(name).get("sources") or ())]
    if human and not found:
        raise UsageError(
            f"human: {', '.join(files)}: no run file beside it says which labelled file these rows were made from "
            "(`rlaif pairs` and `rlaif build` write one)"
        )
    return found


def _labelled(sources: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for source in sources:
        if source.get("labeled_by"):
            yield source
        yield from _labelled(source.get("sources") or ())


def _labeler(data: str, source: Mapping[str, Any], human: str | None) -> dict[str, Any]:
    agreement = None
    if human:
        agreement = {"column": human, **_agreement(_found(data, source), human)}
    return {"data": data, "labels": source["source"], "settings": source["labeled_by"], "agreement": agreement}


def _found(data: str, source: Mapping[str, Any]) -> str:
    """The labelled file's path: as it was given when the rows were made from it, or beside them."""
    name = Path(source["source"])
    places = [place for place in (name, Path(data).parent / name.name) if place.is_file()]
    if not places:
        raise UsageError(f"human: {data} was made from {name}, which is not there any more")
    same = next((place for place in places if sha256(place) == source["sha256"]), None)
    if same is None:
        raise UsageError(f"human: {places[0]} has changed since {data} was made from it")
    return str(same)


def _agreement(labels: str, human: str) -> dict[str, Any]:
    from rlaif.evaluate.agreement import align
    from rlaif.options import labelled_rows

    rows = labelled_rows(labels)
    try:
        found = align(rows, human).metrics
    except UsageError as error:
        raise UsageError(f"human: {labels}: {error}") from error
    return {name: asdict(found[name]) for name in AGREEMENT}
