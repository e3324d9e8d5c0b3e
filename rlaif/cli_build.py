"""`rlaif build KIND`: one thin command a kind of training set. Heavy packages are imported inside, as in rlaif/cli.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlaif.options import Form, labelled_rows
from rlaif.records import RlaifError, Row, UsageError

if TYPE_CHECKING:
    from rlaif.build.rows import Build

build_app = typer.Typer(
    help="Make a training set, in TRL's columns, from what the other commands made.", no_args_is_help=True, add_completion=False
)


class Pairing(StrEnum):
    first_round = "first-round"
    tournament = "tournament"


Out = Annotated[Path, typer.Option("-o", "--out", help="Where to: .jsonl, .jsonl.gz or .parquet.")]
AsForm = Annotated[Form, typer.Option("--form", help="Texts, or lists of messages.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Revised = Annotated[str, typer.Argument(metavar="REVISIONS", help="An output of `rlaif revise`.")]
Labelled = Annotated[str, typer.Argument(metavar="LABELLED", help="An output of `rlaif label`.")]
Judged = Annotated[str, typer.Argument(metavar="JUDGED", help="An output of `rlaif label` or `rlaif rank`.")]
Scored = Annotated[str, typer.Argument(metavar="SCORED", help="An output of `rlaif score`.")]
Ranked = Annotated[str, typer.Argument(metavar="SCORED", help="An output of `rlaif score` or `rlaif rank`.")]
ScoreColumn = Annotated[str, typer.Option("--score", metavar="COLUMN", help="The column of the scores.")]
MinConfidence = Annotated[float, typer.Option(min=0.5, max=1.0, help="The least P(chosen is better).")]


def _begin(out: Path, *sources: str | None, form: Form, seed: int = 0) -> Build:
    """What a command begins with. Raises: UsageError for an output that could not be written, or is one of the inputs."""
    from rlaif.build.rows import Build

    _check(out, sources)
    return Build(form is Form.conversational, seed)


def _check(out: Path, sources: Iterable[str | None]) -> None:
    from rlaif.data import check_output

    check_output(out)
    if out.resolve() in [Path(source).resolve() for source in sources if source]:
        raise UsageError(f"{out}: the training set would overwrite what it is made from")


def _finish(
    context: typer.Context, out: Path, sources: Sequence[str | None], examples: Iterable[Row], rows: int, build: Build
) -> None:
    """Write the examples and their run file; say how many, and what was left out. Raises: RlaifError where there are none."""
    from rlaif.data import write_rows
    from rlaif.provenance import write_run

    made = list(examples)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in build.dropped.items() if count)
    if not made:
        raise RlaifError(f"{sources[0]}: no row gives an example" + (f" ({dropped})" if dropped else ""))
    write_rows(out, lambda: made)
    made_by = f"rlaif build {context.info_name}"
    write_run(out, made_by, context.params, sources, rows=rows, examples=len(made), left_out=build.dropped)
    left_out = [f"left out: {dropped}"] if dropped else []
    print("; ".join([f"{out}: {len(made):,} examples of {rows:,} rows", *left_out, *build.notes]))


@build_app.command("sl-cai")
def sl_cai(
    context: typer.Context,
    revisions: Revised,
    out: Out,
    rounds: Annotated[int | None, typer.Option(min=1, help="Only the first N rounds' revisions.")] = None,
    mix: Annotated[str | None, typer.Option(metavar="FILE", help="Helpfulness samples, or prompts and responses.")] = None,
    ratio: Annotated[float | None, typer.Option(min=0.0, help="Of those, how many for each revision (default: 1).")] = None,
    drop_unchanged: Annotated[bool, typer.Option("--drop-unchanged", help="Leave out revisions that change nothing.")] = False,
    drop_refusals: Annotated[bool, typer.Option("--drop-refusals", help="Leave out revisions that decline.")] = False,
    form: AsForm = Form.plain,
    seed: Seed = 0,
) -> None:
    """Constitutional AI's supervised set: the revisions of all rounds, with helpfulness samples (arXiv 2212.08073)."""
    from rlaif.build import revised
    from rlaif.build.rows import read_answers, read_revised

    build = _begin(out, revisions, mix, form=form, seed=seed)
    if ratio is not None and not mix:
        raise UsageError("--ratio goes with --mix FILE")
    rows = read_revised(revisions)
    made = list(revised.sl_cai(rows, build, rounds, drop_unchanged, drop_refusals))
    if mix and made:
        made = revised.with_helpful(made, read_answers(mix, with_id=False), build, 1.0 if ratio is None else ratio)
    _finish(context, out, [revisions, mix], made, len(rows), build)


