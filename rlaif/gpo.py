"""Group Preference Optimization (Zhao et al., arXiv 2310.11523): a group's scores, predicted from a few that it has given.

A language model turns each prompt with its response into a vector, and stays as it is. A small transformer reads a group's
few scored vectors and the vectors to be scored, and predicts the group's scores of these.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence

from rlaif import reward
from rlaif.engines.batching import BATCH_TOKENS, Batching, Job, device_of, dtype_of
from rlaif.engines.chat import cannot_load, load_tokenizer
from rlaif.engines.transformers import quiet
from rlaif.progress import Progress
from rlaif.records import Completion, FatalError, Request, RowError, UsageError, digest
from rlaif.reward import weights_hash
from rlaif.train.data import Rows, encoder, points
from rlaif.train.run import model_path

FACTS, WEIGHTS = "gpo.json", "model.safetensors"
"""In a module's folder: what it is and whose vectors it reads; and its weights."""

LEAST_SPREAD = 0.05
"""The least standard deviation of a prediction, in standard deviations of the scores; with less, one miss costs too much."""
AT_ONCE = 256
"""Texts that are scored together; none sees another."""


# ---------------------------------------------------------------- texts to vectors


@dataclass(frozen=True)
class Text:
    """The tokens of a prompt with its response, which begins at `start`."""

    ids: list[int]
    start: int


