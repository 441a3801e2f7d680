"""Direct-alignment losses: pure functions, one number per duel.

With `h = [log pi(y+) - log ref(y+)] - [log pi(y-) - log ref(y-)]`, sums over response tokens,
end-of-sequence counted (SEA, Liu et al. 2024, eqs. 12-14).

Shapes: B duels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rayalign.types import Preference


@dataclass(frozen=True, kw_only=True)
class PairLogProbs:
    """What a loss sees of `B` labelled duels. Log-probabilities in nats, summed over response tokens."""

    winner_B: Tensor
    loser_B: Tensor
    reference_winner_B: Tensor | None = None
    """None where the agent needs no reference."""
    reference_loser_B: Tensor | None = None
    winner_length_B: Tensor
    """Response tokens, end-of-sequence counted."""
    loser_length_B: Tensor
    preferences: Sequence[Preference] = ()
    """The duels themselves, for agents that stored something in `meta`."""
    exchanged: bool = False
    """Whether winner and loser have changed places (`swapped`), as they do once for a tie."""

    def sides(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the first and of the second responses, `B` each, nats, whichever won."""
        first_won = [(p.label >= 0.5) != self.exchanged for p in self.preferences]
        first_won_B = torch.tensor(first_won, device=self.winner_B.device)
        return (
            torch.where(first_won_B, self.winner_B, self.loser_B),
            torch.where(first_won_B, self.loser_B, self.winner_B),
        )

    def swapped(self) -> PairLogProbs:
        """The same duels with winner and loser exchanged."""
        return PairLogProbs(
            winner_B=self.loser_B,
            loser_B=self.winner_B,
            reference_winner_B=self.reference_loser_B,
            reference_loser_B=self.reference_winner_B,
            winner_length_B=self.loser_length_B,
            loser_length_B=self.winner_length_B,
            preferences=self.preferences,
            exchanged=not self.exchanged,
        )


def margin(pairs: PairLogProbs) -> Tensor:
    """`h_B`: how much more than the reference the policy prefers the winner, nats.

    >>> from torch import tensor as t
    >>> margin(PairLogProbs(winner_B=t([-1.0]), loser_B=t([-3.0]), reference_winner_B=t([-2.0]),
    ...     reference_loser_B=t([-2.5]), winner_length_B=t([2]), loser_length_B=t([2])))
    tensor([1.5000])
    """
    assert pairs.reference_winner_B is not None and pairs.reference_loser_B is not None, "this loss needs a reference"
    return (pairs.winner_B - pairs.reference_winner_B) - (pairs.loser_B - pairs.reference_loser_B)


def dpo(pairs: PairLogProbs, config: Any) -> Tensor:
    """`-log sigmoid(beta h)` (Rafailov et al. 2023, eq. 7), with label smoothing `e`: `(1-e) F(h) + e F(-h)`."""
    logits_B = config.beta * margin(pairs)
    e = config.label_smoothing
    return -(1 - e) * F.logsigmoid(logits_B) - e * F.logsigmoid(-logits_B)


def ipo(pairs: PairLogProbs, config: Any) -> Tensor:
    """`(h - 1/(2 beta))^2` (Azar et al. 2023, eq. 17); `1/(2 beta)` is the margin it aims at.

    Smoothing pulls the target towards the mean label, `(1 - 2e) / (2 beta)`, as the expected squared error does.
    """
    target = (1 - 2 * config.label_smoothing) / (2 * config.beta)
    return (margin(pairs) - target) ** 2


def slic(pairs: PairLogProbs, config: Any) -> Tensor:
    """`max(0, 1 - beta h)` (Zhao et al. 2023, in the reference-relative form of SEA, eq. 14)."""
    logits_B = config.beta * margin(pairs)
    e = config.label_smoothing
    return (1 - e) * F.relu(1 - logits_B) + e * F.relu(1 + logits_B)


def simpo(pairs: PairLogProbs, config: Any) -> Tensor:
    """`-log sigmoid(beta (log pi+ / n+ - log pi- / n-) - gamma)`, `gamma = gamma_over_beta * beta`, no reference
    (Meng et al. 2024, eq. 6).
    """
    mean_margin_B = pairs.winner_B / pairs.winner_length_B - pairs.loser_B / pairs.loser_length_B
    logits_B = config.beta * mean_margin_B
    gamma = config.gamma_over_beta * config.beta
    e = config.label_smoothing
    return -(1 - e) * F.logsigmoid(logits_B - gamma) - e * F.logsigmoid(-logits_B - gamma)


LOSSES: Mapping[str, Callable[[PairLogProbs, Any], Tensor]] = {"dpo": dpo, "ipo": ipo, "slic": slic, "simpo": simpo}
