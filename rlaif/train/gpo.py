"""Training of a few-shot group preference module (`rlaif.gpo`): by groups, each of which is a task to learn from examples.

Steps are made as the paper has it (Zhao et al., arXiv 2310.11523, §3): groups are drawn, of each some scored points and some to
be predicted, and the loss is the negative log-likelihood of the latter under a normal distribution each. Here no points at all
may be shown, too, so that the module can be measured without any.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler

from rlaif.data import atomic
from rlaif.gpo import FACTS, WEIGHTS, GroupModule, embed, local_weights
from rlaif.records import UsageError, digest
from rlaif.reward import weights_hash
from rlaif.rl.loop import STATE, State
from rlaif.runner import StoppedError
from rlaif.train import data
from rlaif.train.checkpoints import Interrupt, clear, in_order, newest, seal
from rlaif.train.config import Gpo
from rlaif.train.data import Rows, encoder
from rlaif.train.record import Recorder
from rlaif.train.run import Part, Run, put_in_place

VECTORS = "vectors.safetensors"
"""In a part's folder: the vectors of all its texts."""

# ---------------------------------------------------------------- rows


def read(config: Gpo) -> tuple[Rows, Rows | None]:
    """Rows of the groups to learn from, and of those held out."""
    found, held = _read(config, config.data, config.limit), None
    names = list(dict.fromkeys(row["group"] for row in found.rows))
    if config.eval:
        held = _read(config, config.eval, None)
        both = sorted({row["group"] for row in held.rows} & set(names))
        if both:
            raise UsageError(f"{config.eval}: the group '{both[0]}' is in {config.data} too: held-out groups must be others")
    elif config.eval_share:
        drawn = sorted(names, key=lambda name: digest([config.seed, name]))
        apart = set(drawn[: max(1, round(config.eval_share * len(drawn)))])
        held = replace(found, rows=[row for row in found.rows if row["group"] in apart], dropped=Counter())
        found = replace(found, rows=[row for row in found.rows if row["group"] not in apart])
    if len({row["group"] for row in found.rows}) < 2:
        raise UsageError(f"{config.data}: column 'group': at least two groups to learn from are needed, beside those held out")
    return found, held


def _read(config: Gpo, source: str, limit: int | None) -> Rows:
    found = data.points(source, config.form, limit, config.bad_rows == "drop")
    twice = [key for key, count in Counter((row["group"], _item(row)) for row in found.rows).items() if count > 1]
    if twice:
        raise UsageError(
            f"{source}: the group '{twice[0][0]}' has one response to a prompt twice; `rlaif build groups` takes their mean"
        )
    return _whole(found)


def _item(row: Mapping[str, Any]) -> str:
    return digest([row["prompt"], row["response"]])


def _whole(found: Rows) -> Rows:
    """Without groups of a single row, which leave nothing to predict; these are counted.

    Raises: UsageError where none is left.
    """
    sizes = Counter(row["group"] for row in found.rows)
    kept = [row for row in found.rows if sizes[row["group"]] > 1]
    if not kept:
        raise UsageError(f"{found.source}: column 'group': every group has a single row")
    dropped = Counter(found.dropped)
    dropped["of groups with a single row"] += len(found.rows) - len(kept)
    return replace(found, rows=kept, dropped=dropped)


def fitting(found: Rows, config: Gpo, tokenizer: Any) -> Rows:
    return _whole(data.fitting(found, ("response",), config.max_length, encoder(tokenizer)))


# ---------------------------------------------------------------- points


@dataclass(frozen=True)
class Points:
    """What groups hold of items: of each group its name, the items (n,) that it scored, and their scores (n,).

    `x` (items, dim): the items' vectors, and `prompts` (items,) which of them answer one prompt.
    """

    x: Tensor
    prompts: Tensor
    names: list[str]
    items: list[Tensor]
    scores: list[Tensor]


def items(*parts: Rows | None) -> dict[str, tuple[Any, Any]]:
    """Each prompt with a response once, in the order of the rows, by its digest."""
    return {_item(row): (row["prompt"], row["response"]) for rows in parts if rows for row in rows.rows}


