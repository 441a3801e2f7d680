"""The pictures in `docs/images`, taken of the real pages in a real browser.

    python docs/screenshots.py [--out docs/images]

Needs Chromium (`apt-get install chromium`). Run it when the labelling page or the report looks different, and look at
what changed before you commit it.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Chromium, Page  # noqa: E402 - the tests' own driver, found through the line above

from rayalign.serve.labelling.app import build_app  # noqa: E402
from rayalign.serve.labelling.queue import DuelQueue  # noqa: E402
from rayalign.serve.labelling.tokens import Tokens  # noqa: E402
from rayalign.types import Candidate, Duel, Prompt  # noqa: E402

REPORT = ROOT / "docs" / "results" / "haiku_smollm2_sea_seed2.html"
TOKENS = {"ann": "the-secret-of-ann-1"}
PROMPT = "Write a haiku about a lighthouse. Answer with the poem alone."
RESPONSES = (
    "A lighthouse at dusk,\nits slow beam crosses the bay\nand finds one small boat.",
    "The lighthouse is a tall tower that stands by the sea and helps ships find their way at night.",
)
DUEL, LOGIN = "!document.getElementById('task').hidden", "document.activeElement.id === 'token'"


def main(arguments: list[str] | None = None) -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description="Take the pictures of the documentation again.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the PNG files")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, labelling_page(Path(folder)) as url:
        browser = Chromium(Path(folder) / "profile")
        try:
            take(logged_in(browser.page(url, width=1000, height=640)), out / "labelling.png")
            take(logged_in(browser.page(url, width=390, height=844)), out / "labelling_phone.png")
            report = browser.page(REPORT.as_uri(), width=1000, height=760)
            report.wait("document.readyState === 'complete'")
            take(report, out / "report.png")
        finally:
            browser.close()


def logged_in(page: Page) -> Page:
    """The page with its first duel."""
    page.wait(f"document.activeElement && {LOGIN}")
    page.type(TOKENS["ann"])
    page.js("document.querySelector('#login button').click()")
    page.wait(f"document.getElementById('task') && {DUEL}")
    return page


def take(page: Page, path: Path) -> None:
    """What the window shows, in 64 colours: enough for text and lines, and a fifth of the size."""
    data = base64.b64decode(page.call("Page.captureScreenshot", format="png")["data"])
    Image.open(io.BytesIO(data)).convert("RGB").quantize(64).save(path, optimize=True)


@contextmanager
def labelling_page(folder: Path) -> Iterator[str]:
    """Its address; one duel waits for a judgement."""
    queue = DuelQueue(folder / "queue.arrow", TOKENS, undo_s=600)
    first, second = (Candidate(text=text, token_ids=(), logprobs=(), policy_version=0) for text in RESPONSES)
    prompt = Prompt(id="p", text=PROMPT, token_ids=())
    queue.put([Duel(id="d", batch=0, prompt=prompt, first=first, second=second)])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(queue, Tokens(TOKENS)), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("the labelling page did not start within 60 s")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(timeout=60)
    queue.close()


if __name__ == "__main__":
    main()
