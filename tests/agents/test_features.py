import shutil

import pytest
import torch

from rayalign.agents.posteriors.features import FeatureConfig, Features, pool
from rayalign.errors import ConfigError, DataError


def responses_to(box, prompts, lengths=(3, 9, 17, 1, 30)):
    """Every prompt with a response of each length."""
    pairs = [(p, box.response(*range(i, i + n))) for p in prompts for i, n in enumerate(lengths)]
    return [p for p, _ in pairs], [r for _, r in pairs]


def plain_features(path, prompts, responses, how):
    """One at a time, whole sequences, no padding and no cache: what the fast way has to equal."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path).eval()
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([[*prompt.token_ids, *response.token_ids]])).last_hidden_state[0]
        own = hidden[len(prompt.token_ids) :]
        rows.append({"sum": own.sum(0), "mean": own.mean(0), "last": own[-1]}[how])
    return torch.stack(rows)


@pytest.mark.parametrize("how", ["sum", "mean", "last"])
def test_pooling_does_not_care_on_which_side_the_padding_is(how):
    torch.manual_seed(0)
    hidden = torch.randn(1, 3, 5)
    noise = torch.full((1, 4, 5), float("nan"))
    right = pool(torch.cat([hidden, noise], 1), torch.tensor([[True] * 3 + [False] * 4]), how)
    left = pool(torch.cat([noise, hidden], 1), torch.tensor([[False] * 4 + [True] * 3]), how)
    want = {"sum": hidden.sum(1), "mean": hidden.mean(1), "last": hidden[:, -1]}[how]
    assert torch.allclose(right, want) and torch.allclose(left, want)


@pytest.mark.parametrize("how", ["sum", "mean", "last"])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_batched_features_equal_one_forward_a_response(policy, box, how, shares_prompts):
    prompts, responses = responses_to(box, [box.prompt(0, 3), box.prompt(1, 19), box.prompt(2, 5)])
    features = Features(FeatureConfig(pooling=how, max_batch_tokens=100), policy)
    assert features._backbone.shares_prompts
    features._backbone.shares_prompts = shares_prompts
    got = features(prompts, responses)
    assert got.shape == (15, 32) and got.dtype == torch.float32
    assert torch.allclose(got, plain_features(policy, prompts, responses, how), atol=2e-5)


def test_the_first_layers_alone_give_what_the_whole_model_holds_there(policy, box):
    from transformers import AutoModel

    prompts, responses = responses_to(box, [box.prompt(0, 3), box.prompt(1, 19)])
    got = Features(FeatureConfig(layers=1, pooling="mean"), policy)(prompts, responses)
    model = AutoModel.from_pretrained(policy).eval()
    for row, prompt, response in zip(got, prompts, responses, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt.token_ids, *response.token_ids]])
            inside = model(input_ids=ids, output_hidden_states=True).hidden_states
            own = model.norm(inside[1])[0, len(prompt.token_ids) :]
        assert torch.allclose(row, own.mean(0), atol=2e-5)
    assert not torch.allclose(got, Features(FeatureConfig(pooling="mean"), policy)(prompts, responses), atol=1e-2)


def test_more_layers_than_the_backbone_has_is_an_error_that_says_how_many_there_are(policy):
    with pytest.raises(ConfigError, match=r"agent.features.layers=9, but the backbone 'policy' has \d"):
        Features(FeatureConfig(layers=9), policy)


def test_features_of_a_response_are_the_same_bits_whatever_it_is_computed_with(policy, box):
    prompts, responses = responses_to(box, [box.prompt(i, 3 + 5 * i) for i in range(4)])
    together = Features(FeatureConfig(), policy)(prompts, responses)
    alone = torch.cat([Features(FeatureConfig(), policy)([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    small = Features(FeatureConfig(max_batch_tokens=64), policy)(prompts[::-1], responses[::-1]).flip(0)
    assert torch.equal(together, alone) and torch.equal(together, small)


def test_no_response_is_computed_twice_and_the_prompt_tells_responses_apart(policy, box):
    features = Features(FeatureConfig(), policy)
    p, q, r, s = box.prompt(0), box.prompt(1), box.response(1, 2), box.response(3)
    first = features([p, p, p, q], [r, s, r, r])
    assert features.computed == 3
    again = features([q, p, p], [r, r, s])
    assert features.computed == 3
    assert torch.equal(again, first[[3, 0, 1]]) and not torch.equal(first[0], first[3])


def test_prompt_is_read_once_for_all_its_responses(policy, box):
    features = Features(FeatureConfig(), policy)
    tokens = []
    features._backbone.model.register_forward_pre_hook(
        lambda model, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    features([box.prompt(0, 40)] * 20, [box.response(i, i + 1) for i in range(20)])
    assert tokens == [(1, 40), (20, 8)]


def test_forwards_are_length_sorted_and_within_the_token_budget(policy, box):
    features = Features(FeatureConfig(max_batch_tokens=256), policy)
    shapes = []
    features._backbone.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    features([box.prompt(0)] * 20, [box.response(*range(i, i + (2 if i % 2 else 30))) for i in range(20)])
    assert shapes == [(1, 8), (6, 32), (4, 32), (10, 8)]


def test_cache_is_bounded_and_forgets_the_oldest(policy, box):
    features = Features(FeatureConfig(cache_responses=2), policy)
    prompt, (a, b, c) = box.prompt(0), [box.response(i) for i in range(3)]
    features([prompt] * 3, [a, b, c])
    features([prompt] * 2, [b, c])
    assert features.computed == 3
    features([prompt], [a])
    assert features.computed == 4


def test_a_larger_request_than_the_cache_is_still_answered_whole(policy, box):
    prompt, responses = box.prompt(0), [box.response(i) for i in range(5)]
    none = Features(FeatureConfig(cache_responses=0), policy)([prompt] * 5, responses)
    assert torch.equal(none, Features(FeatureConfig(), policy)([prompt] * 5, responses))


def test_backbone_is_frozen_and_in_eval_mode(policy):
    model = Features(FeatureConfig(), policy)._backbone.model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_decoder_with_the_policys_words_reads_the_sampled_tokens(policy, same_words_decoder, box):
    prompts, responses = responses_to(box, [box.prompt(0)])
    features = Features(FeatureConfig(backbone=str(same_words_decoder)), policy)
    assert torch.allclose(
        features(prompts, responses), plain_features(same_words_decoder, prompts, responses, "sum"), atol=2e-5
    )


def test_decoder_with_other_words_reads_the_text_again(policy, other_words_decoder, box):
    from transformers import AutoTokenizer

    prompt, response = box.prompt(0), box.response(3, 5)
    features = Features(FeatureConfig(backbone=str(other_words_decoder)), policy)([prompt], [response])
    tokenizer = AutoTokenizer.from_pretrained(other_words_decoder)
    retold = type(prompt)(id="p", text="", token_ids=tuple(tokenizer(prompt.text)["input_ids"]))
    reread = type(response)(
        text="", token_ids=(*tokenizer(response.text)["input_ids"], 1), logprobs=(), policy_version=0
    )
    assert retold.token_ids != prompt.token_ids
    assert torch.allclose(features, plain_features(other_words_decoder, [retold], [reread], "sum"), atol=2e-5)


@pytest.mark.parametrize("how", ["sum", "mean", "last", "cls"])
def test_encoder_reads_prompt_and_response_as_a_pair_and_pools_the_response(policy, encoder, box, how):
    from transformers import AutoModel, AutoTokenizer

    prompts, responses = responses_to(box, [box.prompt(0), box.prompt(1, 6)], lengths=(2, 5, 12))
    got = Features(FeatureConfig(backbone=str(encoder), pooling=how), policy)(prompts, responses)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for row, prompt, response in zip(got, prompts, responses, strict=True):
        pair = tokenizer(prompt.text, response.text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**pair).last_hidden_state[0]
        start = 2 + len(prompt.text.split())  # [CLS] prompt [SEP] response [SEP]
        own = hidden[start : start + len(response.text.split())]
        want = {"sum": own.sum(0), "mean": own.mean(0), "last": own[-1], "cls": hidden[0]}[how]
        assert torch.allclose(row, want, atol=2e-5)


def test_encoder_truncates_what_exceeds_its_positions(policy, encoder, box):
    features = Features(FeatureConfig(backbone=str(encoder)), policy)
    got = features([box.prompt(0, 40)], [box.response(*range(60))])
    assert torch.isfinite(got).all()


def test_empty_response_has_zero_features(policy, box):
    empty = type(box.response(1))(text="", token_ids=(), logprobs=(), policy_version=-1)
    assert Features(FeatureConfig(), policy)([box.prompt(0)], [empty]).abs().max() == 0


def test_response_without_token_ids_is_an_error_not_an_empty_response(policy, box):
    given = type(box.response(1))(text="w1 w2", token_ids=(), logprobs=(), policy_version=-1, source="data")
    with pytest.raises(DataError, match=r"'w1 w2' \(source 'data'\) has no token ids"):
        Features(FeatureConfig(), policy)([box.prompt(0)], [given])


def test_missing_backbone_names_the_setting(policy, tmp_path):
    with pytest.raises(DataError, match=r"agent.features.backbone='.*nowhere'.*can't be loaded"):
        Features(FeatureConfig(backbone=str(tmp_path / "nowhere")), policy)


def test_settings_are_checked(policy):
    with pytest.raises(ConfigError, match=r"agent.features.pooling='men' is unknown. Did you mean 'mean'"):
        FeatureConfig(pooling="men")
    with pytest.raises(ConfigError, match="'cls' needs an encoder"):
        Features(FeatureConfig(pooling="cls"), policy)
    with pytest.raises(ConfigError, match="dtype='float16'"):
        FeatureConfig(dtype="float16")


def test_a_backbone_whose_weights_have_other_names_is_refused_rather_than_drawn_at_random(policy, encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder, tmp_path / "wrapped")
    file = tmp_path / "wrapped" / "model.safetensors"
    save_file({f"ranker.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"has no trained weights for .*they would be random numbers"):
        Features(FeatureConfig(backbone=str(tmp_path / "wrapped")), policy)
