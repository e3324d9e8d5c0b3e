"""One HTML file about labelled rows: what was asked, how good it is, what it cost, and every row with its votes.

The page loads nothing. Its texts come from models and data sets and are never markup: Jinja escapes what the template
shows, rows travel as JSON and become text nodes, and a content security policy allows the page's own script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlaif import __version__
from rlaif.data import SURROGATE, as_text, atomic, run_path
from rlaif.evaluate import agreement
from rlaif.evaluate.tables import HUMAN, METRICS
from rlaif.options import labelled_rows
from rlaif.records import LABELLED, STATUSES, Label, Row, UsageError
from rlaif.report import plots

FOLDER = Path(__file__).parent

RESAMPLES = 1000
MANY = 6
"""Of more names than these, the pairs are so many that their intervals take a fifth of the resamples, and less room."""

LABELS: tuple[Label | None, ...] = ("a", "b", "tie", None)
"""Labels by their code in `agreement.Sample`; None, the last, has the code −1."""

GROUPS = {"principle": "principles", "labeler": "labelers"}
"""What a vote may name, and what several of them are called."""

VOTE = (
    *("labeler", "principle", "order", "sample", "status", "soft_label", "text", "rationale", "error"),
    *("prompt_tokens", "completion_tokens"),
)
"""What the page shows of a vote, in the order in which it gets them."""

SPENT = ("prompt_tokens", "completion_tokens")
INTERVALS = ("accuracy_all", "kappa")
"""The metrics that are plotted."""


@dataclass(frozen=True)
class Output:
    """One output of `rlaif label`: its rows, their human votes, and both as arrays.

    `run` is its run file, None where there is none. `groups` are its rows by what votes name: `principle` or `labeler` to
    name to the rows as these votes alone have them.
    """

    name: str
    path: Path
    rows: list[Row]
    humans: list[agreement.Votes]
    sample: agreement.Sample
    run: dict[str, Any] | None
    groups: dict[str, dict[str, list[Row]]]

    def labels(self) -> list[Label | None]:
        return [LABELS[code] for code in self.sample.labels]


@dataclass(frozen=True)
class Listing:
    """What the page lists: `rows` of `total` rows, `first` of `all_first` failed or wrong ones."""

    rows: int
    total: int
    first: int
    all_first: int


def write_report(
    outs: Sequence[str],
    out: Path,
    human: str | None = None,
    values: Mapping[str, str] | None = None,
    title: str | None = None,
    max_rows: int = 2000,
    seed: int = 0,
) -> Listing:
    """Write the report on outputs of `rlaif label` to `out`; several are labelers of the same rows, matched by `id`.

    `human` and `values` are as in `agreement.leaderboard`. Figures are about all rows; above `max_rows`, the rows listed are
    those without a label or with a wrong one first, then a random sample by `seed` of the others.

    Raises: UsageError for an output that cannot be written, and for rows that cannot be read, measured or matched.
    """
    _check_page(out, outs)
    outputs = [_output(name, Path(path), human, values) for name, path in zip(_names(outs), outs, strict=True)]
    table = _matched(outputs)
    named = {output.name: output.rows for output in outputs}
    results = agreement.leaderboard(named, human, resamples=RESAMPLES, seed=seed, values=values) if human else []
    entries = [_entry(found, outputs) for found in table]
    kept, listing = _listed(entries, max_rows, seed)
    data = {"labelers": [o.name for o in outputs], "human": bool(human), "vote": VOTE, "rows": [entries[n] for n in kept]}
    html = _page(
        title=title or "AI labels: " + ", ".join(output.name for output in outputs),
        outputs=[_facts(output) for output in outputs],
        statuses=STATUSES,
        human=human,
        board=_board(results),
        **_figures(outputs, results),
        groups=_groups(outputs, table, seed),
        costs=[cost for output in outputs for cost in _costs(output)],
        listing=listing,
        seed=seed,
        data=_json(data),
    )
    with atomic(out) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return listing


def _check_page(out: Path, outs: Sequence[str]) -> None:
    if not out.name.endswith((".html", ".htm")):
        raise UsageError(f"{out}: the report must end in .html or .htm")
    if out.is_dir():
        raise UsageError(f"{out}: is a folder")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: no such folder: {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: the folder {out.parent} cannot be written to")
    found = [Path(path).resolve() for path in outs]
    if out.resolve() in found:
        raise UsageError(f"{out}: the report would overwrite its input")
    twice = next((path for n, path in enumerate(found) if path in found[:n]), None)
    if twice is not None:
        raise UsageError(f"{twice.name} is given twice: several files are several labelers")


# ---------------------------------------------------------------- rows


def _names(outs: Sequence[str]) -> list[str]:
    """Files by their own names, with the folder or all of the path where these do not tell them apart."""
    for parts in (1, 2):
        short = ["/".join(PurePath(out).parts[-parts:]) for out in outs]
        if len(set(short)) == len(short):
            return short
    return list(outs)


def _output(name: str, path: Path, human: str | None, values: Mapping[str, str] | None) -> Output:
    rows = labelled_rows(str(path))
    try:
        _check_rows(rows)
        humans = agreement.human_votes(rows, human, values) if human else [[] for _ in rows]
        sample = agreement.sample_of(rows, humans, "label")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    groups = {field: agreement.split_votes(rows, field) for field in GROUPS if _several(rows, field)}
    return Output(name, path, rows, humans, sample, _run(run_path(path)), groups)


def _check_rows(rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, 1):
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise UsageError(f"row {number}, column 'id': {row['id']!r} is neither text nor a whole number")
        if row["status"] not in STATUSES:
            raise UsageError(f"row {number}, column 'status': {row['status']!r} is none of {', '.join(STATUSES)}")
        votes = row.get("votes")
        if votes is not None and not (isinstance(votes, list) and all(_is_vote(vote) for vote in votes)):
            raise UsageError(f"row {number}, column 'votes': expected a list of votes, each with order, status and soft_label")


def _is_vote(vote: Any) -> bool:
    return isinstance(vote, dict) and {"order", "status", "soft_label"} <= vote.keys()


def _several(rows: Sequence[Row], field: str) -> bool:
    return len({str(vote[field]) for row in rows for vote in row.get("votes") or () if vote.get(field)}) > 1


def _run(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(run, dict):
        raise UsageError(f"{path}: expected a JSON object")
    return run


Found = list[int | None]
"""Where one row stands in each output: its index, or None."""


def _matched(outputs: Sequence[Output]) -> list[Found]:
    """The rows of all outputs, matched by id, in the order in which the outputs first have them.

    Raises: UsageError for an id that occurs twice, outputs without a common id, rows of one id that are not the same.
    """
    if len(outputs) == 1:
        return [[n] for n in range(len(outputs[0].rows))]
    table: dict[str | int, Found] = {}
    for place, output in enumerate(outputs):
        known = len(table)
        for n, row in enumerate(output.rows):
            found = table.setdefault(row["id"], [None] * len(outputs))
            if found[place] is not None:
                raise UsageError(
                    f"{output.path} row {n + 1}, column 'id': {row['id']!r} is there twice: rows cannot be matched"
                )
            found[place] = n
            _check_same(found, outputs, place)
        if place and len(table) == known + len(output.rows):
            raise UsageError(
                f"{output.path}: no row has an id of {outputs[0].path}: several files are labelers of the same rows"
            )
    return list(table.values())


def _check_same(found: Found, outputs: Sequence[Output], place: int) -> None:
    first = next(n for n, index in enumerate(found) if index is not None)
    mine, theirs = found[place], found[first]
    assert mine is not None
    assert theirs is not None
    here, there = outputs[place].rows[mine], outputs[first].rows[theirs]
    differing = [name for name in ("prompt", "response_a", "response_b") if here[name] != there[name]]
    if outputs[place].humans[mine] != outputs[first].humans[theirs]:
        differing.append("the human column")
    if differing:
        raise UsageError(
            f"{outputs[place].path} row {mine + 1}: id {here['id']!r} has another {differing[0]} than in "
            f"{outputs[first].path}: several files are labelers of the same rows"
        )


def _entry(found: Found, outputs: Sequence[Output]) -> dict[str, Any]:
    """A row as the page gets it."""
    place = next(n for n, index in enumerate(found) if index is not None)
    index = found[place] or 0
    row, humans = outputs[place].rows[index], outputs[place].humans[index]
    given = [vote for vote in humans if vote is not None]
    human = agreement.majority(given)
    results = [None if n is None else _result(output, n, human) for output, n in zip(outputs, found, strict=True)]
    differ = _differ([result["label"] for result in results if result])
    return {
        "id": str(row["id"]),
        "prompt": as_text(row["prompt"]) or _text(row["prompt"]),
        "a": _text(row["response_a"]),
        "b": _text(row["response_b"]),
        "human": human,
        "humans": given,
        "disagree": ["labelers"] if differ else [],
        "results": results,
    }


def _result(output: Output, n: int, human: Label | None) -> dict[str, Any]:
    """What one output says of a row; `right` is None where there is no label or no human one."""
    row, sample = output.rows[n], output.sample
    label = LABELS[sample.labels[n]]
    differ = [GROUPS[f] for f, named in output.groups.items() if _differ([rows[n]["label"] for rows in named.values()])]
    return {
        "status": row["status"],
        "label": label,
        "soft": None if np.isnan(sample.soft[n]) else round(float(sample.soft[n]), 6),
        "right": None if label is None or human is None else label == human,
        "error": _text(row.get("error")),
        "disagree": [*differ, *(["orders"] if sample.position[n] > 0 else [])],
        "votes": [[_plain(vote.get(name)) for name in VOTE] for vote in row.get("votes") or ()],
    }


def _differ(labels: Sequence[Label | None]) -> bool:
    return len({label for label in labels if label is not None}) > 1


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """A vote's value for JSON; NaN, which JSON has not, is nothing."""
    if isinstance(value, float):
        return round(value, 6) if np.isfinite(value) else None
    return value if isinstance(value, int) else _text(value)


