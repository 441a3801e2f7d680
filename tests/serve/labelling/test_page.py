"""The labelling page in a real browser against a real server."""

import socket
import threading
import time

import chromium
import pytest
import uvicorn

from rayalign.serve.labelling.app import build_app
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.labelling.tokens import Tokens
from rayalign.types import Candidate, Duel, Prompt

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed: apt-get install chromium")

TOKENS = {"ann": "the-secret-of-ann-1", "bob": "the-secret-of-bob-2"}
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def duel(name, first="one", second="two"):
    def response(text):
        return Candidate(text=text, token_ids=(), logprobs=(), policy_version=0)

    prompt = Prompt(id="p", text=f"prompt of {name}", token_ids=())
    return Duel(id=name, batch=0, prompt=prompt, first=response(first), second=response(second))


class Server:
    """The page over the queue in `folder`, on one port; `stop` and `start` are a restart."""

    def __init__(self, folder) -> None:
        self.folder, self.later_s = folder, 0.0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self):
        self.queue = DuelQueue(
            self.folder / "queue.arrow", TOKENS, undo_s=600, clock=lambda: time.time() + self.later_s
        )
        app = build_app(self.queue, Tokens(TOKENS))
        config = uvicorn.Config(app, port=self.port, log_config=None, timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.server.started

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=60)
        self.queue.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def shows(name):
    """The duel `name` is on the screen."""
    prompt = f"document.getElementById('prompt').innerText === 'prompt of {name}'"
    return f"({prompt} && !document.getElementById('task').hidden)"


def log_in(browser, server, name, **size):
    page = browser.page(server.url, **size)
    page.wait("document.activeElement && document.activeElement.id === 'token'")
    page.type(TOKENS[name])
    page.js("document.querySelector('#login button').click()")
    page.wait("!document.getElementById('work').hidden")
    assert page.js("getComputedStyle(document.getElementById('login')).display") == "none"
    return page


def test_two_annotators_answer_by_keyboard_and_mouse_and_undo(browser, server):
    server.queue.put([duel(name) for name in "abcd"])
    ann = log_in(browser, server, "ann")
    ann.wait(shows("a"))
    assert ann.js("document.activeElement.id") == "prompt-title"
    bob = log_in(browser, server, "bob")
    bob.wait(shows("b"))
    left = ann.js("document.getElementById('left').innerText")
    ann.press("1")
    ann.wait("document.getElementById('status').textContent === 'Saved: left.'")
    ann.wait(shows("c"))
    assert server.queue.progress("ann").answered == 1
    bob.js("document.querySelector('[data-choice=tie]').click()")
    bob.wait(shows("d"))
    ann.press("u")
    ann.wait(shows("a"))
    assert server.queue.progress("ann").answered == 0
    assert ann.js("document.getElementById('left').innerText") == left
    ann.press("ArrowRight")
    ann.wait(shows("c"))
    ann.press("s")
    ann.wait("document.getElementById('status').textContent === 'Saved: skip.'")
    server.queue.undo_s = 0
    verdicts = server.queue.verdicts(["a", "b"])
    assert verdicts["a"].probability == float(left == "two")
    assert verdicts["b"].probability == 0.5
    assert server.queue.progress("ann").skipped == 1
    assert ann.errors() == []


def test_a_reload_shows_the_same_duel_and_keeps_the_login(browser, server):
    server.queue.put([duel("a"), duel("b")])
    page = log_in(browser, server, "ann")
    page.wait(shows("a"))
    page.reload()
    page.wait("document.readyState === 'complete' && " + shows("a"))
    assert server.queue.progress("ann").answered == 0


def test_a_wrong_token_is_told_and_nothing_else_is_shown(browser, server):
    page = browser.page(server.url)
    page.wait("document.activeElement && document.activeElement.id === 'token'")
    page.type("not the token of anybody")
    page.js("document.querySelector('#login button').click()")
    page.wait("document.getElementById('problem').textContent.includes('not known')")
    assert page.js("document.getElementById('work').hidden")


def test_saved_is_said_only_after_a_killed_server_is_back_and_has_the_answer_once(browser, server):
    server.queue.put([duel("a"), duel("b")])
    page = log_in(browser, server, "ann")
    page.wait(shows("a"))
    server.stop()
    page.press("t")
    page.wait("document.getElementById('problem').textContent.includes('does not answer')")
    assert not page.js("document.getElementById('status').textContent.startsWith('Saved')")
    server.start()
    page.wait("document.getElementById('status').textContent === 'Saved: tie.'")
    page.wait(shows("b"))
    assert server.queue.progress("ann").answered == 1


def test_an_answer_after_somebody_else_got_the_duel_is_refused_and_the_next_one_is_shown(browser, server):
    server.queue.put([duel("a"), duel("b")])
    page = log_in(browser, server, "ann")
    page.wait(shows("a"))
    server.later_s = 1000.0  # she went for lunch
    assert server.queue.take("bob").duel == "a"
    page.press("1")
    page.wait("document.getElementById('problem').textContent.includes('given to somebody else')")
    page.wait(shows("b"))
    assert server.queue.progress("ann").answered == 0


FOCUSED = "document.activeElement.id || document.activeElement.dataset.choice || document.activeElement.tagName"


