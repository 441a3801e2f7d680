"""Users of a run's policy, as threads: they ask over real HTTP, and choose as a function of the texts says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass(frozen=True)
class Seen:
    """A reply: the question, the texts in the order in which they were shown, and the comparison's id."""

    prompt: str
    texts: tuple[str, ...]
    comparison: str


class User(threading.Thread):
    """Asks `prompts(i)` until `stop` is set and, where it gets two answers, says `choose(prompt, first, second)`.

    None is said by who leaves. `seen` are the replies, `said` the choices that were recorded, by comparison.
    """

    def __init__(
        self,
        port: int,
        prompts: Callable[[int], str],
        choose: Callable[[str, str, str], str | None],
        *,
        token: str = "",
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.prompts, self.choose, self.more = prompts, choose, dict(more or {})
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60)
        self.seen: list[Seen] = []
        self.said: dict[str, str] = {}
        self.refused: list[int] = []
        self.stop = threading.Event()
        self.start()

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response | None:
        """The reply, asked for again while nobody is there; None if it never came."""
        while not self.stop.is_set():
            try:
                reply = self.http.post(path, json=dict(body))
                if reply.status_code < 500:
                    return reply
            except httpx.HTTPError:
                pass
            self.stop.wait(0.1)
        return None

    def run(self) -> None:
        i = 0
        while not self.stop.is_set():
            prompt, i = self.prompts(i), i + 1
            messages = [{"role": "user", "content": prompt}]
            reply = self.post("/v1/chat/completions", {"model": "policy", "messages": messages, **self.more})
            if reply is None:
                return
            if reply.status_code != 200:
                self.refused.append(reply.status_code)
                self.stop.wait(0.1)
                continue
            answer = reply.json()
            texts = tuple(choice["message"]["content"] for choice in answer["choices"])
            name = answer.get("comparison", {}).get("id", "")
            self.seen.append(Seen(prompt, texts, name))
            if name and (choice := self.choose(prompt, *texts)) is not None:
                self.say(name, choice)

    def say(self, name: str, choice: str) -> int | None:
        """The status of a choice that is posted."""
        reply = self.post(f"/v1/comparisons/{name}", {"choice": choice})
        if reply is not None and reply.status_code == 200:
            self.said[name] = choice
        return None if reply is None else reply.status_code
