"""What a pair is worth (acquisition functions) and which pair to take (pickers), given samples of the reward posterior.

An acquisition function maps rewards to a value per pair and picks nothing; a picker picks.
Candidates of one prompt are assumed to be distinct: whoever calls drops repeated texts first.
Ties go to the lowest index, in every arg max.

Shapes: E ensemble members    P prompts (may be absent)    N candidates per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


# -- acquisition functions ---------------------------------------------------------------------------------------
def reward_margins(rewards_EPN: Tensor) -> Tensor:
    """`r_e(i) - r_e(j)`, `E x P x N x N`: the logit of member e's belief that candidate i beats candidate j."""
    return rewards_EPN.unsqueeze(-1) - rewards_EPN.unsqueeze(-2)


def preference_variance(rewards_EPN: Tensor) -> Tensor:
    r"""How much the members disagree on the outcome: `Var_e[sigmoid(r_e(i) - r_e(j))]`.

    SEA's BAI-TS (Liu et al. 2024, Algorithm 1, line 6). Rewards a pair whose winner some members are sure of and
    others deny; a pair whose winner all members know, or that all call a coin flip, scores 0.
    Population variance; `P x N x N` in [0, 1/4], symmetric, zero diagonal.

    Two members, sure of opposite winners, reach the maximum:

    >>> preference_variance(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))
    tensor([[0.0000, 0.2500],
            [0.2500, 0.0000]])
    """
    return torch.sigmoid(reward_margins(rewards_EPN)).var(dim=0, correction=0)


def logit_difference_variance(rewards_EPN: Tensor) -> Tensor:
    r"""How much the members disagree on the margin: `Var_e[r_e(i) - r_e(j)]`.

    SEA's Uncertainty (appendix H.3: before the sigmoid). Unlike `preference_variance` it does not saturate, so it
    also rewards a pair whose winner all members know but by margins of different sizes; adding a constant to one
    member's rewards changes nothing. Population variance; `P x N x N`, squared reward units, >= 0, symmetric,
    zero diagonal.

    >>> logit_difference_variance(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[0., 1.],
            [1., 0.]])
    """
    return reward_margins(rewards_EPN).var(dim=0, correction=0)


def information_gain(rewards_EPN: Tensor) -> Tensor:
    r"""What a label would teach: `H[mean_e p_e] - mean_e H[p_e]` with `p_e = sigmoid(r_e(i) - r_e(j))`.

    BALD (Houlsby et al. 2011, eq. 2). A pair that all members call a coin flip scores 0, however random its label.
    `P x N x N`, nats in [0, log 2], symmetric, zero diagonal.

    >>> information_gain(torch.tensor([[100.0, 0.0], [0.0, 100.0]]))  # opposite certainties: the whole bit
    tensor([[0.0000, 0.6931],
            [0.6931, 0.0000]])
    """
    margins = reward_margins(rewards_EPN)
    wins, losses = torch.sigmoid(margins), torch.sigmoid(-margins)  # 1 - wins without cancellation
    mean_wins, mean_losses = wins.mean(dim=0), losses.mean(dim=0)
    total = -torch.xlogy(mean_wins, mean_wins) - torch.xlogy(mean_losses, mean_losses)
    own = -torch.xlogy(wins, wins) - torch.xlogy(losses, losses)
    return (total - own.mean(dim=0)).clamp_min(0)  # rounding may leave -1e-8 where nothing is to be learned


# -- pickers -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """A pair of candidates of one prompt, `first != second`."""

    first: int
    second: int
    member: int | None = None
    """Ensemble member whose arg max was taken (of several draws the last); None where none was drawn."""
    value: float | None = None
    """Acquisition value of the pair; None where it was not picked by a value."""


def pick_bai_ts(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """Best-arm identification by Thompson sampling (SEA, Algorithm 2, lines 5 and 7): one member is drawn.

    first: the member's arg max. second: the other candidate whose duel with it the members disagree on most; if
    they agree on all, the best other candidate under the drawn member.
    """
    member = int(rng.integers(len(rewards_EN)))
    first = _argmax(rewards_EN[member])
    variances_N = preference_variance(rewards_EN)[first]
    second = _argmax(variances_N, without=first)
    if not variances_N[second] > 0:
        second = _argmax(rewards_EN[member], without=first)
    return Pick(first=first, second=second, member=member, value=float(variances_N[second]))


def pick_ee_ts(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """Exploit and explore by Thompson sampling (SEA, Algorithm 2, lines 5 and 6): the arg maxes of two members.

    The second member is drawn again, at most `max_redraws` times, while its arg max is the first's; then the
    best other candidate under the last drawn member is taken.
    """
    first = _argmax(rewards_EN[int(rng.integers(len(rewards_EN)))])
    for _ in range(1 + max_redraws):
        member = int(rng.integers(len(rewards_EN)))
        second = _argmax(rewards_EN[member])
        if second != first:
            return Pick(first=first, second=second, member=member)
    return Pick(first=first, second=_argmax(rewards_EN[member], without=first), member=member)


def pick_uncertainty(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """Pure exploration (SEA, appendix H.3): the pair with the largest variance of the logit difference."""
    variances_NN = logit_difference_variance(rewards_EN)
    rows, columns = np.triu_indices(len(variances_NN), k=1)
    best = int(np.argmax(variances_NN.cpu().numpy()[rows, columns]))
    first, second = int(rows[best]), int(columns[best])
    return Pick(first=first, second=second, value=float(variances_NN[first, second]))


def pick_extremes(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """The best and the worst candidate under one drawn member: the pair with the largest gap it believes in."""
    member = int(rng.integers(len(rewards_EN)))
    first = _argmax(rewards_EN[member])
    return Pick(first=first, second=_argmax(-rewards_EN[member], without=first), member=member)


PICKERS: Mapping[str, Callable[[Tensor, np.random.Generator, int], Pick]] = {
    "bai_ts": pick_bai_ts,
    "ee_ts": pick_ee_ts,
    "uncertainty": pick_uncertainty,
}


def _argmax(values_N: Tensor, without: int | None = None) -> int:
    values = values_N.detach().cpu().numpy()
    allowed = np.delete(np.arange(len(values)), [] if without is None else without)
    return int(allowed[np.argmax(values[allowed])])  # numpy promises the lowest index, torch does not
