"""Uncertainty of pairs and greedy batches against V inverted afresh at every step."""

import numpy as np
import pytest

from rayalign.agents.posteriors.gradient_features import (
    explained,
    greedy_batch,
    pair_features,
    uncertainty,
    unit_rows,
)


def inverse_of_v(asked_MD, dim, reg):
    return np.linalg.inv(reg * np.eye(dim) + asked_MD.T @ asked_MD)


def naive_batch(features_PD, asked_MD, reg, count):
    """Equations 3 and 4 as they stand: V is inverted before every pick."""
    picks, values = [], []
    for _ in range(count):
        inverse = inverse_of_v(asked_MD, features_PD.shape[1], reg)
        norms = np.sqrt(np.einsum("pd,de,pe->p", features_PD, inverse, features_PD))
        norms[picks] = -1
        picks.append(int(np.argmax(norms)))
        values.append(norms[picks[-1]])
        asked_MD = np.concatenate([asked_MD, features_PD[picks[-1:]]])
    return picks, values


def random_pairs(seed, pairs=60, asked=0, dim=24, dtype=np.float64):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(2 * (pairs + asked), dim)) + 2 * rng.normal(size=dim)
    rows = np.arange(0, len(gradients), 2)
    phi = pair_features(gradients, rows, rows + 1).astype(dtype)
    return phi[:pairs], phi[pairs:]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("asked", [0, 1, 10, 70])
@pytest.mark.parametrize("reg", [0.01, 1.0])
def test_greedy_batch_picks_what_inverting_v_at_every_step_picks(asked, reg, dtype):
    for seed in range(5):
        phi, before = random_pairs(seed, asked=asked, dtype=dtype)
        picks, values = greedy_batch(phi, before, reg, 30)
        expected, norms = naive_batch(phi.astype(np.float64), before.astype(np.float64), reg, 30)
        assert picks == expected
        np.testing.assert_allclose(values, norms, rtol=1e-8 if dtype is np.float64 else 1e-3)


@pytest.mark.parametrize("asked", [0, 3, 40])
def test_uncertainty_is_the_norm_under_the_inverse_of_v(asked):
    phi, before = random_pairs(0, asked=asked)
    expected = np.einsum("pd,de,pe->p", phi, inverse_of_v(before, 24, 0.3), phi)
    np.testing.assert_allclose(uncertainty(phi, before, 0.3), expected, rtol=1e-9)


def test_many_earlier_pairs_are_kept_as_few_rows_with_the_same_v():
    phi, before = random_pairs(0, asked=200)
    assert explained(phi, before, 1.0).shape == (24, 60)


def test_a_pair_is_less_uncertain_after_its_like_was_asked_and_orthogonal_ones_are_not():
    phi = np.array([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0]])
    before, after = uncertainty(phi, phi[:0], 1.0), uncertainty(phi, phi[:1], 1.0)
    assert after[0] == pytest.approx(1 / 2) and after[1] < before[1] and after[2] == before[2]


def test_a_batch_avoids_what_it_has_where_one_ranking_would_repeat_it():
    phi = np.array([[1.0, 0.0], [0.99, 0.0], [0.0, 0.9]])
    assert greedy_batch(phi, phi[:0], 1.0, 2)[0] == [0, 2]
    assert list(np.argsort(-uncertainty(phi, phi[:0], 1.0))[:2]) == [0, 1]


def test_an_order_of_asking_changes_no_uncertainty():
    phi, before = random_pairs(1, asked=12)
    np.testing.assert_allclose(uncertainty(phi, before, 1.0), uncertainty(phi, before[::-1], 1.0), rtol=1e-10)


def test_ties_go_to_the_lowest_index_and_nothing_is_picked_twice():
    phi = np.zeros((4, 3))
    assert greedy_batch(phi, phi[:0], 1.0, 9) == ([0, 1, 2, 3], [0.0] * 4)


@pytest.mark.parametrize("normalize", ["response", "pair", "none"])
def test_the_same_response_twice_has_uncertainty_zero(normalize):
    gradients = np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    phi = pair_features(gradients, [0, 2], [1, 3], normalize)
    assert not phi.any()
    assert greedy_batch(phi, phi[:0], 1e-6, 2)[1] == [0.0, 0.0]


def test_each_way_to_normalize_by_hand():
    gradients = np.array([[3.0, 4.0], [0.0, 10.0]])
    found = {way: pair_features(gradients, [0], [1], way)[0].tolist() for way in ("response", "pair", "none")}
    assert found["response"] == pytest.approx([0.6, -0.2])
    assert found["pair"] == pytest.approx([3 / 45**0.5, -6 / 45**0.5])
    assert found["none"] == [3.0, -6.0]


def test_lengths_of_gradients_do_not_matter_once_each_is_normalised():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 5))
    scaled = gradients * rng.uniform(0.1, 10, size=(6, 1))
    np.testing.assert_allclose(pair_features(gradients, [0, 2], [1, 5]), pair_features(scaled, [0, 2], [1, 5]))
    assert np.linalg.norm(unit_rows(scaled), axis=1) == pytest.approx(np.ones(6))