@build_app.command("rl-cai")
def rl_cai(
    context: typer.Context,
    labelled: Labelled,
    out: Out,
    mix: Annotated[str, typer.Option(metavar="FILE", help="Human pairs: chosen and rejected, or response_a, response_b.")],
    human: Annotated[str | None, typer.Option(metavar="COLUMN", help="The human labels of response_a, response_b.")] = None,
    ratio: Annotated[float | None, typer.Option(min=0.0, help="Human pairs for each other one (default: all).")] = None,
    drop_ties: Annotated[bool, typer.Option("--drop-ties", help="Leave the constitution's ties out.")] = False,
    form: AsForm = Form.plain,
    seed: Seed = 0,
) -> None:
    """Constitutional AI's preference set: the constitution's soft labels, and human ones (arXiv 2212.08073)."""
    from rlaif.build import judged
    from rlaif.build.rows import read_human

    build = _begin(out, labelled, mix, form=form, seed=seed)
    rows = labelled_rows(labelled)
    pairs, column = read_human(mix, human)
    _finish(context, out, [labelled, mix], judged.rl_cai(rows, pairs, column, build, ratio, drop_ties), len(rows), build)


@build_app.command()
def clair(context: typer.Context, revisions: Revised, out: Out, form: AsForm = Form.plain) -> None:
    """CLAIR's contrastive pairs: the revision chosen, the response it revises rejected (arXiv 2408.06266)."""
    from rlaif.build import revised
    from rlaif.build.rows import read_revised

    build = _begin(out, revisions, form=form)
    rows = read_revised(revisions)
    _finish(context, out, [revisions], revised.clair(rows, build), len(rows), build)


@build_app.command("judge-on-policy")
def judge_on_policy(
    context: typer.Context, judged: Judged, out: Out, min_confidence: MinConfidence = 0.5, form: AsForm = Form.plain
) -> None:
    """Pairs by a judge of samples of the policy itself (arXiv 2408.06266)."""
    from rlaif.build import judged as kinds

    build = _begin(out, judged, form=form)
    rows = labelled_rows(judged, or_ranked=True)
    _finish(context, out, [judged], kinds.judge_on_policy(rows, build, min_confidence), len(rows), build)


@build_app.command("judge-off-policy")
def judge_off_policy(
    context: typer.Context,
    judged: Judged,
    out: Out,
    policy: Annotated[str, typer.Option(metavar="NAME", help="The policy's model, of which no response may be.")],
    min_confidence: MinConfidence = 0.5,
    form: AsForm = Form.plain,
) -> None:
    """Pairs by a judge of other models' responses (arXiv 2408.06266)."""
    from rlaif.build import judged as kinds

    build = _begin(out, judged, form=form)
    rows = labelled_rows(judged, or_ranked=True)
    _finish(context, out, [judged], kinds.judge_off_policy(rows, build, policy, min_confidence), len(rows), build)


@build_app.command("stronger-preferred")
def stronger_preferred(
    context: typer.Context,
    weak: Annotated[str, typer.Argument(metavar="WEAK", help="The weaker model's responses.")],
    strong: Annotated[str, typer.Argument(metavar="STRONG", help="The stronger model's, with the same ids.")],
    out: Out,
    form: AsForm = Form.plain,
) -> None:
    """Pairs of two models: the stronger one's response chosen, unseen (arXiv 2408.06266)."""
    from rlaif.build import judged
    from rlaif.build.rows import read_answers

    build = _begin(out, weak, strong, form=form)
    weaker, stronger = (read_answers(source, with_id=True) for source in (weak, strong))
    _finish(context, out, [weak, strong], judged.stronger_preferred(weaker, stronger, build), len(weaker), build)


@build_app.command()
def comparisons(
    context: typer.Context,
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="One model's responses.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The other one's, with the same ids.")],
    out: Out,
    best_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of AFTER's scored responses to a prompt, take the highest by this.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Two models' responses as comparisons for `rlaif label`; `rlaif align --human after` then tells AFTER's share of wins."""
    from rlaif.build import judged, scored
    from rlaif.build.rows import read_answers, read_scored

    build = _begin(out, before, after, form=Form.plain, seed=seed)
    first = read_answers(before, with_id=True)
    if best_by:
        second = scored.chosen_answers(read_scored(after, best_by, or_ranked=True), build, best_by)
    else:
        second = read_answers(after, with_id=True)
    _finish(context, out, [before, after], judged.comparisons(first, second, build), len(first), build)


