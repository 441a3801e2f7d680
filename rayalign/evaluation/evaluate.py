"""Numbers that say how aligned a policy is, what it cost, and how sure one may be. Pure functions on numpy arrays.

Two spreads, never mixed: over prompts (one policy, finitely many prompts: `win_rate`) and over seeds (one
prompt set, finitely many runs: `over_seeds`). The two regrets are in `rayalign.env.truth.regrets`.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayalign.errors import ConfigError
from rayalign.evaluation.metrics import find_metric
from rayalign.serve.config import OracleConfig

AGAINST = ("auto", "reference", "initial")

TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Win rates that reports tell the labels for."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how the held-out win rate is measured. Its labels are counted apart from the budget."""

    every: int = 256
    """Training labels between two evaluations; 0 evaluates only at the start and at the end."""
    num_prompts: int = 200
    """Held-out prompts; fewer if the environment has fewer. The standard error falls with its square root."""
    against: str = "auto"
    """Opponent: the data's `reference` responses, the `initial` policy's answers, `auto`: references if there are."""
    temperature: float = 0.0
    """Of the answers that are judged; 0 is greedy."""
    best_of_n: int = 0
    """Also answer with the agent's pick among so many samples and report its win rate; 0 or 1 does not."""
    metrics: tuple[str, ...] = ()
    """What else is measured of the same answers: `null_rate`, or import paths `package.module:NAME` of a
    `rayalign.evaluation.metrics.Metric`. Logged as `metric/...` beside the win rate; buys no labels."""
    at_start: bool = True
    """Evaluate the initial policy before the first label is bought."""
    oracle: OracleConfig | None = None
    """Who judges; null: the oracle that labels for training. Verdicts are deterministic, whatever its `labels` says."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"evaluation.every={self.every} must not be negative; 0 evaluates only at start and end.")
        if self.num_prompts < 1:
            raise ConfigError(f"evaluation.num_prompts={self.num_prompts} must be at least 1.")
        if self.against not in AGAINST:
            raise ConfigError(f"evaluation.against={self.against!r} must be one of {', '.join(AGAINST)}.")
        if self.temperature < 0:
            raise ConfigError(f"evaluation.temperature={self.temperature} must not be negative; 0 is greedy.")
        if self.best_of_n < 0:
            raise ConfigError(f"evaluation.best_of_n={self.best_of_n} must not be negative; 0 is off.")
        for name in self.metrics:
            find_metric(name)


class Mean(NamedTuple):
    """A mean and its standard error; the function that made it says over what."""

    value: float
    stderr: float


class Estimate(NamedTuple):
    """A number with an interval that covers it with the stated confidence."""

    value: float
    low: float
    high: float


# -- win rate -----------------------------------------------------------------------------------------------------
def win_rate(scores_P: ArrayLike) -> Mean:
    """Wins plus half the ties, with the standard error over prompts, `sqrt(var / P)` with `P - 1` in the variance.

    A score is 1 for a win, 0.5 for a tie, 0 for a loss (a probability of winning will do as well). No scores make
    NaN, one score has a standard error of NaN: nothing is known of the spread.

    >>> win_rate([1.0, 0.0, 0.0, 1.0, 0.5])  # squared deviations sum to 1: sqrt(1 / 4 / 5)
    Mean(value=0.5, stderr=0.22360679774997896)
    """
    scores = _scores(scores_P)
    return Mean(_mean(scores), _stderr(scores))


def over_seeds(values_S: ArrayLike) -> Mean:
    """The mean over independent runs, with the standard error over seeds. One run: a standard error of NaN."""
    values = np.asarray(values_S, dtype=float)
    return Mean(_mean(values), _stderr(values))


def wilson_interval(rate: float, n: int, level: float = 0.95) -> Estimate:
    """Wilson's score interval of a win rate over `n` prompts (Wilson 1927): inside [0, 1], and not empty at 0 and 1.

    Ties make it too wide rather than too narrow: a half has less variance than a coin flip between 0 and 1.

    >>> [round(x, 4) for x in wilson_interval(1.0, 10)]  # z^2 = 3.8415: low = 10 / (10 + z^2)
    [1.0, 0.7225, 1.0]
    """
    if n < 1 or not 0 <= rate <= 1:
        return Estimate(rate, math.nan, math.nan)
    z = _z(level)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half))


def normal_interval(mean: Mean, level: float = 0.95) -> Estimate:
    """`value -/+ z * stderr`: what error bars show. Of no use near 0 and 1 or for a handful of values."""
    return Estimate(mean.value, mean.value - _z(level) * mean.stderr, mean.value + _z(level) * mean.stderr)


# -- sample efficiency --------------------------------------------------------------------------------------------
def labels_to_target(labels: ArrayLike, values: ArrayLike, target: float) -> float | None:
    """Labels at which the curve first reaches `target`, linear between evaluations; None if it never does.

    Evaluations without a value (NaN) are left out. A curve that starts at or above the target needs its first labels.

    >>> labels_to_target([0, 100, 200], [0.4, 0.5, 0.7], 0.6)
    150.0
    """
    x, y = _curve(labels, values)
    above = np.flatnonzero(y >= target)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (target - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))


def shown_targets(start: float, best: float) -> list[float]:
    """The targets above where a curve started that it reached, and the next one, which it did not.

    >>> shown_targets(0.52, 0.61)
    [0.55, 0.6, 0.65]
    """
    above = [target for target in TARGETS if target > start]
    return above[: sum(target <= best for target in above) + 1]


def area_under_curve(labels: ArrayLike, values: ArrayLike, up_to: float | None = None) -> float:
    """Mean height of the curve over its labels (trapezoids): the win rate an average label was bought at.

    `up_to` cuts the curve there, so that runs of different length compare; NaN if it does not reach so far.

    >>> area_under_curve([0, 100], [0.4, 0.6])
    0.5
    """
    x, y = _curve(labels, values)
    end = x[-1] if up_to is None and len(x) else up_to
    if len(x) < 2 or end is None or end > x[-1] or end <= x[0]:
        return math.nan
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


MOST_POINTS = 100
"""Of a curve that is drawn; each has a bootstrap of its own."""


def mean_curve(
    curves: Sequence[tuple[ArrayLike, ArrayLike]], *, intervals: bool = True
) -> tuple[NDArray[np.float64], list[Estimate]]:
    """Labels, and the mean over seeds of several runs' curves there with its bootstrap interval.

    Each curve is linear between its points; at the union of their labels, but the common range alone is kept, because
    a mean over other runs at each end would show steps that no run took. Of very many points `MOST_POINTS` are taken.
    With one run the intervals are NaN, and without `intervals` all are.
    """
    cleaned = [curve for curve in (_curve(*pair) for pair in curves) if len(curve[0])]
    if not cleaned:
        return np.zeros(0), []
    low, high = max(x[0] for x, _ in cleaned), min(x[-1] for x, _ in cleaned)
    grid = np.unique(np.concatenate([x for x, _ in cleaned]))
    grid = grid[(grid >= low) & (grid <= high)]
    if len(grid) > MOST_POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, MOST_POINTS).round().astype(int)]
    heights = np.stack([np.interp(grid, x, y) for x, y in cleaned])
    if not intervals:
        return grid, [Estimate(float(mean), math.nan, math.nan) for mean in heights.mean(axis=0)]
    return grid, [bootstrap_interval(column) for column in heights.T]


# -- how sure -----------------------------------------------------------------------------------------------------
def bootstrap_interval(
    values_S: ArrayLike, statistic: Callable[..., Any] = np.mean, level: float = 0.95, seed: int = 0
) -> Estimate:
    """`statistic` of independent values, with its BCa bootstrap interval (Efron 1987, `scipy.stats.bootstrap`).

    Equal values have an interval of width 0; a single value has none (NaN). With fewer than about eight values
    the interval is too narrow: show the values themselves too.
    """
    values = np.asarray(values_S, dtype=float)
    value = float(statistic(values)) if len(values) else math.nan
    if len(values) < 2:
        return Estimate(value, math.nan, math.nan)
    if np.allclose(values, values[0], rtol=1e-9, atol=0):
        return Estimate(value, value, value)
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():  # two values: the interval is NaN, which says as much
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap((values,), statistic, confidence_level=level, rng=np.random.default_rng(seed))
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def paired_ratio(values_S: ArrayLike, baseline_S: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """How many times the baseline: geometric mean of `value / baseline` over pairs (same seed), bootstrap interval.

    Geometric, so that the ratio of A to B is one over the ratio of B to A. A run that never reached its target has
    no number to put here: leave its pair out and say so, or put its budget, which is a bound.

    Raises `ValueError` if the lengths differ or a number is not positive.

    >>> round(paired_ratio([50.0, 200.0], [100.0, 100.0]).value, 6)
    1.0
    """
    values, baseline = np.asarray(values_S, dtype=float), np.asarray(baseline_S, dtype=float)
    if values.shape != baseline.shape:
        raise ValueError(f"paired_ratio needs pairs, but got {values.size} values and {baseline.size} of the baseline.")
    if not (np.all(values > 0) and np.all(baseline > 0)):
        raise ValueError("paired_ratio needs positive numbers; leave out the pairs that have none.")
    return Estimate(*np.exp(bootstrap_interval(np.log(values / baseline), level=level, seed=seed)).tolist())


def cautious_interval(values_S: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of a few independent values, with the wider of two intervals at each end: bootstrap and Student's t.

    The bootstrap knows the shape of the values and is too narrow for fewer than about eight; t is honest about how
    few there are and takes their shape for a bell. A verdict on a handful of seeds should survive both.

    >>> [round(x, 3) for x in cautious_interval([1.0, 2.0, 3.0])]  # t with 2 degrees: 2 -/+ 4.303 / sqrt(3)
    [2.0, -0.484, 4.484]
    """
    values = np.asarray(values_S, dtype=float)
    found = bootstrap_interval(values, level=level, seed=seed)
    if len(values) < 2:
        return found
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * _stderr(values)
    low, high = np.fmin(found.low, found.value - half), np.fmax(found.high, found.value + half)  # bootstraps may be NaN
    return Estimate(found.value, float(low), float(high))


