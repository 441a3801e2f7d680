"""AE-Borda on numbers: active exploration by the contextual Borda function (Mehta et al., Algorithm 1).

    f(x, a) = E over uniform a' of P(a beats a' in context x)      mu -/+ beta sigma: bounds on f, from labels so far

    the first n_0   x, a, a' uniform
    context         x = argmax_x (max_a upper(x, a) - max_a lower(x, a))              eq. 3
    action          a = argmax_a upper(x, a)                                          eq. 4
    opponent        a' uniform; the label says whether a beats it
    policy          x -> argmax_a of the greatest lower bound so far                  eq. 5

The baselines differ in one line each: `ucb` takes a uniform context, `uniform` a uniform context and action.
`rayalign.agents.ae_borda` is the same algorithm on prompts and responses.

Differs from the paper:
1. Contexts and actions are searched on a net of points; opponents and uniform draws are continuous.
2. In the schedule of Theorem 4.3 the greatest information gain of any t points, which nobody can compute, is the gain
   of the t points at hand, which is less. Its print misplaces a bracket; Lemma B.1 has the right one.
3. Eq. 5 also counts the posterior after the last label.

Shapes: P contexts    N actions    D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayalign.agents.posteriors.kernel import KernelRidge, Posterior
from rayalign.errors import ConfigError, did_you_mean

STRATEGIES = ("ae", "ucb", "uniform")
SCHEDULES = ("constant", "theorem")
PESSIMISMS = ("ever", "last")


@dataclass(frozen=True, kw_only=True)
class BordaConfig:
    """Settings of the algorithm, whatever contexts and actions are."""

    strategy: str = "ae"
    """ae: contexts and actions are chosen; ucb: actions alone; uniform: nothing is."""
    initial_labels: int = 25
    """n_0: labels on random pairs before anything is chosen; 0 chooses at once."""
    schedule: str = "theorem"
    """How wide the bounds are: `theorem` is Lemma B.1's beta_t, which holds with certainty 1 - delta; `constant` is
    `width` standard deviations, which may not (docs/results/borda_rff.md shows what that costs)."""
    width: float = 1.0
    """constant only: beta; 0 is greedy. Untried actions have the upper bound `prior_mean + width`: below the
    chance that good actions have of winning, they stay untried."""
    pessimism: str = "ever"
    """Which lower bound the policy maximises: the greatest one `ever` (eq. 5), or the `last` one. Ever is right where
    bounds hold, as the theorem's do; of narrower ones it remembers the worst mistakes."""
    norm_bound: float = 1.0
    """B, theorem only: bound of the reward's and the Borda function's norm in the kernel's space."""
    failure_probability: float = 0.1
    """delta, theorem only: how often the bounds may fail, in (0, 1)."""

    def __post_init__(self) -> None:
        for name, known in (("strategy", STRATEGIES), ("schedule", SCHEDULES), ("pessimism", PESSIMISMS)):
            if getattr(self, name) not in known:
                hint = did_you_mean(getattr(self, name), known)
                raise ConfigError(f"agent.borda.{name}={getattr(self, name)!r} is unknown. {hint}")
        for name in ("initial_labels", "width", "norm_bound"):
            if getattr(self, name) < 0:
                raise ConfigError(f"agent.borda.{name}={getattr(self, name)} must not be negative.")
        if not 0 < self.failure_probability < 1:
            raise ConfigError(f"agent.borda.failure_probability={self.failure_probability} must be in (0, 1).")


# -- the formulas ------------------------------------------------------------------------------------------------------
def confidence_width(norm_bound: float, information_gain: float, failure_probability: float) -> float:
    r"""`beta_t = 2 B + sqrt(2 (Phi + 1 + log(2 / delta)))` (Lemma B.1), in standard deviations of the posterior.

    >>> confidence_width(0.5, math.log(2), 4 / math.e)  # log(2 / delta) = 1 - log 2, so the root is of 2 * 2
    3.0
    """
    return 2 * norm_bound + math.sqrt(2 * (information_gain + 1 + math.log(2 / failure_probability)))