def _listed(entries: Sequence[Mapping[str, Any]], most: int, seed: int) -> tuple[list[int], Listing]:
    """Which rows are listed, in their order."""
    first = [
        n for n, entry in enumerate(entries) if any(r and (r["label"] is None or r["right"] is False) for r in entry["results"])
    ]
    draw = random.Random(seed)
    kept = first if len(first) <= most else draw.sample(first, most)
    rest = sorted({*range(len(entries))} - {*first})
    kept = sorted([*kept, *(rest if len(entries) <= most else draw.sample(rest, most - len(kept)))])
    return kept, Listing(len(kept), len(entries), len({*kept} & {*first}), len(first))


# ---------------------------------------------------------------- figures


def _board(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of agreement with humans: metrics by labeler and baseline."""
    if not results:
        return {}
    rows = [
        {"title": title, "says": says, "cells": [result["metrics"].get(name) for result in results]}
        for name, (title, says) in METRICS.items()
    ]
    first = next(result for result in results if not result["baseline"])
    raters = [
        {"title": HUMAN[name][0] if name in HUMAN else "humans: kappa " + name[6:].replace("_", ", "), "estimate": estimate}
        for name, estimate in first["human"].items()
        if estimate["n"]
    ]
    return {
        "names": [{"name": result["name"], "baseline": result["baseline"]} for result in results],
        "rows": [row for row in rows if any(cell and cell["value"] is not None for cell in row["cells"])],
        "counts": first["counts"],
        "raters": raters,
        "differ": len({result["metrics"]["accuracy_all"]["n"] for result in results if not result["baseline"]}) > 1,
    }


def _figures(outputs: Sequence[Output], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plots: agreement and position bias over all labelers, the others by labeler."""
    judged = [(output.name, _position_counts(output.sample)) for output in outputs]
    judged = [(name, counts) for name, counts in judged if sum(counts)]
    return {
        "agreement_plot": _agreement_plot(results) if results else None,
        "position_plot": plots.positions("positions", judged) if judged else None,
        "unpositioned": [output.name for output in outputs if output.name not in dict(judged)],
        "panels": [_panel(number, output, bool(results)) for number, output in enumerate(outputs)],
    }


def _agreement_plot(results: Sequence[Mapping[str, Any]]) -> Markup:
    def interval(estimate: Mapping[str, Any]) -> plots.Interval:
        return estimate["value"], estimate["low"], estimate["high"]

    rows = [(r["name"], r["baseline"], [interval(r["metrics"][name]) for name in INTERVALS]) for r in results]
    return plots.intervals("agreement", rows, [METRICS[name][0] for name in INTERVALS])


def _position_counts(sample: agreement.Sample) -> tuple[int, int, int]:
    neither, first, second = (int((sample.position == position).sum()) for position in (0, 1, 2))
    return neither, first, second


def _panel(number: int, output: Output, human: bool) -> dict[str, Any]:
    sample, bins = output.sample, agreement.calibration(output.sample)
    softs = _softs(sample, human)
    sizes = _length_bins(sample, output.rows, human)
    return {
        "name": output.name,
        "soft_labels": plots.soft_labels(f"soft{number}", softs) if any(len(some) for some in softs.values()) else None,
        "reliability": plots.reliability(f"reliability{number}", [asdict(entry) for entry in bins]) if bins else None,
        "lengths": plots.lengths(f"lengths{number}", sizes) if sizes else None,
        "confusion": _confusion(sample) if human else None,
    }


def _softs(sample: agreement.Sample, human: bool) -> dict[str, Sequence[float]]:
    known = ~np.isnan(sample.soft)
    if not human:
        return {"rows": sample.soft[known].tolist()}
    names = {agreement.A: "human: a", agreement.B: "human: b", agreement.TIE: "human: tie", agreement.NONE: "no human label"}
    found = {name: sample.soft[known & (sample.human == code)].tolist() for code, name in names.items()}
    return {name: some for name, some in found.items() if some}


def _length_bins(sample: agreement.Sample, rows: Sequence[Row], human: bool) -> list[tuple[float, int, int, int | None]]:
    """Rows that `longer_labeler` counts, in five bins of as many rows by the ratio of the longer to the shorter response."""
    binary = (agreement.A, agreement.B)
    counts = np.isin(sample.labels, binary) & np.isin(sample.longer, binary)
    if human:
        counts &= np.isin(sample.human, binary)
    members = np.flatnonzero(counts).tolist()
    if not members:
        return []
    sizes = np.array([sorted((len(rows[n]["response_a"]), len(rows[n]["response_b"]))) for n in members])
    ratios = sizes[:, 1] / np.maximum(sizes[:, 0], 1)
    found = []
    for part in np.array_split(np.argsort(ratios, kind="stable"), min(5, len(members))):
        some = [members[n] for n in part]
        ours = int((sample.labels[some] == sample.longer[some]).sum())
        theirs = int((sample.human[some] == sample.longer[some]).sum()) if human else None
        found.append((float(np.median(ratios[part])), len(some), ours, theirs))
    return found


def _confusion(sample: agreement.Sample) -> list[dict[str, Any]]:
    """Rows by label (rows of the table) and human label (columns); the shade is the share of the column."""
    humans = [sample.human == code for code in (agreement.A, agreement.B, agreement.TIE)]
    table = []
    for code, label in zip((agreement.A, agreement.B, agreement.TIE, agreement.NONE), ("a", "b", "tie", "none"), strict=True):
        counts = [int((column & (sample.labels == code)).sum()) for column in humans]
        shares = [count / max(int(column.sum()), 1) for count, column in zip(counts, humans, strict=True)]
        cells = [{"n": n, "share": s, "heat": _heat(s)} for n, s in zip(counts, shares, strict=True)]
        table.append({"label": label, "cells": cells})
    return table


def _heat(share: float | None) -> int:
    return 0 if share is None else round(10 * min(max(share, 0.0), 1.0))


# ---------------------------------------------------------------- disagreement


def _groups(outputs: Sequence[Output], table: Sequence[Found], seed: int) -> list[dict[str, Any]]:
    """Labelers against one another, then the principles and labelers that each output's votes name."""
    found = []
    if len(outputs) > 1:
        named = {output.name: [_at(outputs, row, place) for row in table] for place, output in enumerate(outputs)}
        humans = [next(outputs[p].humans[n] for p, n in enumerate(row) if n is not None) for row in table]
        found.append(_group("Between labelers", "labeler", named, humans, seed))
    for output in outputs:
        for field, named in output.groups.items():
            title = f"Between {GROUPS[field]}" + (f" of {output.name}" if len(outputs) > 1 else "")
            found.append(_group(title, field, named, output.humans, seed))
    return found


def _at(outputs: Sequence[Output], row: Found, place: int) -> Row:
    """An output's version of a row; where it has none, the row as it is elsewhere, without a label."""
    index = row[place]
    if index is not None:
        return outputs[place].rows[index]
    other = next(outputs[p].rows[n] for p, n in enumerate(row) if n is not None)
    return {**other, "status": "error", "soft_label": None, "label": None, "votes": []}


def _group(
    title: str, what: str, named: Mapping[str, list[Row]], humans: Sequence[agreement.Votes], seed: int
) -> dict[str, Any]:
    resamples = RESAMPLES if len(named) <= MANY else RESAMPLES // 5
    among = agreement.among(named, resamples=resamples, seed=seed)
    pairs = {(pair["first"], pair["second"]): pair for pair in among["pairs"]}
    names = list(among["names"])
    matrix = [[pairs.get((a, b)) or pairs.get((b, a)) for b in names[:n]] for n, a in enumerate(names)]
    return {
        "title": title,
        "what": what,
        "names": names,
        "many": len(names) > MANY,
        "alpha": among["alpha"],
        "resamples": resamples,
        "matrix": [[{**cell, "heat": _heat(cell["agreement"]["value"])} if cell else None for cell in row] for row in matrix],
        "members": [{"name": name, **_member(rows, humans, resamples, seed)} for name, rows in named.items()],
        "human": any(humans),
    }


def _member(rows: Sequence[Row], humans: Sequence[agreement.Votes], resamples: int, seed: int) -> dict[str, Any]:
    """Over the rows on which it was asked: how many got a label, and how far it agrees with humans."""
    asked = [n for n, row in enumerate(rows) if row.get("votes") or row["status"] in LABELLED]
    if not asked:
        return {"asked": 0, "labelled": 0, "estimates": {}}
    sample = agreement.sample_of([rows[n] for n in asked], [humans[n] for n in asked], "label")
    wanted = {name: s for name, s in agreement.statistics(sample).items() if name in ("accuracy", "kappa")}
    found = agreement.estimates(wanted, sample.prompts, resamples, seed)
    return {
        "asked": len(asked),
        "labelled": int((sample.labels != agreement.NONE).sum()),
        "estimates": {name: asdict(estimate) for name, estimate in found.items()},
    }


# ---------------------------------------------------------------- runs and costs


def _facts(output: Output) -> dict[str, Any]:
    run = output.run or {}
    settings = run.get("settings") or {}
    several = settings.get("labelers") or {"": settings}
    return {
        "name": output.name,
        "counts": Counter(str(row["status"]) for row in output.rows),
        "rows": len(output.rows),
        "run": bool(output.run),
        "model": _listed_of(one.get("engine", {}).get("model") for one in several.values()),
        "template": _listed_of(one.get("template") for one in several.values()),
        "source": PurePath(str(run.get("source", ""))).name,
        "finished": str(run.get("finished_at") or "").replace("T", " ").replace("Z", " UTC"),
        "stopped": None if run.get("complete", True) else run.get("stopped") or "it did not finish",
        "notes": list(run.get("notes") or ()),
        "settings": [*_flat(settings), *_flat({"versions": run.get("versions") or {}})],
    }


def _listed_of(values: Iterator[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _flat(settings: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{lead}{name}.")
        elif value is not None:
            yield f"{lead}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _costs(output: Output) -> Iterator[dict[str, Any]]:
    """What an output cost; of several labelers together, then what each did."""
    labelled = sum(row["status"] in LABELLED for row in output.rows)
    if output.run:
        yield _cost(output.name, output.run, labelled)
    else:
        votes = [vote for row in output.rows for vote in row.get("votes") or ()]
        spent = {name: sum(vote.get(name) or 0 for vote in votes) for name in SPENT}
        yield _cost(output.name, {"all_runs": {"calls": len(votes), **spent}}, labelled) | {"counted": True}
    folder = output.path.with_name(output.path.name + ".labelers")
    for name in (output.run or {}).get("members") or ():
        run = _run(run_path(folder / f"{PurePath(name).name}.jsonl"))
        if run:
            counts = run.get("statuses") or {}
            yield _cost(name, run, sum(counts.get(status, 0) for status in LABELLED)) | {"member": True}


def _cost(name: str, run: Mapping[str, Any], labelled: int) -> dict[str, Any]:
    usage = run.get("all_runs") or {}
    cost = usage.get("cost_usd")
    return {
        "name": name,
        **{key: usage.get(key) for key in ("calls", *SPENT)},
        "cost": cost,
        "labelled": labelled,
        "per_thousand": 1000 * cost / labelled if cost is not None and labelled else None,
        "seconds": (run.get("this_run") or {}).get("wall_seconds"),
        "counted": False,
        "member": False,
    }


# ---------------------------------------------------------------- the page


def _json(data: Any) -> Markup:
    """JSON that ends no script element and holds nothing but ASCII, so neither lone surrogates nor line separators."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _page(**values: Any) -> str:
    css, js = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "money": _money, "whole": _whole}
    template = environment.from_string((FOLDER / "page.html.jinja").read_text(encoding="utf-8"))
    html = template.render(
        **values,
        css=Markup(css),
        js=Markup(js),
        css_hash=_hash(css),
        js_hash=_hash(js),
        version=__version__,
    )
    return SURROGATE.sub("\ufffd", html).replace("\0", "\ufffd")


def _hash(text: str) -> str:
    """As a content security policy names an inline element that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _money(value: float | None) -> str:
    return "–" if value is None else f"${value:,.4f}" if value < 1 else f"${value:,.2f}"


def _whole(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
