"""Supervised fine-tuning: on the tokens of completions, or of whole texts; or on the distribution that a context gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from rlaif.records import UsageError
from rlaif.train import data, distill
from rlaif.train.config import Sft
from rlaif.train.data import Rows, ready
from rlaif.train.record import lines
from rlaif.train.run import Part, Run, read_both


def read(config: Sft) -> tuple[Rows, Rows | None]:
    """Rows of a prompt and a completion, or of a text; for a context, those that fit into the model with it."""
    return read_both(config, partial(_read, config))


def _read(config: Sft, source: str, limit: int | None) -> Rows:
    if not data.is_documents(source):
        found = data.answers(source, config.form, limit, drop_bad=config.bad_rows == "drop")
        return distill.within(found, config) if config.context else found
    if config.completion_only:
        raise UsageError(f"{source}: column 'text' alone: there is no completion, so completion_only must be false")
    return data.documents(source, limit, config.bad_rows == "drop")


fitting = ready


def trainer(part: Part) -> Any:
    """TRL's trainer, or for a context ours. Rows held out are also evaluated before the first step and after the last."""
    made = _distiller(part) if part.config.context else _fine_tuner(part)
    if part.held:
        made.add_callback(EvaluateLast())
    return made


def _fine_tuner(part: Part) -> Any:
    def dataset(rows: Rows | None) -> Dataset | None:
        return rows and Dataset.from_list(rows.rows)

    return SFTTrainer(
        model=part.model,
        args=part.settings(
            SFTConfig,
            completion_only_loss=part.config.completion_only,
            packing=part.config.packing,
            eval_on_start=part.held is not None,
        ),
        train_dataset=dataset(part.train),
        eval_dataset=dataset(part.held),
        processing_class=part.tokenizer,
        peft_config=_adapters(part),
    )


def _distiller(part: Part) -> distill.Trainer:
    encode = distill.Encoder(distill.load_context(part.config.context), part.tokenizer)
    settings = part.settings(
        TrainingArguments, eval_on_start=part.held is not None, remove_unused_columns=False, label_names=["labels"]
    )

    def loaded() -> Any:
        remote = part.config.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(part.model, dtype=torch.float32, trust_remote_code=remote)

    model, adapters = loaded(), _adapters(part)
    if adapters:
        from peft import get_peft_model

        torch.manual_seed(part.seed)  # adapters begin at random
        model = get_peft_model(model, adapters)
        model.enable_input_require_grads()  # without which checkpointed layers would get no gradient
    pad = part.tokenizer.pad_token_id
    return distill.Trainer(
        model=model,
        ref_model=None if adapters else loaded(),
        args=settings,
        data_collator=lambda examples: distill.collate(examples, pad),
        train_dataset=[encode(row) for row in part.train.rows],
        eval_dataset=[encode(row) for row in part.held.rows] if part.held else None,
        processing_class=part.tokenizer,
    )


def _adapters(part: Part) -> Any:
    adapters = part.peft
    if adapters:
        adapters.task_type = "CAUSAL_LM"
    return adapters


class EvaluateLast(TrainerCallback):
    """Evaluates after the last step, whatever `eval_steps` is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def finish(run: Run, out: Path) -> dict[str, Any]:
    """The loss on the rows held out, before and after the last stage; `measure` says which loss. Without such rows: {}."""
    part = run.parts[-1]["name"]
    losses = [line["eval_loss"] for line in lines(run.out / "metrics.jsonl") if line["part"] == part and "eval_loss" in line]
    if not losses:
        return {}
    measure = "KL from the model with the context" if run.config.each_stage()[-1].context else "negative log-likelihood"
    return {"measure": f"{measure}, nats a token, held out", "before": losses[0], "after": losses[-1]}
