import numpy as np
import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import Proposal
from rayalign.agents.losses import LOSSES, PairLogProbs
from rayalign.errors import ConfigError


def windows(max_staleness, batches, **settings):
    agent = make_agent("passive", **settings)
    return [agent.sampling_window(batch, max_staleness) for batch in range(batches)]


def test_offline_schedule_samples_every_batch_from_the_reference():
    assert windows(0, 5, schedule="offline") == windows(3, 5, schedule="offline") == [(0, 0)] * 5


def test_iterative_schedule_samples_a_round_from_the_weights_at_its_start():
    got = windows(0, 7, schedule="iterative", batches_per_round=3)
    assert got == [(0, 0)] * 3 + [(3, 3)] * 3 + [(6, 6)]
    assert got == windows(5, 7, schedule="iterative", batches_per_round=3)


def test_rounds_of_one_batch_are_the_synchronous_loop():
    rounds = windows(0, 4, schedule="iterative", batches_per_round=1)
    assert [oldest for oldest, _ in rounds] == [oldest for oldest, _ in windows(0, 4)] == [0, 1, 2, 3]


def test_online_schedule_is_the_staleness_gate():
    assert windows(2, 5) == [(0, None), (0, None), (0, None), (1, None), (2, None)]


def test_two_samples_a_prompt_identical_texts_skipped(box):
    agent = make_agent("passive")
    a, b = box.response(1), box.response(2)
    assert agent.proposals() == (Proposal(n=2),)
    choices = agent.select(0, [box.prompt(0), box.prompt(1)], [[a, b], [a, a]], np.random.default_rng(0))
    assert [(c.prompt, c.first, c.second, c.label) for c in choices] == [(0, 0, 1, None)]


@pytest.mark.parametrize("schedule", ["offline", "iterative", "online"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_schedule_has_every_loss(schedule, loss):
    agent = make_agent("passive", schedule=schedule, loss=loss)
    assert agent.needs_reference() == (loss != "simpo")
    values = {
        "winner_B": [-1.0, -4.0],
        "loser_B": [-3.0, -2.0],
        "reference_winner_B": [-2.0, -3.0],
        "reference_loser_B": [-2.5, -2.5],
        "winner_length_B": [2, 4],
        "loser_length_B": [3, 4],
    }
    losses = agent.loss(PairLogProbs(**{name: torch.tensor(value) for name, value in values.items()}))
    assert losses.shape == (2,) and losses[0] < losses[1]  # the first winner is already preferred


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"agent.schedule='ofline' is unknown. Did you mean 'offline'"):
        make_agent("passive", schedule="ofline")
    with pytest.raises(ConfigError, match=r"agent.batches_per_round=0"):
        make_agent("passive", batches_per_round=0)
