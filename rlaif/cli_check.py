"""Commands that look at preference and training sets: `rlaif contrast` and `rlaif check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rlaif.options import Reading, grouped, say_found
from rlaif.records import RlaifError


@grouped
def contrast(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA...", help="Preference, labelled or revised rows; several compare.")
    ],
    reading: Reading,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="PLOT.svg", help="Draw the distributions here.")] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure how strongly chosen and rejected responses differ: Jaccard similarity, Levenshtein distance, length."""
    from rlaif.contrast import as_json as in_json
    from rlaif.contrast import compare, render

    found = compare(data, reading.columns, reading.split, reading.limit, resamples, seed, out)
    print(in_json(found) if as_json else render(found))


@dataclass
class Limits:
    """The greatest shares that are still good."""

    max_duplicates: Annotated[float | None, typer.Option(min=0, max=1, help="Of exact duplicates.")] = None
    max_near: Annotated[float | None, typer.Option(min=0, max=1, help="Of near-duplicates.")] = None
    max_overlap: Annotated[float | None, typer.Option(min=0, max=1, help="Of prompts that --against has.")] = None
    max_identical: Annotated[float | None, typer.Option(min=0, max=1, help="Of pairs: chosen is rejected.")] = None
    max_empty: Annotated[float | None, typer.Option(min=0, max=1, help="Of rows with an empty side.")] = None
    max_over_length: Annotated[float | None, typer.Option(min=0, max=1, help="Of rows over --max-tokens.")] = None
    max_imbalance: Annotated[float | None, typer.Option(min=0, max=1, help="Of the more frequent `label`.")] = None
    max_longer: Annotated[float | None, typer.Option(min=0, max=1, help="Of pairs: chosen is longer.")] = None

    def given(self) -> dict[str, float]:
        """Measure to limit, of the limits that are given."""
        return {name.removeprefix("max_"): limit for name, limit in vars(self).items() if limit is not None}


@grouped
def check(
    train: Annotated[str, typer.Argument(help="A training set in any of TRL's shapes.")],
    limits: Limits,
    against: Annotated[
        list[str] | None, typer.Option(metavar="EVAL", help="Evaluation prompts that it must not hold; may be given again.")
    ] = None,
    near: Annotated[float, typer.Option(min=0.3, max=1.0, help="The least similarity of what counts as near.")] = 0.8,
    ngram: Annotated[int, typer.Option(min=2, max=64, help="Words of an n-gram, for evaluation prompts within others.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of prompt and answer.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What counts them: a folder, a name, or embedded (default: an estimate)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Write everything here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check a training set: duplicates, evaluation prompts in it, empty and identical sides, lengths, balance.

    Exit code 1 where a share is greater than the limit that is given for it.
    """
    from rlaif.check import Settings, render
    from rlaif.check import check as measured

    settings = Settings(against or [], near, ngram, max_tokens, tokenizer, limits.given())
    found = measured(train, settings)
    say_found(found, render(found), out, as_json)
    over = [found["measures"][name] for name in found["over"]]
    if over:
        told = ", ".join(f"{own['name']} {own['value']:.3f} > {own['limit']:g}" for own in over)
        raise RlaifError(f"{train}: over the limit: {told}")
