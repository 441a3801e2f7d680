"""The vLLM engine, run for real in a replica of the pool, against transformers' forward passes."""

import dataclasses

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rayalign.errors import DataError, WeightSyncError
from rayalign.rollout.config import RolloutConfig, VllmSettings
from rayalign.rollout.engine import Sampling
from rayalign.rollout.pool import RolloutPool
from rayalign.rollout.transformers_engine import TransformersEngine, keep_nucleus
from rayalign.rollout.weights import pack

pytest.importorskip("vllm")
pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

SAMPLING = Sampling(n=4, temperature=0.8, max_tokens=20)
CONFIG = RolloutConfig(
    engine="vllm",
    num_replicas=1,
    max_prompt_tokens=40,
    max_tokens=40,
    start_timeout_s=240,
    vllm=VllmSettings(kv_cache_gib=1),
)


@pytest.fixture(scope="module")
def pool(ray_cluster, policy):
    with RolloutPool(CONFIG, policy, name="vllm") as pool:
        yield pool


def forward_logprobs(model, prompt, candidate, temperature=0.8, top_p=1.0):
    ids = torch.tensor([[*prompt.token_ids, *candidate.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    logprobs = (logits / temperature).log_softmax(-1) if temperature else logits.log_softmax(-1)
    if top_p < 1:
        logprobs = keep_nucleus(logprobs, top_p)
    return logprobs.gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]


def assert_logprobs_of(model, prompts, groups, temperature=0.8, top_p=1.0):
    for prompt, group in zip(prompts, groups, strict=True):
        for candidate in group:
            expected = forward_logprobs(model, prompt, candidate, temperature, top_p)
            torch.testing.assert_close(torch.tensor(candidate.logprobs), expected, atol=1e-3, rtol=1e-3)


def inside(pool, function, *args):
    """Run `function(engine, *args)` in the replica's process."""
    call = pool._slots[0].actor.__ray_call__.remote(lambda replica, *a: function(replica.model, *a), *args)
    return ray.get(call, timeout=120)


def test_logprobs_are_those_of_the_distribution_that_was_sampled_before_and_after_a_sync(
    pool, policy, prompts, new_weights
):
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert_logprobs_of(model, prompts, pool.generate(prompts, SAMPLING, seed=1))
    for version in (1, 2):
        weights = new_weights(version=version, seed=version)
        pool.sync(weights)
        model.load_state_dict(dict(weights.tensors()), strict=False)
        nucleus = dataclasses.replace(SAMPLING, top_p=0.7)
        groups = pool.generate(prompts, nucleus, seed=1)
        assert {c.policy_version for group in groups for c in group} == {version}
        assert_logprobs_of(model, prompts, groups, top_p=0.7)


def test_greedy_decoding_is_that_of_the_transformers_engine(pool, policy, prompts, new_weights):
    weights, engine = new_weights(version=3), TransformersEngine(policy)
    engine.load(weights)
    pool.sync(weights)
    greedy = Sampling(n=2, temperature=0, max_tokens=20)
    groups, expected = pool.generate(prompts, greedy, 0), engine.generate(prompts, greedy, 0)
    for group, other in zip(groups, expected, strict=True):
        assert group[0] == group[1]
        assert group[0].token_ids == other[0].token_ids
        assert (group[0].text, group[0].finished) == (other[0].text, other[0].finished)
        torch.testing.assert_close(
            torch.tensor(group[0].logprobs), torch.tensor(other[0].logprobs), atol=1e-3, rtol=1e-3
        )


def test_end_of_sequence_is_kept_in_the_tokens_and_absent_from_the_text(pool, prompts):
    candidates = [c for group in pool.generate(prompts, dataclasses.replace(SAMPLING, n=30), seed=3) for c in group]
    assert {c.finished for c in candidates} == {True, False}
    for candidate in candidates:
        assert candidate.finished == (candidate.token_ids[-1] == 1)
        assert 1 not in candidate.token_ids[:-1] and "<eos>" not in candidate.text
        assert len(candidate.logprobs) == len(candidate.token_ids) <= 20


def test_a_request_depends_on_its_seed_and_not_on_what_came_before(pool, prompts):
    first = pool.generate(prompts, SAMPLING, seed=5)
    assert pool.generate(prompts, SAMPLING, seed=6) != first
    assert pool.generate(prompts, SAMPLING, seed=5) == first
    assert len({c.token_ids for c in first[0]}) > 1


def test_more_prompt_tokens_than_fit_into_one_step_are_sampled_all_the_same(pool, prompts):
    groups = pool.generate(prompts, Sampling(n=120, temperature=1.0, max_tokens=2), seed=0)
    assert sum(len(prompt.token_ids) * 120 for prompt in prompts) > 4096
    assert all(len(group) == 120 for group in groups)


def test_each_layer_that_is_not_what_was_sent_is_found(pool, new_weights):
    weights = new_weights(version=4)
    pool.sync(weights)
    read_back = lambda engine, other: engine._ask_workers("rayalign_read_back", other)  # noqa: E731
    assert inside(pool, read_back, weights) == weights.checksum
    state = dict(weights.tensors())
    for name, where in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight is not"),
        ("model.norm.weight", "model.norm.weight is not"),
        ("model.layers.0.self_attn.k_proj.weight", r"model.layers.0.self_attn.qkv_proj.weight (as repacked"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight (as repacked"),
    ):
        changed = state | {name: state[name] * 1.01}
        assert inside(pool, read_back, pack(4, changed)).startswith(where)
    without = {k: v for k, v in state.items() if k != "model.layers.1.mlp.down_proj.weight"}
    assert inside(pool, read_back, pack(4, without)) == "model.layers.1.mlp.down_proj.weight was not sent"
    assert inside(pool, read_back, pack(4, state | {"extra": torch.ones(2)})) == "extra is unknown to the engine"


def test_weights_that_reached_the_engine_by_another_way_are_confirmed(pool, prompts, new_weights):
    weights = new_weights(version=4)
    pool.sync(weights)
    pool.confirm(dataclasses.replace(weights, version=5))
    assert pool.generate(prompts, SAMPLING, seed=2)[0][0].policy_version == 5 == pool.version


def test_a_corrupted_sync_is_detected_and_a_new_replica_runs_the_old_version(pool, prompts, new_weights):
    pool.sync(new_weights(version=5))
    expected = pool.generate(prompts, SAMPLING, seed=2)
    bad = new_weights(version=6, seed=3)
    next(iter(bad.arrays.values())).flat[0] += 1e-2
    with pytest.raises(WeightSyncError, match="replica vllm-0 was sent weights version 6"):
        pool.sync(bad)  # `confirm` compares in the same way, and a refusal costs a new engine: once is enough
    assert pool.generate(prompts, SAMPLING, seed=2) == expected


def test_adapters_and_long_prompts_that_the_engine_can_not_take_are_refused(pool, prompts, new_weights):
    adapter = dataclasses.replace(new_weights(version=9), adapter={"r": 4})
    with pytest.raises(DataError, match=r"'p0' has 70 tokens; with rollout.max_tokens=20 it exceeds the 80 positions"):
        pool.generate([dataclasses.replace(prompts[0], token_ids=(8,) * 70)], SAMPLING, 0)
    with pytest.raises(WeightSyncError, match=r"are an adapter, but rollout.vllm.enable_lora=False"):
        inside(pool, lambda engine, weights: engine.load(weights), adapter)


def test_an_adapter_is_loaded_alone_and_read_back(policy, prompts):
    import peft

    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    learner = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(policy), lora)
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, vllm=dataclasses.replace(CONFIG.vllm, enable_lora=True, max_lora_rank=8))
    with RolloutPool(config, policy, name="lora") as pool:
        for version in (1, 2):
            with torch.no_grad():
                for name, parameter in learner.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.2)
            state = peft.get_peft_model_state_dict(learner)
            weights = pack(version, state, adapter=learner.peft_config["default"].to_dict())
            pool.sync(weights)
            groups = pool.generate(prompts, SAMPLING, seed=0)
            assert groups[0][0].policy_version == version
            assert_logprobs_of(learner, prompts, groups)
        name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
        changed = pack(2, state | {name: state[name] * 1.1}, adapter=weights.adapter)
        found = inside(pool, lambda engine, w: engine._ask_workers("rayalign_read_back_adapter", w, 3), changed)
        assert found == "model.layers.1.self_attn.v_proj.lora_B.weight is not what was sent"


def test_no_response_is_shorter_than_asked_for(pool, prompts):
    sampling = Sampling(n=40, temperature=2.0, max_tokens=12, min_tokens=12)
    lengths = [len(c.token_ids) for group in pool.generate(prompts, sampling, seed=3) for c in group]
    assert set(lengths) == {12}
    free = pool.generate(prompts, dataclasses.replace(sampling, min_tokens=0), seed=3)
    assert any(len(c.token_ids) < 12 for group in free for c in group), "else there is nothing to forbid"
