"""A whole run whose labels come over HTTP, from an oracle that `rayalign oracle` serves in a cluster of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import requests
from whole_runs import contents, spent

from rayalign.env import make_world
from rayalign.env.truth import TruthOracle
from rayalign.errors import OracleError
from rayalign.ledger.ledger import Ledger

TOKEN = "marker-token-of-the-served-oracle"
START_S = 150
BUDGET = 120  # a run that lasts longer than it takes to kill its oracle


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


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def asking(served, **more):
    return {"oracle": "http", "oracle.target": served.url, "oracle.http.token_file": str(served.token_file), **more}


@pytest.mark.timeout(400)
def test_a_run_is_labelled_over_http_and_survives_a_service_that_is_killed_and_started_again(
    served, small_run, tmp_path
):
    run_dir, bought = tmp_path / "run", []

    def lose_it_and_start_again():
        while spent(run_dir / "ledger.arrow") < 8:
            time.sleep(0.02)
        served.lose()
        bought.append(spent(run_dir / "ledger.arrow"))
        served.start()

    killer = threading.Thread(target=lose_it_and_start_again, daemon=True)
    killer.start()
    result = small_run(budget=BUDGET, **asking(served))
    killer.join(START_S)
    assert served.starts == 2 and bought[0] < BUDGET, "it was in the middle of the run"

    ledger, answers = Ledger(run_dir / "ledger.arrow", read_only=True), served.answers()
    assert result.labels_spent == ledger.spent == len(contents(run_dir)) == BUDGET
    assert len(answers) == len(set(answers)) == BUDGET + result.labels_spent_on_evaluation
    assert ledger.price == 0.5 * BUDGET, "at the service's price"
    truth = TruthOracle(make_world("rayalign/Tabular-v0"))
    labels = list(ledger.preferences())
    right = [verdict.probability for verdict in truth.judge([label.duel for label in labels])]
    assert [label.probability for label in labels] == pytest.approx(right)

    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert run_dir / "config.yaml" in files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_run_that_is_not_let_in_stops_before_anything_is_bought(served, small_run, tmp_path):
    before = len(served.answers())
    with pytest.raises(OracleError, match=r"it wants a token, and \$RAYALIGN_ORACLE_TOKEN has none"):
        small_run("run", budget=4, **asking(served, **{"oracle.http.token_file": ""}))
    assert spent(tmp_path / "run" / "ledger.arrow") == 0 and len(served.answers()) == before
