"""A headless Chromium, driven over its own DevTools protocol: no driver to install beside the browser."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from websockets.sync.client import connect

CODES = {"Tab": 9, "Enter": 13, " ": 32}
"""What the browser itself goes by, where it acts on a key."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find():
    """The browser that is installed, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser process with a profile in `folder`; `page()` opens a window that shares no cookies with others."""

    def __init__(self, folder: Path, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([find(), *flags, "about:blank"], start_new_session=True, **quiet)
        port_file = folder / "DevToolsActivePort"
        deadline = time.monotonic() + timeout_s
        while not (port_file.exists() and port_file.read_text().count("\n") == 1):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.close()
                raise TimeoutError(f"Chromium did not open its DevTools port within {timeout_s:g} s")
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        self.socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        self.events: list[dict] = []
        self._last = 0

    def call(self, method, session=None, **params):
        """The result of a DevTools command; events that arrive before it are kept in `events`."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            reply = json.loads(self.socket.recv(timeout=self.timeout_s))
            if reply.get("id") == self._last:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self.events.append(reply)

    def page(self, url, width=1200, height=900):
        """A new window at `url`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.call("Runtime.enable")
        page.call("Log.enable")
        page.call("Page.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        page.call("Page.navigate", url=url)
        return page

    def close(self) -> None:
        """End the browser and all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)


class Page:
    """A window."""

    def __init__(self, browser, session) -> None:
        self.browser, self.session = browser, session

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def js(self, expression):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, timeout_s=60.0):
        """Wait until the expression is true; the error shows what the page says instead."""
        deadline = time.monotonic() + timeout_s
        while not self.js(expression):
            shown = self.js("document.body ? document.body.innerText.slice(0, 600) : ''")
            assert time.monotonic() < deadline, f"waited for {expression}, but the page says: {shown}"
            time.sleep(0.05)

    def press(self, key):
        """Press and release a key, wherever the focus is."""
        text = {"text": {"Enter": "\r"}.get(key, key)} if len(key) == 1 or key == "Enter" else {}
        code = {"windowsVirtualKeyCode": CODES[key]} if key in CODES else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def tree(self):
        """What a screen reader is given: role, name and properties of everything that is not ignored, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            {
                "role": node["role"]["value"],
                "name": node.get("name", {}).get("value", "").strip(),
                **{p["name"]: p["value"].get("value") for p in node.get("properties", ())},
            }
            for node in nodes
            if not node["ignored"]
        ]

    def type(self, text):
        """Put text where the focus is."""
        self.call("Input.insertText", text=text)

    def reload(self):
        self.call("Page.reload")

    def errors(self):
        """What the console complained of in all windows: exceptions and refused content."""
        self.js("1")
        return [
            e["params"]
            for e in self.browser.events
            if e["method"] == "Runtime.exceptionThrown"
            or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["source"] == "security")
        ]
