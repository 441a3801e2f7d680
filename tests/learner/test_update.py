"""One update is exact: whatever the micro-batches, with ties, with adapters; and stops before it does harm."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import Agent, AgentConfig
from rayalign.agents.losses import PairLogProbs
from rayalign.agents.optimism import carrier
from rayalign.errors import ConfigError, NonFiniteLossError
from rayalign.learner.config import LearnerConfig, LoraSettings
from rayalign.learner.microbatch import micro_batches
from rayalign.learner.policy import adapter_state, load_policy, merged_state, trainable
from rayalign.learner.reference import Reference
from rayalign.learner.strategies import make_strategy
from rayalign.learner.update import duel_losses, learning_rate, update
from rayalign.types import TrainBatch

CPU = torch.device("cpu")


class Learner:
    """The plain strategy without Ray: what a worker holds."""

    def __init__(self, policy_dir, agent=None, **settings):
        self.agent = agent or Agent()
        self.config = LearnerConfig(**{"learning_rate": 1e-3, "logprob_chunk_tokens": 7} | settings)
        policy = load_policy(policy_dir, self.config, seed=0)
        frozen = Reference.of(self.agent, self.config, policy)
        self.strategy = make_strategy(policy, self.config, CPU)
        self.reference = Reference(self.agent, self.config, self.strategy, frozen)

    def learn(self, batch, rate=1e-3):
        references = self.reference.logprobs(batch.index, batch.preferences)
        return update(self.strategy, self.agent, batch, references, self.config, rate)

    def weights(self):
        return merged_state(self.strategy.policy)


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def test_accumulated_micro_batches_are_one_big_batch(policy_dir, make_batch):
    batch = make_batch(0, 7)
    one, many = Learner(policy_dir), Learner(policy_dir, micro_batch_tokens=40)
    for _ in range(3):
        whole, parts = one.learn(batch), many.learn(batch)
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert_same(one.weights(), many.weights(), atol=2e-5, rtol=1e-4)


def test_the_step_is_the_one_that_torch_takes_on_the_mean_loss(policy_dir, make_batch):
    from transformers import AutoModelForCausalLM

    batch = make_batch(0, 3)
    learner = Learner(policy_dir, max_grad_norm=0.0, weight_decay=0.01)
    numbers = learner.learn(batch)

    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)

    def logprob(model, duel, response):
        ids = torch.tensor([duel.prompt.token_ids + response.token_ids])
        logprob_TV = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(duel.prompt.token_ids)
        return sum(logprob_TV[t - 1, ids[0, t]] for t in range(start, ids.shape[1]))

    losses = []
    for preference in batch.preferences:
        duel = preference.duel
        h = logprob(model, duel, duel.first) - logprob(model, duel, duel.second)
        with torch.no_grad():
            h0 = logprob(reference, duel, duel.first) - logprob(reference, duel, duel.second)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (h - h0)))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    optimizer.step()
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # Adam's first step is the gradient's sign, so that gradients of rounding's size step differently
    ours, theirs = learner.weights(), dict(model.named_parameters())
    for name, parameter in theirs.items():
        seen = parameter.grad.abs() > 1e-6
        torch.testing.assert_close(ours[name][seen], parameter[seen], atol=1e-5, rtol=1e-4)


def test_training_prefers_the_winner(policy_dir, make_batch):
    learner = Learner(policy_dir, learning_rate=1e-2)
    batch = make_batch(0, 4, label=[1.0, 0.0])
    first = learner.learn(batch, 1e-2)
    for _ in range(5):
        last = learner.learn(batch, 1e-2)
    assert first["margin"] == pytest.approx(0.0, abs=1e-4) and last["margin"] > 1.0
    assert last["accuracy"] == 1.0 and last["loss"] < first["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert last["reward_margin"] == pytest.approx(0.1 * last["margin"])


def test_lengths_count_end_of_sequence(policy_dir, make_preference):
    batch = TrainBatch(index=0, preferences=(make_preference((5,), (6, 7, 1), (1,)),))
    numbers = Learner(policy_dir).learn(batch)
    assert (numbers["chosen_length"], numbers["rejected_length"]) == (3, 1)


def test_a_tie_is_the_mean_of_both_orders(make_preference):
    def pairs(label):
        return PairLogProbs(
            winner_B=torch.tensor([-3.0, -3.0]),
            loser_B=torch.tensor([-9.0, -9.0]),
            reference_winner_B=torch.tensor([-4.0, -4.0]),
            reference_loser_B=torch.tensor([-4.0, -4.0]),
            winner_length_B=torch.tensor([2.0, 2.0]),
            loser_length_B=torch.tensor([2.0, 2.0]),
            preferences=[make_preference((5,), (6,), (7,), label=x) for x in (1.0, label)],
        )

    agent = Agent(AgentConfig(beta=0.5))
    # h = 1 + 5 = 6, beta h = 3: -log s(3) = 0.048587, and the other way round -log s(-3) = 3.048587
    torch.testing.assert_close(duel_losses(agent, pairs(1.0)), torch.tensor([0.048587, 0.048587]), atol=1e-5, rtol=0)
    torch.testing.assert_close(duel_losses(agent, pairs(0.5)), torch.tensor([0.048587, 1.548587]), atol=1e-5, rtol=0)


def test_a_batch_of_ties_alone_has_no_accuracy(policy_dir, make_batch):
    assert "accuracy" not in Learner(policy_dir).learn(make_batch(0, 2, label=0.5))


def test_the_label_decides_the_winner_not_the_position(policy_dir, make_batch):
    first, second = (Learner(policy_dir).learn(make_batch(0, 3, label=label)) for label in (1.0, 0.0))
    assert first["chosen_logprob"] == pytest.approx(second["rejected_logprob"], rel=1e-5)
    assert first["chosen_length"] == second["rejected_length"]


def test_simpo_trains_without_a_reference(policy_dir, make_batch):
    learner = Learner(policy_dir, agent=Agent(AgentConfig(loss="simpo", beta=2.0)))
    assert learner.reference.frozen is None
    assert math.isfinite(learner.learn(make_batch(0, 3))["loss"])


def test_an_empty_batch_changes_nothing(policy_dir):
    learner = Learner(policy_dir)
    before = learner.weights()
    assert learner.learn(TrainBatch(index=0, preferences=())) == {}
    assert_same(before, learner.weights(), atol=0, rtol=0)


class Broken(Agent):
    """Its loss, or its gradient, is not a number for one duel."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def loss(self, pairs):
        loss_B = super().loss(pairs)
        bad_B = torch.tensor([p.duel.id == "d0-1" for p in pairs.preferences])
        if self.part == "loss":
            return torch.where(bad_B, loss_B * math.nan, loss_B)
        return loss_B + torch.where(bad_B, (pairs.winner_B - pairs.winner_B.detach()).abs().sqrt(), 0.0)


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step_and_names_the_duel(policy_dir, make_batch, part):
    learner = Learner(policy_dir, agent=Broken(part), micro_batch_tokens=40)
    before = learner.weights()
    with pytest.raises(NonFiniteLossError, match=rf"batch 0: the {part} is not finite.*d0-1"):
        learner.learn(make_batch(0, 4))
    assert_same(before, learner.weights(), atol=0, rtol=0)


