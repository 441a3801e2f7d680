"""Dropout before the head, against the definition: masked features times the head's weights, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from rayalign.errors import ConfigError
from rayalign.learner.logprobs import PolicyModule
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.dropout import HeadDropout, feature_masks, token_moments
from rayalign.scoring.model import ScorerModel

SETTINGS = {"rate": 0.3, "masks": 6, "seed": 11}


def by_definition(model, prompt, response, *, rate, masks, seed):
    """Mean, std and variance (ddof 1) over masks of each token's log-probability, summed over tokens, in float64."""
    ids = torch.tensor([prompt.token_ids + response.token_ids])
    hidden_TD = model.get_decoder()(input_ids=ids).last_hidden_state[0].detach().double()
    weight_VD = model.get_output_embeddings().weight.detach().double()
    start, sums = len(prompt.token_ids), np.zeros(3)
    kept_MD = feature_masks(masks, hidden_TD.shape[1], rate, seed)
    for t in range(start, ids.shape[1]):
        over_masks = [
            ((hidden_TD[t - 1] * kept_D / (1 - rate)) @ weight_VD.T).log_softmax(-1)[ids[0, t]].item()
            for kept_D in kept_MD
        ]
        sums += np.mean(over_masks), np.std(over_masks, ddof=1), np.var(over_masks, ddof=1)
    return sums


def columns(moments):
    return np.stack([moments.mean_N, moments.std_N, moments.variance_N], axis=-1)


def test_moments_are_those_of_the_masked_features_token_by_token(scorer, prompts, groups):
    found = scorer.dropout_logprobs(prompts, groups, **SETTINGS)
    for prompt, group, moments in zip(prompts, groups, found, strict=True):
        expected = [by_definition(scorer.live.model, prompt, response, **SETTINGS) for response in group]
        np.testing.assert_allclose(columns(moments), expected, rtol=2e-4, atol=1e-4)


def test_moments_do_not_depend_on_the_batching_and_the_seed_names_the_masks(policy, weights, scorer, prompts, groups):
    wide = ScorerModel(ScorerConfig(num_replicas=0, max_batch_tokens=4096, logprob_chunk_tokens=3), str(policy))
    wide.load(weights)
    ours = scorer.dropout_logprobs(prompts, groups, **SETTINGS)
    theirs = wide.dropout_logprobs(prompts, groups, **SETTINGS)
    alone = scorer.dropout_logprobs(prompts[2:3], [groups[2][1:2]], **SETTINGS)
    np.testing.assert_allclose([columns(m) for m in theirs], [columns(m) for m in ours], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(columns(alone[0])[0], columns(ours[2])[1], rtol=1e-4, atol=1e-5)
    other = scorer.dropout_logprobs(prompts, groups, **SETTINGS | {"seed": 12})
    assert np.abs(columns(other[0]) - columns(ours[0])).max() > 1e-2


def test_without_dropout_there_is_no_spread_and_the_mean_is_the_log_probability(scorer, prompts, groups):
    for of in ("policy", "reference"):
        found = scorer.dropout_logprobs(prompts, groups, rate=0.0, masks=2, seed=0, of=of)
        expected = scorer.logprobs(prompts, groups, of=of)
        np.testing.assert_allclose([m.mean_N for m in found], expected, rtol=1e-5)
        assert all((m.std_N == 0).all() and (m.variance_N == 0).all() for m in found)


def test_more_dropout_means_more_spread(scorer, prompts, groups):
    spread = [
        np.mean([m.std_N for m in scorer.dropout_logprobs(prompts, groups, rate=rate, masks=16, seed=0)])
        for rate in (0.01, 0.05, 0.2)
    ]
    assert spread[0] < spread[1] < spread[2]


def test_groups_may_be_empty(scorer, prompts, groups):
    found = scorer.dropout_logprobs(prompts[:2], [[], groups[1][:1]], **SETTINGS)
    assert [m.std_N.shape for m in found] == [(0,), (1,)]


def tiny(kind, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    small = dict(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | settings)).eval()


def rows():
    """Two rows of 3 and 2 response tokens, the second one padded."""
    ids_RT = torch.tensor([[5, 9, 11, 30, 1], [7, 8, 1, 0, 0]])
    response_RT = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    return ids_RT, (ids_RT > 0).long(), response_RT


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),  # its head has a bias
    ],
)
def test_repeating_the_last_layer_gives_what_repeating_the_whole_model_gives(kind, settings):
    model = tiny(kind, **settings)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    policy = PolicyModule(model, chunk_tokens=2)
    found = HeadDropout(policy, **SETTINGS)(*rows())
    expected = HeadDropout(policy, **SETTINGS, plain=True)(*rows())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected[:, 1] > 1e-4).all()


def test_a_head_that_is_no_plain_linear_layer_is_called_with_masked_features():
    class Adapted(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2.0

    model = tiny("llama")
    head = Adapted(32, 64, bias=False)
    model.set_output_embeddings(head)
    policy = PolicyModule(model, chunk_tokens=2)
    found = HeadDropout(policy, **SETTINGS)(*rows())
    torch.testing.assert_close(found, HeadDropout(policy, **SETTINGS, plain=True)(*rows()), rtol=1e-4, atol=1e-5)


def test_a_model_whose_logits_only_it_knows_is_run_as_a_whole():
    model = tiny("llama")
    own = model.forward
    model.forward = lambda **inputs: (out := own(**inputs)).__setitem__("logits", out.logits.sinh() * 3) or out
    policy = PolicyModule(model, chunk_tokens=2)
    assert policy.own_forward
    found = HeadDropout(policy, **SETTINGS)(*rows())
    torch.testing.assert_close(found, HeadDropout(policy, **SETTINGS, plain=True)(*rows()))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_bfloat16_rounding_is_not_taken_for_uncertainty():
    model = tiny("llama").bfloat16()
    found = HeadDropout(PolicyModule(model, chunk_tokens=2), **SETTINGS)(*rows())
    exact = HeadDropout(PolicyModule(model.float(), chunk_tokens=2), **SETTINGS)(*rows())
    torch.testing.assert_close(found[:, 1], exact[:, 1], rtol=0.03, atol=0)


def test_masks_drop_the_share_that_was_asked_for_and_token_moments_are_a_hand_sum():
    assert abs(feature_masks(200, 200, 0.3, seed=1).float().mean() - 0.7) < 0.01
    moments_N3 = token_moments(torch.tensor([[-1.0, -5.0], [-2.0, -5.0], [-6.0, -5.0]]))
    torch.testing.assert_close(moments_N3, torch.tensor([[-3.0, 7**0.5, 7.0], [-5.0, 0.0, 0.0]]).double())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rate": 1.0, "masks": 4}, "rate=1.0 must be in"), ({"rate": 0.1, "masks": 1}, "masks=1 must be at least 2")],
)
def test_settings_that_make_no_sense_are_refused(scorer, prompts, groups, settings, message):
    with pytest.raises(ConfigError, match=message):
        scorer.dropout_logprobs(prompts, groups, seed=0, **settings)
