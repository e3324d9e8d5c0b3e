"""The command line: one thin function a command. Heavy packages are imported inside, so that --help answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif import __version__
from rlaif.records import RlaifError, UsageError

if TYPE_CHECKING:
    from rlaif.engines import Engine
    from rlaif.job import Job
    from rlaif.runner import Limits

app = typer.Typer(
    name="rlaif",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reinforcement learning from AI feedback: label comparisons with a model, measure the labels, make training sets.",
)


def main() -> None:
    """Run the command line; an error that the user can act on is one line on stderr, and exit code 1 or 2 (usage)."""
    try:
        app()
    except RlaifError as error:
        print(f"rlaif: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("rlaif: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        print(f"rlaif {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


class EngineName(StrEnum):
    embedded = "embedded"
    openai = "openai"
    vllm = "vllm"
    transformers = "transformers"
    mock = "mock"


class Form(StrEnum):
    plain = "plain"
    conversational = "conversational"


class BadRows(StrEnum):
    stop = "stop"
    keep = "keep"


Map = Annotated[list[str], typer.Option("--map", metavar="NEW=OLD", help="Rename a column, as in prompt=question.")]


@app.command()
def label(
    data: Annotated[str, typer.Argument(help=".jsonl, .jsonl.gz or .parquet, a saved dataset's folder, or a hub name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to: .jsonl, .jsonl.gz or .parquet.")],
    engine: Annotated[EngineName, typer.Option(help="What answers.")] = EngineName.embedded,
    model: Annotated[str | None, typer.Option(help="The model's name or folder.")] = None,
    base_url: Annotated[str | None, typer.Option(help="The server, for --engine openai (key: OPENAI_API_KEY).")] = None,
    option: Annotated[
        list[str],
        typer.Option("--engine-option", "-E", metavar="NAME=VALUE", help="A setting of the engine, as dtype=bf16."),
    ] = [],  # noqa: B006 - Typer reads the default, nothing changes it
    template: Annotated[str, typer.Option(help="A shipped template's name (see `rlaif templates`), or a file.")] = "general",
    both_orders: Annotated[
        bool, typer.Option("--both-orders/--one-order", help="Ask with the responses in both orders.")
    ] = True,
    split: Annotated[str | None, typer.Option(help="The split of a saved or hub dataset.")] = None,
    mapping: Map = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Rows in flight (default: by engine).")] = None,
    seed: Annotated[int, typer.Option(help="Draws the sides of chosen/rejected rows, and samples.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of what is sampled; a label from log-probabilities is not.")
    ] = 0.0,
    samples: Annotated[
        int, typer.Option(min=1, help="Verdicts to draw an order where the engine gives no log-probabilities.")
    ] = 8,
    max_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Stop before this many US dollars are spent (needs --price).")
    ] = None,
    price: Annotated[str | None, typer.Option(metavar="IN,OUT", help="US dollars per million tokens read, written.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.1, help="Seconds a call may take (default: 120 for openai).")] = None,
    tries: Annotated[int, typer.Option(min=1, help="Tries a call before it is given up.")] = 6,
    bad_rows: Annotated[
        BadRows,
        typer.Option(help="Rows that cannot be judged: stop before anything is asked, or keep with status error."),
    ] = BadRows.stop,
    relabel: Annotated[bool, typer.Option("--relabel", help="Make OUT anew where it was made with other settings.")] = False,
    reparse: Annotated[bool, typer.Option("--reparse", help="Read the stored answers again, without a call.")] = False,
) -> None:
    """Label comparisons with a model: DATA's rows with a soft label, into OUT.

    The same command goes on where an earlier one stopped: finished rows are not asked again, failed ones are.
    """
    limits = _limits(engine, concurrency, tries, timeout, max_cost, price)
    columns = _pairs_of(mapping, "--map")
    job = _label_job(data, out, template, columns, seed, split, limit, both_orders, temperature, samples)
    total = job.check(keep_bad=bad_rows is BadRows.keep)
    made = None if reparse else _engine(engine, model, base_url, option, limits)
    report = job.run(made, limits, total, redo=relabel)
    _say_report(report, job)


def _label_job(
    data: str,
    out: Path,
    template: str,
    columns: dict[str, str],
    seed: int,
    split: str | None,
    limit: int | None,
    both_orders: bool,
    temperature: float,
    samples: int,
) -> Job:
    from rlaif.data import comparisons
    from rlaif.job import Job
    from rlaif.label.pairwise import PairwiseLabeler
    from rlaif.prompts import load_template

    labeler = PairwiseLabeler(load_template(template), both_orders, temperature, samples, seed=seed)
    return Job(
        data,
        out,
        lambda: comparisons(data, columns, seed, split, limit),
        labeler,
        labeler.settings(),
        {"limit": limit, "map": columns, "split": split},
    )


CONCURRENCY = {"openai": 32, "vllm": 256, "transformers": 64, "embedded": 64, "mock": 64}


def _limits(
    engine: EngineName,
    concurrency: int | None,
    tries: int,
    timeout: float | None,
    max_cost: float | None,
    price: str | None,
) -> Limits:
    from rlaif.runner import Limits

    prices = _prices(price)
    if max_cost is not None and prices is None:
        raise UsageError(
            "--max-cost needs --price IN,OUT (US dollars per million tokens), for prices change and are not guessed"
        )
    seconds = timeout or (120.0 if engine is EngineName.openai else None)
    return Limits(concurrency or CONCURRENCY[engine], tries, seconds, max_cost, prices)


def _prices(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--price: expected two numbers, IN,OUT, got '{text}'") from None
    if not (0 <= read < float("inf") and 0 <= written < float("inf")):
        raise UsageError(f"--price: prices cannot be negative, got '{text}'")
    return read, written


def _engine(engine: EngineName, model: str | None, base_url: str | None, options: list[str], limits: Limits) -> Engine:
    from rlaif.engines import make_engine

    if base_url and engine is not EngineName.openai:
        raise UsageError(f"--base-url goes with --engine openai, not {engine}")
    if engine in (EngineName.vllm, EngineName.transformers) and not model:
        raise UsageError(f"--engine {engine} needs --model")
    settings: dict[str, Any] = {name: _scalar(value) for name, value in _pairs_of(options, "-E").items()}
    if engine is EngineName.openai and limits.timeout:
        settings.setdefault("timeout", limits.timeout)
    return make_engine(engine, **{"model": model, "base_url": base_url, **settings})


def _pairs_of(texts: Iterable[str], name: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        left, mark, right = text.partition("=")
        if not (left and mark and right):
            raise UsageError(f"{name}: expected NAME=VALUE, got '{text}'")
        if left in pairs:
            raise UsageError(f"{name}: {left} is given twice")
        pairs[left] = right
    return pairs


def _scalar(text: str) -> Any:
    """The value of a setting: a number, true or false where it reads as one, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _say_report(report: dict[str, Any], job: Job) -> None:
    """One line on what was made; exit code 1 where rows met an error, for they wait for the next run."""
    counts = ", ".join(f"{count} {status}" for status, count in report["statuses"].items() if count)
    print(f"{job.out}: {report['rows']} of {report['of_rows']} rows ({counts}); settings and counts in {job.run_path}")
    for note in report["notes"]:
        print(f"note: {note}")
    errors = report["statuses"]["error"]
    if errors:
        where, why = _first_error(job)
        raise RlaifError(f"{errors} rows met an error, and are tried again by the same command; the first, {where}: {why}")