def test_warm_up_is_linear_and_cosine_ends_with_the_budget():
    config = LearnerConfig(learning_rate=2.0, warmup_batches=4, schedule="cosine")
    assert [learning_rate(config, b, 0.0) for b in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(config, 9, 0.5) == pytest.approx(1.0)
    assert learning_rate(config, 9, 1.0) == 0.0
    assert learning_rate(LearnerConfig(learning_rate=2.0), 0, 1.0) == 2.0


def test_a_learning_rate_of_zero_computes_and_changes_nothing(policy_dir, make_batch):
    learner = Learner(policy_dir, weight_decay=0.1)
    before = learner.weights()
    assert learner.learn(make_batch(0, 3), rate=0.0)["grad_norm"] > 0
    assert_same(before, learner.weights(), atol=0, rtol=0)


def test_clipping_bounds_the_step_but_reports_the_norm(policy_dir, make_batch):
    free, clipped = Learner(policy_dir, max_grad_norm=0.0), Learner(policy_dir, max_grad_norm=1e-9)
    batch = make_batch(0, 3)
    assert free.learn(batch)["grad_norm"] == pytest.approx(clipped.learn(batch)["grad_norm"], rel=1e-5)
    # a gradient below Adam's epsilon moves weights by less than the learning rate
    moved = (clipped.weights()["lm_head.weight"] - Learner(policy_dir).weights()["lm_head.weight"]).abs().max()
    assert 0 <= moved < 1e-4


def test_gradient_checkpointing_changes_no_number(policy_dir, make_batch):
    batch = make_batch(0, 3)
    plain, saving = Learner(policy_dir), Learner(policy_dir, gradient_checkpointing=True)
    assert saving.learn(batch) == pytest.approx(plain.learn(batch), rel=1e-5)


def test_steps_too_small_for_bfloat16_add_up_in_the_masters(policy_dir, make_batch):
    learner = Learner(policy_dir, dtype="bfloat16")
    before = learner.weights()["model.embed_tokens.weight"].clone()
    assert before.dtype == torch.bfloat16
    batch = make_batch(0, 4)
    for _ in range(40):
        numbers = learner.learn(batch, rate=2e-6)
    assert not torch.equal(before, learner.weights()["model.embed_tokens.weight"])
    assert numbers["margin"] > 0


# ==== duels that only carry a term of the loss =================================================================
def xpo_batch(make_batch, size=4):
    """A batch as XPO's collector leaves it, with another batch's responses as samples of the reference."""
    batch, others = make_batch(0, size, label=(1.0, 0.0, 0.5)), make_batch(9, size)
    samples = [{"text": p.duel.first.text, "token_ids": list(p.duel.first.token_ids)} for p in others.preferences]
    noted = [
        replace(p, duel=replace(p.duel, meta={"y_ref": sample}))
        for p, sample in zip(batch.preferences, samples, strict=True)
    ]
    return replace(batch, preferences=tuple(noted)), [p.duel.first for p in others.preferences]


def trained_on(agent, batch):
    """What the worker's loop gives to `update`."""
    return replace(batch, preferences=tuple(agent.training_duels(batch.preferences)))


def test_optimism_of_strength_zero_changes_no_weight_whatever_duels_it_adds(policy_dir, make_batch):
    batch, _ = xpo_batch(make_batch)
    plain = Learner(policy_dir)
    optimist = Learner(policy_dir, agent=make_agent("xpo", alpha=0.0), micro_batch_tokens=60)
    for _ in range(2):
        numbers = optimist.learn(trained_on(optimist.agent, batch))
        expected = plain.learn(batch)
        assert len(trained_on(optimist.agent, batch).preferences) == 2 * numbers["duels"] == 8
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-5), "added duels are not described as duels"
    assert_same(optimist.weights(), plain.weights(), atol=2e-5, rtol=1e-4)


