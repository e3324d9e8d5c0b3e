"""Forward passes without padding: texts stand one behind the other, and what several of them begin with is computed once."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Barrier
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlaif.engines import cpu

hf: Any = transformers  # its own annotations are partial

SHARED = 16
"""Tokens that several prompts must begin with, or go on with, for it to be worth computing them once."""

KEPT = 4
"""Beginnings that are kept for prompts to come: a run's requests may come from several templates."""

READERS = 4
"""Passes at the same time, at most: each keeps its own numbers in the CPU's cache."""

PACKED = "rlaif_packed"
"""The name of the attention of such passes in transformers."""

OTHER_WAYS = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What a model may ask of attention that is not done here."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""Attention of the layer with this number: queries (tokens, heads of keys, queries that share a key, width), keys and values
(tokens, heads of keys, width) and what to multiply scores by, to a tensor like the queries."""


@dataclass(eq=False, slots=True)
class Piece:
    """Tokens that go on from those of `parent`; `keys` and `values`, once computed, are by layer (heads, tokens, width)."""

    ids: list[int]
    parent: Piece | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def path(self) -> list[Piece]:
        """From the first piece of the text to this one."""
        path, piece = [self], self.parent
        while piece:
            path, piece = [piece, *path], piece.parent
        return path


# ------------------------------------------------------------ what prompts share


class Forest:
    """Cuts prompts into pieces that those which begin alike have in common, and keeps the beginnings for prompts to come."""

    def __init__(self) -> None:
        self._kept: list[Piece] = []

    def plant(self, prompts: Sequence[list[int]]) -> list[tuple[int, Piece]]:
        """The number of each prompt and its last piece, at least one token of its own; those that share most stand together."""
        order = sorted(range(len(prompts)), key=lambda n: prompts[n])
        todo: list[tuple[list[int], Piece | None, int]] = [(order, None, 0)] if order else []
        leaves = []
        while todo:
            whole, parent, start = todo.pop()
            for group in _groups(prompts, whole, start + SHARED):
                own, done = parent, start
                first = prompts[group[0]]
                end = min(_alike(first, prompts[group[-1]]), min(len(prompts[n]) for n in group) - 1)
                if parent is None and (root := self._root(first[:end], len(group) > 1)):
                    own, done = root, len(root.ids)
                if len(group) > 1 and end - done >= SHARED:
                    own, done = Piece(first[done:end], own), end
                if len(group) > 1:
                    todo.append((group, own, done))
                else:
                    leaves.append((group[0], Piece(first[done:], own)))
        return leaves

    def _root(self, common: list[int], several: bool) -> Piece | None:
        """The piece that prompts which begin so are to begin with, if any: a kept one if it has nearly all that they share."""
        found = max(self._kept, key=lambda piece: _alike(piece.ids, common), default=Piece([]))
        n = _alike(found.ids, common)
        if several and 4 * n < 3 * len(common):
            n = len(common)
        if n < SHARED or (not several and n < len(found.ids)):
            return None
        if found.ids != common[:n]:
            found = Piece(common[:n])
        self._kept = [found, *(piece for piece in self._kept if piece is not found)][:KEPT]
        return found


def _groups(prompts: Sequence[list[int]], order: Sequence[int], enough: int) -> list[list[int]]:
    """Sorted prompts, by their numbers, in groups of neighbours that begin with at least so many equal tokens."""
    groups = [[order[0]]]
    for last, n in pairwise(order):
        shared = min(_alike(prompts[last], prompts[n]), len(prompts[last]) - 1, len(prompts[n]) - 1)
        if shared >= enough:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def _alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# ------------------------------------------------------------ passes


def lacking(leaves: Sequence[Piece]) -> list[Piece]:
    """The pieces that a pass over these has to compute, each after the one that it goes on from."""
    return list(dict.fromkeys(piece for leaf in leaves for piece in leaf.path if not piece.keys))


def read(model: Any, leaves: Sequence[Piece], keep: bool = False) -> Tensor:
    """Logits of the token after each leaf, (leaves, vocabulary), float32. What they go on from is computed where it is not yet.

    keep: whether the leaves' own keys and values are wanted too.
    """
    pieces = lacking(leaves)
    wanted = pieces if keep else [piece for piece in pieces if piece not in set(leaves)]
    prompt = _Prompt(pieces, set(wanted))
    ids = [token for piece in pieces for token in piece.ids]
    spare = -len(ids) % cpu.STEP if model.device.type == "cpu" else 0
    last = {piece: end - 1 for piece, _, end in prompt.spans}
    logits = forward(model, ids + [0] * spare, prompt.places + [0] * spare, [last[leaf] for leaf in leaves], prompt)
    for piece in wanted:  # only now, for a pass that failed has left only some layers
        piece.values = prompt.values[piece]
        piece.keys = prompt.keys[piece]  # last, as another reader takes a piece that has them for one that is there
    return logits


class Readers:
    """Threads that read at the same time: two passes beside each other take a CPU less time than two threads in each pass.

    Much of a pass is many small operations, of which a second thread shortens none. On other devices there is one reader.
    """

    def __init__(self, device: torch.device) -> None:
        cores = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = min(cores, READERS)
        self._pool = ThreadPoolExecutor(self.count, "reader", _cores, (cores // self.count,))
        started = Barrier(self.count)
        list(self._pool.map(lambda _: started.wait(), range(self.count)))
        if device.type == "cpu":
            torch.set_num_threads(cores)  # what the readers have set counts for all threads to come

    def read(self, model: Any, leaves: Sequence[Piece], most: int, keep: bool = False) -> Tensor:
        """As `read`, in passes of about so many tokens at most. A failure is raised when no pass runs any more."""
        parts = _parts(leaves, most, self.count)
        with _attention(model):  # for all of them, as it is the model's
            passes = [self._pool.submit(_read_apart, model, part, keep) for part in parts]
            wait(passes)
        rows = torch.cat([done.result() for done in passes])
        places = {leaf: n for n, leaf in enumerate(leaf for part in parts for leaf in part)}
        return rows[[places[leaf] for leaf in leaves]]

    def close(self) -> None:
        self._pool.shutdown()


@torch.inference_mode()
def _read_apart(model: Any, leaves: Sequence[Piece], keep: bool) -> Tensor:
    return read(model, leaves, keep)


def _cores(count: int) -> None:
    """Use so many in this thread. What is set before a thread's first use of torch, that would set back."""
    torch.get_num_threads()
    torch.set_num_threads(count)


