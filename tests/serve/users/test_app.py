"""The endpoint over a desk of this process: what OpenAI's client gets, what a choice may say, and who is let in."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from random_policies import save_policy

from rayalign.errors import ConfigError, WaitError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.serve import OracleConfig
from rayalign.serve.http_guard import digest
from rayalign.serve.users.app import build_app
from rayalign.serve.users.book import Told
from rayalign.serve.users.config import UsersConfig
from rayalign.serve.users.kind import tokens_of
from rayalign.serve.users.questions import UserAnswer

ROLLOUT = RolloutConfig(engine="transformers", max_tokens=6, max_prompt_tokens=64, temperature=1.0)
CALLERS = tuple((name, digest(f"the-secret-token-of-{name}")) for name in ("ann", "bob"))


class EngineDesk:
    """An engine that answers whoever asks; two answers to whoever takes them."""

    def __init__(self, policy):
        self.policy, self.engine = policy, TransformersEngine(policy)
        self.asked, self.chosen, self.late = [], [], False

    async def describe(self):
        if self.late:
            raise WaitError("the policy did not answer within 1 s.")
        return self.policy, ROLLOUT

    async def ask(self, question):
        self.asked.append(question)
        n = 2 if question.comparable else question.sampling.n
        sampling = ROLLOUT.sampling(n=n, temperature=question.sampling.temperature)
        (choices,) = self.engine.generate([question.prompt], sampling, seed=question.seed or 0)
        name = "the-comparison" if question.comparable else ""
        return UserAnswer(choices=choices, sampled_tokens=9, comparison=name, expires=time.time() + 60)

    async def choose(self, name, choice, owner):
        self.chosen.append((name, choice, owner))
        told = {"the-comparison": Told.RECORDED, "old": Told.EXPIRED, "other": Told.DIFFERENT}
        return told.get(name, Told.UNKNOWN)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save_policy(tmp_path_factory.mktemp("policy") / "policy", template=False))


@pytest.fixture
def desk(policy):
    return EngineDesk(policy)


@pytest.fixture
def served(desk):
    """`served(callers=..., **settings)`: an HTTP client of the application, and OpenAI's client on top of it."""

    def make(callers=(), token=None, host="127.0.0.1", **settings):
        app = build_app(UsersConfig(**settings), desk, callers)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}", headers=headers)
        client = openai.AsyncOpenAI(
            base_url=f"http://{host}/v1", api_key=token or "none", http_client=http, max_retries=0
        )
        return SimpleNamespace(http=http, openai=client)

    return make


def say(text="w1 w2", **more):
    return {"model": "policy", "messages": [{"role": "user", "content": text}], **more}


def ask(client, **more):
    return asyncio.run(client.openai.chat.completions.create(**say(**more)))


def test_who_leaves_everything_to_the_run_may_be_shown_two_answers(served, desk):
    reply = ask(served())
    assert len(reply.choices) == 2 and [choice.index for choice in reply.choices] == [0, 1]
    assert reply.comparison["id"] == "the-comparison"
    assert reply.comparison["url"] == "/v1/comparisons/the-comparison"
    assert 0 < reply.comparison["expires"] - time.time() <= 60
    assert desk.asked[0].comparable and desk.asked[0].sampling == ROLLOUT.sampling(n=1)
    assert ask(served(), temperature=1.0, max_tokens=6).comparison, "the run's own values are no settings of one's own"


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1},
        {"n": 3},
        {"temperature": 0.3},
        {"top_p": 0.5},
        {"max_tokens": 2},
        {"stop": ["w3"]},
        {"seed": 4},
        {"extra_headers": {"X-Rayalign-Comparison": "no"}},
    ],
    ids=str,
)
def test_who_gives_no_chance_to_show_two_answers_is_asked_nothing(served, desk, more):
    reply = ask(served(), **more)
    assert len(reply.choices) == more.get("n", 1) and "comparison" not in (reply.model_extra or {})
    assert not desk.asked[0].comparable and desk.asked[0].seed == more.get("seed")


