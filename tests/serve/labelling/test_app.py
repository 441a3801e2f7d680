"""The labelling page over a real queue: who gets in, what is refused, and what hostile texts come back as."""

import asyncio
import logging

import httpx
import pytest
from starlette.testclient import TestClient

from rayalign.errors import ConfigError
from rayalign.serve.labelling.app import MAX_BODY_BYTES, STATIC, build_app
from rayalign.serve.labelling.config import HumanConfig
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.labelling.tokens import Tokens
from rayalign.types import Candidate, Duel, Prompt

TOKENS = {"ann": "the-secret-of-ann-1", "bob": "the-secret-of-bob-2"}
HOSTILE = {
    "script": "</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "override": "safe \u202egnitirw\u202c text \u2066",
    "long": "x" * 100_000,
}


def duel(name, first="one", second="two"):
    def response(text):
        return Candidate(text=text, token_ids=(), logprobs=(), policy_version=0)

    prompt = Prompt(id="p", text=f"prompt of {name}", token_ids=())
    return Duel(id=name, batch=0, prompt=prompt, first=response(first), second=response(second))


@pytest.fixture
def queue(tmp_path):
    queue = DuelQueue(tmp_path / "queue.arrow", TOKENS, undo_s=60)
    yield queue
    queue.close()


@pytest.fixture
def browser(queue):
    """`browser()` is somebody who is not logged in, `browser("ann")` is ann."""
    app = build_app(queue, Tokens(TOKENS), guidelines="Be <b>fair</b>.")

    def start(name=None):
        client = TestClient(app, base_url="http://127.0.0.1:8700", client=("127.0.0.1", 50000))
        if name is not None:
            assert client.post("/api/login", json={"token": TOKENS[name]}).json() == {"annotator": name}
        return client

    return start


def test_a_duel_is_shown_answered_and_undone(browser, queue):
    queue.put([duel("a"), duel("b")])
    ann = browser("ann")
    task = ann.post("/api/next", json={}).json()["task"]
    assert (task["duel"], task["prompt"], {task["left"], task["right"]}) == ("a", "prompt of a", {"one", "two"})
    reply = ann.post("/api/answer", json={"duel": "a", "choice": "left"}).json()
    assert (reply["saved"], reply["undo"], reply["progress"]["answered"]) == ("a", "a", 1)
    reply = ann.post("/api/undo", json={"duel": "a"}).json()
    assert (reply["undone"], reply["undo"], reply["progress"]["answered"]) == ("a", None, 0)
    assert ann.post("/api/next", json={}).json()["task"] == task
    ann.post("/api/answer", json={"duel": "a", "choice": "left"})
    assert ann.post("/api/next", json={}).json()["task"]["duel"] == "b"
    ann.post("/api/answer", json={"duel": "b", "choice": "tie"})
    assert ann.post("/api/next", json={}).json()["task"] is None
    assert queue.verdicts(["a"])["a"].probability == float(task["left"] == "one")
    assert ann.get("/api/progress").json()["progress"]["answered"] == 2
    assert ann.get("/api/guidelines").json() == {"guidelines": "Be <b>fair</b>."}


def test_two_annotators_get_two_duels(browser, queue):
    queue.put([duel("a"), duel("b"), duel("c")])
    tasks = [browser(name).post("/api/next", json={}).json()["task"]["duel"] for name in TOKENS]
    assert tasks == ["a", "b"]


@pytest.mark.parametrize("token", ["", "the-secret-of-ann-", "the-secret-of-ann-12", "é", "ann"])
def test_a_wrong_token_gets_no_cookie_and_no_duel(browser, queue, token):
    queue.put([duel("a")])
    client = browser()
    reply = client.post("/api/login", json={"token": token})
    assert reply.status_code == 401 and "set-cookie" not in reply.headers
    for call in (("POST", "/api/next"), ("GET", "/api/progress"), ("GET", "/api/guidelines")):
        assert client.request(*call, json={}).status_code == 401
    assert queue.take("ann").duel == "a"


