"""Who computes what, in which forward."""

import numpy as np
import pytest
import torch

from rayalign.errors import DataError
from rayalign.learner.microbatch import collate, micro_batches, pair_length, plan


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_every_duel_is_planned_once_within_the_token_budget_and_all_workers_run_as_often(workers, max_tokens):
    lengths = np.random.default_rng(0).integers(2, 30, 23).tolist()
    plans = plan(lengths, workers, max_tokens)
    assert sorted(i for worker in plans for micro in worker for i in micro) == list(range(23))
    assert len({len(worker) for worker in plans}) == 1
    for micro in (micro for worker in plans for micro in worker if micro):
        assert len(micro) == 1 or 2 * len(micro) * max(lengths[i] for i in micro) <= max_tokens


def test_lengths_are_sorted_so_that_little_is_padding():
    lengths = [10, 100, 11, 99]
    assert plan(lengths, 1, 400) == [[(1, 3), (2, 0)]]


def test_more_workers_than_duels_leaves_dummies_that_count_for_nothing():
    plans = plan([5], 3, 100)
    assert plans == [[(0,)], [()], [()]]
    dummy = collate([], ())
    assert dummy.tokens == 0 and dummy.response_mask_RT.sum() == 2


def test_collate_joins_ids_as_sampled_and_pads_right(make_preference):
    micro = collate([make_preference((4, 5), (6, 1), (7, 8, 1))], (0,))
    assert micro.input_ids_RT.tolist() == [[4, 5, 6, 1, 0], [4, 5, 7, 8, 1]]
    assert micro.attention_mask_RT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert micro.response_mask_RT.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert micro.tokens == 9


def test_rows_are_first_responses_then_second_ones_of_the_duels_wanted(make_preference):
    preferences = [make_preference((4,), (i,), (i + 10,), id=str(i)) for i in range(20, 25)]
    (micro,) = micro_batches(preferences, [1, 3], rank=0, workers=1, max_tokens=100)
    assert micro.indices == (1, 3)
    assert micro.input_ids_RT[:, 1].tolist() == [21, 23, 31, 33]
    assert torch.equal(micro.attention_mask_RT, torch.ones(4, 2, dtype=torch.long))


def test_a_response_or_prompt_without_ids_is_refused_by_name(make_preference):
    with pytest.raises(DataError, match=r"duel d7: its second response has no token_ids"):
        pair_length(make_preference((1,), (2,), (), id="d7").duel)
    with pytest.raises(DataError, match=r"prompt 'p' has no token_ids"):
        pair_length(make_preference((), (2,), (3,)).duel)
