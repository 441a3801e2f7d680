"""The oracle's HTTP endpoints on a real server (uvicorn), asked by a real client; the oracle is a function. No Ray."""

import asyncio
import json
import socket
import threading
import time

import pytest
import requests
import uvicorn

from rayalign.errors import ConfigError, DataError, OracleError, WaitError
from rayalign.serve.http.app import build_app
from rayalign.serve.http.config import HttpConfig
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.http_guard import digest
from rayalign.types import Verdict

TOKEN = "a-token-of-the-tests-0123456789"


class Judge:
    """Prefers longer responses; says no to prompts that say `no`, breaks at `broken`, is late at `late`."""

    def __init__(self):
        self.duels, self.calls, self.gate = [], 0, None

    async def __call__(self, duels):
        self.duels += duels
        self.calls += 1
        if self.gate is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.gate.wait, 20)
        said = {duel.prompt.text for duel in duels}
        if "broken" in said:
            raise OracleError(f"oracle function:f raised KeyError on duel {duels[0].id}: 'y'")
        if "late" in said:
            raise WaitError("waited 1 s for the oracle")
        if "foreign" in said:
            raise DataError("prompt 'foreign' is not of this world")
        return [
            Verdict(duel_id=duel.id, failure="refused")
            if duel.prompt.text == "no"
            else Verdict(duel_id=duel.id, probability=float(len(duel.first.text) > len(duel.second.text)), price=0.5)
            for duel in duels
        ]


class Server:
    def __init__(self, token="", **limits):
        self.judge = Judge()
        app = build_app(self.judge, "function:f", ServiceConfig(token_digest=token and digest(token), **limits))
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def post(self, body, path="/v1/verdicts", **options):
        options.setdefault("headers", {})
        options["headers"] = {"Content-Type": "application/json", **options["headers"]}
        data = body if isinstance(body, bytes) else json.dumps(body)
        return requests.post(self.url + path, data=data, timeout=20, **options)

    def close(self):
        self.uvicorn.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def server():
    running = Server(max_duels=4, max_characters=50, max_body_bytes=3000, max_requests=2)
    yield running
    running.close()


@pytest.fixture(scope="module")
def guarded():
    running = Server(token=TOKEN)
    yield running
    running.close()


def duel(name="d", first="long one", second="short", prompt="q", **more):
    return {"id": name, "prompt": prompt, "first": first, "second": second, **more}


def test_verdicts_come_in_order_under_the_callers_own_ids(server):
    asked = [duel("a"), duel("b", "s", "longer"), duel("c", prompt="no")]
    reply = server.post({"duels": asked})
    assert reply.status_code == 200
    assert reply.json() == {
        "oracle": "function:f",
        "verdicts": [
            {"id": "a", "probability": 1.0, "failure": None, "price": 0.5, "pending": False},
            {"id": "b", "probability": 0.0, "failure": None, "price": 0.5, "pending": False},
            {"id": "c", "probability": None, "failure": "refused", "price": 0.0, "pending": False},
        ],
    }


def test_a_duel_is_the_same_if_caller_id_and_texts_are(server):
    def name(body, caller=""):
        server.judge.duels.clear()
        assert server.post({"duels": [body], "caller": caller}).status_code == 200
        return server.judge.duels[0].id

    first = name(duel("a"))
    assert first == name(duel("a"))
    one, other = {"k": 1, "l": {"m": 2, "n": 3}}, {"l": {"n": 3, "m": 2}, "k": 1}
    assert name(duel("a", data=one)) == name(duel("a", data=other))
    others = [
        name(duel("b")),
        name(duel("a"), "somebody"),
        name(duel("a", prompt="r")),
        name(duel("a", "short", "long")),
        name(duel("a", data={"k": 1})),
    ]
    assert len({first, *others}) == 6, "another program's id 1 is not ours, and a reused id is not an old answer"


def test_one_id_is_one_duel_within_a_request(server):
    twice = server.post({"duels": [duel("a"), duel("b"), duel("a")]}).json()["verdicts"]
    assert [verdict["id"] for verdict in twice] == ["a", "b", "a"] and twice[0] == twice[2]
    server.judge.duels.clear()
    reply = server.post({"duels": [duel("a"), duel("b"), duel("a", "another", "text")]})
    assert reply.status_code == 422 and "duels.2 has the id of another duel" in reply.json()["error"]["message"]
    assert server.judge.duels == [], "nobody was asked"


