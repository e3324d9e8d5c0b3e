"""Reward models: scores learnt from soft or hard comparisons, rankings, margins; one head or several.

All losses are one: a batch holds whole groups of responses to one prompt, each response is read once, and each comparison
within a group has its own label, margin, head and weight. A pair is a group of two.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlaif.records import Row, UsageError
from rlaif.reward import FACTS, weights_hash
from rlaif.train import data
from rlaif.train.config import Reward
from rlaif.train.data import Encode, Rows, ready
from rlaif.train.run import Part, Run, read_both

# ---------------------------------------------------------------- rows


def read(config: Reward) -> tuple[Rows, Rows | None]:
    """Rows of all heads, each with its head's number, margins as numbers, soft labels where they count."""
    sources = config.data if isinstance(config.data, dict) else {"": config.data}
    held = config.eval if isinstance(config.eval, dict) else dict.fromkeys(sources, config.eval)
    found = [
        read_both(config.changed(data=source, eval=held[name], stages=()), partial(_read, config, head=n))
        for n, (name, source) in enumerate(sources.items())
    ]
    if any(set(train.rows[0]) != set(found[0][0].rows[0]) for train, _ in found):
        raise UsageError(f"{config.name}: the heads' files have different columns")
    return _together([train for train, _ in found]), _together([rows for _, rows in found if rows]) if found[0][1] else None


def _together(found: Sequence[Rows]) -> Rows:
    """The rows of all heads."""
    names = tuple(rows.source for rows in found)
    dropped = sum((rows.dropped for rows in found), Counter())
    return Rows(", ".join(names), [row for rows in found for row in rows.rows], dropped, names)


def _read(config: Reward, source: str, limit: int | None, *, head: int) -> Rows:
    drop = config.bad_rows == "drop"
    if config.loss == "binary" and data.is_unpaired(source):
        found = data.answers(source, config.form, limit, labelled=True, drop_bad=drop)
        return replace(found, rows=[{**row, "head": head} for row in found.rows])
    wanted = ["soft_label"] * (config.labels != "hard") + ([config.margin] if config.margin else [])
    found = data.pairs(source, config.form, limit, [*wanted, *["group"] * (config.loss in ("auto", "ranking"))], drop)
    first = found.rows[0]
    for column in (
        config.margin,
        "soft_label" if config.labels == "soft" else None,
        "group" if config.loss == "ranking" else None,
    ):
        if column and column not in first:
            raise UsageError(f"{source}: no column '{column}'")
    if "soft_label" in first and all(row["soft_label"] == 0.5 for row in found.rows):
        raise UsageError(f"{source}: column 'soft_label': every row is a tie; there is nothing to learn")
    return replace(found, rows=[_numbered(row, config, head, f"{source} row {n}") for n, row in enumerate(found.rows, 1)])


