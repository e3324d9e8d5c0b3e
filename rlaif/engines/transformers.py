"""Any model that transformers can load, in this process: batched, on a GPU or without one."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from rlaif.engines import whole_choices
from rlaif.engines.batching import BATCH_TOKENS, Batching, Job, apart, device_of, dtype_of
from rlaif.engines.chat import Chat, cannot_load, identified, load_tokenizer
from rlaif.engines.cpu import lay_out
from rlaif.engines.packed import Forest, Piece, Readers, float32_head, packs, to_read
from rlaif.engines.writing import Row, Writer, before_stop, draw, source, stopped
from rlaif.records import Completion, FatalError, Request, UsageError
from rlaif.rl.generate import padded_left

hf: Any = transformers  # its own annotations are partial

MOST_ROWS = 256
"""Prompts that are scored at a time: their logits are over the whole vocabulary."""

PASSES = 4
"""Passes of each reader for one batch: with more, the last one of them is waited for less."""

WRITTEN = (64, 256)
"""Answers that are written at a time, on a CPU and on a GPU."""


@dataclass(frozen=True, slots=True)
class _Job(Job):
    """A request with its prompt's tokens; `leaf` is the last of the pieces that they were cut into."""

    leaf: Piece | None = None

    @property
    def kind(self) -> tuple[bool, int, float, float, tuple[str, ...], bool]:
        r = self.request
        stop, logprob = ((), False) if r.choices else (r.stop, r.logprob)
        return bool(r.choices), r.max_tokens, r.temperature, r.top_p, stop, logprob

    @property
    def size(self) -> int:
        return len(self.ids) + self.request.max_tokens


