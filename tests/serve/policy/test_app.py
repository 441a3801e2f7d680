"""The endpoint over a real engine in this process: what clients of OpenAI's API send, and what they get."""

import asyncio
import json
import threading

import httpx
import openai
import pytest
from random_policies import save_policy

from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError, RolloutError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.serve.http_guard import digest
from rayalign.serve.policy.answerer import EngineAnswerer
from rayalign.serve.policy.app import build_app
from rayalign.serve.policy.config import PolicyServerConfig

TOKEN = "a-token-of-the-tests-alone"
ROLLOUT = RolloutConfig(engine="transformers", max_tokens=8, max_prompt_tokens=64, temperature=1.0)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """One with a chat template, and one without."""
    root = tmp_path_factory.mktemp("policies")
    return {name: str(save_policy(root / name, template=name == "chat")) for name in ("chat", "plain")}


@pytest.fixture(scope="module")
def engines(policies):
    return {name: TransformersEngine(path) for name, path in policies.items()}


@pytest.fixture
def client(policies, engines):
    """`client(policy="chat", **settings)`: an `openai.AsyncOpenAI` that talks to the application in this process."""
    answerers = []

    def make(policy="chat", token=TOKEN, engine=None, chooser=None, timeout_s=30.0, **settings):
        config = PolicyServerConfig(model="mine", token_digest=digest(TOKEN), **settings)
        answerer = EngineAnswerer(
            engine or engines[policy], best_of=config.best_of, chooser=chooser, timeout_s=timeout_s
        )
        answerers.append(answerer)
        app = build_app(config, ROLLOUT, policies[policy], answerer)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        return openai.AsyncOpenAI(base_url="http://test/v1", api_key=token, http_client=http, max_retries=0)

    yield make
    for answerer in answerers:
        answerer.close()


def say(text, **more):
    return {"model": "mine", "messages": [{"role": "user", "content": text}], **more}


def run(*coroutines):
    async def together():
        return await asyncio.gather(*coroutines, return_exceptions=True)

    return asyncio.run(together())


def test_a_conversation_goes_through_the_chat_template_and_comes_back_as_the_engine_says(client, engines, policies):
    talk = [{"role": "system", "content": "w1"}, {"role": "user", "content": [{"type": "text", "text": "w2 w3"}]}]
    (reply,) = run(client().chat.completions.create(model="mine", messages=talk, temperature=0, max_tokens=5))
    tokenizer = engines["chat"].tokenizer
    plain = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    from rayalign.types import Prompt

    ((expected,),) = engines["chat"].generate(
        [Prompt(id="p", text="", token_ids=tuple(ids))], ROLLOUT.sampling(n=1, temperature=0, max_tokens=5), seed=0
    )
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == ("stop" if expected.finished else "length")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(expected.token_ids))
    assert reply.model == "mine" and reply.object == "chat.completion" and reply.system_fingerprint.endswith("-v0")


def test_many_clients_at_the_same_time_get_their_own_answers(client):
    ask = client()

    def one(i):
        return ask.chat.completions.create(**say(f"w{i % 20} w{i // 20}", seed=i, temperature=0.5 + i % 2, n=1 + i % 3))

    together = run(*(one(i) for i in range(24)))
    alone = [run(one(i))[0] for i in (0, 1, 2, 11, 23)]
    assert [len(reply.choices) for reply in together] == [1 + i % 3 for i in range(24)]
    for i, reply in zip((0, 1, 2, 11, 23), alone, strict=True):
        assert texts(reply) == texts(together[i])


def texts(reply):
    return [getattr(choice, "text", None) or choice.message.content for choice in reply.choices]


def test_a_seed_makes_an_answer_repeatable_and_without_one_answers_differ(client):
    ask = client().chat.completions
    one, same, other = run(*(ask.create(**say("w5 w6", seed=seed, n=6)) for seed in (1, 1, 2)))
    assert texts(one) == texts(same) != texts(other)
    assert len(set(texts(one))) > 1
    free = run(*(ask.create(**say("w5 w6", n=6)) for _ in range(2)))
    assert texts(free[0]) != texts(free[1])


def test_completions_take_texts_and_token_ids_as_they_are(client, engines):
    ask = client().completions
    prompts = ["w1 w2", "w3"]
    ids = [engines["chat"].tokenizer(text)["input_ids"] for text in prompts]
    settings = {"model": "mine", "temperature": 0, "max_tokens": 4}
    by_text, by_ids, single = run(
        ask.create(prompt=prompts, **settings),
        ask.create(prompt=ids, **settings),
        ask.create(prompt=ids[1], **settings),
    )
    assert texts(by_text) == texts(by_ids) and texts(single) == texts(by_ids)[1:]
    assert [choice.index for choice in by_text.choices] == [0, 1]
    assert by_text.usage.prompt_tokens == sum(map(len, ids))


async def streamed(create, **request):
    return [event async for event in await create(stream=True, **request)]