class Embedder:
    """Vectors of responses: the mean of the language model's last hidden states over the response's tokens.

    Over the response's alone, for these have read the prompt, and a mean over both would be much the same for all
    responses to a long prompt. dtype: `bf16` on a GPU and `fp32` on a CPU, unless given.

    Raises: UsageError for an unknown dtype or device; FatalError where the model cannot be loaded.
    """

    def __init__(self, model: str, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False):
        from transformers import AutoModel

        self.device = device_of(device)
        self.dtype = dtype or ("fp32" if self.device.type == "cpu" else "bf16")
        name = model_path(model)
        self._encode = encoder(load_tokenizer(name, trust_remote_code))
        try:
            with quiet():
                loaded: Any = AutoModel.from_pretrained(
                    name, dtype=dtype_of(self.dtype), use_safetensors=True, trust_remote_code=trust_remote_code
                )
        except Exception as error:
            raise cannot_load(model, error) from error
        self._model = loaded.to(self.device).eval()

    def text(self, prompt: Any, response: Any) -> Text:
        """Of texts, or of lists of messages."""
        ids = self._encode(prompt, response)
        without = self._encode(prompt, [{**response[0], "content": ""}] if isinstance(response, list) else "")
        shared = next((n for n, (one, two) in enumerate(zip(ids, without, strict=False)) if one != two), len(without))
        return Text(ids, min(shared, len(ids) - 1))

    @torch.no_grad()
    def batch(self, texts: Sequence[Text]) -> Tensor:
        """(texts, dim), float32, on the model's device."""
        ids = [torch.tensor(text.ids, device=self.device) for text in texts]
        mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
        states = self._model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask, use_cache=False)
        places = torch.arange(mask.shape[1], device=self.device)
        starts = torch.tensor([[text.start] for text in texts], device=self.device)
        counted = (mask.bool() & (places >= starts)).unsqueeze(-1)
        hidden: Tensor = states.last_hidden_state.float()
        return hidden.masked_fill(~counted, 0).sum(1) / counted.sum(1)

    def all(self, texts: Sequence[Text]) -> Tensor:
        """(texts, dim), on the CPU; those of similar lengths are read together."""
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n].ids))
        most = BATCH_TOKENS[self.device.type != "cpu", True]
        found: dict[int, Tensor] = {}
        with Progress(len(texts), "embedding") as progress:
            while order:
                size = max(1, most // len(texts[order[0]].ids))
                some, order = order[:size], order[size:]
                found |= zip(some, self.batch([texts[n] for n in some]).cpu(), strict=True)
                progress.update(len(found), "")
        return torch.stack([found[n] for n in range(len(texts))])


# ---------------------------------------------------------------- the module


class GroupModule(nn.Module):
    """A transformer over points: tokens (x, y) of what a group has scored, and (x, 0) of what it might (§3).

    A point's token is its vector x with its score y; there are no positions, so the order of points does not matter. Every
    token attends to the scored points and to itself, and to nothing else: what is to be predicted does not see its like.
    The prediction is a normal distribution. The vectors' and scores' mean and deviation, which they are scaled by, are set
    by `scale`. Raises: UsageError where the scores are all the same.
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(self, dim: int, width: int, layers: int, heads: int):
        super().__init__()
        self.heads = heads
        self.token = nn.Sequential(nn.Linear(dim + 1, width), nn.ReLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        for name, shape in (("x_mean", (dim,)), ("x_std", (dim,)), ("y_mean", ()), ("y_std", ())):
            self.register_buffer(name, torch.zeros(shape) if name.endswith("mean") else torch.ones(shape))

    def scale(self, x: Tensor, y: Tensor) -> None:
        """Take the measure of vectors (items, dim) and scores (scores,)."""
        self.x_mean.copy_(x.mean(0))
        deviation = x.std(0, correction=0)
        self.x_std.copy_(torch.where(deviation > 1e-6, deviation, 1.0))
        self.y_mean.copy_(y.mean())
        self.y_std.copy_(y.std(correction=0))
        if not self.y_std > 1e-8:
            raise UsageError("column 'score': every row has the same; there is nothing to learn")

    def forward(self, context_x: Tensor, context_y: Tensor, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, t) of the scores of x (B, t, dim), from context (B, m, dim) and (B, m).

        `counts` (B, m): false for what only fills up the context.
        """
        tasks, shown, asked = *context_y.shape, x.shape[1]
        vectors = (torch.cat([context_x, x], 1) - self.x_mean) / self.x_std
        scores = torch.cat([(context_y - self.y_mean) / self.y_std, context_y.new_zeros(tasks, asked)], 1)
        seen = torch.zeros(tasks, shown + asked, dtype=torch.bool, device=x.device)
        seen[:, :shown] = True if counts is None else counts
        allowed = seen.unsqueeze(1) | torch.eye(shown + asked, dtype=torch.bool, device=x.device)
        tokens = self.token(torch.cat([vectors, scores.unsqueeze(-1)], -1))
        states = self.encoder(tokens, mask=~allowed.repeat_interleave(self.heads, 0))
        mean, spread = self.head(states[:, shown:]).unbind(-1)
        return mean * self.y_std + self.y_mean, (LEAST_SPREAD + softplus(spread)) * self.y_std

    @torch.no_grad()
    def predict(self, context_x: Tensor, context_y: Tensor, x: Tensor) -> Tensor:
        """A group's mean scores (t,) of x (t, dim), from its examples (m, dim) and (m,), of which there may be none."""
        context = context_x.unsqueeze(0), context_y.unsqueeze(0)
        return torch.cat([self(*context, some.unsqueeze(0))[0][0] for some in torch.split(x, AT_ONCE)])


# ---------------------------------------------------------------- folders


@dataclass(frozen=True)
class Folder:
    """A module's folder. `embedder`: the language model, with the hash of its weights where it is a folder."""

    path: Path
    name: str
    embedder: str
    embedder_weights: str | None
    dtype: str | None
    form: Literal["plain", "conversational"]
    max_length: int
    shots: int
    dim: int
    width: int
    layers: int
    heads: int
    weights: str

    def module(self) -> GroupModule:
        """Raises: UsageError for weights that are not those that were trained."""
        if weights_hash(self.path) != self.weights:
            raise UsageError(f"{self.path}: the weights are not those that were trained here: their hash differs")
        module = GroupModule(self.dim, self.width, self.layers, self.heads)
        module.load_state_dict(load_file(self.path / WEIGHTS))
        return module.eval()

    def as_reward(self, group: str) -> reward.Folder:
        """As a reward model whose one head is a group."""
        conversational = self.form == "conversational"
        return reward.Folder(self.path, self.name, (group,), conversational, self.max_length, (), "mean", self.weights)


def read_folder(path: Path) -> Folder:
    """What a folder that `rlaif train gpo` made tells of itself. Raises: UsageError for another folder."""
    facts = path / FACTS
    if not facts.is_file():
        inside = f"; did you mean {path / 'model'}?" if (path / "model" / FACTS).is_file() else ""
        raise UsageError(f"{path}: no {FACTS} in it, as `rlaif train gpo` writes it{inside}")
    try:
        return Folder(path=path, **json.loads(facts.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{facts}: not as `rlaif train gpo` writes it ({type(error).__name__}: {error})") from error


def local_weights(model: str) -> str | None:
    """The hash of a language model's weights; None for one that is no folder here."""
    path = Path(model_path(model))
    return weights_hash(path) if path.is_dir() else None


def few_shots(source: str, group: str, folder: Folder) -> Rows:
    """A group's examples: a file's rows whose `group` it is; all of them where there is no such column.

    Raises: UsageError for a file that is none of `prompt`, `response`, `score`, or has no rows of the group.
    """
    found = points(source, folder.form, grouped=False)
    own = [row for row in found.rows if row["group"] in ("", group)]
    if not own:
        names = ", ".join(sorted({row["group"] for row in found.rows})[:10])
        raise UsageError(f"{source}: no row of the group '{group}'; there are: {names}")
    return Rows(source, own)


# ---------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True)
class _Job(Job):
    """A request with its tokens."""

    text: Text


class GroupEngine(Batching[_Job]):
    """Scores responses as a group would, which has given the scores of `shots`; answers as reward models do.

    Raises: UsageError for an embedder or weights that are not those of the training, or examples that are too long;
    FatalError where the language model cannot be loaded.
    """

    def __init__(
        self,
        folder: Folder,
        shots: Rows,
        embedder: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ):
        model = embedder or folder.embedder
        here = local_weights(model)
        if folder.embedder_weights and here != folder.embedder_weights:
            raise UsageError(
                f"{model}: not the model whose vectors {folder.name} was trained on: its weights differ (--embedder)"
            )
        module = folder.module()
        self._embedder = Embedder(model, dtype or folder.dtype, device, trust_remote_code)
        self._folder, place = folder, self._embedder.device
        self.identity: dict[str, Any] = {
            "engine": "gpo",
            "model": folder.name,
            "weights": folder.weights,
            "embedder": here or model,
            "dtype": self._embedder.dtype,
            "examples": digest(shots.rows),
        }
        self.notes = [f"{len(shots.rows)} examples, of {shots.source}"]
        if len(shots.rows) > folder.shots:
            self.notes.append(f"{folder.name} was trained with {folder.shots} examples at most")
        self._context_y = torch.tensor([row["score"] for row in shots.rows], device=place)
        try:
            texts = [self._text(row["prompt"], row["response"]) for row in shots.rows]
        except RowError as error:
            raise UsageError(f"{shots.source}: {error}") from error
        self._context_x = self._embedder.all(texts).to(place)
        super().__init__(place, module.to(place))

    def _text(self, prompt: Any, response: Any) -> Text:
        text = self._embedder.text(prompt, response)
        if len(text.ids) > self._folder.max_length:
            most = self._folder.max_length
            raise RowError(f"prompt and response are {len(text.ids)} tokens, {self._folder.name} was trained on {most}")
        return text

    def _job(self, request: Request, future: asyncio.Future[Completion]) -> _Job:
        *turns, response = request.messages
        plain = self._folder.form == "plain"
        text = self._text(turns[0]["content"], response["content"]) if plain else self._text(turns, [response])
        return _Job(request, text.ids, future, text)

    def _full(self, batch: list[_Job]) -> bool:
        tokens = BATCH_TOKENS[self._device.type != "cpu", True]
        return len(batch) == self._max_rows or (len(batch) + 1) * batch[0].size > tokens

    def _answer(self, batch: list[_Job]) -> list[Completion]:
        vectors = self._embedder.batch([job.text for job in batch])
        scores = self._model.predict(self._context_x, self._context_y, vectors).tolist()
        return [Completion(json.dumps([[score]]), prompt_tokens=len(job.ids)) for job, score in zip(batch, scores, strict=True)]


def embed(model: str, config: Any, rows: Iterable[tuple[Any, Any]]) -> Tensor:
    """The vectors (rows, dim) of prompts with their responses, by a training run's settings."""
    settings = None if config.dtype == "auto" else config.dtype, None if config.device == "auto" else config.device
    embedder = Embedder(model, *settings, config.trust_remote_code)
    vectors = embedder.all([embedder.text(*row) for row in rows])
    if not vectors.isfinite().all():
        raise FatalError(f"{model}: a text's vector is not finite; another dtype may help")
    return vectors
