"""What a CPU wants otherwise than torch does it: weights laid out for its kernels, and attention."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

QUERIES = 256
"""Tokens whose attention is computed at a time: their scores stay in the cache, and most of the future is left out."""

STEP, SEEN = 16, 32
"""Products of matrices have multiples of so many tokens, and of so many that they see. oneDNN makes and keeps a program for
each shape: without these, its programs took as much memory as the model, and split the memory that is freed and used again."""

LEAST = 1e-15
"""The least sum of weights, and its inverse the greatest, that attention in bf16 takes without a look at the scores."""


@torch.inference_mode()
def lay_out(model: Any) -> None:
    """Keep the weights of linear layers as a CPU's kernels for bf16 want them, who else make them so anew in each pass.

    A token at a time takes half the time so. Where a model's own code wants the weights as they were, nothing is changed.
    """
    if model.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    head, before = model.get_output_embeddings(), {}
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.bfloat16:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(module.weight)
            module.forward = partial(_linear, laid_out, module.bias)  # type: ignore[method-assign]
            before[module] = module.weight
            if module is not head:  # which may be the embedding too
                module.weight = torch.nn.Parameter(module.weight.to("meta"), requires_grad=False)
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except Exception:
        for module, weight in before.items():
            del module.forward
            module.weight = weight


def _linear(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return found


# ------------------------------------------------------------ attention


def causal(queries: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Attention of the last tokens to themselves and all before: (heads, n, groups, width) to the same.

    keys, values: (heads, tokens, width) each, to be joined; queries have been scaled. Torch's own kernel for this takes more
    than twice the time.
    """
    heads, count, groups, width = queries.shape
    seen = sum(part.shape[1] for part in keys)
    spare = queries.new_zeros(heads, -seen % SEEN, width)
    keys_, values_ = torch.cat([*keys, spare], 1), torch.cat([*values, spare], 1)
    weigh = _plainly if queries.dtype == torch.bfloat16 else _carefully
    parts = []
    for start in range(0, count, QUERIES):
        rows = queries[:, start : start + QUERIES]
        n, before = rows.shape[1], seen - count + start
        padded = queries.new_zeros(heads, n + -n % STEP, groups, width)
        padded[:, :n] = rows
        end = before + padded.shape[1]
        end += -end % SEEN
        parts.append(weigh(padded, before, keys_[:, :end].transpose(1, 2), values_[:, :end])[:, :n])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _plainly(queries: Tensor, before: int, keys: Tensor, values: Tensor) -> Tensor:
    """Values weighed by e to the scores as they are: half the time of a softmax, which first takes off the greatest one.

    Exponents of bf16 go as far as those of float32; where a row's weights come near their ends, it is done carefully.
    """
    heads, count, groups, width = queries.shape
    weights = (queries.view(heads, -1, width) @ keys).exp_()
    each = weights.view(heads, count, groups, -1)
    for group in range(groups):
        each[:, :, group].tril_(before)
    total = weights.sum(-1, keepdim=True)
    least, greatest = total.aminmax()
    if not (least > LEAST and greatest < 1 / LEAST):
        return _carefully(queries, before, keys, values)
    return (weights @ values).div_(total).view(queries.shape)


def _carefully(queries: Tensor, before: int, keys: Tensor, values: Tensor) -> Tensor:
    heads, count, groups, width = queries.shape
    scores = queries.view(heads, -1, width) @ keys
    own = scores.view(heads, count, groups, -1)[..., before:]
    own.masked_fill_(_future()[:count, None, : own.shape[-1]], -torch.inf)
    return (scores.softmax(-1) @ values).view(queries.shape)


@cache
@torch.inference_mode(False)  # a tensor made in it could not be used without
def _future() -> Tensor:
    """What a block of queries must not see of what begins with its own tokens; made at its first use, for no thread but an
    engine's is to have workers of OpenMP's.
    """
    return torch.ones(QUERIES, QUERIES + SEEN, dtype=torch.bool).triu(1)
