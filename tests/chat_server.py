"""A small OpenAI-compatible server for tests, which can misbehave in the ways that servers do."""

import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEMPLATE = "P[{prompt}] F[{first}] S[{second}]"
"""A template whose parts `shown` finds again."""


def shown(body):
    """Prompt, first and second response of a request that was asked with `TEMPLATE`."""
    return re.fullmatch(r"P\[(.*)\] F\[(.*)\] S\[(.*)\]", body["messages"][0]["content"], re.DOTALL).groups()


# -- replies: what a behaviour returns ------------------------------------------------------------------------------
def say(text, **choice):
    """A completion of `text`."""
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return 200, {}, {"choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None, **choice}]}


def digit(p0):
    """A completion whose first token is 0 with probability `p0`, and otherwise 1."""
    likely = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (("0", p0), ("1", 1 - p0)) if p > 0]
    likely.sort(key=lambda row: -row["logprob"])
    return say(
        likely[0]["token"], logprobs={"content": [{**likely[0], "top_logprobs": likely}]}, finish_reason="length"
    )


def token(text):
    """A completion whose first token is `text`, though it is hardly likelier than 0."""
    likely = [{"token": text, "logprob": math.log(0.5)}, {"token": "0", "logprob": math.log(0.4)}]
    return say(text, logprobs={"content": [{**likely[0], "top_logprobs": likely}]})


def status(http, message="no", headers=None, **error):
    """An error as the protocol has it."""
    return http, headers or {}, {"error": {"message": message, **error}}


GARBAGE = (200, {}, b'{"choices": [{"mess')
NOT_JSON = (200, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>")
WRONG_SHAPE = (200, {}, {"choices": []})
CUT = "cut"
"""Promises more than it sends, then closes."""
SLAM = "slam"
"""Closes without an answer."""
HANG = "hang"
"""Never answers."""
DRIP = "drip"
"""Sends a byte of an answer now and then, and never all of it."""
DRIP_HEADERS = "drip headers"
"""The same of an answer's headers."""


class ChatServer:
    """`behaviour(body, n) -> reply`, where n counts the chat requests so far; knows `key` if one is given."""

    def __init__(self, behaviour, key=None):
        self.behaviour, self.key = behaviour, key
        self.bodies, self.most_at_once, self.times, self.cut_off = [], 0, [], 0
        self._now, self._mutex, self._over = 0, threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self._send(*(server._denied(self) or (200, {}, {"object": "list", "data": []})))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._mutex:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                try:
                    reply = server._denied(self) or server.behaviour(body, number)
                finally:
                    with server._mutex:
                        server._now -= 1
                self._send(*reply) if isinstance(reply, tuple) else self._misbehave(reply)

            def _send(self, code, headers, content):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def _drip(self, start):
                """`start`, then a byte every 50 ms, until the other side has had enough."""
                try:
                    self.wfile.write(start)
                    while not server._over.wait(0.05):
                        self.wfile.write(b"x")
                except OSError:
                    server.cut_off += 1

            def _misbehave(self, how):
                self.close_connection = True
                if how == HANG:
                    server._over.wait(30)
                if how in (DRIP, DRIP_HEADERS):
                    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    self._drip(start + (b"Content-Length: 100000\r\n\r\n" if how == DRIP else b"X-Slow: "))
                if how == CUT:
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _denied(self, handler):
        given = handler.headers.get("Authorization", "")
        if self.key is not None and given != f"Bearer {self.key}":
            return status(401, f"Incorrect API key provided: {given.removeprefix('Bearer ')}")
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
