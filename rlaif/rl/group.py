"""GRPO (Shao et al., arXiv 2402.03300, §4.1) and RLOO (Ahmadian et al., arXiv 2402.14740, §3), by TRL's trainers.

Both compare the responses to one prompt with each other: an advantage is a reward less the group's mean (GRPO, divided by the
group's standard deviation), or less the mean of the others (RLOO). A step is TRL's, one of the optimizer: `rollouts` responses
make rollouts ÷ (batch_size × accumulate × processes) × `updates` of them. The KL from the reference is, in RLOO, a part of the
reward, −β Σ log π/π_ref; in GRPO it is added to the loss, by the estimator k3. A response that could not be judged has
advantage 0, and no part in the others' baseline.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlaif.data import atomic
from rlaif.records import FatalError, RlaifError, Row, UsageError
from rlaif.rl import prompts, watch
from rlaif.rl.config import Ppo
from rlaif.rl.ppo import finish
from rlaif.rl.prompts import deal, fitting
from rlaif.rl.rewards import SILENT, Background, Rewards, Scored, of_run, silence
from rlaif.rl.rewards import check as check_rewards
from rlaif.rl.step import FACTS
from rlaif.train.checkpoints import is_complete
from rlaif.train.data import Rows
from rlaif.train.run import Part

__all__ = ["finish", "fitting", "read", "trainer"]

OURS = (
    *("generate_batch", "generator", "ahead", "reference", "reference_update", "reference_steps", "held_out", "stop_when"),
    *("eval", "eval_share", "step_kl", "value", "value_from", "value_clip", "value_weight", "value_learning_rate", "gamma"),
    *("lam", "kl_control", "kl_target", "kl_horizon", "whiten_rewards", "ptx"),
)
"""Settings that TRL's trainers have nothing for."""

KL = {"rloo": ("k1",), "grpo": ("k1", "k3")}
"""Estimators that may be asked for: the trainer's own, and what stands there by default."""

NOT_RESUMED = ("sync_ref_model", "shuffle_dataset")
"""Fields of TRL's configs that a run which goes on from a checkpoint would not keep to."""


# ---------------------------------------------------------------- before a model loads


def read(config: Ppo) -> tuple[Rows, Rows | None]:
    """The prompts. Raises: UsageError for what `check` finds, for rewards, and for texts and messages in one file."""
    check(config)
    train, held = prompts.read(config)
    if len({isinstance(row["prompt"], list) for row in train.rows}) > 1:
        raise UsageError(f"{train.source}: texts and lists of messages in one file: choose a form")
    check_rewards(config.reward, train.rows[0])
    return train, held


def check(config: Ppo) -> None:
    """Raises: UsageError for settings that TRL's trainers cannot follow, or responses that fill no whole number of steps."""
    kind = type(config).model_fields
    refused = [name for name in OURS if getattr(config, name) != kind[name].default]
    refused += ["entropy"] if config.entropy and config.algorithm == "rloo" else []
    refused += ["kl"] if config.kl not in KL[config.algorithm] else []
    refused += [f"trainer.{name}" for name in NOT_RESUMED if name in config.trainer]
    if refused:
        raise UsageError(f"{config.name}: {refused[0]}: does not go with {config.algorithm}, which is TRL's")
    if config.rollouts % a_step(config):
        raise UsageError(
            f"{config.name}: rollouts: {config.rollouts} responses are no whole number of optimizer steps of {a_step(config)}, "
            "which are batch_size × accumulate × processes"
        )


def a_step(config: Ppo) -> int:
    """Responses of an optimizer step, over all processes."""
    return config.batch_size * config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))


