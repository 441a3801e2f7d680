"""The oracle over HTTP under a real Ray Serve, asked by programs. Whole runs: tests/contracts/test_http_oracle.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
import requests
from ray import cloudpickle, serve
from whole_runs import processes

from rayalign.after.serving import serve_oracle
from rayalign.errors import ConfigError, OracleError
from rayalign.serve import OracleConfig
from rayalign.serve.http.client import HttpOracle
from rayalign.serve.http.config import HttpConfig
from rayalign.types import Candidate, Duel, Prompt, Verdict

pytestmark = pytest.mark.timeout(300)
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas can't import a test module

TOKEN = "marker-token-of-the-service-0123456789"


class Longer:
    """Prefers longer responses, slowly where the prompt says so; takes half a coin for each."""

    id = "longer"

    def judge(self, duels):
        for duel in duels:
            time.sleep(1.0 if duel.prompt.text == "slow" else 0.0)
        return [
            Verdict(duel_id=d.id, probability=float(len(d.first.text) > len(d.second.text)), price=0.5) for d in duels
        ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def service(folder):
    """Two replicas that ask for a token."""
    (folder / "token").write_text(TOKEN)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    settings = {"oracle.num_replicas": 2, "oracle.cpus_per_replica": 0.1, "service.max_duels": 100}
    try:
        with serve_oracle(
            Longer(), port=free_port(), folder=folder / "answers", token_file=folder / "token", **settings
        ) as server:
            yield server
    finally:
        serve.shutdown()
        ray.shutdown()


def duel(i, first="long one", second="short", prompt="q"):
    return {"id": f"d{i}", "prompt": prompt, "first": first, "second": second}


def post(service, duels, token=TOKEN, timeout=60.0):
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(f"{service.url}/v1/verdicts", json={"duels": duels}, headers=headers, timeout=timeout)


def answers(folder):
    return [
        json.loads(line)["duel_id"]
        for file in (folder / "answers").glob("answers-*.jsonl")
        for line in file.read_text().splitlines()
    ]


def test_programs_are_answered_and_what_they_ask_again_is_not_paid_again(service, folder):
    before = len(answers(folder))
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: post(service, [duel(i) for i in range(20)]).json(), range(8)))
    assert replies == [replies[0]] * 8
    assert replies[0]["oracle"] == service.oracle == "longer"
    third = {"id": "d3", "probability": 1.0, "failure": None, "price": 0.5, "pending": False}
    assert replies[0]["verdicts"][3] == third
    assert [v["id"] for v in replies[0]["verdicts"]] == [f"d{i}" for i in range(20)]
    assert len(answers(folder)) - before == 20, "eight programs at once, two replicas, twenty duels"


def test_without_the_token_and_beyond_the_limits_nothing_is_asked(service, folder):
    before = len(answers(folder))
    assert post(service, [duel("x")], token="wrong-token-0123456789").status_code == 401
    assert post(service, [duel(f"x{i}") for i in range(101)]).status_code == 422
    assert post(service, [duel("x", first="x" * 100_001)]).json()["error"]["param"] == "duels.0.first"
    assert requests.post(f"{service.url}/v1/verdicts", data=b"x" * (9 << 20), timeout=60).status_code in (401, 413)
    assert len(answers(folder)) == before
    schema = requests.get(f"{service.url}/openapi.json", timeout=60).json()
    assert schema["components"]["schemas"]["Question"]["properties"]["duels"]["maxItems"] == 100


def test_wrong_tokens_are_counted_by_the_address_that_shows_them(service):
    """Through Serve's proxy, too: 10 for each of the two replicas, and nobody else is stopped."""

    def show(token, address=None):
        headers = {"Authorization": f"Bearer {token}"} | ({"X-Forwarded-For": address} if address else {})
        return requests.get(f"{service.url}/v1/oracle", headers=headers, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        replies = [*pool.map(lambda _: show("wrong-token-0123456789", "10.9.9.9"), range(40))]
    assert {reply.status_code for reply in replies} == {401, 429}
    assert all(int(reply.headers["retry-after"]) > 0 for reply in replies if reply.status_code == 429)
    assert show(TOKEN).status_code == show(TOKEN, "10.9.9.8").status_code == 200
    assert show("wrong-token-0123456789").status_code == 401, "this machine's own address has its tries left"


def test_it_listens_on_loopback_alone(service):
    port = int(service.url.rpartition(":")[2])
    connections = psutil.net_connections("tcp")
    assert {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port} == {"127.0.0.1"}


def test_who_gives_up_is_answered_when_asking_again_and_takes_nobody_along(service, folder):
    """The first caller leaves while the oracle works; the second, who waits behind it, still gets its answer."""
    before, slow = len(answers(folder)), [duel("slow", prompt="slow"), duel("slow 2", prompt="slow")]

    def leave():
        with pytest.raises(requests.Timeout):
            post(service, slow, timeout=0.5)

    with ThreadPoolExecutor(2) as pool:
        left = pool.submit(leave)
        others = list(pool.map(lambda i: post(service, [duel(f"other {i}")]).status_code, range(4)))
        left.result()
    assert others == [200] * 4
    assert post(service, slow).status_code == 200
    charged = answers(folder)
    assert len(charged) - before == 6 and len(set(charged)) == len(charged)


def test_killed_replicas_lose_no_duel_of_a_program_and_charge_none_twice(service, folder):
    killed, over = set(), threading.Event()

    def kill():
        while not over.wait(2.0) and len(killed) < 2:
            for process in processes("ServeReplica:served-oracle")[:1]:
                killed.add(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    before = len(answers(folder))
    client = HttpOracle(
        OracleConfig(kind="http", target=service.url, http=HttpConfig(token_file=str(folder / "token"), timeout_s=20))
    )
    response = lambda text: Candidate(text=text, token_ids=(), logprobs=(), policy_version=0)  # noqa: E731
    prompt = Prompt(id="p", text="killed", token_ids=())
    duels = [Duel(id=f"k{i}", batch=0, prompt=prompt, first=response("x"), second=response("xx")) for i in range(400)]
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        verdicts = []
        for start in range(0, 400, 10):
            verdicts += client.judge(duels[start : start + 10])
            time.sleep(0.15)
    finally:
        over.set()
        killer.join()
    assert killed
    assert [(v.duel_id, v.probability) for v in verdicts] == [(d.id, 0.0) for d in duels]
    charged = answers(folder)
    assert len(charged) - before == 400 and len(set(charged)) == len(charged)


def test_the_token_is_in_no_file_of_the_service(service, folder):
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for place in (folder, session / "logs") for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == ["token"]


@pytest.mark.parametrize(
    ("what", "settings", "words"),
    [
        ("human", {"oracle.labels": "bernoulli"}, "would flip a coin for every tie"),
        ("users", {}, "belongs to a run"),
        ("data", {}, "belongs to a run"),
        ("world", {}, "name the environment"),
        ("world", {"env.seed": 1}, r"env\.seed is set, but no environment is named"),
        ("reward_modle", {}, "Did you mean 'reward_model'"),
        ("reward_model", {}, r"needs oracle\.target"),
        ("math:dist", {"host": "0.0.0.0"}, "there is no token"),
        ("math:dist", {"service.max_duel": 3}, r"Did you mean 'service\.max_duels'"),
    ],
)
def test_what_can_not_be_served_is_refused_before_anything_is_started(what, settings, words, tmp_path, monkeypatch):
    monkeypatch.delenv("RAYALIGN_ORACLE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=words), serve_oracle(what, folder=tmp_path / "answers", **settings):
        pass
    assert not (tmp_path / "answers").exists()


def test_the_command_refuses_an_open_address_without_a_token(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAYALIGN_ORACLE_TOKEN"}
    command = [sys.executable, "-m", "rayalign.cli", "oracle", "math:dist", "--host", "0.0.0.0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "can be reached from other machines" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_second_service_of_one_cluster_is_told_that_the_door_is_taken(service, tmp_path):
    with (
        pytest.raises(OracleError, match="runs on this cluster already"),
        serve_oracle(Longer(), port=free_port(), folder=tmp_path / "answers"),
    ):
        pass
