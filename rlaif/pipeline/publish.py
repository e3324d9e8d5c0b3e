"""Pushing a run's model or training set, with its card, to the hub: only what was looked through, and only when asked."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.pipeline.cards import models, training_sets, write
from rlaif.pipeline.lineage import Lineage
from rlaif.pipeline.scan import BINARY, JSON, OTHER, Scanner, here, of_environment
from rlaif.pipeline.status import inside
from rlaif.records import FatalError, UsageError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
TOLD = 5
"""Findings that a message tells; of more, how many."""


@dataclass(frozen=True)
class Parcel:
    """What is pushed: `kind` of repository (`model` or `dataset`), and files by their names in it."""

    kind: str
    files: dict[str, Path]


def push(folder: Path, name: str, file: str | None = None, private: bool = True, allow: Collection[str] = ()) -> str:
    """Push the last model of a run, or `file`: a training set or another model of it, with its card written anew.

    The token is the hub's own: of HF_TOKEN, or of its login. Returns what was done, in words.

    Raises: UsageError, before anything is sent, for a file with a secret or a path of this machine in it that `allow` does
    not name, for pickles and for other files that belong to no model or training set; FatalError for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    parcel = collect(folder, file)
    scanner = Scanner(of_environment(the_hub_token=get_token()), here(folder), frozenset(allow))
    check(parcel, scanner)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        repo = api.create_repo(name, private=private, repo_type=parcel.kind, exist_ok=True).repo_id
        is_private = bool(api.repo_info(repo, repo_type=parcel.kind).private)
        if is_private or not private:
            operations = [CommitOperationAdd(path, str(own)) for path, own in parcel.files.items()]
            done: Any = api.create_commit(repo, operations, commit_message="Push with rlaif", repo_type=parcel.kind)
    except HFValidationError as error:
        raise UsageError(f"{name}: no name for the hub: {' '.join(str(error).split())}") from None
    except Exception as error:  # of the hub's, of the network's: none of them is ours
        said = scanner.masked(" ".join(str(error).split()))
        raise FatalError(f"{name}: the hub does not take it: {type(error).__name__}: {said}") from None
    if private and not is_private:
        raise UsageError(f"{repo} is there already, and public: push to it with --public, or choose another name")
    what = "private" if is_private else "public"
    return f"{repo}: {len(parcel.files)} files of a {parcel.kind} pushed, {what}: {done.commit_url}"


def collect(folder: Path, file: str | None) -> Parcel:
    """What would be pushed, its card written. Raises: UsageError for what is no training set and no model of the run."""
    lineage = Lineage.load(folder)
    sets, made = training_sets(lineage), models(lineage)
    name = inside(folder, file) if file else next(reversed(made), "")
    name = name.removesuffix("/model") if name not in sets else name
    if name not in (*sets, *made):
        there = ", ".join((*sets, *made)) or "none yet"
        raise UsageError(f"{folder}: {file or 'a model'}: no training set or model of this run; there are: {there}")
    card = write(lineage, name)
    if name in sets:
        data = folder / name
        return Parcel("dataset", {data.name: data, "README.md": card})
    model = card.parent
    files = sorted(path for path in model.rglob("*") if not path.is_dir() or path.is_symlink())
    return Parcel("model", {str(path.relative_to(model)): path for path in files})


def check(parcel: Parcel, scanner: Scanner) -> None:
    """Raises: UsageError naming files and lines of what must not be sent, and what kind that is."""
    for name, path in parcel.files.items():
        if path.is_symlink() or name.startswith(".") or "/." in name:
            raise UsageError(f"{name}: not pushed: a link or a hidden file belongs to no {parcel.kind}")
        if name.endswith(PICKLES):
            raise UsageError(f"{name}: not pushed: a pickle, which can run code where it is loaded; save as safetensors")
        if not name.endswith((*JSON, *OTHER, *BINARY)):
            raise UsageError(f"{name}: not pushed: it belongs to no {parcel.kind}; take it out of {path.parent.name}/")
    found = [own for name, path in parcel.files.items() for own in scanner.file(path, name)]
    if found:
        told = "; ".join(str(own) for own in found[:TOLD])
        more = f"; and {len(found) - TOLD:,} more" if len(found) > TOLD else ""
        raise UsageError(f"nothing was pushed, for there is {told}{more} (--allow TEXT lets a text pass)")
