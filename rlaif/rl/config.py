"""What a run of reinforcement learning is told: where rewards come from, how responses are drawn, and what is optimised."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rlaif.train.config import Training


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------- rewards


class _Term(_Part):
    """`name` is what the metrics call it: its kind, unless told otherwise. `weight`: its share in the sum."""

    name: str = ""
    weight: float = Field(default=1.0, allow_inf_nan=False)

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in ("std", "spread"):
            raise ValueError(f"'{name}' is what a figure of all terms together is called")
        return name


class ModelReward(_Term):
    """A reward model's score (distilled RLAIF, arXiv 2309.00267, §2.2.1). `model`: a folder of `rlaif train reward`."""

    kind: Literal["model"]
    model: str
    head: str = "mean"


class Rating(_Term):
    """Direct RLAIF (arXiv 2309.00267, §2.2.2): a labeler's expected rating, scaled to [−1, 1]."""

    kind: Literal["rating"]
    labeler: str


class Verdict(_Term):
    """A labeler's P(the response is better than another one) − ½, doubled: in [−1, 1].

    `against`: the column of the data that holds the other response; `responses`, as `rlaif sample` writes it, will do.
    """

    kind: Literal["pairwise"]
    labeler: str
    against: str


class Length(_Term):
    """−1 for each `most` words that a response has more than `most`, and likewise for `least` words less than `least`."""

    kind: Literal["length"]
    most: int | None = Field(default=None, ge=1)
    least: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.most is None and self.least is None:
            raise ValueError("most, least: at least one of them")
        if self.most and self.least and self.most < self.least:
            raise ValueError("most: must not be below least")
        return self


class Format(_Term):
    """0 for a response with a match of the regular expression `pattern`, −1 for others; `forbidden`: the other way round."""

    kind: Literal["format"]
    pattern: str
    forbidden: bool = False


class Function(_Term):
    """A Python function of prompts and responses, as `file.py:name` or `package.module:name`: see `rlaif.rl.rewards`."""

    kind: Literal["function"]
    function: str


class Ensemble(_Term):
    """Several rewards for one (Coste et al., arXiv 2310.02743): their `mean`, the `worst`, or mean − `penalty`·variance.

    The spread of its members is a measure of over-optimisation that the run writes down.
    """

    kind: Literal["ensemble"]
    of: tuple[Term, ...] = Field(min_length=2)
    combine: Literal["mean", "worst", "uncertainty"] = "mean"
    penalty: float = Field(default=1.0, ge=0)


class Gate(_Term):
    """One of two rewards for each response, as Llama 2 chooses (arXiv 2307.09288, §3.2.3): `safety` where the prompt is tagged
    as one about safety or σ(safety) < `below`, else `helpful`. Both are taken for logits, as reward models' scores are.

    `tagged`: the column of the data that is true for such prompts. `helpful` is asked only where it counts; where the one that
    counts fails, or `safety` does and so does not tell which one counts, there is no reward.
    """

    kind: Literal["gate"]
    safety: Term
    helpful: Term
    below: float = Field(default=0.15, ge=0, lt=1)
    tagged: str | None = None


Term = Annotated[
    ModelReward | Rating | Verdict | Length | Format | Function | Ensemble | Gate,
    Field(discriminator="kind"),
]
Ensemble.model_rebuild()
Gate.model_rebuild()


# ---------------------------------------------------------------- what every kind shares


class StopWhen(_Part):
    """Signs of over-optimisation that end a run, with its model saved; each is off unless set.

    `kl`: nats a response, of the policy from the reference, above which it stops. `length`: the factor by which the mean
    length, of the last 5 steps, may leave that of the first 5. `held_out`: so many evaluations in a row in which the
    held-out reward fell while the reward rose.
    """

    kl: float | None = Field(default=None, gt=0)
    length: float | None = Field(default=None, gt=1)
    held_out: int | None = Field(default=None, ge=1)


