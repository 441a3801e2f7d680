"""Pairwise reward models in this process, against the bare model on token rows that are written by hand."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayalign.errors import ConfigError, DataError, OracleError
from rayalign.serve.config import OracleConfig
from rayalign.serve.oracles import oracle_factory
from rayalign.serve.pairwise import PairwiseOracle, Reading
from rayalign.serve.pairwise_config import PairwiseConfig
from rayalign.types import Candidate, Duel, Prompt

PROMPT, A, B, C = "w1 w2", "w3", "w4 w5", "w6 w7 w8"
ONE_TEXT = "w30 {prompt} w31 {first} w32 {second}"


def duel(name, first, second, prompt=PROMPT, **meta):
    first, second = (Candidate(text=t, token_ids=(), logprobs=(), policy_version=0) for t in (first, second))
    prompt = Prompt(id=prompt[:8], text=prompt, token_ids=(), meta=meta)
    return Duel(id=name, batch=0, prompt=prompt, first=first, second=second)


def oracle(target, *, scale=1.0, price=0.0, dtype="float32", max_tokens=0, micro_batch_tokens=0, **pairwise):
    config = OracleConfig(
        kind="pairwise",
        target=target,
        scale=scale,
        price=price,
        dtype=dtype,
        max_tokens=max_tokens,
        micro_batch_tokens=micro_batch_tokens,
        pairwise=PairwiseConfig(**pairwise),
    )
    return oracle_factory(config)()


def tokens(mine, reading):
    [row] = mine.encoder.encode([reading])
    return mine.classifier.tokenizer.convert_ids_to_tokens(row["input_ids"])


def forwards(mine):
    """Rows of each forward pass from now on."""
    seen = []
    mine.classifier.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return seen


@pytest.fixture(scope="module")
def bert(tmp_path_factory, save_bert):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def says(bert):
    """The bare model's logit of tokens that are written by hand; `|` is where the second text of the pair begins."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)

    def logit(row):
        one, two = ([*half.split()] for half in row.split("|"))
        ids = tokenizer.convert_tokens_to_ids([*one, *two])
        types = [0] * len(one) + [1] * len(two)
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.item()

    return logit


def test_probability_is_the_sigmoid_of_half_the_difference_of_both_orders(bert, says):
    shown = says("[CLS] w1 w2 [SEP] | w3 [SEP] w4 w5 [SEP]")
    swapped = says("[CLS] w1 w2 [SEP] | w4 w5 [SEP] w3 [SEP]")
    assert abs(shown + swapped) > 0.05, "the bare model is not fair, or this test would prove nothing"
    mine = oracle(bert, scale=2.0, price=0.25)
    verdict, other_way = mine.judge([duel("d", A, B), duel("e", B, A)])
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(-2.0 * (shown - swapped) / 2)), abs=1e-5)
    assert other_way.probability == pytest.approx(1 - verdict.probability)
    assert (verdict.duel_id, verdict.price) == ("d", 0.25)
    assert mine.judge([duel("f", A, A)])[0].probability == 0.5


def test_given_order_reads_a_duel_once_as_it_is(bert, says):
    mine = oracle(bert, order="given")
    seen = forwards(mine)
    [verdict] = mine.judge([duel("d", A, B)])
    shown = says("[CLS] w1 w2 [SEP] | w3 [SEP] w4 w5 [SEP]")
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(-shown)), abs=1e-5)
    assert [rows for rows, _ in seen] == [1]


