"""A judge whose model is in the oracle's own process: tiny random weights, and what they say computed by hand."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rayalign.errors import ConfigError, DataError
from rayalign.serve import OracleConfig
from rayalign.serve.judge import JudgeOracle
from rayalign.serve.judge_config import DIGITS_ALONE, JudgeConfig
from rayalign.types import Candidate, Duel, Prompt

VOCABULARY = ["<eos>", "<unk>", "<user>", "<assistant>", "0", "1", "A", "B", "C", "X", *(f"w{i}" for i in range(20))]
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant>"
ASKED = "{prompt} {first} {second}"


def save(folder, says):
    """A language model that can say only the words `says`; which of them is up to its random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=64, eos_token_id=0, initializer_range=0.5, **sizes
    )
    model = LlamaForCausalLM(config)
    model.generation_config.suppress_tokens = [i for i, word in enumerate(VOCABULARY) if word not in says]
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save(tmp_path_factory.mktemp("digits"), ("0", "1"))


def judge_of(target, **settings):
    given = {"base_url": "local", "template": ASKED, "retries": 0, **settings}
    return JudgeOracle(OracleConfig(kind="judge", target=target, judge=JudgeConfig(**given)))


def response(*words):
    return Candidate(text=" ".join(f"w{word % 20}" for word in words), token_ids=(), logprobs=(), policy_version=0)


def duel(i, words=2):
    first, second = (response(*(i + k * (j + 1) for j in range(words))) for k in (1, 3))
    return Duel(id=f"d{i}", batch=0, prompt=Prompt(id="p", text=f"w{i % 20}", token_ids=()), first=first, second=second)


def by_hand(model, tokenizer, message):
    """p(0) / (p(0) + p(1)) of the first token after `message`, asked alone."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False)
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
    zero, one = logits[VOCABULARY.index("0")].exp(), logits[VOCABULARY.index("1")].exp()
    return (zero / (zero + one)).item()


def test_probability_is_the_models_own_in_both_orders_whatever_is_asked_beside_it(digits):
    duels = [duel(i, words=1 + i % 5) for i in range(8)]
    judge = judge_of(digits)
    verdicts = judge.judge(duels)
    bare = AutoModelForCausalLM.from_pretrained(digits), AutoTokenizer.from_pretrained(digits)
    for d, verdict in zip(duels, verdicts, strict=True):
        given = by_hand(*bare, f"{d.prompt.text} {d.first.text} {d.second.text}")
        swapped = by_hand(*bare, f"{d.prompt.text} {d.second.text} {d.first.text}")
        assert verdict.probability == pytest.approx((given + 1 - swapped) / 2, abs=1e-5)
    assert len({verdict.probability for verdict in verdicts}) == 8
    assert judge.judge(duels[:1]) == verdicts[:1] and judge.book.calls == 16, "nothing is computed twice"
    assert judge.id.startswith("judge:digits") and "@local:" in judge.id


def test_a_text_is_read_to_its_end_and_one_that_has_none_is_a_failure(tmp_path):
    talks = save(tmp_path / "talks", ("A", "B", "C", "<eos>"))
    judge = judge_of(talks, verdict="text", max_tokens=8)
    verdicts = judge.judge([duel(i) for i in range(6)])
    said = {verdict.probability for verdict in verdicts}
    assert said <= {0.0, 0.25, 0.5, 0.75, 1.0, None}
    endless = judge_of(save(tmp_path / "endless", ("A",)), verdict="text", max_tokens=4)
    (verdict,) = endless.judge([duel(0)])
    assert verdict.probability is None and "unreadable" in verdict.failure


def test_what_is_neither_digit_is_a_failure_and_never_a_label(tmp_path):
    chats = save(tmp_path / "chats", ("w1", "w2"))
    (verdict,) = judge_of(chats).judge([duel(0)])
    assert verdict.probability is None and "unreadable verdict" in verdict.failure and not verdict.price
    (verdict,) = judge_of(chats, request=DIGITS_ALONE, order="random").judge([duel(0)])
    bare, d = (AutoModelForCausalLM.from_pretrained(chats), AutoTokenizer.from_pretrained(chats)), duel(0)
    given = by_hand(*bare, f"{d.prompt.text} {d.first.text} {d.second.text}")
    swapped = by_hand(*bare, f"{d.prompt.text} {d.second.text} {d.first.text}")
    assert min(abs(verdict.probability - p) for p in (given, 1 - swapped)) < 1e-5, "where it may say nothing else"


def test_a_question_that_is_too_long_is_a_failure_of_its_own(digits):
    verdicts = judge_of(digits).judge([duel(0), duel(1, words=40)])
    assert verdicts[0].probability is not None
    assert "more than 64" in verdicts[1].failure


def test_a_model_that_is_none_and_settings_of_an_endpoint_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"oracle\.target='.*none' can't be loaded as a language model"):
        judge_of(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"oracle\.judge\.request has further fields for an endpoint"):
        JudgeConfig(base_url="local", request={"reasoning_effort": "low"})