def _parts(leaves: Sequence[Piece], most: int, readers: int) -> list[list[Piece]]:
    """The leaves in parts of so many tokens to be computed; those that share all but their last piece stay together.

    The longest come first and the last parts are small, so that all readers end at about the same time.
    """
    families: dict[Piece, list[Piece]] = {}
    for leaf in leaves:
        together = leaf.parent if leaf.parent and not leaf.parent.keys else leaf
        families.setdefault(together, []).append(leaf)
    ordered = deque(sorted(families.values(), key=to_read, reverse=True))
    left = sum(map(to_read, ordered))
    parts = []
    while ordered:
        part, goal = ordered.popleft(), min(most, left / (2 * readers)) if readers > 1 else most
        while ordered and to_read([*part, *ordered[0]]) <= goal:
            part = [*part, *ordered.popleft()]
        left -= to_read(part)
        parts.append(part)
    return parts


def to_read(leaves: Sequence[Piece]) -> int:
    """How many tokens a pass over these has to compute."""
    return sum(len(piece.ids) for piece in lacking(leaves))


def forward(model: Any, ids: list[int], places: list[int], wanted: list[int], attend: Attend) -> Tensor:
    """Logits after the `wanted` ones among tokens `ids` at `places`, (wanted, vocabulary), float32."""
    with _attention(model):
        out = model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([places], device=model.device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=model.device),
            attend=attend,
        )
    logits: Tensor = out.logits[0].float()
    return logits


