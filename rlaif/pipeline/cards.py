"""Cards of what a pipeline's run made: each training set's, and what led to a model, in the card that its training wrote."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlaif.data import SUFFIXES, atomic, kind_of, read_rows
from rlaif.pipeline.lineage import Hashes, Lineage, is_judge
from rlaif.pipeline.status import is_held, labelers, total
from rlaif.provenance import read_run, run_of
from rlaif.records import UsageError
from rlaif.train.card import figures_table, flat, shown, table, text, write_card

CARDS = "cards"
"""The folder of training sets' cards in a run's."""

SECTION = re.compile(r"^## Lineage\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
CLIMB = re.compile(r"(?<![\w/])(?:\.\./)+(?:[^\s,=:\[\]{}'\"]*/)?")
"""How a file from outside is named from a run's folder: it tells how folders lie on this machine."""

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))
LARGEST = "n>10M"
"""The hub's words for how many rows there are."""


def write_cards(folder: Path) -> list[Path]:
    """Write the cards of all training sets and models of a run; returns their files. Again, it writes the same.

    Raises: UsageError where there is nothing yet, or what there is has changed since the run made it.
    """
    lineage = Lineage.load(folder)
    written = [write(lineage, name) for name in (*training_sets(lineage), *models(lineage))]
    if not written:
        raise UsageError(f"{folder}: no training set and no model has been made there yet")
    return written


def training_sets(lineage: Lineage) -> list[str]:
    """The files that `rlaif pairs` and `rlaif build` steps made, in the steps' order."""
    return [name for name in _made(lineage, "pairs", "build") if name.endswith(SUFFIXES)]


def models(lineage: Lineage) -> list[str]:
    """The folders that `rlaif train` steps made, in the steps' order; the model is in the folder `model` of each."""
    return [name for name in _made(lineage, "train") if (lineage.folder / name / "model").is_dir()]


def _made(lineage: Lineage, *commands: str) -> Iterator[str]:
    for own in lineage.steps.values():
        if own["status"] == "done" and own["words"][0] in commands:
            yield from own["outputs"]