def points(rows: Rows, known: Mapping[str, tuple[Any, Any]], x: Tensor) -> Points:
    """Rows as points, x being the vectors of the items `known`."""
    place = {item: n for n, item in enumerate(known)}
    names = list(dict.fromkeys(row["group"] for row in rows.rows))
    own = {name: [row for row in rows.rows if row["group"] == name] for name in names}
    prompts: dict[str, int] = {}
    numbers = [prompts.setdefault(digest(prompt), len(prompts)) for prompt, _ in known.values()]
    return Points(
        x,
        torch.tensor(numbers),
        names,
        [torch.tensor([place[_item(row)] for row in own[name]]) for name in names],
        [torch.tensor([row["score"] for row in own[name]]) for name in names],
    )


def of_part(part: Part) -> tuple[Points, Points | None]:
    """The points of a part's rows; their vectors are computed once, and kept in its folder."""
    known, path = items(part.train, part.held), part.folder / VECTORS
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = embed(part.model, part.config, known.values())
        with atomic(path) as temporary:
            save_file({"x": found}, temporary)
    x = load_file(path)["x"]
    return points(part.train, known, x), points(part.held, known, x) if part.held else None


# ---------------------------------------------------------------- learning


def trainer(part: Part) -> Learner:
    return Learner(part, *of_part(part))


