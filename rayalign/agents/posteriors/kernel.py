"""Kernel posteriors over the contextual Borda function (Mehta et al., AE-Borda, appendix A and section 6.1).

    KernelRidge    ridge regression on labels 0 and 1, in closed form; what the theory is about
    BernoulliGP    GPyTorch's variational Gaussian process classifier; what the paper's experiments use

Both learn from points (context and action as one vector) and give bounds on the probability that the action there beats
a random opponent. A `view` is a fixed set of points whose bounds follow the labels.

Shapes: R points    D dimensions    T labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from scipy.linalg import solve_triangular

from rayalign.errors import ConfigError, did_you_mean


# -- kernels ---------------------------------------------------------------------------------------------------------
def squared_distances(x_RD: np.ndarray, y_TD: np.ndarray) -> np.ndarray:
    """`R x T`; never below 0, which rounding would do."""
    squares = (x_RD**2).sum(axis=1)[:, None] + (y_TD**2).sum(axis=1)
    return np.maximum(squares - 2 * x_RD @ y_TD.T, 0.0)


def rbf(x_RD: np.ndarray, y_TD: np.ndarray, lengthscale: float) -> np.ndarray:
    """Squared exponential: `exp(-d^2 / (2 l^2))`, in (0, 1]."""
    return np.exp(squared_distances(x_RD, y_TD) / (-2 * lengthscale**2))


def matern(x_RD: np.ndarray, y_TD: np.ndarray, lengthscale: float) -> np.ndarray:
    """Matern 5/2: `(1 + s + s^2 / 3) exp(-s)` with `s = sqrt(5) d / l`, in (0, 1]."""
    s_RT = np.sqrt(5 * squared_distances(x_RD, y_TD)) / lengthscale
    return (1 + s_RT + s_RT**2 / 3) * np.exp(-s_RT)


def linear(x_RD: np.ndarray, y_TD: np.ndarray, lengthscale: float) -> np.ndarray:
    """`x . y / l^2`: functions linear in the features."""
    return x_RD @ y_TD.T / lengthscale**2


KERNELS: Mapping[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "rbf": rbf,
    "matern": matern,
    "linear": linear,
}


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Settings of `KernelRidge`."""

    kernel: str = "rbf"
    """rbf, matern (5/2) or linear."""
    lengthscale: float = 1.0
    """Distance over which the Borda function changes, in units of the points."""
    regularization: float = 1.0
    """lambda of eq. 16, against a kernel that is 1 at distance 0; larger trusts single labels less."""
    prior_mean: float = 0.0
    """What is believed far from all labels: 0 in the paper; 0.5 is an action that wins half of its duels."""

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ConfigError(f"agent.kernel.kernel={self.kernel!r} is unknown. {did_you_mean(self.kernel, KERNELS)}")
        for name in ("lengthscale", "regularization"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"agent.kernel.{name}={getattr(self, name)} must be positive.")


