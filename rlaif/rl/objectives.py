"""What is optimised, as functions of log-probabilities, rewards and values: nothing here knows a model.

Shapes: B responses of up to T tokens; `mask` (B, T) is 1 for tokens of a response, 0 for padding behind it. Log-probabilities
are natural, of the sampled tokens. Losses come as sums over what counts with their weights, for whoever calls to divide by the
number of tokens or responses of the whole minibatch, over all its parts and processes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Kl = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: Kl) -> Tensor:
    """KL(policy ‖ reference) for each sampled token, in nats, from log-probabilities of any shape (Schulman 2020).

    With x = log π − log π_ref: k1 is x, unbiased; k2 is x²/2, of low variance; k3 is e^−x − 1 + x, both unbiased and never
    negative.
    """
    log_ratio = logprobs - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def shaped(scores: Tensor, kl: Tensor, beta: float, mask: Tensor) -> Tensor:
    """Rewards for each token (B, T): −β·KL, and at a response's last token its score (B) too."""
    rewards = -beta * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): advantages and returns, both (B, T), 0 where masked.

    A response ends with its last token, behind which nothing has a value.
    """
    found = torch.zeros_like(rewards)
    following = carried = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = (delta + gamma * lam * carried) * mask[:, t]
        following = values[:, t] * mask[:, t]
        found[:, t] = carried
    return found, (found + values) * mask


def whitened(values: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, shift: bool = True) -> Tensor:
    """Values at variance 1 and, with `shift`, mean 0; else they keep their mean. Masked ones become 0."""
    found = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (found if shift else found + mean) * mask


def clipped_surrogate(logprobs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's loss for each token (arXiv 1707.06347, eq. 7), and where the clipped ratio was the one that counted."""
    ratio = (logprobs - old).exp()
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, held), (held > free).float()


def penalised_surrogate(logprobs: Tensor, old: Tensor, advantage: Tensor, coefficient: float) -> Tensor:
    """PPO's other loss for each token (arXiv 1707.06347, eq. 8): −ratio·A + coefficient·KL(old ‖ policy).

    The KL is estimated from the tokens, which the old policy sampled: e^x − 1 − x, with x = log π − log π_old.
    """
    log_ratio = logprobs - old
    return -advantage * log_ratio.exp() + coefficient * (torch.expm1(log_ratio) - log_ratio)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error for each token; the greater one of the value and of the value held to ± clip of the old one."""
    free = (values - returns).square()
    if clip is None:
        return free / 2
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return torch.maximum(free, held) / 2


def pairwise_surrogate(logprobs: Tensor, old: Tensor, scores: Tensor, clip: float) -> Tensor:
    """Pairwise PPO's loss for each pair (after arXiv 2310.00212): responses 2i and 2i + 1 answer one prompt.

    logprobs, old, scores: (B), of whole responses; scores with the KL's penalty taken off. With Δ = (r₁ − r₂)/2 and the ratio
    ρ of π(y₁)/π(y₂) to what it was, the loss is the greater one of −ρ·Δ and −clip(ρ)·Δ, as a mean over both orders of the
    pair. Its gradient at ρ = 1 is that of −Δ·(log π(y₁) − log π(y₂)): what a prompt adds to both scores has no part in it.
    """
    log_ratio, difference = logprobs - old, (scores[0::2] - scores[1::2]) / 2
    losses = []
    for sign in (1, -1):
        ratio = (sign * (log_ratio[0::2] - log_ratio[1::2])).exp()
        gain = sign * difference
        losses.append(torch.maximum(-ratio * gain, -ratio.clamp(1 - clip, 1 + clip) * gain))
    return (losses[0] + losses[1]) / 2


def adapted(beta: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """The KL coefficient after a step of so many responses (arXiv 1909.08593, §2.2); `kl`: nats a response."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * responses / horizon)


def penalty_after(coefficient: float, kl: float, target: float) -> float:
    """The coefficient of `penalised_surrogate` for the next step (arXiv 1707.06347, §4); `kl`: nats a token."""
    if kl < target / 1.5:
        return coefficient / 2
    return coefficient * 2 if kl > target * 1.5 else coefficient


# ---------------------------------------------------------------- preferences


def preference_loss(loss: str, first: Tensor, second: Tensor, p: Tensor, beta: float) -> Tensor:
    """The loss of each pair from the log-ratios log π/π_ref of its two responses, and P(the first is better); all (B).

    dpo (arXiv 2305.18290) and ipo (2310.12036) take p as it is; hinge (2305.10425), apo_zero and apo_down (2408.06266, §3)
    take the side that it prefers, at ½ half of each. With p for 1 − p and the responses swapped, each loss is the same.
    """
    share = p if loss in ("dpo", "ipo") else ((p - 0.5).sign() + 1) / 2
    return share * _preferred(loss, first, second, beta) + (1 - share) * _preferred(loss, second, first, beta)


def _preferred(loss: str, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The loss of each pair of which one response is the better one for certain."""
    margin = chosen - rejected
    if loss == "dpo":
        return -logsigmoid(beta * margin)
    if loss == "ipo":
        return (margin - 1 / (2 * beta)).square()
    if loss == "hinge":
        return torch.relu(1 - beta * margin)
    if loss == "apo_zero":
        return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()
    if loss == "apo_down":
        return (beta * chosen).sigmoid() + 1 - (beta * margin).sigmoid()
    raise ValueError(f"no loss '{loss}'")


def nash_md_loss(logprobs: Tensor, log_ratio: Tensor, p: Tensor, beta: float) -> Tensor:
    """Nash-MD's policy gradient for each response (arXiv 2312.00886, §7) as a loss; all (B).

    logprobs: of the policy's own response; log_ratio: log π/π_ref of it, as a number; p: P(it beats the rival's).
    The gradient is ∇log π·(p − ½ − β·log π/π_ref).
    """
    return -logprobs * (p - 0.5 - beta * log_ratio).detach()
