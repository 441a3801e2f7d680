"""A judge that asks a real HTTP server, which behaves, and which does not."""

import json
import logging
import math
import time
from collections import Counter

import pytest
from chat_server import (
    CUT,
    DRIP,
    DRIP_HEADERS,
    GARBAGE,
    HANG,
    NOT_JSON,
    SLAM,
    TEMPLATE,
    WRONG_SHAPE,
    ChatServer,
    digit,
    say,
    shown,
    status,
    token,
)

from rayalign.errors import ConfigError, OracleError
from rayalign.serve import OracleConfig
from rayalign.serve.call_book import Answer, CallBook, Question
from rayalign.serve.endpoint import retry_after
from rayalign.serve.judge import JudgeOracle
from rayalign.serve.judge_config import JudgeConfig
from rayalign.serve.judge_prompts import question, read_logprobs, read_text
from rayalign.serve.judge_stats import judge_stats, stats_of
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Candidate, Duel, Prompt

KEY = "sk-rather-secret-0123456789"


def response(text):
    return Candidate(text=text, token_ids=(), logprobs=(), policy_version=0)


def duel(name, first="long answer", second="short", **prompt):
    prompt = Prompt(id="p", token_ids=(), **{"text": "q", **prompt})
    return Duel(id=name, batch=0, prompt=prompt, first=response(first), second=response(second))


def duels(n):
    return [duel(f"d{i}") for i in range(n)]


def judge_of(server, **settings):
    settings = {"template": TEMPLATE, "api_key_env": "", "backoff_s": 0.01, "timeout_s": 5.0, **settings}
    config = OracleConfig(kind="judge", target="m", judge=JudgeConfig(base_url=server.url, **settings))
    return oracle_factory(config)()


def longer(body, n):
    """Prefers the longer response with probability 0.9."""
    _, first, second = shown(body)
    return digit(0.9 if len(first) > len(second) else 0.1)


# ==== verdicts =================================================================================================
def test_probability_is_that_of_the_first_responses_digit_in_both_orders():
    with ChatServer(longer) as server:
        judge = judge_of(server)
        verdicts = judge.judge([duel("a"), duel("b", first="s", second="longer")])
    assert [v.duel_id for v in verdicts] == ["a", "b"]
    assert [v.probability for v in verdicts] == pytest.approx([0.9, 0.1])
    assert sorted(shown(body) for body in server.bodies) == sorted(
        [("q", "long answer", "short"), ("q", "short", "long answer"), ("q", "s", "longer"), ("q", "longer", "s")]
    )
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("m", 1, True, 20)
    assert stats_of(judge.book).position_bias == pytest.approx(0)
    assert judge.judge([]) == []


def test_a_judge_that_always_prefers_what_it_sees_first_is_a_tie_and_is_counted():
    with ChatServer(lambda body, n: digit(0.8)) as server:
        judge = judge_of(server)
        verdicts = judge.judge(duels(3))
    assert [v.probability for v in verdicts] == pytest.approx([0.5] * 3)
    stats = stats_of(judge.book)
    assert (stats.both_orders, stats.order_disagreement, stats.ties) == (3, 1.0, 0)
    assert stats.position_bias == pytest.approx(0.8 + 0.8 - 1)


def test_a_random_order_measures_position_bias_too_with_more_noise():
    with ChatServer(lambda body, n: digit(0.8)) as server:
        judge = judge_of(server, order="random")
        judge.judge(duels(60))
        stats = stats_of(judge.book)
    assert stats.both_orders == 0 and stats.order_disagreement is None
    assert (stats.position_bias, stats.position_bias_stderr) == pytest.approx((0.6, 0.0))
    with ChatServer(longer) as server:
        judge = judge_of(server, order="random")
        judge.judge(duels(60))
        stats = stats_of(judge.book)
    assert stats.position_bias_stderr == pytest.approx(0.8 / 60**0.5, rel=0.05)
    assert abs(stats.position_bias) < 3 * stats.position_bias_stderr


