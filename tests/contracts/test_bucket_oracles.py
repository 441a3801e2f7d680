"""Runs in a bucket with oracles that are paid: the machine is lost, and no label with it, and none is paid twice."""

import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from chat_server import TEMPLATE, ChatServer, digit, shown
from s3_server import bucket_of
from served_oracle import TOKEN, Served, asking
from whole_runs import SMALL, contents, kill_driver, start_driver

from rayalign.ledger.ledger import Ledger, fold
from rayalign.runs.result import Result
from rayalign.serve.judge_stats import judge_stats
from rayalign.storage import fetched
from rayalign.storage.log import recorded
from rayalign.storage.objects import Bucket

BUDGET = 24
SETTINGS = {"budget": BUDGET, "seed": 3, **SMALL, "evaluation.every": 0}
AT_ONCE = 2


@pytest.fixture
def uri(tmp_path):
    with bucket_of(tmp_path / "first machine") as uri:
        yield uri


@pytest.fixture
def machines(uri, tmp_path):
    """`machines(paid, **settings)`: runs until `paid()` answers are more than the ledgers have, which is eight or more
    labels, and the machine is lost with what the oracle's replica had written down of its verdicts. Goes on on another
    one; returns the labels before and the result."""
    bucket = Bucket(uri)

    def labels(name="ledger.arrow"):
        data = recorded(bucket, name)
        return fold(pa.ipc.open_stream(data)).spent if data else 0

    def run(paid, **settings):
        with (tmp_path / "shown").open("w") as out:
            driver = start_driver(tmp_path / "driver.py", "passive", out, run_dir=uri, **SETTINGS, **settings)
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and driver.poll() is None:
                known = labels()
                if known >= 8 and paid() > known + labels("evaluation.arrow"):
                    break
                time.sleep(0.005)
            kill_driver(driver)
            before = contents(fetched(uri))
            assert 8 <= len(before) < BUDGET, (tmp_path / "shown").read_text()
            bucket.delete(f"oracle/answers/{name}" for name in bucket.names("oracle/answers"))
            empty = {**os.environ, "RAYALIGN_CACHE": str(tmp_path / "second machine")}
            command = [sys.executable, "-m", "rayalign.cli", "resume", uri]
            done = subprocess.run(command, env=empty, stdout=out, stderr=out, check=False, timeout=300)
            assert done.returncode == 0, (tmp_path / "shown").read_text()
        result = Result.load(uri)
        after = contents(result.path)
        assert after[: len(before)] == before
        assert len(after) == len({row[0] for row in after}) == result.labels_spent == BUDGET
        return result

    return run


@pytest.mark.timeout(900)
def test_a_judges_answers_and_what_they_cost_outlive_its_machine(uri, machines, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-of-somebody")

    def prefer(body, n):
        time.sleep(0.02)
        _, first, second = shown(body)
        return digit(0.9 if first > second else 0.1 if first < second else 0.5)

    with ChatServer(prefer, key="sk-secret-of-somebody") as server:
        judge = {"base_url": server.url, "api_key_env": "A_KEY", "template": TEMPLATE, "price": 0.25}
        judge |= {"concurrency": AT_ONCE, "max_spend": 100.0}
        settings = {f"oracle.judge.{name}": value for name, value in judge.items()}
        result = machines(lambda: len(server.bodies) // 2, **{"oracle.kind": "judge", "oracle.target": "m"}, **settings)
        asked = len(server.bodies)
    stats = judge_stats(result.path / "oracle")
    duels = BUDGET + result.labels_spent_on_evaluation
    assert stats.answers == 2 * duels, "each duel in both orders"
    # Nobody can know whether a call that was under way when the power failed was billed: it counts, and is made again.
    assert 2 * duels <= asked <= 2 * duels + AT_ONCE
    assert asked <= stats.calls <= 2 * duels + AT_ONCE and stats.spent == 0.25 * stats.calls
    assert Ledger(result.path / "ledger.arrow", read_only=True).price >= 0.25 * 2 * BUDGET


@pytest.mark.timeout(900)
def test_an_oracle_over_http_knows_a_run_in_a_bucket_again_when_its_machine_is_lost(machines, uri, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    served = Served(folder)
    try:
        result = machines(lambda: len(served.answers()), **asking_in_words(served))
        answers = served.answers()
    finally:
        served.stop()
    assert len(answers) == len(set(answers)) == BUDGET + result.labels_spent_on_evaluation
    assert Ledger(result.path / "ledger.arrow", read_only=True).price == 0.5 * BUDGET
    bucket = Bucket(uri)
    assert TOKEN.encode() not in b"".join(bucket.get(name) or b"" for name in bucket.names(""))


def asking_in_words(served):
    """As settings of a driver of its own, which names the oracle's kind as a setting."""
    settings = asking(served)
    return {"oracle.kind": settings.pop("oracle"), **settings}
