"""Drawing responses from the policy: batched, with a cache of keys and values, each response by a random source of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

Forward = Callable[..., Tensor]
"""A model's logits of the last place, (rows, vocabulary), given ids, mask, places and a cache that it adds to."""


class Sampler(Protocol):
    """What draws responses: `rlaif.rl.vllm` has the other one."""

    def sync(self, model: Any) -> None:
        """Take the policy's weights as they are now."""
        ...

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        ends: Sequence[int],
    ) -> list[list[int]]:
        """The tokens of a response to each prompt, with the one that ended it, if it did not run out of tokens."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Voice:
    """A model, and its share in the distribution that is sampled from."""

    forward: Forward
    share: float = 1.0


class TransformersSampler:
    """Draws from the geometric mixture of its voices, Π πᵢ^shareᵢ, token by token; of one voice, from that model.

    The seed of a response settles its draws whatever stands beside it in the batch, except where rounding tips a close one.
    """

    def __init__(self, voices: Sequence[Voice], pad: int, device: torch.device) -> None:
        self.voices, self._pad, self._device = voices, pad, device

    def sync(self, model: Any) -> None:
        """The voices are the policy itself."""

    def close(self) -> None:
        pass

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        ends: Sequence[int],
    ) -> list[list[int]]:
        chances = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        chances = chances.to(self._device)
        ids, mask = padded_left(prompts, self._pad, self._device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        caches = [DynamicCache() for _ in self.voices]
        found: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # whose responses the batch still holds
        going = [True] * len(prompts)
        last = set(ends)
        for step in range(max_new_tokens):
            tokens = self._draw(ids, mask, places, caches, temperature, chances[rows, step])
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if going[row]:
                    found[row].append(token)
                    going[row] = token not in last
            alive = [place for place, row in enumerate(rows) if going[row]]
            if not alive or step == max_new_tokens - 1:
                break
            if 4 * len(alive) <= 3 * len(rows):  # a copy of the cache pays once a quarter of the rows have ended
                kept = torch.tensor(alive, device=self._device)
                for cache in caches:
                    cache.batch_select_indices(kept)
                tokens, mask, places, rows = tokens[kept], mask[kept], places[kept], [rows[place] for place in alive]
            ids, places = tokens[:, None], places[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        return found

    def _draw(
        self, ids: Tensor, mask: Tensor, places: Tensor, caches: Sequence[Any], temperature: float, chances: Tensor
    ) -> Tensor:
        mixed = torch.zeros((), device=self._device)
        for voice, cache in zip(self.voices, caches, strict=True):
            logits = voice.forward(ids, mask, places, cache).float() / temperature
            mixed = mixed + voice.share * logits.log_softmax(-1)
        return drawn(mixed.softmax(-1), chances)


def drawn(probabilities: Tensor, chances: Tensor) -> Tensor:
    """A token for each row (rows, vocabulary): the first whose cumulative probability is above its chance, from [0, 1).

    >>> drawn(torch.tensor([[0.25, 0.0, 0.75]] * 3), torch.tensor([0.0, 0.25, 0.9])).tolist()
    [0, 2, 2]
    """
    sums = probabilities.double().cumsum(-1)
    wanted = chances.double()[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def padded_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, both (rows, longest): all rows end at the same place."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