def test_a_random_order_asks_once_and_the_same_when_asked_again():
    with ChatServer(longer) as server:
        verdicts = judge_of(server, order="random").judge(duels(60))
        once, server.bodies[:] = sorted(shown(body) for body in server.bodies), []
        judge_of(server, order="random").judge(duels(60))
        again, server.bodies[:] = sorted(shown(body) for body in server.bodies), []
        judge_of(server, order="random", seed=1).judge(duels(60))
    assert [v.probability for v in verdicts] == pytest.approx([0.9] * 60)
    assert len(once) == 60 and once == again
    assert 15 < Counter(once)["q", "short", "long answer"] < 45


def test_letters_ties_and_abstentions_of_a_judge_that_writes():
    words = {"one": "Hm.\n\n**A**", "two": "Verdict: B", "tie": "(C)", "none": "I would rather not.\nX"}
    with ChatServer(lambda body, n: say(words[shown(body)[0]])) as server:
        judge = judge_of(server, verdict="text", order="random", price=0.1)
        asked = [duel(name, text=name) for name in words]
        verdicts = dict(zip(words, judge.judge(asked), strict=True))
        swapped = {d.id: judge._questions(d)[0].swapped for d in asked}
    assert verdicts["one"].probability == float(not swapped["one"])
    assert verdicts["two"].probability == float(swapped["two"])
    assert verdicts["tie"].probability == 0.5
    assert verdicts["none"].probability is None and verdicts["none"].failure == "the judge abstained"
    assert len(server.bodies) == 4, "an abstention is an answer, and is not asked again"
    assert "logprobs" not in server.bodies[0]
    stats = stats_of(judge.book)
    assert (stats.ties, stats.abstentions, stats.answers) == (1, 1, 4)
    assert stats.spent == pytest.approx(0.4), "the endpoint bills an abstention, the ledger does not charge it"


def test_a_tie_in_one_order_counts_one_half():
    with ChatServer(lambda body, n: say("A" if shown(body)[1] == "long answer" else "C")) as server:
        [verdict] = judge_of(server, verdict="text").judge(duels(1))
    assert verdict.probability == 0.75


def test_a_refusal_is_an_abstention_and_a_text_that_was_cut_off_is_unreadable():
    refusal = say(None, message={"refusal": "I can't help with that."})
    with ChatServer(
        lambda body, n: refusal if shown(body)[0] == "no" else say("so A", finish_reason="length")
    ) as server:
        judge = judge_of(server, verdict="text", retries=1)
        refused, cut = judge.judge([duel("a", text="no"), duel("b", text="yes")])
    assert refused.failure == "the judge abstained"
    assert "unreadable verdict" in cut.failure


def test_some_questions_are_asked_twice_to_see_whether_the_judge_agrees_with_itself():
    with ChatServer(lambda body, n: digit(0.9 if n % 2 else 0.1)) as server:
        judge = judge_of(server, order="random", recheck=1.0, concurrency=1, price=1)
        verdicts = judge.judge(duels(4))
    stats = stats_of(judge.book)
    assert len(server.bodies) == 8 and (stats.rechecked, stats.self_agreement) == (4, 0.0)
    assert [v.price for v in verdicts] == [2.0] * 4, "both calls are paid, the first one counts"
    assert all(v.probability == pytest.approx(0.1) or v.probability == pytest.approx(0.9) for v in verdicts)