def test_conversations_and_references_reach_the_oracle(server):
    server.judge.duels.clear()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    more = {"messages": turns, "reference": "r", "data": {"k": [1]}, "prompt_id": "p"}
    assert server.post({"duels": [duel(**more)]}).status_code == 200
    [seen] = server.judge.duels
    assert (seen.prompt.meta, seen.prompt.reference, seen.prompt.id) == ({"messages": turns, "k": [1]}, "r", "p")
    assert (seen.prompt.text, seen.first.text, seen.second.text) == ("q", "long one", "short")


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "not JSON"),
        (b'{"duels": [' * 5, 400, None, "not JSON"),
        (b"[" * 2900, 400, None, "body"),
        (b"", 422, None, "the body: Field required"),
        ([1], 422, None, "the body: Input should be a valid dictionary"),
        ({}, 422, "duels", "Field required"),
        ({"duels": []}, 422, "duels", "List should have at least 1"),
        ({"duels": [duel()] * 5}, 422, "duels", "List should have at most 4"),
        ({"duels": [{"id": "a"}]}, 422, "duels.0.prompt", "Field required"),
        ({"duels": [duel(first=3)]}, 422, "duels.0.first", "Input should be a valid string"),
        ({"duels": [duel(), duel(second="x" * 51)]}, 422, "duels.1.second", "at most 50"),
        ({"duels": [duel(prompt="x" * 51)]}, 422, "duels.0.prompt", "at most 50"),
        ({"duels": [duel(reference="x" * 51)]}, 422, "duels.0.reference", "at most 50"),
        ({"duels": [duel(data={"a": ["x" * 44]})]}, 422, "duels.0.data", "at most 50"),
        ({"duels": [duel(messages=[{"role": "user", "content": "x" * 51}])]}, 422, None, "messages.0.content"),
        ({"duels": [duel(messages=[{"role": "root", "content": "x"}])]}, 422, None, "messages.0.role"),
        ({"duels": [duel("")]}, 422, "duels.0.id", "at least 1"),
        ({"duels": [duel("i" * 201)]}, 422, "duels.0.id", "at most 200"),
        ({"duels": [duel()], "caller": "c" * 101}, 422, "caller", "at most 100"),
        ({"duels": [duel(frist="x")]}, 422, "duels.0.frist", "Extra inputs are not permitted"),
        ({"duels": [duel()], "oracle": "judge:m"}, 409, None, "another oracle than the one that is meant"),
        ({"duels": [duel(first="x" * 3000)]}, 413, None, "more than 3000 bytes"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_with_its_field_and_nobody_is_asked(server, body, status, param, words):
    before = server.judge.calls
    reply = server.post(body)
    assert (reply.status_code, list(reply.json())) == (status, ["error"])
    error = reply.json()["error"]
    assert words in error["message"] and (param is None or (error["param"] == param and param in error["message"]))
    assert "x" * 20 not in reply.text and server.judge.calls == before


def test_a_body_that_never_ends_is_refused_as_soon_as_it_is_too_long(server):
    head = b"POST /v1/verdicts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + 4 * (b"3e8\r\n" + b" " * 1000 + b"\r\n"))
        assert line.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""])
def test_only_json_is_read_and_above_all_no_pickle(server, kind):
    """A page of another site can post the first two without asking; and nothing is ever unpickled."""
    import pickle

    before = server.judge.calls
    for body in (json.dumps({"duels": [duel()]}).encode(), pickle.dumps({"duels": [duel()]})):
        reply = server.post(body, headers={"Content-Type": kind})
        assert reply.status_code == 415 and "must be application/json" in reply.json()["error"]["message"]
    assert server.post(pickle.dumps([duel()])).status_code in (400, 422)
    assert server.judge.calls == before


def test_the_schema_is_published_with_its_limits(server):
    schema = requests.get(server.url + "/openapi.json", timeout=20).json()
    assert set(schema["paths"]) == {"/v1/verdicts", "/v1/oracle", "/health"}
    parts = schema["components"]["schemas"]
    assert parts["Question"]["properties"]["duels"]["maxItems"] == 4
    assert parts["Duel"]["properties"]["first"]["maxLength"] == 50
    assert "not paid again" in parts["Duel"]["properties"]["id"]["description"]
    assert parts["Duel"]["required"] == ["id", "prompt", "first", "second"]
    for page in ("/docs", "/redoc"):
        assert requests.get(server.url + page, timeout=20).status_code == 404


