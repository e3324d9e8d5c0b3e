"""Proximal policy optimisation for language models, and its kin: REINFORCE with a value baseline, pairwise PPO, TRPO."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif.records import UsageError, digest
from rlaif.reward import read_folder
from rlaif.rl import objectives, trpo
from rlaif.rl.actor import Batch, collate, entropies, token_logprobs
from rlaif.rl.config import Ppo
from rlaif.rl.loop import Loop
from rlaif.rl.prompts import Encoder, fitting
from rlaif.rl.prompts import read as read_prompts
from rlaif.rl.rewards import check
from rlaif.rl.step import FACTS, Clock, Sample, Sums
from rlaif.train import data
from rlaif.train.data import Rows, encoder
from rlaif.train.run import Part, Run

__all__ = ["finish", "fitting", "read", "trainer"]


def read(config: Ppo) -> tuple[Rows, Rows | None]:
    """The prompts; all else that can be wrong with rewards and files is found here too. Raises: UsageError."""
    train, held = read_prompts(config)
    check(config.reward, train.rows[0])
    check(config.held_out, (held or train).rows[0])
    if config.value_from:
        read_folder(Path(config.value_from))
    if config.ptx:
        _pretraining(config)
    return train, held


def trainer(part: Part) -> Any:
    """The loop, ready to run."""
    return PpoLoop(part)


def finish(run: Run, out: Path) -> dict[str, Any]:
    """`algorithm`; `reward`, its terms; `judged`, what they took since the run was last resumed; of our own loops `stopped`,
    why the run ended early, or None.
    """
    facts = json.loads((run.out / "parts" / "train" / FACTS).read_text(encoding="utf-8"))
    return {"algorithm": getattr(run.config, "algorithm", run.kind), **facts}


class PpoLoop(Loop):
    """What PPO and its kin learn from a step's responses.

    Losses are means over the tokens of a minibatch, over all processes (of P3O: over its pairs).
    """

    def __init__(self, part: Part) -> None:
        config: Ppo = part.config
        self.algorithm = config.algorithm
        super().__init__(part, with_value=config.algorithm != "p3o")
        size = sum(parameter.numel() for parameter in self.actor.policy_parameters)
        if self.algorithm == "trpo" and size > trpo.MOST:
            raise UsageError(f"algorithm: trpo is for small models, of at most {trpo.MOST:,} parameters; these are {size:,}")
        self.beta, self.penalty = config.beta, 1.0
        self.advantages: dict[int, Tensor] = {}
        self.returns: dict[int, Tensor] = {}
        self.pretraining = _pieces(part) if config.ptx else []

    @property
    def a_prompt(self) -> int:
        return int(self.config.a_prompt)

    @property
    def group(self) -> int:
        """Responses that are learnt from together."""
        return 2 if self.algorithm == "p3o" else 1

    def extra_state(self) -> dict[str, Any]:
        return {"beta": self.beta, "penalty": self.penalty}

    def load_extra(self, state: dict[str, Any]) -> None:
        self.beta, self.penalty = state["beta"], state["penalty"]

    def _groups(self) -> list[dict[str, Any]]:
        groups = super()._groups()
        return groups[1:] if self.algorithm == "trpo" else groups  # the policy has its own step

    # ------------------------------------------------------------ a step

    def learn(self, samples: list[Sample], clock: Clock) -> dict[str, float]:
        with clock.on("training"):
            if self.algorithm == "p3o":
                samples = _whole_pairs(samples)
            kl = self.world.all([sample.kl for sample in samples])
            if not kl:
                return {"beta": self.beta}
            used = self.beta
            self._credit(samples)
            figures = self._explained(samples) | self._optimise(samples)
            if self.config.kl_control == "adaptive":
                mean = sum(kl) / len(kl)
                self.beta = objectives.adapted(self.beta, mean, self.config.kl_target, self.config.kl_horizon, len(kl))
            if self.config.surrogate == "penalty":
                self.penalty = objectives.penalty_after(self.penalty, figures["kl/update"], self.config.step_kl)
                figures["penalty"] = self.penalty
            return figures | {"beta": used}

    def _optimise(self, samples: list[Sample]) -> dict[str, float]:
        """All updates from a step's responses; the last pass's figures, as means over its minibatches."""
        mine = {sample.number: sample for sample in samples}
        lengths = dict(self.world.all([(sample.number, len(sample.response)) for sample in samples]))
        found: dict[str, float] = {}
        for update in range(self.config.passes):
            sums: Sums = defaultdict(float)
            norms = []
            if self.algorithm == "trpo":
                self._natural_step(samples, sum(lengths.values()), sums)
            for place, minibatch in enumerate(self.minibatches(list(lengths), update, self.group)):
                tokens = sum(lengths[number] for number in minibatch)
                own = [mine[number] for number in minibatch if number in mine]
                self._gradients(own, tokens, len(minibatch) // self.group, sums)
                if self.pretraining:
                    self._pretrain([update, place], tokens, sums)
                norms.append(self.update())
            found = self.means(sums, sum(len(sample.response) for sample in samples))
            found["grad_norm"] = sum(norms) / len(norms)
        return found

    def _gradients(self, samples: list[Sample], tokens: int, units: int, sums: Sums) -> None:
        """This process's part of a minibatch; tokens and units (pairs, for P3O) are those of all processes."""
        for piece in self.pieces(samples, self.group):
            batch = self.batch(piece)
            if self.algorithm == "p3o":
                loss = self._pairwise_loss(piece, batch, sums) / units
                torch.autograd.backward(loss)
                sums["loss/policy"] += float(loss.detach()) * tokens
                continue
            if self.algorithm != "trpo":
                torch.autograd.backward(self._policy_loss(piece, batch, sums) / tokens)
            if not self.actor.value_is_shared:
                with self.actor.valuing():
                    torch.autograd.backward(self._value_loss(self.actor.values(batch), piece, batch, sums) / tokens)

    # ------------------------------------------------------------ credit

    def _credit(self, samples: list[Sample]) -> None:
        """Each token's advantage and return, from the scores and the KL; for P3O, each response's score."""
        config: Ppo = self.config
        scores = torch.tensor([self._shaped_score(sample) for sample in samples], device=self.accelerator.device)
        if not samples:
            rewards = values = mask = kl = torch.zeros(0, 1, device=self.accelerator.device)
        else:
            mask = self.stacked(samples, lambda s: torch.ones(len(s.response)))
            logprobs, reference = (self.stacked(samples, w) for w in (lambda s: s.logprobs, lambda s: s.reference))
            kl = objectives.kl_estimate(logprobs, reference, config.kl)
            values = self.stacked(samples, lambda s: s.values)
            rewards = objectives.shaped(scores, kl, self.beta, mask)
        if self.algorithm == "p3o":
            self.advantages = {s.number: row.sum() for s, row in zip(samples, rewards, strict=True)}
            return
        if config.whiten_rewards:
            rewards = objectives.whitened(rewards, mask, *self._moments(rewards, mask), shift=False)
        lam = config.smoothing
        advantages, returns = objectives.advantages(rewards, values, mask, config.gamma, lam)
        if config.whiten_advantages:
            advantages = objectives.whitened(advantages, mask, *self._moments(advantages, mask))
        self.advantages = {s.number: row[: len(s.response)].cpu() for s, row in zip(samples, advantages, strict=True)}
        self.returns = {s.number: row[: len(s.response)].cpu() for s, row in zip(samples, returns, strict=True)}

    def _shaped_score(self, sample: Sample) -> float:
        score, clip = sample.score, self.config.reward_clip
        if clip is not None:
            score = min(max(score, -clip), clip)
        return score if sample.ended else score - float(self.config.missing_eos_penalty)

    def _moments(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the tokens of all processes."""
        sums = self.world.total(torch.stack([mask.sum(), (values * mask).sum(), (values.square() * mask).sum()]).double())
        mean = sums[1] / sums[0]
        return mean.float(), (sums[2] / sums[0] - mean.square()).clamp(min=0).float()

    def _explained(self, samples: list[Sample]) -> dict[str, float]:
        """The share of the returns' variance that the values, as they were, explain."""
        if self.algorithm == "p3o":
            return {}
        returns = torch.cat([torch.zeros(0), *(self.returns[s.number] for s in samples)])
        errors = returns - torch.cat([torch.zeros(0), *(s.values for s in samples)])
        ones = torch.ones_like(returns)
        place = self.accelerator.device
        variances = [float(self._moments(each.to(place), ones.to(place))[1]) for each in (errors, returns)]
        return {"value/explained": 1 - variances[0] / variances[1]} if variances[1] > 1e-12 else {}

    # ------------------------------------------------------------ losses

    def _policy_loss(self, samples: Sequence[Sample], batch: Batch, sums: Sums) -> Tensor:
        """The policy's loss, summed over tokens; with that of a shared value head."""
        config: Ppo = self.config
        logits, values = self.actor.forward(batch, hidden=self.actor.value_is_shared)
        logprobs = token_logprobs(logits, batch)
        old, advantages = (
            self.stacked(samples, lambda s: s.logprobs),
            self.stacked(samples, lambda s: self.advantages[s.number]),
        )
        if self.algorithm == "reinforce":
            losses = -logprobs * advantages
        elif config.surrogate == "penalty":
            losses = objectives.penalised_surrogate(logprobs, old, advantages, self.penalty)
        else:
            losses, clipped = objectives.clipped_surrogate(logprobs, old, advantages, config.clip)
            sums["clipped"] += float((clipped * batch.response).sum())
        loss = (losses * batch.response).sum()
        sums["loss/policy"] += float(loss.detach())
        sums["kl/update"] += float((objectives.kl_estimate(old, logprobs.detach(), "k3") * batch.response).sum())
        if config.entropy:
            loss = loss - config.entropy * (entropies(logits) * batch.response).sum()
        return loss if values is None else loss + self._value_loss(values, samples, batch, sums)

    def _value_loss(self, values: Tensor, samples: Sequence[Sample], batch: Batch, sums: Sums) -> Tensor:
        old, returns = self.stacked(samples, lambda s: s.values), self.stacked(samples, lambda s: self.returns[s.number])
        losses = objectives.clipped_value_loss(values, old, returns, self.config.value_clip)
        loss = (losses * batch.response).sum()
        sums["loss/value"] += float(loss.detach())
        return loss * float(self.config.value_weight)

    def _pairwise_loss(self, samples: Sequence[Sample], batch: Batch, sums: Sums) -> Tensor:
        logprobs = self.actor.logprobs(batch)
        old = self.stacked(samples, lambda s: s.logprobs)
        scores = torch.stack([self.advantages[sample.number] for sample in samples])
        losses = objectives.pairwise_surrogate(logprobs.sum(1), old.sum(1), scores, self.config.clip)
        sums["kl/update"] += float((objectives.kl_estimate(old, logprobs.detach(), "k3") * batch.response).sum())
        return losses.sum()

    def _natural_step(self, samples: list[Sample], tokens: int, sums: Sums) -> None:
        """TRPO's step of the policy, from all responses at once."""
        pieces = [(piece, self.batch(piece)) for piece in self.pieces(samples)]
        with torch.no_grad():
            before = [self.actor.forward(batch)[0].log_softmax(-1) for _, batch in pieces]

        def over_pieces(own: Callable[[Sequence[Sample], Batch, Tensor], Tensor]) -> Tensor:
            zero = torch.zeros((), device=self.accelerator.device)
            return sum((own(*piece, kept) for piece, kept in zip(pieces, before, strict=True)), zero) / tokens

        def surrogate(some: Sequence[Sample], batch: Batch, _: Tensor) -> Tensor:
            ratio = (self.actor.logprobs(batch) - self.stacked(some, lambda s: s.logprobs)).exp()
            return -(ratio * self.stacked(some, lambda s: self.advantages[s.number])).sum()

        def divergence(_: Sequence[Sample], batch: Batch, kept: Tensor) -> Tensor:
            now = self.actor.forward(batch)[0].log_softmax(-1)
            return ((kept.exp() * (kept - now)).sum(-1) * batch.response).sum()

        step = trpo.natural_step(
            self.actor.policy_parameters,
            lambda: over_pieces(surrogate),
            lambda: over_pieces(divergence),
            self.config.step_kl,
            reduce=self.world.total,
        )
        whole = sum(len(sample.response) for sample in samples)
        sums.update({"kl/update": step.kl * whole, "loss/policy": -step.improvement * whole, "taken": step.taken * whole})

    def _pretrain(self, place: list[int], tokens: int, sums: Sums) -> None:
        """Add the gradient of the pretraining rows' likelihood (arXiv 2203.02155, eq. 2)."""
        ptx = self.config.ptx
        generator = torch.Generator().manual_seed(int(digest([self.part.seed, "ptx", self.step, *place])[:15], 16))
        chosen = torch.randint(len(self.pretraining), (ptx.batch_size,), generator=generator).tolist()
        whole = sum(len(self.pretraining[place][1]) for place in chosen)
        own = [self.pretraining[place] for n, place in enumerate(chosen) if n % self.world.size == self.world.rank]
        for start in range(0, len(own), self.config.batch_size):
            some = own[start : start + self.config.batch_size]
            batch = collate([row[0] for row in some], [row[1] for row in some], self.actor.pad, self.accelerator.device)
            loss = -self.actor.logprobs(batch, temperature=1.0).sum() / whole
            torch.autograd.backward(float(ptx.coefficient) * loss)
            sums["loss/ptx"] += float(loss.detach()) * tokens


def _whole_pairs(samples: list[Sample]) -> list[Sample]:
    """Those whose partner is there too, in order: responses 2i and 2i + 1."""
    there = {sample.number for sample in samples}
    return sorted((s for s in samples if s.number ^ 1 in there), key=lambda s: s.number)


# ---------------------------------------------------------------- pretraining rows


def _pieces(part: Part) -> list[tuple[list[int], list[int]]]:
    """Tokens of the pretraining rows. Answers that are with their prompts longer than `max_length` are left out.

    Raises: UsageError where none is left.
    """
    found = _pretraining(part.config)
    if "text" not in found.rows[0]:
        found = data.fitting(found, ("completion",), part.config.max_length, encoder(part.tokenizer))
    return [_tokens(row, part) for row in found.rows]


def _pretraining(config: Ppo) -> Rows:
    """Rows of text; or of prompts with answers, in the form of the run."""
    assert config.ptx
    source, drop = config.ptx.data, config.bad_rows == "drop"
    if data.is_documents(source):
        return data.documents(source, None, drop)
    return data.answers(source, config.form, None, False, drop)


def _tokens(row: dict[str, Any], part: Part) -> tuple[list[int], list[int]]:
    """What is given and what is to be learnt: of a text, all but its first token; at most `max_length` of them."""
    encode = encoder(part.tokenizer)
    if "text" in row:
        ids = encode("", row["text"])[: part.config.max_length]
        return ids[:1], ids[1:]
    whole, given = encode(row["prompt"], row["completion"]), Encoder(part.tokenizer)(row["prompt"])
    same = next((n for n, (a, b) in enumerate(zip(whole, given, strict=False)) if a != b), min(len(whole), len(given)))
    same = max(1, min(same, len(whole) - 1))
    return whole[:same], whole[same : part.config.max_length]