class Saving(NamedTuple):
    """Labels that a row needs to a target, over those of the baseline, from pairs of runs with the same seed."""

    ratio: Estimate
    """Geometric mean over pairs; below 1: the row needs fewer. NaN where nothing can be said."""
    bound: str
    """Empty: exact. `at most`: in some pairs the baseline never got there, so that its budget stands for more labels.
    `at least`: the row never got there. `unknown`: both happened."""
    pairs: int
    """Pairs of runs."""
    used: int
    """Pairs in which at least one of the two got there: those that the ratio is made of."""
    row_reached: int
    baseline_reached: int


def saving(row_S: Sequence[float | None], baseline_S: Sequence[float | None], budget: float) -> Saving:
    """How many of the baseline's labels a row needs to the same target; None stands for a run that never got there.

    A run that did not get there needs more than its `budget`. Put in for the baseline alone, that makes the ratio an
    upper bound; for the row alone, a lower bound: neither flatters the claim that it bounds. A pair in which neither
    got there says nothing and is left out.

    >>> round(saving([100.0, None], [200.0, 300.0], 1000).ratio.value, 6)  # of 0.5 and (at least) 1000 / 300
    1.290994
    """
    if len(row_S) != len(baseline_S):
        raise ValueError(f"saving needs pairs, but got {len(row_S)} values and {len(baseline_S)} of the baseline.")
    pairs = [(r, b) for r, b in zip(row_S, baseline_S, strict=True) if (r is None or r > 0) and (b is None or b > 0)]
    used = [(r, b) for r, b in pairs if r is not None or b is not None]
    lost, won = any(r is None for r, _ in used), any(b is None for _, b in used)
    bound = ("unknown" if won else "at least") if lost else ("at most" if won else "")
    ratio = Estimate(math.nan, math.nan, math.nan)
    if used and bound != "unknown":
        logs = [math.log((budget if r is None else r) / (budget if b is None else b)) for r, b in used]
        ratio = Estimate(*np.exp(cautious_interval(logs)).tolist())
    reached = [sum(value is not None for value in side) for side in (row_S, baseline_S)]
    return Saving(ratio, bound, len(row_S), len(used), *reached)