class _Prompt:
    """The attention of a pass over pieces: each to its own tokens and those of the pieces that it goes on from."""

    def __init__(self, pieces: Sequence[Piece], wanted: set[Piece]) -> None:
        self.keys: dict[Piece, list[Tensor]] = {piece: [] for piece in wanted}
        self.values: dict[Piece, list[Tensor]] = {piece: [] for piece in wanted}
        self.spans: list[tuple[Piece, int, int]] = []
        self.places: list[int] = []
        for piece in pieces:
            start = sum(len(before.ids) for before in piece.path[:-1])
            self.spans.append((piece, len(self.places), len(self.places) + len(piece.ids)))
            self.places += range(start, start + len(piece.ids))
        self._paths = {piece: piece.path[:-1] for piece in pieces}

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        queries, keys, values = (queries * scale).transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)
        found = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        for piece, start, end in self.spans:
            own_keys, own_values = keys[:, start:end], values[:, start:end]
            if piece in self.keys:  # copied, or the whole pass would be kept
                self.keys[piece].append(own_keys.clone())
                self.values[piece].append(own_values.clone())
            before = self._paths[piece]
            all_keys = [*((p.keys or self.keys[p])[layer] for p in before), own_keys]
            all_values = [*((p.values or self.values[p])[layer] for p in before), own_values]
            found[:, start:end] = _causal(queries[:, start:end], all_keys, all_values)
        return found.transpose(0, 1)


def _causal(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of the last tokens to themselves and all before, as `cpu.causal` has it."""
    return (cpu.causal if queries.device.type == "cpu" else _by_torch)(queries, keys, values)


def _by_torch(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    heads, count, groups, width = queries.shape
    all_keys, all_values = torch.cat(keys, 1)[None], torch.cat(values, 1)[None]
    mask = causal_lower_right(count, all_keys.shape[2])
    each = queries.transpose(1, 2).reshape(1, heads * groups, count, width)
    found = scaled_dot_product_attention(each, all_keys, all_values, attn_mask=mask, scale=1.0, enable_gqa=groups > 1)
    return found.view(heads, groups, count, width).transpose(1, 2)


# ------------------------------------------------------------ models


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Compute the last layer in float32: logits in bf16 have steps of 1/8 from 16 up, which is much for a log-ratio."""
    head = model.get_output_embeddings()
    device = head.weight.device.type
    if type(head) is not torch.nn.Linear or (head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(device)):
        yield
        return

    def exact(states: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            # In parts, for a float32 copy of all weights may not fit; of a CPU's cache they hardly leave.
            logits = torch.cat([linear(states.float(), part.float()) for part in torch.split(head.weight, rows)], -1)
            return logits if head.bias is None else logits + head.bias.float()

    rows = max(1, 2**18 // head.in_features) if device == "cpu" else -(-head.out_features // 8)
    before = head.__dict__.get("forward")
    head.forward = exact  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own shows again
        if before:
            head.forward = before  # type: ignore[method-assign]


@torch.inference_mode()
def packs(model: Any) -> bool:
    """Whether such passes give what the model gives otherwise: no layer may see less, or more, than the tokens before."""
    config = model.config.get_text_config()
    if not all(type(layer) is DynamicLayer for layer in hf.DynamicCache(config=config).layers):
        return False
    draw = random.Random(0)
    begin, *ends = ([draw.randrange(config.vocab_size) for _ in range(n)] for n in (24, 3, 1, 2))
    root = Piece(begin)
    try:
        found = read(model, [Piece(end, root) for end in ends])
    except Exception:  # whatever a model's own code makes of it: it is run as ever then
        return False
    rows = torch.tensor([begin + end + [0] * (3 - len(end)) for end in ends], device=model.device)
    plain = model(input_ids=rows).logits.float()[range(3), [len(begin + end) - 1 for end in ends]]
    apart = (plain - plain.roll(1, 0)).norm(dim=1)
    return bool(((found - plain).norm(dim=1) <= 0.1 * apart).all())


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Attention as such passes have it."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def _packed(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, attend: Attend, **how: Any) -> tuple[Tensor, None]:
    """Attention as transformers calls it, for a pass of one row."""
    if other := [name for name in OTHER_WAYS if how.get(name) is not None]:
        raise NotImplementedError(f"attention with {other[0]}")
    scale = how.get("scaling") or query.shape[-1] ** -0.5
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    grouped = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[2])
    found = attend(module.layer_idx, grouped, keys, values, scale)
    return found.flatten(1, 2)[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _packed)
