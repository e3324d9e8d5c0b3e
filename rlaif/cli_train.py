"""`rlaif train KIND CONFIG.yaml`: one thin command a kind. Heavy packages are imported inside, as in rlaif/cli.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rlaif.records import RlaifError

PATIENCE = 20.0
"""Seconds in which the launcher of several processes ends the others, when the main one has said what is wrong."""

train_app = typer.Typer(
    help="Train: supervised fine-tuning, reward models, DPO and its family, KTO; PPO and online DPO with an AI judge.",
    no_args_is_help=True,
    add_completion=False,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's settings: a YAML file, or a shipped one's name.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; lora.r=8 reaches inside one.")
]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="The run's folder (default: the config's `out`).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")]


@train_app.command()
def sft(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """Supervised fine-tuning, or context distillation (arXiv 2112.00861)."""
    _train("sft", config, out, changes, resume)


@train_app.command()
def reward(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """A reward model from soft or hard labels, rankings, or margins (arXiv 2309.00267, 2203.02155, 2307.09288)."""
    _train("reward", config, out, changes, resume)


@train_app.command()
def dpo(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """Preference optimization: dpo, ipo, apo_zero, simpo, orpo … under one setting, `loss` (arXiv 2305.18290)."""
    _train("dpo", config, out, changes, resume)


@train_app.command()
def ppo(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """PPO, REINFORCE, RLOO, GRPO, P3O or TRPO, rewarded by a reward model or the judge itself (arXiv 2309.00267)."""
    _train("ppo", config, out, changes, resume)


@train_app.command()
def online(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """Preferences between the model's own responses, judged as it learns: online DPO, IPO-MD, Nash-MD (arXiv 2402.04792)."""
    _train("online", config, out, changes, resume)


@train_app.command()
def kto(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """KTO on single responses, desirable or not (arXiv 2402.01306)."""
    _train("kto", config, out, changes, resume)


@train_app.command()
def gpo(config: Config, out: Out = None, changes: Changes = None, resume: Resume = False) -> None:
    """A module that predicts a group's scores from a few of them, learnt from other groups (arXiv 2310.11523)."""
    _train("gpo", config, out, changes, resume)


def _train(kind: str, name: str, out: Path | None, changes: list[str] | None, resume: bool) -> None:
    from rlaif.train.kinds import load_config
    from rlaif.yamlfile import named

    main = os.environ.get("RANK", "0") == "0"
    try:
        own = [f"out={json.dumps(str(out))}"] if out else []
        config = load_config(kind, named("pipelines/train", name), [*(changes or []), *own])
        from rlaif.train.run import run

        report = run(kind, config, resume)
    except RlaifError:
        if not main:
            time.sleep(PATIENCE)
        raise
    if main:
        steps = sum(part["steps"] for part in report["parts"])
        print(f"{config.out}/model: {steps:,} steps in {report['wall_seconds']:,.0f} s")
        _say(report["evaluation"])


def _say(evaluation: dict[str, Any]) -> None:
    """What was measured on held-out rows, in a line."""
    accuracy = evaluation.get("accuracy")
    if accuracy and accuracy["low"] is not None:
        low, high = accuracy["low"], accuracy["high"]
        print(f"held out: accuracy {accuracy['value']:.3f} ({low:.3f} to {high:.3f}), {accuracy['n']} rows")
    for how, found in evaluation.get("predictions", {}).items():
        print(f"held-out groups, {how}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items() if v is not None))
    if evaluation.get("stopped"):
        print(f"stopped early: {evaluation['stopped']}")
    if "before" in evaluation:
        print(f"{evaluation['measure']}: {evaluation['before']:.4f} before, {evaluation['after']:.4f} after")