# ==== trouble ==================================================================================================
TROUBLES = {
    "rate limit": (status(429, "slow down", {"Retry-After": "0.05"}), "HTTP 429: slow down"),
    "server error": (status(500, "oops"), "HTTP 500: oops"),
    "bad gateway": ((502, {"Content-Type": "text/html"}, b"<html>"), "HTTP 502"),
    "garbage": (GARBAGE, "not a chat completion"),
    "not json": (NOT_JSON, "Bad gateway"),
    "wrong shape": (WRONG_SHAPE, "not a chat completion"),
    "half closed": (CUT, "Connection error"),
    "no answer": (SLAM, "Connection error"),
    "timeout": (HANG, "timed out"),
    "a drip": (DRIP, "the call timed out: not over after 1.5 s"),
    "a drip of headers": (DRIP_HEADERS, "the call timed out"),
    "another token": (token("Both"), "unreadable verdict 'Both'"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_asked_again_and_if_it_stays_it_is_a_failure_and_never_a_label(trouble):
    reply, reason = TROUBLES[trouble]
    asked = Counter()

    def behaviour(body, n):
        prompt = shown(body)[0]
        asked[prompt] += 1
        return reply if prompt == "never" or asked[prompt] == 1 else longer(body, n)

    with ChatServer(behaviour) as server:
        judge = judge_of(server, order="random", retries=2, timeout_s=0.5, price=1)
        good, bad = judge.judge([duel("g", text="once"), duel("b", text="never")])
    assert good.probability == pytest.approx(0.9)
    assert bad.probability is None and reason in bad.failure and "3 attempts" in bad.failure
    assert asked == {"once": 2, "never": 3}
    billed = trouble not in ("rate limit", "server error", "bad gateway")
    assert good.price == (2 if billed else 1), "what may have been billed is counted"
    assert judge.book.spent == (5 if billed else 1)


def test_a_call_that_is_given_up_leaves_no_connection_behind():
    with ChatServer(lambda body, n: DRIP) as server:
        judge_of(server, order="random", retries=1, timeout_s=0.1).judge(duels(2))
        deadline = time.monotonic() + 5
        while server.cut_off < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert server.cut_off == 4


def test_retry_after_is_respected_as_seconds_and_as_a_date():
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))}) > 50
    assert [retry_after({"retry-after": text}) for text in ("", "soon", "-3", "nan", "inf")] == [0] * 5
    with ChatServer(lambda body, n: digit(0.9) if n else status(429, headers={"Retry-After": "0.5"})) as server:
        judge_of(server, order="random").judge(duels(1))
    assert server.times[1] - server.times[0] >= 0.5


def test_an_endpoint_that_asks_to_wait_too_long_is_not_waited_for():
    with ChatServer(lambda body, n: status(429, headers={"Retry-After": "3600"})) as server:
        [verdict] = judge_of(server, order="random").judge(duels(1))
    assert "it asks to wait 3600 s" in verdict.failure and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (status(404, "no such model"), r"knows no model oracle\.target='m'.*no such model"),
        (status(403, "wrong region"), "does not allow this call.*wrong region"),
        (status(429, "you exceeded your quota", code="insufficient_quota"), "exceeded your quota"),
        (status(400, "max_tokens is not supported", code="unsupported_parameter"), "refuses every request.*max_tokens"),
        (say("0"), r"no log-probabilities.*oracle\.judge\.verdict=text"),
    ],
)
def test_what_is_wrong_with_every_call_is_an_error_at_once(reply, message):
    with ChatServer(lambda body, n: reply) as server:
        judge = judge_of(server, concurrency=1, order="random")
        with pytest.raises(OracleError, match=message):
            judge.judge(duels(1) if reply[0] == 400 else duels(50))
    assert len(server.bodies) == 1


def test_one_duel_that_the_endpoint_refuses_is_a_failure_of_its_own():
    def behaviour(body, n):
        return status(400, "too many tokens") if shown(body)[0] == "huge" else longer(body, n)

    with ChatServer(behaviour) as server:
        good, bad = judge_of(server, order="random").judge([duel("a"), duel("b", text="huge")])
    assert good.probability == pytest.approx(0.9)
    assert bad.failure == "no verdict: HTTP 400: too many tokens" and len(server.bodies) == 2