def test_optimism_makes_the_references_samples_less_likely_than_dpo_does(policy_dir, make_batch):
    batch, samples = xpo_batch(make_batch)
    found = {}
    for alpha in (0.0, 0.05):
        learner = Learner(policy_dir, agent=make_agent("xpo", alpha=alpha))
        numbers = [learner.learn(trained_on(learner.agent, batch)) for _ in range(3)]
        carriers = [carrier(p, y) for p, y in zip(batch.preferences, samples, strict=True)]
        (part,) = micro_batches(carriers, range(4), 0, 1, 10_000)
        found[alpha] = learner.strategy.logprobs(part, last=True).mean().item(), numbers[0]
    assert found[0.05][0] < found[0.0][0] - 1e-3
    start = found[0.05][1]["loss"] - found[0.0][1]["loss"]  # before the first step both are the same policy
    initial = Learner(policy_dir)
    log_y = initial.strategy.logprobs(part, last=True).mean().item()
    assert start == pytest.approx(0.05 * log_y, rel=1e-4)


# ==== the reference ===========================================================================================
def test_reference_is_computed_once_per_duel_and_is_the_initial_policy(policy_dir, make_batch):
    learner = Learner(policy_dir)
    batch = make_batch(0, 3)
    first = learner.reference.logprobs(0, batch.preferences)
    learner.learn(batch, rate=0.1)
    learner.reference.frozen = None  # a second forward would fail
    assert learner.reference.logprobs(1, batch.preferences) == first


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_adapters_the_reference_is_the_model_without_them(policy_dir, make_batch, dropout):
    full = Learner(policy_dir)
    lora = Learner(policy_dir, lora=LoraSettings(rank=4, dropout=dropout))
    batch, later = make_batch(0, 3), make_batch(1, 3)
    for _ in range(3):
        lora.learn(batch, rate=0.05)
    expected = full.reference.logprobs(1, later.preferences)
    ours = lora.reference.logprobs(1, later.preferences)
    for duel, values in expected.items():
        assert ours[duel] == pytest.approx(values, rel=1e-5)
    numbers = lora.learn(later, rate=0.0)
    assert abs(numbers["margin"]) > 1e-3, "the policy itself is the reference"