def common_target(
    rows: Mapping[str, Sequence[Sequence[float | None]]], targets: Sequence[float], baseline: str
) -> float | None:
    """The target at which rows are compared: the highest that the baseline reached in most of its runs, which is where
    its budget takes it; else the highest that any row reached in most of its runs; None if there is none.

    `rows[name][k]` are the labels that the runs of a row took to `targets[k]`; targets that a run was at from the
    start (0 labels) do not compare.
    """

    def reached(name: str, k: int) -> bool:
        found = rows[name][k]
        return sum(x is not None for x in found) > len(found) / 2

    usable = [k for k in range(len(targets)) if not any(x == 0 for labels in rows.values() for x in labels[k])]
    for names in ([baseline], list(rows)):
        found = [targets[k] for k in usable if any(reached(name, k) for name in names)]
        if found:
            return max(found)
    return None


def _scores(scores_P: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores_P, dtype=float).ravel()
    if np.any(~((scores >= 0) & (scores <= 1))):
        raise ValueError("win_rate needs scores in [0, 1]: 1 a win, 0.5 a tie, 0 a loss; leave failed verdicts out.")
    return scores


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


def _stderr(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def _z(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)


def _curve(labels: ArrayLike, values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In the order of labels, without the points that have no value."""
    x = np.asarray(labels, dtype=float)
    y = np.array([math.nan if value is None else value for value in np.asarray(values, dtype=object)], dtype=float)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    return x[~np.isnan(y)], y[~np.isnan(y)]
