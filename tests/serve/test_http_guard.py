"""The guard before an application: who gets in, and what nobody gets to see."""

import asyncio
import json

import httpx
import pytest

from rayalign.errors import ConfigError
from rayalign.serve.http_guard import CALLER, GuardConfig, HttpGuard, digest, read_token

TOKEN = "correct-horse-battery-staple"


async def echo(scope, receive, send):
    """Answers with what it was sent."""
    if scope["type"] == "lifespan":
        raise AssertionError("nobody starts it here")
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(config, *requests, app=echo, host="127.0.0.1:80"):
    """Responses to `(method, path, options)`, sent at the same time."""

    async def go():
        transport = httpx.ASGITransport(HttpGuard(app, config))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await asyncio.gather(*(client.request(m, path, **options) for m, path, options in requests))

    return asyncio.run(go())


def bearer(token):
    return {"headers": {"Authorization": f"Bearer {token}"}}


def test_only_the_token_gets_in_and_health_needs_none():
    config = GuardConfig(token_digest=digest(TOKEN))
    wrong = [{}, bearer(TOKEN + "x"), bearer(TOKEN[:-1]), bearer(""), {"headers": {"Authorization": f"Basic {TOKEN}"}}]
    requests = [("POST", "/", options) for options in wrong]
    answers = ask(config, *requests, ("POST", "/", bearer(TOKEN)), ("GET", "/health", {}), host="example.org")
    assert [answer.status_code for answer in answers] == [401] * 5 + [200, 200]
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].json()["error"]["type"] == "authentication_error"


def test_after_many_wrong_tokens_an_address_waits_unless_it_was_let_in_before():
    def at(address, token):
        headers = {"X-Forwarded-For": address} | ({"Authorization": f"Bearer {token}"} if token else {})
        return "GET", "/", {"headers": headers}

    guard = HttpGuard(echo, GuardConfig(token_digest=digest(TOKEN)))

    async def go():
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://example.org") as client:
            tries = [at("10.0.0.1", TOKEN), *[at("10.0.0.1", "guess")] * 11, at("10.0.0.1", TOKEN), at("10.0.0.1", "")]
            tries += [*[at("10.0.0.2", "guess")] * 11, at("10.0.0.2", TOKEN), at("10.0.0.3", TOKEN)]
            return [await client.request(m, path, **options) for m, path, options in tries]

    answers = asyncio.run(go())
    assert [answer.status_code for answer in answers[:14]] == [200, *[401] * 10, 429, 200, 401]
    assert 1 <= int(answers[11].headers["retry-after"]) <= 6
    assert [answer.status_code for answer in answers[14:]] == [*[401] * 10, 429, 429, 200], "not even the right one"


def test_callers_with_tokens_of_their_own_are_known_by_name():
    async def who(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope[CALLER].encode()})

    tokens = {name: f"the-secret-token-of-{name}" for name in ("ann", "bob")}
    config = GuardConfig(callers=tuple((name, digest(token)) for name, token in tokens.items()))
    requests = [("GET", "/", bearer(token)) for token in (*tokens.values(), "the-secret-token-of-eve")]
    answers = ask(config, *requests, ("GET", "/health", {}), app=who, host="example.org")
    assert [(answer.status_code, answer.text) for answer in answers[:2]] == [(200, "ann"), (200, "bob")]
    assert answers[2].status_code == 401 and (answers[3].status_code, answers[3].text) == (200, "")


def test_the_body_arrives_whole_and_one_byte_too_many_is_refused_declared_or_not():
    async def in_pieces(size):
        for _ in range(size):
            yield b"x"

    config = GuardConfig(max_body_bytes=100)
    sizes = [
        *(("POST", "/", {"content": b"x" * size}) for size in (0, 100, 101)),
        *(("POST", "/", {"content": in_pieces(size)}) for size in (100, 101)),
    ]
    answers = ask(config, *sizes)
    assert [answer.status_code for answer in answers] == [200, 200, 413, 200, 413]
    assert answers[1].content == answers[3].content == b"x" * 100


