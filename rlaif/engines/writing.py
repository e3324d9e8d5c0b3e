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
from rlaif.engines.packed import Piece, Readers, float32_head, forward, to_read
from rlaif.records import Request
from rlaif.rl.generate import drawn

hf: Any = transformers  # its own annotations are partial

STEPS = 16
"""Tokens of each row until what has arrived meanwhile gets its turn."""

ROOM = 256
"""Rows with room for as many times so many tokens stand together."""


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
    def slot_place(self) -> int:
        """The same among its own tokens, without those of `root`."""
        return self.place - (len(self.root.ids) if self.root else 0)

    @property
    def given_up(self) -> bool:
        return self.job.future.done()


class Slots:
    """Rows with room for `room` tokens each; `keys` and `values` are by layer (rows or more, heads, room, width)."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.rows: list[Row] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def put(self, row: Row, keys: list[Tensor], values: list[Tensor]) -> None:
        """Take in a row; keys and values by layer (heads, tokens, width)."""
        slot = len(self.rows)
        for held, given in ((self.keys, keys), (self.values, values)):
            held += [part.new_zeros(0) for part in given[len(held) :]]
            for layer, part in enumerate(given):
                if len(old := held[layer]) == slot:  # room for twice as many; zeros, as what is not seen must be numbers
                    held[layer] = part.new_zeros(2 * slot or 4, len(part), self.room, part.shape[-1])
                    held[layer][:slot] = old if slot else 0
                held[layer][slot, :, : part.shape[1]] = part
        self.rows.append(row)

    def of(self, row: Row) -> tuple[list[Tensor], list[Tensor]]:
        """A row's keys and values, by layer (heads, room, width)."""
        slot = self.rows.index(row)
        return [part[slot] for part in self.keys], [part[slot] for part in self.values]

    def drop(self, row: Row) -> None:
        """Take out a row; the last one takes its place."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        for part in (*self.keys, *self.values) if slot < last else ():
            part[slot] = part[last]
        self.rows[slot] = self.rows[last]
        self.rows.pop()


class Writer:
    """Writes the answers to all rows of `queue`, as many at a time as fit; one that has ended makes room for the next.

    `most_rows` and `most_tokens` bound what is written at a time, room for whole answers included; `most_read` the tokens of
    prompts that each of `readers` reads at a time.
    """

    def __init__(
        self, model: Any, chat: Chat, readers: Readers, ends: list[int], most_rows: int, most_tokens: int, most_read: int
    ) -> None:
        self._model, self._chat, self._readers, self.ends = model, chat, readers, ends
        self._most_rows, self._most_tokens, self._most_read = most_rows, most_tokens, most_read
        self._fit = most_rows
        self.queue: deque[Row] = deque()
        self._new: list[Row] = []
        self._slots: dict[int, Slots] = {}
        self._ended: list[Row] = []

    @property
    def _rows(self) -> list[Row]:
        """Those that are written."""
        return [row for slots in self._slots.values() for row in slots.rows]

    def go_on(self, closed: Callable[[], bool]) -> list[Row]:
        """Write on until a row ends, or for STEPS tokens; the rows that have ended."""
        self._leave([row for row in self._rows if row.given_up])
        while not closed() and (new := self._next()):
            self._begin(new)
        for _ in range(STEPS):
            if self._ended or closed() or not self._slots:
                break
            self._step()
        ended, self._ended = self._ended, []
        return ended

    def halve(self) -> list[Job]:
        """Begin again with half as many rows at a time, after memory ran out; the job for which even that is no help."""
        begun = [row.job for row in dict.fromkeys([*self._rows, *self._new])]  # those just read may already have their slots
        self._new, self._slots = [], {}
        if len(begun) == 1:
            self._fit = self._most_rows
            return begun
        self._fit = max(1, len(begun) // 2)
        self.queue.extendleft(Row(job, Piece(job.ids)) for job in reversed(begun))
        return []

    def clear(self) -> None:
        """Give up all rows."""
        self.queue.clear()
        self._new, self._slots = [], {}

    def _next(self) -> list[Row]:
        """Rows whose prompts are to be read at once."""
        new, most = list[Row](), self._most_read * self._readers.count
        while self.queue:
            together = [*self._rows, *new, self.queue[0]]
            full = len(together) > self._fit or len(together) * max(row.job.size for row in together) > self._most_tokens
            long = to_read([row.leaf for row in (*new, self.queue[0])]) > most
            if (full and len(together) > 1) or (long and new):
                break
            row = self.queue.popleft()
            new += [] if row.given_up else [row]
        return new

    def _begin(self, new: list[Row]) -> None:
        """Read the prompts of rows, and draw their first tokens."""
        self._new = new
        with self._head(new):
            logits = self._readers.read(self._model, [row.leaf for row in new], self._most_read, keep=True)
        for row in new:
            *before, last = row.leaf.path
            row.root = before[0] if before else None
            own = [*before[1:], last]
            keys = [torch.cat(parts, 1) for parts in zip(*(piece.keys for piece in own), strict=True)]
            values = [torch.cat(parts, 1) for parts in zip(*(piece.values for piece in own), strict=True)]
            self._put(row, keys, values)
        self._new = []
        for row in new:
            row.leaf = Piece([])  # what it shares with others is theirs to keep
        self._take(new, logits)

    def _put(self, row: Row, keys: list[Tensor], values: list[Tensor]) -> None:
        room = ((row.slot_place + 1) // ROOM + 1) * ROOM
        self._slots.setdefault(room, Slots(room)).put(row, keys, values)

    def _step(self) -> None:
        """One token more for each row."""
        for slots in list(self._slots.values()):
            for row in [row for row in slots.rows if row.slot_place == slots.room]:
                self._put(row, *slots.of(row))
                slots.drop(row)
        self._slots = {room: slots for room, slots in sorted(self._slots.items()) if slots.rows}
        rows = self._rows
        with self._head(rows):
            logits = forward(
                self._model,
                [row.ids[-1] for row in rows],
                [row.place for row in rows],
                list(range(len(rows))),
                _Writing(list(self._slots.values())),
            )
        self._take(rows, logits)

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

    def _leave(self, ended: list[Row]) -> None:
        for slots in self._slots.values():
            for row in ended:
                if row in slots.rows:
                    slots.drop(row)
        self._slots = {room: slots for room, slots in self._slots.items() if slots.rows}

    def _head(self, rows: list[Row]) -> Any:
        asked = any(row.job.request.logprob for row in rows)
        return float32_head(self._model) if asked else nullcontext()


class _Writing:
    """The attention of a pass over the last token of each row: to what the row begins with, and to its own tokens.

    A product with all places of a row, which lie side by side, takes a CPU a fifth of the time that torch's own kernel takes
    with those in use; to a beginning that rows share, all their queries stand as one matrix.
    """

    def __init__(self, groups: list[Slots]) -> None:
        device, dtype = groups[0].keys[0].device, groups[0].keys[0].dtype
        rows = [row for slots in groups for row in slots.rows]
        self._roots = list(dict.fromkeys(row.root for row in rows if row.root))
        self._parts = []
        for slots in groups:
            last = torch.tensor([row.slot_place for row in slots.rows], device=device)
            hidden = [torch.arange(slots.room, device=device)[None] > last[:, None]]
            for root in self._roots:
                other = torch.tensor([row.root is not root for row in slots.rows], device=device)
                hidden.append(other[:, None].expand(-1, len(root.ids)))
            bias = torch.zeros((), dtype=dtype, device=device).masked_fill(torch.cat(hidden, 1), -torch.inf)
            self._parts.append((slots, torch.arange(len(slots.rows), device=device), last, bias[:, None, None]))

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        grouped = queries * scale
        common = self._shared(grouped, [root.keys[layer].transpose(1, 2) for root in self._roots], 2)
        start, found, rest = 0, [], []
        for slots, own, last, bias in self._parts:
            end = start + len(own)
            slots.keys[layer][own, :, last] = keys[start:end]
            slots.values[layer][own, :, last] = values[start:end]
            scores = grouped[start:end] @ slots.keys[layer][: len(own)].transpose(2, 3)
            shares = (torch.cat([scores, *(part[start:end] for part in common)], -1) + bias).softmax(-1)
            found.append(shares[..., : slots.room].contiguous() @ slots.values[layer][: len(own)])
            rest.append(shares[..., slots.room :])
            start = end
        total = torch.cat(found)
        for part in self._shared(torch.cat(rest), [root.values[layer] for root in self._roots], 1):
            total = total + part
        return total

    def _shared(self, left: Tensor, rights: list[Tensor], dim: int) -> list[Tensor]:
        """What rows have, (rows, heads, queries, n), times what all share, matrices (heads, n, m) joined at `dim`."""
        if not rights:
            return []
        rows, heads, queries, _ = left.shape
        found = left.transpose(0, 1).flatten(1, 2) @ torch.cat(rights, dim)
        return [found.reshape(heads, rows, queries, -1).transpose(0, 1)]