def test_who_tries_many_tokens_has_to_wait_and_nobody_else_has_to(browser):
    def log_in(token, address):
        return browser().post("/api/login", json={"token": token}, headers={"X-Forwarded-For": address})

    ann = browser("ann")
    assert log_in(TOKENS["ann"], "10.0.0.1").status_code == 200
    statuses = [log_in(f"a-guess-of-mine-{i}", "10.0.0.1").status_code for i in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    refused = log_in(TOKENS["bob"], "10.0.0.1")
    assert refused.status_code == 429 and "set-cookie" not in refused.headers, "not even the right one"
    assert 1 <= int(refused.headers["retry-after"]) <= 6 and "Try again in" in refused.json()["error"]
    assert log_in(TOKENS["ann"], "10.0.0.1").status_code == 200, "a token that was right there before"
    assert log_in(TOKENS["bob"], "10.0.0.2").status_code == 200
    assert ann.get("/api/progress").status_code == 200, "who is logged in stays so"


@pytest.mark.parametrize("text", [b"\\ud800", b"a\\udfffb"])
def test_texts_that_no_reply_could_repeat_are_refused(browser, text):
    ann = browser("ann")
    for path, more in (("login", b""), ("undo", b""), ("answer", b', "choice": "tie"')):
        name = b"token" if path == "login" else b"duel"
        body = b'{"' + name + b'": "' + text + b'"' + more + b"}"
        reply = ann.post(f"/api/{path}", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400


def test_the_cookie_holds_no_token_can_not_be_read_by_scripts_and_stays_on_this_site(browser):
    reply = browser().post("/api/login", json={"token": TOKENS["ann"]})
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert TOKENS["ann"] not in cookie


def test_a_session_outlives_the_server_and_ends_with_the_token_or_the_logout(browser):
    ann = browser("ann")
    restarted = browser()
    restarted.cookies = ann.cookies
    assert restarted.get("/api/progress").status_code == 200
    session = Tokens(TOKENS).session("ann")
    assert Tokens({"ann": "another-token-of-ann"}).owner_of_session(session) is None
    ann.post("/api/logout", json={})
    assert ann.get("/api/progress").status_code == 401


def test_no_token_is_logged_or_part_of_an_error_or_a_repr(browser, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    texts = [browser().post("/api/login", json={"token": TOKENS["ann"] + "x"}).text, repr(Tokens(TOKENS))]
    browser("ann")
    (tmp_path / "tokens").write_text("ann short-secret\nbob another-secret extra\n")
    with pytest.raises(ConfigError) as error:
        Tokens.read(tmp_path / "tokens")
    texts += [str(error.value), caplog.text]
    assert not [t for t in texts for secret in ("secret-of-ann", "short-secret", "another-secret") if secret in t]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no annotators"),
        ("ann short", "the token of annotator 'ann' must have 16 to 256"),
        ("ann aaaaaaaaaaaaaaaa\nbob aaaaaaaaaaaaaaaa", "the same token"),
        ("ann aaaaaaaaaaaaaaaa\nann bbbbbbbbbbbbbbbb", "line 3: expected `name token`, each name once"),
        ("a/b aaaaaaaaaaaaaaaa", "'a/b': a name has"),
        ("ann aaaaaaaaaaaaaaaa\nbob schl\u00fcssel-von-bob", "tokens', line 3: the token of annotator 'bob' .*ASCII"),
    ],
)
def test_a_tokens_file_that_can_not_be_right_is_refused(tmp_path, content, message):
    (tmp_path / "tokens").write_text(f"# who labels\n{content}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Tokens.read(tmp_path / "tokens")


def test_a_made_token_stays_the_same_and_is_its_owners_alone_to_read(tmp_path):
    made = Tokens.read_or_make(tmp_path / "labelling" / "tokens")
    file = tmp_path / "labelling" / "tokens"
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text().split()[1]
    assert made.owner(token) == Tokens.read_or_make(file).owner(token) == "annotator"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_address_that_others_can_reach_needs_tokens(host):
    with pytest.raises(ConfigError, match=r"oracle\.human\.tokens_file is not set"):
        HumanConfig(host=host)
    assert HumanConfig(host=host, tokens_file="tokens").host == host
    assert HumanConfig(host="127.0.0.1").tokens_file == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"annotators_per_duel": 0},
        {"aggregate": "mean"},
        {"lease_s": 0.0},
        {"max_requests": 0},
        {"undo_s": float("nan")},
        {"port": 0},
        {"annotators_per_duel": 2},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=rf"oracle\.human\.{next(iter(settings))}="):
        HumanConfig(**settings)


