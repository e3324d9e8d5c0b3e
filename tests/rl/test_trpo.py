"""Steps within a trust region: against dense algebra, on bandits with known best policies, and on a tiny model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlaif.rl.trpo import Step, conjugate_gradient, natural_step
from tests.engines.tiny import save_tiny

NONE = Step(0.0, 0.0, 0.0)


def positive(seed: int, size: int) -> Tensor:
    """A symmetric positive definite matrix whose eigenvalues lie between 1 and 100."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, 2, size, dtype=torch.float64)) @ basis.T


def vector(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- conjugate gradient


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_conjugate_gradient_is_a_dense_solve(size: int) -> None:
    matrix, wanted = positive(size, size), vector(1, size)
    found = conjugate_gradient(lambda v: matrix @ v, wanted, 2 * size)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, wanted), rtol=1e-4, atol=1e-7)


def test_conjugate_gradient_ends_once_it_has_solved() -> None:
    asked = []

    def product(v: Tensor) -> Tensor:
        asked.append(v)
        return 4 * v

    torch.testing.assert_close(conjugate_gradient(product, vector(2, 9), 10), vector(2, 9) / 4)
    assert len(asked) == 1
    assert not conjugate_gradient(product, torch.zeros(9), 10).any()
    assert len(asked) == 1


def test_conjugate_gradient_is_finite_for_a_matrix_that_is_not_positive() -> None:
    matrix = torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64))
    assert not conjugate_gradient(lambda v: matrix @ v, torch.tensor([0.1, 1.0], dtype=torch.float64), 10).any()
    assert conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 0.1], dtype=torch.float64), 10).isfinite().all()


# ---------------------------------------------------------------- steps where everything is known


def quadratic(size: int = 6) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor], Callable[[], Tensor]]:
    """Two parameters' tensors from which a linear loss g·x falls, and the distance ½(x − x₀)ᵀM(x − x₀)."""
    matrix, gradient = positive(3, size), vector(4, size)
    first, second = vector(5, 2).requires_grad_(), vector(6, size - 2).view(2, -1).requires_grad_()
    start = torch.cat([first.detach(), second.detach().flatten()])

    def moved() -> Tensor:
        return torch.cat([first, second.flatten()]) - start

    return first, second, start, lambda: gradient @ moved(), lambda: moved() @ matrix @ moved() / 2


@pytest.mark.parametrize("damping", [0.0, 0.1, 30.0])
def test_the_step_is_the_natural_gradient_at_the_bound(damping: float) -> None:
    first, second, start, surrogate, kl = quadratic()
    bound = 0.02
    took = natural_step([first, second], surrogate, kl, bound * (1 + 1e-9), iterations=20, damping=damping)
    direction = torch.linalg.solve(positive(3, 6) + damping * torch.eye(6), -vector(4, 6))
    wanted = direction * torch.sqrt(2 * bound / (direction @ positive(3, 6) @ direction))
    found = torch.cat([first.detach(), second.detach().flatten()]) - start
    if took.taken == 0.5:  # rounding took the full step out of the bound
        wanted = wanted / 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert took.kl == pytest.approx(bound * took.taken**2, rel=1e-6)
    assert took.improvement == pytest.approx(-float(vector(4, 6) @ wanted), rel=1e-4)