def width_after(size: int, config: BordaConfig, posterior: Posterior) -> float:
    """Beta of the posterior after `size` labels."""
    if config.schedule == "constant":
        return config.width
    if not isinstance(posterior, KernelRidge):
        raise ConfigError("agent.borda.schedule='theorem' is about kernel ridge regression. Use 'constant'.")
    return confidence_width(config.norm_bound, posterior.information_gain(size), config.failure_probability)


def value_gap(lower_PN: np.ndarray, upper_PN: np.ndarray) -> np.ndarray:
    r"""`max_a upper(x, a) - max_a lower(x, a)` (eq. 3), `P`: how much the value of a context is in doubt.

    Two separate maxima: an action that is uncertain but surely not the best adds nothing. At least 0.

    >>> value_gap(np.array([[0.5, 0.0]]), np.array([[0.75, 0.625]])).item()  # the second action is out of the question
    0.25
    """
    return upper_PN.max(axis=-1) - lower_PN.max(axis=-1)


# -- the algorithm -----------------------------------------------------------------------------------------------------
class BordaBandit:
    """Algorithm 1 and its baselines, for `rayalign/RFF-v0` and environments like it."""

    def __init__(
        self, config: BordaConfig, posterior: Posterior, contexts_PD: np.ndarray, actions_ND: np.ndarray
    ) -> None:
        self.config, self.posterior = config, posterior
        self.contexts_PD, self.actions_ND = contexts_PD, actions_ND
        self._shape = len(contexts_PD), len(actions_ND)
        self._view = posterior.view(pairs(contexts_PD, actions_ND))
        self.envelope_PN = np.full(self._shape, -np.inf)
        """Greatest lower bound so far of each action in each context."""

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound on the Borda function, `P x N` each."""
        lower_R, upper_R = self._view.bounds(self.width)
        return lower_R.reshape(self._shape), upper_R.reshape(self._shape)

    @property
    def width(self) -> float:
        """Beta of the next choice."""
        return width_after(self.posterior.size, self.config, self.posterior)

    def ask(self, offered_D: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The next duel, an action of the environment. `offered_D` is a uniform context, which need not be taken."""
        dim = self.actions_ND.shape[1]
        first, second = rng.random((2, dim))
        if self.config.strategy == "uniform" or self.posterior.size < self.config.initial_labels:
            return {"context": offered_D, "first": first, "second": second}
        if self.config.strategy == "ucb":
            _, upper_N = self.posterior.view(pairs(offered_D[None], self.actions_ND)).bounds(self.width)
            return {"context": offered_D, "first": self.actions_ND[upper_N.argmax()], "second": second}
        lower_PN, upper_PN = self.bounds()
        p = int(value_gap(lower_PN, upper_PN).argmax())
        return {"context": self.contexts_PD[p], "first": self.actions_ND[upper_PN[p].argmax()], "second": second}

    def tell(self, action: Mapping[str, np.ndarray], label: float) -> None:
        """Learn who won. The opponent is noise: the label is about the first action alone."""
        self.posterior.add(np.concatenate([action["context"], action["first"]])[None], [label])
        if self.posterior.size >= self.config.initial_labels:
            self.envelope_PN = np.maximum(self.envelope_PN, self.bounds()[0])

    def policy(self, pessimism: str | None = None) -> np.ndarray:
        """The pessimistic policy (eq. 5): for each context of the net the index of its action, `P`."""
        ever = (pessimism or self.config.pessimism) == "ever"
        return (self.envelope_PN if ever else self.bounds()[0]).argmax(axis=1)


def pairs(contexts_PD: np.ndarray, actions_ND: np.ndarray) -> np.ndarray:
    """Every context with every action as one vector, context-major, `P*N x D`."""
    contexts, actions = len(contexts_PD), len(actions_ND)
    return np.hstack([np.repeat(contexts_PD, actions, axis=0), np.tile(actions_ND, (contexts, 1))])
