"""Time of a PPO step against the sum of its parts, and how much of a slow judge's time is hidden: ratios, in one run.

    python benchmarks/ppo_step.py [--model embedded] [--steps 4] [--latency 0.5] [--json FILE]

The parts, on the very prompts, seeds and responses of each step: generation, the passes that score what was drawn
(log-probabilities of policy and reference, values), and in each pass over the responses forward and backward of policy and
value network. Bare loops over the same networks, without judge, credit, optimizer, figures and files. The judge is a function
that sleeps `--latency` seconds for each batch of responses; what is hidden is the share of that for which a step does not wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlaif.records import digest
from rlaif.rl.config import Ppo
from rlaif.rl.ppo import PpoLoop
from rlaif.rl.step import Clock, Rolled, Sample
from rlaif.train.run import run

JUDGE = """
import asyncio

async def judge(prompts, responses):
    await asyncio.sleep({latency} if responses else 0)
    return [len(set(response)) / 50 for response in responses]
"""


def settings(folder: Path, name: str, latency: float, given: argparse.Namespace, **changes: Any) -> Ppo:
    (folder / f"{name}.py").write_text(JUDGE.format(latency=latency))
    prompts = folder / "prompts.jsonl"
    asked = [f"Tell me in a few sentences about the number {n}, and why somebody might like it." for n in range(64)]
    prompts.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in asked))
    common = {
        "model": given.model,
        "data": str(prompts),
        "out": str(folder / name),
        "reward": [{"kind": "function", "function": f"{folder / name}.py:judge"}],
        "rollouts": given.rollouts,
        "generate_batch": given.rollouts // 2,
        "max_new_tokens": given.tokens,
        "max_length": 256,
        "batch_size": 4,
        "accumulate": given.rollouts // 4,
        "updates": 1,
        "max_steps": given.steps + 1,
        "learning_rate": 1e-6,
        "lora": {"r": 8},
        "dtype": given.dtype,
        "device": "cpu" if not torch.cuda.is_available() else "auto",
    }
    return Ppo.model_validate({**common, **changes})


def steps(config: Ppo) -> list[dict[str, Any]]:
    """The metrics of a run's steps, but for the first, in which everything warms up."""
    run("ppo", config)
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()][1:]


# ---------------------------------------------------------------- the parts


class Parts:
    """Runs each step's parts once more by themselves, beside the run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._generation = 0.0

    def spied(self, roll: Callable[..., Rolled], learn: Callable[..., dict[str, float]]) -> tuple[Any, Any]:
        def rolled(loop: PpoLoop, step: int, clock: Clock) -> Rolled:
            found = roll(loop, step, clock)
            begun = time.monotonic()
            self._generate(loop, found.samples, step)
            self._generation = time.monotonic() - begun
            clock.begun += self._generation  # no part of the step
            return found

        def learnt(loop: PpoLoop, samples: list[Sample], clock: Clock) -> dict[str, float]:
            loop._credit(samples)
            begun = time.monotonic()
            self._pass(loop, samples)
            seconds = time.monotonic() - begun
            loop.optimizer.zero_grad(set_to_none=True)
            clock.begun += seconds
            self.seconds.append(self._generation + seconds)
            return learn(loop, samples, clock)

        return rolled, learnt

    def _generate(self, loop: PpoLoop, samples: list[Sample], step: int) -> None:
        config = loop.config
        for start in range(0, len(samples), config.generate_batch):
            some = samples[start : start + config.generate_batch]
            seeds = [int(digest([config.seed, step, sample.number])[:15], 16) for sample in some]
            prompts = [sample.prompt for sample in some]
            loop.sampler.sample(prompts, seeds, config.max_new_tokens, config.temperature, loop.ends)

    def _pass(self, loop: PpoLoop, samples: list[Sample]) -> None:
        actor = loop.actor
        ordered = sorted(samples, key=lambda s: len(s.prompt) + len(s.response))
        for start in range(0, len(ordered), 2 * loop.config.batch_size):
            batch = loop.batch(ordered[start : start + 2 * loop.config.batch_size])
            with torch.no_grad():
                actor.logprobs(batch)
                actor.reference_logprobs(batch)
                with actor.valuing():
                    actor.values(batch)
        for _ in range(loop.config.passes):
            for start in range(0, len(ordered), loop.config.batch_size):
                batch = loop.batch(ordered[start : start + loop.config.batch_size])
                torch.autograd.backward(actor.logprobs(batch).sum())
                with actor.valuing():
                    torch.autograd.backward(actor.values(batch).sum())


def overhead(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    parts, own = Parts(), (PpoLoop.roll, PpoLoop.learn)
    PpoLoop.roll, PpoLoop.learn = parts.spied(*own)  # type: ignore[method-assign]
    try:
        whole = [line["time/step"] for line in steps(settings(folder, "overhead", 0.0, given))]
    finally:
        PpoLoop.roll, PpoLoop.learn = own  # type: ignore[method-assign]
    ratios = [step / part for step, part in zip(whole, parts.seconds[1:], strict=True)]
    found = {"step_s": statistics.median(whole), "parts_s": statistics.median(parts.seconds[1:])}
    return {**found, "ratio": statistics.median(ratios), "ratios": ratios}


def hidden(folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    cases = {"on policy": {}, "on policy, one batch": {"generate_batch": given.rollouts}, "a step ahead": {"ahead": 1}}
    for name, changes in cases.items():
        place = name.replace(" ", "_").replace(",", "")
        fast = statistics.median(s["time/step"] for s in steps(settings(folder, f"{place}_fast", 0.0, given, **changes)))
        lines = steps(settings(folder, f"{place}_slow", given.latency, given, **changes))
        slow = statistics.median(line["time/step"] for line in lines)
        waited = statistics.median(line["time/waiting"] * line["time/step"] for line in lines)
        one = {"case": name, "fast_s": fast, "slow_s": slow, "waited_s": waited}
        found.append({**one, "hidden": 1 - waited / given.latency, "hidden_by_difference": 1 - (slow - fast) / given.latency})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        one = overhead(Path(place), given)
        print(f"a step {one['step_s']:.2f} s, its parts {one['parts_s']:.2f} s: ratio {one['ratio']:.3f}", flush=True)
        several = hidden(Path(place), given)
    for case in several:
        print(
            f"{case['case']:22} step {case['fast_s']:.2f} s, with a judge of {given.latency:g} s {case['slow_s']:.2f} s; "
            f"waited {case['waited_s']:.3f} s: {case['hidden']:.0%} hidden"
        )
    if given.json:
        told = {**vars(given), "json": None, "overhead": one, "hidden": several}
        given.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