def test_which_oracle_it_is_and_whether_it_lives(server):
    about = requests.get(server.url + "/v1/oracle", timeout=20).json()
    limits = {"max_duels": 4, "max_characters": 50, "max_body_bytes": 3000}
    assert about == {"oracle": "function:f", "late": False, **limits}
    assert requests.get(server.url + "/health", timeout=20).json() == {"status": "ok"}
    nowhere = requests.get(server.url + "/elsewhere", timeout=20)
    assert (nowhere.status_code, nowhere.json()["error"]["message"]) == (404, "There is no GET /elsewhere here.")
    assert requests.get(server.url + "/v1/verdicts", timeout=20).status_code == 405


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [
        ("broken", 500, "oracle function:f raised KeyError on duel mine: 'y'"),
        ("late", 504, "waited 1 s for the oracle"),
        ("foreign", 422, "prompt 'foreign' is not of this world"),
    ],
)
def test_an_oracle_that_can_not_answer_says_why_and_names_the_callers_duel(server, prompt, status, words):
    reply = server.post({"duels": [duel("mine", prompt=prompt)]})
    assert (reply.status_code, reply.json()["error"]["message"]) == (status, words)


def test_more_requests_than_it_works_on_are_told_to_come_again(server):
    server.judge.gate, before = threading.Event(), server.judge.calls
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(server.post({"duels": [duel()]}))) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        while server.judge.calls < before + 2:
            time.sleep(0.01)
        refused = server.post({"duels": [duel()]})
    finally:
        server.judge.gate.set()
        for thread in threads:
            thread.join()
        server.judge.gate = None
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert [reply.status_code for reply in replies] == [200, 200]
    assert server.post({"duels": [duel()]}).status_code == 200


def test_without_a_token_only_this_machine_by_its_own_name_is_answered(server):
    """A web page whose name was made to resolve to 127.0.0.1 sends its own name."""
    for host, status in (("127.0.0.1:1", 200), ("localhost", 200), ("evil.example", 403), ("", 403)):
        reply = server.post({"duels": [duel()]}, headers={"Host": host})
        assert reply.status_code == status, host


# ==== the token ================================================================================================
@pytest.mark.parametrize(
    "shown", [None, "", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_without_the_token_nobody_is_asked(guarded, shown):
    headers = {} if shown is None else {"Authorization": shown}
    for reply in (
        guarded.post({"duels": [duel()]}, headers=headers),
        requests.get(guarded.url + "/v1/oracle", headers=headers, timeout=20),
    ):
        assert (reply.status_code, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert TOKEN not in reply.text
    assert guarded.judge.calls == 0


def test_without_the_token_nothing_of_the_body_is_read(guarded):
    assert guarded.post(b"{" * 1000).status_code == 401
    assert guarded.post(b"", path="/elsewhere").status_code == 401


def test_with_the_token_it_answers_whatever_the_host_is_called(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "oracle.example"}
    assert guarded.post({"duels": [duel()]}, headers=headers).status_code == 200
    guarded.judge.calls = 0


def test_schema_and_health_need_no_token_and_do_not_tell_it(guarded):
    for path in ("/openapi.json", "/health"):
        reply = requests.get(guarded.url + path, timeout=20)
        assert reply.status_code == 200 and TOKEN not in reply.text
    assert "HTTPBearer" in requests.get(guarded.url + "/openapi.json", timeout=20).text


# ==== settings =================================================================================================
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "oracle.example"])
def test_an_address_that_others_can_reach_needs_a_token_and_loopback_none(host):
    with pytest.raises(ConfigError, match=r"can be reached from other machines, and there is no token"):
        ServiceConfig(host=host)
    assert ServiceConfig(host=host, token_digest=digest(TOKEN)).guard().token_digest == digest(TOKEN)
    assert [ServiceConfig(host=name).token_digest for name in ("127.0.0.1", "::1", "localhost")] == [""] * 3


def test_a_token_where_its_variables_name_belongs_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="token_env must be the name") as caught:
        HttpConfig(token_env="sk-very-secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"port": 0}, {"max_duels": 0}, {"max_characters": 0}, {"max_body_bytes": 0}])
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=rf"service\.{next(iter(settings))}=0"):
        ServiceConfig(**settings)
