"""Commands over rows that need no model: `rlaif verify` and `rlaif split`. Heavy packages are imported inside."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.cli_build import Out, numbered
from rlaif.options import Reading, grouped
from rlaif.records import RlaifError, UsageError

if TYPE_CHECKING:
    from rlaif.verify import Verifier


def _check(out: Path, source: str) -> None:
    from rlaif.data import check_output

    check_output(out)
    if out.resolve() == Path(source).resolve():
        raise UsageError(f"{out}: the output is the input")


@grouped
def verify(
    context: typer.Context,
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="An output of `rlaif sample`, or rows of prompt and response.")
    ],
    out: Out,
    reading: Reading,
    answer: Annotated[str | None, typer.Option(metavar="COLUMN", help="The row's reference answer.")] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Where the final answer stands (default: `Answer: X`, \\boxed{X}, `#### X`)."),
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="Instead: (prompt, response, row) to true, false or a number.")
    ] = None,
) -> None:
    """Score responses 1 or 0 by their final answer, as `rlaif score` writes scores; without a model.

    A response without an answer is wrong, and its score 0. One that failed in sampling, a row without a reference or one
    that the function fails on has no score, and the status error.
    """
    from rlaif.data import responses, write_rows
    from rlaif.provenance import sha256, write_run
    from rlaif.verify import scored

    _check(out, samples)
    verifier = _verifier(answer, pattern, function)
    items = list(responses(samples, reading.columns, reading.split, reading.limit))
    if not items:
        raise UsageError(f"{samples}: no rows")
    if answer and not any(answer in item.row for item in items):
        raise UsageError(f"{items[0].where}: no column '{answer}'; there are: {', '.join(items[0].row)}")
    rows = [scored(item, verifier) for item in items]
    scores = [row["score"] for row in rows if row["status"] == "ok"]
    if not scores:
        raise RlaifError(f"{samples}: no response could be verified; the first: {items[0].where}: {rows[0]['error']}")
    write_rows(out, lambda: rows)
    hashed = {"function_sha256": sha256(function.rpartition(":")[0])} if function else {}
    statuses = Counter(row["status"] for row in rows)
    write_run(out, "rlaif verify", {**context.params, **hashed}, [samples], rows=len(rows), statuses=statuses)
    failed = next(((item, row) for item, row in zip(items, rows, strict=True) if row["error"]), None)
    without = f"; {statuses['error']} without a score, the first: {failed[0].where}: {failed[1]['error']}" if failed else ""
    print(f"{out}: {len(rows):,} responses; mean score {sum(scores) / len(scores):.3f}, of {len(scores):,}{without}")


def _verifier(answer: str | None, pattern: str | None, function: str | None) -> Verifier:
    from rlaif.verify import by_answer, by_function

    if (answer is None) == (function is None):
        raise UsageError("either --answer COLUMN or --function FILE.py:NAME")
    if function:
        from rlaif.rl.rewards import load_function

        if pattern is not None:
            raise UsageError("--pattern goes with --answer")
        return by_function(load_function(function))
    assert answer
    try:
        return by_answer(answer, None if pattern is None else re.compile(pattern))
    except re.error as error:
        raise UsageError(f"--pattern: '{pattern}' is no regular expression: {error}") from error


def split(
    context: typer.Context,
    rows: Annotated[str, typer.Argument(metavar="ROWS", help="Any rows: .jsonl, .jsonl.gz or .parquet.")],
    out: Out,
    parts: Annotated[int, typer.Option(min=2, help="How many files: OUT.1, OUT.2 ...")],
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="In the order of its numbers, the greatest first (default: at random).")
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="The least first.")] = False,
    shares: Annotated[str | None, typer.Option(metavar="A,B,...", help="How large they are (default: alike).")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
) -> None:
    """Split rows into parts: OUT.1, OUT.2 ..., by the order of a column, or at random with each prompt's rows together.

    With --by margin pairs are in stepwise DPO's order, the easy ones first (arXiv 2403.19270).
    """
    from rlaif.data import read_rows, write_rows
    from rlaif.provenance import write_run
    from rlaif.split import at_random, by_column

    sizes = _shares(shares, parts)
    if ascending and by is None:
        raise UsageError("--ascending goes with --by COLUMN")
    _check(out, rows)
    outs = [numbered(out, part) for part in range(1, parts + 1)]
    for path in outs:
        _check(path, rows)
    found = list(read_rows(rows))
    if not found:
        raise UsageError(f"{rows}: no rows")
    made = by_column(found, by, sizes, ascending) if by else at_random(found, sizes, seed)
    for number, (path, part) in enumerate(zip(outs, made, strict=True), 1):
        write_rows(path, lambda part=part: part)  # type: ignore[misc]
        write_run(path, "rlaif split", context.params, [rows], rows=len(found), examples=len(part), part=number)
        print(f"{path}: {len(part):,} of {len(found):,} rows" + (f", {by} {part[0][by]:g} to {part[-1][by]:g}" if by else ""))


def _shares(text: str | None, parts: int) -> list[float]:
    if text is None:
        return [1.0] * parts
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--shares: expected numbers, as 1,1,2, got '{text}'") from None
    if len(shares) != parts or not all(0 < share < math.inf for share in shares):
        raise UsageError(f"--shares {text}: {parts} numbers above 0, one for each of --parts {parts}")
    return shares
