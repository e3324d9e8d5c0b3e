"""Step time of our trainers against TRL's own with the same model, rows and settings: a ratio for each, in one run.

    python benchmarks/train_step.py [--model embedded] [--steps 6] [--rounds 4] [--json FILE]

Both train by turns, each `--rounds` times, on the same rows and in the same order; what is timed is `train()` as a whole, with
our recorder and checkpoint callbacks on our side, without writing a checkpoint on either. The ratio is of the medians.
Soft labels have no trainer of TRL's own: they stand against TRL's hard loss on the same pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlaif.records import Row
from rlaif.train.checkpoints import Checkpoints
from rlaif.train.config import Training
from rlaif.train.data import Rows
from rlaif.train.kinds import KINDS
from rlaif.train.record import Recorder
from rlaif.train.run import MODULES, Part, arguments, load_tokenizer, model_path, quiet

WORDS = ["the", "model", "answers", "a", "question", "about", "rain", "and", "rivers", "with", "care", "says", "what", "it"]


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + n * 5 + n * n) % len(WORDS)] for n in range(count))


def pairs(count: int) -> list[Row]:
    return [
        {"prompt": f"{n}. {words(n, 20)}?", "chosen": f" {words(n + 1, 40)}", "rejected": f" {words(n + 2, 40)}"}
        for n in range(count)
    ]


def singles(count: int, labelled: bool) -> list[Row]:
    made = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(count)]
    return [{**row, "label": n % 2 == 0} for n, row in enumerate(made)] if labelled else made


def ours(kind: str, config: Training, rows: list[Row], folder: Path) -> Any:
    module = import_module(MODULES[kind])
    tokenizer = load_tokenizer(config)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, _ = module.read(config.changed(data=str(data)))
    part = Part("train", config, model_path(config.model), folder, 0, tokenizer, train, None)
    part.arguments.update(arguments(part))
    made = module.trainer(part)
    made.remove_callback(PrinterCallback)
    made.add_callback(Recorder(folder / "metrics.jsonl", "train"))
    made.add_callback(Checkpoints(2))
    return made


def theirs(kind: str, config: Training, rows: list[Row], folder: Path) -> Any:
    """As TRL's documentation does it, with the settings that ours come to."""
    model, tokenizer = model_path(config.model), load_tokenizer(config)
    part = Part("train", config, model, folder, 0, tokenizer, Rows("rows", rows), None)
    shared = arguments(part)
    configs: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
    trainers: dict[str, Any] = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer, "kto": KTOTrainer}
    known = configs[kind].__dataclass_fields__
    settings = configs[kind](**{k: v for k, v in shared.items() if k in known and v is not None})
    rows = [{k: v for k, v in row.items() if k != "soft_label"} for row in rows]
    given: Any = model
    if kind == "reward":
        given = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    made = trainers[kind](model=given, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made


def seconds(make: Callable[[], Any]) -> float:
    trainer = make()
    begun = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begun


def compare(
    name: str, kind: str, model: str, rows: list[Row], steps: int, rounds: int, batch: int, **more: Any
) -> dict[str, Any]:
    times: dict[str, list[float]] = {"ours": [], "trl": []}
    for number in range(rounds + 1):  # the first warms up
        for who, make in (("ours", ours), ("trl", theirs)):
            with tempfile.TemporaryDirectory() as folder:
                own = {"batch_size": batch, "max_steps": steps, "save_steps": steps + 1, "learning_rate": 1e-6, "log_steps": 1}
                config = KINDS[kind](name=name, model=model, data="rows", out=folder, device="cpu", **own)
                spent = seconds(lambda make=make, config=config, folder=folder: make(kind, config, rows, Path(folder)))
                if number:
                    times[who].append(spent / steps)
    mine, other = (statistics.median(times[who]) for who in ("ours", "trl"))
    return {"trainer": name, "ours_s": mine, "trl_s": other, "ratio": mine / other, "rounds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    quiet()
    count = given.steps * given.batch
    soft = [{**row, "soft_label": 0.8} for row in pairs(count)]
    cases = [
        ("sft", "sft", singles(count, False)),
        ("reward", "reward", pairs(count)),
        ("reward, soft labels", "reward", soft),
        ("dpo", "dpo", pairs(count)),
        ("dpo, soft labels", "dpo", soft),
        ("kto", "kto", singles(count, True)),
    ]
    found = []
    print(f"{'trainer':22} {'ours s/step':>12} {'TRL s/step':>12} {'ratio':>7}")
    for name, kind, rows in cases:
        one = compare(name, kind, given.model, rows, given.steps, given.rounds, given.batch)
        found.append(one)
        print(f"{name:22} {one['ours_s']:12.3f} {one['trl_s']:12.3f} {one['ratio']:7.3f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"model": given.model, "steps": given.steps, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
