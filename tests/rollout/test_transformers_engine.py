"""The transformers engine against whole forward passes and transformers' own generate."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayalign.errors import DataError, WeightSyncError
from rayalign.rollout.engine import Sampling
from rayalign.rollout.transformers_engine import TransformersEngine, keep_nucleus, sample
from rayalign.rollout.weights import pack

SAMPLING = Sampling(n=4, temperature=0.8, max_tokens=20)


@pytest.fixture(scope="module")
def engine(policy):
    return TransformersEngine(policy)


def forward_logprobs(model, prompt, candidate, temperature=1.0, top_p=1.0):
    """Of each token of the candidate, by one forward pass over prompt and response, without cache or padding."""
    ids = torch.tensor([[*prompt.token_ids, *candidate.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    logprobs = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        logprobs = keep_nucleus(logprobs, top_p)
    return logprobs.gather(-1, ids[0, len(prompt.token_ids) :, None])[:, 0]


def tokens(groups):
    return [[c.token_ids for c in group] for group in groups]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(engine, policy, prompts, top_p):
    model = AutoModelForCausalLM.from_pretrained(policy)
    sampling = dataclasses.replace(SAMPLING, top_p=top_p)
    for prompt, group in zip(prompts, engine.generate(prompts, sampling, seed=1), strict=True):
        for candidate in group:
            expected = forward_logprobs(model, prompt, candidate, temperature=0.8, top_p=top_p)
            torch.testing.assert_close(torch.tensor(candidate.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mistral with a sliding window"])
def test_other_architectures_give_the_logprobs_of_a_whole_forward_pass(tmp_path, policy, prompts, kind):
    from transformers import GPT2Config, MistralConfig, Qwen3Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
    grouped = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = {
        "qwen3": lambda: Qwen3Config(**sizes, **grouped),
        "gpt2": lambda: GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1),
        "mistral with a sliding window": lambda: MistralConfig(**sizes, **grouped, sliding_window=6),
    }[kind]()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_text((policy / file).read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    engine = TransformersEngine(tmp_path)
    for prompt, group in zip(prompts, engine.generate(prompts, SAMPLING, seed=1), strict=True):
        for candidate in group:
            expected = forward_logprobs(model, prompt, candidate, temperature=0.8)
            torch.testing.assert_close(torch.tensor(candidate.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_greedy_decoding_is_that_of_transformers_generate_and_reports_logprobs_at_temperature_one(
    engine, policy, prompts
):
    model = AutoModelForCausalLM.from_pretrained(policy)
    sampling = Sampling(n=2, temperature=0, max_tokens=20)
    for prompt, group in zip(prompts, engine.generate(prompts, sampling, seed=0), strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
        assert group[0] == group[1]
        assert list(group[0].token_ids) == expected
        assert group[0].finished == (expected[-1] == 1)
        expected_logprobs = forward_logprobs(model, prompt, group[0])
        torch.testing.assert_close(torch.tensor(group[0].logprobs), expected_logprobs, atol=1e-4, rtol=1e-4)


def test_end_of_sequence_is_kept_in_the_tokens_counted_and_absent_from_the_text(engine, prompts):
    candidates = [c for group in engine.generate(prompts, dataclasses.replace(SAMPLING, n=30), seed=3) for c in group]
    ended = [c for c in candidates if c.finished]
    assert ended and len(ended) < len(candidates)
    for candidate in candidates:
        assert candidate.finished == (candidate.token_ids[-1] == 1)
        assert 1 not in candidate.token_ids[:-1]
        assert len(candidate.logprobs) == len(candidate.token_ids) <= 20
        assert candidate.finished or len(candidate.token_ids) == 20
        assert "<eos>" not in candidate.text
        words = [f"w{token - 7}" for token in candidate.token_ids if token >= 7]
        assert [word for word in candidate.text.split() if word.startswith("w")] == words


def test_any_of_several_end_of_sequence_ids_ends_a_response(make_policy, prompts):
    engine = TransformersEngine(make_policy(eos=[1, 20, 30, 40]))
    assert engine.eos_ids == (1, 20, 30, 40)
    candidates = [c for group in engine.generate(prompts, dataclasses.replace(SAMPLING, n=20), 0) for c in group]
    assert {c.token_ids[-1] for c in candidates if c.finished} <= {1, 20, 30, 40}
    assert len({c.token_ids[-1] for c in candidates if c.finished}) > 1
    assert not any({1, 20, 30, 40} & set(c.token_ids[:-1]) for c in candidates)


def test_what_is_sampled_does_not_depend_on_the_batch_or_its_padding(policy, engine, prompts):
    together = tokens(engine.generate(prompts, SAMPLING, seed=5))
    one_by_one = TransformersEngine(policy, max_batch_tokens=1)
    assert tokens(one_by_one.generate(prompts, SAMPLING, seed=5)) == together
    reversed_order = engine.generate(prompts[::-1], SAMPLING, seed=5, positions=range(len(prompts))[::-1])
    assert tokens(reversed_order)[::-1] == together


def test_another_seed_or_position_samples_something_else(engine, prompts):
    base = tokens(engine.generate(prompts[:1], SAMPLING, seed=0))
    assert tokens(engine.generate(prompts[:1], SAMPLING, seed=1)) != base
    assert tokens(engine.generate(prompts[:1], SAMPLING, seed=0, positions=[1])) != base
    assert len(set(base[0])) > 1


def test_a_longer_limit_only_continues_what_a_shorter_one_sampled(engine, prompts):
    short = engine.generate(prompts, dataclasses.replace(SAMPLING, max_tokens=6), seed=2)
    long = engine.generate(prompts, SAMPLING, seed=2)
    assert tokens(short) == [[c.token_ids[:6] for c in group] for group in long]


def test_inverse_cdf_sampling_hits_each_token_as_often_as_its_probability():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    noise = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    token, logprob = sample(logits.expand(10_000, -1), Sampling(temperature=0.5), noise)
    expected = (logits[0] / 0.5).softmax(-1)
    shares = torch.bincount(token, minlength=4) / 10_000
    torch.testing.assert_close(shares, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprob.exp(), expected[token])


def test_noise_at_its_limits_never_draws_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf]]).expand(2, -1)
    noise = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, Sampling(temperature=1.0), noise)[0].tolist() == [1, 2]


def test_nucleus_keeps_the_smallest_set_that_reaches_the_mass_and_renormalises():
    logprobs = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(keep_nucleus(logprobs, 0.7).exp(), torch.tensor([[0.625, 0.375, 0, 0]]))
    torch.testing.assert_close(keep_nucleus(logprobs, 0.1).exp(), torch.tensor([[1.0, 0, 0, 0]]))


def test_loaded_weights_are_read_back_and_sampled_from(policy, prompts, new_weights):
    engine, weights = TransformersEngine(policy), new_weights(version=3)
    before = tokens(engine.generate(prompts, SAMPLING, seed=0))
    assert engine.version == 0
    assert engine.load(weights) == weights.checksum
    assert engine.version == 3
    groups = engine.generate(prompts, SAMPLING, seed=0)
    assert tokens(groups) != before
    assert {c.policy_version for group in groups for c in group} == {3}
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.load_state_dict(dict(weights.tensors()), strict=False)
    expected = forward_logprobs(model, prompts[0], groups[0][0], temperature=0.8)
    torch.testing.assert_close(torch.tensor(groups[0][0].logprobs), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_another_type_are_checked_after_the_cast(policy, new_weights):
    engine, weights = TransformersEngine(policy, dtype="bfloat16"), new_weights()
    assert engine.load(weights) == weights.checksum


def test_corrupted_weights_do_not_read_back_their_checksum(policy, new_weights):
    for dtype in ("float32", "bfloat16"):
        weights = new_weights()
        name = next(iter(weights.arrays))
        weights.arrays[name].flat[5] += 1.0
        assert TransformersEngine(policy, dtype=dtype).load(weights) != weights.checksum


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(policy, prompts, new_weights):
    engine, weights = TransformersEngine(policy), new_weights()
    before = tokens(engine.generate(prompts, SAMPLING, seed=0))
    state = dict(weights.tensors())
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(WeightSyncError, match=rf"version 4: 1 tensors are missing: {name}"):
        engine.load(pack(4, {k: v for k, v in state.items() if k != name}))
    with pytest.raises(WeightSyncError, match="1 tensors are unknown to the engine: extra"):
        engine.load(pack(4, state | {"extra": torch.zeros(1)}))
    with pytest.raises(WeightSyncError, match=rf"of another shape: {name} \(1, 2\) instead of \(256, 128\)"):
        engine.load(pack(4, state | {name: torch.zeros(1, 2)}))
    assert tokens(engine.generate(prompts, SAMPLING, seed=0)) == before and engine.version == 0


def test_an_adapter_gives_the_logprobs_of_the_merged_model(policy, prompts):
    import peft

    engine = TransformersEngine(policy)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    learner = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(policy), config)
    torch.manual_seed(0)
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in learner.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        state = peft.get_peft_model_state_dict(learner)
        weights = pack(version, state, adapter=learner.peft_config["default"].to_dict())
        assert engine.load(weights) == weights.checksum and engine.version == version
    candidate = engine.generate(prompts, SAMPLING, seed=0)[0][0]
    merged = learner.merge_and_unload()
    expected = forward_logprobs(merged, prompts[0], candidate, temperature=0.8)
    torch.testing.assert_close(torch.tensor(candidate.logprobs), expected, atol=1e-4, rtol=1e-4)
    whole = pack(3, {k: v for k, v in merged.state_dict().items() if k != "lm_head.weight"})
    assert engine.load(whole) == whole.checksum
    with pytest.raises(WeightSyncError, match="weights version 4 are an adapter"):
        engine.load(pack(4, state, adapter=weights.adapter))


def test_prompts_that_can_not_be_used_are_named(engine, prompts):
    with pytest.raises(DataError, match="'p0' has no token ids"):
        engine.generate([dataclasses.replace(prompts[0], token_ids=())], SAMPLING, 0)
    with pytest.raises(DataError, match=r"'p0' has 240 tokens; with rollout.max_tokens=20 it exceeds the 256"):
        engine.generate([dataclasses.replace(prompts[0], token_ids=(8,) * 240)], SAMPLING, 0)


def test_a_directory_without_a_model_is_named(tmp_path: Path, policy):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text((policy / name).read_text())
    with pytest.raises(DataError, match="its model can't be loaded"):
        TransformersEngine(tmp_path)