@pytest.mark.parametrize("path", ["/api/login", "/api/next", "/api/answer", "/api/undo", "/api/logout"])
def test_a_body_that_is_too_large_or_not_what_was_asked_for_is_refused(browser, queue, path):
    queue.put([duel("a")])
    ann = browser("ann")
    json_header = {"content-type": "application/json"}

    def chunks():
        for _ in range(100):
            yield b"x" * 1000

    assert ann.post(path, content=b"{" + b" " * MAX_BODY_BYTES, headers=json_header).status_code == 413
    assert ann.post(path, content=chunks(), headers=json_header).status_code == 413
    for content in (b"", b"[]", b"{", b"[" * 2000, b'{"duel": 1, "choice": "left"}', b'{"more": "x"}', b"\xff"):
        assert ann.post(path, content=content, headers=json_header).status_code == 400
    assert ann.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert ann.post(path, json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert ann.post(path, json={}, headers={"origin": "null"}).status_code == 403
    assert ann.post(path, json={}, headers={"origin": "http://[x"}).status_code == 403
    assert queue.progress("ann").answered == 0


def test_a_body_that_does_not_end_is_given_up(queue, monkeypatch):
    monkeypatch.setattr("rayalign.serve.labelling.app.BODY_TIMEOUT_S", 0.05)

    async def never():
        yield b"{"
        await asyncio.sleep(30)

    async def go():
        transport = httpx.ASGITransport(build_app(queue, Tokens(TOKENS)))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8700") as client:
            return await client.post("/api/login", content=never(), headers={"content-type": "application/json"})

    assert asyncio.run(go()).status_code == 408


def test_more_requests_than_allowed_are_told_to_come_back_and_those_in_hand_are_answered(queue):
    bodies = asyncio.Event()

    async def slow():
        await bodies.wait()
        yield b'{"token": "%s"}' % TOKENS["ann"].encode()

    async def go():
        transport = httpx.ASGITransport(build_app(queue, Tokens(TOKENS), max_requests=2))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8700") as client:
            header = {"content-type": "application/json"}
            in_hand = [asyncio.create_task(client.post("/api/login", content=slow(), headers=header)) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await client.get("/")
            bodies.set()
            return refused, [(await answer).status_code for answer in in_hand], (await client.get("/")).status_code

    refused, answered, later = asyncio.run(go())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json() == {"error": "This server has too many requests to work on; try again."}
    assert "Content-Security-Policy" in refused.headers and answered == [200, 200] and later == 200


def test_what_the_queue_refuses_is_a_conflict_with_its_reason(browser, queue):
    queue.put([duel("a")])
    ann, bob = browser("ann"), browser("bob")
    ann.post("/api/next", json={})
    reply = bob.post("/api/answer", json={"duel": "a", "choice": "left"})
    assert (reply.status_code, reply.json()) == (409, {"error": "duel a was not given to you."})
    assert ann.post("/api/answer", json={"duel": "a", "choice": "first"}).status_code == 400
    assert bob.post("/api/undo", json={"duel": "a"}).status_code == 409


def test_a_disk_that_refuses_is_not_called_saved(browser, queue, monkeypatch):
    queue.put([duel("a")])
    ann = browser("ann")
    ann.post("/api/next", json={})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rayalign.ledger.arrow_log.os.fsync", full)
    reply = ann.post("/api/answer", json={"duel": "a", "choice": "left"})
    assert reply.status_code == 503 and "nothing was saved" in reply.json()["error"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_texts_come_back_unchanged_as_json_texts(browser, queue, text):
    queue.put([duel("a", first=text, second=text + "!")])
    reply = browser("ann").post("/api/next", json={})
    assert reply.headers["content-type"] == "application/json"
    assert {reply.json()["task"]["left"], reply.json()["task"]["right"]} == {text, text + "!"}


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/api/next", "/nothing", "/static/../app.py"])
def test_every_response_forbids_scripts_that_are_not_the_pages_own(browser, path):
    headers = browser().get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"]) == ("'none'", "'self'")
    assert (policy["base-uri"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_the_page_has_no_script_style_or_handler_inside_and_never_writes_markup(browser):
    page = browser().get("/").text
    assert page.count("<script") == 1 and '<script type="module" src="static/page.js"></script>' in page
    assert "<style" not in page and " style=" not in page and " on" not in page.replace(" one", "")
    for file in STATIC.glob("*.js"):
        source = file.read_text()
        assert not [word for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", ".write(") if word in source]