class Rollouts(Training):
    """What PPO and online preference learning share. `data` holds prompts; other columns are there for rewards to read.

    `rollouts`: responses a step, over all processes. `generate_batch`: responses that are generated at once, and go to the
    judge together while the next ones are generated. `max_new_tokens`: tokens of a response. `temperature`: of the policy,
    in sampling and learning alike. `generator`: transformers, or vLLM with the weights synchronised each step.
    `ahead`: steps by which generation runs ahead of learning: 0, on policy; 1, the next responses are generated while these
    are judged, by a policy that is one update older.
    `reference`: the model that the policy is held to (default: what it starts from); every `reference_steps` steps it moves
    by the share `reference_update` towards the policy. `judge_tries`, `judge_timeout`: calls of a judge, seconds of each.
    `held_out`: rewards by a second judge, on the prompts of `eval` or `eval_share`, every `eval_steps` steps.
    `sample_steps`: steps between two tables of samples, each of `samples_shown` responses.
    """

    learning_rate: float = Field(default=1e-5, gt=0)
    scheduler: str = "constant"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    log_steps: int = Field(default=1, ge=1)
    rollouts: int = Field(default=64, ge=1)
    generate_batch: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    generator: Literal["transformers", "vllm"] = "transformers"
    ahead: Literal[0, 1] = 0
    beta: float = Field(default=0.05, ge=0)
    reference: str | None = None
    reference_update: float | None = Field(default=None, gt=0, le=1)
    reference_steps: int = Field(default=1, ge=1)
    judge_tries: int = Field(default=6, ge=1)
    judge_timeout: float | None = Field(default=120.0, gt=0)
    max_cost: float | None = Field(default=None, gt=0)
    held_out: tuple[Term, ...] = ()
    sample_steps: int = Field(default=10, ge=1)
    samples_shown: int = Field(default=4, ge=1)
    stop_when: StopWhen = StopWhen()

    @field_validator("stages")
    @classmethod
    def _no_stages(cls, stages: tuple[Any, ...]) -> tuple[Any, ...]:
        if stages:
            raise ValueError("reinforcement learning has none: begin another run from the model")
        return stages

    @model_validator(mode="after")
    def _rollouts_fit(self) -> Self:
        if self.max_new_tokens >= self.max_length:
            raise ValueError("max_new_tokens: max_length holds the prompt too")
        if self.held_out and not (self.eval or self.eval_share):
            raise ValueError("held_out: needs prompts that are not trained on: eval or eval_share")
        if self.stop_when.held_out and not self.held_out:
            raise ValueError("stop_when held_out: needs a second judge, held_out")
        if self.reference and self.reference_update and self.lora:
            raise ValueError("reference: with LoRA, a reference that moves is the model that the policy begins from")
        if self.lora and self.lora.dropout:
            raise ValueError("lora.dropout: policies are optimised without dropout")
        return self


class Ptx(_Part):
    """Pretraining mix (PPO-ptx, arXiv 2203.02155, §3.5): `coefficient` times the log-likelihood of rows of `data` is added.

    `data`: `text` rows, or `prompt` and `completion`, of which the completion counts. `batch_size`: rows a step's minibatch.
    """

    data: str
    coefficient: float = Field(default=27.8, gt=0)
    batch_size: int = Field(default=8, ge=1)


