"""`rayalign/RFF-v0`: a dueling bandit on numbers. Contexts and actions are vectors, the reward is a random function.

The synthetic task of Mehta et al. (Sample Efficient Preference Alignment in LLMs via Active Exploration, section 6.1).
For algorithms on kernels; there are no texts, so no language model can be run on it.

Shapes: P contexts    N actions    D dimensions of either    J Fourier features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from scipy.optimize import minimize
from scipy.special import expit, ndtr
from scipy.stats import qmc

from rayalign.errors import ConfigError, did_you_mean

LINKS: Mapping[str, Callable[[Any], Any]] = {"logistic": expit, "gaussian": ndtr}
"""From a difference of rewards to the probability of winning: Bradley-Terry, or Thurstone's normal distribution."""
_STARTS = 4  # of the search for the best action

Action = Mapping[str, np.ndarray]
"""`context`, `first` and `second`: vectors in the unit cubes (of the vector environment: a row each)."""


def net(dim: int, size: int) -> np.ndarray:
    """About `size` points that cover `[0, 1]^dim` evenly, `N x D`: a grid with both ends, or (dim > 1) a Sobol set.

    >>> net(1, 3).tolist(), net(0, 3).shape, len(net(2, 100))
    ([[0.0], [0.5], [1.0]], (1, 0), 128)
    """
    if dim == 0:
        return np.zeros((1, 0))
    if dim == 1:
        return np.linspace(0.0, 1.0, size)[:, None]
    return qmc.Sobol(dim, scramble=False).random_base2(int(np.ceil(np.log2(size))))