def test_a_stream_is_the_whole_reply_in_events(client):
    ask = client()
    request = say("w5 w6", seed=1, n=2, temperature=1)
    whole, events = run(ask.chat.completions.create(**request), streamed(ask.chat.completions.create, **request))
    said, ends = {}, {}
    for choice in (choice for event in events for choice in event.choices):
        said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
        ends[choice.index] = choice.finish_reason
    assert [said[i] for i in range(2)] == texts(whole)
    assert [ends[i] for i in range(2)] == [choice.finish_reason for choice in whole.choices]
    assert {event.object for event in events} == {"chat.completion.chunk"} and len({event.id for event in events}) == 1

    request = {"model": "mine", "prompt": ["w1", "w2"], "temperature": 0, "stream_options": {"include_usage": True}}
    (events,) = run(streamed(ask.completions.create, **request))
    whole = run(ask.completions.create(**{k: v for k, v in request.items() if k != "stream_options"}))[0]
    assert [choice.text for event in events for choice in event.choices] == texts(whole)
    assert [event.usage for event in events] == [None, None, whole.usage]


def test_what_is_wrong_with_a_request_for_a_stream_is_told_before_it_begins(client):
    (error,) = run(streamed(client().chat.completions.create, **say("w1", n=17)))
    assert isinstance(error, openai.BadRequestError) and "n=17 is more" in str(error)


def test_an_answer_ends_before_a_stop_text(client):
    ask = client().chat.completions
    (whole,) = run(ask.create(**say("w9", temperature=0)))
    second = whole.choices[0].message.content.split()[1]
    (cut,) = run(ask.create(**say("w9", temperature=0, stop=[second, "never"])))
    assert cut.choices[0].message.content == whole.choices[0].message.content.split(second)[0]
    assert cut.choices[0].finish_reason == "stop"


class Picker(Agent):
    """Picks by length, or always the same."""

    def __init__(self, pick):
        super().__init__()
        self.pick, self.sizes = pick, []

    def best_of(self, prompt, candidates):
        self.sizes.append(len(candidates))
        lengths = [len(candidate.token_ids) for candidate in candidates]
        return None if self.pick is None else lengths.index(self.pick(lengths))


def test_best_of_n_answers_with_the_agents_pick_and_counts_what_it_sampled(client):
    longest, shortest, silent = Picker(max), Picker(min), Picker(None)
    picked, lengths = [], []
    for chooser in (longest, shortest, silent):
        (reply,) = run(client(best_of=6, chooser=chooser).chat.completions.create(**say("w4", seed=3, n=4)))
        assert chooser.sizes == [6] * 4 and len(reply.choices) == 4
        picked.append(reply)
        lengths.append([len(text.split()) for text in texts(reply)])
    assert len({reply.usage.completion_tokens for reply in picked}) == 1  # the same 24 samples
    assert picked[0].usage.completion_tokens > sum(lengths[0])
    assert all(low <= middle <= high for high, low, middle in zip(*lengths, strict=True))
    assert sum(lengths[1]) < sum(lengths[0])


def test_a_greedy_answer_leaves_nothing_to_pick(client):
    chooser = Picker(max)
    (reply,) = run(client(best_of=4, chooser=chooser).chat.completions.create(**say("w4", temperature=0)))
    (plain,) = run(client().chat.completions.create(**say("w4", temperature=0)))
    assert texts(reply) == texts(plain) and chooser.sizes == []


def test_a_policy_without_a_chat_template_takes_one_user_message_as_its_prompt(client):
    ask = client("plain")
    chat, text, two = run(
        ask.chat.completions.create(**say("w1 w2", temperature=0)),
        ask.completions.create(model="mine", prompt="w1 w2", temperature=0),
        ask.chat.completions.create(model="mine", messages=say("w1")["messages"] * 2),
    )
    assert texts(chat) == texts(text)
    assert isinstance(two, openai.BadRequestError) and "no chat template" in str(two)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stream": True, "stream_options": {"chunks": 3}}, "stream_options.chunks"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not served"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not served"),
        ({"logprobs": True}, "logprobs is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served"),
        ({"extra_body": {"temprature": 1}}, "Unrecognized request argument: temprature"),
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"seed": 10**30}, "seed: .*less than"),
        ({"n": 0}, "n: .*greater than or equal to 1"),
        ({"n": 17}, "n=17 is more than this server's 16"),
        ({"max_tokens": 9}, "max_tokens=9 is more than this server's 8"),
        ({"stop": list("abcde")}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "w1"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "w1 " * 70}]}, "more than rollout.max_prompt_tokens"),
        ({"messages": [{"role": "user", "content": "w1"}] * 257}, "more than 256 entries"),
    ],
)
def test_what_is_not_served_is_a_400_that_says_so(client, more, message):
    (error,) = run(client().chat.completions.create(**say("w1") | more))
    assert isinstance(error, openai.BadRequestError), error
    with pytest.raises(openai.BadRequestError, match=message):
        raise error


