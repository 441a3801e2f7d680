"""Statistics of the reports, against hand sums and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayalign.errors import ConfigError
from rayalign.evaluation.evaluate import (
    EvaluationConfig,
    Mean,
    area_under_curve,
    bootstrap_interval,
    labels_to_target,
    mean_curve,
    normal_interval,
    over_seeds,
    paired_ratio,
    shown_targets,
    wilson_interval,
    win_rate,
)


def test_win_rate_counts_ties_as_halves_and_its_error_is_the_hand_sum() -> None:
    # Mean 0.5; squared deviations 0.25 * 4 + 0 = 1; variance 1 / 4; standard error sqrt(1/4 / 5).
    rate = win_rate([1, 0, 0.5, 1, 0])
    assert rate.value == 0.5
    assert rate.stderr == pytest.approx(math.sqrt(0.25 / 5))


def test_swapping_the_two_sides_of_every_duel_reflects_the_win_rate_about_one_half() -> None:
    scores = np.random.default_rng(0).choice([0, 0.5, 1.0], 50)
    ours, theirs = win_rate(scores), win_rate(1 - scores)
    assert ours.value + theirs.value == pytest.approx(1)
    assert ours.stderr == pytest.approx(theirs.stderr)


def test_win_rate_of_nothing_is_not_a_number_rather_than_zero() -> None:
    assert math.isnan(win_rate([]).value)
    assert math.isnan(win_rate([1.0]).stderr)


@pytest.mark.parametrize("bad", [[2.0], [-0.1], [math.nan]])
def test_scores_outside_their_range_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="leave failed verdicts out"):
        win_rate(bad)


def test_error_over_seeds_is_the_sample_standard_deviation_over_the_root_of_runs() -> None:
    mean = over_seeds([0.5, 0.6, 0.7])
    assert mean.value == pytest.approx(0.6)
    assert mean.stderr == pytest.approx(0.1 / math.sqrt(3))


@pytest.mark.parametrize(("rate", "n"), [(0.0, 5), (0.3, 40), (1.0, 100)])
def test_wilson_interval_solves_its_defining_equation(rate: float, n: int) -> None:
    found = wilson_interval(rate, n)
    for bound in (found.low, found.high):
        # Each end is a p at which the observed rate is exactly z standard errors away (or the end of [0, 1]).
        distance = abs(rate - bound) - 1.959964 * math.sqrt(bound * (1 - bound) / n)
        assert distance == pytest.approx(0, abs=1e-6) or bound in (0.0, 1.0)
    assert 0 <= found.low <= rate <= found.high <= 1


def test_wilson_interval_becomes_the_normal_one_for_many_prompts() -> None:
    n = 1_000_000
    wilson = wilson_interval(0.4, n)
    normal = normal_interval(Mean(0.4, math.sqrt(0.4 * 0.6 / n)))
    assert wilson.low == pytest.approx(normal.low, abs=1e-6)
    assert wilson.high == pytest.approx(normal.high, abs=1e-6)


def test_wilson_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Over many truths: at a single one the steps of a count of 60 move the coverage by some percent.
    rng = np.random.default_rng(0)
    truths = rng.uniform(0.2, 0.8, size=5000)
    found = [wilson_interval(rate, 60) for rate in rng.binomial(60, truths) / 60]
    covered = np.mean([e.low <= truth <= e.high for e, truth in zip(found, truths, strict=True)])
    assert covered == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(
    ("values", "target", "labels"),
    [
        ([0.4, 0.5, 0.7], 0.6, 150.0),  # half way between the second and the third
        ([0.4, 0.6, 0.5], 0.6, 100.0),  # on a point; that it falls again later does not matter
        ([0.4, 0.5, 0.55], 0.6, None),
        ([0.7, 0.5, 0.8], 0.6, 0.0),  # at the start already
        ([0.4, None, 0.6], 0.5, 100.0),  # the missing evaluation is bridged
        ([0.4, math.nan, 0.6], 0.5, 100.0),
        ([None, None, None], 0.5, None),
    ],
)
def test_labels_to_target_is_the_first_crossing_with_linear_interpolation(
    values: list[float], target: float, labels: float | None
) -> None:
    found = labels_to_target([0, 100, 200], values, target)
    assert found == (None if labels is None else pytest.approx(labels))


def test_labels_to_target_does_not_depend_on_the_order_of_the_evaluations() -> None:
    assert labels_to_target([200, 0, 100], [0.7, 0.4, 0.5], 0.6) == pytest.approx(150)


def test_area_under_a_curve_is_its_mean_height() -> None:
    assert area_under_curve([0, 100, 300], [0.5, 0.5, 0.5]) == pytest.approx(0.5)
    assert area_under_curve([0, 100, 300], [0.0, 1.0, 1.0]) == pytest.approx((50 + 200) / 300)
    assert area_under_curve([0, 100, 300], [0.0, 1.0, 1.0], up_to=50) == pytest.approx(0.25)
    assert math.isnan(area_under_curve([0, 100], [0, 1], up_to=200))
    assert math.isnan(area_under_curve([0], [1]))


def test_shown_targets_are_those_between_start_and_best_and_the_next() -> None:
    assert shown_targets(0.37, 0.66) == [0.5, 0.55, 0.6, 0.65, 0.7]
    assert shown_targets(0.5, 0.5) == [0.55]
    assert shown_targets(0.96, 0.99) == []


def test_mean_curve_averages_on_the_common_range() -> None:
    curves = [([0, 100, 200], [0, 1, 2]), ([0, 50, 100], [1, 1, 1]), ([0, 100], [0.8, 1])]
    labels, estimates = mean_curve(curves)
    assert labels.tolist() == [0, 50, 100]
    assert [e.value for e in estimates] == pytest.approx([0.6, 0.8, 1.0])
    assert estimates[0] == bootstrap_interval([0, 1, 0.8])
    assert estimates[1] == bootstrap_interval([0.5, 1, 0.9])
    assert estimates[2] == (1.0, 1.0, 1.0)
    assert all(np.isnan([e.low, e.high]).all() for e in mean_curve([([0, 1], [0, 1])])[1])
    assert not len(mean_curve([])[0])
    rough = mean_curve(curves, intervals=False)[1]
    assert [e.value for e in rough] == pytest.approx([0.6, 0.8, 1.0]) and all(np.isnan(e.low) for e in rough)
    long = [(np.arange(1000), np.linspace(0, 1, 1000)), (np.arange(1000), np.linspace(0, 2, 1000))]
    labels, estimates = mean_curve(long, intervals=False)
    assert len(labels) == 100 and (labels[0], labels[-1], estimates[-1].value) == (0, 999, 1.5)


def test_bootstrap_interval_holds_the_value_and_shrinks_with_more_runs() -> None:
    rng = np.random.default_rng(0)
    few, many = bootstrap_interval(rng.normal(size=10)), bootstrap_interval(rng.normal(size=400))
    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 3
    assert bootstrap_interval(rng.normal(size=10), seed=1) != few
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert math.isnan(bootstrap_interval([0.5]).low)


def test_paired_ratio_is_geometric_so_that_turning_it_round_inverts_it() -> None:
    a, b = [100.0, 240.0, 90.0, 130.0], [200.0, 260.0, 250.0, 170.0]
    forward, back = paired_ratio(a, b), paired_ratio(b, a)
    assert forward.value == pytest.approx((100 / 200 * 240 / 260 * 90 / 250 * 130 / 170) ** 0.25)
    assert forward.value * back.value == pytest.approx(1)
    assert forward.low < forward.value < forward.high < 1
    assert paired_ratio([10.0, 20.0], [20.0, 40.0]) == pytest.approx((0.5, 0.5, 0.5))


def test_paired_ratio_refuses_what_is_no_pair() -> None:
    with pytest.raises(ValueError, match="2 values and 1 of the baseline"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([0.0], [1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, r"evaluation\.every=-1"),
        ({"num_prompts": 0}, r"evaluation\.num_prompts=0"),
        ({"against": "nobody"}, r"evaluation\.against='nobody' must be one of auto, reference, initial"),
        ({"temperature": -0.5}, r"evaluation\.temperature=-0\.5"),
        ({"best_of_n": -2}, r"evaluation\.best_of_n=-2"),
    ],
)
def test_wrong_evaluation_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**settings)