class Learner:
    """A run, from its newest checkpoint to its end. What a step draws depends on the seed and its number alone.

    Raises: UsageError in one of several processes, for it is not worth that, and where all scores are the same.
    """

    def __init__(self, part: Part, train: Points, held: Points | None) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("gpo trains in one process: start it without accelerate launch")
        self.part, self.train, self.held = part, train, held
        config = self.config = part.config
        self.accelerator = Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available())
        self.out, self.folder = Path(config.out), part.folder / "checkpoints"
        with torch.random.fork_rng():
            torch.manual_seed(part.seed)
            self.model = GroupModule(train.x.shape[1], config.width, config.layers, config.heads)
        self.model.scale(train.x[torch.unique(torch.cat(train.items))], torch.cat(train.scores))
        self.model.to(self.accelerator.device)
        self.steps = config.max_steps or max(1, math.ceil(config.epochs * len(train.names) / config.batch_size))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        self.scheduler = get_scheduler(config.scheduler, self.optimizer, math.ceil(config.warmup * self.steps), self.steps)
        self.step = 0
        self.unlogged: list[dict[str, float]] = []

    def run(self, recorder: Recorder, interrupt: Interrupt) -> int:
        """All steps, or those that are left; how many there are. Raises: StoppedError where it was interrupted."""
        self._resume()
        recorder.on_train_begin(None, self._told(), None)
        while self.step < self.steps:
            self.unlogged.append(self.learn())
            self._tell(recorder)
            if interrupt.stopped or self.step % (self.config.save_steps or -(-self.steps // 10)) == 0:
                self._save()
            if interrupt.stopped and self.step < self.steps:
                raise StoppedError(f"{self.out}: stopped at step {self.step}; --resume goes on from there")
        return self.step

    def learn(self) -> dict[str, float]:
        """Make a step; its figures."""
        rate = self.optimizer.param_groups[0]["lr"]
        context_x, context_y, counts, x, y, asked = (part.to(self.accelerator.device) for part in self._drawn())
        mean, spread = self.model(context_x, context_y, x, counts)
        loss = gaussian_nll_loss(mean[asked], y[asked], spread[asked].square(), full=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        error = float((mean - y)[asked].detach().square().mean())
        return {"loss": float(loss.detach()), "mse": error, "grad_norm": float(norm), "learning_rate": rate}

    def _drawn(self) -> Iterator[Tensor]:
        """A step's groups: of each, points to show and others to predict, filled up to equal numbers.

        Context x (B, m, dim), y (B, m) and which of it counts (B, m), then the same of what is to be predicted.
        """
        draw = torch.Generator().manual_seed(int(digest([self.part.seed, self.step])[:15], 16))
        shown: list[tuple[Tensor, Tensor]] = []
        asked: list[tuple[Tensor, Tensor]] = []
        for group in torch.randint(len(self.train.names), (self.config.batch_size,), generator=draw).tolist():
            own, scores = self.train.items[group], self.train.scores[group]
            count = int(torch.randint(min(self.config.shots, len(own) - 1) + 1, (), generator=draw))
            order = torch.randperm(len(own), generator=draw)[: count + self.config.targets]
            shown.append((own[order[:count]], scores[order[:count]]))
            asked.append((own[order[count:]], scores[order[count:]]))
        for some in (shown, asked):
            places, values = (pad_sequence(list(part), batch_first=True) for part in zip(*some, strict=True))
            counts = pad_sequence([torch.ones(len(own), dtype=torch.bool) for own, _ in some], batch_first=True)
            yield from (self.train.x[places], values, counts)

    def _tell(self, recorder: Recorder) -> None:
        found: dict[str, float] = {}
        if self.held and self.config.eval_steps and self.step % self.config.eval_steps == 0:
            told = measure(self.model, self.train, self.held, self.config)["predictions"]["with examples"]
            found = {f"eval_{name}": value for name, value in told.items() if value is not None}
        if found or self.step % self.config.log_steps == 0 or self.step in (1, self.steps):
            means = {name: fmean(one[name] for one in self.unlogged) for name in self.unlogged[0]}
            self.unlogged.clear()
            recorder.on_log(None, self._told(), None, means | found)
        recorder.on_step_end(None, self._told(), None)

    def _told(self) -> State:
        return State(self.steps, self.step, self.step * self.config.batch_size / len(self.train.names), True)

    def _save(self) -> None:
        target = self.folder / f"checkpoint-{self.step}"
        if newest(self.folder) == target:
            return
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        state = {
            "step": self.step,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "last_epoch": self.scheduler.last_epoch,
            "unlogged": self.unlogged,
        }
        torch.save(state, target / STATE)
        seal(target)
        for old in in_order(self.folder)[: -self.config.keep]:
            shutil.rmtree(old)

    def _resume(self) -> None:
        found = newest(self.folder)
        clear(self.folder)
        if found is None:
            return
        state = torch.load(found / STATE, map_location="cpu", weights_only=True)
        self.step, self.scheduler.last_epoch = state["step"], state["last_epoch"]
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.unlogged = state["unlogged"]

    def save_model(self, folder: Path) -> None:
        """Write the module's weights; the folder appears whole or not at all."""
        target = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        save_file({name: own.cpu().contiguous() for name, own in self.model.state_dict().items()}, target / WEIGHTS)
        put_in_place(target, folder)


# ---------------------------------------------------------------- measuring


def finish(run: Run, out: Path) -> dict[str, Any]:
    """Write what a scorer has to know beside the module, and measure it on the groups held out."""
    config: Gpo = run.config
    train, held = run.rows["stage-1"]
    known, x = items(train, held), load_file(run.out / "parts" / "train" / VECTORS)["x"]
    facts = {
        "name": run.out.name,
        "embedder": config.model,
        "embedder_weights": local_weights(config.model),
        "dtype": None if config.dtype == "auto" else config.dtype,
        "form": "conversational" if train.conversational else "plain",
        "dim": x.shape[1],
        "weights": weights_hash(out),
        **{name: getattr(config, name) for name in ("max_length", "shots", "width", "layers", "heads")},
    }
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if held is None:
        return {}
    module = GroupModule(x.shape[1], config.width, config.layers, config.heads).eval()
    module.load_state_dict(load_file(out / WEIGHTS))
    return measure(module, points(train, known, x), points(held, known, x), config)


def measure(module: GroupModule, train: Points, held: Points, config: Gpo) -> dict[str, Any]:
    """How well the scores of groups that were not learnt from are predicted.

    Of each group `eval_draws` times `shots` points (half of its points where it has fewer) are shown, and the others predicted:
    `with examples`; `without examples`, by the module alone; by `other groups`, the mean of the training groups' scores of the
    item, or of the item nearest to it by the cosine of vectors where they have none; and by the `examples' mean`.
    Each has `mse`, `correlation` (Pearson's, where predictions differ), and `accuracy`: of pairs with different
    scores, the share whose predictions are in the same order, equal ones counting half: pairs of responses to one prompt,
    or any where held-out groups have no such pairs. All are means over draws, then over groups; `groups` tells each group's.
    """
    others = _by_others(module, train, held)
    one_prompt = any(len(own) > len(torch.unique(held.prompts[own])) for own in held.items)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, own, scores in zip(held.names, held.items, held.scores, strict=True):
        shots = min(config.shots, len(own) // 2)
        draws = [_draw(len(own), digest([config.seed, name, n])) for n in range(config.eval_draws)]
        told: dict[str, list[dict[str, float | None]]] = {}
        for order in draws:
            shown, rest = order[:shots], order[shots:]
            prompts = held.prompts[own[rest]] if one_prompt else torch.zeros_like(rest)
            for how, predicted in {
                "with examples": _predict(module, held.x[own[shown]], scores[shown], held.x[own[rest]]),
                "without examples": _predict(module, held.x[:0], scores[:0], held.x[own[rest]]),
                "other groups": others[own[rest]],
                "examples' mean": scores[shown].mean().expand(len(rest)),
            }.items():
                told.setdefault(how, []).append(figures(predicted, scores[rest], prompts))
        found[name] = {how: _means(some) for how, some in told.items()}
    return {
        "held_out_groups": len(held.names),
        "examples": config.shots,
        "pairs": "responses to one prompt" if one_prompt else "any two responses",
        "predictions": {how: _means([own[how] for own in found.values()]) for how in next(iter(found.values()))},
        "groups": [{"name": name, **own} for name, own in found.items()],
    }


def _draw(size: int, seed: str) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(seed[:15], 16)))


def _predict(module: GroupModule, *task: Tensor) -> Tensor:
    device = module.y_mean.device
    return module.predict(*(part.to(device) for part in task)).cpu()


def _by_others(module: GroupModule, train: Points, held: Points) -> Tensor:
    """Of each item (items,) the mean of the training groups' scores, or that of the nearest item that has any."""
    places, values = torch.cat(train.items), torch.cat(train.scores)
    count = torch.zeros(len(train.x)).index_add(0, places, torch.ones_like(values))
    mean = torch.zeros(len(train.x)).index_add(0, places, values) / count.clamp(min=1)
    scored = count.nonzero().squeeze(1)
    scaled = torch.nn.functional.normalize((train.x - module.x_mean.cpu()) / module.x_std.cpu(), dim=1)
    asked = torch.unique(torch.cat(held.items))
    unknown = asked[count[asked] == 0]
    for some in torch.split(unknown, 1024):
        mean[some] = mean[scored[(scaled[some] @ scaled[scored].T).argmax(1)]]
    return mean


def figures(predicted: Tensor, scores: Tensor, prompts: Tensor) -> dict[str, float | None]:
    """`mse`, `correlation` and `accuracy` of predictions (n,) of scores (n,), None where they are not defined.

    Pairs are of one of the `prompts` (n,).
    """
    centred = predicted - predicted.mean(), scores - scores.mean()
    norm = float(centred[0].norm() * centred[1].norm())
    differ = all(float(own.min()) < float(own.max()) for own in (predicted, scores))
    first, second = torch.triu_indices(len(scores), len(scores), 1)
    agrees = ((predicted[first] - predicted[second]).sign() * (scores[first] - scores[second]).sign() + 1) / 2
    counts = (prompts[first] == prompts[second]) & (scores[first] != scores[second])
    return {
        "mse": float((predicted - scores).square().mean()),
        "correlation": float((centred[0] * centred[1]).sum()) / norm if differ and norm else None,
        "accuracy": float(agrees[counts].mean()) if counts.any() else None,
    }


def _means(some: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over those that have it."""
    known = {name: [value for one in some if (value := one[name]) is not None] for name in some[0]}
    return {name: fmean(values) if values else None for name, values in known.items()}