def test_a_reply_can_be_sent_back_as_the_client_has_it(client):
    """As everybody writes a conversation: `messages.append(reply.choices[0].message)`."""
    ask = client()
    (first,) = run(ask.chat.completions.create(**say("w1", temperature=0)))
    messages = [*say("w1")["messages"], first.choices[0].message, *say("w2")["messages"]]
    (second,) = run(ask.chat.completions.create(model="mine", messages=messages, temperature=0))
    assert not isinstance(second, Exception) and texts(second)


def test_values_that_ask_for_nothing_and_fields_that_concern_openai_alone_are_accepted(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "stream": False, "logprobs": False, "tools": []}
    private = {"user": "me", "store": False, "metadata": {"a": "b"}}
    (reply,) = run(client().chat.completions.create(**say("w1", max_completion_tokens=3, **neutral, **private)))
    assert len(reply.choices) == 1 and reply.usage.completion_tokens <= 3


def test_other_models_paths_and_tokens_are_refused(client):
    other, missing, wrong, models, model = run(
        client().chat.completions.create(**say("w1") | {"model": "other"}),
        client().embeddings.create(model="mine", input="w1"),
        client(token="another-token-than-it").models.list(),
        client().models.list(),
        client().models.retrieve("mine"),
    )
    assert isinstance(other, openai.NotFoundError) and other.code == "model_not_found" and "'mine'" in str(other)
    assert isinstance(missing, openai.NotFoundError) and "There is no POST /v1/embeddings" in str(missing)
    assert isinstance(wrong, openai.AuthenticationError)
    assert [entry.id for entry in models.data] == [model.id] == ["mine"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": 3}', b"null", b"\xff", b"[" * 10_000])
def test_bodies_that_are_no_request_are_a_400(client, body):
    http = client()._client
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    (reply,) = run(http.post("/v1/chat/completions", content=body, headers=headers))
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


class Stuck:
    """An engine that answers when it is let go, or breaks."""

    version = 0

    def __init__(self, error=None):
        self.go, self.error, self.batches = threading.Event(), error, []

    def generate(self, prompts, sampling, seed, positions=None):
        self.batches.append(len(prompts))
        self.go.wait(10)
        if self.error:
            raise self.error
        from rayalign.types import Candidate

        return [[Candidate(text="w1", token_ids=(8, 1), logprobs=(0.0, 0.0), policy_version=0)] for _ in prompts]


def test_questions_that_come_while_the_engine_works_are_its_next_batch(client):
    engine = Stuck()
    ask = client(engine=engine)

    async def go():
        first = asyncio.create_task(ask.chat.completions.create(**say("w1")))
        while not engine.batches:
            await asyncio.sleep(0.01)
        rest = [asyncio.create_task(ask.chat.completions.create(**say("w1"))) for _ in range(9)]
        await asyncio.sleep(0.2)
        engine.go.set()
        return await asyncio.gather(first, *rest)

    assert [texts(reply) for reply in asyncio.run(go())] == [["w1"]] * 10
    assert engine.batches == [1, 9]


def test_too_many_requests_are_told_to_come_back_and_a_late_answer_is_a_503(client):
    engine = Stuck()
    ask = client(engine=engine, max_requests=3, timeout_s=0.3)
    replies = run(*(ask.chat.completions.create(**say("w1")) for _ in range(5)))
    engine.go.set()
    kinds = [type(reply) for reply in replies]
    assert kinds.count(openai.RateLimitError) == 2 and kinds.count(openai.InternalServerError) == 3
    late = next(reply for reply in replies if isinstance(reply, openai.InternalServerError))
    assert late.status_code == 503 and "did not answer within 0.3 s" in str(late)


def test_an_engine_that_breaks_is_a_500_without_its_words_and_the_replica_says_that_it_is_ill(client):
    engine = Stuck(error=RuntimeError("secret detail"))
    engine.go.set()
    ask = client(engine=engine)
    first, second, health = run(
        ask.chat.completions.create(**say("w1")), later(ask), later(ask, lambda: ask._client.get("/health"))
    )
    assert first.status_code == second.status_code == health.status_code == 500
    assert "secret" not in str(first) + str(second)


async def later(ask, what=None):
    await asyncio.sleep(0.3)
    return await (what() if what else ask.chat.completions.create(**say("w1")))


def test_a_stopped_answerer_tells_who_waits(engines):
    answerer = EngineAnswerer(engines["chat"])
    answerer.close()
    with pytest.raises(RolloutError, match="any more"):
        asyncio.run(answerer.answer(None))


def test_a_server_that_others_can_reach_needs_a_token():
    with pytest.raises(ConfigError, match=r"can be reached from other machines.*RAYALIGN_SERVE_TOKEN"):
        PolicyServerConfig(host="0.0.0.0")
    PolicyServerConfig(host="0.0.0.0", token_digest=digest(TOKEN))
    PolicyServerConfig()


def test_the_schema_is_published(client):
    http = client()._client
    (reply,) = run(http.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}))
    paths = json.loads(reply.content)["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(paths)
