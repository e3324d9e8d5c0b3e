"""What a training run is told: a small YAML file for each kind of training, whose fields any `--set` can change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlaif.records import UsageError
from rlaif.yamlfile import YamlFile, in_words

WHOLE_RUN = {
    *("name", "description", "model", "out", "stages", "lora", "seed", "form", "max_length", "dtype", "device"),
    *("ensemble", "combine", "human", "report_to"),
}
"""Fields that a stage cannot change."""

SECRET = re.compile(r"(hub_|auth_|use_auth_)?token|.*(api_?key|secret|password)", re.IGNORECASE)
"""Names of what must not be written into a file."""

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

Labels = Literal["auto", "soft", "hard"]


class Lora(BaseModel):
    """Low-rank adapters (Hu et al., arXiv 2106.09685) in place of full fine-tuning.

    `targets`: names of the layers that get one, or all linear ones. `merge`: the model folder holds the merged model, which
    everything can load; else the adapter alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    merge: bool = True


class Training(YamlFile):
    """What all kinds of training share.

    `model`: a hub name, a folder, or `embedded`. `data`, `eval`: files as `rlaif pairs` and `rlaif build` write them; relative
    names are looked up beside the config file first. `eval_share`: of the prompts of `data`, in place of `eval`. `human`: the
    column of human labels in the labelled file that `data` was made from, for the model card to tell the labeler's agreement.
    `bad_rows`: rows that cannot be trained on (empty, identical …) stop the run before it begins, or are left out and counted.
    `out`: the run's folder. `batch_size`: rows a process takes at once; `accumulate`: batches a step. `max_length`: tokens of
    a prompt with its response; longer rows are left out, and counted. `form`: whether responses are plain texts or messages for
    the chat template; auto: as the data has them (whole dialogues: messages). `dtype`: bf16 (mixed precision, the weights in
    fp32) or fp32; auto: bf16 on GPUs. `save_steps`: steps between two checkpoints (auto: a tenth of the run), of which `keep`
    stay. `stages`: trained one after the other, each from the model that the last one made, with the fields that it names.
    `trainer`: further fields of TRL's config.
    """

    model: str = "embedded"
    data: Any = None
    eval: str | None = None
    eval_share: float = Field(default=0.0, ge=0, lt=1)
    human: str | None = None
    out: str
    limit: int | None = Field(default=None, ge=1)
    bad_rows: Literal["stop", "drop"] = "stop"
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    scheduler: str = "linear"
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    max_length: int = Field(default=1024, ge=8)
    form: Literal["auto", "plain", "conversational"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    log_steps: int = Field(default=10, ge=1)
    save_steps: int | None = Field(default=None, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=2)
    report_to: tuple[str, ...] = ()
    trust_remote_code: bool = False
    stages: tuple[dict[str, Any], ...] = ()
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("data")
    @classmethod
    def _source(cls, data: Any) -> Any:
        if data is None or isinstance(data, str):
            return data
        raise ValueError("expected a file's name")

    @field_validator("stages")
    @classmethod
    def _stage_fields(cls, stages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, stage in enumerate(stages, 1):
            for name in stage:
                if name not in cls.model_fields:
                    raise ValueError(f"stage {number}: no field '{name}'")
                if name in WHOLE_RUN:
                    raise ValueError(f"stage {number}: '{name}' belongs to the whole run")
        return stages

    @field_validator("trainer")
    @classmethod
    def _numbers(cls, trainer: dict[str, Any]) -> dict[str, Any]:
        """YAML takes 1e-8 for a text, and TRL's configs do not say what they expect. Secrets would be kept with the run."""
        inside = [name for value in trainer.values() if isinstance(value, dict) for name in value]
        if secret := next((name for name in [*trainer, *inside] if SECRET.fullmatch(str(name))), None):
            raise ValueError(f"{secret}: keys come from the environment alone")
        return {name: float(value) if EXPONENT.fullmatch(str(value)) else value for name, value in trainer.items()}

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if self.eval and self.eval_share:
            raise ValueError("eval and eval_share: one of them")
        if self.stages and self.lora and not self.lora.merge:
            raise ValueError("lora.merge: a stage begins from a whole model, which the adapters of the last are merged into")
        for number, stage in enumerate(self.stages or ({},), 1):
            if not stage.get("data", self.data):
                raise ValueError(f"stage {number} has no data" if self.stages else "data: Field required")
        return self

    def changed(self, **given: Any) -> Self:
        """The same with other settings. Raises: UsageError for one that is wrong."""
        settings = {**self.model_dump(), **given}
        try:
            return type(self).model_validate(settings)
        except ValidationError as error:
            raise UsageError(f"{self.name}: {in_words(error, settings)}") from error

    @property
    def files(self) -> tuple[str, ...]:
        """What is trained on: `data`, or each head's."""
        return tuple(self.data.values()) if isinstance(self.data, dict) else (self.data,)

    def each_stage(self) -> list[Self]:
        """The settings of each stage; of a run without stages, itself."""
        return [self.changed(**stage, stages=()) for stage in self.stages] or [self]


class Sft(Training):
    """Supervised fine-tuning on `prompt` and `completion` rows, or `messages`, of which the last answer is learnt; or `text`.

    `completion_only`: the loss is on the completion's tokens; false: on all, as for rows of `text` it must be. `packing`:
    several examples in one sequence, none of which sees another.

    `context`: learn, instead of the completions' own tokens, the distribution over them that the model itself has where this
    context stands before the prompt (context distillation, Askell et al., arXiv 2112.00861, §2.1). It is one of

    - a text file: the system turn of messages (before the prompt's own; where the chat template has none, it begins the
      first user turn), or with a blank line before a plain prompt;
    - a YAML file of questions with answers, as prompts/answers/urial.yaml: turns before those of the prompt. Before a plain
      prompt the template `urial` shows them;
    - a template of the kind `sample`, by its name (`urial`) or path, in which the prompt is put as by `rlaif sample --icl`.

    Where a template shows the context, its answers end in its own way, and the end of an answer is not learnt. Rows that with
    the context are longer than the model can take are left out, and counted.
    """

    learning_rate: float = Field(default=2e-5, gt=0)
    completion_only: bool = True
    packing: bool = False
    context: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.context and (self.packing or not self.completion_only):
            raise ValueError("context: goes with completion_only and without packing")
        return self


class Reward(Training):
    """A reward model: a score for a response, learnt from comparisons.

    `loss`: `pairwise` (cross-entropy of σ(r_chosen − r_rejected) with the label), `ranking` (all pairs of a group in one
    batch, weighted 1/(K choose 2): InstructGPT, arXiv 2203.02155, §3.5), `binary` (each response good or bad by itself:
    Askell et al., arXiv 2112.00861, §4); auto: ranking where the data has a column `group`, else pairwise. `labels`: the
    column `soft_label`, or 1 for every chosen response; auto: soft where there is such a column. `margin`: a column that must
    separate the two scores (Llama 2, arXiv 2307.09288, §3.2.2); `margin_values` gives numbers to its words. `center`: the
    weight of (r_chosen + r_rejected)², which keeps rewards around 0 (Eisenstein et al., arXiv 2312.09244). `data` may give a
    file for each of several heads, {helpful: FILE, safe: FILE}, as `eval` then does. `ensemble`: that many models with other
    seeds, whose scores are combined by their mean or, in the worst case, the least (Coste et al., arXiv 2310.02743).
    """

    eval: Any = None
    loss: Literal["auto", "pairwise", "ranking", "binary"] = "auto"
    labels: Labels = "auto"
    margin: str | None = None
    margin_values: dict[str, float] = Field(default_factory=dict)
    center: float = Field(default=0.0, ge=0)
    ensemble: int = Field(default=1, ge=1)
    combine: Literal["mean", "worst"] = "mean"

    @field_validator("data", "eval")
    @classmethod
    def _source(cls, data: Any) -> Any:
        if data is None or isinstance(data, str) or (isinstance(data, dict) and data):
            return data
        raise ValueError("a file, or a file for each head, as {helpful: a.jsonl, safe: b.jsonl}")

    @model_validator(mode="after")
    def _same_heads(self) -> Self:
        sources = [stage.get("data", self.data) for stage in self.stages or ({},)]
        heads = {tuple(source) if isinstance(source, dict) else () for source in sources}
        if len(heads) > 1:
            raise ValueError("stages: the heads must be the same in all of them")
        if self.eval and {tuple(self.eval) if isinstance(self.eval, dict) else ()} != heads:
            raise ValueError("eval: a file for each head of data" if heads != {()} else "eval: one file, as data")
        if self.loss == "binary" and self.margin:
            raise ValueError("margin: does not go with loss binary")
        if self.margin_values and not self.margin:
            raise ValueError("margin_values: goes with margin")
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads; empty for one without a name."""
        last = self.each_stage()[-1].data
        return tuple(last) if isinstance(last, dict) else ()


DPO_LOSSES = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "ipo": "ipo",
    "hinge": "hinge",
    "slic": "hinge",
    "robust": "robust",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
}
CPO_LOSSES = {"cpo": "sigmoid", "cpo_hinge": "hinge", "cpo_ipo": "ipo", "simpo": "simpo", "alphapo": "alphapo"}
KTO_LOSSES = {"kto": "kto", "apo_zero_unpaired": "apo_zero_unpaired"}
LOSSES = (*DPO_LOSSES, *CPO_LOSSES, "orpo", *KTO_LOSSES, "auto")
SOFT = frozenset({"dpo", "dpo_norm", "cpo", "simpo", "orpo"})
"""Losses that are logistic in one difference of log-probabilities, and so have a form for soft labels."""


class Preference(Training):
    """Preference optimization without a reward model.

    `loss`: one of `LOSSES`, or several of the DPO family with their weights, {dpo: 1.0, sft: 0.1}. `auto`: apo_zero where the
    chosen responses are better than the model's own by the verdicts of the labeler `judge` on `probe` prompts, else apo_down
    (D'Oosterlinck et al., arXiv 2408.06266, §4). `labels`: as for reward models; only the losses in `SOFT` have a soft
    form, conservative DPO per row (Mitchell 2023): −p·log σ(x) − (1−p)·log σ(−x). `reference`: the model that the policy is
    held to (default: what it starts from; in each stage anew, as in sDPO, Kim et al., arXiv 2403.19270). `precompute`: the
    reference's log-probabilities, once before training. The others belong to single losses, as TRL has them: `gamma` to
    simpo and alphapo, `alpha` to alphapo, `label_smoothing` to robust, exo, aot and those of CPO, the weights to kto. None:
    TRL's default, but 0.001 for exo; alphapo needs an alpha and robust a label_smoothing, for at TRL's default of 0 they
    would be simpo and dpo.
    """

    learning_rate: float = Field(default=5e-6, gt=0)
    loss: str | dict[str, float] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    labels: Labels = "auto"
    reference: str | None = None
    precompute: bool = False
    judge: str | None = None
    probe: int = Field(default=64, ge=2)
    gamma: float | None = None
    alpha: float | None = None
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    desirable_weight: float | None = Field(default=None, gt=0)
    undesirable_weight: float | None = Field(default=None, gt=0)

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: str | dict[str, float]) -> str | dict[str, float]:
        for name in [loss] if isinstance(loss, str) else loss:
            allowed: Sequence[str] = LOSSES if isinstance(loss, str) else tuple(DPO_LOSSES)
            if name not in allowed:
                raise ValueError(f"unknown loss '{name}': choose one of {', '.join(allowed)}")
        if not loss:
            raise ValueError("no loss")
        return loss

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        family = self.family
        belongs = {
            "gamma": ("simpo", "alphapo"),
            "alpha": ("alphapo",),
            "label_smoothing": ("robust", "exo", "aot", "aot_unpaired", "cpo", "simpo", "alphapo"),
            "desirable_weight": tuple(KTO_LOSSES),
            "undesirable_weight": tuple(KTO_LOSSES),
        }
        for field, losses in belongs.items():
            if getattr(self, field) is not None and not set(self.losses) & set(losses):
                raise ValueError(f"{field}: goes with {', '.join(losses)}")
        if "alphapo" in self.losses and not self.alpha:
            raise ValueError("alpha: alphapo needs one other than 0, which would make it simpo")
        if "robust" in self.losses and not self.label_smoothing:
            raise ValueError("label_smoothing: robust needs the share of labels that are wrong; 0 would make it dpo")
        if "exo" in self.losses and self.label_smoothing == 0:
            raise ValueError("label_smoothing: exo needs one above 0")
        if "kto" in self.losses and self.batch_size < 2:
            raise ValueError("batch_size: kto estimates a divergence from the other rows of a batch: at least 2")
        if self.lora and self.lora.dropout and self.trainer.get("disable_dropout", True):
            raise ValueError("lora.dropout: these losses are computed without dropout, unless trainer.disable_dropout is false")
        if family in ("cpo", "orpo") and (self.reference or self.precompute):
            raise ValueError(f"reference, precompute: {self.loss} has no reference model")
        if (self.loss == "auto") != (self.judge is not None):
            raise ValueError("judge: goes with loss auto, which needs one")
        if self.labels == "soft" and not set(self.losses) & SOFT:
            raise ValueError(f"labels: {self.loss} has no form for soft labels; {', '.join(sorted(SOFT))} have")
        return self

    @property
    def losses(self) -> dict[str, float]:
        """Each loss with its weight."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

    @property
    def family(self) -> Literal["dpo", "cpo", "orpo", "kto", "auto"]:
        """Which trainer carries the loss."""
        first = next(iter(self.losses))
        if first in CPO_LOSSES:
            return "cpo"
        if first in KTO_LOSSES:
            return "kto"
        return first if first in ("orpo", "auto") else "dpo"  # type: ignore[return-value]


class Kto(Preference):
    """KTO on `prompt`, `completion`, `label` rows (Ethayarajh et al., arXiv 2402.01306), or on pairs, taken apart."""

    loss: str | dict[str, float] = "kto"

    @model_validator(mode="after")
    def _is_kto(self) -> Self:
        if self.family != "kto":
            raise ValueError(f"loss: one of {', '.join(KTO_LOSSES)}; for others: rlaif train dpo")
        return self


class Gpo(Training):
    """A few-shot group preference module on `group`, `prompt`, `response`, `score` rows (GPO, Zhao et al., arXiv 2310.11523).

    `model` embeds the texts and stays as it is; `dtype` is that of its weights. `eval` holds rows of other groups, or
    `eval_share` of the groups are held out. A step draws `batch_size` groups, of each up to `shots` examples whose scores are
    shown and up to `targets` others to predict; `max_steps` null: `epochs` passes over the groups. `layers`, `width`, `heads`:
    of the module, a transformer. `eval_draws`: draws of `shots` examples of each held-out group to measure with.
    """

    max_steps: int | None = Field(default=2000, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    scheduler: str = "cosine"
    batch_size: int = Field(default=16, ge=1)
    log_steps: int = Field(default=50, ge=1)
    shots: int = Field(default=16, ge=1)
    targets: int = Field(default=32, ge=1)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=128, ge=2)
    heads: int = Field(default=4, ge=1)
    eval_draws: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("lora", "stages", "trainer", "report_to", "gradient_checkpointing"):
            if getattr(self, name):
                raise ValueError(f"{name}: has no part in gpo, which leaves the language model as it is")
        if self.accumulate > 1:
            raise ValueError("accumulate: has no part in gpo; batch_size is the groups of a step")
        if self.width % self.heads:
            raise ValueError("heads: must divide width")
        return self
