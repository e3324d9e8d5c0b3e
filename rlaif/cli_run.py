"""`rlaif run` and what looks at its folders. Heavy packages are imported inside, as in rlaif/cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")]


def run(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline file, or a shipped one's name.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The run's folder (default: runs/NAME-SIZE).")] = None,
    size: Annotated[str | None, typer.Option(help="One of the file's sizes, as smoke or full (default: the first).")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Run this step again, and those that depend on it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done, with an estimate of calls, tokens and cost.")
    ] = False,
) -> None:
    """Run a pipeline: its steps one after the other, those left out that are done and whose inputs have not changed.

    The same command goes on where an earlier one stopped, was interrupted or killed.
    """
    from rlaif.pipeline import recipe
    from rlaif.pipeline.work import Work

    file = recipe.find(pipeline)
    folder = out or recipe.default_folder(file, size)
    read = recipe.read(file, folder, size, changes or [])
    work = Work(read, folder, frozenset(read.after(start)) if start else frozenset())
    if dry_run:
        from rlaif.pipeline.estimate import render

        print(render(work))
        return
    work.run()
    from rlaif.pipeline.status import summary

    print(summary(work.lineage))


def status(folder: Folder) -> None:
    """Tell how far a run is: each step's state, time, calls and cost, and what has changed since."""
    from rlaif.pipeline.lineage import Lineage
    from rlaif.pipeline.status import render

    print(render(Lineage.load(folder)))


def lineage(folder: Folder, file: Annotated[str, typer.Argument(metavar="FILE", help="A file or folder of the run.")]) -> None:
    """Tell where a file of a run came from: steps, settings, inputs by hash, labelers and their agreement, tokens, cost."""
    from rlaif.pipeline.lineage import Lineage
    from rlaif.pipeline.status import trace

    print(trace(Lineage.load(folder), file))


def card(folder: Folder) -> None:
    """Write the cards of a run's training sets and models: what led to them, labelers and their agreement, tokens, cost."""
    from rlaif.pipeline.cards import write_cards

    for path in write_cards(folder):
        print(path)


def push(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The repository on the hub, as OWNER/NAME.")],
    file: Annotated[
        str | None, typer.Option("--file", help="A training set, or a model's folder (default: the run's last model).")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see a new repository.")] = True,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", metavar="TEXT", help="Let a text pass that looks like a secret or a path.")
    ] = None,
) -> None:
    """Push a run's model or training set, with its card, to the hub; the token is that of HF_TOKEN or of the hub's login.

    Nothing is sent where a secret or a path of this machine stands in it.
    """
    from rlaif.pipeline.publish import push as send

    print(send(folder, name, file, private, allow or ()))


def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet, or empty.")]) -> None:
    """Make a project of your own: pipeline, constitution, template, labeler and rows to change, that run as they are."""
    from rlaif.pipeline.project import create

    for path in create(folder):
        print(path)
    print(f"it runs as it is; {folder / 'README.md'} tells how, and what to change")
