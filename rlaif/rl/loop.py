"""The way of a run, step by step: prompts, responses, judgement, an update; what it tells, keeps, and when it ends.

PPO and online preference learning differ in what they learn from a step's responses; the rest is here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from rlaif.engines.transformers import ends_of
from rlaif.records import RlaifError, Row, UsageError, digest
from rlaif.rl import watch
from rlaif.rl.actor import Actor, Batch, collate
from rlaif.rl.generate import Sampler, TransformersSampler
from rlaif.rl.prompts import Encoder, deal
from rlaif.rl.rewards import SILENT, Background, of_run, silence
from rlaif.rl.step import FACTS, Clock, Rolled, Sample, World
from rlaif.runner import StoppedError
from rlaif.train.checkpoints import Interrupt, clear, in_order, newest, seal, step_of
from rlaif.train.record import Recorder, lines
from rlaif.train.run import Part, put_in_place

STATE = "state.pt"


@dataclass
class State:
    """How far the run is, as callbacks of transformers' trainers are told it."""

    max_steps: int
    global_step: int
    epoch: float
    is_world_process_zero: bool


class Loop(ABC):
    """A run of reinforcement learning, from its newest checkpoint to its end."""

    def __init__(self, part: Part, with_value: bool = False, mixture: float = 0.0) -> None:
        self.part = part
        self.config: Any = part.config
        config = self.config
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            if os.environ.get(name, "false").lower() == "true":
                raise UsageError("each process holds the whole model here: FSDP and DeepSpeed have no part in it")
        gpu = config.device == "auto" and torch.cuda.is_available()
        bf16 = config.dtype == "bf16" or (config.dtype == "auto" and gpu)
        self.accelerator = Accelerator(cpu=not gpu, log_with=list(config.report_to) or None, project_dir=config.out)
        self.world = World(self.accelerator)
        self.out, self.folder = Path(config.out), part.folder / "checkpoints"
        self.actor = Actor(part, self.accelerator.device, bf16, with_value)
        self.encode = Encoder(part.tokenizer)
        self.ends = ends_of(self.actor.lm, part.tokenizer)
        self.sampler: Sampler = TransformersSampler(self.actor.voices(), self.actor.pad, self.accelerator.device)
        if config.generator == "vllm":
            from rlaif.rl.vllm import VllmSampler

            self.sampler = VllmSampler(
                part.model,
                dtype="bf16" if bf16 else "fp32",
                max_length=config.max_length,
                trust_remote_code=config.trust_remote_code,
            )
        self.mixer = TransformersSampler(self.actor.voices(mixture), self.actor.pad, self.accelerator.device)
        self.rewards = of_run(self._terms, config, part.folder / "judge", part.seed)
        self.judge = Background(self.rewards)
        # A judge that computes on the same cores would slow both down.
        self.in_turns = self.rewards.in_process and self.accelerator.device.type == "cpu"
        rival = of_run(config.held_out, config, part.folder / "held-out-judge", part.seed) if config.held_out else None
        self.rival_judge = Background(rival) if rival else None
        self.prompts_a_step = config.rollouts // self.a_prompt
        through = config.epochs * len(part.train.rows)
        self.steps = config.max_steps or max(1, math.ceil(through / self.prompts_a_step))
        self.step, self.stopped, self.silent = 0, "", 0
        self.optimizer = torch.optim.AdamW(self._groups(), weight_decay=config.weight_decay)
        warmup = math.ceil(config.warmup * self.steps)
        self.scheduler = get_scheduler(config.scheduler, self.optimizer, warmup, self.steps)
        self.samples = watch.Samples(self.out / "samples.jsonl")
        self.waiting: Rolled | None = None
        self.unlogged: list[dict[str, float]] = []
        self.untold: dict[str, float] | None = None  # figures of a step that is made, but not evaluated yet
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl

    # ------------------------------------------------------------ what differs

    @property
    @abstractmethod
    def a_prompt(self) -> int:
        """Responses to a prompt."""

    @property
    def _terms(self) -> Any:
        return self.config.reward

    @abstractmethod
    def learn(self, samples: list[Sample], clock: Clock) -> dict[str, float]:
        """Update the policy from this process's judged responses of a step; the figures are those of all processes."""

    @abstractmethod
    def extra_state(self) -> dict[str, Any]:
        """What else a checkpoint must hold."""

    @abstractmethod
    def load_extra(self, state: dict[str, Any]) -> None:
        """Take it back."""

    def submit(self, samples: list[Sample]) -> Future[list[Any]]:
        """Have some responses judged; whole prompts' at a time."""
        return self.judge.submit([sample.row for sample in samples], [sample.text for sample in samples])

    def sampler_of(self, number: int) -> Sampler:
        """What draws the response of this number to a prompt."""
        return self.sampler

    # ------------------------------------------------------------ the run

    def run(self, recorder: Recorder, interrupt: Interrupt) -> int:
        """All steps, or those that are left; the number of steps that were made.

        Raises: StoppedError where it was interrupted; RlaifError where no judge answers: both after a checkpoint.
        """
        self._resume()
        recorder.on_train_begin(None, self._told(), None)
        if self.world.main:
            self.samples.take_back(self.step)
            self.history = list(lines(recorder.path))
        if self.config.report_to:
            self.accelerator.init_trackers("rlaif", config={})
        try:
            while (self.untold or self.step < self.steps) and not self.stopped:
                try:
                    self._one_step(recorder)
                except RlaifError:
                    self._save()
                    raise
                if interrupt.stopped and self.world.size == 1:
                    self._save()
                    if self.step < self.steps:
                        raise StoppedError(f"{self.out}: stopped at step {self.step}; --resume goes on from there")
            self._save()
        finally:
            self.judge.close()
            if self.rival_judge:
                self.rival_judge.close()
            self.sampler.close()
            if self.config.report_to:
                self.accelerator.end_training()
        return self.step

    def _one_step(self, recorder: Recorder) -> None:
        if self.untold is None:  # else the run ended while a judge was evaluating, and goes on with that
            self.untold = self._made()
        self._tell(self.untold, recorder)
        if self.step % self._save_steps == 0 and self.step < self.steps:
            self._save()

    def _made(self) -> dict[str, float]:
        """Make a step; its figures."""
        clock, busy = Clock(), self.judge.busy()
        rolled = self.waiting or self.roll(self.step, clock)
        self.waiting = rolled  # until it is learnt from: a run that ends here goes on with it
        ahead = self.roll(self.step + 1, clock) if self.config.ahead and self.step + 1 < self.steps else None
        samples = self.judged(rolled, clock)
        figures = self._figures(samples)
        rate = self.optimizer.param_groups[0]["lr"]
        known = [sample for sample in samples if sample.scored and sample.scored.value is not None]
        if figures["asked"] > figures["failed"]:
            self.silent = 0
            figures |= self.learn(known, clock)
        else:
            self._nothing(samples)
        self.waiting = ahead
        self.step += 1
        self.scheduler.step()
        if self.config.reference_update and self.step % self.config.reference_steps == 0:
            self.actor.move_reference(self.config.reference_update)
        figures |= {"learning_rate": rate, **clock.figures(self.judge.busy() - busy)}
        self._show(samples)
        return figures

    def _nothing(self, samples: list[Sample]) -> None:
        """No response of the step has a score: there is nothing to learn. Should it stay so, a run goes on from here."""
        self._save()
        self.silent += 1
        if self.silent == SILENT:
            raise RlaifError(silence([sample.scored for sample in samples if sample.scored]))

    @property
    def _save_steps(self) -> int:
        return int(self.config.save_steps or max(1, -(-self.steps // 10)))

    # ------------------------------------------------------------ responses

    def roll(self, step: int, clock: Clock) -> Rolled:
        """Draw this process's responses of a step, each batch of them to the judge as soon as it is there."""
        self.sampler.sync(self.actor.lm)
        mine = [
            Sample(place * self.a_prompt + n, row, [], [], "", False)
            for place, row in enumerate(self._dealt(step))
            if place % self.world.size == self.world.rank
            for n in range(self.a_prompt)
        ]
        rolled = Rolled(step, mine, [])
        for some in _chunks(mine, self._at_once):
            with clock.on("generation"):
                self._draw(some, step)
            rolled.judged.append(self.submit(some))
            if self.in_turns:
                with clock.on("waiting"):
                    wait(rolled.judged)
        with clock.on("scoring"):
            self._measure(mine)
        return rolled

    def _dealt(self, step: int) -> list[Row]:
        """The rows of a step's prompts, those of all processes."""
        rows = self.part.train.rows
        places = deal(len(rows), step * self.prompts_a_step, self.prompts_a_step, self.part.seed)
        return [rows[place] for place in places]

    @property
    def _at_once(self) -> int:
        """Responses that are drawn, and judged, together: whole prompts' of them."""
        return int(-(-max(self.config.generate_batch, self.a_prompt) // self.a_prompt) * self.a_prompt)

    def _draw(self, samples: list[Sample], step: int | str) -> None:
        for sampler in dict.fromkeys(self.sampler_of(sample.number % self.a_prompt) for sample in samples):
            own = [sample for sample in samples if self.sampler_of(sample.number % self.a_prompt) is sampler]
            self._fill(own, step, sampler)

    def _fill(self, samples: list[Sample], step: int | str, sampler: Sampler) -> None:
        for sample in samples:
            sample.prompt = self.encode(sample.row["prompt"])
        seeds = [int(digest([self.part.seed, step, sample.number])[:15], 16) for sample in samples]
        config = self.config
        drawn = sampler.sample([s.prompt for s in samples], seeds, config.max_new_tokens, config.temperature, self.ends)
        for sample, response in zip(samples, drawn, strict=True):
            sample.response, sample.ended = response, response[-1] in self.ends
            sample.text = self._decoded(response).strip()

    def _decoded(self, ids: list[int]) -> str:
        return str(self.part.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def _measure(self, samples: list[Sample]) -> None:
        """Log-probabilities and values of what was drawn, in batches of similar lengths."""
        for some in _chunks(sorted(samples, key=_size), 2 * self.config.batch_size):
            batch = self.batch(some)
            logprobs, reference = self.actor.logprobs(batch), self.actor.reference_logprobs(batch)
            values = torch.zeros_like(logprobs)
            if self.actor.head is not None:
                with self.actor.valuing():
                    values = self.actor.values(batch)
            for sample, *found in zip(some, logprobs.cpu(), reference.cpu(), values.cpu(), strict=True):
                sample.logprobs, sample.reference, sample.values = (f[: len(sample.response)].clone() for f in found)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        return collate([s.prompt for s in samples], [s.response for s in samples], self.actor.pad, self.accelerator.device)

    def stacked(self, samples: Sequence[Sample], what: Callable[[Sample], Tensor]) -> Tensor:
        """Something of each token, padded with 0: (B, T)."""
        found = torch.nn.utils.rnn.pad_sequence([what(sample) for sample in samples], batch_first=True)
        return found.to(self.accelerator.device)

    def judged(self, rolled: Rolled, clock: Clock) -> list[Sample]:
        """Wait for the judge. Raises: what ended it, in all processes."""
        with clock.on("waiting"):
            found = self._results(rolled.judged)
        for sample, scored in zip(rolled.samples, found, strict=True):
            sample.scored = scored
        return rolled.samples

    def _results(self, futures: Sequence[Future[list[Any]]]) -> list[Any]:
        """All that a judge says. Raises: what ended it in any process, in all of them."""
        found, problem = [], None
        try:
            found = [scored for future in futures for scored in future.result()]
        except RlaifError as error:
            problem = error
        first = next((p for p in self.world.all([problem and str(problem)]) if p), None)
        if first:
            raise problem or RlaifError(first)
        return found

    # ------------------------------------------------------------ learning

    def minibatches(self, numbers: Sequence[int], update: int, group: int = 1) -> Iterator[list[int]]:
        """The numbers of all processes' responses, in minibatches in an order drawn anew; `group` neighbours stay together."""
        generator = torch.Generator().manual_seed(int(digest([self.part.seed, "order", self.step, update])[:15], 16))
        groups = list(_chunks(sorted(numbers), group))
        order = torch.randperm(len(groups), generator=generator).tolist()
        size = self.config.batch_size * self.config.accumulate * self.world.size
        for some in _chunks(order, max(1, size // group)):
            yield [number for place in some for number in groups[place]]

    def pieces(self, samples: Sequence[Sample], group: int = 1) -> Iterator[list[Sample]]:
        """Of a minibatch, what this process takes at once; those of similar lengths together."""
        units = sorted(_chunks(samples, group), key=lambda unit: max(map(_size, unit)))
        for some in _chunks(units, max(1, self.config.batch_size // group)):
            yield [sample for unit in some for sample in unit]

    def update(self) -> float:
        """Take a step of the optimizer with the gradients of all processes added up; their norm before it was clipped.

        A gradient that is not finite is passed over: it would spoil the weights. Its norm shows in the metrics.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def share_gradients(self, parameters: Sequence[Tensor]) -> None:
        if self.world.size == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.world.total(flat)
        for parameter, grad in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    def means(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Sums over this process as means over all of them."""
        names = sorted(set(self.world.all(list(sums))))
        whole = self.world.total(torch.tensor([*(sums[name] for name in names), count], dtype=torch.float64))
        return {name: float(value / max(float(whole[-1]), 1e-12)) for name, value in zip(names, whole[:-1], strict=True)}

    def _groups(self) -> list[dict[str, Any]]:
        rate = self.config.learning_rate
        value_rate = getattr(self.config, "value_learning_rate", None) or rate
        groups = [
            {"params": self.actor.policy_parameters, "lr": rate},
            {"params": self.actor.value_parameters, "lr": value_rate},
        ]
        return [group for group in groups if group["params"]]

    # ------------------------------------------------------------ telling

    def _figures(self, samples: list[Sample]) -> dict[str, float]:
        """What the step's responses are like, those of all processes."""
        told = self.world.all([(s.response, s.ended, s.kl, float(-s.logprobs.sum()), s.scored) for s in samples])
        responses, ended, kl, surprise, scored = zip(*told, strict=True)
        return {
            **watch.figures(responses),
            **watch.judgement(scored),
            "ended": fmean(ended),
            "kl": fmean(kl),
            "entropy": sum(surprise) / sum(map(len, responses)),
        }

    def _show(self, samples: list[Sample]) -> None:
        shown = self.step % self.config.sample_steps == 0 or self.step in (1, self.steps)
        if self.world.main and shown:
            self.samples.append(self.step, (sample.line() for sample in samples[: self.config.samples_shown]))

    def _tell(self, figures: dict[str, float], recorder: Recorder) -> None:
        if self.part.held and (self.step % self._eval_steps == 0 or self.step == self.steps):
            figures |= self._held_out()
        self.unlogged.append(figures)
        self.untold = None
        if self.step % self.config.log_steps == 0 or self.step == self.steps or "held_out/length" in figures:
            merged = _merged(self.unlogged)
            self.unlogged.clear()
            self.history.append({"step": self.step, **merged})
            recorder.on_log(None, self._told(), None, merged)
            if self.config.report_to:
                self.accelerator.log(merged, step=self.step)
        facts = self.rewards.facts()
        if facts["cost"]:
            recorder.tell("cost", f"${facts['cost']:.4f}")
        if facts["failed"]:
            recorder.tell("failed", f"{facts['failed']:,} not judged")
        recorder.on_step_end(None, self._told(), None)
        self.stopped = self.world.same(watch.reason(self.config.stop_when, self.history)) or ""

    def _told(self) -> State:
        epoch = self.step * self.prompts_a_step / len(self.part.train.rows)
        return State(self.steps, self.step, epoch, self.world.main)

    @property
    def _eval_steps(self) -> int:
        return int(self.config.eval_steps or max(1, self.steps // 10))

    def _held_out(self) -> dict[str, float]:
        """The judge's reward, and the second judge's, on prompts that are not trained on; one response to each."""
        assert self.part.held
        rows = self.part.held.rows
        self.sampler.sync(self.actor.lm)
        mine = [Sample(n, row, [], [], "", False) for n, row in enumerate(rows) if n % self.world.size == self.world.rank]
        for some in _chunks(mine, self.config.generate_batch):
            self._fill(some, "held out", self.sampler)
        found = {"held_out/length": fmean(self.world.all([len(s.response) for s in mine]))}
        for name, judge in (("eval_reward", self.judge), ("held_out/reward", self.rival_judge)):
            if judge and self._can_rate(judge):
                scored = self._results([judge.submit([s.row for s in mine], [s.text for s in mine])])
                values = self.world.all([one.value for one in scored])
                known = [value for value in values if value is not None]
                found |= {name: fmean(known)} if known else {}
                found["held_out/failed"] = found.get("held_out/failed", 0) + len(values) - len(known)
        return found

    def _can_rate(self, judge: Background) -> bool:
        """Whether it gives single responses a score."""
        return True

    # ------------------------------------------------------------ keeping

    def _save(self) -> None:
        """Write a checkpoint of the steps made, unless there is one; none while the judge is silent, which may be its fault."""
        if self.silent:
            return
        target, responses = self.folder / f"checkpoint-{self.step}", self._kept()
        if self.world.main and newest(self.folder) != target:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            state = {
                "step": self.step,
                "stopped": self.stopped,
                "weights": self.actor.state(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {"last_epoch": self.scheduler.last_epoch},
                "unlogged": self.unlogged,
                "untold": self.untold,
                "extra": self.extra_state(),
                "responses": responses,
            }
            torch.save(state, target / STATE)
            seal(target)
            for old in in_order(self.folder)[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _kept(self) -> list[Any]:
        """The responses that wait to be learnt from, which a policy that is no more has drawn."""
        if not self.waiting or not self.config.ahead:
            return []
        return self.world.all([[s.number, s.response, s.logprobs, s.reference, s.values] for s in self.waiting.samples])

    def _resume(self) -> None:
        found = newest(self.folder)
        if self.world.main:
            clear(self.folder)
        self.accelerator.wait_for_everyone()
        if found is None:
            return
        state = torch.load(found / STATE, map_location="cpu", weights_only=True)
        self.step, self.stopped, self.untold = state["step"], state["stopped"], state["untold"]
        assert self.step == step_of(found)
        self.actor.load_state(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.unlogged.extend(state["unlogged"])
        self.load_extra(state["extra"])
        if state["responses"]:
            self.waiting = self._taken_up(state["responses"])

    def _taken_up(self, kept: list[Any]) -> Rolled:
        rows, samples = self._dealt(self.step), []
        for number, response, *figures in sorted(kept, key=lambda one: one[0]):
            if number // self.a_prompt % self.world.size != self.world.rank:
                continue
            row = rows[number // self.a_prompt]
            sample = Sample(number, row, self.encode(row["prompt"]), response, self._decoded(response).strip(), False)
            sample.ended = response[-1] in self.ends
            sample.logprobs, sample.reference, sample.values = figures
            samples.append(sample)
        return Rolled(self.step, samples, [self.submit(some) for some in _chunks(samples, self._at_once)])

    def save_model(self, folder: Path) -> None:
        """Write the policy with its tokenizer; the folder appears whole or not at all."""
        if self.world.main:
            target = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(target, ignore_errors=True)
            self.actor.save(target, self.part.model, bool(self.config.lora and self.config.lora.merge))
            self.part.tokenizer.save_pretrained(target)
            facts = {
                "stopped": self.stopped or None,
                "reward": self.rewards.settings(),
                "judged": self.rewards.facts(),
            }
            (self.part.folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            put_in_place(target, folder)
        self.accelerator.wait_for_everyone()


def _size(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.response)


def _chunks(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(values[start : start + size]) for start in range(0, len(values), size))


def _merged(some: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means of several steps' figures; what was counted is added up."""
    found = {}
    for name in dict.fromkeys(name for figures in some for name in figures):
        values = [figures[name] for figures in some if name in figures]
        found[name] = sum(values) if name in ("asked", "failed", "held_out/failed") else fmean(values)
    return found