class MovingReference(Agent):
    """SELM's: from batch 2 on the reference is the policy of batch 2."""

    def reference_version(self, batch):
        return 2 if batch >= 2 else 0


@pytest.mark.parametrize("rank", [0, 4])
def test_a_reference_that_moves_is_the_policy_at_that_moment(policy_dir, make_batch, rank, tmp_path):
    learner = Learner(policy_dir, agent=MovingReference(), lora=LoraSettings(rank=rank))
    batches = [make_batch(i, 3) for i in range(4)]
    for batch in batches[:2]:
        learner.learn(batch, rate=0.01)
    assert learner.learn(batches[2], rate=0.01)["margin"] == pytest.approx(0.0, abs=1e-4)
    assert learner.reference.version == 2
    expected = learner.reference.logprobs(3, batches[3].preferences)
    weights = learner.weights()
    learner.reference.logprobs(3, batches[1].preferences)
    assert_same(weights, learner.weights(), atol=0, rtol=0)  # looking at the reference leaves the policy alone

    again = Learner(policy_dir, agent=MovingReference(), lora=LoraSettings(rank=rank))
    learner.strategy.save(tmp_path)
    learner.reference.save(tmp_path)
    again.strategy.load(tmp_path)
    again.reference.load(tmp_path)
    again.reference.known.clear()
    recomputed = again.reference.logprobs(3, batches[3].preferences)
    for duel, values in expected.items():
        assert recomputed[duel] == pytest.approx(values, rel=1e-5)


def test_a_reference_version_that_is_gone_is_refused(policy_dir, make_batch):
    class Late(Agent):
        def reference_version(self, batch):
            return 1

    learner = Learner(policy_dir, agent=Late())
    with pytest.raises(ConfigError, match=r"reference_version\(2\)=1.*versions 0 and 2 only"):
        learner.learn(make_batch(2, 2))


# ==== weights ===================================================================================================
def test_weights_have_hugging_face_names_with_tied_ones_once(policy_dir, tied_policy_dir):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(policy_dir).state_dict()
    assert_same(Learner(policy_dir).weights(), dict(plain), atol=0, rtol=0)
    tied = Learner(tied_policy_dir).weights()
    assert "model.embed_tokens.weight" in tied and "lm_head.weight" not in tied


@pytest.mark.parametrize("targets", ["all-linear", "q_proj, lm_head"])
def test_merged_weights_compute_what_the_model_with_adapters_computes(policy_dir, make_batch, targets):
    from transformers import AutoModelForCausalLM

    learner = Learner(policy_dir, lora=LoraSettings(rank=4, target_modules=targets))
    batch = make_batch(0, 3)
    for _ in range(3):
        learner.learn(batch, rate=0.05)
    state = learner.weights()
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = learner.strategy.policy.model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, theirs, atol=1e-4, rtol=1e-4)
    names = adapter_state(learner.strategy.policy)
    assert names and all(name.startswith("base_model.model.") and ".default" not in name for name in names)


def test_only_adapters_are_trained(policy_dir):
    learner = Learner(policy_dir, lora=LoraSettings(rank=4))
    assert all("lora_" in name for name in trainable(learner.strategy.policy))


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"lora": LoraSettings(rank=2)}])
def test_a_restored_learner_goes_on_as_if_nothing_had_happened(policy_dir, make_batch, tmp_path, settings):
    straight, resumed = Learner(policy_dir, **settings), Learner(policy_dir, **settings)
    for i in range(2):
        straight.learn(make_batch(i, 3))
    straight.strategy.save(tmp_path)
    straight.reference.save(tmp_path)
    resumed.strategy.load(tmp_path)
    resumed.reference.load(tmp_path)
    assert resumed.reference.known == straight.reference.known
    assert resumed.learn(make_batch(2, 3)) == straight.learn(make_batch(2, 3))
    assert_same(straight.weights(), resumed.weights(), atol=0, rtol=0)
