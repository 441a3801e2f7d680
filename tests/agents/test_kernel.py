"""Kernel posteriors: equal to the direct solve in float64, label by label, and to limits known by hand."""

import itertools
import math
import pickle

import numpy as np
import pytest

from rayalign.agents.posteriors.kernel import KERNELS, BernoulliGP, BernoulliGPConfig, KernelConfig, KernelRidge
from rayalign.errors import ConfigError

RNG = np.random.default_rng(0)
POINTS, LABELS, NEW = RNG.random((70, 3)), RNG.integers(0, 2, 70).astype(float), RNG.random((9, 3))


def posterior(labels=70, **settings):
    config = KernelConfig(**{"lengthscale": 0.4, "regularization": 0.3, **settings})
    ridge = KernelRidge(config, 3)
    ridge.add(POINTS[:labels], LABELS[:labels])
    return ridge


def by_direct_solve(points, labels, new, config):
    """Eqs. 17 and 18 as they are printed."""
    kernel = KERNELS[config.kernel]
    k, big = (kernel(x, points, config.lengthscale) for x in (new, points))
    inverse = np.linalg.inv(big + config.regularization * np.eye(len(points)))
    mean = config.prior_mean + k @ inverse @ (labels - config.prior_mean)
    prior = np.diag(kernel(new, new, config.lengthscale))
    return mean, np.sqrt(np.maximum(prior - np.einsum("rt,ts,rs->r", k, inverse, k), 0))


def test_kernels_at_a_distance_known_by_hand():
    x, y = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    assert KERNELS["rbf"](x, y, 5.0)[0, 0] == pytest.approx(math.exp(-0.5))
    s = math.sqrt(5)
    assert KERNELS["matern"](x, y, 5.0)[0, 0] == pytest.approx((1 + s + 5 / 3) * math.exp(-s))
    assert KERNELS["linear"](np.array([[1.0, 2.0]]), y, 2.0)[0, 0] == pytest.approx(11 / 4)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_kernels_are_symmetric_and_positive_semi_definite(kernel):
    big = KERNELS[kernel](POINTS, POINTS, 0.4)
    np.testing.assert_allclose(big, big.T, atol=1e-14)
    assert np.linalg.eigvalsh(big).min() > -1e-10


@pytest.mark.parametrize(("kernel", "prior_mean"), itertools.product(sorted(KERNELS), (0.0, 0.5)))
def test_posterior_is_the_direct_solve_after_every_label(kernel, prior_mean):
    ridge = posterior(0, kernel=kernel, prior_mean=prior_mean)
    view = ridge.view(NEW)
    for t in range(70):
        ridge.add(POINTS[t : t + 1], LABELS[t : t + 1])
        if t % 13 == 0 or t == 69:
            mean, deviation = by_direct_solve(POINTS[: t + 1], LABELS[: t + 1], NEW, ridge.config)
            for got in (ridge.predict(NEW), (view.mean_R, view.deviation_R)):
                np.testing.assert_allclose(got[0], mean, atol=1e-10)
                np.testing.assert_allclose(got[1], deviation, atol=1e-7)


def test_no_labels_leave_the_prior():
    mean, deviation = posterior(0, prior_mean=0.5).predict(NEW)
    assert (mean == 0.5).all() and (deviation == 1).all()
    lower, upper = posterior(0).view(NEW).bounds(2.0)
    assert (lower == -2).all() and (upper == 2).all()  # not clipped to [0, 1]


def test_one_label_by_hand():
    ridge = KernelRidge(KernelConfig(regularization=1.0), 1)
    ridge.add(np.array([[0.0]]), [1.0])
    (mean,), (deviation,) = ridge.predict(np.array([[0.0]]))
    assert mean == pytest.approx(1 / 2) and deviation == pytest.approx(math.sqrt(1 / 2))


def test_many_labels_at_one_point_give_their_mean_and_no_doubt():
    ridge = KernelRidge(KernelConfig(regularization=0.5), 1)
    labels = [1.0, 0.0, 1.0, 1.0] * 100
    ridge.add(np.zeros((400, 1)), labels)
    (mean,), (deviation,) = ridge.predict(np.zeros((1, 1)))
    assert mean == pytest.approx(300 / 400.5) and deviation == pytest.approx(math.sqrt(0.5 / 400.5))


def test_swapping_all_labels_mirrors_a_centred_posterior():
    one, other = posterior(prior_mean=0.5), KernelRidge(posterior().config, 3)
    other.config = one.config
    other.add(POINTS, 1 - LABELS)
    np.testing.assert_allclose(one.predict(NEW)[0] + other.predict(NEW)[0], 1.0, atol=1e-12)
    np.testing.assert_array_equal(one.predict(NEW)[1], other.predict(NEW)[1])


def test_order_of_labels_does_not_matter():
    shuffled = KernelRidge(posterior().config, 3)
    order = np.random.default_rng(1).permutation(70)
    shuffled.add(POINTS[order], LABELS[order])
    for got, expected in zip(shuffled.predict(NEW), posterior().predict(NEW), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-10)