@pytest.mark.parametrize("first_label", [0, 1])
def test_of_two_labels_the_difference_of_the_logits_counts(tmp_path, save_bert, first_label):
    target = save_bert(tmp_path, num_labels=2)
    mine = oracle(target, order="given", first_label=first_label)
    row = mine.encoder.encode([Reading(PROMPT, A, B)])[0]
    bare = AutoModelForSequenceClassification.from_pretrained(target)
    with torch.inference_mode():
        p = bare(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits.softmax(-1)[0, first_label].item()
    assert mine.judge([duel("d", A, B)])[0].probability == pytest.approx(p, abs=1e-5)


def test_ranking_is_by_the_sum_of_margins_over_all_opponents(bert, says):
    def margin(first, second):
        row = "[CLS] w1 w2 [SEP] | {} [SEP] {} [SEP]"
        return (says(row.format(first, second)) - says(row.format(second, first))) / 2

    ab, ac, bc = margin(A, B), margin(A, C), margin(B, C)
    mine = oracle(bert)
    scores = mine.rank(Prompt(id="p", text=PROMPT, token_ids=()), [A, B, C])
    assert scores == pytest.approx([ab + ac, bc - ab, -ac - bc], abs=1e-5)
    assert sum(scores) == pytest.approx(0)
    [two, other] = mine.rank(Prompt(id="p", text=PROMPT, token_ids=()), [A, B])
    assert two == -other == pytest.approx(ab, abs=1e-5)


@pytest.mark.parametrize("template", ["{prompt}{sep}{first}{sep}{second}", ONE_TEXT])
def test_margin_of_a_duel_alone_equals_its_margin_in_a_padded_batch(bert, template):
    readings = [Reading(PROMPT, A, B), Reading("w9", C, "w1 w2 w3 w4 w5 w6 w7"), Reading("w1 w2 w3 w4", "w5", "w6")]
    alone = [oracle(bert, template=template).margins([reading])[0] for reading in readings]
    small = oracle(bert, template=template, micro_batch_tokens=32)
    seen = forwards(small)
    assert small.margins(readings) == pytest.approx(alone, abs=1e-5)
    assert len(seen) > 1 and max(rows * length for rows, length in seen) <= 32
    assert oracle(bert, template=template).margins(readings) == pytest.approx(alone, abs=1e-5)


def test_decoder_reads_one_text_that_a_template_makes(tmp_path, save_llama):
    target = save_llama(tmp_path)
    mine = oracle(target, template=ONE_TEXT, order="given")
    assert tokens(mine, Reading(PROMPT, A, B)) == "w30 w1 w2 w31 w3 w32 w4 w5".split()
    bare = AutoModelForSequenceClassification.from_pretrained(target)
    ids = mine.classifier.tokenizer.convert_tokens_to_ids("w30 w1 w2 w31 w3 w32 w4 w5".split())
    with torch.inference_mode():
        assert mine.margins([Reading(PROMPT, A, B)])[0] == pytest.approx(
            bare(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5
        )


def test_what_responses_say_of_places_stays_what_it_is(tmp_path, save_llama):
    mine = oracle(save_llama(tmp_path), template="{prompt} / {first} / {second}")
    assert mine.encoder._fill(mine.encoder._parts[0], Reading("{first}", "{second}", "{prompt}\\1")) == (
        "{first} / {second} / {prompt}\\1"
    )


def test_several_turns_are_shown_with_who_said_what(bert):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    mine = oracle(bert)
    mine.judge([duel("d", A, B, messages=turns)])
    with_turns = mine.margins([Reading("user: w1\n\nassistant: w2", A, B)])
    assert mine.judge([duel("e", A, B, messages=turns)])[0].probability == pytest.approx(
        1 / (1 + math.exp(-with_turns[0]))
    )


def test_no_pair_of_texts_is_read_twice(bert):
    mine = oracle(bert)
    seen = forwards(mine)
    mine.judge([duel("a", A, B), duel("b", B, A), duel("c", A, B), duel("d", A, C)])
    assert sum(rows for rows, _ in seen) == 4, "two orders of two comparisons, whatever their ids"
    mine.rank(Prompt(id="p", text=PROMPT, token_ids=()), [A, B, C])
    assert sum(rows for rows, _ in seen) == 6, "B against C is new"


def test_the_prompt_gives_way_first_and_the_responses_are_cut_alike(bert, words):
    mine = oracle(bert, max_tokens=20)  # 16 tokens of text, of which the prompt keeps at least 4
    long = " ".join(words)
    row = tokens(mine, Reading(long, "w1 w2", "w3"))
    assert " ".join(row) == "[CLS] " + " ".join(words[-13:]) + " [SEP] w1 w2 [SEP] w3 [SEP]"
    row = tokens(mine, Reading(long, " ".join(words[:30]), " ".join(words[5:35])))
    assert " ".join(row) == "[CLS] w36 w37 w38 w39 [SEP] w0 w1 w2 w3 w4 w5 [SEP] w5 w6 w7 w8 w9 w10 [SEP]"
    row = tokens(mine, Reading(long, " ".join(words[:30]), "w7"))
    assert " ".join(row) == "[CLS] w36 w37 w38 w39 [SEP] " + " ".join(words[:11]) + " [SEP] w7 [SEP]"
    assert mine.truncated == 3
    assert tokens(mine, Reading("w1", "w2", "w3")) == "[CLS] w1 [SEP] w2 [SEP] w3 [SEP]".split()
    assert mine.truncated == 3


def test_no_room_for_two_responses_is_a_failed_verdict(bert, words):
    mine = oracle(bert, max_tokens=5)
    [verdict] = mine.judge([duel("d", "w1 w2", "w3 w4")])
    assert verdict.probability is None
    assert verdict.failure == "the 5 tokens of the pairwise model have no room for two responses"


def test_bfloat16_agrees_with_float32_to_its_precision(bert):
    readings = [Reading(PROMPT, A, B), Reading("w9", C, A)]
    exact, rounded = oracle(bert).margins(readings), oracle(bert, dtype="bfloat16").margins(readings)
    assert rounded == pytest.approx(exact, abs=0.1, rel=0.05)


def test_logit_that_is_no_number_names_the_duel(tmp_path, save_bert):
    mine = oracle(save_bert(tmp_path))
    with torch.no_grad():
        mine.classifier.model.classifier.weight.fill_(math.nan)
    with pytest.raises(OracleError, match=r"judged duel d7 \(prompt w1 w2\) with a logit of nan"):
        mine.judge([duel("d7", A, B)])


def test_id_names_the_model_and_changes_with_what_it_is_shown(bert):
    one = oracle(bert)
    assert isinstance(one, PairwiseOracle) and one.id.startswith(f"pairwise:{Path(bert).name}@")
    assert one.id == oracle(bert).id != oracle(bert, order="given").id


def test_model_with_three_labels_is_refused(tmp_path, save_bert):
    with pytest.raises(DataError, match="has 3 labels; a pairwise reward model has 1 or 2"):
        oracle(save_bert(tmp_path, num_labels=3))


def test_a_head_that_transformers_does_not_have_is_refused_by_name(tmp_path, save_bert):
    """As PairRM is: its checkpoint has a head of its own."""
    from transformers import BertConfig, BertModel

    class BertPairRM(BertModel):
        pass

    target = save_bert(tmp_path)
    config = BertConfig.from_pretrained(target)
    BertPairRM(config).save_pretrained(target)
    with pytest.raises(DataError, match=r"not a trained pairwise .* lack classifier.*saved as BertPairRM, which trans"):
        oracle(target)


def test_default_template_needs_a_tokenizer_with_a_separator(tmp_path, save_llama):
    with pytest.raises(ConfigError, match=r"oracle\.pairwise\.template=.*needs a separator token"):
        oracle(save_llama(tmp_path))


@pytest.mark.parametrize(
    "settings", [{"template": "{prompt} {first}"}, {"order": "random"}, {"first_label": 2}], ids=lambda s: next(iter(s))
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=rf"oracle\.pairwise\.{next(iter(settings))}="):
        PairwiseConfig(**settings)