def test_nothing_at_the_address_is_an_error_before_anything_is_bought():
    with ChatServer(longer) as server:
        pass
    with pytest.raises(OracleError, match=r"nothing answers at oracle\.judge\.base_url=http://127"):
        judge_of(server)


def test_a_wrong_key_is_an_error_before_anything_is_bought_and_is_not_repeated(monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    with ChatServer(longer, key="another") as server:
        with pytest.raises(OracleError, match=r"the key in \$A_KEY is not accepted.*provided: \*\*\*") as caught:
            judge_of(server, api_key_env="A_KEY")
        assert KEY not in str(caught.value) and caught.value.__cause__ is None
    assert server.bodies == []


@pytest.mark.parametrize("value", [None, "", "  \n", "two words", "line\nbreak", "schlüssel"])
def test_a_variable_without_a_key_is_an_error_that_names_the_variable_alone(monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with ChatServer(longer) as server, pytest.raises(ConfigError, match="'A_KEY'") as caught:
        judge_of(server, api_key_env="A_KEY")
    assert not (value or "").strip() or value not in str(caught.value)


def test_the_key_reaches_the_endpoint_and_no_file_log_or_verdict(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("A_KEY", KEY + "\n")

    def echo(body, n):
        return [say(f"your key is {KEY}"), status(500, f"bad key {KEY}"), (200, {}, f"{KEY}!".encode())][n % 3]

    with caplog.at_level(logging.DEBUG), ChatServer(echo, key=KEY) as server:
        judge = judge_of(server, api_key_env="A_KEY", verdict="text", price=1, retries=5)
        judge.keep_in(tmp_path)
        verdicts = judge.judge(duels(4))
    assert server.bodies, "the key was accepted"
    told = [repr(verdicts), judge.id, repr(vars(judge)), caplog.text, *(f.read_text() for f in tmp_path.rglob("*"))]
    assert all(v.failure for v in verdicts) and "***" in "".join(told)
    assert not [text for text in told if KEY in text]


# ==== limits ===================================================================================================
def test_no_more_calls_are_in_flight_than_allowed():
    def slow(body, n):
        time.sleep(0.05)
        return longer(body, n)

    with ChatServer(slow) as server:
        judge_of(server, concurrency=3).judge(duels(10))
    assert server.most_at_once == 3


def test_calls_begin_no_faster_than_allowed():
    with ChatServer(longer) as server:
        judge_of(server, calls_per_minute=1200, order="random").judge(duels(6))
    assert max(server.times) - min(server.times) >= 5 * 60 / 1200 * 0.8


def test_the_spending_cap_is_never_exceeded_and_what_was_paid_is_free_after_it_is_raised(tmp_path):
    def slow(body, n):
        time.sleep(0.01)
        return longer(body, n)

    with ChatServer(slow) as server:
        judge = judge_of(server, price=0.1, max_spend=0.7, concurrency=8)
        judge.keep_in(tmp_path)
        with pytest.raises(OracleError, match=r"has cost 0\.7 .*resume RUN_DIR --set oracle\.judge\.max_spend=MORE"):
            judge.judge(duels(10))
        assert len(server.bodies) == 7, "seven calls of 0.1 are 0.7 and not more"
        with pytest.raises(OracleError, match=r"has cost 0\.7"):
            judge.judge(duels(10))
        richer = judge_of(server, price=0.1, max_spend=2, concurrency=8)
        richer.keep_in(tmp_path)
        verdicts = richer.judge(duels(10))
    assert len(server.bodies) == 20, "two for each duel, and none twice"
    assert [v.price for v in verdicts] == [0.2] * 10
    assert judge_stats(tmp_path).spent == 2.0


def test_the_cap_holds_over_replicas_that_share_a_book(tmp_path):
    one, other = CallBook(tmp_path, 0.3), CallBook(tmp_path, 0.3)
    one.reserve("a", 0.1)
    other.free(other.reserve("b", 0.1), "HTTP 429")
    one.reserve("c", 0.1)
    other.reserve("d", 0.1)
    for book in (one, other):
        with pytest.raises(OracleError, match=r"has cost 0\.3"):
            book.reserve("e", 0.1)


def test_a_call_that_a_crash_interrupted_stays_counted_and_what_it_tore_is_ignored(tmp_path):
    question_ = Question("j", "a", False, 0)
    book = CallBook(tmp_path, 0.2)
    book.answer(book.reserve("a", 0.1), question_, Answer(0.7))
    book.reserve("b", 0.1)  # the crash
    with (tmp_path / "calls.jsonl").open("ab") as file:
        file.write(b'{"reserve": "to')
    again = CallBook(tmp_path, 0.2)
    assert again.spent == 0.2 and again.lookup(question_) == Answer(0.7)
    with pytest.raises(OracleError):
        again.reserve("c", 0.1)
    CallBook(tmp_path, 0.3).reserve("c", 0.1)
    assert CallBook(tmp_path).spent == 0.3 == (again.refresh(), again.spent)[1]


def test_an_order_that_was_answered_is_not_asked_again_by_another_replica(tmp_path):
    with ChatServer(lambda body, n: SLAM if n == 1 else longer(body, n)) as server:
        judge = judge_of(server, concurrency=1, retries=0)
        judge.keep_in(tmp_path)
        [failed] = judge.judge(duels(1))
        assert failed.failure and len(server.bodies) == 2
        other = judge_of(server)
        other.keep_in(tmp_path)
        [verdict] = other.judge(duels(1))
    assert len(server.bodies) == 3 and verdict.probability == pytest.approx(0.9)


# ==== prompts and settings =====================================================================================
def test_what_responses_say_of_placeholders_stays_what_it_is():
    text = question(TEMPLATE, "text", Prompt(id="p", text="{first}", token_ids=()), "{second}{answer}", "{prompt}\\1")
    assert text == "P[{first}] F[{second}{answer}] S[{prompt}\\1]"
    known = Prompt(id="p", text="-", token_ids=(), reference="{first}")
    assert question(TEMPLATE + "{reference}", "text", known, "a", "b") == "P[-] F[a] S[b]{first}"


@pytest.mark.parametrize("template", ["chat", "summary"])
@pytest.mark.parametrize("verdict", ["logprobs", "text"])
def test_a_question_shows_everything_once_and_in_order(template, verdict):
    text = question(template, verdict, Prompt(id="p", text="THE-PROMPT", token_ids=()), "ONE", "TWO")
    assert (
        text.index("THE-PROMPT")
        < text.index("ONE")
        < text.index("TWO")
        < text.index("last line" if verdict == "text" else "digit")
    )
    assert [text.count(word) for word in ("THE-PROMPT", "ONE", "TWO", "{")] == [1, 1, 1, 0]


def test_a_conversation_is_shown_with_who_said_what():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "so"},
    ]
    text = question(TEMPLATE, "text", Prompt(id="p", text="-", token_ids=(), meta={"messages": turns}), "a", "b")
    assert text == "P[user: hi\n\nassistant: yes?\n\nuser: so] F[a] S[b]"


def test_digits_are_read_whatever_surrounds_them_and_other_tokens_are_not():
    p = read_logprobs(" 1", {" 1": math.log(0.6), "0": math.log(0.2), "The": math.log(0.2)}).probability
    assert p == pytest.approx(0.25)
    assert read_logprobs("1", {"1": 0.0}).probability == 0.0
    assert read_logprobs("The", {"The": math.log(0.5), "0": math.log(0.4)}).probability is None


@pytest.mark.parametrize(
    "text", ["", "A or B", "Answer A is good", "AB", "D", "A\nbut then again", "The answer is bad"]
)
def test_a_text_without_a_letter_of_its_own_on_the_last_line_is_unreadable(text):
    reading = read_text(text)
    assert reading.probability is None and not reading.abstained


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("base_url", {"base_url": "localhost:8000"}),
        ("base_url", {"base_url": "https://user:secret@host/v1"}),
        ("base_url", {"base_url": "https://host/v1?key=secret"}),
        ("api_key_env", {"api_key_env": "sk-secret"}),
        ("template", {"template": "chatt"}),
        ("template", {"template": "{prompt} {first}"}),
        ("verdict", {"verdict": "logits"}),
        ("order", {"order": "first"}),
        ("top_logprobs", {"top_logprobs": 1}),
        ("recheck", {"recheck": 1.5}),
        ("concurrency", {"concurrency": 0}),
        ("timeout_s", {"timeout_s": 0.0}),
        ("retries", {"retries": -1}),
        ("price", {"price": math.nan}),
        ("max_spend", {"max_spend": 10.0}),
        ("max_spend", {"max_spend": 0.1, "price": 1.0}),
    ],
)
def test_bad_settings_are_named_and_secrets_in_them_are_not(name, settings):
    with pytest.raises(ConfigError, match=rf"oracle\.judge\.{name}") as caught:
        JudgeConfig(**settings)
    assert "secret" not in str(caught.value)