def test_the_keyboard_alone_is_enough_and_reaches_everything_in_reading_order(browser, server):
    server.queue.put([duel("a"), duel("b")])
    page = browser.page(server.url)
    page.wait("document.activeElement && document.activeElement.id === 'token'")
    page.type(TOKENS["ann"])
    page.press("Enter")
    page.wait(shows("a"))
    page.wait("document.activeElement.id === 'prompt-title'")
    stops = []
    for _ in range(8):
        page.press("Tab")
        stops.append(page.js(FOCUSED))
    assert stops == ["prompt", "left", "left", "right", "right", "tie", "skip", "shortcuts"], "nothing to undo yet"
    page.press(" ")  # no single keys from here on
    page.press("1")
    page.js("document.querySelector('[data-choice=tie]').focus()")
    page.press("1")
    assert server.queue.progress("ann").answered == 0
    page.press("Enter")
    page.wait("document.getElementById('status').textContent === 'Saved: tie.'")
    page.wait(shows("b"))
    assert page.js("document.activeElement.id") == "prompt-title", "a screen reader goes on with the next prompt"


def test_a_screen_reader_is_told_what_everything_is_and_what_happens(browser, server):
    server.queue.put([duel("a", first="first words", second="second words"), duel("b")])
    page = log_in(browser, server, "ann")
    page.wait(shows("a"))
    tree = page.tree()
    nameless = [node for node in tree if node.get("focusable") and not node["name"] and node["role"] != "RootWebArea"]
    assert not nameless, "controls without a name"
    named = {(node["role"], node["name"]): node for node in tree}
    assert ("textbox", "Your token") not in named, "the login is over"
    for title in ("Prompt", "Left response", "Right response"):
        assert ("heading", title) in named and named["region", title]["focusable"]
    for name, keys in {"Left is better 1": "1 ArrowLeft", "Tie t": "T", "Skip s": "S"}.items():
        assert named["button", name]["keyshortcuts"] == keys
    assert named["button", "Undo my last answer u"]["disabled"] is True
    assert {node["live"] for node in tree if node["role"] in ("status", "alert")} == {"polite", "assertive"}
    assert ("main", "") in named and ("banner", "") in named
    texts = [node["name"] for node in tree if node["role"] == "StaticText"]
    order = [texts.index(text) for text in ("prompt of a", page.js("left.textContent"), page.js("right.textContent"))]
    assert order == sorted(order)

    page.press("2")
    page.wait(shows("b"))
    told = [node for node in page.tree() if node["role"] == "StaticText" and node["name"] == "Saved: right."]
    assert told, "what was saved is said"
    server.stop()
    page.press("1")
    page.wait("document.getElementById('problem').textContent.includes('Trying again')")
    assert any(node["name"].startswith("The server does not answer") for node in page.tree())
    server.start()
    page.wait("!document.getElementById('waiting').hidden")
    assert page.js("document.activeElement.id") == "waiting"


def test_on_a_phone_everything_is_within_reach_of_a_thumb(browser, server):
    server.queue.put([duel("a", first="word " * 300, second="x" * 3000)])
    page = log_in(browser, server, "ann", width=360, height=640)
    page.wait(shows("a"))
    assert page.js("document.documentElement.scrollWidth <= 360")
    boxes = page.js(
        "[...document.querySelectorAll('button, label')].filter((e) => e.offsetParent)"
        ".map((e) => [e.textContent.trim(), e.offsetHeight, e.getBoundingClientRect().right])"
    )
    assert len(boxes) >= 7 and not [box for box in boxes if box[1] < 44 or box[2] > 360]


def test_hostile_responses_are_shown_as_text_with_what_is_invisible_marked(browser, server):
    override = "safe \u202egnitirw \u2066\u200bend\x1b"
    server.queue.put([duel("script", first=HOSTILE, second=HOSTILE), duel("bidi", first=override, second=override)])
    server.queue.put([duel("long", first="x" * 100_000, second="y " * 50_000)])
    page = log_in(browser, server, "ann", width=400, height=800)
    page.wait(shows("script"))
    assert page.js("document.getElementById('left').textContent") == HOSTILE
    assert page.js("document.getElementById('left').children.length") == 0
    page.press("t")
    page.wait(shows("bidi"))
    assert page.js("document.getElementById('right').textContent") == "safe U+202Egnitirw U+2066U+200BendU+001B"
    assert page.js("getComputedStyle(document.getElementById('right')).unicodeBidi") == "isolate"
    page.press("t")
    page.wait(shows("long"))
    for side in ("left", "right"):
        box = f"document.getElementById('{side}')"
        assert page.js(f"{box}.scrollHeight > {box}.clientHeight && {box}.scrollWidth <= {box}.clientWidth")
    assert page.js("document.documentElement.scrollWidth <= 400")
    tops = page.js("['left', 'right'].map((id) => document.getElementById(id).getBoundingClientRect().top)")
    assert tops[1] > tops[0] + 100, "the responses are not stacked on a phone"
    assert page.js("window.hacked") is None
    assert page.errors() == []


def test_the_policy_stops_an_injected_script(browser, server):
    page = browser.page(server.url)
    page.wait("document.activeElement && document.activeElement.id === 'token'")
    page.js(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        " document.body.append(s); })()"
    )
    assert page.js("window.hacked") is None