def _numbered(row: Row, config: Reward, head: int, where: str) -> Row:
    made = {k: v for k, v in row.items() if k != config.margin}
    if config.margin:
        value = row[config.margin]
        if config.margin_values:
            value = config.margin_values.get(str(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{where}: column '{config.margin}': no number for {row[config.margin]!r}")
        made["margin"] = float(value)
    return {**made, "head": head}


fitting = ready


# ---------------------------------------------------------------- groups


@dataclass
class Group:
    """Responses to one prompt as tokens, and what is known of them.

    Comparison k says that response `chosen[k]` is better than `rejected[k]` with probability `target[k]`; for single
    responses (binary) `rejected` is empty and `target[k]` is P(response k is good). All comparisons weigh `weight`.
    """

    ids: list[list[int]]
    chosen: list[int]
    rejected: list[int]
    target: list[float]
    margin: list[float]
    head: int
    weight: float


def groups(rows: Iterable[Row], encode: Encode, binary: bool = False) -> Iterator[Group]:
    """Rows as groups: those of one `group` and head together, every other row by itself."""
    ranked: dict[Any, list[Row]] = {}
    for row in rows:
        if "group" in row:
            ranked.setdefault((row["head"], row["group"], json.dumps(row["prompt"])), []).append(row)
        elif binary:
            yield _singles(row, encode)
        else:
            yield _group([row], encode)
    for together in ranked.values():
        yield _group(together, encode)


def _group(rows: Sequence[Row], encode: Encode) -> Group:
    places: dict[str, int] = {}
    ids: list[list[int]] = []

    def place(row: Row, side: str) -> int:
        key = json.dumps(row[side])
        if key not in places:
            places[key] = len(ids)
            ids.append(encode(row["prompt"], row[side]))
        return places[key]

    chosen = [place(row, "chosen") for row in rows]
    rejected = [place(row, "rejected") for row in rows]
    targets = [float(row.get("soft_label", 1.0)) for row in rows]
    margins = [float(row.get("margin", 0.0)) for row in rows]
    return Group(ids, chosen, rejected, targets, margins, rows[0]["head"], 1 / comb(len(ids), 2))


def _singles(row: Row, encode: Encode) -> Group:
    names = ["chosen", "rejected"] if "chosen" in row else ["completion"]
    good = float(row.get("soft_label", 1.0)) if "chosen" in row else float(row["label"])
    targets = [good, 1 - good][: len(names)]
    ids = [encode(row["prompt"], row[name]) for name in names]
    return Group(ids, list(range(len(ids))), [], targets, [0.0] * len(ids), row["head"], 1 / len(ids))


def collate(examples: Sequence[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of groups.

    `input_ids`, `attention_mask`: (responses, tokens), padded on the right; `chosen`, `rejected` (empty for single
    responses), `head`: (comparisons) indices; `target`, `margin`, `weight`: (comparisons), the weights over the whole
    batch: each group's share is 1 / groups.
    """
    ids = [torch.tensor(own) for example in examples for own in example["ids"]]
    starts = torch.tensor([0, *(len(example["ids"]) for example in examples)]).cumsum(0).tolist()
    shifted = {
        side: [start + n for start, example in zip(starts, examples, strict=False) for n in example[side]]
        for side in ("chosen", "rejected")
    }
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True),
        "chosen": torch.tensor(shifted["chosen"]),
        "rejected": torch.tensor(shifted["rejected"], dtype=torch.long),
        "target": torch.tensor([value for example in examples for value in example["target"]]),
        "margin": torch.tensor([value for example in examples for value in example["margin"]]),
        "head": torch.tensor([example["head"] for example in examples for _ in example["chosen"]]),
        "weight": torch.tensor([example["weight"] / len(examples) for example in examples for _ in example["chosen"]]),
    }


def reward_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor | None,
    target: torch.Tensor,
    margin: torch.Tensor,
    weight: torch.Tensor,
    center: float = 0.0,
) -> torch.Tensor:
    """Σ weight · BCE(σ(r_chosen − r_rejected − margin), target), all of shape (comparisons); a scalar.

    With soft targets that is RLAIF's loss (arXiv 2309.00267, §2.2.1): the cross-entropy of the softmax over the two scores
    with the label's distribution; the margin is Llama 2's (arXiv 2307.09288, eq. 2). Without `rejected` the score itself is
    the logit of being good. `center` weighs Σ weight · (r_chosen + r_rejected)² (Eisenstein et al., arXiv 2312.09244).
    """
    logits = (chosen if rejected is None else chosen - rejected) - margin
    loss = (weight * binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()
    if center and rejected is not None:
        loss = loss + center * (weight * (chosen + rejected) ** 2).sum()
    return loss


# ---------------------------------------------------------------- the trainer


class Trainer(RewardTrainer):  # type: ignore[misc]
    """TRL's reward trainer over groups."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenized already

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(Group.__dataclass_fields__)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        rewards = outputs.logits.float()
        chosen = rewards[inputs["chosen"], inputs["head"]]
        rejected = rewards[inputs["rejected"], inputs["head"]] if len(inputs["rejected"]) else None
        loss = reward_loss(
            chosen, rejected, inputs["target"], inputs["margin"], inputs["weight"], self.args.center_rewards_coefficient or 0.0
        )
        mode = "train" if self.model.training else "eval"
        with torch.no_grad():
            logits = chosen if rejected is None else chosen - rejected
            right = ((logits > 0) == (inputs["target"] > 0.5)).float()
            figures = {"accuracy": right, "margin": logits, "reward": rewards.mean(1)}
            for name, values in figures.items():
                self._metrics[mode][name].append(self.accelerator.gather_for_metrics(values.mean()).mean().item())
        return (loss, {"logits": rewards}) if return_outputs else loss


def trainer(part: Part) -> Trainer:
    config: Reward = part.config
    encode = data.encoder(part.tokenizer)
    binary = config.loss == "binary"

    def dataset(rows: Rows | None) -> Dataset | None:
        if rows is None:
            return None
        made = groups(rows.rows, encode, binary)
        return Dataset.from_list([{**vars(group), "length": max(map(len, group.ids))} for group in made])

    settings = part.settings(RewardConfig, center_rewards_coefficient=config.center or None, remove_unused_columns=False)
    torch.manual_seed(part.seed)  # the head begins at random
    heads = max(1, len(config.heads))
    model = AutoModelForSequenceClassification.from_pretrained(
        part.model, num_labels=heads, dtype=torch.float32, trust_remote_code=config.trust_remote_code
    )
    peft = part.peft
    if peft:
        peft.task_type, peft.modules_to_save = "SEQ_CLS", ["score"]
    pad = part.tokenizer.pad_token_id
    model.config.num_labels = 1  # TRL takes no other; the head keeps its width
    made = Trainer(
        model=model,
        args=settings,
        data_collator=lambda examples: collate(examples, pad),
        train_dataset=dataset(part.train),
        eval_dataset=dataset(part.held),
        processing_class=part.tokenizer,
        peft_config=peft,
    )
    model.config.num_labels = heads
    return made


# ---------------------------------------------------------------- afterwards


def finish(run: Run, out: Path) -> dict[str, Any]:
    """Write what a scorer has to know beside the model, and measure it on the rows that the last stage held out."""
    config: Reward = run.config
    train, held = next(reversed(run.rows.values()))
    members = sorted((path.name for path in out.iterdir() if path.is_dir()), key=lambda name: int(name.rpartition("-")[2]))
    facts = {
        "name": run.out.name,
        "heads": config.heads,
        "form": "conversational" if train.conversational else "plain",
        "max_length": config.max_length,
        "members": members,
        "combine": config.combine,
        "weights": weights_hash(out),
    }
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if held is None:
        return {}
    from rlaif.train.held_out import evaluate

    return evaluate(config, held, out, run.out)