def test_further_fields_of_a_request_are_sent_and_null_leaves_one_out():
    with ChatServer(longer) as server:
        judge_of(server, request={"max_tokens": None, "max_completion_tokens": 5, "top_k": 1}).judge(duels(1))
    body = server.bodies[0]
    assert (body["max_completion_tokens"], body["top_k"], "max_tokens" in body) == (5, 1, False)


def test_the_id_names_model_host_and_port_and_changes_with_the_question():
    with ChatServer(longer) as server, ChatServer(longer) as elsewhere:
        one, same, other = judge_of(server), judge_of(server, concurrency=2), judge_of(server, verdict="text")
        assert isinstance(one, JudgeOracle) and one.id.startswith(f"judge:m@{server.url[7:-3]}#")
        assert one.id == same.id == judge_of(server, max_tokens=5).id != other.id
        assert judge_of(server, top_logprobs=2).id != one.id, "what is not among them has probability 0"
        assert judge_of(elsewhere).id != one.id, "another server on the same machine may be another judge"


def test_a_judge_that_moved_to_another_port_goes_on_with_the_money_and_asks_anew(tmp_path):
    with ChatServer(longer) as server:
        judge = judge_of(server, order="random", price=1.0, max_spend=3.0)
        judge.keep_in(tmp_path)
        judge.judge(duels(2))
    with ChatServer(longer) as server:
        judge = judge_of(server, order="random", price=1.0, max_spend=3.0)
        judge.keep_in(tmp_path)
        assert judge.judge(duels(1))[0].price == 2 and len(server.bodies) == 1
        with pytest.raises(OracleError, match=r"has cost 3\.0"):
            judge.judge(duels(2))


def test_a_call_book_that_lacks_a_reservation_is_read_all_the_same(tmp_path):
    """The line was torn by a crash, or the file is a part of one."""
    gone, kept = Question("j", "d1", False, 0), Question("j", "d2", False, 0)
    lines = [
        {"free": "no such call", "why": ""},
        {"waste": "no such call", "why": ""},
        {"answer": "no such call", **gone._asdict(), "probability": 0.2},
    ]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    book = CallBook(tmp_path)
    assert (book.spent, book.freed, book.lookup(gone)) == (0, 0, Answer(0.2))
    call = book.reserve("d2", 0.5)
    book.free(call, "not billed")
    book.free(call, "said twice")
    book.answer(book.reserve("d2", 0.5), kept, Answer(0.9))
    assert (book.spent, book.freed, CallBook(tmp_path).lookup(kept)) == (0.5, 1, Answer(0.9))
