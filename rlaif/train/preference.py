"""Preference optimization with TRL's trainers (DPO, CPO, ORPO, KTO), which learn soft labels of single rows here too.

A soft label p, the probability that `chosen` is better, makes of a logistic loss −log σ(x) conservative DPO row by row
(Mitchell 2023): −p·log σ(x) − (1 − p)·log σ(−x), which is the loss that is to be expected where the label is drawn from p.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from rlaif.labeler import load_labeler
from rlaif.records import Row, UsageError
from rlaif.train import data
from rlaif.train.choose import choose, decided
from rlaif.train.config import CPO_LOSSES, DPO_LOSSES, KTO_LOSSES, SOFT, Preference
from rlaif.train.data import Rows, ready
from rlaif.train.run import Part, Run, load_tokenizer, model_path, read_both

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they are experimental
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

NOT_SOFT = ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting")
"""Fields of TRL's DPO config that change the loss in a way that its soft form does not know."""

UNCUT = 1 << 30
"""Rows were measured before; the trainers that add an EOS token of their own must not cut it off again."""


# ---------------------------------------------------------------- rows


def read(config: Preference) -> tuple[Rows, Rows | None]:
    """Pairs, with soft labels where there are such; for KTO single responses, into which pairs are taken apart."""
    if config.judge:
        load_labeler(config.judge).pairwise()
    train, held = read_both(config, partial(_read, config))
    if config.family == "kto":
        data.check_classes(train)  # again: what is held out may have taken all of one
    return train, held


def _read(config: Preference, source: str, limit: int | None) -> Rows:
    drop = config.bad_rows == "drop"
    if config.family == "kto" and data.is_unpaired(source):
        return data.answers(source, config.form, limit, labelled=True, drop_bad=drop)
    found = data.pairs(source, config.form, limit, () if config.labels == "hard" else ("soft_label",), drop)
    first = found.rows[0]
    if config.labels == "soft" and "soft_label" not in first:
        raise UsageError(f"{source}: no column 'soft_label'; there are: {', '.join(first)}")
    if is_soft(config, first):
        if all(row["soft_label"] == 0.5 for row in found.rows):
            raise UsageError(f"{source}: column 'soft_label': every row is a tie; there is nothing to learn")
        for name in NOT_SOFT:
            if name in config.trainer:
                raise UsageError(f"trainer.{name}: does not go with soft labels; labels: hard leaves them out")
    if config.family == "kto":
        return Rows(source, [single for row in found.rows for single in _apart(row)], found.dropped)
    return found


def _apart(row: Row) -> list[Row]:
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return [{**rest, "completion": row["chosen"], "label": True}, {**rest, "completion": row["rejected"], "label": False}]


def is_soft(config: Preference, row: Row) -> bool:
    """Whether soft labels count."""
    return config.labels != "hard" and "soft_label" in row and bool(set(config.losses) & SOFT)


fitting = ready


# ---------------------------------------------------------------- soft losses