@build_app.command("best-of-n")
def best_of_n(
    context: typer.Context, ranked: Ranked, out: Out, score: ScoreColumn = "score", form: AsForm = Form.plain
) -> None:
    """Each prompt's response with the highest score, for supervised fine-tuning (arXiv 2009.01325)."""
    from rlaif.build import scored
    from rlaif.build.rows import read_scored

    build = _begin(out, ranked, form=form)
    rows = read_scored(ranked, score, or_ranked=True)
    _finish(context, out, [ranked], scored.best_of_n(rows, build, score), len(rows), build)


@build_app.command("best-worst")
def best_worst(
    context: typer.Context, ranked: Ranked, out: Out, score: ScoreColumn = "score", form: AsForm = Form.plain
) -> None:
    """Each prompt's response with the highest score chosen, that with the lowest rejected (arXiv 2405.14734)."""
    from rlaif.build import scored
    from rlaif.build.rows import read_scored

    build = _begin(out, ranked, form=form)
    rows = read_scored(ranked, score, or_ranked=True)
    _finish(context, out, [ranked], scored.best_worst(rows, build, score), len(rows), build)


@build_app.command()
def completions(
    context: typer.Context,
    answers: Annotated[str, typer.Argument(metavar="ANSWERS", help="An output of `rlaif sample`, or prompts and responses.")],
    out: Out,
    form: AsForm = Form.plain,
) -> None:
    """All responses as they are, for supervised fine-tuning or context distillation (arXiv 2112.00861)."""
    from rlaif.build import unpaired
    from rlaif.build.rows import read_answers

    build = _begin(out, answers, form=form)
    rows = read_answers(answers, with_id=False)
    _finish(context, out, [answers], unpaired.completions(rows, build), len(rows), build)


@build_app.command()
def rest(
    context: typer.Context,
    source: Scored,
    out: Out,
    thresholds: Annotated[str, typer.Option(metavar="T1,T2,...", help="The least score of each step; they must grow.")],
    most: Annotated[int | None, typer.Option(min=1, help="At most so many of a prompt's responses, drawn at random.")] = None,
    score: ScoreColumn = "score",
    form: AsForm = Form.plain,
    seed: Seed = 0,
) -> None:
    """ReST's growing thresholds: OUT.1, OUT.2 ... for the Improve steps one after the other (arXiv 2308.08998)."""
    from rlaif.build import scored
    from rlaif.build.rows import read_scored

    steps = _growing(thresholds)
    _begin(out, source, form=form)
    outs = [numbered(out, step) for step in range(1, len(steps) + 1)]
    builds = [_begin(path, source, form=form, seed=seed) for path in outs]
    rows = read_scored(source, score)
    made = [list(scored.rest(rows, build, least, score, most)) for build, least in zip(builds, steps, strict=True)]
    for examples, least in zip(made, steps, strict=True):
        if not examples:  # before any file is written
            raise RlaifError(f"{source}: no row gives an example of score {least:g} or more")
    for path, examples, build in zip(outs, made, builds, strict=True):
        _finish(context, path, [source], examples, len(rows), build)


def _growing(text: str) -> list[float]:
    try:
        steps = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--thresholds: expected numbers, as 0.0,0.3,0.6, got '{text}'") from None
    if not all(low < high for low, high in pairwise([-inf, *steps, inf])):  # nor is one infinite, or not a number
        raise UsageError(f"--thresholds {text}: they must be numbers, each above the one before it")
    return steps


def numbered(out: Path, step: int) -> Path:
    """The path with the step before its suffix.

    >>> numbered(Path("train.jsonl.gz"), 2).name
    'train.2.jsonl.gz'
    """
    from rlaif.data import SUFFIXES

    suffix = next(suffix for suffix in SUFFIXES if out.name.endswith(suffix))
    return out.with_name(f"{out.name.removesuffix(suffix)}.{step}{suffix}")