class Ppo(Rollouts):
    """Reinforcement learning against `reward`, a list of terms that are added up; a sample one of them fails on is left out.

    `algorithm`: `ppo` (Schulman et al., arXiv 1707.06347); `reinforce` with a learned value baseline, as in the RLAIF paper;
    `rloo`, `grpo`, by TRL's trainers; `p3o`, pairwise PPO (Wu et al., arXiv 2310.00212), which learns from the difference of
    two responses to a prompt; `trpo`, a natural-gradient step within a trust region, for small models.

    `samples`: responses to a prompt (unset: 1; for p3o 2; for rloo and grpo 4). `updates`: passes over a step's responses, in
    minibatches of `batch_size` × `accumulate` × processes. `surrogate`: `clip` the ratio at 1 ± `clip`, or `penalty`, a
    coefficient on the KL from the policy that sampled, which is halved or doubled to keep to `step_kl` nats a token (the
    same paper, §4); `step_kl` is also TRPO's bound. `value`: a network of its own (with LoRA: adapters of its own on the
    same weights), or a head `shared` with the policy; `value_from`: a reward model's folder to begin it from.
    `value_clip`: as far as a value may move from the old one; `value_weight`: of its loss.
    `gamma`, `lam`: of generalised advantage estimation (arXiv 1506.02438). `beta`: KL penalty, per token, by the estimator
    `kl` (k1, k2, k3: Schulman 2020); `kl_control`: `fixed`, or `adaptive` to `kl_target` nats a response over a horizon of
    `kl_horizon` responses (Ziegler et al., arXiv 1909.08593, §2.2). `entropy`: bonus. `reward_clip`: rewards beyond ± that
    are cut. `whiten_rewards`, `whiten_advantages`: to variance 1, rewards keeping their mean. `missing_eos_penalty`: taken
    off a response that was cut before its end.
    """

    algorithm: Literal["ppo", "reinforce", "rloo", "grpo", "p3o", "trpo"] = "ppo"
    reward: tuple[Term, ...] = Field(min_length=1)
    samples: int | None = Field(default=None, ge=1)
    updates: int = Field(default=4, ge=1)
    surrogate: Literal["clip", "penalty"] = "clip"
    clip: float = Field(default=0.2, gt=0, lt=1)
    step_kl: float = Field(default=0.01, gt=0)
    value: Literal["separate", "shared"] = "separate"
    value_from: str | None = None
    value_clip: float | None = Field(default=0.2, gt=0)
    value_weight: float = Field(default=0.5, ge=0)
    value_learning_rate: float | None = Field(default=None, gt=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    kl: Literal["k1", "k2", "k3"] = "k1"
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = Field(default=6.0, gt=0)
    kl_horizon: int = Field(default=10_000, ge=1)
    entropy: float = Field(default=0.0, ge=0)
    reward_clip: float | None = Field(default=None, gt=0)
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    ptx: Ptx | None = None

    @property
    def a_prompt(self) -> int:
        """Responses to a prompt."""
        return self.samples or {"p3o": 2, "rloo": 4, "grpo": 4}.get(self.algorithm, 1)

    @property
    def through_trl(self) -> bool:
        return self.algorithm in ("rloo", "grpo")

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if self.trainer and not self.through_trl:
            raise ValueError("trainer: goes with rloo and grpo, which are TRL's")
        if self.rollouts % self.a_prompt:
            raise ValueError(f"rollouts: {self.rollouts} responses are not {self.a_prompt} to each prompt")
        if self.algorithm == "p3o" and self.a_prompt % 2:
            raise ValueError("samples: p3o compares them two by two")
        if self.through_trl and self.a_prompt < 2:
            raise ValueError(f"samples: {self.algorithm} compares several responses to a prompt")
        if self.algorithm in ("reinforce", "trpo") and "updates" in self.model_fields_set and self.updates != 1:
            raise ValueError(f"updates: {self.algorithm} takes one")
        if self.algorithm != "ppo" and self.surrogate != "clip":
            raise ValueError("surrogate: goes with ppo")
        if self.value_from and self.value == "shared":
            raise ValueError("value_from: a head that is shared with the policy begins from the policy")
        if self.algorithm == "trpo" and self.value == "shared":
            raise ValueError("value: trpo steps the policy alone: separate")
        if self.algorithm == "trpo" and (self.ptx or self.entropy):
            raise ValueError("ptx, entropy: trpo has no place for them")
        return self

    @property
    def smoothing(self) -> float:
        """λ; unless told otherwise, REINFORCE takes whole returns."""
        return 1.0 if self.algorithm == "reinforce" and "lam" not in self.model_fields_set else self.lam

    @property
    def passes(self) -> int:
        """Passes over a step's responses."""
        return 1 if self.algorithm in ("reinforce", "trpo") else self.updates


class Online(Rollouts):
    """Online preference learning: two responses to each prompt are drawn, judged, and learnt from.

    `judge`: a labeler that compares, or `reward`: terms whose difference is the verdict, P(first better) = σ(r₁ − r₂).
    `loss`: online dpo, ipo, hinge, apo_zero, apo_down (Guo et al., arXiv 2402.04792); soft verdicts count as such for dpo and
    ipo. `mixture`: the share of the reference in the distribution that is sampled from, geometric, per token: with loss ipo
    that is IPO-MD (Calandriello et al., arXiv 2403.08635), where both responses come from it; with `nash_md` (Munos et al.,
    arXiv 2312.00886) the rival alone does. BPO (Xu et al., arXiv 2406.12168): `reference_steps` steps between two moves of
    the reference to the policy, `reference_update` 1. `beta`: as in DPO; of nash_md, the weight of the KL.
    """

    loss: Literal["dpo", "ipo", "hinge", "apo_zero", "apo_down", "nash_md"] = "dpo"
    judge: str | None = None
    reward: tuple[Term, ...] = ()
    mixture: float = Field(default=0.0, ge=0, le=1)
    beta: float = Field(default=0.1, gt=0)
    updates: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if bool(self.judge) == bool(self.reward):
            raise ValueError("judge, reward: one of them")
        if self.trainer:
            raise ValueError("trainer: no trainer of TRL's has a part in it")
        if self.rollouts % 2:
            raise ValueError("rollouts: two to a prompt")
        if self.loss == "nash_md" and self.updates != 1:
            raise ValueError("updates: nash_md takes one")
        if self.mixture and self.generator == "vllm":
            raise ValueError("mixture: goes with generator transformers alone")
        if self.judge and self.stop_when.held_out:
            raise ValueError("stop_when held_out: needs a reward, and a judge of pairs gives none that could rise")
        return self
