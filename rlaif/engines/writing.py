"""Answers of several tokens: drawn a token at a time, ended by stop texts, rows joining and leaving while others go on."""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from rlaif.engines.batching import Job
from rlaif.engines.chat import Chat, own_seed
from rlaif.engines.packed import Piece, float32_head, forward, lacking, read
from rlaif.records import Request
from rlaif.rl.generate import drawn

hf: Any = transformers  # its own annotations are partial

STEPS = 16
"""Tokens of each row until what has arrived meanwhile gets its turn."""

ROOM = 128
"""Places for tokens by which each row's grows."""


def source(request: Request, ids: list[int]) -> random.Random:
    """The randomness of one sample: with a seed, the same whatever stands beside it."""
    seed = own_seed(request, ids)
    return random.Random(secrets.randbits(60) if seed is None else seed)


def draw(logits: Tensor, requests: Sequence[Request], sources: Sequence[random.Random]) -> list[int]:
    """A token for each row of logits (rows, vocabulary): the most probable at temperature 0, else one drawn.

    Each row takes one number from its own source.
    """
    tokens = logits.argmax(-1)
    warm = [row for row, request in enumerate(requests) if request.temperature]
    if warm:
        heat = torch.tensor([requests[row].temperature for row in warm], device=logits.device)
        scores = logits[warm] / heat[:, None]
        for top_p in {requests[row].top_p for row in warm} - {1.0}:
            among = [place for place, row in enumerate(warm) if requests[row].top_p == top_p]
            scores[among] = hf.TopPLogitsWarper(top_p)(None, scores[among])
        chances = torch.tensor([sources[row].random() for row in warm], device=logits.device, dtype=torch.float64)
        tokens[warm] = drawn(scores.softmax(-1), chances)
    found: list[int] = tokens.tolist()
    return found


