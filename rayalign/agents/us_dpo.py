"""US-DPO: labels for the given pairs with the most uncertain log-probabilities (Mehta et al. 2023, App. H).

    propose  the prompt's own two responses, out of the data      for more prompts than there are labels
    select   mean over the two of sum_t Var[log pi(t|x, ...)], by dropout before the last layer; the b largest
    observe  nothing                                              loss  DPO

The paper's baseline for AE-DPO: uncertainty without regard to reward, and without the reference.

Differs from the paper:
1. The paper says "variance of the log probabilities of completions"; App. K.3 writes it as the sum of the tokens'
   variances, which is used here, and the mean over the two completions is our reading.
2. As AE-DPO: centred variances, a policy that was not fine-tuned with dropout, the world's stream as the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayalign.agents.ae_dpo import AEDPO
from rayalign.agents.scorer import DropoutMoments, Groups, Scorer
from rayalign.types import Prompt


def mean_variance(moments: DropoutMoments) -> float:
    """Mean over completions of the summed variances of their tokens' log-probabilities, squared nats, >= 0 (App. K.3).

    Grows with length: ten unsure tokens count ten times.

    >>> mean_variance(DropoutMoments(mean_N=np.zeros(2), std_N=np.zeros(2), variance_N=np.array([0.5, 1.5])))
    1.0
    """
    return float(np.mean(moments.variance_N))


class USDPO(AEDPO):
    """Uncertainty sampling of given pairs."""

    name = "us_dpo"

    def _scores(self, scorer: Scorer, prompts: Sequence[Prompt], groups: Groups, seed: int) -> np.ndarray:
        """The variance score of each prompt, `P`."""
        return np.array([mean_variance(moments) for moments in self._moments(scorer, prompts, groups, seed)])
