"""Trust region policy optimisation (Schulman et al., arXiv 1502.05477, §6, appendix C): a step along the natural gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MOST = 50_000_000
"""Parameters of the largest policy that is optimised so. A step holds ten or so vectors of that length and, for double
backward, the graph of a gradient over all responses at once; each of its `iterations` costs several forward passes."""


@dataclass(frozen=True)
class Step:
    """What came of a step. `taken`: the fraction of the full step, 0 where none was accepted and nothing was changed.

    `kl`: nats a token, of the old policy from the new one; `improvement`: what the surrogate fell by.
    """

    taken: float
    kl: float
    improvement: float


def identity(value: Tensor) -> Tensor:
    """What one process by itself comes to."""
    return value


def natural_step(
    parameters: Sequence[Tensor],
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    bound: float,
    iterations: int = 10,
    damping: float = 0.1,
    backtracks: int = 10,
    reduce: Callable[[Tensor], Tensor] = identity,
) -> Step:
    """Moves the parameters, in place, to a lower surrogate with the KL within the bound, or leaves them as they are.

    surrogate, kl: scalars at the current parameters, with their graph: the mean of −ratio·A, and the mean KL(old ‖ current) in
    nats a token over whole distributions, which is 0 before the step; a parameter may have no part in one of them. `bound`: in
    nats a token. `iterations`: of conjugate gradient on (F + damping)·s = −∇surrogate, F being the Hessian of the KL; s is then
    made as long as ½sᵀFs = bound wants it. Of the step's fractions 1, ½, ¼, … the first `backtracks` are tried. `reduce`: what
    a vector or scalar comes to over all processes, which call it equally often and so take the same step: the average, or the
    sum where each one's is its share of the whole. Parameters are expected in float32: steps are too small for bfloat16.
    """
    old = _flat([parameter.detach() for parameter in parameters])
    loss = surrogate()
    before, gradient = _number(loss, reduce), reduce(_flat(_gradients(loss, parameters)))
    with sdpa_kernel(SDPBackend.MATH):  # the only attention of PyTorch's own that has a second derivative
        step = _full_step(parameters, kl, -gradient, bound, iterations, damping, reduce)
    for fraction in (0.5**n for n in range(backtracks)):
        _move(parameters, old + fraction * step)
        with torch.no_grad():
            improvement, moved = before - _number(surrogate(), reduce), _number(kl(), reduce)
        if improvement > 0 and moved <= bound:
            return Step(fraction, moved, improvement)
    _move(parameters, old)
    return Step(0.0, 0.0, 0.0)


def _full_step(
    parameters: Sequence[Tensor],
    kl: Callable[[], Tensor],
    downhill: Tensor,
    bound: float,
    iterations: int,
    damping: float,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """The step (N) of `natural_step`, before its fractions; zeros where the gradient is 0."""
    slope = _flat(_gradients(kl(), parameters, create_graph=True))

    def fisher(vector: Tensor) -> Tensor:
        return reduce(_flat(_gradients(slope @ vector, parameters, retain_graph=True)))

    direction = conjugate_gradient(lambda vector: fisher(vector) + damping * vector, downhill, iterations)
    curvature = float(direction @ fisher(direction))
    return direction * (math.sqrt(2 * bound / curvature) if 0 < curvature < math.inf else 0.0)


def conjugate_gradient(product: Callable[[Tensor], Tensor], wanted: Tensor, iterations: int) -> Tensor:
    """x with product(x) = wanted, both (N): `product` is that with a symmetric positive definite matrix.

    Ends before `iterations` where the residual has fallen to 1e−5 of `wanted`, or the matrix turns out not to be positive.
    """
    found = torch.zeros_like(wanted)
    residual = search = wanted
    size = first = residual @ residual
    for _ in range(iterations):
        if size <= 1e-10 * first:
            break
        image = product(search)
        curvature = search @ image
        if not curvature > 0:
            break
        length = size / curvature
        found, residual = found + length * search, residual - length * image
        size, last = residual @ residual, size
        search = residual + (size / last) * search
    return found


def _gradients(
    value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False, retain_graph: bool | None = None
) -> Sequence[Tensor]:
    """Zeros for parameters that have no part in the value: for all of them, in a process without responses."""
    if not value.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return torch.autograd.grad(
        value,
        list(parameters),
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _number(value: Tensor, reduce: Callable[[Tensor], Tensor]) -> float:
    return float(reduce(value.detach()))


@torch.no_grad()
def _move(parameters: Sequence[Tensor], values: Tensor) -> None:
    parts = torch.split(values, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))