def steps(config: Ppo, rows: int) -> tuple[int, int]:
    """Optimizer steps of the run, and those that learn from the same responses."""
    each = config.rollouts // a_step(config) * config.updates
    through = math.ceil(config.epochs * rows / (config.rollouts // config.a_prompt))
    return config.max_steps or each * through, each


# ---------------------------------------------------------------- rewards


class Judge:
    """What TRL asks for the rewards of a step's responses; `ends` are the tokens that end a response by itself.

    Rows come by their places, with all that they hold; what TRL makes of a response's text is left aside.
    """

    __name__ = "judge"

    def __init__(self, part: Part, rewards: Rewards) -> None:
        self.part, self.config, self.ends = part, part.config, frozenset[int]()
        self.rewards, self.background = rewards, Background(rewards)
        self._samples: watch.Samples | None = None
        self._silent = 0

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        row: list[int],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        """Rewards, None for a response that could not be judged. Raises: RlaifError, in all processes, where a judge stops."""
        rows = [self.part.train.rows[place] for place in row]
        texts = [self._text(ids) for ids in completion_ids]
        ended = [ids[-1] in self.ends for ids in completion_ids]
        scored = self._judged(rows, texts)
        for name, value in self._figures(completion_ids, ended, scored).items():
            log_metric(name, value)
        if trainer_state.is_world_process_zero:
            self._tell(trainer_state.global_step, rows, texts, completion_ids, ended, scored)
        return [None if s.value is None else self.shaped(s.value, end) for s, end in zip(scored, ended, strict=True)]

    def _text(self, ids: list[int]) -> str:
        return str(self.part.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()

    def shaped(self, score: float, ended: bool) -> float:
        """The score as it is learnt from: cut at ± `reward_clip`, less `missing_eos_penalty` for a response without its end."""
        most = self.config.reward_clip or math.inf
        return max(-most, min(score, most)) - (0.0 if ended else self.config.missing_eos_penalty)

    def _judged(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Scored]:
        problem: RlaifError | None = None
        scored: list[Scored] = []
        try:
            scored = self.background.submit(rows, texts).result()
        except RlaifError as error:
            problem = error
        told = gather_object([(problem and str(problem), any(one.value is not None for one in scored))])
        if first := next((text for text, _ in told if text), None):
            self.background.close()
            raise problem or FatalError(first)  # each process, for none could go on alone
        self._silent = 0 if any(some for _, some in told) else self._silent + 1
        if self._silent >= SILENT:
            raise FatalError(silence(scored))
        return scored

    def _figures(self, responses: list[list[int]], ended: list[bool], scored: list[Scored]) -> dict[str, float]:
        """TRL takes the mean over processes: so that of what is counted is told as many times as there are such."""
        judged = watch.judgement(scored)
        if "reward" in judged:
            judged["judged"] = judged.pop("reward")  # TRL has a `reward` of its own, and a deviation
        judged.pop("reward/std", None)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        counted = {name: judged[name] * world for name in ("asked", "failed")}
        return {**watch.figures(responses), "ended": fmean(ended), **judged, **counted}

    def _tell(
        self, step: int, rows: list[Row], texts: list[str], ids: list[list[int]], ended: list[bool], scored: list[Scored]
    ) -> None:
        """Write down samples where a step to show them is ahead, and what the judge has done so far."""
        if self._samples is None:
            self._samples = watch.Samples(Path(self.config.out) / "samples.jsonl", self.part.name)
            self._samples.take_back(step)
        if -step % self.config.sample_steps < steps(self.config, len(self.part.train.rows))[1]:
            shown = range(0, len(rows), max(1, len(rows) // self.config.samples_shown))[: self.config.samples_shown]
            self._samples.append(
                step + 1,  # the first that learns from them
                [watch.sample(rows[n]["prompt"], texts[n], scored[n], None, len(ids[n]), ended[n]) for n in shown],
            )
        with atomic(self.part.folder / FACTS) as temporary:
            facts = {"reward": self.rewards.settings(), "judged": self.rewards.facts()}
            temporary.write_text(json.dumps(facts), encoding="utf-8")


# ---------------------------------------------------------------- trainers


class Order(Sampler[int]):
    """Places of the prompts of a whole run, each as many times as it has responses, a step's prompts `repeats` times in a row.

    TRL's own order begins anew where a run goes on within a later pass, and leaves out prompts that do not fill a step.
    """

    def __init__(self, rows: int, a_time: int, times: int, repeats: int, responses: int, seed: int) -> None:
        self.rows, self.a_time, self.times, self.repeats = rows, a_time, times, repeats
        self.responses, self.seed = responses, seed

    def __len__(self) -> int:
        return self.a_time * self.times * self.repeats * self.responses

    def __iter__(self) -> Iterator[int]:
        for time in range(self.times):
            dealt = deal(self.rows, time * self.a_time, self.a_time, self.seed)
            for _ in range(self.repeats):
                yield from (place for place in dealt for _ in range(self.responses))


class _Kept:
    """What both trainers need: checkpoints that go on with the responses at hand, also where a judge stops, and our figures."""

    part: Part
    args: Any
    state: Any
    accelerator: Any
    _step: int
    _buffered_inputs: Any
    _metrics: dict[str, dict[str, list[float]]]

    def _get_train_sampler(self, dataset: Any = None) -> Order:
        config: Ppo = self.part.config
        rows = len(self.part.train.rows)
        whole, each = steps(config, rows)
        a_time = config.rollouts // config.a_prompt
        repeats = self.args.steps_per_generation * config.updates
        return Order(rows, a_time, math.ceil(whole / each), repeats, config.a_prompt, self.part.seed)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        random, seen = _random(), self.state.num_input_tokens_seen
        try:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        except RlaifError:
            _set_random(random)  # as it was after the last step, for that to be drawn again
            self.state.num_input_tokens_seen = seen
            self._keep()
            raise

    def _keep(self) -> None:
        """Write a checkpoint of the last step, unless there is one."""
        own: Any = self
        folder = Path(own.args.output_dir) / f"checkpoint-{own.state.global_step}"
        if own.state.global_step and not is_complete(folder):
            own._save_checkpoint(own.model, None)
            own.callback_handler.on_save(own.args, own.state, own.control)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        torch.save({"step": self._step, "responses": self._buffered_inputs}, self._responses(output_dir))

    def _load_rng_state(self, checkpoint: str) -> None:
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if self._responses(checkpoint).exists():  # not where the run had other processes: then they are drawn again
            kept = torch.load(self._responses(checkpoint), map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = kept["step"], kept["responses"]

    def _responses(self, folder: str) -> Path:
        return Path(folder) / f"responses-{self.args.process_index}.pt"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's figures, with ours: `kl` in nats a response, not a token; `reward` as judged, not as it was cut."""
        found = self._metrics["train"]
        if "judged" in found:
            found["reward"] = found.pop("judged")
        for theirs, name in (("reward_std", "reward/std"), ("step_time", "time/step"), ("kl", "kl/token")):
            if theirs in found:
                found[name] = found.pop(theirs)
        if "kl/token" in found:
            masks = [batch["completion_mask"] for batch in self._buffered_inputs]
            tokens = float(sum(mask.sum() for mask in masks)) / sum(map(len, masks))
            found["kl"] = [kl * tokens for kl in found["kl/token"]]
        super().log(logs, start_time)  # type: ignore[misc]


class Grpo(_Kept, GRPOTrainer):  # type: ignore[misc]
    """GRPO that goes on where it was."""


class Rloo(_Kept, RLOOTrainer):  # type: ignore[misc]
    """RLOO that goes on where it was."""


def _random() -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []]


def _set_random(state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


class _Bookkeeping(TrainerCallback):
    """Tells how often the prompts were gone through, for to the trainer the whole run is one pass; lets the judge go."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        part = self._judge.part
        each = steps(part.config, len(part.train.rows))[1]
        state.epoch = state.global_step / each * part.config.rollouts / part.config.a_prompt / len(part.train.rows)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._judge.background.close()


def trainer(part: Part) -> Any:
    """TRL's trainer for the algorithm. Raises: UsageError for a field of `trainer` that it does not have."""
    logging.getLogger("trl").setLevel(logging.ERROR)  # it would show the whole row of a response without a reward
    config: Ppo = part.config
    whole, _ = steps(config, len(part.train.rows))
    part.arguments.update(max_steps=whole, save_steps=config.save_steps or max(1, -(-whole // 10)))
    kind, settings = (Grpo, _grpo(part)) if config.algorithm == "grpo" else (Rloo, _rloo(part))
    adapters = part.peft
    if adapters:
        adapters.task_type = "CAUSAL_LM"
    judge = Judge(part, of_run(config.reward, config, part.folder / "judge", part.seed))
    rows = [{"prompt": row["prompt"], "row": place} for place, row in enumerate(part.train.rows)]
    made = kind(
        model=part.model,  # by its name, for the reference is loaded from there too
        reward_funcs=judge,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=part.tokenizer,
        peft_config=adapters,
        callbacks=[_Bookkeeping(judge)],
    )
    made.part, judge.ends = part, frozenset(made.eos_token_ids)
    return made


def _grpo(part: Part) -> Any:
    config: Ppo = part.config
    own = {"entropy_coef": config.entropy} if config.entropy else {}
    scaled = {} if config.whiten_advantages else {"scale_rewards": "none"}
    return part.settings(GRPOConfig, **_shared(config), **own, **scaled)


def _rloo(part: Part) -> Any:
    return part.settings(RLOOConfig, **_shared(part.config), normalize_advantages=part.config.whiten_advantages)


def _shared(config: Ppo) -> dict[str, Any]:
    return {
        "num_generations": config.a_prompt,
        "generation_batch_size": config.rollouts,
        "num_iterations": config.updates,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "beta": config.beta,
        "epsilon": config.clip,
        "disable_dropout": True,
    }