def stopped(chat: Chat, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether the last token of an answer completed a stop text."""
    if not stop:
        return False
    # To decode whole answers at each token would take time with the square of their lengths. A token is a byte at least; the
    # first of a piece of text may be decoded otherwise than within the whole.
    tail = max(len(text.encode("utf-8", "replace")) for text in stop) + 8
    return all(before_stop(chat.decode(part), stop) is not None for part in (ids[-tail:], ids))


def before_stop(text: str, stop: tuple[str, ...]) -> str | None:
    """The text before the stop text that is complete first, of those complete at once the longest; None without any.

    >>> before_stop("one\\n\\ntwo", ("two", "\\n\\n"))
    'one'
    """
    found = [(place + len(s), place) for s in stop if (place := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else None


# ------------------------------------------------------------ rows that come and go


@dataclass(eq=False)
class Row:
    """A job's answer so far, and its tokens' log-probabilities where they are wanted.

    `leaf` is its prompt until that is read, `root` then the beginning that it shares with others, if any.
    """

    job: Job
    leaf: Piece
    root: Piece | None = None
    source: random.Random = field(init=False)
    ids: list[int] = field(init=False)
    logprobs: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.source, self.ids, self.logprobs = source(self.job.request, self.job.ids), [], []

    @property
    def place(self) -> int:
        """Where the last token drawn stands, which the model has not read yet."""
        return len(self.job.ids) + len(self.ids) - 1

    @property
    def shared(self) -> int:
        """How many tokens it begins with that are kept with `root`."""
        return len(self.root.ids) if self.root else 0

    @property
    def given_up(self) -> bool:
        return self.job.future.done()


class Writer:
    """Writes the answers to all rows of `queue`, as many at a time as fit; one that has ended makes room for the next.

    `most_rows` and `most_tokens` bound what is written at a time, room for whole answers included; `most_read` the tokens of
    prompts that are read at a time.
    """

    def __init__(self, model: Any, chat: Chat, ends: list[int], most_rows: int, most_tokens: int, most_read: int) -> None:
        self._model, self._chat, self.ends = model, chat, ends
        self._most_rows, self._most_tokens, self._most_read = most_rows, most_tokens, most_read
        self._fit = most_rows
        self.queue: deque[Row] = deque()
        self._rows: list[Row] = []
        self._ended: list[Row] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def go_on(self, closed: Callable[[], bool]) -> list[Row]:
        """Write on until a row ends, or for STEPS tokens; the rows that have ended."""
        self._leave([row for row in self._rows if row.given_up])
        while (new := self._next()) and not closed():
            self._begin(new)
        for _ in range(STEPS):
            if self._ended or closed() or not self._rows:
                break
            self._step()
        ended, self._ended = self._ended, []
        return ended

    def halve(self) -> list[Job]:
        """Begin again with half as many rows at a time, after memory ran out; the job for which even that is no help."""
        begun = [row.job for row in self._rows]
        self._rows, self._keys, self._values = [], [], []
        if len(begun) == 1:
            self._fit = self._most_rows
            return begun
        self._fit = max(1, len(begun) // 2)
        self.queue.extendleft(Row(job, Piece(job.ids)) for job in reversed(begun))
        return []

    def clear(self) -> None:
        """Give up all rows."""
        self.queue.clear()
        self._rows, self._keys, self._values = [], [], []

    def _begin(self, new: list[Row]) -> None:
        """Read the prompts of rows, and draw their first tokens."""
        self._rows += new  # before the pass, for its memory may not suffice
        with self._head():
            logits = read(self._model, [row.leaf for row in new], keep=True)
        self._settle(new)
        self._take(new, logits)

    def _next(self) -> list[Row]:
        """Rows whose prompts are to be read in one pass."""
        new: list[Row] = []
        while self.queue:
            together = [*self._rows, *new, self.queue[0]]
            full = len(together) > self._fit or len(together) * max(row.job.size for row in together) > self._most_tokens
            long = sum(len(piece.ids) for piece in lacking([row.leaf for row in (*new, self.queue[0])])) > self._most_read
            if (full and len(together) > 1) or (long and new):
                break
            row = self.queue.popleft()
            new += [] if row.given_up else [row]
        return new

    def _settle(self, new: list[Row]) -> None:
        """Put the keys and values of what prompts do not share into the places of their rows, the last ones."""
        first, like, own = len(self._rows) - len(new), new[0].leaf, []
        for row in new:
            *before, last = row.leaf.path
            row.root, own_pieces = (before[0], [*before[1:], last]) if before else (None, [last])
            own.append(own_pieces)
            row.leaf = Piece([])  # what it shares with others is theirs to keep
        self._make_room(like)
        for slot, (row, pieces) in enumerate(zip(new, own, strict=True), first):
            count = len(row.job.ids) - row.shared
            for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
                keys[slot, :, :count] = torch.cat([piece.keys[layer] for piece in pieces], 1)
                values[slot, :, :count] = torch.cat([piece.values[layer] for piece in pieces], 1)

    def _make_room(self, like: Piece | None = None) -> None:
        """Let `_keys` and `_values`, by layer (rows, heads, places, width), have room for the next token of each row."""
        places = max(row.place - row.shared for row in self._rows) + 1
        rows, held = (self._keys[0].shape[0], self._keys[0].shape[2]) if self._keys else (0, 0)
        if len(self._rows) <= rows and places <= held:
            return
        shape = max(len(self._rows), rows), -(-max(places, held) // ROOM) * ROOM
        for name in ("keys", "values"):
            old: list[Tensor] = getattr(self, f"_{name}")
            for layer, part in enumerate(getattr(like, name) if like and not old else [own[0] for own in old]):
                grown = part.new_zeros(shape[0], part.shape[0], shape[1], part.shape[2])
                if rows:
                    grown[:rows, :, :held] = old[layer]
                    old[layer] = grown
                else:
                    old.append(grown)

    def _step(self) -> None:
        """One token more for each row."""
        self._make_room()
        count, room, device = len(self._rows), self._keys[0].shape[2], self._keys[0].device
        slots = torch.arange(count, device=device)
        last = torch.tensor([row.place - row.shared for row in self._rows], device=device)
        roots = list(dict.fromkeys(row.root for row in self._rows if row.root))
        unseen = [torch.arange(room, device=device)[None] > last[:, None]]
        for root in roots:
            other = torch.tensor([row.root is not root for row in self._rows], device=device)
            unseen.append(other[:, None].expand(count, len(root.ids)))
        bias = torch.zeros((), dtype=self._keys[0].dtype, device=device).masked_fill(torch.cat(unseen, 1), -torch.inf)

        def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            held, worth = self._keys[layer], self._values[layer]
            held[slots, :, last] = keys.transpose(0, 1)
            worth[slots, :, last] = values.transpose(0, 1)
            # Queries that share keys stand as rows of one matrix: (rows, heads of keys, queries of each, width). A product with
            # all places, which lie side by side, takes a CPU a fifth of the time of torch's own kernel with those in use.
            heads = len(keys)
            grouped = (queries * scale).transpose(0, 1).reshape(count, heads, -1, queries.shape[-1])
            together = grouped.permute(1, 0, 2, 3).flatten(1, 2)  # to what rows share they stand as one matrix
            common = [together @ root.keys[layer].transpose(1, 2) for root in roots]
            apart = [part.unflatten(1, (count, -1)).transpose(0, 1) for part in common]
            scores = torch.cat([grouped @ held[:count].transpose(2, 3), *apart], -1) + bias[:, None, None]
            own, *parts = scores.softmax(-1).split([room, *(len(root.ids) for root in roots)], -1)
            found = own.contiguous() @ worth[:count]
            for root, part in zip(roots, parts, strict=True):
                of_all = part.transpose(0, 1).flatten(1, 2) @ root.values[layer]
                found = found + of_all.unflatten(1, (count, -1)).transpose(0, 1)
            return found.flatten(1, 2)

        tokens = [row.ids[-1] for row in self._rows]
        with self._head():
            logits = forward(self._model, tokens, [row.place for row in self._rows], list(range(count)), attend)
        self._take(self._rows, logits)

    def _take(self, rows: list[Row], logits: Tensor) -> None:
        """Draw a token for each row, and take out those that end with it."""
        requests = [row.job.request for row in rows]
        tokens = draw(logits, requests, [row.source for row in rows])
        asked = [n for n, request in enumerate(requests) if request.logprob]
        wanted = torch.tensor([[tokens[n]] for n in asked], dtype=torch.long, device=logits.device).reshape(-1, 1)
        for n, found in zip(asked, logits[asked].log_softmax(-1).gather(-1, wanted)[:, 0].tolist(), strict=True):
            rows[n].logprobs.append(found)
        ended = []
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            request = row.job.request
            if token in self.ends or len(row.ids) >= request.max_tokens or stopped(self._chat, row.ids, request.stop):
                ended.append(row)
        self._ended += ended
        self._leave(ended)

    def _leave(self, rows: list[Row]) -> None:
        """Take rows out: the last one takes the place of each."""
        for row in list(rows):
            if row not in self._rows:
                continue
            slot, last = self._rows.index(row), len(self._rows) - 1
            if slot < last:
                for part in (*self._keys, *self._values):
                    part[slot] = part[last]
                self._rows[slot] = self._rows[last]
            self._rows.pop()
        if not self._rows:
            self._keys, self._values = [], []  # their memory

    def _head(self) -> Any:
        asked = any(row.job.request.logprob for row in self._rows)
        return float32_head(self._model) if asked else nullcontext()
