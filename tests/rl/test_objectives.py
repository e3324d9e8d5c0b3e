"""Each objective against plain float64, from the papers' formulas; gradients against finite differences; exact bandits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlaif.rl import objectives as o

ONE_SIDED = ("hinge", "apo_zero", "apo_down")
LOSSES = ("dpo", "ipo", *ONE_SIDED)


def tensor(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def same(found: Tensor, wanted: Any) -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(wanted), rtol=1e-9, atol=1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ragged(draw: np.random.Generator) -> tuple[list[int], Tensor, np.ndarray, np.ndarray]:
    """Lengths of a few responses, their mask, and two arrays of that shape, with numbers behind the responses too."""
    lengths = [int(n) for n in draw.integers(1, 7, draw.integers(1, 5))]
    mask = np.array([[float(t < n) for t in range(max(lengths))] for n in lengths])
    return lengths, tensor(mask), draw.normal(0, 1, mask.shape), draw.normal(0, 1, mask.shape)


# ---------------------------------------------------------------- KL, rewards, advantages


def test_kl_estimates_are_schulmans() -> None:
    draw = np.random.default_rng(0)
    new, old = draw.normal(0, 2, (2, 3, 4))
    for kind, formula in {
        "k1": lambda r: -math.log(r),
        "k2": lambda r: math.log(r) ** 2 / 2,
        "k3": lambda r: r - 1 - math.log(r),
    }.items():
        wanted = [[formula(math.exp(old[i, t] - new[i, t])) for t in range(4)] for i in range(3)]
        same(o.kl_estimate(tensor(new), tensor(old), kind), wanted)


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_over_all_tokens_k1_and_k3_are_the_kl(kind: o.Kl, unbiased: bool) -> None:
    policy, reference = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]
    kl = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    found = float((tensor(policy) * o.kl_estimate(tensor(policy).log(), tensor(reference).log(), kind)).sum())
    assert (abs(found - kl) < 1e-12) == unbiased


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_k3_is_never_negative(new: float, old: float) -> None:
    assert float(o.kl_estimate(tensor(new), tensor(old), "k3")) >= 0


def test_k3_keeps_its_digits_near_0() -> None:
    found = o.kl_estimate(torch.tensor(-1.0 + 1e-3), torch.tensor(-1.0), "k3")
    assert float(found) == pytest.approx(0.5e-6, rel=0.1)


def test_shaped_rewards_end_with_the_score() -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        lengths, mask, kl, _ = ragged(draw)
        scores, beta = draw.normal(0, 1, len(lengths)), 0.3
        wanted = np.zeros(kl.shape)
        for i, length in enumerate(lengths):
            for t in range(length):
                wanted[i, t] = -beta * kl[i, t] + (scores[i] if t == length - 1 else 0)
        before = tensor(kl)
        same(o.shaped(tensor(scores), before, beta, mask), wanted)
        same(before, kl)  # what it was given is left as it was


def double_sum(rewards: np.ndarray, values: np.ndarray, lengths: list[int], gamma: float, lam: float) -> np.ndarray:
    """Generalised advantage estimation, eq. 16 of the paper: Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ·V_{t+1} − V_t."""
    wanted = np.zeros(rewards.shape)
    for i, length in enumerate(lengths):
        v = [*values[i, :length], 0.0]
        delta = [rewards[i, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted[i, t] = sum((gamma * lam) ** step * delta[t + step] for step in range(length - t))
    return wanted


@given(st.integers(0, 10_000), st.floats(0.01, 1), st.floats(0, 1))
@settings(deadline=None)
def test_advantages_are_the_double_sum(seed: int, gamma: float, lam: float) -> None:
    lengths, mask, rewards, values = ragged(np.random.default_rng(seed))
    found, returns = o.advantages(tensor(rewards), tensor(values), mask, gamma, lam)
    wanted = double_sum(rewards, values, lengths, gamma, lam)
    same(found, wanted)
    same(returns, (wanted + values) * mask.numpy())


@given(st.integers(0, 10_000), st.floats(0.01, 1))
@settings(deadline=None)
def test_advantages_at_both_ends_of_lambda(seed: int, gamma: float) -> None:
    """λ = 1: discounted rewards to come, less the value; λ = 0: one step, and the next value."""
    lengths, mask, rewards, values = ragged(np.random.default_rng(seed))
    whole, step = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for i, length in enumerate(lengths):
        for t in range(length):
            whole[i, t] = sum(gamma ** (later - t) * rewards[i, later] for later in range(t, length))
            step[i, t] = rewards[i, t] + (gamma * values[i, t + 1] if t + 1 < length else 0)
    for lam, returns in ((1.0, whole), (0.0, step)):
        found = o.advantages(tensor(rewards), tensor(values), mask, gamma, lam)
        same(found[0], (returns - values) * mask.numpy())
        same(found[1], returns)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(deadline=None)
def test_what_stands_behind_a_response_has_no_part_in_it(seed: int, lam: float) -> None:
    _, mask, rewards, values = ragged(np.random.default_rng(seed))
    padded = [tensor(numbers) * mask + 1e3 * (1 - mask) for numbers in (rewards, values)]
    for found, other in zip(
        o.advantages(*padded, mask, 0.9, lam), o.advantages(tensor(rewards), tensor(values), mask, 0.9, lam), strict=True
    ):
        assert torch.equal(found, other)


def test_whitened_values_have_variance_1() -> None:
    _, mask, values, _ = ragged(np.random.default_rng(3))
    kept = values[mask.numpy() == 1]
    mean, variance = tensor(kept.mean()), tensor(kept.var())
    for shift in (True, False):
        found = o.whitened(tensor(values), mask, mean, variance, shift).numpy()
        inside = found[mask.numpy() == 1]
        np.testing.assert_allclose(inside, (kept - kept.mean()) / kept.std() + (0 if shift else kept.mean()), rtol=1e-6)
        assert inside.var() == pytest.approx(1, rel=1e-6)
        assert not found[mask.numpy() == 0].any()


def test_whitening_equal_values_is_finite() -> None:
    same(o.whitened(tensor([2.0, 2.0]), tensor([1.0, 1.0]), tensor(2.0), tensor(0.0)), [0.0, 0.0])


# ---------------------------------------------------------------- surrogates, values, coefficients


def test_clipped_surrogate_is_eq_7() -> None:
    new, old, advantage = np.random.default_rng(1).normal(0, 0.5, (3, 200))
    wanted, clipped = [], []
    for n, m, a in zip(new, old, advantage, strict=True):
        ratio = math.exp(n - m)
        held = min(max(ratio, 0.8), 1.2)
        wanted.append(-min(ratio * a, held * a))
        clipped.append(float((ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)))
    loss, share = o.clipped_surrogate(tensor(new), tensor(old), tensor(advantage), 0.2)
    same(loss, wanted)
    same(share, clipped)
    assert 0 < sum(clipped) < 200


def test_a_token_that_is_clipped_has_no_gradient() -> None:
    new, advantage = tensor([0.5, 0.5, -0.5, -0.5]).requires_grad_(), tensor([1.0, -1.0, 1.0, -1.0])
    o.clipped_surrogate(new, torch.zeros(4), advantage, 0.2)[0].sum().backward()
    assert [bool(g) for g in new.grad] == [False, True, True, False]


def test_penalised_surrogate_is_eq_8() -> None:
    new, old, advantage = np.random.default_rng(2).normal(0, 0.5, (3, 50))
    wanted = [-math.exp(n - m) * a + 0.7 * (math.exp(n - m) - 1 - (n - m)) for n, m, a in zip(new, old, advantage, strict=True)]
    same(o.penalised_surrogate(tensor(new), tensor(old), tensor(advantage), 0.7), wanted)


def test_over_all_tokens_the_penalty_is_the_kl_of_the_old_policy_from_the_new() -> None:
    old, new, advantage = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.2, 0.6]), tensor([1.0, -2.0, 0.5])
    found = (old * o.penalised_surrogate(new.log(), old.log(), advantage, 3.0)).sum()
    same(found, -(new * advantage).sum() + 3 * sum(p * math.log(p / q) for p, q in zip(old, new, strict=True)))


def test_clipped_value_loss_is_the_greater_one() -> None:
    values, old, returns = np.random.default_rng(4).normal(0, 1, (3, 200))
    wanted, free = [], []
    for v, w, r in zip(values, old, returns, strict=True):
        held = w + min(max(v - w, -0.3), 0.3)
        wanted.append(max((v - r) ** 2, (held - r) ** 2) / 2)
        free.append((v - r) ** 2 / 2)
    same(o.clipped_value_loss(tensor(values), tensor(old), tensor(returns), 0.3), wanted)
    same(o.clipped_value_loss(tensor(values), tensor(old), tensor(returns), None), free)
    assert wanted != free


def test_pairwise_surrogate_clips_the_pairs_ratio() -> None:
    new, old, scores = np.random.default_rng(5).normal(0, 0.4, (3, 200))
    wanted = []
    for i in range(100):
        first, second = 2 * i, 2 * i + 1
        ratio = (math.exp(new[first]) / math.exp(new[second])) * (math.exp(old[second]) / math.exp(old[first]))
        half = (scores[first] - scores[second]) / 2
        given = -min(ratio * half, min(max(ratio, 0.8), 1.2) * half)
        swapped = -min(-half / ratio, -half * min(max(1 / ratio, 0.8), 1.2))
        wanted.append((given + swapped) / 2)
    same(o.pairwise_surrogate(tensor(new), tensor(old), tensor(scores), 0.2), wanted)


@given(st.integers(0, 10_000), st.integers(-64, 64))
@settings(deadline=None)
def test_what_a_prompt_adds_to_both_scores_has_no_part_in_pairs(seed: int, shift: int) -> None:
    new, old, scores = np.random.default_rng(seed).integers(-64, 64, (3, 8)) / 64
    args = tensor(new), tensor(old)
    assert torch.equal(
        o.pairwise_surrogate(*args, tensor(scores), 0.2), o.pairwise_surrogate(*args, tensor(scores + shift), 0.2)
    )


def test_the_kl_coefficient_follows_ziegler() -> None:
    assert o.adapted(0.1, 6.0, 6.0, 10_000, 64) == 0.1
    assert o.adapted(0.1, 6.6, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 + 0.1 * 64 / 10_000))
    assert o.adapted(0.1, 600.0, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 + 0.2 * 64 / 10_000))
    assert o.adapted(0.1, 0.0, 6.0, 10_000, 64) == pytest.approx(0.1 * (1 - 0.2 * 64 / 10_000))


def test_the_penalty_is_halved_or_doubled() -> None:
    kls = (0.0, 0.0066, 0.0067, 0.01, 0.0149, 0.0151, 9.0)
    assert [o.penalty_after(0.4, kl, 0.01) for kl in kls] == [0.2, 0.2, 0.4, 0.4, 0.4, 0.8, 0.8]


# ---------------------------------------------------------------- preferences


def plain_preference(loss: str, first: float, second: float, p: float, beta: float) -> float:
    """From the papers: the loss of a pair whose first response is the better one, and how p makes one loss of two."""

    def better(w: float, r: float) -> float:
        return {
            "dpo": lambda: -math.log(sigmoid(beta * w - beta * r)),
            "ipo": lambda: (w - r - 1 / (2 * beta)) ** 2,
            "hinge": lambda: max(0.0, 1 - beta * (w - r)),
            "apo_zero": lambda: (1 - sigmoid(beta * w)) + sigmoid(beta * r),
            "apo_down": lambda: sigmoid(beta * w) + (1 - sigmoid(beta * w - beta * r)),
        }[loss]()

    if loss in ONE_SIDED:
        p = 0.5 if p == 0.5 else float(p > 0.5)
    return p * better(first, second) + (1 - p) * better(second, first)


@pytest.mark.parametrize("loss", LOSSES)
def test_preference_losses_are_the_papers(loss: str) -> None:
    draw = np.random.default_rng(6)
    first, second = draw.normal(0, 3, (2, 60))
    p = np.concatenate([draw.random(50), [0, 0, 0.5, 0.5, 0.5, 0.5, 0.49, 0.51, 1, 1]])
    for beta in (0.1, 1.0):
        wanted = [plain_preference(loss, f, s, q, beta) for f, s, q in zip(first, second, p, strict=True)]
        same(o.preference_loss(loss, tensor(first), tensor(second), tensor(p), beta), wanted)


@pytest.mark.parametrize("loss", LOSSES)
@given(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 64))
@settings(deadline=None)
def test_swapping_the_responses_swaps_the_label(loss: str, first: float, second: float, sixtyfourths: int) -> None:
    p = sixtyfourths / 64
    found = o.preference_loss(loss, tensor([first]), tensor([second]), tensor([p]), 0.3)
    same(o.preference_loss(loss, tensor([second]), tensor([first]), tensor([1 - p]), 0.3), found)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tie_prefers_neither(loss: str) -> None:
    ratios = tensor([0.4, 0.4]).requires_grad_()
    o.preference_loss(loss, ratios[:1], ratios[1:], tensor([0.5]), 0.3).sum().backward()
    assert float(ratios.grad[0]) == pytest.approx(float(ratios.grad[1]))


def test_dpo_of_a_certain_verdict_is_its_own_loss() -> None:
    first, second = tensor(np.linspace(-3, 3, 7)), tensor(np.linspace(2, -1, 7))
    same(o.preference_loss("dpo", first, second, torch.ones(7), 0.2), -torch.nn.functional.logsigmoid(0.2 * (first - second)))


def test_soft_verdicts_have_their_own_best_margin() -> None:
    """dpo: β·margin = logit p; ipo: margin = (p − ½)/β, as each paper derives it."""
    for p in (0.2, 0.5, 0.9):
        for loss, best in (("dpo", math.log(p / (1 - p)) / 0.5), ("ipo", (p - 0.5) / 0.5)):
            margin = tensor([best]).requires_grad_()
            o.preference_loss(loss, margin, tensor([0.0]), tensor([p]), 0.5).sum().backward()
            assert abs(float(margin.grad)) < 1e-12


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="no loss 'kto'"):
        o.preference_loss("kto", *[torch.ones(1)] * 3, 0.1)


def test_nash_md_loss_is_minus_log_probability_times_its_weight() -> None:
    logprobs, ratio, p = np.random.default_rng(7).normal(0, 1, (3, 9))
    wanted = [-lp * (q - 0.5 - 0.3 * r) for lp, r, q in zip(logprobs, ratio, p, strict=True)]
    same(o.nash_md_loss(tensor(logprobs), tensor(ratio), tensor(p), 0.3), wanted)


# ---------------------------------------------------------------- gradients


def numbers(seed: int, count: int, *shape: int) -> list[Tensor]:
    draw = np.random.default_rng(seed)
    return [tensor(draw.uniform(-0.6, 0.6, shape)) for _ in range(count)]


a, b, c = numbers(8, 3, 12)
scores = 3 * c + tensor([0.5, -0.5] * 6)
P = (a + 0.6) / 1.2

CHECKED: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "clipped_surrogate": (lambda x: o.clipped_surrogate(x, b, c, 0.2)[0], (a,)),
    "penalised_surrogate": (lambda x: o.penalised_surrogate(x, b, c, 0.7), (a,)),
    "clipped_value_loss": (lambda x: o.clipped_value_loss(x, b, 2 * c, 0.2), (a,)),
    "value_loss": (lambda x: o.clipped_value_loss(x, b, c, None), (a,)),
    "pairwise_surrogate": (lambda x: o.pairwise_surrogate(x, b, scores, 0.2), (a,)),
    "nash_md": (lambda x: o.nash_md_loss(x, b, P, 0.3), (a,)),
    **{loss: (lambda x, y, loss=loss: o.preference_loss(loss, x, y, P, 0.8), (3 * b, 3 * c)) for loss in LOSSES},
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = CHECKED[name]
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs], eps=1e-7, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- bandits, over all arms


def slope(objective: Callable[[np.ndarray], float], logits: np.ndarray) -> np.ndarray:
    """By central differences in the logits of a softmax policy, of an objective of its probabilities."""

    def at(x: np.ndarray) -> float:
        return objective(np.exp(x) / np.exp(x).sum())

    return np.array([(at(logits + h) - at(logits - h)) / 2e-6 for h in 1e-6 * np.eye(len(logits))])


LOGITS, REWARD = np.array([0.3, -0.5, 1.0, 0.1]), np.array([1.0, -2.0, 0.5, 3.0])
PAIRS = [(i, j) for i in range(4) for j in range(4)]


def test_p3o_has_the_policy_gradient_over_all_pairs() -> None:
    logits = tensor(LOGITS).requires_grad_()
    logprobs = logits.log_softmax(0)[torch.tensor(PAIRS).flatten()]
    weights = logprobs.detach().view(-1, 2).sum(1).exp()
    loss = o.pairwise_surrogate(logprobs, logprobs.detach(), tensor(REWARD)[torch.tensor(PAIRS).flatten()], 0.2)
    (weights * loss).sum().backward()
    np.testing.assert_allclose(-logits.grad.numpy(), slope(lambda p: float(p @ REWARD), LOGITS), atol=1e-8)


def test_p3o_at_ratio_1_is_the_score_difference_times_the_log_ratios_gradient() -> None:
    logprobs, score = tensor([-1.0, -3.0]).requires_grad_(), tensor([0.7, 0.1])
    o.pairwise_surrogate(logprobs, logprobs.detach(), score, 0.2).sum().backward()
    same(logprobs.grad, [-0.3, 0.3])


@pytest.mark.parametrize("surrogate", ["clip", "penalty"])
def test_ppo_has_the_policy_gradient_over_all_arms(surrogate: str) -> None:
    logits = tensor(LOGITS).requires_grad_()
    new, old = logits.log_softmax(0), tensor(LOGITS).log_softmax(0)
    clip = o.clipped_surrogate(new, old, tensor(REWARD), 0.2)[0]
    (old.exp() * (clip if surrogate == "clip" else o.penalised_surrogate(new, old, tensor(REWARD), 9.0))).sum().backward()
    np.testing.assert_allclose(-logits.grad.numpy(), slope(lambda p: float(p @ REWARD), LOGITS), atol=1e-8)


def test_nash_md_climbs_the_preference_less_the_kl() -> None:
    """Over all pairs its gradient is that of P(π beats the rival) − τ·KL(π ‖ reference), the rival held as it is."""
    draw, tau, mixture = np.random.default_rng(9), 0.4, 0.3
    upper = np.triu(draw.random((4, 4)), 1)
    beats = upper + np.tril(1 - upper.T, -1) + np.eye(4) / 2
    policy, reference = np.exp(LOGITS) / np.exp(LOGITS).sum(), np.array([0.4, 0.3, 0.2, 0.1])
    rival = policy ** (1 - mixture) * reference**mixture
    rival /= rival.sum()

    logits = tensor(LOGITS).requires_grad_()
    own, other = torch.tensor(PAIRS).T
    logprobs = logits.log_softmax(0)[own]
    loss = o.nash_md_loss(logprobs, logprobs - tensor(reference).log()[own], tensor(beats)[own, other], tau)
    (tensor(policy)[own] * tensor(rival)[other] * loss).sum().backward()

    wanted = slope(lambda p: float(p @ beats @ rival - tau * (p * np.log(p / reference)).sum()), LOGITS)
    np.testing.assert_allclose(-logits.grad.numpy(), wanted, atol=1e-8)


def test_nash_md_finds_the_equilibrium_of_a_game_without_a_best_arm() -> None:
    """Of rock, paper and scissors with a KL to the uniform policy: that one, around which self-play by itself would circle."""
    beats = tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
    reference = torch.full((3,), -math.log(3), dtype=torch.float64)
    logits = tensor([1.0, 0.0, -1.0]).requires_grad_()
    own, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    for _ in range(600):
        policy = logits.log_softmax(0)
        rival = (0.75 * policy + 0.25 * reference).log_softmax(0).detach()
        loss = o.nash_md_loss(policy[own], (policy - reference)[own], beats[own, other], 0.1)
        (gradient,) = torch.autograd.grad((policy.detach()[own].exp() * rival[other].exp() * loss).sum(), logits)
        with torch.no_grad():
            logits -= gradient
    np.testing.assert_allclose(logits.detach().softmax(0), 1 / 3, atol=1e-6)
