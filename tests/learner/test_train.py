"""The worker loop under real Ray Train: strategies agree, kills are survived, errors surface as what they are."""

import itertools
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError, NonFiniteLossError, WaitError
from rayalign.learner.config import LearnerConfig, LoraSettings
from rayalign.learner.stream import ListSource
from rayalign.learner.train import LearnerSetup, make_trainer
from rayalign.rollout.weights import checksum

SETTINGS = dict(
    learning_rate=1e-3, micro_batch_tokens=64, logprob_chunk_tokens=8, checkpoint_every=2, cpus_per_worker=0.5
)


@pytest.fixture
def start(policy_dir, shelf, tmp_path):
    """`start(batches, **settings)` -> trainer, the source's actor, where the final directory goes."""

    def make(batches, agent=None, name="learner", publish="merged", actor=None, **settings):
        if actor is None:
            actor = shelf(batches)
        setup = LearnerSetup(
            agent=agent or Agent(),
            config=LearnerConfig(**SETTINGS | settings),
            policy=str(policy_dir),
            source=actor[1],
            final_dir=str(tmp_path / f"final-{name}"),
            publish=publish,
        )
        return make_trainer(setup, storage_path=str(tmp_path), name=name), actor, Path(setup.final_dir)

    return make


@pytest.fixture(scope="module")
def batches(make_batch):
    """Five batches: uneven shards (5 duels), ties, a shard without a duel (1), nothing at all (0)."""
    sizes = (5, 4, 1, 0, 5)
    return [make_batch(i, size, label=(1.0, 0.0, 0.5)) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def plain_curve(policy_dir, batches):
    """Loss, gradient norm and margin by version, from the plain strategy in this process, in one micro-batch."""
    from rayalign.learner.policy import load_policy, merged_state
    from rayalign.learner.reference import Reference
    from rayalign.learner.strategies import make_strategy
    from rayalign.learner.update import update

    agent, config = Agent(), LearnerConfig(learning_rate=1e-3)
    policy = load_policy(policy_dir, config, seed=0)
    frozen = Reference.of(agent, config, policy)
    strategy = make_strategy(policy, config, torch.device("cpu"))
    reference = Reference(agent, config, strategy, frozen)
    curve = {}
    for batch in batches:
        references = reference.logprobs(batch.index, batch.preferences)
        curve[batch.index + 1] = update(strategy, agent, batch, references, config, 1e-3)
    return curve, merged_state(policy)


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_workers_give_the_curve_and_the_weights_of_one(start, batches, plain_curve, strategy):
    trainer, (actor, source), final = start(batches, strategy=strategy, num_workers=2)
    if strategy in ("zero2", "zero3"):  # in two lives: DeepSpeed's checkpoints restore what they hold
        ray.get(actor.end_at.remote(3))
        assert trainer.fit().return_value["version"] == 3
        ray.get(actor.end_at.remote(5))
        trainer, _, final = start(batches, actor=(actor, source), strategy=strategy, num_workers=2, offload=True)
    result = trainer.fit()
    seen = ray.get(actor.seen.remote())
    curve, weights = plain_curve
    assert result.return_value["version"] == 5
    assert sorted(seen["published"]) == [1, 2, 3, 4, 5]
    assert sorted(seen["metrics"]) == [1, 2, 3, 5]  # the empty batch makes a version, and no step
    assert checksum(dict(seen["published"][3].tensors())) == checksum(dict(seen["published"][4].tensors()))
    for version, numbers in seen["metrics"].items():
        for name in ("loss", "margin", "grad_norm", "chosen_logprob"):
            assert numbers[name] == pytest.approx(curve[version][name], rel=2e-3, abs=2e-4), (version, name)
    published = dict(seen["published"][5].tensors())
    assert published.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(published[name], value, atol=2e-4, rtol=1e-2)
    for name, value in load(final).items():
        assert torch.equal(value, published[name]), name


def test_a_killed_worker_resumes_at_its_checkpoint_and_reads_the_batches_again(start, batches, plain_curve):
    trainer, (actor, _), final = start(batches)
    ray.get(actor.hold_at.remote(3))  # versions 1, 2 (checkpoint), 3, and then it waits
    failures = []

    def kill():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            seen = ray.get(actor.seen.remote())
            # the worker goes on while Ray Train takes note of its checkpoint; only then is there one to resume at
            noted = [
                f for f in final.parent.rglob("checkpoint_manager_snapshot.json") if "checkpoint_" in f.read_text()
            ]
            if 3 in seen["asked"] and noted:
                os.kill(seen["pids"][0], signal.SIGKILL)
                ray.get(actor.hold_at.remote(None))
                return
            time.sleep(0.1)
        failures.append("never got to batch 3")
        ray.get(actor.hold_at.remote(None))

    killer = threading.Thread(target=kill)
    killer.start()
    result = trainer.fit()
    killer.join()
    assert not failures
    seen = ray.get(actor.seen.remote())
    assert seen["asked"] == [0, 1, 2, 3, 2, 3, 4, 5], "killed in 3, resumed at version 2, its checkpoint"
    assert result.return_value["version"] == 5
    curve, weights = plain_curve
    for version, numbers in seen["metrics"].items():
        assert numbers["loss"] == pytest.approx(curve[version]["loss"], rel=1e-3)
    for name, value in load(final).items():
        torch.testing.assert_close(value, weights[name], atol=2e-4, rtol=1e-2)


def test_a_loss_that_is_not_finite_is_raised_as_such_and_a_new_driver_resumes_before_it(start, batches):
    class Poisoned(Agent):
        def loss(self, pairs):
            bad = torch.tensor([p.duel.id == "d4-2" for p in pairs.preferences])
            return torch.where(bad, math.nan, super().loss(pairs))

    trainer, (actor, source), final = start(batches, agent=Poisoned())
    with pytest.raises(NonFiniteLossError, match=r"batch 4: the loss is not finite for duel d4-2"):
        trainer.fit()
    assert ray.get(actor.seen.remote())["asked"] == [0, 1, 2, 3, 4], "it is not tried again"
    assert not final.exists()

    again, _, final = start(batches, actor=(actor, source))  # another driver, the same place
    assert again.fit().return_value["version"] == 5
    assert ray.get(actor.seen.remote())["asked"][5:] == [4, 5]
    assert (final / "model.safetensors").exists()


def test_adapters_are_published_as_such_and_a_source_that_lost_weights_gets_them_again(start, make_batch, policy_dir):
    batches = [make_batch(i, 2) for i in range(2)]
    trainer, (actor, _), final = start(
        batches, publish="adapter", lora=LoraSettings(rank=2), strategy="zero3", num_workers=2
    )
    ray.get(actor.lose_at.remote(1))
    trainer.fit()
    seen = ray.get(actor.seen.remote())
    assert seen["sent"] == [1, 1, 2]
    weights = seen["published"][2]
    assert weights.adapter["r"] == 2 and json.dumps(dict(weights.adapter), default=str)
    assert all("lora_" in name for name in weights.arrays)
    from safetensors.torch import load_file

    assert checksum(load_file(final / "adapter" / "adapter_model.safetensors")) == weights.checksum
    assert load(final).keys() == load(policy_dir).keys()


def test_a_source_with_nothing_to_give_is_named_in_time(policy_dir, tmp_path):
    class Silent(ListSource):
        def next_batch(self, index, timeout_s):
            raise WaitError(f"waited {timeout_s:.0f} s for batch {index} from nobody.")

    setup = LearnerSetup(
        agent=Agent(),
        config=LearnerConfig(batch_timeout_s=7.0),
        policy=str(policy_dir),
        source=Silent([]),
        final_dir=str(tmp_path / "final"),
    )
    trainer = make_trainer(setup, storage_path=str(tmp_path), name="silent")
    trainer.running_in_local_mode = True  # Ray Train's own: the loop in this process, no workers
    with pytest.raises(WaitError, match="waited 7 s for batch 0 from nobody"):
        trainer.fit()


def rankings(make_batch, index, prompts):
    """A batch as SELM's collector leaves it: three responses of each prompt, all pairs judged, the longer one wins."""
    preferences = []
    for p, one in enumerate(make_batch(index, prompts).preferences):
        responses = [one.duel.first, one.duel.second, make_batch(100 + index, prompts).preferences[p].duel.first]
        for i, j in itertools.combinations(range(3), 2):
            lengths = [len(responses[k].token_ids) for k in (i, j)]
            duel = replace(
                one.duel, id=f"{one.duel.id}-{i}{j}", first=responses[i], second=responses[j],
                meta={"prompt": p, "ranks": [i, j]},
            )  # fmt: skip
            preferences.append(replace(one, duel=duel, label=0.5 + 0.5 * float(lengths[0] - lengths[1] > 0)))
    return replace(make_batch(index, 0), preferences=tuple(preferences))


def test_training_duels_may_be_fewer_or_none_and_the_reference_moves_with_the_iterations(
    make_batch, policy_dir, tmp_path
):
    sizes = (3, 0, 2, 3, 1)  # prompts; iterations of two batches each, the last one of three
    source = ListSource([rankings(make_batch, i, prompts) for i, prompts in enumerate(sizes)])
    agent = make_agent("selm", iterations=2, batches_per_iteration=2, final_learning_rate=0.5, alpha=0.0)
    settings = {k: v for k, v in SETTINGS.items() if k != "cpus_per_worker"}
    setup = LearnerSetup(
        agent=agent,
        config=LearnerConfig(**settings),
        policy=str(policy_dir),
        source=source,
        final_dir=str(tmp_path / "final"),
    )
    trainer = make_trainer(setup, storage_path=str(tmp_path), name="selm")
    trainer.running_in_local_mode = True
    result = trainer.fit().return_value
    assert result["version"] == 5 and (tmp_path / "final" / "model.safetensors").exists()
    weights, numbers = zip(*source.published, strict=True)
    assert [w.version for w in weights] == [1, 2, 3, 4, 5]
    assert weights[0].checksum == weights[1].checksum, "a batch without a duel is no step"
    assert len({w.checksum for w in weights}) == 4
    assert [numbers[i]["duels"] for i in (0, 2, 3, 4)] == [3, 2, 3, 1]
    rates = [numbers[i]["learning_rate"] for i in (0, 2, 3, 4)]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 5e-4])
    for i in (0, 2):  # at the start of an iteration the policy is its own reference
        assert numbers[i]["margin"] == pytest.approx(0.0, abs=1e-4)
        assert numbers[i]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(numbers[3]["margin"]) > 1e-3


def test_adapters_can_only_be_published_where_there_are_some(policy_dir):
    with pytest.raises(ConfigError, match=r"publish='adapter' needs adapters, but learner.lora.rank=0"):
        LearnerSetup(
            agent=Agent(), config=LearnerConfig(), policy=str(policy_dir), source=ListSource([]), final_dir="x",
            publish="adapter",
        )  # fmt: skip
