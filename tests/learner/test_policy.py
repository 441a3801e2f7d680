"""Settings that can't work are refused before anything starts, by name and with a way out."""

import importlib.util

import pytest

from rayalign.errors import ConfigError, DataError
from rayalign.learner.config import LearnerConfig, LoraSettings
from rayalign.learner.policy import load_policy, validate


def with_adapters(target_modules, **settings):
    return LearnerConfig(lora=LoraSettings(rank=4, target_modules=target_modules), **settings)


def test_deepspeed_strategies_need_deepspeed(policy_dir, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    validate(LearnerConfig(strategy="ddp", num_workers=2), policy_dir)
    with pytest.raises(ConfigError, match=r"learner.strategy='zero3' needs DeepSpeed.*rayalign\[deepspeed\]"):
        validate(LearnerConfig(strategy="zero3", num_workers=2), policy_dir)


def test_target_modules_that_the_policy_does_not_have_are_named_with_those_it_has(policy_dir):
    validate(with_adapters("all-linear"), policy_dir)
    validate(with_adapters("q_proj, v_proj"), policy_dir)
    with pytest.raises(ConfigError, match=r"target_modules names 'query'.*It has: .*q_proj"):
        validate(with_adapters("q_proj, query"), policy_dir)


def test_adapters_on_a_tied_head_are_refused(policy_dir, tied_policy_dir):
    validate(with_adapters("lm_head"), policy_dir)
    with pytest.raises(ConfigError, match=r"names 'lm_head', whose weights input and output embeddings share"):
        validate(with_adapters("lm_head"), tied_policy_dir)


def test_zero3_can_not_have_adapters_on_the_head(policy_dir):
    with pytest.raises(ConfigError, match=r"names the head 'lm_head'.*zero2"):
        validate(with_adapters("lm_head", strategy="zero3", num_workers=2), policy_dir)


@pytest.mark.parametrize("settings", [{"rank": -1}, {"rank": 2, "dropout": 1.0}, {"rank": 2, "alpha": 0.0}])
def test_adapter_settings_out_of_range_are_refused(policy_dir, settings):
    with pytest.raises(ConfigError, match=r"learner\.lora"):
        validate(LearnerConfig(lora=LoraSettings(**settings)), policy_dir)


def test_a_directory_without_a_model_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="can't be loaded as a causal language model"):
        load_policy(tmp_path, LearnerConfig(), seed=0)


def test_policy_and_reference_have_no_dropout_of_their_own(tmp_path, policy_dir):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, LearnerConfig(), seed=0)
    assert policy.training
    ids_RT, ones_RT = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    response_RT = torch.tensor([[False, True, True]])
    assert torch.equal(policy(ids_RT, ones_RT, response_RT), policy(ids_RT, ones_RT, response_RT))