def test_a_body_of_another_type_than_the_one_that_is_read_is_refused():
    config = GuardConfig(body_type="application/json", max_body_bytes=10)
    types = ("text/plain", "application/x-www-form-urlencoded", "", "application/json", "Application/JSON; charset=x")
    requests = [("POST", "/", {"content": b"x", "headers": {"Content-Type": kind}}) for kind in types]
    answers = ask(config, *requests, ("POST", "/", {"content": b"x"}), ("GET", "/", {}))
    assert [answer.status_code for answer in answers] == [415, 415, 415, 200, 200, 415, 200]
    assert "application/json" in answers[0].json()["error"]["message"]


def test_a_slow_body_is_given_up():
    async def never():
        yield b"{"
        await asyncio.sleep(30)

    (answer,) = ask(GuardConfig(body_timeout_s=0.05), ("POST", "/", {"content": never()}))
    assert answer.status_code == 408


def test_more_requests_than_allowed_are_told_to_come_back_and_those_inside_are_answered():
    async def slow(scope, receive, send):
        await asyncio.sleep(0.2)
        await echo(scope, receive, send)

    answers = ask(GuardConfig(max_requests=3), *[("POST", "/", {"content": b"x"})] * 5, app=slow)
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200, 200, 200, 429, 429]
    assert next(a for a in answers if a.status_code == 429).headers["retry-after"] == "1"


def test_the_place_of_a_request_that_broke_is_free_again():
    async def broken(scope, receive, send):
        raise RuntimeError("broken")

    guard = HttpGuard(broken, GuardConfig(max_requests=1))

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost") as client:
            for _ in range(3):
                with pytest.raises(RuntimeError, match="broken"):
                    await client.post("/")

    asyncio.run(go())


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", None, 200),
        ("localhost:8000", "http://localhost:8000", 200),
        ("[::1]:8000", None, 200),
        ("127.0.0.1:8000", "http://evil.example", 403),
        ("evil.example", "http://evil.example", 403),  # a name that was made to point to the loopback address
        ("evil.example:8000", None, 403),
    ],
)
def test_without_a_token_pages_of_other_sites_do_not_get_in(host, origin, status):
    options = {} if origin is None else {"headers": {"Origin": origin}}
    (answer,) = ask(GuardConfig(), ("POST", "/", options), host=host)
    assert answer.status_code == status


def test_websockets_are_closed():
    sent = []

    async def go():
        async def send(message):
            sent.append(message)

        await HttpGuard(echo, GuardConfig())({"type": "websocket"}, None, send)

    asyncio.run(go())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_token_is_read_from_a_file_or_the_environment_and_kept_as_a_digest(tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    assert read_token(None, "SOME_TOKEN") == ""
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(None, "SOME_TOKEN") == read_token(tmp_path / "token", "OTHER") == digest(TOKEN)
    assert TOKEN not in repr(GuardConfig(token_digest=digest(TOKEN)))


@pytest.mark.parametrize("bad", ["short", "two words that are long enough", "x" * 513, ""])
def test_a_token_that_can_be_guessed_is_an_error_that_does_not_tell_it(tmp_path, bad):
    (tmp_path / "token").write_text(bad)
    with pytest.raises(ConfigError, match="a token is one word") as error:
        read_token(tmp_path / "token", "OTHER")
    assert not bad or bad not in str(error.value)
    with pytest.raises(ConfigError, match="can't be read"):
        read_token(tmp_path / "nothing", "OTHER")


def test_errors_are_json_that_openai_clients_read():
    (answer,) = ask(GuardConfig(max_body_bytes=1), ("POST", "/", {"content": b"xx"}))
    assert json.loads(answer.content) == {
        "error": {
            "message": "The body has more than 1 bytes.",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }


@pytest.mark.parametrize("headers", [{"Origin": "http://[x"}, {"Host": "[x"}])
def test_an_address_that_is_none_is_refused_like_any_other(headers):
    (answer,) = ask(GuardConfig(), ("GET", "/", {"headers": headers}))
    assert answer.status_code == 403