def test_information_gain_is_half_the_log_determinant_and_never_falls():
    ridge = posterior()
    big = KERNELS["rbf"](POINTS, POINTS, 0.4)
    gains = [ridge.information_gain(t) for t in range(71)]
    for t in (1, 30, 70):
        expected = 0.5 * np.linalg.slogdet(np.eye(t) + big[:t, :t] / 0.3)[1]
        assert gains[t] == pytest.approx(expected)
    assert gains[0] == 0 and gains[-1] == ridge.information_gain() and (np.diff(gains) > 0).all()


def test_lower_envelope_is_the_greatest_lower_bound_of_the_posteriors_on_the_way():
    sizes, widths = [5, 20, 21, 70], [1.0, 1.5, 0.5, 2.0]
    on_the_way = [posterior(t).view(NEW).bounds(width)[0] for t, width in zip(sizes, widths, strict=True)]
    np.testing.assert_allclose(posterior().lower_envelope(NEW, sizes, widths), np.max(on_the_way, axis=0), atol=1e-9)
    assert posterior(0).lower_envelope(NEW, [0], [2.0]).tolist() == [-2.0] * 9


def test_believing_shrinks_sigma_as_any_label_would_and_leaves_the_mean():
    ridge, told = posterior(30), posterior(30)
    view, before = ridge.view(NEW), ridge.predict(NEW)
    view.believe(4)
    view.believe(0)
    told.add(NEW[[4, 0]], [1.0, 0.0])
    np.testing.assert_array_equal(view.mean_R, before[0])
    np.testing.assert_allclose(view.deviation_R, told.predict(NEW)[1], atol=1e-9)
    assert ridge.size == 30 and ridge.predict(NEW)[1].tolist() == before[1].tolist()


def test_rebuilding_it_in_other_portions_gives_the_same_bits():
    whole, parts = posterior(), posterior(0)
    for start in (0, 1, 33, 34):
        parts.add(POINTS[start : {0: 1, 1: 33, 33: 34}.get(start)], LABELS[start : {0: 1, 1: 33, 33: 34}.get(start)])
    again = pickle.loads(pickle.dumps(whole))
    for other in (parts, again):
        for a, b in zip(whole.predict(NEW), other.predict(NEW), strict=True):
            np.testing.assert_array_equal(a, b)


def test_repeated_points_with_a_tiny_regularizer_stay_finite():
    ridge = posterior(0, regularization=1e-12)
    ridge.add(np.tile(POINTS[:2], (20, 1)), [0.0, 1.0] * 20)
    mean, deviation = ridge.predict(POINTS[:2])
    np.testing.assert_allclose(mean, [0, 1], atol=1e-3)
    assert np.isfinite(deviation).all() and (deviation < 1e-3).all()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'matern'"):
        KernelConfig(kernel="matrn")
    with pytest.raises(ConfigError, match=r"agent\.kernel\.regularization=0 must be positive"):
        KernelConfig(regularization=0)
    with pytest.raises(ConfigError, match=r"BernoulliGPConfig\.learning_rate=0 must be positive"):
        BernoulliGPConfig(learning_rate=0)


# -- the Bernoulli GP ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gp():
    pytest.importorskip("gpytorch", reason="GPyTorch is not installed: pip install 'rayalign[borda]'")
    learner = BernoulliGP(BernoulliGPConfig(inducing_points=16, steps_per_label=1), 1)
    rng = np.random.default_rng(3)
    points = rng.random((100, 1))
    learner.add(points, (rng.random(100) < np.where(points[:, 0] > 0.5, 0.9, 0.1)).astype(float))
    return learner


def test_bernoulli_gp_learns_which_half_wins(gp):
    lower, upper = gp.view(np.array([[0.1], [0.9]])).bounds(0.0)
    np.testing.assert_array_equal(lower, upper)
    assert abs(lower[0] - 0.1) < 0.12 and abs(lower[1] - 0.9) < 0.12


def test_bernoulli_gps_bounds_are_probabilities_that_widen(gp):
    view = gp.view(np.linspace(0, 1, 20)[:, None])
    (low1, up1), (low3, up3) = view.bounds(1.0), view.bounds(3.0)
    assert (low3 >= 0).all() and (low3 < low1).all() and (low1 < up1).all() and (up1 < up3).all() and (up3 <= 1).all()


def test_bernoulli_gp_repeats_itself_and_its_view_follows(gp):
    def learn():
        learner = BernoulliGP(BernoulliGPConfig(inducing_points=8), 1, seed=5)
        view = learner.view(np.array([[0.3]]))
        before = view.bounds(1.0)
        learner.add(np.array([[0.3], [0.4]]), [1.0, 1.0])
        return before, view.bounds(1.0)

    first, second = learn(), learn()
    np.testing.assert_array_equal(first, second)
    assert first[1][0][0] > first[0][0][0]


def test_bernoulli_gp_refuses_a_tie(gp):
    with pytest.raises(ConfigError, match="a tie is neither"):
        gp.add(np.array([[0.5]]), [0.5])


def test_without_gpytorch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gpytorch", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayalign\[borda\]'"):
        BernoulliGP(BernoulliGPConfig(), 1)
