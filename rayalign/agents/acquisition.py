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


def optimistic_gap(rewards_EN: Tensor, width: float = 1.0) -> Tensor:
    r"""By how much i may be better than j, at best: `(mu_i + w sigma_i) - (mu_j - w sigma_j)`.

    DeltaUCB (Melikidze et al. 2026, ActiveUltraFeedback): upper bound of the first minus lower bound of the second,
    over members, population standard deviation. Rewards a large predicted gap, and uncertainty about either response
    even where all members agree on the pair. `P x N x N`, reward units, not symmetric, diagonal `2 w sigma_i`; with
    `width=0` the gap of the means. A constant added to one member's rewards, which no label can tell, widens all sigma.

    >>> optimistic_gap(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([[ 2.,  3.],
            [-1.,  0.]])
    """
    mean_N, std_N = rewards_EN.mean(dim=0), rewards_EN.std(dim=0, correction=0)
    return (mean_N + width * std_N).unsqueeze(-1) - (mean_N - width * std_N).unsqueeze(-2)


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


def pick_dts(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """Double Thompson sampling (Dwaracherla et al. 2024): the arg maxes of two members.

    The second member is drawn again, at most `max_redraws` times, while its arg max is the first's; then any other
    candidate is drawn.
    """
    first = _argmax(rewards_EN[int(rng.integers(len(rewards_EN)))])
    return _second_draw(first, rewards_EN, rng, max_redraws)


def pick_drts(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0) -> Pick:
    """Double reverse Thompson sampling (Melikidze et al. 2026): a member's arg max against another one's arg min.

    The second member is drawn again, at most `max_redraws` times, while its arg min is the first; then any other
    candidate is drawn. Where the members agree, the pair with the largest gap.
    """
    first = _argmax(rewards_EN[int(rng.integers(len(rewards_EN)))])
    return _second_draw(first, -rewards_EN, rng, max_redraws)


def pick_delta_ucb(rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int = 0, width: float = 1.0) -> Pick:
    """The pair with the largest `optimistic_gap`; nothing is drawn (Melikidze et al. 2026)."""
    gaps_NN = optimistic_gap(rewards_EN, width).detach().cpu().numpy().copy()
    np.fill_diagonal(gaps_NN, -np.inf)
    first, second = np.unravel_index(int(np.argmax(gaps_NN)), gaps_NN.shape)
    return Pick(first=int(first), second=int(second), value=float(gaps_NN[first, second]))


PICKERS: Mapping[str, Callable[[Tensor, np.random.Generator, int], Pick]] = {
    "bai_ts": pick_bai_ts,
    "ee_ts": pick_ee_ts,
    "uncertainty": pick_uncertainty,
    "dts": pick_dts,
    "drts": pick_drts,
    "delta_ucb": pick_delta_ucb,
}


def _second_draw(first: int, rewards_EN: Tensor, rng: np.random.Generator, max_redraws: int) -> Pick:
    """A member's arg max that is not `first`; after `max_redraws` more draws any other candidate, all alike."""
    for _ in range(1 + max_redraws):
        member = int(rng.integers(len(rewards_EN)))
        second = _argmax(rewards_EN[member])
        if second != first:
            return Pick(first=first, second=second, member=member)
    other = int(rng.integers(rewards_EN.shape[1] - 1))
    return Pick(first=first, second=other + (other >= first), member=member)


def _argmax(values_N: Tensor, without: int | None = None) -> int:
    values = values_N.detach().cpu().numpy()
    allowed = np.delete(np.arange(len(values)), [] if without is None else without)
    return int(allowed[np.argmax(values[allowed])])  # numpy promises the lowest index, torch does not