class FourierReward:
    r"""A random function: `r(x, a) = scale * sqrt(2/J) * sum_j w_j cos(omega_j . (x, a) + b_j)` on unit cubes.

    `w ~ N(0, 1)`, `omega ~ N(0, 1/lengthscale^2)`, `b ~ U(0, 2 pi)` (Rahimi and Recht 2007). With many features it is
    a draw of the Gaussian process with kernel `scale^2 exp(-|z - z'|^2 / (2 lengthscale^2))`. The paper gives no
    numbers; these defaults bring the norms of its Table 1 about (docs/results/borda_rff.md).
    """

    def __init__(
        self,
        context_dim: int = 1,
        action_dim: int = 1,
        num_features: int = 128,
        lengthscale: float = 0.3,
        scale: float = 1.5,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("context_dim", context_dim, 0),
            ("action_dim", action_dim, 1),
            ("num_features", num_features, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"env.{name}={value} must be at least {least}.")
        for name, number in (("lengthscale", lengthscale), ("scale", scale)):
            if not number > 0:
                raise ConfigError(f"env.{name}={number} must be positive.")
        self.context_dim, self.action_dim = context_dim, action_dim
        rng = np.random.default_rng([seed, context_dim, action_dim])
        self.weights_J = scale * np.sqrt(2 / num_features) * rng.standard_normal(num_features)
        omega_JD = rng.standard_normal((num_features, context_dim + action_dim)) / lengthscale
        self._context_JD, self._action_JD = omega_JD[:, :context_dim], omega_JD[:, context_dim:]
        self._phases_J = rng.uniform(0, 2 * np.pi, num_features)

    def __call__(self, contexts_PD: np.ndarray, actions_PD: np.ndarray) -> np.ndarray:
        """`P` rewards, row by row."""
        angles_PJ = contexts_PD @ self._context_JD.T + actions_PD @ self._action_JD.T + self._phases_J
        return np.cos(angles_PJ) @ self.weights_J

    def table(self, contexts_PD: np.ndarray, actions_ND: np.ndarray) -> np.ndarray:
        """`P x N`: the reward of every action in every context."""
        return self._table(contexts_PD, *self._waves(actions_ND))

    def best(self, contexts_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`max_a r(x, a)`, `P`, and where it is, `P x D`: the best points of a fine net, climbed from to the top."""
        values_PN = self._table(contexts_PD, *self._net_waves)
        values_P, actions_PD = np.empty(len(values_PN)), np.empty((len(values_PN), self.action_dim))
        for p, (context_D, row_N) in enumerate(zip(contexts_PD, values_PN, strict=True)):
            starts = np.argsort(-row_N, kind="stable")[:_STARTS]
            tops = [self._climb(context_D, self._net_ND[start]) for start in starts]
            values_P[p], actions_PD[p] = max(tops, key=lambda top: top[0])
        return values_P, actions_PD

    def borda(
        self, contexts_PD: np.ndarray, actions_PD: np.ndarray, link: str = "logistic", opponents_ND: Any = None
    ) -> np.ndarray:
        """Contextual Borda function `f_r(x, a) = E_a'[link(r(x, a) - r(x, a'))]`, `P`; the opponents a' are uniform.

        By default over midpoints of 512 cells (one dimension) or a Sobol set of the same size.
        """
        if opponents_ND is None:
            opponents_ND = (np.arange(512)[:, None] + 0.5) / 512 if self.action_dim == 1 else net(self.action_dim, 512)
        margins_PN = self(contexts_PD, actions_PD)[:, None] - self.table(contexts_PD, opponents_ND)
        return LINKS[link](margins_PN).mean(axis=1)

    def _table(self, contexts_PD: np.ndarray, cos_NJ: np.ndarray, sin_NJ: np.ndarray) -> np.ndarray:
        angles_PJ = contexts_PD @ self._context_JD.T + self._phases_J  # cos(u + v) = cos u cos v - sin u sin v
        return (np.cos(angles_PJ) * self.weights_J) @ cos_NJ.T - (np.sin(angles_PJ) * self.weights_J) @ sin_NJ.T

    def _waves(self, actions_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angles_NJ = actions_ND @ self._action_JD.T
        return np.cos(angles_NJ), np.sin(angles_NJ)

    @cached_property
    def _net_ND(self) -> np.ndarray:
        return net(self.action_dim, 1025 if self.action_dim == 1 else 4096)

    @cached_property
    def _net_waves(self) -> tuple[np.ndarray, np.ndarray]:
        return self._waves(self._net_ND)

    def _climb(self, context_D: np.ndarray, start_D: np.ndarray) -> tuple[float, np.ndarray]:
        fixed_J = self._context_JD @ context_D + self._phases_J

        def negative(action_D: np.ndarray) -> tuple[float, np.ndarray]:
            angles_J = fixed_J + self._action_JD @ action_D
            return -float(np.cos(angles_J) @ self.weights_J), (np.sin(angles_J) * self.weights_J) @ self._action_JD

        bounds = [(0.0, 1.0)] * self.action_dim
        found = minimize(negative, start_D, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14})
        return -float(found.fun), found.x


class _Judge:
    """What both environments share: the function, the link, and what is true of a row of duels."""

    def __init__(self, link: str, settings: Mapping[str, Any]) -> None:
        if link not in LINKS:
            raise ConfigError(f"env.link={link!r} is unknown. {did_you_mean(link, LINKS)}")
        known = inspect.signature(FourierReward).parameters
        for name in settings:
            if name not in known:
                raise ConfigError(f"env.{name} is not a setting of RFF-v0. {did_you_mean(name, [*known, 'link'])}")
        self.link = LINKS[link]
        self.reward = FourierReward(**settings)
        dims = {"context": self.reward.context_dim, "first": self.reward.action_dim, "second": self.reward.action_dim}
        self.action_space = spaces.Dict({name: spaces.Box(0.0, 1.0, (dim,), np.float64) for name, dim in dims.items()})
        self.observation_space = self.action_space["context"]

    def __call__(self, action: Action, rows: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Arrays of one entry a duel. `rows` is the shape before the dimensions: () or (n,)."""
        parts = [self._part(action, name, rows) for name in ("context", "first", "second")]
        contexts_PD = parts[0]
        first_P, second_P = self.reward(contexts_PD, parts[1]), self.reward(contexts_PD, parts[2])
        best_P, _ = self.reward.best(contexts_PD)
        best_P = np.maximum(best_P, np.maximum(first_P, second_P))  # of two tops that differ by rounding
        probability_P = self.link(first_P - second_P)
        return {
            "labelled": np.ones(len(best_P), dtype=bool),
            "label": (rng.random(len(best_P)) < probability_P).astype(np.float64),
            "probability": probability_P,
            "regret_reward": best_P - (first_P + second_P) / 2,
            "regret_preference": self.link(best_P - first_P) + self.link(best_P - second_P) - 1,
        }

    def _part(self, action: Action, name: str, rows: tuple[int, ...]) -> np.ndarray:
        space = self.action_space[name]
        try:
            part = np.asarray(action[name], dtype=np.float64)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(
                f"the action is {action!r:.100}; it must be a dict of arrays: context, first and second."
            ) from error
        shape = (*rows, *space.shape)  # type: ignore[misc]
        if part.shape != shape or not ((part >= 0) & (part <= 1)).all():
            raise ConfigError(f"action[{name!r}]={part!r:.100} must be of shape {shape} with numbers in [0, 1].")
        return part.reshape(-1, shape[-1])


class RFFBandit(gym.Env[np.ndarray, Action]):
    """One duel between two actions in a context of one's choice, one bit.

    Description   A contextual dueling bandit on unit cubes. The hidden reward is a random Fourier function; which
                  action wins is drawn with the probability that the link gives. Steps don't influence each other.
    Observation   `Box(context_dim)`: a context drawn uniformly, for algorithms that don't choose theirs.
    Action        `Dict`: `context` (`Box`; the observed one or any other), `first` and `second` (`Box(action_dim)`).
    Reward        1.0 if the first is preferred, 0.0 if the second is.
    Episode end   Never; a wrapper (`LabelBudget`) truncates.
    Info keys     of the duel: `labelled` (True), `label`, `probability` (that the first is preferred), and exactly
                  `regret_reward`, r* - (r + r')/2, and `regret_preference`, P(a* > a) + P(a* > a') - 1.
    Arguments     `link` (logistic or gaussian) and those of `FourierReward`: context_dim, action_dim, num_features,
                  lengthscale, scale, seed. The seed is the function's; `env.unwrapped.reward` is the function.
    Reset         The seed of reset decides contexts and labels.

    Version history: v0, the first.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own annotation)

    def __init__(self, link: str = "logistic", render_mode: None = None, **settings: Any) -> None:
        self._judge = _Judge(link, settings)
        self.reward = self._judge.reward
        self.observation_space = self._judge.observation_space
        self.action_space = self._judge.action_space  # type: ignore[assignment]  # any mapping will do
        self.render_mode = render_mode
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Offer a context. There are no options."""
        super().reset(seed=seed)
        _no_options(options)
        self._ready = True
        return self._offer(), {}

    def step(self, action: Action) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Ask which of the two is preferred; offer another context."""
        if not self._ready:
            raise gym.error.ResetNeeded("call reset before step.")
        info = {name: values[0].item() for name, values in self._judge(action, (), self.np_random).items()}
        return self._offer(), info["label"], False, False, info

    def _offer(self) -> np.ndarray:
        return self.np_random.random(self.reward.context_dim)


class RFFBanditVector(gym.vector.VectorEnv[np.ndarray, Action, np.ndarray]):
    """`num_envs` duels about one function in a step.

    Description, Episode end, Arguments and Reset as `RFFBandit`. So are Observation, Action, Reward and Info keys, but
    every array has one more axis, the first, of length n.

    Version history: v0, the first.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, link: str = "logistic", render_mode: None = None, **settings: Any) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs={num_envs} must be at least 1.")
        self._judge, self.num_envs = _Judge(link, settings), num_envs
        self.reward = self._judge.reward
        self.single_observation_space = self._judge.observation_space
        self.single_action_space = self._judge.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._ready = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Offer n contexts. There are no options."""
        super().reset(seed=seed)
        _no_options(options)
        self._ready = True
        return self._offer(), {}

    def step(self, actions: Action) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Ask n times which of the two is preferred; offer other contexts."""
        if not self._ready:
            raise gym.error.ResetNeeded("call reset before step.")
        info = self._judge(actions, (self.num_envs,), self.np_random)
        ended = np.zeros(self.num_envs, dtype=bool)
        return self._offer(), info["label"].copy(), ended, ended.copy(), info

    def _offer(self) -> np.ndarray:
        return self.np_random.random((self.num_envs, self.reward.context_dim))


def _no_options(options: Mapping[str, Any] | None) -> None:
    for name in options or {}:
        raise ConfigError(f"reset option {name!r} is unknown: this environment has none.")