def softening(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What the mean of −log σ(x) lacks of the mean of −p·log σ(x) − (1 − p)·log σ(−x), both of shape (rows): a scalar.

    For −log σ(−x) = x − log σ(x). It is exactly 0 where p is 1.
    """
    return ((1 - p) * x).mean()


def expected(p: torch.Tensor, given: torch.Tensor, swapped: torch.Tensor) -> torch.Tensor:
    """The expected loss where the label is right with probability p, from the losses of a pair as given and swapped: (rows)."""
    return p * given + (1 - p) * swapped


class SoftDPO(DPOTrainer):  # type: ignore[misc]
    """DPO in which the logistic losses, `sigmoid` and `sigmoid_norm`, take the column `soft_label`; others stay as they are.

    TRL computes its own loss, with the reference's log-probabilities as though they had been computed before, while the
    policy's are kept; what the soft labels add follows from the two.
    """

    precompute_ref_logps: bool

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator: Any = _with_labels(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "soft_label" not in self._signature_columns:
            self._signature_columns.append("soft_label")

    def _compute_loss(self, model: Any, inputs: Mapping[str, torch.Tensor], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        p = inputs.pop("soft_label")
        if "ref_chosen_logps" not in inputs:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference
        kept = []

        def keeping(**given: Any) -> Any:
            kept.append(model(**given))
            return kept[-1]

        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            found = super()._compute_loss(keeping, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        added = self._added(kept[0].log_probs.sum(dim=1) - reference, inputs["completion_mask"].sum(dim=1), p)
        return (found[0] + added, found[1]) if return_outputs else found + added

    def _added(self, ratios: torch.Tensor, lengths: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """What the soft labels add to the loss; log-ratios and token counts of shape (2 · rows), chosen responses first."""
        margin = {"sigmoid": _margin(ratios), "sigmoid_norm": _margin(ratios / lengths.clamp(min=1))}
        mode = "train" if self.model.training else "eval"
        right = expected(p, (margin["sigmoid"] > 0).float(), (margin["sigmoid"] < 0).float())
        self._metrics[mode]["rewards/soft_accuracies"].append(self.accelerator.gather(right.detach()).mean().item())
        weights = zip(self.loss_types, self.loss_weights, strict=True)
        return torch.stack(
            [weight * softening(self.beta * margin[name], p) for name, weight in weights if name in margin]
        ).sum()


def _margin(values: torch.Tensor) -> torch.Tensor:
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def _with_labels(collate: Callable[[list[Row]], dict[str, Any]]) -> Callable[[list[Row]], dict[str, Any]]:
    def collated(examples: list[Row]) -> dict[str, Any]:
        return {**collate(examples), "soft_label": torch.tensor([example["soft_label"] for example in examples])}

    return collated


class _Soft:
    """Keeps a batch's soft labels for its loss."""

    def get_batch_loss_metrics(self, model: Any, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.p = torch.tensor(batch["soft_label"], device=self.accelerator.device)  # type: ignore[attr-defined]
        return super().get_batch_loss_metrics(model, batch, *args, **kwargs)  # type: ignore[misc]


class SoftCPO(_Soft, CPOTrainer):  # type: ignore[misc]
    """CPO and SimPO on soft labels. What CPO adds for the chosen response's own likelihood stays as it is.

    SimPO's margin γ is asked for in either order: −p·log σ(βΔ − γ) − (1 − p)·log σ(−βΔ − γ).
    """

    def cpo_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses, *rewards = super().cpo_loss(chosen, rejected)
        return (expected(self.p, losses, super().cpo_loss(rejected, chosen)[0]), *rewards)


class SoftORPO(_Soft, ORPOTrainer):  # type: ignore[misc]
    """ORPO on soft labels. Its losses here are β·log σ(log odds ratio): TRL subtracts them from the chosen response's own."""

    def odds_ratio_loss(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses, *figures = super().odds_ratio_loss(chosen, rejected)
        return (expected(self.p, losses, super().odds_ratio_loss(rejected, chosen)[0]), *figures)


# ---------------------------------------------------------------- trainers


def trainer(part: Part) -> Any:
    """TRL's trainer for the loss; for `auto`, that which was measured to fit."""
    if part.config.family == "auto":
        part = replace(part, config=part.config.changed(loss=choose(part)["loss"], judge=None))
    made: dict[str, Callable[[Part], Any]] = {"dpo": _dpo, "cpo": _cpo, "orpo": _orpo, "kto": _kto}
    return made[part.config.family](part)


def _dpo(part: Part) -> Any:
    config: Preference = part.config
    smoothing = 1e-3 if "exo" in config.losses and config.label_smoothing is None else config.label_smoothing
    settings = _settings(
        part,
        DPOConfig,
        loss_type=[DPO_LOSSES[name] for name in config.losses],
        loss_weights=list(config.losses.values()),
        label_smoothing=smoothing,
        precompute_ref_log_probs=config.precompute,
    )
    kind = SoftDPO if is_soft(config, part.train.rows[0]) else DPOTrainer
    return kind(part.model, _reference(part), settings, **_common(part))


def _cpo(part: Part) -> Any:
    config: Preference = part.config
    loss = CPO_LOSSES[next(iter(config.losses))]
    settings = _settings(
        part,
        CPOConfig,
        loss_type=loss,
        simpo_gamma=config.gamma,
        alpha=config.alpha,
        label_smoothing=config.label_smoothing,
        # With it, TRL's default, the loss would be another one: CPO-SimPO.
        **({"cpo_alpha": 0.0} if loss == "simpo" and "cpo_alpha" not in config.trainer else {}),
        max_length=UNCUT,
        remove_unused_columns=False,
    )
    kind = SoftCPO if is_soft(config, part.train.rows[0]) else CPOTrainer
    return kind(_model(part.model, config), settings, **_common(part))


def _orpo(part: Part) -> Any:
    settings = _settings(part, ORPOConfig, max_length=UNCUT, remove_unused_columns=False)
    kind = SoftORPO if is_soft(part.config, part.train.rows[0]) else ORPOTrainer
    return kind(_model(part.model, part.config), settings, **_common(part))


def _kto(part: Part) -> Any:
    """KTO takes rows in their order, and estimates a divergence from responses beside other prompts: so they are shuffled."""
    config: Preference = part.config
    settings = _settings(
        part,
        KTOConfig,
        loss_type=KTO_LOSSES[next(iter(config.losses))],
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        precompute_ref_log_probs=config.precompute,
    )
    part = replace(part, train=_shuffled(part.train, part.seed), held=part.held and _shuffled(part.held, part.seed))
    return KTOTrainer(part.model, _reference(part), settings, **_common(part))


def _shuffled(rows: Rows, seed: int) -> Rows:
    return replace(rows, rows=random.Random(seed).sample(rows.rows, len(rows.rows)))


def _settings(part: Part, kind: type[Any], **own: Any) -> Any:
    """TRL's config; what is held out is measured once an epoch, unless told otherwise."""
    if part.held and not part.config.eval_steps:
        own["eval_strategy"] = "epoch"
    return part.settings(kind, beta=part.config.beta, **own)


def _common(part: Part) -> dict[str, Any]:
    return {
        "train_dataset": _dataset(part, part.train),
        "eval_dataset": part.held and _dataset(part, part.held),
        "processing_class": part.tokenizer,
        "peft_config": part.peft,
    }


def _dataset(part: Part, rows: Rows) -> Dataset:
    first = rows.rows[0]
    left_out = set() if is_soft(part.config, first) else {"soft_label"}
    kept = [{name: value for name, value in row.items() if name not in left_out} for row in rows.rows]
    if not part.config.precompute:
        return Dataset.from_list(kept)
    # Log-probabilities that one process has computed reach the others through a file beside the rows' own.
    return Dataset.from_generator(_each, gen_kwargs={"rows": kept}, cache_dir=str(part.folder / "rows"))


def _each(rows: list[Row]) -> Iterator[Row]:
    yield from rows


def _model(name: str, config: Preference) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=config.trust_remote_code)


def _reference(part: Part) -> Any:
    """The model of `reference`; None lets TRL take the one that the policy begins from.

    Raises: UsageError where it has another vocabulary.
    """
    config: Preference = part.config
    if config.reference is None:
        return None
    tokenizer = load_tokenizer(config.changed(model=config.reference, reference=None))
    if tokenizer.get_vocab() != part.tokenizer.get_vocab():
        raise UsageError(f"reference: {config.reference} has another vocabulary than {config.model}")
    return _model(model_path(config.reference), config)


# ---------------------------------------------------------------- afterwards


def finish(run: Run, out: Path) -> dict[str, Any]:
    """What each stage's loss was, and which labels it learnt; what TRL measured on held-out rows is among the metrics.

    `losses`, by stage: `part`, `loss` (each with its weight), `labels` (soft, hard), `note` where soft labels were left
    aside, `auto` how the loss was chosen.
    """
    stages = zip(run.config.each_stage(), run.rows.values(), run.parts, strict=True)
    return {"losses": [_facts(config, rows, part["name"]) for config, (rows, _), part in stages]}


def _facts(config: Preference, rows: Rows, part: str) -> dict[str, Any]:
    decision = decided(config, part) if config.family == "auto" else None
    losses = {decision["loss"]: 1.0} if decision else config.losses
    soft = is_soft(config, rows.rows[0])
    facts: dict[str, Any] = {"part": part, "loss": losses, "labels": "soft" if soft else "hard"}
    hard = [name for name in losses if name not in SOFT and name != "sft"]
    if "soft_label" in rows.rows[0] and hard:
        facts["note"] = f"soft labels were left aside for {', '.join(hard)}, which has no form for them"
    return facts | ({"auto": decision} if decision else {})
