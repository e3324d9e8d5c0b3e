"""Which of the two losses of anchored preference optimization fits the data, measured: `loss: auto`.

APO-zero is for chosen responses that are better than the model's own, APO-down for those that are worse (D'Oosterlinck et
al., arXiv 2408.06266, §4). So the model answers some of the prompts itself, and a labeler compares.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlaif import data
from rlaif.engines import make_engine
from rlaif.evaluate.agreement import Statistic, estimates
from rlaif.job import Job
from rlaif.labeler import CONCURRENCY, Labeler, load_labeler
from rlaif.records import LABELLED, RlaifError, Row
from rlaif.runner import Limits
from rlaif.sample import Sampler
from rlaif.train.config import Preference
from rlaif.train.run import Part

DECISION = "decision.json"


def decided(config: Preference, part: str) -> dict[str, Any]:
    """The decision that was stored for a part."""
    found: dict[str, Any] = json.loads((_folder(config, part) / DECISION).read_text(encoding="utf-8"))
    return found


def choose(part: Part) -> dict[str, Any]:
    """Decide, once for all processes and all times that the run is resumed.

    The `loss`; `p_chosen_better`, the mean of the labeler's P(chosen is better than the model's own) as an `Estimate` over
    prompts, and whether its interval is `clear` of 0.5; counts of `prompts`, of those `not_sampled` and `not_judged`, which
    are no part of it, and of responses `cut` at the length of the longest chosen one.

    Raises: RlaifError where no comparison came of it; StoppedError where it was interrupted; FatalError as the engines do.
    """
    folder = _folder(part.config, part.name)
    path = folder / DECISION
    if int(os.environ.get("RANK", "0")) == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        decision = _decide(part, folder)
        with data.atomic(path) as temporary:
            temporary.write_text(json.dumps(decision, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    while not path.exists():  # a barrier would run out of time
        time.sleep(0.5)
    found = decided(part.config, part.name)
    if int(os.environ.get("RANK", "0")) == 0:
        print(in_words(found), file=sys.stderr)
    return found


def in_words(decision: dict[str, Any]) -> str:
    """One line that says what was found."""
    mean = decision["p_chosen_better"]
    interval = "" if mean["low"] is None else f" (95 % interval {mean['low']:.2f} to {mean['high']:.2f})"
    doubt = "" if decision["clear"] else "; not clear of 0.50, so that either might fit"
    return (
        f"loss auto: chosen responses are better than the model's own with probability {mean['value']:.2f}{interval}, "
        f"by {mean['n']} comparisons: {decision['loss']}{doubt}"
    )


def _folder(config: Preference, part: str) -> Path:
    return Path(config.out) / "auto" / part


def _decide(part: Part, folder: Path) -> dict[str, Any]:
    assert part.config.judge
    labeler = load_labeler(part.config.judge).changed(both_orders=True)
    asked = _probe(part)
    answered = _sampled(part, asked, folder)
    pairs = [
        {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["responses"][0]}
        for row in answered
        if row["status"] == "ok"
    ]
    if not pairs:
        raise RlaifError(f"loss auto: none of {len(asked)} prompts got a response of the model's own: {answered[0]['error']}")
    judged = _judged(labeler, pairs, folder)
    labels = [row["soft_label"] for row in judged if row["status"] in LABELLED]
    if not labels:
        raise RlaifError(f"loss auto: none of {len(pairs)} comparisons got a label: {judged[0]['error']}")
    return {
        **verdict(labels, part.seed),
        "judge": labeler.name,
        "prompts": len(asked),
        "not_sampled": len(asked) - len(pairs),
        "not_judged": len(pairs) - len(labels),
        "cut": sum(sample["finish"] == "length" for row in answered for sample in row["samples"]),
    }


def verdict(labels: list[float], seed: int) -> dict[str, Any]:
    """The loss, from the probability that the chosen response is better, one for each prompt."""
    values = np.array(labels)
    mean = Statistic(len(values), lambda weights: float(np.average(values, weights=weights)))
    found = estimates({"mean": mean}, np.arange(len(values)), 2000, seed)["mean"]
    clear = found.low is not None and found.high is not None and not found.low <= 0.5 <= found.high
    loss = "apo_zero" if values.mean() > 0.5 else "apo_down"
    return {"loss": loss, "p_chosen_better": asdict(found), "clear": clear}


def _probe(part: Part) -> list[Row]:
    """Up to `probe` distinct prompts, each with a chosen response, as texts."""
    found: dict[str, Row] = {}
    for row in part.train.rows:
        found.setdefault(json.dumps(row["prompt"]), row)
    drawn = random.Random(part.seed).sample(list(found.values()), min(part.config.probe, len(found)))
    return [{"prompt": _open(row["prompt"]), "chosen": _text(row["chosen"])} for row in drawn]


def _open(prompt: Any) -> Any:
    """A dialogue as `rlaif pairs` writes it ends with the word that a response follows."""
    return prompt.removesuffix(data.ASSISTANT) if isinstance(prompt, str) else prompt


def _text(response: Any) -> str:
    return str(response[-1]["content"] if isinstance(response, list) else response).strip()


def _sampled(part: Part, asked: list[Row], folder: Path) -> list[Row]:
    """The rows with a response of the model's own, as `rlaif sample` would draw it."""
    config: Preference = part.config
    longest = max(len(part.tokenizer(row["chosen"])["input_ids"]) for row in asked)
    engine = make_engine(
        "transformers",
        model=part.model,
        dtype=None if config.dtype == "auto" else config.dtype,
        device="cpu" if config.device == "cpu" else None,
        trust_remote_code=config.trust_remote_code,
    )
    source = _written(asked, folder / "prompts.jsonl")
    job = Job(
        source,
        folder / "own.jsonl",
        lambda: data.prompts(source),
        Sampler(max_tokens=longest, seed=part.seed),
        what="sampling the model's own",
    )
    job.run(engine, Limits(CONCURRENCY["transformers"], timeout=None), job.check())
    return _rows(job.out)


def _judged(labeler: Labeler, pairs: list[Row], folder: Path) -> list[Row]:
    source = _written(pairs, folder / "pairs.jsonl")
    facts = {"labeler": labeler.model_dump(mode="json", exclude_defaults=True)}
    job = Job(source, folder / "judged.jsonl", lambda: data.comparisons(source), labeler.pairwise(), facts, "judging them")
    limits = labeler.pace
    job.run(labeler.make_engine(limits), limits, job.check(keep_bad=True))
    return _rows(job.out)


def _written(rows: list[Row], path: Path) -> str:
    data.write_rows(path, lambda: rows)
    return str(path)


def _rows(path: Path) -> list[Row]:
    return [row for _, row in data.read_rows(str(path))]