# -- what an algorithm needs of a posterior --------------------------------------------------------------------------
class View(Protocol):
    """Fixed points whose bounds follow the posterior."""

    def bounds(self, width: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound, `R` each, `width` standard deviations from the mean, given all labels so far."""


class Posterior(Protocol):
    """A belief about the Borda function."""

    size: int
    """Labels learned from."""

    def add(self, points_BD: np.ndarray, labels_B: Sequence[float] | np.ndarray) -> None:
        """Learn that actions at these points won (1), lost (0) or tied (0.5) against random opponents."""

    def view(self, points_RD: np.ndarray) -> View:
        """Bounds at these points, kept up to date."""


# -- kernel ridge regression ----------------------------------------------------------------------------------------
class KernelRidge:
    r"""Eqs. 16-18: `mu(z) = k(z)^T (K + lambda I)^-1 w` and `sigma(z)^2 = k(z, z) - k(z)^T (K + lambda I)^-1 k(z)`.

    Held as the Cholesky factor `L L^T = K + lambda I` and `u = L^-1 w`, to which a label adds one row: O(t^2). With
    `v = L^-1 k(z)`, mu is `v . u` and sigma^2 is `k(z, z) - v . v`; the first t terms are the posterior of t labels.
    """

    def __init__(self, config: KernelConfig, dim: int) -> None:
        self.config, self.dim, self.size = config, dim, 0
        self.points_TD = np.empty((0, dim))
        self.factor_TT = np.empty((0, 0))
        """L, and room for rows to come; the first `size` rows and columns count."""
        self.whitened_T = np.empty(0)
        """u = L^-1 (w - prior mean)."""

    def add(self, points_BD: np.ndarray, labels_B: Sequence[float] | np.ndarray) -> None:
        """Learn one label after the other."""
        for point_D, label in zip(np.asarray(points_BD, dtype=np.float64), labels_B, strict=True):
            self._make_room()
            t = self.size
            row_T = self._solve(self.kernel(self.points_TD[:t], point_D[None]))[:, 0]
            corner = self._prior(point_D[None])[0] + self.config.regularization - row_T @ row_T
            pivot = math.sqrt(max(corner, self.config.regularization))  # sigma^2 + lambda is never below lambda
            self.points_TD[t], self.factor_TT[t, :t], self.factor_TT[t, t] = point_D, row_T, pivot
            self.whitened_T[t] = (label - self.config.prior_mean - row_T @ self.whitened_T[:t]) / pivot
            self.size = t + 1

    def predict(self, points_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (mu and sigma), `R` each."""
        view = self.view(points_RD)
        return view.mean_R, view.deviation_R

    def view(self, points_RD: np.ndarray) -> RidgeView:
        """Bounds at these points, kept up to date: O(t R) per label."""
        return RidgeView(self, np.asarray(points_RD, dtype=np.float64))

    def information_gain(self, size: int | None = None) -> float:
        """`log det(I + K / lambda) / 2`, nats: what the first `size` labels (all) told; a lower bound of eq. 6."""
        size = self.size if size is None else size
        logs = np.log(np.diagonal(self.factor_TT)[:size])
        return float(logs.sum() - 0.5 * size * math.log(self.config.regularization))

    def lower_envelope(self, points_RD: np.ndarray, sizes: Sequence[int], widths: Sequence[float]) -> np.ndarray:
        """`R`: the greatest lower bound among the posteriors after `sizes` labels, each of its own width (in eq. 5)."""
        points_RD = np.asarray(points_RD, dtype=np.float64)
        rows_TR = self._solve(self.kernel(self.points_TD[: self.size], points_RD))
        nothing_1R = np.zeros((1, len(points_RD)))
        means = np.concatenate([nothing_1R, np.cumsum(rows_TR * self.whitened_T[: self.size, None], axis=0)])
        known = np.concatenate([nothing_1R, np.cumsum(rows_TR**2, axis=0)])
        at, widths_S1 = np.asarray(sizes, dtype=int), np.asarray(widths)[:, None]
        deviations_SR = np.sqrt(np.maximum(self._prior(points_RD) - known[at], 0.0))
        return (self.config.prior_mean + means[at] - widths_S1 * deviations_SR).max(axis=0)

    def kernel(self, x_RD: np.ndarray, y_TD: np.ndarray) -> np.ndarray:
        """`k`, `R x T`."""
        return KERNELS[self.config.kernel](x_RD, y_TD, self.config.lengthscale)

    def _prior(self, points_RD: np.ndarray) -> np.ndarray:
        """`k(z, z)`, `R`."""
        if self.config.kernel == "linear":
            return (points_RD**2).sum(axis=1) / self.config.lengthscale**2
        return np.ones(len(points_RD))

    def _solve(self, right_TR: np.ndarray) -> np.ndarray:
        if not self.size:
            return right_TR
        factor_TT = self.factor_TT[: self.size, : self.size]
        return solve_triangular(factor_TT, right_TR, lower=True, check_finite=False)

    def _make_room(self) -> None:
        if self.size == len(self.whitened_T):
            self.points_TD = _grown(self.points_TD, (1, 0))
            self.factor_TT = _grown(self.factor_TT, (1, 1))
            self.whitened_T = _grown(self.whitened_T, (1,))


class RidgeView:
    """Points under a `KernelRidge`; keeps `v = L^-1 k(z)` of each, to which a label adds one number."""

    def __init__(self, posterior: KernelRidge, points_RD: np.ndarray) -> None:
        self._posterior, self._points_RD = posterior, points_RD
        self._rows_TR = posterior._solve(posterior.kernel(posterior.points_TD[: posterior.size], points_RD))
        self._size = self._labels = posterior.size
        self._mean_R = posterior.config.prior_mean + posterior.whitened_T[: self._size] @ self._rows_TR
        self._variance_R = posterior._prior(points_RD) - (self._rows_TR**2).sum(axis=0)

    @property
    def mean_R(self) -> np.ndarray:
        """Mean (mu)."""
        self._catch_up()
        return self._mean_R

    @property
    def deviation_R(self) -> np.ndarray:
        """Standard deviation (sigma), the square root of eq. 18."""
        self._catch_up()
        return np.sqrt(np.maximum(self._variance_R, 0.0))

    def bounds(self, width: float) -> tuple[np.ndarray, np.ndarray]:
        """`mu -/+ width * sigma`, not clipped to [0, 1]."""
        reach_R = width * self.deviation_R
        return self._mean_R - reach_R, self._mean_R + reach_R

    def believe(self, index: int) -> None:
        """Go on as if point `index` had been labelled with its mean: sigma shrinks around it, mu stays.

        For choosing several points at once. The posterior learns nothing; a view that believes can't be caught up.
        """
        self._catch_up()
        self._labels = -1
        column_T = self._rows_TR[: self._size, index]
        variance = max(float(self._variance_R[index]), 0.0)
        self._append(self._points_RD[index], column_T, math.sqrt(variance + self._posterior.config.regularization), 0.0)

    def _catch_up(self) -> None:
        posterior = self._posterior
        if self._labels == -1:
            return
        for t in range(self._labels, posterior.size):
            row_T, pivot = posterior.factor_TT[t, :t], posterior.factor_TT[t, t]
            self._append(posterior.points_TD[t], row_T, pivot, posterior.whitened_T[t])
        self._labels = posterior.size

    def _append(self, point_D: np.ndarray, row_T: np.ndarray, pivot: float, whitened: float) -> None:
        if self._size == len(self._rows_TR):
            self._rows_TR = _grown(self._rows_TR, (1, 0))
        covariance_R = self._posterior.kernel(point_D[None], self._points_RD)[0] - row_T @ self._rows_TR[: self._size]
        self._rows_TR[self._size] = new_R = covariance_R / pivot
        self._mean_R = self._mean_R + whitened * new_R
        self._variance_R = self._variance_R - new_R**2
        self._size += 1


def _grown(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """A copy with room for twice as much, at least 32, along the axes marked 1."""
    shape = [max(32, 2 * n) if grows else n for n, grows in zip(array.shape, axes, strict=True)]
    roomy = np.zeros(shape)
    roomy[tuple(slice(n) for n in array.shape)] = array
    return roomy


# -- Gaussian process classification ---------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class BernoulliGPConfig:
    """Settings of `BernoulliGP`. Kernel parameters are learned, these are where they begin."""

    lengthscale: float = 0.3
    """First lengthscale of the Matern 5/2 kernel, the same in all dimensions."""
    inducing_points: int = 64
    """Points of the unit cube, spread evenly, that carry the variational posterior."""
    steps_per_label: int = 4
    """Adam steps on the evidence lower bound after each `add`, per label added."""
    learning_rate: float = 0.05
    """Adam's."""

    def __post_init__(self) -> None:
        for name in ("lengthscale", "inducing_points", "steps_per_label", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"BernoulliGPConfig.{name}={getattr(self, name)} must be positive.")


class BernoulliGP:
    """Labels are coin flips with success probability `Phi(g(z))`, g a Gaussian process (Gardner et al. 2018).

    Bounds are those of g, `mu -/+ width * sigma`, seen through the normal distribution Phi. Points must be in the unit
    cube. Not a function of its labels alone: the optimiser goes on from where it was.
    """

    def __init__(self, config: BernoulliGPConfig, dim: int, seed: int = 0) -> None:
        gpytorch, torch = _gpytorch()
        from scipy.stats import qmc

        self.config, self.dim, self.size = config, dim, 0
        inducing = qmc.Sobol(dim, seed=seed).random(config.inducing_points)
        with torch.random.fork_rng():  # the variational posterior begins with a little noise
            torch.manual_seed(seed)
            self._model = _approximate_gp(gpytorch, torch.from_numpy(inducing), config.lengthscale)
            self._likelihood = gpytorch.likelihoods.BernoulliLikelihood()
            self._model.eval()(torch.from_numpy(inducing[:1]))
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=config.learning_rate)
        self._points_TD, self._labels_T = np.empty((0, dim)), np.empty(0)

    def add(self, points_BD: np.ndarray, labels_B: Sequence[float] | np.ndarray) -> None:
        """Take the steps that these labels are worth, on all labels."""
        gpytorch, torch = _gpytorch()
        labels = np.asarray(labels_B, dtype=np.float64)
        if not np.isin(labels, (0.0, 1.0)).all():
            raise ConfigError("BernoulliGP learns from wins and losses; a tie is neither. Use KernelRidge.")
        self._points_TD = np.concatenate([self._points_TD, np.asarray(points_BD, dtype=np.float64)])
        self._labels_T = np.concatenate([self._labels_T, labels])
        self.size = len(self._labels_T)
        x, w = torch.from_numpy(self._points_TD), torch.from_numpy(self._labels_T)
        self._model.train()
        elbo = gpytorch.mlls.VariationalELBO(self._likelihood, self._model, num_data=self.size)
        for _ in range(self.config.steps_per_label * len(labels)):
            self._optimizer.zero_grad()
            (-elbo(self._model(x), w)).backward()
            self._optimizer.step()

    def view(self, points_RD: np.ndarray) -> GPView:
        """Bounds at these points, computed anew when the posterior has changed."""
        return GPView(self, points_RD)

    def latent(self, points_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of g, `R` each."""
        _, torch = _gpytorch()
        self._model.eval()
        with torch.no_grad():
            g = self._model(torch.from_numpy(np.asarray(points_RD, dtype=np.float64)))
            return g.mean.numpy(), g.variance.clamp_min(0).sqrt().numpy()


class GPView:
    """Points under a `BernoulliGP`."""

    def __init__(self, posterior: BernoulliGP, points_RD: np.ndarray) -> None:
        self._posterior, self._points_RD, self._size = posterior, points_RD, -1

    def bounds(self, width: float) -> tuple[np.ndarray, np.ndarray]:
        """`Phi(mu -/+ width * sigma)`, in [0, 1]."""
        from scipy.special import ndtr

        if self._size != self._posterior.size:
            self._mean_R, self._deviation_R = self._posterior.latent(self._points_RD)
            self._size = self._posterior.size
        reach_R = width * self._deviation_R
        return ndtr(self._mean_R - reach_R), ndtr(self._mean_R + reach_R)


def _gpytorch() -> tuple[Any, Any]:
    try:
        return import_module("gpytorch"), import_module("torch")
    except ImportError as error:
        raise ConfigError(
            "the Bernoulli GP needs GPyTorch, which is not installed. Run: pip install 'rayalign[borda]', or use "
            "KernelRidge."
        ) from error


def _approximate_gp(gpytorch: Any, inducing: Any, lengthscale: float) -> Any:
    variational = gpytorch.variational

    class Classifier(gpytorch.models.ApproximateGP):  # type: ignore[misc, name-defined]  # its base is imported late
        def __init__(self) -> None:
            distribution = variational.CholeskyVariationalDistribution(len(inducing))
            super().__init__(
                variational.VariationalStrategy(self, inducing, distribution, learn_inducing_locations=False)
            )
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5))
            self.covar_module.base_kernel.lengthscale = lengthscale

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    return Classifier().double()
