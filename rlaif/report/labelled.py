"""The report on labelled rows: how good the labels are, what they cost, and every row with its votes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from rlaif.data import run_path
from rlaif.evaluate import agreement
from rlaif.evaluate.tables import HUMAN, METRICS
from rlaif.options import labelled_rows
from rlaif.provenance import read_run
from rlaif.records import LABELLED, STATUSES, Label, Row, UsageError
from rlaif.report import plots
from rlaif.report.common import SPENT, Page, check_row, chosen, cost_of, facts, plain, prompt_of, text_of

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


def page(
    outs: Sequence[str],
    human: str | None,
    values: Mapping[str, str] | None,
    title: str | None,
    max_rows: int,
    seed: int,
    resamples: int,
) -> Page:
    """The report on outputs of `rlaif label`; several are labelers of the same rows, matched by `id`.

    `human` and `values` are as in `agreement.leaderboard`. The rows that come first in the list are those without a label or
    with a wrong one.

    Raises: UsageError for rows that cannot be read, measured or matched.
    """
    outputs = [_output(name, Path(path), human, values) for name, path in zip(_names(outs), outs, strict=True)]
    table = _matched(outputs)
    named = {output.name: output.rows for output in outputs}
    results = agreement.leaderboard(named, human, resamples=resamples, seed=seed, values=values) if human else []
    entries = [_entry(found, outputs) for found in table]
    kept, listing = chosen(_failed_or_wrong(entries), len(entries), max_rows, seed)
    shown = {
        "outputs": [facts(output.name, output.rows, output.run) for output in outputs],
        "statuses": STATUSES,
        "human": human,
        "board": _board(results),
        **_figures(outputs, results),
        "groups": _groups(outputs, table, resamples, seed),
        "costs": [cost for output in outputs for cost in _costs(output)],
    }
    data = {
        "labelers": [output.name for output in outputs],
        "human": bool(human),
        "statuses": STATUSES,
        "vote": VOTE,
        "rows": [entries[n] for n in kept],
    }
    return Page("labelled", title or "AI labels: " + ", ".join(output.name for output in outputs), listing, shown, data)


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
    return Output(name, path, rows, humans, sample, read_run(run_path(path)), groups)


def _check_rows(rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, 1):
        check_row(row, number)
        votes = row.get("votes")
        if votes is not None and not (isinstance(votes, list) and all(_is_vote(vote) for vote in votes)):
            raise UsageError(f"row {number}, column 'votes': expected a list of votes, each with order, status and soft_label")


def _is_vote(vote: Any) -> bool:
    return isinstance(vote, dict) and {"order", "status", "soft_label"} <= vote.keys()


def _several(rows: Sequence[Row], field: str) -> bool:
    return len({str(vote[field]) for row in rows for vote in row.get("votes") or () if vote.get(field)}) > 1


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
        "prompt": prompt_of(row),
        "a": text_of(row["response_a"]),
        "b": text_of(row["response_b"]),
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
        "error": text_of(row.get("error")),
        "disagree": [*differ, *(["orders"] if sample.position[n] > 0 else [])],
        "votes": [[plain(vote.get(name)) for name in VOTE] for vote in row.get("votes") or ()],
    }


def _differ(labels: Sequence[Label | None]) -> bool:
    return len({label for label in labels if label is not None}) > 1


def _failed_or_wrong(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    return [
        n for n, entry in enumerate(entries) if any(r and (r["label"] is None or r["right"] is False) for r in entry["results"])
    ]


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


def _groups(outputs: Sequence[Output], table: Sequence[Found], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Labelers against one another, then the principles and labelers that each output's votes name."""
    found = []
    if len(outputs) > 1:
        named = {output.name: [_at(outputs, row, place) for row in table] for place, output in enumerate(outputs)}
        humans = [next(outputs[p].humans[n] for p, n in enumerate(row) if n is not None) for row in table]
        found.append(_group("Between labelers", "labeler", named, humans, resamples, seed))
    for output in outputs:
        for field, named in output.groups.items():
            title = f"Between {GROUPS[field]}" + (f" of {output.name}" if len(outputs) > 1 else "")
            found.append(_group(title, field, named, output.humans, resamples, seed))
    return found


def _at(outputs: Sequence[Output], row: Found, place: int) -> Row:
    """An output's version of a row; where it has none, the row as it is elsewhere, without a label."""
    index = row[place]
    if index is not None:
        return outputs[place].rows[index]
    other = next(outputs[p].rows[n] for p, n in enumerate(row) if n is not None)
    return {**other, "status": "error", "soft_label": None, "label": None, "votes": []}


def _group(
    title: str, what: str, named: Mapping[str, list[Row]], humans: Sequence[agreement.Votes], resamples: int, seed: int
) -> dict[str, Any]:
    resamples = resamples if len(named) <= MANY else resamples // 5
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


def _costs(output: Output) -> Iterator[dict[str, Any]]:
    """What an output cost; of several labelers together, then what each did."""
    labelled = sum(row["status"] in LABELLED for row in output.rows)
    if output.run:
        yield cost_of(output.name, output.run, labelled)
    else:
        votes = [vote for row in output.rows for vote in row.get("votes") or ()]
        spent = {name: sum(vote.get(name) or 0 for vote in votes) for name in SPENT}
        yield cost_of(output.name, {"all_runs": {"calls": len(votes), **spent}}, labelled) | {"counted": True}
    folder = output.path.with_name(output.path.name + ".labelers")
    for name in (output.run or {}).get("members") or ():
        run = read_run(run_path(folder / f"{PurePath(name).name}.jsonl"))
        if run:
            counts = run.get("statuses") or {}
            yield cost_of(name, run, sum(counts.get(status, 0) for status in LABELLED)) | {"member": True}
