"""
What is maximised: GRPO, GSPO and PPO, each clipped around the rollout's logprobs. Libraries have these inside their trainers;
TRL's and verl's cannot be called without them, so the formulas are written out here.

Throughout: ``new`` and ``old`` are logprobs [sequences, tokens] in nats of the trainer and of the rollout engine, ``mask`` the
same shape, True for tokens that count; d = new - old, r = exp(d). The rollout engine's logprobs are the behavior policy's: there
is no third scoring of the tokens in between, so what is wrong with them is wrong in the objective (PipelineRL's arrangement).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """An algorithm with its clip range. ``by_sequence``: it clips a sequence's ratio, not a token's."""

    low: float
    high: float
    group: int  # answers to a problem
    by_sequence: bool = False
    critic: bool = False


OBJECTIVES = {
    "grpo": Objective(0.2, 0.2, group=8),
    "gspo": Objective(0.01, 0.01, group=8, by_sequence=True),
    "ppo": Objective(0.2, 0.2, group=1, critic=True),
}
DISCOUNT, GAE_LAMBDA = 1.0, 0.95


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """(reward - mean) / standard deviation over the answers to the same problem; 0 where all are alike.

    rewards: [sequences], a group's side by side. GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1.2.
    """
    grouped = rewards.view(-1, group)
    centered = grouped - grouped.mean(1, keepdim=True)
    return (centered / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns [sequences, tokens] of a reward at each sequence's last token.

    values: [sequences, tokens], the critic's before each token, without a gradient. Generalized advantage estimation: Schulman et
    al. 2015, arXiv 1506.02438, equation 16. Advantages are normalized over the batch.
    """
    last = mask.long().cumsum(1).argmax(1)  # the first place with the full count: the last token
    delivered = torch.zeros_like(values)
    delivered[torch.arange(len(values)), last] = rewards
    found, running, following = torch.zeros_like(values), torch.zeros(len(values)), torch.zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        surprise = delivered[:, t] + DISCOUNT * following - values[:, t]
        running = torch.where(mask[:, t], surprise + DISCOUNT * GAE_LAMBDA * running, running)
        following = torch.where(mask[:, t], values[:, t], following)
        found[:, t] = running * mask[:, t]
    returns = found + values
    kept = found[mask]
    return ((found - kept.mean()) / (kept.std() + 1e-6)) * mask, returns


def clipped(ratio: Tensor, advantages: Tensor, given: Objective) -> Tensor:
    """min(r A, clip(r) A), elementwise. PPO: Schulman et al. 2017, arXiv 1707.06347, equation 7."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - given.low, 1 + given.high) * advantages)


def grpo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, given: Objective) -> Tensor:
    """Clipped by token; mean over a sequence's tokens, then over sequences (arXiv 2402.03300, equation 3, without its KL term).

    advantages: [sequences].
    """
    surrogate = clipped(torch.exp(new - old), advantages[:, None], given)
    return -((surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def gspo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, given: Objective) -> Tensor:
    """Clipped by sequence: s = exp(mean d) in the ratio's place. Zheng et al. 2025, arXiv 2507.18071, equations 5 and 7.

    advantages: [sequences].
    """
    ratio = torch.exp(((new - old) * mask).sum(1) / mask.sum(1).clamp(min=1))
    return -clipped(ratio, advantages, given).mean()


def ppo(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, given: Objective) -> Tensor:
    """Clipped by token, mean over all tokens of the batch (arXiv 1707.06347). advantages: [sequences, tokens]."""
    return -(clipped(torch.exp(new - old), advantages, given) * mask).sum() / mask.sum()


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the squared error of the critic. One gradient step a batch is made here: PPO's clip of values would not be reached."""
    return 0.5 * (((values - returns) ** 2) * mask).sum() / mask.sum()