@build_app.command("rs-dpo")
def rs_dpo(
    context: typer.Context,
    source: Scored,
    out: Out,
    gap: Annotated[float, typer.Option(min=0.0, help="Scores must be further apart than this.")],
    temperature: Annotated[float, typer.Option(min=1e-6, help="The soft label is sigmoid(gap / this).")] = 1.0,
    score: ScoreColumn = "score",
    form: AsForm = Form.plain,
) -> None:
    """All pairs of a prompt's responses with a large enough gap between their scores (arXiv 2402.10038)."""
    from rlaif.build import scored
    from rlaif.build.rows import read_scored

    build = _begin(out, source, form=form)
    rows = read_scored(source, score)
    _finish(context, out, [source], scored.rs_dpo(rows, build, gap, temperature, score), len(rows), build)


@build_app.command()
def rso(
    context: typer.Context,
    source: Scored,
    out: Out,
    beta: Annotated[float, typer.Option(min=1e-6, help="Accept with probability exp((score - highest) / this).")],
    keep: Annotated[int, typer.Option(min=2, help="Responses to accept of each prompt.")],
    pairs: Annotated[Pairing, typer.Option(help="Disjoint random pairs of those, or a tournament's.")] = Pairing.first_round,
    score: ScoreColumn = "score",
    form: AsForm = Form.plain,
    seed: Seed = 0,
) -> None:
    """Statistical rejection sampling: pairs of accepted responses (arXiv 2309.06657)."""
    from rlaif.build import scored
    from rlaif.build.rows import read_scored

    build = _begin(out, source, form=form, seed=seed)
    rows = read_scored(source, score)
    made = scored.rso(rows, build, beta, keep, pairs is Pairing.tournament, score)
    _finish(context, out, [source], made, len(rows), build)


@build_app.command()
def kto(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="JUDGED", help="An output of `rlaif label` or `rlaif score`.")],
    out: Out,
    threshold: Annotated[float | None, typer.Option(help="The least score of a desirable response.")] = None,
    balance: Annotated[bool, typer.Option("--balance", help="Leave out some of the larger class.")] = False,
    max_ratio: Annotated[
        float | None, typer.Option(min=1.0, help="The most desirable examples for each other one (default: 4/3).")
    ] = None,
    score: ScoreColumn = "score",
    form: AsForm = Form.plain,
    seed: Seed = 0,
) -> None:
    """KTO's desirable and undesirable responses (arXiv 2402.01306)."""
    from rlaif.build import unpaired
    from rlaif.build.rows import is_labelled, read_scored

    build = _begin(out, source, form=form, seed=seed)
    if max_ratio is not None and not balance:
        raise UsageError("--max-ratio goes with --balance")
    rows = read_scored(source, score, or_labelled=True)
    if is_labelled(rows[0]) != (threshold is None):
        raise UsageError("--threshold goes with scores, and scores need it")
    made = unpaired.kto(rows, build, threshold, score)
    if made and balance:
        made = unpaired.balanced(made, build, max_ratio or unpaired.RATIO)
    elif made:
        unpaired.suggest_weights(made, build)
    _finish(context, out, [source], made, len(rows), build)


@build_app.command()
def hir(
    context: typer.Context,
    source: Scored,
    out: Out,
    levels: Annotated[int, typer.Option(min=2, max=3, help="Poor and good, or poor, fair and good.")] = 2,
    instructions: Annotated[str | None, typer.Option(metavar="FILE", help="YAML: poor, fair, good, and what asks so.")] = None,
    score: ScoreColumn = "score",
    form: AsForm = Form.plain,
) -> None:
    """Hindsight relabelling: every response answers the instruction that its score fits (arXiv 2302.05206)."""
    from rlaif.build import unpaired
    from rlaif.build.rows import read_scored
    from rlaif.yamlfile import load

    build = _begin(out, source, form=form)
    asked = load(unpaired.Instructions, Path(instructions)) if instructions else None
    rows = read_scored(source, score)
    _finish(context, out, [source], unpaired.hir(rows, build, levels, asked, score), len(rows), build)


@build_app.command("groups")
def group_preferences(
    context: typer.Context,
    source: Scored,
    out: Out,
    group: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of the groups' names (default: each principle is one).")
    ] = None,
    score: ScoreColumn = "score",
) -> None:
    """Each group's score of each response, for `rlaif train gpo` (arXiv 2310.11523): a principle's votes, or a column's."""
    from rlaif.build import groups

    build = _begin(out, source, form=Form.plain)
    if group is None and score != "score":
        raise UsageError("--score goes with --group COLUMN; without it, the scores are those of the votes")
    rows = groups.read_grouped(source, group, score)
    _finish(context, out, [source], groups.groups(rows, build, group, score), len(rows), build)