def _first_error(job: Job) -> tuple[str, str]:
    from rlaif.data import read_rows

    return next((where, row["error"]) for where, row in read_rows(str(job.out)) if row["status"] == "error")


@app.command()
def align(
    outs: Annotated[list[str], typer.Argument(metavar="OUT...", help="Labelled files; several make a leaderboard.")],
    human: Annotated[str, typer.Option(metavar="COLUMN", help="Human labels: a|b|tie, 0|1|2 (0 a tie), or a list of votes.")],
    column: Annotated[str, typer.Option("--label", metavar="COLUMN", help="The labels to measure.")] = "label",
    human_values: Annotated[
        str | None, typer.Option(metavar="RAW=LABEL,...", help="What the human column's values mean, as 0=a,1=b.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure how far labels agree with humans, with 95 % intervals and what trivial labelers reach."""
    from rlaif.data import read_rows
    from rlaif.evaluate import agreement, tables

    values = _pairs_of(human_values.split(","), "--human-values") if human_values else None
    files = {name: [row for _, row in read_rows(name)] for name in outs}
    for name, rows in files.items():
        if not rows:
            raise UsageError(f"{name}: no rows")
    results = agreement.leaderboard(files, human, column, resamples=resamples, seed=seed, values=values)
    print(json.dumps(results, indent=2) if as_json else tables.render(results, human))


@app.command()
def pairs(
    labelled: Annotated[str, typer.Argument(metavar="OUT", help="A labelled file.")],
    train: Annotated[Path, typer.Option("-o", "--out", help="Where to: .jsonl, .jsonl.gz or .parquet.")],
    min_confidence: Annotated[float, typer.Option(min=0.5, max=1.0, help="The least P(chosen is better).")] = 0.5,
    hard: Annotated[bool, typer.Option("--hard", help="Soft labels of 1; ties are left out.")] = False,
    drop_ties: Annotated[bool, typer.Option("--drop-ties", help="Leave ties out.")] = False,
    form: Annotated[Form, typer.Option(help="Texts, or lists of messages.")] = Form.plain,
) -> None:
    """Make a training set in TRL's preference columns: prompt, chosen, rejected, with soft_label and margin."""
    from rlaif.data import check_output, write_rows
    from rlaif.pairs import PairSettings, training_pairs

    check_output(train)
    if train.resolve() == Path(labelled).resolve():
        raise UsageError(f"{train}: the training set would overwrite the labelled file")
    rows = [row for _, row in _labelled_rows(labelled)]
    settings = PairSettings(min_confidence, hard, drop_ties, form is Form.conversational)
    made = list(training_pairs(rows, settings))
    dropped = ", ".join(f"{count} {reason}" for reason, count in settings.dropped.items())
    if not made:
        raise RlaifError(f"{labelled}: no row gives a pair ({dropped})")
    write_rows(train, lambda: made)
    print(f"{train}: {len(made)} pairs of {len(rows)} rows" + (f"; left out: {dropped}" if dropped else ""))


def _labelled_rows(name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    from rlaif.data import read_rows

    empty = True
    for where, row in read_rows(name):
        empty = False
        for column in ("id", "prompt", "response_a", "response_b", "status", "soft_label", "label"):
            if column not in row:
                raise UsageError(f"{where}: no column '{column}'; is this an output of `rlaif label`?")
        yield where, row
    if empty:
        raise UsageError(f"{name}: no rows")


templates_app = typer.Typer(help="List the templates, or show one.", invoke_without_command=True, add_completion=False)
app.add_typer(templates_app, name="templates")


@templates_app.callback()
def templates(context: typer.Context) -> None:
    """List the templates with what they ask."""
    if context.invoked_subcommand is None:
        from rlaif.prompts import list_templates, load_template

        for name in list_templates():
            print(f"{name:20} {load_template(name).description}")


@templates_app.command()
def show(name: Annotated[str, typer.Argument(help="A shipped template's name, or a file.")]) -> None:
    """Render a template on a sample row, as the messages that a model gets."""
    from rlaif.data import comparisons
    from rlaif.prompts import load_template

    template = load_template(name)
    sample = Path(__file__).parent / "samples" / "comparisons.jsonl"
    category = {"harmless": "harmlessness", "summary": "summarisation"}.get(name.partition("-")[0], "helpfulness")
    item = next(item for item in comparisons(str(sample)) if item.row["category"] == category)
    row = item.row
    messages, prefix = template.render(prompt=item.prompt, response_1=row["response_a"], response_2=row["response_b"], row=row)
    print(f"# {template.name}: {template.description}")
    print(f"# choices {' / '.join(template.choices)}, asks for the {template.asks_for} one, hash {template.hash[:12]}")
    for message in messages:
        print(f"\n[{message['role']}]\n{message['content']}")
    print(f"\n[assistant begins]\n{prefix}")


if __name__ == "__main__":
    main()
