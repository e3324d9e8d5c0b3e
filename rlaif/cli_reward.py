"""`rlaif reward`: trained reward models as scorers. Heavy packages are imported inside, as in rlaif/cli.py."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlaif.options import BadRows, Reading, Running, grouped, say_report
from rlaif.records import FatalError

if TYPE_CHECKING:
    from rlaif.engines import Engine
    from rlaif.reward import Folder

reward_app = typer.Typer(help="Use reward models that `rlaif train reward` made.", no_args_is_help=True, add_completion=False)

ROWS = 256
"""Responses in flight, unless told otherwise: of more at once, batches are of more equal lengths."""


class Combine(StrEnum):
    mean = "mean"
    worst = "worst"


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


@reward_app.command()
@grouped
def score(
    data: Annotated[str, typer.Argument(help=".jsonl, .jsonl.gz or .parquet, a saved dataset's folder, or a hub name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to: .jsonl, .jsonl.gz or .parquet.")],
    model: Annotated[list[Path], typer.Option(metavar="DIR", help="A reward model's folder; several are combined.")],
    reading: Reading,
    running: Running,
    head: Annotated[
        str, typer.Option(metavar="NAME|mean|worst", help="Of several heads: the one that counts, or what they come to.")
    ] = "mean",
    combine: Annotated[
        Combine | None,
        typer.Option(help="What several members come to (default: as the ensemble was trained; of several folders, the mean)."),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format (default: bf16 on a GPU, else fp32).")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it (default: a GPU where there is one).")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model.")
    ] = False,
) -> None:
    """Score responses with a trained reward model: DATA's rows as `rlaif score` or, of comparisons, `rlaif label` writes them.

    Rows of prompt and response (or an output of `rlaif sample`) get a score; rows of response_a and response_b, or chosen
    and rejected, a soft label σ(score_a − score_b). The same command goes on where an earlier one stopped.
    """
    from rlaif.job import Job
    from rlaif.reward import Scorer, read_folder, work

    folders = tuple(read_folder(path) for path in model)
    default = folders[0].combine if len(folders) == 1 else "mean"
    scorer = Scorer(folders, head, combine.value if combine else default)
    items, method = work(data, scorer, reading.columns, reading.split, reading.limit)
    job = Job(data, out, items, method, reading.facts(), "scoring")
    limits = running.within(ROWS)
    total = job.check(keep_bad=running.bad_rows is BadRows.keep)
    engine = None if running.reparse else _engine(folders, dtype and dtype.value, device, trust_remote_code)
    say_report(job.run(engine, limits, total, redo=running.relabel), out)


def _engine(folders: tuple[Folder, ...], *settings: Any) -> Engine:
    try:
        from rlaif.engines.reward import RewardEngine
    except ModuleNotFoundError as error:
        raise FatalError(f"the package {error.name} is not installed: pip install 'rlaif[transformers]'") from error
    return RewardEngine(folders, *settings)