def test_the_step_is_halved_until_the_loss_falls() -> None:
    """The loss rises again past a short way: the full step goes 8 times that far."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    took = natural_step([x], lambda: (x - 1).square().sum(), lambda: x.square().sum() / 2, 128.5, damping=0.0)
    assert took.taken == 1 / 16
    assert x.item() == pytest.approx(math.sqrt(257) / 16)
    assert took.improvement == pytest.approx(1 - (x.item() - 1) ** 2)


def test_the_step_is_halved_until_the_kl_is_within_its_bound() -> None:
    """A KL that grows faster than its second derivative at 0 tells."""
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    took = natural_step([x], lambda: -x.sum(), lambda: (x.square() / 2 + 3 * x**4).sum(), 2.0, damping=0.0)
    assert took.taken == 0.25
    assert took.kl == pytest.approx(0.125 + 3 / 16)


@pytest.mark.parametrize("bad", ["loss", "kl", "nan"])
def test_a_bad_step_is_not_taken_and_nothing_changes(bad: str) -> None:
    start = [torch.tensor([0.1, -0.3]), torch.tensor([[1e-8], [3e7]])]
    parameters = [value.clone().requires_grad_() for value in start]
    asked = []

    def distance() -> Tensor:
        return sum(((p - s) / s.abs()).square().sum() for p, s in zip(parameters, start, strict=True)) / 2

    def surrogate() -> Tensor:
        asked.append(1)
        loss = sum((p / s.abs()).sum() for p, s in zip(parameters, start, strict=True))
        if distance() == 0:
            return loss
        return {"loss": loss + 1e6, "kl": loss, "nan": loss * math.nan}[bad]

    def kl() -> Tensor:
        return distance() * (1e9 if bad == "kl" and distance() > 0 else 1)

    assert natural_step(parameters, surrogate, kl, 0.01, backtracks=5) == NONE
    assert len(asked) == 6
    for parameter, value in zip(parameters, start, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_no_gradient_means_no_step() -> None:
    x = torch.ones(3, requires_grad=True)
    assert natural_step([x], lambda: (x * 0).sum(), lambda: (x - 1).square().sum(), 0.01) == NONE
    assert torch.equal(x, torch.ones(3))


def test_a_parameter_may_have_no_part_in_one_of_them() -> None:
    both, bystander, one = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def surrogate() -> Tensor:
        return both.sum() + one.sum()

    def kl() -> Tensor:
        return both.square().sum() / 2

    took = natural_step([both, bystander, one], surrogate, kl, 0.02, damping=1.0)
    assert took.taken > 0
    assert not bystander.any()
    assert both[0].item() == pytest.approx(-took.taken * math.sqrt(0.02), rel=1e-6)
    torch.testing.assert_close(one, 2 * both)  # (0 + 1)⁻¹ of its gradient, where the other's is (1 + 1)⁻¹


@pytest.mark.parametrize("first", [4, 6, 8])
def test_processes_take_the_step_of_one(first: int) -> None:
    """Two threads that share the data, the first one holding so many rows of 8, and one that holds all of it."""
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, nothing = vector(7, 8), torch.zeros((), dtype=torch.float64)
    shared: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2, timeout=20)

    def step(rows: slice, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Step]:
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        took = natural_step(
            [x],
            lambda: -((data[rows] @ x).exp() * weight[rows]).sum() / 8 if data[rows].any() else nothing,
            lambda: (torch.cosh(data[rows] @ x) - 1).sum() / 8 if data[rows].any() else nothing,
            0.5,
            reduce=reduce,
        )
        return x.detach(), took

    def total(rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(value: Tensor) -> Tensor:
            shared[rank] = value
            barrier.wait()
            found = torch.stack([value for value in shared if value is not None]).sum(0)
            barrier.wait()
            return found

        return reduce

    found: dict[int, tuple[Tensor, Step]] = {}

    def process(rank: int) -> None:
        found[rank] = step(slice(first) if rank == 0 else slice(first, 8), total(rank))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole, took = step(slice(0, 8), lambda value: value)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], whole)
    assert found[0][1].taken == took.taken > 0


# ---------------------------------------------------------------- bandits, over all arms


REWARD = torch.tensor([0.1, 1.0, 0.9, -3.0], dtype=torch.float64)


def advantage(new: Tensor, old: Tensor) -> Tensor:
    """−Σ π_old·ratio·A, from log-probabilities."""
    return -(old.exp() * (new - old).exp() @ (REWARD - old.exp() @ REWARD))


def climb(loss: Callable[[Tensor, Tensor], Tensor], steps: int, bound: float) -> list[tuple[Tensor, Step]]:
    """Policies over the arms after each step, from the uniform one, and the steps."""
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    passed = []
    for _ in range(steps):
        old = logits.detach().log_softmax(0)
        took = natural_step(
            [logits],
            lambda old=old: loss(logits.log_softmax(0), old),
            lambda old=old: old.exp() @ (old - logits.log_softmax(0)),
            bound,
            damping=1e-3,
        )
        passed.append((logits.detach().softmax(0), took))
    return passed


def test_steps_on_a_bandit_reach_the_best_arm() -> None:
    passed = climb(advantage, 16, 0.02)
    values = [float(policy @ REWARD) for policy, _ in passed]
    assert values == sorted(values)
    assert all(0 < took.kl <= 0.02 for _, took in passed)
    assert float(passed[-1][0][1]) > 0.97


def test_a_step_on_a_bandit_goes_along_its_advantages_as_far_as_its_bound() -> None:
    policy, took = climb(advantage, 1, 0.02)[0]
    assert 0.2 * 0.02 < took.kl <= 0.02  # to within what halving costs
    moved, wanted = policy.log() - policy.log().mean(), REWARD - REWARD.mean()
    assert float(torch.cosine_similarity(moved, wanted, dim=0)) == pytest.approx(1, abs=1e-9)
    assert took.improvement == pytest.approx(float((policy - 0.25) @ REWARD))


def test_steps_reach_the_best_policy_near_a_reference() -> None:
    """With β·KL(π ‖ reference) in the loss that is reference·exp(reward/β), normalised."""
    reference, beta = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log(), 0.7
    passed = climb(lambda new, _: new.exp() @ (beta * (new - reference) - REWARD), 15, 0.05)
    torch.testing.assert_close(passed[-1][0], (reference + REWARD / beta).softmax(0), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize(("attention", "checkpoints"), [("eager", False), ("sdpa", False), ("sdpa", True)])
def test_a_step_of_a_model_makes_a_planted_token_likelier(attention: str, checkpoints: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny"), attn_implementation=attention).train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (6, 20), generator=draw)
    planted = 65
    ids[:, 12:] = torch.where(torch.rand(6, 8, generator=draw) < 0.5, planted, ids[:, 12:])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    reward = torch.where(ids[:, 12:] == planted, 1.0, -1.0)

    def logprobs() -> Tensor:
        return model(ids, attention_mask=mask).logits[:, 11:-1].log_softmax(-1)

    def ratio() -> Tensor:
        return (logprobs() - old).gather(2, ids[:, 12:, None])[..., 0].exp()

    with torch.no_grad():
        old = logprobs()
    bound = 0.01
    took = natural_step(
        list(model.parameters()),
        lambda: -(ratio() * reward).mean(),
        lambda: (old.exp() * (old - logprobs())).sum(-1).mean(),
        bound,
    )
    with torch.no_grad():
        new = logprobs()
        kl = float((old.exp() * (old - new)).sum(-1).mean())
    assert took.taken > 0
    assert 0.1 * bound < took.kl <= bound
    assert took.kl == pytest.approx(kl, rel=1e-3)
    assert took.improvement > 0
    assert float(new[..., planted].mean()) > float(old[..., planted].mean())
    assert all(parameter.grad is None for parameter in model.parameters())
