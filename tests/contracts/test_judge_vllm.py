"""A judge that is a real language model: SmolLM2 behind vLLM's own OpenAI-compatible server, asked over HTTP."""

import json

import pytest
import torch
from vllm_server import vllm_server
from whole_runs import contents

from rayalign.errors import DataError, OracleError
from rayalign.ledger.ledger import Ledger
from rayalign.models import prepare_smollm2
from rayalign.serve import OracleConfig
from rayalign.serve.judge import JudgeOracle
from rayalign.serve.judge_config import JudgeConfig
from rayalign.serve.judge_prompts import question
from rayalign.serve.judge_stats import judge_stats
from rayalign.types import Candidate, Duel, Prompt

pytest.importorskip("vllm", reason="vLLM is not installed: there is no server to ask")
pytestmark = pytest.mark.timeout(600)

KEY = "sk-of-our-own-server-0123456789"
DIGITS = {"structured_outputs": {"choice": ["0", "1"]}}
"""A model of this size would rather talk: vLLM lets it say nothing but the two digits."""


@pytest.fixture(scope="module")
def model():
    try:
        return prepare_smollm2()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """Started before Ray, so that the key is in the environment that Ray gives its workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", KEY)
        with vllm_server(model, KEY, tmp_path_factory.mktemp("vllm") / "log") as url:
            yield url


@pytest.fixture(scope="module")
def cluster(server, cluster_without_serve):
    """One that knows the key."""


def judge_of(url, **settings):
    return JudgeOracle(OracleConfig(kind="judge", target="judge", judge=judge_config(url, **settings)))


def judge_config(url, **settings):
    return JudgeConfig(**{"base_url": url, "api_key_env": "A_KEY", "request": DIGITS, "concurrency": 4, **settings})


def duel(prompt, first, second):
    first, second = (Candidate(text=t, token_ids=(), logprobs=(), policy_version=0) for t in (first, second))
    return Duel(
        id=prompt[:12], batch=0, prompt=Prompt(id=prompt, text=prompt, token_ids=()), first=first, second=second
    )


DUELS = [
    duel("What is the capital of France?", "Paris.", "I like cats, and dogs even more."),
    duel("Name a colour.", "Seven is my lucky number.", "Blue."),
]


def test_probability_is_the_models_own_after_both_orders_of_the_question(server, model):
    """Against transformers' forward pass of the same model over the same chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    zero, one = (tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "01")

    def shown_first_wins(duel, first, second):
        message = {"role": "user", "content": question("chat", "logprobs", duel.prompt, first.text, second.text)}
        inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")
        with torch.inference_mode():
            logits = bare(**inputs).logits[0, -1].float()
        return torch.sigmoid(logits[zero] - logits[one]).item()

    judge = judge_of(server)
    for duel, verdict in zip(DUELS, judge.judge(DUELS), strict=True):
        shown = shown_first_wins(duel, duel.first, duel.second)
        swapped = shown_first_wins(duel, duel.second, duel.first)
        assert abs(shown - (1 - swapped)) > 0.1, "so small a model leans towards a place, which is why both are asked"
        assert verdict.probability == pytest.approx((shown + 1 - swapped) / 2, abs=0.02)  # two kernels in bfloat16
    assert len(judge.book.answers) == 4


def test_a_model_that_would_rather_talk_gives_no_label(server):
    [verdict] = judge_of(server, request={}, retries=1, backoff_s=0.01).judge(DUELS[:1])
    assert verdict.probability is None and "unreadable verdict 'The' (2 attempts)" in verdict.failure


def test_the_wrong_key_is_an_error_that_does_not_repeat_it(server, monkeypatch):
    monkeypatch.setenv("ANOTHER_KEY", "sk-wrong-key-987654321")
    with pytest.raises(OracleError, match=r"the key in \$ANOTHER_KEY is not accepted") as caught:
        judge_of(server, api_key_env="ANOTHER_KEY")
    assert "987654321" not in str(caught.value)


def test_a_run_is_labelled_by_it_and_every_label_is_paid_once(server, small_run, tmp_path):
    config = judge_config(server, price=0.5, recheck=0.25)
    result = small_run(budget=12, **{"oracle.kind": "judge", "oracle.target": "judge", "oracle.judge": config})
    ledger = Ledger(tmp_path / "run" / "ledger.arrow", read_only=True)
    stats = judge_stats(tmp_path / "run" / "oracle")
    rows = [
        json.loads(line)
        for file in (tmp_path / "run" / "oracle").glob("answers-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    labels = result.labels_spent + result.labels_spent_on_evaluation
    assert result.labels_spent == ledger.spent == len(contents(tmp_path / "run")) == 12
    assert len(rows) == len({row["duel_id"] for row in rows}) == labels
    assert stats.wasted == stats.not_billed == 0
    assert stats.answers == stats.calls == 2 * labels + stats.rechecked
    assert stats.spent == 0.5 * stats.calls
    assert stats.rechecked > 0 and stats.self_agreement == 1.0, "a greedy judge says the same again"
