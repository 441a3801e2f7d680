"""Rows of published datasets, as prompts: what is read, what is left out, and what is wrong with a row."""

import pytest
from dataset_rows import ROWS

from rayalign.env.formats import FORMATS, find_format
from rayalign.env.prompt_data import Source
from rayalign.errors import ConfigError, DataError


def prompts(name, row):
    return Source(path="rows.jsonl", format=FORMATS[name]).prompts(row, "rows.jsonl line 1")


def one(name, **changes):
    (prompt,) = prompts(name, {**ROWS[name](0), **changes})
    return prompt


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_a_row_of_its_data_and_needs_the_columns_that_it_names(name):
    prompt = one(name)
    assert prompt.text.strip() and prompt.reference
    assert set(FORMATS[name].schema.names) <= set(ROWS[name](0))
    unlabelled = {"labels", "score_0", "score_1"}  # a row without them has prompt and perhaps pair all the same
    for column in set(FORMATS[name].schema.names) - FORMATS[name].optional - unlabelled:
        with pytest.raises(DataError, match=rf"^rows\.jsonl line 1: field '{column}' is None"):
            prompts(name, {**ROWS[name](0), column: None})


def test_hh_splits_two_dialogues_after_what_they_share():
    prompt = one("hh")
    assert prompt.text == "\n\nHuman: Hello 0\n\nAssistant: Hi\n\nHuman: And 0?\n\nAssistant:"
    assert (prompt.pair, prompt.reference, prompt.meta) == ((" Yes 0", " No 0"), " Yes 0", {"preferred": 0})
    assert prompts("hh", {**ROWS["hh"](0), "rejected": "\n\nHuman: Other\n\nAssistant: No"}) == []
    with pytest.raises(DataError, match="has no turn of the assistant"):
        one("hh", chosen="Hello")


def test_shp_knows_which_comment_won_and_leaves_out_close_scores():
    prompt = one("shp")
    assert prompt.text == "\n\nHuman: How long do I boil 0 eggs?\n\nAssistant:"
    assert prompt.pair == (" Six minutes 0", " An hour 0") and prompt.meta == {"preferred": 0}
    lost = one("shp", labels=0, score_A=10, score_B=20)
    assert lost.meta == {"preferred": 1} and lost.reference == " An hour 0"
    assert prompts("shp", {**ROWS["shp"](0), "score_A": 19, "score_B": 10}) == []


def test_jeopardy_pairs_are_right_over_none_over_wrong_each_about_as_often():
    pairs = [(p.pair, p.meta["preferred"]) for i in range(300) for p in prompts("jeopardy", ROWS["jeopardy"](i))]
    assert {preferred for _, preferred in pairs} == {0}
    kinds = [tuple(text.split(" ")[0] for text in pair) for pair, _ in pairs]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert set(counts) == {("Answer", ""), ("Answer", "Mistake"), ("", "Mistake")}
    assert min(counts.values()) > 70, "100 each if the hash were a die"
    assert one("jeopardy").text == "HISTORY, for $200: 'Clue number 0'"
    plain = one("jeopardy", wrong_answer=None, value=None)
    assert plain.pair is None and plain.text == "HISTORY: 'Clue number 0'" and plain.reference == "Answer 0"


def test_webgpt_takes_the_higher_score_and_equal_scores_for_no_pair():
    prompt = one("webgpt")
    assert prompt.text == "Why is the sky 0?" and prompt.meta == {"preferred": 1}
    assert prompt.reference == "Scattering 0 [1]."
    tie = one("webgpt", score_0=0.0, score_1=0.0)
    assert tie.pair is None and tie.reference is None
    assert one("webgpt", score_0=None).pair is None


def test_haikus_are_asked_for_by_their_keywords():
    assert one("haikus").text == 'Instruct: Write a haiku containing the words "pond 0".\n\nOutput: '


def test_an_unknown_format_is_refused_by_name():
    assert find_format("") is None
    with pytest.raises(ConfigError, match=r"env\.format='jeoprady' is unknown\. Did you mean 'jeopardy'"):
        find_format("jeoprady")
