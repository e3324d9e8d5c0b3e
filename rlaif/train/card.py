"""Model cards: a README.md in the model folder that tells what was trained, on what, by whose labels, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from rlaif.data import atomic

BASES = {"embedded": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""What the hub calls a model of ours."""

HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

LOSSES = {
    "dpo": "direct preference optimization (arXiv 2305.18290)",
    "dpo_norm": "direct preference optimization by token (arXiv 2411.15124)",
    "ipo": "identity preference optimization (arXiv 2310.12036)",
    "hinge": "SLiC's hinge loss (arXiv 2305.10425, 2309.06657)",
    "slic": "SLiC's hinge loss (arXiv 2305.10425, 2309.06657)",
    "robust": "robust DPO (arXiv 2403.00409)",
    "exo": "efficient exact optimization (arXiv 2402.00856)",
    "nca": "noise contrastive alignment (arXiv 2402.05369)",
    "bco": "binary classifier optimization (arXiv 2404.04656)",
    "sppo": "self-play preference optimization, hard form (arXiv 2405.00675)",
    "aot": "alignment by optimal transport (arXiv 2406.05882)",
    "aot_unpaired": "alignment by optimal transport, unpaired (arXiv 2406.05882)",
    "apo_zero": "anchored preference optimization, zero (arXiv 2408.06266)",
    "apo_down": "anchored preference optimization, down (arXiv 2408.06266)",
    "discopop": "discovered preference optimization (arXiv 2406.08414)",
    "sft": "the likelihood of the chosen response",
    "cpo": "contrastive preference optimization (arXiv 2401.08417)",
    "cpo_hinge": "contrastive preference optimization, hinge (arXiv 2401.08417)",
    "cpo_ipo": "contrastive preference optimization, IPO (arXiv 2401.08417)",
    "simpo": "simple preference optimization (arXiv 2405.14734)",
    "alphapo": "AlphaPO (arXiv 2501.03884)",
    "orpo": "odds ratio preference optimization (arXiv 2403.07691)",
    "kto": "Kahneman–Tversky optimization (arXiv 2402.01306)",
    "apo_zero_unpaired": "anchored preference optimization, zero, unpaired (arXiv 2408.06266)",
    "auto": "anchored preference optimization, zero or down as measured (arXiv 2408.06266)",
}
REWARDS = {
    "auto": "cross-entropy with the labels of comparisons (arXiv 2309.00267), by rankings where there are such (2203.02155)",
    "pairwise": "cross-entropy with the labels of comparisons (arXiv 2309.00267)",
    "ranking": "all comparisons of a ranking in one batch (arXiv 2203.02155)",
    "binary": "each response good or bad by itself (arXiv 2112.00861)",
}

ALGORITHMS = {
    "ppo": "proximal policy optimisation (arXiv 1707.06347)",
    "reinforce": "REINFORCE with a learned value baseline (arXiv 2309.00267)",
    "p3o": "pairwise proximal policy optimisation (arXiv 2310.00212)",
    "trpo": "trust region policy optimisation (arXiv 1502.05477)",
    "grpo": "group relative policy optimisation (arXiv 2402.03300)",
    "rloo": "REINFORCE with a leave-one-out baseline (arXiv 2402.14740)",
}
NASH = "Nash learning by mirror descent (arXiv 2312.00886)"

TOLD = {"name", "description", "model", "data", "eval", "out", "stages"}
"""Settings that are not listed as they are: they have a place of their own in the card, or none."""

ABSOLUTE = re.compile(r"(?:file://|(?<![\w/.)\]]))(?:[A-Za-z]:[\\/]|~?/(?![/\s]|$))(?:\S*[/\\])?")
SPECIAL = re.compile(r"[&<>|\\`*\[\]~$#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
LONGEST = 300
"""Characters of a value; a longer one is cut."""

Table = Iterable[Sequence[Any]]


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """Write the card of what `run.json` holds. It tells files by their names, never where they stand."""
    front = yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True)
    settings = report["settings"]
    parts = [
        f"---\n{front}---",
        f"# {text(settings['name'])}",
        _what(report),
        "## Data",
        table(("part", "file", "rows", "left out", "SHA-256"), _data(report["data"])),
        "## Labels",
        *_labels(report),
        "## Settings",
        table(("setting", "value"), _settings(settings)),
        *_measured(report),
        "## Versions",
        table(("package", "version"), report["versions"].items()),
        "## Use",
        _use(report),
    ]
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of a card: https://huggingface.co/docs/hub/model-cards."""
    settings, reward = report["settings"], report["kind"] in ("reward", "gpo")
    base = base_model(settings["model"])
    return {
        **({"base_model": base} if base else {}),
        "library_name": "peft" if adapter(settings) else "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["rlaif", "trl", "reward-model" if report["kind"] == "reward" else report["kind"]],
    }


