"""Prompts into token ids."""

import pytest

from rayalign.errors import ConfigError, DataError
from rayalign.rollout.encode import PromptEncoder
from rayalign.types import Prompt

BOS, USER, ASSISTANT = 2, 5, 6


def prompt(text="w0 w1", **meta):
    return Prompt(id="a", text=text, token_ids=(), meta=meta)


@pytest.fixture(scope="module")
def chatty(make_policy):
    return make_policy(template=True)


def test_plain_text_without_a_template_is_tokenised_as_it_is(policy):
    assert PromptEncoder(policy).encode(prompt()).token_ids == (7, 8)


def test_the_tokenizers_own_beginning_of_sequence_is_kept_and_a_trailing_end_dropped(make_policy):
    path = make_policy(affix=True)
    assert PromptEncoder(path).encode(prompt()).token_ids == (BOS, 7, 8)


def test_messages_go_through_the_template_with_one_beginning_and_the_generation_prompt(chatty):
    messages = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    encoded = PromptEncoder(chatty).encode(prompt("shown to people", messages=messages))
    assert encoded.token_ids == (BOS, USER, 10, ASSISTANT, 11, USER, 12, ASSISTANT)
    assert encoded.text == "shown to people"


def test_plain_text_becomes_a_user_message_where_there_is_a_template_unless_chat_is_never(chatty):
    assert PromptEncoder(chatty).encode(prompt()).token_ids == (BOS, USER, 7, 8, ASSISTANT)
    assert PromptEncoder(chatty, chat="never").encode(prompt()).token_ids == (7, 8)


def test_a_missing_template_is_an_error_only_where_one_is_needed(policy):
    with pytest.raises(DataError, match=r"prompt 'a' has chat messages, but .* no chat template"):
        PromptEncoder(policy).encode(prompt(messages=[{"role": "user", "content": "w3"}]))
    with pytest.raises(DataError, match=r"chat='always', but .* no chat template"):
        PromptEncoder(policy, chat="always")
    with pytest.raises(ConfigError, match="chat='sometimes'"):
        PromptEncoder(policy, chat="sometimes")


def test_a_prompt_at_the_limit_fits_and_one_over_it_is_named_with_its_length(policy):
    encoder = PromptEncoder(policy, max_prompt_tokens=3)
    assert len(encoder.encode(prompt("w0 w1 w2")).token_ids) == 3
    with pytest.raises(DataError, match=r"prompt 'a' has 4 tokens, more than rollout.max_prompt_tokens=3"):
        encoder.encode(prompt("w0 w1 w2 w3"))
    with pytest.raises(DataError, match="prompt 'a' is empty"):
        encoder.encode(prompt(""))


def test_check_finds_a_prompt_that_leaves_no_room_for_the_response(policy):
    encoder = PromptEncoder(policy)
    encoder.check([prompt("w0 " * 236)], max_tokens=20)
    with pytest.raises(DataError, match=r"has 237 tokens; with rollout.max_tokens=20 it exceeds the 256 positions"):
        encoder.check([prompt(), prompt("w0 " * 237)], max_tokens=20)


def test_a_directory_without_tokenizer_or_that_is_none_says_so(tmp_path, policy):
    with pytest.raises(DataError, match="is not a directory"):
        PromptEncoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((policy / "config.json").read_text())
    with pytest.raises(DataError, match="has no tokenizer"):
        PromptEncoder(tmp_path)


def test_end_of_sequence_comes_from_the_generation_config_and_may_be_several(make_policy):
    assert PromptEncoder(make_policy(eos=[3, 9])).eos_ids == (1, 3, 9)  # 1 is the tokenizer's own
