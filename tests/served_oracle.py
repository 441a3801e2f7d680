"""`rayalign oracle` in a cluster of its own, for runs that ask it over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import requests

TOKEN = "marker-token-of-the-served-oracle"
START_S = 150


class Served:
    """`rayalign oracle world`, which may be killed and started again: same port, same folder."""

    def __init__(self, folder):
        self.folder = folder
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self.start()

    def start(self):
        """Returns when it answers."""
        command = [
            *(sys.executable, "-m", "rayalign.cli", "oracle", "world", "--env", "rayalign/Tabular-v0"),
            *("--port", str(self.port), "--folder", "answers", "--token-file", "token"),
            *("--set", "oracle.price=0.5", "--set", "oracle.cpus_per_replica=0.1"),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        self.starts += 1
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self):
        """As a service manager does: exit code 0, and nothing of it is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, (self.folder / "log").read_text()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "a process outlives the service"

    def lose(self):
        """The power fails: command, Ray, proxy and replica at once."""
        family = [*psutil.Process(self.process.pid).children(recursive=True)]
        self.process.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(60)
        psutil.wait_procs(family, timeout=30)

    def answers(self):
        files = (self.folder / "answers").glob("answers-*.jsonl")
        return [json.loads(line)["duel_id"] for file in files for line in file.read_text().splitlines()]


def asking(served, **more):
    """Settings of a run that asks it."""
    return {"oracle": "http", "oracle.target": served.url, "oracle.http.token_file": str(served.token_file), **more}
