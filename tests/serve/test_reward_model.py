"""Reward models in this process: padding, truncation, caching. The tiny models come from `conftest.py`."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from rayalign.errors import ConfigError, DataError, OracleError
from rayalign.serve.classifier import placement
from rayalign.serve.config import OracleConfig
from rayalign.serve.deployment import build_app
from rayalign.serve.oracles import oracle_factory
from rayalign.serve.reward_model import RewardModelOracle
from rayalign.types import Candidate, Duel, Prompt


def prompt(text, **meta):
    return Prompt(id=text[:8], text=text, token_ids=(), meta=meta)


def duel(name, text, first, second):
    def response(t):
        return Candidate(text=t, token_ids=(), logprobs=(), policy_version=0)

    return Duel(id=name, batch=0, prompt=prompt(text), first=response(first), second=response(second))


def oracle(target, **settings):
    return RewardModelOracle(OracleConfig(kind="reward_model", target=target, **settings))


PAIRS = [
    (prompt("w1 w2 w3"), "w4"),
    (prompt("w1 w2 w3"), "w5 w6 w7 w8 w9 w10 w11"),
    (prompt("w9"), "w9 w9"),
    (prompt("w1 w2 w3 w4 w5 w6 w7 w8"), "w12 w13"),
]


@pytest.fixture(scope="module", params=["pad", "pad is eos", "no pad", "bert"])
def model_dir(request, tmp_path_factory, save_llama, save_bert):
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "bert":
        return save_bert(folder)
    return save_llama(folder, pad={"pad": "<pad>", "pad is eos": "<eos>", "no pad": None}[request.param])


def test_score_of_a_response_alone_equals_its_score_in_a_padded_batch(model_dir):
    alone = [oracle(model_dir, cache_size=0).scores([pair])[0] for pair in PAIRS]
    together = oracle(model_dir).scores(PAIRS)
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == len(PAIRS)


def test_score_is_what_the_bare_model_says_of_the_sequence_alone(model_dir):
    mine = oracle(model_dir)
    bare = AutoModelForSequenceClassification.from_pretrained(model_dir)
    with torch.inference_mode():
        for pair, row in zip(PAIRS, mine.encoder.encode(PAIRS), strict=True):
            inputs = {name: torch.tensor([ids]) for name, ids in row.items()}
            assert mine.scores([pair])[0] == pytest.approx(bare(**inputs).logits.item(), abs=1e-5)


def test_model_without_a_padding_id_scores_the_last_token_of_each_row(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path, pad=None))
    rows = mine.encoder.encode(PAIRS)
    with torch.inference_mode():
        for row, score in zip(rows, mine.scores(PAIRS), strict=True):
            hidden = mine.model.model(torch.tensor([row["input_ids"]])).last_hidden_state
            assert row["input_ids"][-1] == 2  # the end-of-sequence that the template writes
            assert score == pytest.approx(mine.model.score(hidden[0, -1]).item(), abs=1e-5)


def test_probability_is_the_sigmoid_of_the_scaled_difference(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path), scale=2.0, price=0.25)
    first, second = mine.scores([(prompt("w1 w2"), "w3"), (prompt("w1 w2"), "w4 w5")])
    [verdict] = mine.judge([duel("d", "w1 w2", "w3", "w4 w5")])
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(-2.0 * (first - second))))
    assert (verdict.duel_id, verdict.price) == ("d", 0.25)
    [swapped] = mine.judge([duel("e", "w1 w2", "w4 w5", "w3")])
    assert swapped.probability == pytest.approx(1 - verdict.probability)


def test_messages_of_the_prompt_go_through_the_chat_template(tmp_path, save_llama):
    encoder = oracle(save_llama(tmp_path)).encoder
    turns = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    [row] = encoder.encode([(prompt("not read", messages=turns), "w4 w5")])
    said = "<bos> <user> w1 <assistant> w2 <eos> <user> w3 <assistant> w4 w5 <eos>"
    assert encoder.tokenizer.convert_ids_to_tokens(row["input_ids"]) == said.split()
    [row] = encoder.encode([(prompt("w1 w2"), "w3")])
    assert encoder.tokenizer.decode(row["input_ids"]).split() == "<bos> <user> w1 w2 <assistant> w3 <eos>".split()


def test_long_prompt_is_cut_from_its_left_and_the_response_is_whole(tmp_path, save_llama, words):
    mine = oracle(save_llama(tmp_path), max_tokens=8)
    encoder = mine.encoder
    [row] = encoder.encode([(prompt(" ".join(words)), "w3 w4 w5")])
    assert (
        encoder.tokenizer.convert_ids_to_tokens(row["input_ids"]) == "<bos> w38 w39 <assistant> w3 w4 w5 <eos>".split()
    )
    assert mine.truncated == 1
    encoder.encode([(prompt("w1"), "w2")])
    assert mine.truncated == 1


def test_long_prompt_of_a_pair_encoder_is_cut_from_its_left(tmp_path, save_bert, words):
    encoder = oracle(save_bert(tmp_path), max_tokens=7).encoder
    [row] = encoder.encode([(prompt(" ".join(words)), "w3 w4")])
    assert encoder.tokenizer.convert_ids_to_tokens(row["input_ids"]) == "[CLS] w38 w39 [SEP] w3 w4 [SEP]".split()
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("save", ["save_llama", "save_bert"])
def test_response_that_leaves_no_room_for_the_prompt_is_a_failed_verdict(tmp_path, save, words, request):
    mine = oracle(request.getfixturevalue(save)(tmp_path), max_tokens=10)
    long = " ".join(words[:10])
    good, bad = mine.judge([duel("good", "w1", "w2", "w3"), duel("bad", "w1", "w2", long)])
    assert good.failure is None
    assert bad.probability is None
    assert "second response leaves no room" in bad.failure


def test_limit_of_the_model_holds_whatever_max_tokens_says(tmp_path, save_llama):
    assert oracle(save_llama(tmp_path)).encoder.max_tokens == 64
    assert oracle(save_llama(tmp_path), max_tokens=1000).encoder.max_tokens == 64


def test_no_response_is_scored_twice(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path))
    seen = []
    mine.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    mine.judge([duel("a", "w1", "w2", "w3"), duel("b", "w1", "w2", "w4"), duel("c", "w1", "w3", "w4")])
    assert sum(seen) == 3
    mine.judge([duel("d", "w1", "w4", "w5")])
    assert sum(seen) == 4


def test_a_response_that_another_replica_scored_is_not_scored_again(tmp_path, save_llama):
    path, seen = save_llama(tmp_path / "model"), []
    one, other, shorter = oracle(path), oracle(path), oracle(path, max_tokens=32)
    for mine in (one, other, shorter):
        mine.keep_in(tmp_path)
        mine.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
    asked = [duel("a", "w1", "w2", "w3"), duel("b", "w1", "w2", "w4")]
    assert one.judge(asked) == other.judge(asked) and sum(seen) == 3
    shorter.judge(asked)
    assert sum(seen) == 6, "which texts are cut is part of what a score is of"


def test_cache_forgets_the_least_recently_used(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path), cache_size=2)
    seen = []
    mine.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for response in ("w1", "w2", "w1", "w3", "w1", "w2"):  # w3 pushes w2 out, w1 stays
        mine.scores([(prompt("w9"), response)])
    assert sum(seen) == 4


def test_micro_batches_keep_the_token_budget_and_the_scores(tmp_path, save_llama):
    path = save_llama(tmp_path)
    small, sizes = oracle(path, micro_batch_tokens=24), []
    small.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert small.scores(PAIRS) == pytest.approx(oracle(path).scores(PAIRS), abs=1e-5)
    assert len(sizes) > 1
    assert max(sizes) <= 24


def test_bfloat16_agrees_with_float32_to_its_precision(tmp_path, save_llama):
    path = save_llama(tmp_path)
    exact, rounded = oracle(path).scores(PAIRS), oracle(path, dtype="bfloat16").scores(PAIRS)
    assert rounded == pytest.approx(exact, abs=0.1, rel=0.05)


@pytest.mark.parametrize(("bits", "layer"), [("int8", "Linear8bitLt"), ("int4", "Linear4bit")])
def test_fewer_bits_shrink_the_linear_layers_and_hardly_change_the_scores(tmp_path, save_llama, bits, layer):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'rayalign[quantized]'")
    path = save_llama(tmp_path, hidden_size=128, intermediate_size=256, initializer_range=0.1)
    exact, small = oracle(path), oracle(path, quantization=bits)
    assert type(small.model.model.layers[0].mlp.up_proj).__name__ == layer
    assert type(small.model.score).__name__ == "Linear", "the head stays as it is"
    assert small.model.get_memory_footprint() < exact.model.get_memory_footprint() / 2
    spread = max(exact.scores(PAIRS)) - min(exact.scores(PAIRS))
    assert small.scores(PAIRS) == pytest.approx(exact.scores(PAIRS), abs=0.25 * spread)
    assert small.scores(PAIRS) != exact.scores(PAIRS)
    assert small.id == f"{exact.id}:{bits}"


@pytest.mark.parametrize(
    ("given", "device", "placed"),
    [
        ({"gpus_per_replica": 2.0}, "cuda", {"device_map": "auto"}),
        ({"gpus_per_replica": 1.0}, "cuda", {}),
        ({"gpus_per_replica": 2.0, "device": "cuda"}, "cuda", {}),
        ({"gpus_per_replica": 2.0}, "cpu", {}),
    ],
)
def test_a_replica_that_has_several_gpus_spreads_the_models_layers_over_them(given, device, placed):
    config = OracleConfig(kind="reward_model", target="m", **given)
    assert placement(config, torch.device(device)) == placed
    actor = build_app(config, oracle_factory(config))._bound_deployment.ray_actor_options
    assert actor["num_gpus"] == given["gpus_per_replica"], "Serve gives each replica that many"


def test_fewer_bits_without_their_library_say_what_to_install(tmp_path, save_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"oracle\.quantization='int8' needs bitsandbytes: pip install"):
        oracle(save_llama(tmp_path), quantization="int8")


def test_score_that_is_not_a_number_names_the_duel(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path))
    with torch.no_grad():
        mine.model.score.weight.fill_(math.nan)
    with pytest.raises(OracleError, match=r"scored duel d7 \(prompt w1\) with nan"):
        mine.judge([duel("d7", "w1", "w2", "w3")])


def test_id_names_the_model_and_its_weights(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path / "judge"))
    assert mine.id.startswith("reward_model:judge@")
    assert mine.id == oracle(str(tmp_path / "judge")).id


def test_another_training_of_the_same_head_is_another_model(tmp_path, save_llama):
    path = save_llama(tmp_path / "judge")
    before = oracle(path).id
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    model.save_pretrained(path)
    after = oracle(path).id
    assert after != before and after.startswith("reward_model:judge@")


def test_model_with_two_labels_is_refused(tmp_path, save_llama):
    with pytest.raises(DataError, match="has 2 labels; a scalar reward model has 1"):
        oracle(save_llama(tmp_path, num_labels=2))


def test_language_model_without_a_reward_head_is_refused(tmp_path, save_llama):
    with pytest.raises(DataError, match=r"not a trained scalar reward model: its weights lack score\.weight"):
        oracle(save_llama(tmp_path, kind=LlamaForCausalLM))


@pytest.mark.parametrize("kind", ["reward_model", "pairwise"])
def test_remote_code_of_a_model_is_run_only_if_the_user_says_so(tmp_path, kind, monkeypatch):
    """A model directory with Python of its own, which leaves a file behind when it is run."""
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"own-{kind}", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = OracleConfig(kind=kind, target=str(tmp_path))
    with pytest.raises(DataError, match="can't be loaded"):
        oracle_factory(config)()
    assert not (tmp_path / "it ran").exists()
    with pytest.raises(Exception):  # what it has is no model
        oracle_factory(dataclasses.replace(config, trust_remote_code=True))()
    assert (tmp_path / "it ran").exists(), "or this test would prove nothing"


def test_missing_model_is_one_line_that_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"oracle\.target='.*nowhere' can't be loaded") as error:
        oracle(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the replica sees no GPU"):
        oracle(str(tmp_path), device="cuda")
