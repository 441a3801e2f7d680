"""The oracle that asks another one over HTTP: a real service (uvicorn), and servers that misbehave. No Ray."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import uvicorn

import rayalign
from rayalign.errors import ConfigError, OracleError, WaitError
from rayalign.serve import OracleConfig
from rayalign.serve.http.app import build_app
from rayalign.serve.http.config import HttpConfig
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.http_guard import digest
from rayalign.serve.oracles import FunctionOracle, oracle_factory
from rayalign.types import Candidate, Duel, Prompt

TOKEN = "a-token-of-the-tests-0123456789"


def length(prompt, response):
    return float(len(response))


def duels(n, text="prompt"):
    def response(length):
        return Candidate(text="x" * length, token_ids=(), logprobs=(), policy_version=0)

    return [
        Duel(
            id=f"d{i}",
            batch=0,
            prompt=Prompt(id=f"p{i}", text=text, token_ids=()),
            first=response(i % 7),
            second=response(i % 5),
        )
        for i in range(n)
    ]


@pytest.fixture
def serve():
    """`serve(token, **limits) -> url, sizes of the calls that the oracle behind it got`.

    With `late` it knows nothing of a duel when it is asked for the first time.
    """
    running = []

    def start(token="", price=0.25, late=False, name="", **limits):
        oracle, sizes, seen = FunctionOracle(length, price=price), [], set()

        async def judge(asked):
            sizes.append(len(asked))
            known = [duel for duel in asked if duel.id in seen or not late]
            seen.update(duel.id for duel in asked)
            return oracle.judge(known)

        service = ServiceConfig(token_digest=token and digest(token), **limits)
        app = build_app(judge, name or oracle.id, service, late=late)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", sizes

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def misbehaving():
    """`misbehaving(behaviour) -> url, requests`; `behaviour(n, path) -> (status, headers, body)`, None: silence, or how
    an answer begins that goes on with a byte now and then."""
    running, over = [], threading.Event()

    def start(behaviour):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.reply(200, {}, ABOUT)

            def do_POST(self):
                seen.append((self.rfile.read(int(self.headers["Content-Length"])), dict(self.headers)))
                said = behaviour(len(seen) - 1, self.path)
                if said is None:
                    self.close_connection = True
                elif isinstance(said, bytes):
                    self.close_connection = True
                    self.drip(said)
                else:
                    self.reply(*said)

            def drip(self, start):
                try:
                    self.wfile.write(start)
                    while not over.wait(0.05):
                        self.wfile.write(b" ")
                except OSError:
                    pass  # the other side has had enough

            def reply(self, status, headers, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    over.set()
    for server in running:
        server.shutdown()
        server.server_close()


DRIPS = {
    "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "a body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 10000\r\n\r\n",
    "a body of unknown length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
}
ABOUT = {"oracle": "function:f", "max_duels": 100, "max_characters": 100, "max_body_bytes": 10_000}


def problem(message):
    return {"error": {"message": message, "type": "server_error"}}


def answer(*ids):
    verdicts = [{"id": name, "probability": 0.7, "failure": None, "price": 1.0} for name in ids]
    return 200, {}, {"oracle": "function:f", "verdicts": verdicts}


def oracle(url, *, retries=3, **http):
    return oracle_factory(OracleConfig(kind="http", target=url, retries=retries, http=HttpConfig(**http)))()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("rayalign.serve.http.client.FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("RAYALIGN_ORACLE_TOKEN", raising=False)


def test_verdicts_are_those_of_the_oracle_behind_it_prices_included(serve):
    url, _ = serve()
    asked = duels(30)
    there, here = oracle(url), FunctionOracle(length, price=0.25)
    assert there.judge(asked) == here.judge(asked)
    assert there.judge([]) == []
    assert there.id == f"http:{url.removeprefix('http://')}/{here.id}"


def test_an_oracle_that_takes_its_time_is_late_here_too(serve, monkeypatch):
    monkeypatch.setattr("rayalign.env.labels.LATE_POLL_S", 0.01)
    url, _ = serve(late=True, max_duels=4)
    asked, here = duels(6), FunctionOracle(length, price=0.25)
    there = oracle(url)
    assert there.poll(asked) == [] and there.poll(asked[2:]) == here.judge(asked[2:])
    assert there.poll(asked) == here.judge(asked)
    assert oracle(url, caller="another").judge(asked) == here.judge(asked), "who has nothing else to do may wait"
    assert not hasattr(oracle(serve()[0]), "poll")


def test_a_service_that_was_not_late_and_has_no_answer_is_an_error(misbehaving):
    pending = {"id": "d0", "probability": None, "failure": None, "price": 0.0, "pending": True}
    url, _ = misbehaving(lambda n, path: (200, {}, {"oracle": "f", "verdicts": [pending]}))
    with pytest.raises(OracleError, match="no answer to 1 of 1 duels yet"):
        oracle(url).judge(duels(1))


def test_ties_of_people_who_are_asked_over_http_become_no_coin_flips(serve):
    url, _ = serve(late=True, name="human:1:majority")
    with pytest.raises(ConfigError, match=r"would flip a coin for every tie.*evaluation\.oracle\.labels"):
        oracle(url)
    made = oracle_factory(OracleConfig(kind="http", target=url, labels="deterministic"))()
    assert made.poll(duels(1)) == []


def test_the_small_client_is_one_call(serve, tmp_path):
    (tmp_path / "token").write_text("a-token-of-the-tests-0123456789")
    url, sizes = serve("a-token-of-the-tests-0123456789", max_duels=2)
    rows = [{"prompt": "q", "first": "a" * i, "second": "bb", "data": {"k": i}} for i in range(1, 4)]
    verdicts = rayalign.ask_oracle(url, rows, token_file=tmp_path / "token")
    assert [v.probability > 0.5 for v in verdicts] == [False, False, True] and verdicts[1].probability == 0.5
    assert {v.price for v in verdicts} == {0.25} and sizes == [2, 1]
    again = rayalign.ask_oracle(url, rows, token_file=tmp_path / "token")
    assert [v.duel_id for v in again] == [v.duel_id for v in verdicts], "without an id a duel is known by its texts"
    two = [{"prompt": "q", "first": "a", "second": "b", "data": data} for data in ({"k": 1, "l": 2}, {"l": 2, "k": 1})]
    assert len({v.duel_id for v in rayalign.ask_oracle(url, two, token_file=tmp_path / "token")}) == 1
    assert rayalign.ask_oracle(url, []) == []
    late, _ = serve(late=True)
    assert rayalign.ask_oracle(late, rows) == [None] * 3
    assert [v.price for v in rayalign.ask_oracle(late, rows)] == [0.25] * 3
    with pytest.raises(ConfigError, match=r"duels\[0\] is no duel: second: Field required"):
        rayalign.ask_oracle(url, [{"prompt": "q", "first": "a"}])
    with pytest.raises(ConfigError, match=r"must be like https://host"):
        rayalign.ask_oracle("ftp://x", rows)


def test_lists_are_asked_in_pieces_that_the_service_takes(serve):
    url, sizes = serve(max_duels=8, max_body_bytes=300)
    asked = duels(20)
    assert [v.duel_id for v in oracle(url).judge(asked)] == [d.id for d in asked]
    assert sum(sizes) == 20 and max(sizes) < 8, "8 duels have more than 300 bytes, so they went in halves"


def test_a_failed_verdict_stays_one(misbehaving):
    failed = {"id": "d0", "probability": None, "failure": "abstained", "price": 0.0}
    url, _ = misbehaving(lambda n, path: (200, {}, {"oracle": "f", "verdicts": [failed]}))
    [verdict] = oracle(url).judge(duels(1))
    assert (verdict.probability, verdict.failure, verdict.price) == (None, "abstained", 0.0)


@pytest.mark.parametrize(
    "trouble",
    [
        None,
        (429, {"Retry-After": "0.02"}, problem("busy")),
        (500, {"Content-Type": "text/plain"}, b"Internal Server Error"),
        (502, {"Content-Type": "text/html"}, b"<html>"),
        (503, {}, problem("starting")),
        (404, {"Content-Type": "text/plain"}, b"Path '/v1/verdicts' not found."),
        (504, {}, problem("late")),
        (200, {"Content-Length": 10_000}, b'{"oracle"'),
    ],
    ids=["silence", "429", "500 of a proxy", "502", "503", "404 of a proxy", "504", "cut off"],
)
def test_what_may_pass_is_asked_again_with_the_same_ids(misbehaving, trouble):
    url, seen = misbehaving(lambda n, path: trouble if n < 2 else answer("d0"))
    assert oracle(url, timeout_s=0.5).judge(duels(1))[0].probability == 0.7
    assert len(seen) == 3 and len({body for body, _ in seen}) == 1
    url, seen = misbehaving(lambda n, path: trouble)
    with pytest.raises(
        WaitError, match=r"times within oracle\.http\.patience_s=0\.3 to judge 1 duels, in vain.*resume"
    ):
        oracle(url, timeout_s=0.2, patience_s=0.3).judge(duels(1))
    assert len(seen) >= 2 or trouble is None


@pytest.mark.parametrize("what", DRIPS)
def test_a_service_that_sends_a_byte_now_and_then_is_asked_again_with_the_same_ids(misbehaving, what):
    url, seen = misbehaving(lambda n, path: DRIPS[what] if n < 2 else answer("d0"))
    there, start = oracle(url, timeout_s=0.2), time.monotonic()
    assert there.judge(duels(1))[0].probability == 0.7 and time.monotonic() - start < 10
    assert len(seen) == 3 and len({body for body, _ in seen}) == 1
    assert there.judge(duels(1))[0].probability == 0.7, "the connections that were cut off are no trouble later"
    url, seen = misbehaving(lambda n, path: DRIPS[what])
    with pytest.raises(WaitError, match=r"Last: Timeout\. What it answered is kept there: resume"):
        oracle(url, timeout_s=0.1, patience_s=0).judge(duels(1))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((500, {}, problem("oracle function:f raised KeyError")), "HTTP 500: oracle function:f raised KeyError"),
        ((422, {}, problem("duels.0.first: too long")), "HTTP 422: duels.0.first: too long"),
        ((413, {}, problem("more than 10 bytes")), "HTTP 413: more than 10 bytes"),
        ((404, {}, problem("There is no POST here")), "HTTP 404: There is no POST here"),
        ((409, {}, problem("another oracle")), "HTTP 409: another oracle"),
        ((302, {"Location": "http://127.0.0.1:1/"}, {}), "HTTP 302"),
        ((200, {}, {"answer": 42}), "did not answer as a rayalign oracle"),
        ((200, {}, b"\x80\x04pickle"), "did not answer as a rayalign oracle"),
        (answer("another"), r"answered about others, \['another'\]"),
        (answer("d0", "d0"), "answered about others"),
    ],
)
def test_what_stays_wrong_is_an_error_at_once(misbehaving, reply, words):
    url, seen = misbehaving(lambda n, path: reply)
    with pytest.raises(OracleError, match=words):
        oracle(url).judge(duels(1))
    assert len(seen) == 1


def test_the_token_is_shown_and_is_in_no_message(serve, misbehaving, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("RAYALIGN_ORACLE_TOKEN", TOKEN)
    url, _ = serve(TOKEN)
    with caplog.at_level(logging.DEBUG):
        there = oracle(url)
        assert len(there.judge(duels(3))) == 3
        echo, seen = misbehaving(lambda n, path: (500, {}, problem(f"who is {TOKEN}?")))
        with pytest.raises(OracleError, match=r"who is \*\*\*\?") as caught:
            oracle(echo).judge(duels(1))
    assert seen[0][1]["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in caplog.text + repr(there.config) + there.id + str(caught.value)
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.delenv("RAYALIGN_ORACLE_TOKEN")
    assert len(oracle(url, token_file=str(tmp_path / "token")).judge(duels(3))) == 3


def test_a_netrc_does_not_take_the_tokens_place(serve, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password something-else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("RAYALIGN_ORACLE_TOKEN", TOKEN)
    url, _ = serve(TOKEN)
    assert len(oracle(url).judge(duels(1))) == 1


def test_a_proxy_is_used_unless_the_host_or_its_network_is_excepted(serve, monkeypatch):
    url, _ = serve()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nobody is
    for excepted in ("localhost,127.0.0.0/8", "[::1],127.0.0.1"):
        monkeypatch.setenv("NO_PROXY", excepted)
        assert len(oracle(url).judge(duels(1))) == 1
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    with pytest.raises(OracleError, match="Last: ConnectError: "):
        oracle(url, timeout_s=0.5)
    monkeypatch.setenv("HTTP_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"as the environment has it.*HTTP_PROXY"):
        oracle(url)


@pytest.mark.parametrize("target", ["http://127.0.0.1:99999", "http://127.0.0.1:8a", "http://a\nb/"])
def test_what_is_no_address_is_said_before_anything_is_started(target):
    with pytest.raises(ConfigError, match=r"oracle\.target=.* is no address|must be like"):
        oracle(target)
    with pytest.raises(ConfigError, match=r"oracle\.target is no address") as caught:
        oracle("http://me:secret@127.0.0.1:99999")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", [None, TOKEN[::-1]])
def test_no_token_or_a_wrong_one_is_an_error_before_anything_is_bought(serve, monkeypatch, token):
    if token:
        monkeypatch.setenv("RAYALIGN_ORACLE_TOKEN", token)
    url, sizes = serve(TOKEN)
    words = "is not accepted" if token else r"it wants a token, and \$RAYALIGN_ORACLE_TOKEN has none"
    with pytest.raises(OracleError, match=words) as caught:
        oracle(url)
    assert not token or token not in str(caught.value)
    assert sizes == []


def test_nothing_at_the_address_is_an_error_before_anything_is_bought():
    with pytest.raises(
        OracleError, match=r"oracle\.target=http://127.0.0.1:1 2 times \(oracle\.retries\).*Nothing was bought"
    ):
        oracle("http://127.0.0.1:1", retries=1)


@pytest.mark.parametrize(
    "target", ["", "127.0.0.1:8710", "ftp://host", "https://me:secret@host", "https://host?token=secret"]
)
def test_a_target_that_is_no_address_is_refused_and_secrets_in_it_are_not_repeated(target):
    with pytest.raises(ConfigError, match=r"oracle\.target") as caught:
        oracle_factory(OracleConfig(kind="http", target=target))
    assert "secret" not in str(caught.value)


def test_unencrypted_tokens_on_a_network_are_warned_about(caplog, monkeypatch):
    monkeypatch.setenv("RAYALIGN_ORACLE_TOKEN", TOKEN)
    with pytest.raises(OracleError):
        oracle("http://198.51.100.1:9", retries=0, timeout_s=0.2)
    assert "travels unencrypted" in caplog.text and TOKEN not in caplog.text


def test_each_run_asks_in_a_name_of_its_own_which_is_kept_beside_its_answers(misbehaving, tmp_path):
    """Two runs of one seed name their duels alike, and each is charged for its own."""
    url, seen = misbehaving(lambda n, path: answer("d0"))

    def caller(folder, **http):
        (tmp_path / folder).mkdir(exist_ok=True)
        asking = oracle(url, **http)
        asking.keep_in(tmp_path / folder)
        asking.judge(duels(1))
        return json.loads(seen[-1][0])["caller"]

    first = caller("run")
    assert len(first) == 32 and caller("run") == first != caller("other run")
    assert caller("run", caller="me") == "me"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["caller"]


def test_what_a_prompt_carries_travels_if_json_has_a_form_for_it(serve, misbehaving):
    url, seen = misbehaving(lambda n, path: answer("d0"))
    meta = {"subject": "rain", "messages": [{"role": "user", "content": "caf\u00e9 \ud800"}], "seen": {1, 2}}
    prompt = Prompt(id="p0", text="\ud800", token_ids=(1,), reference="r", meta=meta)
    response = Candidate(text="x", token_ids=(), logprobs=(), policy_version=0)
    asked = Duel(id="d0", batch=0, prompt=prompt, first=response, second=response)
    oracle(url).judge([asked])
    [row] = json.loads(seen[0][0])["duels"]
    assert row == {
        "id": "d0", "prompt": "?", "first": "x", "second": "x", "prompt_id": "p0", "reference": "r",
        "messages": [{"role": "user", "content": "caf\u00e9 ?"}], "data": {"subject": "rain"},
    }  # fmt: skip
    url, sizes = serve()
    assert len(oracle(url).judge([asked])) == 1 and sizes == [1], "the service takes it"