def test_a_stream_has_one_answer(served, desk):
    async def read():
        events = await served().openai.chat.completions.create(**say(stream=True))
        return [event async for event in events]

    assert {choice.index for event in asyncio.run(read()) for choice in event.choices} == {0}
    assert not desk.asked[0].comparable


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("the-comparison", {"choice": "tie"}, 200, '"recorded":true'),
        ("other", {"choice": "tie"}, 409, "another choice already"),
        ("old", {"choice": "tie"}, 410, "is over"),
        ("nothing", {"choice": "tie"}, 404, "no such comparison"),
        ("the-comparison", {"choice": "left"}, 400, "choice"),
        ("the-comparison", {"choice": "tie", "duel": "x"}, 400, "duel"),
        ("the-comparison", {}, 400, "choice"),
    ],
)
def test_a_choice_is_recorded_or_refused_with_the_reason(served, desk, name, body, status, words):
    reply = asyncio.run(served().http.post(f"/v1/comparisons/{name}", json=body))
    assert reply.status_code == status and words in reply.text
    assert desk.chosen == ([(name, "tie", "")] if words != "choice" and words != "duel" else [])


def test_only_json_is_read(served, desk):
    reply = asyncio.run(served().http.post("/v1/comparisons/the-comparison", content=b'{"choice": "tie"}'))
    assert reply.status_code == 415 and not desk.chosen


def test_with_tokens_each_user_is_known_by_theirs_and_nobody_else_is_let_in(served, desk):
    ann, bob = (served(CALLERS, f"the-secret-token-of-{name}", host="example.org") for name in ("ann", "bob"))
    ask(ann), ask(bob)
    asyncio.run(bob.http.post("/v1/comparisons/the-comparison", json={"choice": "first"}))
    assert [question.owner for question in desk.asked] == ["ann", "bob"]
    assert desk.chosen == [("the-comparison", "first", "bob")]
    for stranger in (served(CALLERS), served(CALLERS, "the-secret-token-of-eve")):
        with pytest.raises(openai.AuthenticationError):
            ask(stranger)
        assert asyncio.run(stranger.http.post("/v1/comparisons/the-comparison", json={})).status_code == 401
        assert asyncio.run(stranger.http.get("/health")).status_code == 200
    assert len(desk.asked) == 2 and len(desk.chosen) == 1


def test_without_tokens_only_this_machine_by_its_own_name_is_answered(served, desk):
    with pytest.raises(openai.PermissionDeniedError):
        ask(served(host="example.org"))
    assert not desk.asked


def test_what_is_wrong_with_a_question_is_said_before_the_run_is_asked(served, desk):
    client = served(max_messages=1, max_choices=2, max_body_bytes=1000)
    for more, words in (
        ({"n": 3}, "n=3 is more than this server's 2"),
        ({"max_tokens": 100}, "max_tokens=100 is more"),
        ({"text": ""}, "is empty after tokenisation"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, **more)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        asyncio.run(client.openai.chat.completions.create(**(say() | {"model": "gpt"})))
    with pytest.raises(openai.APIStatusError, match="more than 1000 bytes"):
        ask(client, text="w1 " * 1000)
    assert not desk.asked


def test_the_model_is_listed_and_health_follows_the_run(served, desk):
    client = served(model="ours")
    assert [model["id"] for model in asyncio.run(client.http.get("/v1/models")).json()["data"]] == ["ours"]
    assert asyncio.run(client.http.get("/health")).json() == {"status": "ok"}
    desk.late = True
    assert asyncio.run(client.http.get("/health")).status_code == 503


@pytest.mark.parametrize(
    "settings", [{"host": "0.0.0.0"}, {"port": 0}, {"choose_within_s": 0.0}, {"max_batch": 0}, {"model": ""}], ids=str
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=rf"oracle\.users\.{next(iter(settings))}="):
        UsersConfig(**settings)


def test_a_users_token_that_no_header_can_carry_is_refused_with_its_line(tmp_path):
    (tmp_path / "tokens").write_text("ann a-token-of-sixteen\nbob schl\u00fcssel-von-bob\n", encoding="utf-8")
    config = OracleConfig(kind="users", users=UsersConfig(tokens_file=str(tmp_path / "tokens")))
    with pytest.raises(
        ConfigError, match=r"oracle\.users\.tokens_file=.*line 2: the token of user 'bob'.*ASCII"
    ) as found:
        tokens_of(config)
    assert "von-bob" not in str(found.value)