def base_model(model: str) -> str | None:
    """The hub's name of what was trained; None for a folder."""
    name = BASES.get(model, model)
    return name if HUB.fullmatch(name) and not Path(model).exists() else None


def adapter(settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds an adapter alone."""
    return bool(settings.get("lora")) and not settings["lora"]["merge"]


# ---------------------------------------------------------------- sections


def _what(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    start = base_model(settings["model"]) or f"the model in a folder named {PurePosixPath(settings['model']).name}"
    seconds = report.get("wall_seconds")
    lines = [
        f"{kind_of(report)} {'Its texts are embedded by' if report['kind'] == 'gpo' else 'It started from'} {text(start)}.",
        f"About it: {text(settings['description'])}" if settings.get("description") else "",
        f"Trained with rlaif{f' in {seconds:,.0f} s' if seconds else ''}; {_parts(report['parts'])}.",
    ]
    return "\n\n".join(line for line in lines if line)


def kind_of(report: Mapping[str, Any]) -> str:
    """The kind of training and its loss, as a sentence."""
    kind, settings = report["kind"], report["settings"]
    if kind == "sft":
        how = (
            "by distilling a context into it (arXiv 2112.00861)"
            if settings["context"]
            else "on completions, by their likelihood"
        )
        return f"A language model, fine-tuned {how}."
    if kind == "ppo":
        stopped = report.get("evaluation", {}).get("stopped")
        why = f" It was stopped early: {text(stopped)}." if stopped else ""
        how = ALGORITHMS[settings["algorithm"]]
        return f"A language model, trained by reinforcement learning from AI feedback: {how}.{why}"
    if kind == "gpo":
        return "A module that predicts a group's scores of responses from a few that it has given (arXiv 2310.11523)."
    loss = settings["loss"]
    if kind == "online":
        return f"A language model, trained on preferences between its own responses: {LOSSES.get(loss, NASH)}."
    if kind == "reward":
        return f"A reward model: a score for a response to a prompt. Loss: {REWARDS[loss]}."
    losses = {loss: 1.0} if isinstance(loss, str) else loss
    several = len(losses) > 1
    told = " + ".join(f"{f'{weight:g} · ' if several else ''}{LOSSES[name]}" for name, weight in losses.items())
    return f"A language model, trained on preferences. Loss: {told}."


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{text(part['name'])}: {part['steps']:,} steps in {part['seconds']:,.0f} s" for part in parts)


def _data(data: Mapping[str, Mapping[str, Any]]) -> Table:
    for stage, both in data.items():
        for use, facts in (("training", both["train"]), ("held out", both["held_out"])):
            if facts:
                left_out = ", ".join(f"{count:,} {reason}" for reason, count in facts["left_out"].items() if count)
                yield f"{stage}, {use}", names(facts["source"]), f"{facts['rows']:,}", left_out, facts["sha256"]


def names(source: str) -> str:
    """Of files, without their folders; several are separated by commas."""
    return ", ".join(re.split(r"[/\\]", part)[-1] for part in source.split(", "))


def _labels(report: Mapping[str, Any]) -> Iterator[str]:
    labelers = report.get("labeler") or ()
    reward = report.get("evaluation", {}).get("reward") if report["kind"] in ("ppo", "online") else None
    if reward:
        yield "Responses were judged while it was trained, by:"
        yield table(("setting", "value"), flat(reward if isinstance(reward, Mapping) else {"reward": reward}))
        return
    if not labelers:
        yield "No run file beside the data tells who labelled it."
    for labeler in labelers:
        yield f"{text(names(labeler['data']))} was made from {text(names(labeler['labels']))}, whose labeler was:"
        yield table(("setting", "value"), flat(labeler["settings"]))
        if labeler["agreement"]:
            agreement = dict(labeler["agreement"])
            column = agreement.pop("column")
            yield f"Its agreement with humans (column {text(column)}), with intervals by resampling prompts:"
            yield figures_table(agreement)
        else:
            yield "Its agreement with humans was not measured."


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from flat({name: value for name, value in settings.items() if name not in TOLD})
    for number, stage in enumerate(settings["stages"], 1):
        yield from flat({name: value for name, value in stage.items() if name not in TOLD}, f"stages.{number}.")


def _measured(report: Mapping[str, Any]) -> Iterator[str]:
    yield "## Measured"
    found = measured(report.get("evaluation") or {})
    yield from [figures_table(found)] if found else []
    last = report.get("metrics") or {}
    yield "What the trainer logged last (`eval_`: on held-out rows):"
    yield table(("part", "figure", "value"), [(part, name, value) for part, own in last.items() for name, value in own.items()])


def measured(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, without what says how a run of reinforcement learning judged, and why it ended."""
    return {name: value for name, value in evaluation.items() if name not in ("algorithm", "reward", "stopped")}


def _use(report: Mapping[str, Any]) -> str:
    if report["kind"] == "reward":
        return "```sh\nrlaif reward score responses.jsonl --model THIS_FOLDER -o scores.jsonl\n```"
    if report["kind"] == "gpo":
        shots = "--context FEWSHOT.jsonl --group NAME"
        return f"```sh\nrlaif reward groups responses.jsonl --model THIS_FOLDER {shots} -o scores.jsonl\n```"
    alone = adapter(report["settings"])
    package, loader = ("peft", "AutoPeftModelForCausalLM") if alone else ("transformers", "AutoModelForCausalLM")
    imports = f"from {package} import {loader}\nfrom transformers import AutoTokenizer"
    load = f'model = {loader}.from_pretrained("THIS_FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    return f"```python\n{imports}\n\n{load}\n```"


# ---------------------------------------------------------------- figures and settings


def figures_table(found: Mapping[str, Any]) -> str:
    """Measured figures, each a number or an estimate (value, low, high, n), by their names, which may be nested."""
    return table(("figure", "value", "95 % interval", "n"), figures(found))


def figures(found: Mapping[str, Any], lead: str = "") -> Iterator[tuple[Any, ...]]:
    """Name, value, interval and n of each; of a list only what tells its `part` or `name` (bins of a curve do not)."""
    for name, value in found.items():
        if isinstance(value, Mapping) and "value" in value:
            low, high = value.get("low"), value.get("high")
            bounds = "" if low is None or high is None else f"{shown(low)} to {shown(high)}"
            yield lead + str(name), value["value"], bounds, value.get("n")
        elif isinstance(value, Mapping):
            yield from figures(value, f"{lead}{name}.")
        elif isinstance(value, list | tuple):
            for own in value:
                label = (own.get("part") or own.get("name")) if isinstance(own, Mapping) else None
                yield from figures(own, f"{lead}{name}.{label}.") if label else ()
        elif value is not None:
            yield lead + str(name), value, "", ""


def flat(settings: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with dotted names; what is not set is left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{lead}{name}.")
        elif isinstance(value, list | tuple) and value:
            yield lead + str(name), ", ".join(map(shown, value))
        elif value is not None and value != []:
            yield lead + str(name), value


# ---------------------------------------------------------------- Markdown


def table(head: Sequence[str], rows: Table) -> str:
    """A Markdown table of any values."""
    lines = [head, ["---"] * len(head), *([text(shown(value)) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text(value: str) -> str:
    """As Markdown on one line, in which nothing is markup and no file is told with its folder."""
    line = UNSEEN.sub("\ufffd", " ".join(nameless(value).split()))
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return SPECIAL.sub(lambda found: f"&#{ord(found[0])};", line)


def nameless(value: str) -> str:
    """The text with the last name alone of each absolute path.

    >>> nameless("from /home/me/rows.jsonl, https://host/v1")
    'from rows.jsonl, https://host/v1'
    """
    if PurePosixPath(value).is_absolute() and "\n" not in value:
        return PurePosixPath(value).name
    if PureWindowsPath(value).is_absolute() and "\n" not in value:
        return PureWindowsPath(value).name
    return ABSOLUTE.sub("", value)