class TransformersEngine(Batching[_Job]):
    """Runs `model`, a folder or a name on the hub, with transformers.

    Requests that wait at the same time run together, in a thread of their own: what several prompts begin with is computed
    once, and no prompt is padded. A request with choices costs one forward pass over what is its own, in batches of at most
    `max_batch_tokens` tokens; its log-probabilities are over the whole vocabulary. Others are written a token at a time, a
    row that has ended giving its place to the next. A model that does more across tokens than to attend to all that came
    before (with a sliding window, say) is run plainly: in padded batches by length, each generated to its end.

    Each sample is drawn from a source of randomness of its own, so that with a seed it does not depend on the requests
    beside it, except where rounding tips a close draw (rare in fp32, not in bf16). To ask for an answer's log-probability is
    such a rounding in bf16, as the model's last layer is then computed in float32.

    dtype: `bf16` or `fp32`; bf16 unless given, but fp32 on a CPU that has no instructions for it. device: as torch names
    it; a GPU where there is one. trust_remote_code: run the code that comes with a model.

    Raises: UsageError for an unknown dtype or device, FatalError where the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        dtype: str | None = None,
        device: str | None = None,
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        place = device_of(device)
        dtype = dtype or ("bf16" if place.type != "cpu" or _cpu_has_bf16() else "fp32")
        kind = dtype_of(dtype)
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise UsageError(f"max_batch_tokens must be at least 1, not {max_batch_tokens}")
        self.identity: dict[str, Any] = {"engine": "transformers", "dtype": dtype, **self.identified(model)}
        self._max_tokens = max_batch_tokens
        super().__init__(place, apart(_load, model, kind, place, trust_remote_code))
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._chat = Chat(load_tokenizer(model, trust_remote_code), model, limit)
        self.notes = self._chat.notes
        self._ends = ends_of(self._model, self._chat.tokenizer)
        # The model's own defaults (a repetition penalty, top-k …) would change what a request asks for.
        self._model.generation_config = hf.GenerationConfig()
        apart(lay_out, self._model)
        self._read_tokens = max_batch_tokens or BATCH_TOKENS[place.type != "cpu", True]
        self._forest: Forest | None = Forest() if apart(packs, self._model) else None
        self._readers = Readers(place)
        self._writer = Writer(
            self._model,
            self._chat,
            self._readers,
            self._ends,
            WRITTEN[place.type != "cpu"],
            max_batch_tokens or BATCH_TOKENS[place.type != "cpu", False],
            self._read_tokens,
        )
        self._writing: list[_Job] = []

    def identified(self, model: str) -> dict[str, Any]:
        """What tells this model from others, in `identity`."""
        return identified(model)

    async def close(self) -> None:
        await super().close()
        self._readers.close()

    async def complete(self, request: Request) -> Completion:
        if split := self._chat.split_choices(request.choices):
            simple = replace(request, choices=tuple(c for c in request.choices if c not in split))
            return await whole_choices(request, split, self.complete, await self.complete(simple))
        return await super().complete(request)

    # ------------------------------------------------------------ batches

    def _job(self, request: Request, future: asyncio.Future[Completion]) -> _Job:
        ids = self._chat.render(request)
        self._chat.choice_ids(request.choices)  # a wrong choice fails here, not its whole batch
        return _Job(request, ids, future)

    def _batches(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        if self._forest is None:
            yield from super()._batches(jobs)
            return
        planted = self._forest.plant([job.ids for job in jobs])
        self._writer.queue.extend(Row(jobs[n], leaf) for n, leaf in planted if not jobs[n].request.choices)
        self._writing += [job for job in jobs if not job.request.choices]
        scored = deque(replace(jobs[n], leaf=leaf) for n, leaf in planted if jobs[n].request.choices)
        del planted  # pieces live as long as there are requests that go on from them
        while scored:
            batch = [scored.popleft()]
            while scored and self._fit([*batch, scored[0]]):
                batch.append(scored.popleft())
            yield batch

    def _fit(self, batch: list[_Job]) -> bool:
        """Whether so many can be scored in one pass."""
        most = self._read_tokens * (PASSES * self._readers.count if self._readers.count > 1 else 1)
        return len(batch) <= MOST_ROWS and to_read([job.leaf for job in batch if job.leaf]) <= most

    def _full(self, batch: list[_Job]) -> bool:
        tokens = self._max_tokens or BATCH_TOKENS[self._device.type != "cpu", bool(batch[0].request.choices)]
        return len(batch) == self._max_rows or (len(batch) + 1) * max(job.size for job in batch) > tokens

    @property
    def _begun(self) -> list[_Job]:
        return self._writing

    async def _go_on(self) -> None:
        if not self._writing:
            return
        try:
            answers = await self._in_thread(self._write)
        except MemoryError:
            for job in self._writer.halve():
                self._too_long(job)
        except FatalError as error:
            self._writer.clear()
            for job in self._writing:
                job.fail(error)
        else:
            for job, answer in answers:
                job.answer(answer)
        self._writing = [job for job in self._writing if not job.future.done()]

    # ------------------------------------------------------------ in the thread

    @torch.inference_mode()
    def _answer(self, batch: list[_Job]) -> list[Completion]:
        return self._score(batch) if batch[0].request.choices else self._generate(batch)

    def _score(self, batch: list[_Job]) -> list[Completion]:
        """One token each, and how probable each choice was."""
        with float32_head(self._model):
            leaves = [job.leaf for job in batch if job.leaf]
            if leaves:
                logits = self._readers.read(self._model, leaves, self._read_tokens)
            else:
                logits = self._plain_logits([job.ids for job in batch])
        logprobs = logits.log_softmax(-1)
        tokens = draw(logits, [job.request for job in batch], [source(job.request, job.ids) for job in batch])
        answers = []
        for job, row, token in zip(batch, logprobs, tokens, strict=True):
            spellings = self._chat.choice_ids(job.request.choices)
            found = {choice: row[ids].logsumexp(0).item() for choice, ids in spellings.items()}
            answers.append(Completion(self._chat.decode([token]), found, None, "length", None, len(job.ids), 1))
        return answers

    @torch.inference_mode()
    def _write(self) -> list[tuple[Job, Completion]]:
        """Write on at what was begun; the answers that were finished."""
        rows = self._writer.go_on(lambda: self._closed)
        return [(row.job, self._read(row.job, row.ids, row.logprobs if row.job.request.logprob else None)) for row in rows]

    # ------------------------------------------------------------ plainly

    def _plain_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits of the token after each prompt, float32."""
        tokens, mask = padded_left(prompts, self._pad, self._device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = self._model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def _generate(self, batch: list[_Job]) -> list[Completion]:
        request = batch[0].request
        tokens, mask = padded_left([job.ids for job in batch], self._pad, self._device)
        draws, stops = (
            _Draws([job.request for job in batch], [source(job.request, job.ids) for job in batch]),
            _Stops(self._chat, request.stop, tokens.shape[1]),
        )
        settings = hf.GenerationConfig(
            max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=self._ends or None, pad_token_id=self._pad
        )
        with float32_head(self._model) if request.logprob else nullcontext():
            out = self._model.generate(
                tokens,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=[draws],
                stopping_criteria=[stops, lambda ids, _: torch.full((len(ids),), self._closed, device=ids.device)],
            )
        answers = out[:, tokens.shape[1] :].tolist()
        taken = [ids[: stops.lengths.get(row)] for row, ids in enumerate(answers)]
        logprobs = torch.stack(draws.logprobs, 1).tolist() if draws.logprobs else [None] * len(batch)
        return [self._read(*each) for each in zip(batch, taken, logprobs, strict=True)]

    def _read(self, job: Job, ids: list[int], logprobs: list[float] | None) -> Completion:
        """What was generated, up to the first end (padding follows it); `logprobs` are its tokens' log-probabilities."""
        end = next((n for n, token in enumerate(ids) if token in self._ends), None)
        ids = ids if end is None else ids[: end + 1]
        text = self._chat.decode(ids)
        cut = before_stop(text, job.request.stop)
        return Completion(
            text if cut is None else cut,
            finish="length" if end is None and cut is None else "stop",
            prompt_tokens=len(job.ids),
            completion_tokens=len(ids),
            logprob=None if logprobs is None else math.fsum(logprobs[: len(ids)]),
        )

    @property
    def _pad(self) -> int:
        pad = self._chat.tokenizer.pad_token_id
        return min(self._ends, default=0) if pad is None else pad  # any token does, as the mask hides it


class _Draws:
    """Makes of the logits of each step scores whose argmax was drawn.

    Where they are wanted, `logprobs` has for each step the log-probability of each row's token under the logits as they
    were; a row that has ended goes on adding to it.
    """

    def __init__(self, requests: list[Request], sources: list[random.Random]):
        self._requests, self._sources = requests, sources
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, _: Any, logits: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor(draw(logits, self._requests, self._sources), device=logits.device)[:, None]
        if self._requests[0].logprob:
            self.logprobs.append(logits.log_softmax(-1).gather(-1, tokens)[:, 0])
        return torch.full_like(logits, -torch.inf).scatter_(-1, tokens, 0.0)


class _Stops:
    """Ends each row of a generation at the token that completes a stop text; `lengths` are the tokens of rows that it ended.

    ids: the chat's tokens, the answers' from `start` on.
    """

    def __init__(self, chat: Chat, stop: tuple[str, ...], start: int):
        self._chat, self._stop, self._start = chat, stop, start
        self.lengths: dict[int, int] = {}

    def __call__(self, ids: torch.Tensor, _: Any) -> torch.Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for row, answer in enumerate(ids[:, self._start :].tolist() if self._stop else []):
            if row not in self.lengths and stopped(self._chat, answer, self._stop):
                self.lengths[row] = len(answer)
        ended[list(self.lengths)] = True
        return ended


# ---------------------------------------------------------------- loading


def _cpu_has_bf16() -> bool:
    """Whether bf16 runs on this CPU as such: several times as fast as fp32 then, and slower where it is emulated."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _load(model: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FatalError(f"no model folder '{model}'")
    try:
        with quiet():
            loaded = hf.AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
        return loaded.to(device).eval()
    except Exception as error:
        raise cannot_load(model, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    logging = hf.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model may name several, such as the end of a turn and that of a text."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(found - {None})