def write(lineage: Lineage, name: str) -> Path:
    """Write the card of a training set or a model. Raises: as `write_cards` does."""
    check(lineage, name)
    if name in training_sets(lineage):
        path = card_of(lineage, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        card = dataset_card(lineage, name)
    else:
        path = lineage.folder / name / "model" / "README.md"
        if not path.exists():
            write_card(path, read_run(lineage.folder / name / "run.json") or {})
        card = with_section(path.read_text(encoding="utf-8"), section(lineage, name))
    with atomic(path) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return path


def card_of(lineage: Lineage, name: str) -> Path:
    """Where a training set's card stands."""
    suffix = next(own for own in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(own))
    return lineage.folder / CARDS / name.removesuffix(suffix).replace("/", "-") / "README.md"


def check(lineage: Lineage, name: str) -> None:
    """Raises: UsageError where what is written down is not, or not any more, how the file was made."""
    folder, hashes = lineage.folder, Hashes(lineage.folder)
    if is_held(folder):
        raise UsageError(f"{folder}: the pipeline runs there now: wait for its end")
    if lineage.steps[str(lineage.maker(name))]["outputs"][name] != hashes.of(name):
        raise UsageError(f"{folder / name}: has changed since it was made: `rlaif run` makes it anew")
    for step in lineage.ancestors(name):
        for used, told in lineage.steps[step]["inputs"].items():
            maker = told["made_by"]
            now = lineage.steps[maker]["outputs"].get(used) or hashes.of(used) if maker else None
            if now and now != told["sha256"]:
                raise UsageError(f"{folder / name}: {used} was made anew since: `rlaif run` goes on from there")


# ---------------------------------------------------------------- a training set's card


def dataset_card(lineage: Lineage, name: str) -> str:
    """As the hub reads them: https://huggingface.co/docs/hub/datasets-cards."""
    path = lineage.folder / name
    columns, count = _columns(path)
    run = run_of(path)
    front = {
        "tags": ["rlaif", "trl", "synthetic", *(["preference"] if {"chosen", "rejected"} <= set(columns) else [])],
        "size_categories": [next((words for most, words in SIZES if count < most), LARGEST)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": path.name}]}],
    }
    told, step = lineage.told["pipeline"], lineage.steps[str(lineage.maker(name))]
    left_out = [(reason, f"{number:,}") for reason, number in (run.get("left_out") or {}).items() if number]
    settings = [(key, bare(shown(value))) for key, value in flat(run.get("settings") or {})]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {text(path.stem)} of {text(told['name'])}",
        f"A training set in the columns of TRL's trainers, made by `rlaif {_command(step)}`. The lineage below names models "
        "that answered and judged on the way.",
        *([text(told["description"])] if told["description"] else []),
        "## Rows",
        f"{count:,} rows" + (f", made from {run['rows']:,}." if isinstance(run.get("rows"), int) else "."),
        *(["Left out:", table(("reason", "rows"), left_out)] if left_out else ["Nothing was left out."] if run else []),
        "## Columns",
        table(("column", "holds", "rows without"), [(own, *what) for own, what in columns.items()]),
        *(["## Settings", table(("setting", "value"), settings)] if settings else []),
        section(lineage, name),
    ]
    return "\n\n".join(parts) + "\n"


def _command(step: Mapping[str, Any]) -> str:
    """The words that name the command, without its arguments."""
    return " ".join(step["words"][: 2 if step["words"][0] == "build" else 1])


def _columns(path: Path) -> tuple[dict[str, tuple[str, str]], int]:
    """What each column holds, and how many rows have nothing there; and how many rows there are."""
    kinds: defaultdict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    count = 0
    for _, row in read_rows(str(path)):
        count += 1
        for name, value in row.items():
            if value is not None:
                kinds[name][_kind(value)] += 1
    found = {name: (" or ".join(own), f"{count - sum(own.values()) or ''}") for name, own in kinds.items()}
    return found, count


def _kind(value: Any) -> str:
    messages = isinstance(value, list) and value and all(isinstance(own, dict) and "role" in own for own in value)
    return "messages" if messages else kind_of(value)


# ---------------------------------------------------------------- what led to it


def with_section(card: str, own: str) -> str:
    """The card with this section in place of its `## Lineage`, or at its end."""
    rest = SECTION.search(card)
    if rest is None:
        return f"{card.rstrip()}\n\n{own}\n"
    after = card[rest.end() :]
    return card[: rest.start()] + own + (f"\n\n{after}" if after else "\n")


def section(lineage: Lineage, name: str) -> str:
    """`## Lineage` of a file or folder of the run. Files are told by name and hash, never where they stand."""
    steps = lineage.ancestors(name)
    told = lineage.told["pipeline"]
    size = f", size {text(told['size'])}" if told["size"] else ""
    return "\n\n".join(
        [
            "## Lineage",
            f"Made by the pipeline {text(told['name'])}{size}, of the file {text(PurePosixPath(told['file']).name)} "
            f"(SHA-256 {told['sha256']}), whose steps are command lines of rlaif:",
            table(("step", "command", "rlaif"), []) + "".join(f"\n{line}" for line in _steps(lineage, steps)),
            "What they read and made (of a folder, the hash is over those of its files):",
            table(("file", "made by", "SHA-256"), _files(lineage, steps)),
            "### Labelers",
            *_labelers(lineage, steps),
            *_others(lineage, steps),
            "### Tokens and cost",
            *_usage(lineage, steps),
        ]
    )


def _steps(lineage: Lineage, steps: Iterable[str]) -> Iterator[str]:
    for step in steps:
        own = lineage.steps[step]
        command = " ".join(text(bare(word)) or "''" for word in own["words"])  # each by itself, for long texts are cut
        yield f"| {text(step)} | rlaif {command} | {text(own['code']['rlaif'])} |"


def _files(lineage: Lineage, steps: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    found: dict[tuple[str, str, str], None] = {}
    for step in steps:
        own = lineage.steps[step]
        for name, told in own["inputs"].items():
            found[bare(name), told["made_by"] or "from outside", told["sha256"] or "it was not there"] = None
        for name, sha in own["outputs"].items():
            found[name, step, sha or "none"] = None
    return iter(found)


def _labelers(lineage: Lineage, steps: Iterable[str]) -> Iterator[str]:
    found = labelers(lineage, steps)
    if not found:
        yield "No model judged on the way."
    for own in found:
        engine = own["settings"]["engine"]
        named = f"{own['name']}: " if own["name"] else ""
        yield f"{text(named + _model(engine))}, asked in {text(', '.join(own['steps']))}:"
        settings = {name: value for name, value in own["settings"].items() if name != "name"}
        yield table(("setting", "value"), [(name, bare(shown(value))) for name, value in flat(settings)])
        for measured in own["agreement"]:
            how = "" if measured["same"] else ", **with another template or other knobs**"
            of = f"column {text(measured['human'])}, rows of {text(measured['labels'])}"
            yield f"Its agreement with humans ({of}){how}, with intervals by resampling prompts:"
            yield figures_table({name: value for name, value in measured["metrics"].items() if value})
        if not own["agreement"]:
            yield "Its agreement with humans was not measured."


def _others(lineage: Lineage, steps: Iterable[str]) -> Iterator[str]:
    rows = [
        (step, _model(asked["engine"]), asked.get("method"))
        for step in steps
        for asked in lineage.steps[step]["asked"]
        if not is_judge(asked)
    ]
    if rows:
        yield "### Other models that answered"
        yield table(("step", "model", "what for"), rows)


def _model(engine: Mapping[str, Any]) -> str:
    return f"{bare(str(engine.get('model')))} ({engine['engine']})"


def _usage(lineage: Lineage, steps: Iterable[str]) -> Iterator[str]:
    each = [(step, own) for step in steps if (own := lineage.steps[step]["usage"])]
    if not each:
        yield "No model was asked on the way."
        return
    whole = total(lineage, [step for step, _ in each])["usage"]
    rows = [(step, *_spent(own)) for step, own in [*each, ("in all", whole)]]
    yield table(("step", "calls", "tokens read", "tokens written", "US $"), rows)


def _spent(usage: Mapping[str, Any]) -> Iterator[str]:
    for name in ("calls", "prompt_tokens", "completion_tokens"):
        yield f"{usage.get(name) or 0:,}"
    cost = usage.get("cost_usd")
    yield "not known" if cost is None else f"{cost:.4f}"


def bare(value: str) -> str:
    """The text with the last name alone of each file from outside.

    >>> bare("--set data=../../mine/rows.jsonl")
    '--set data=rows.jsonl'
    """
    return CLIMB.sub("", value)
