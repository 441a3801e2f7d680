"""People as the oracle of a whole run: every label is an answer of somebody, and no answer is asked for twice."""

import json
import socket
import threading
import time

import httpx
import pytest
from whole_runs import contents

import rayalign
from rayalign.errors import ConfigError
from rayalign.ledger import Ledger
from rayalign.serve.config import OracleConfig
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.oracles import oracle_factory

TOKENS = {"ann": "the-secret-of-ann-1", "bob": "the-secret-of-bob-2"}


class Annotator(threading.Thread):
    """Logs in as `name` as soon as the page is there and votes until `stop` is set: for the later text of the two."""

    def __init__(self, name, port, most=10**9):
        super().__init__(daemon=True)
        self.name_, self.most, self.answers, self.stop = name, most, [], threading.Event()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        self.start()

    def post(self, path, **body):
        while not self.stop.is_set():
            try:
                reply = self.client.post(path, json=body)
                if reply.status_code == 200:
                    return reply.json()
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        return {}

    def run(self):
        self.post("/api/login", token=TOKENS[self.name_])
        while not self.stop.is_set() and len(self.answers) < self.most:
            task = self.post("/api/next").get("task")
            if task is None:
                time.sleep(0.1)
                continue
            left, right = task["left"], task["right"]
            choice = "tie" if left == right else "left" if left > right else "right"
            if self.post("/api/answer", duel=task["duel"], choice=choice):
                self.answers.append(task["duel"])


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_labels_charged_are_rows_of_the_ledger_are_duels_that_two_people_voted_on(small_run, tmp_path, capfd):
    port = free_port()
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    people = [Annotator(name, port) for name in TOKENS]
    settings = {
        "oracle": "human",
        "oracle.human.port": port,
        "oracle.human.tokens_file": str(tmp_path / "tokens"),
        "oracle.human.annotators_per_duel": 2,
        "oracle.human.undo_s": 0.0,
        "evaluation.every": 0,
    }
    try:
        result = small_run(budget=12, **settings)
    finally:
        for person in people:
            person.stop.set()
        for person in people:
            person.join(timeout=60)
    assert f"http://127.0.0.1:{port}/ - log in with a token from {tmp_path / 'tokens'}" in capfd.readouterr().err

    rows = contents(tmp_path / "run")
    bought = {row[0] for row in rows}
    assert result.labels_spent == len(rows) == len(bought) == 12
    evaluated = {p.duel.id for p in Ledger(tmp_path / "run" / "evaluation.arrow", read_only=True).preferences()}
    assert result.labels_spent_on_evaluation == len(evaluated) > 0 and not bought & evaluated
    asked = len(bought | evaluated)
    for person in people:
        assert sorted(person.answers) == sorted(bought | evaluated)
    for preference in Ledger(tmp_path / "run" / "ledger.arrow", read_only=True).preferences():
        first, second = preference.duel.first.text, preference.duel.second.text
        assert preference.label == (0.5 if first == second else float(first > second))

    summary = json.loads((tmp_path / "run" / "labelling" / "summary.json").read_text())
    assert summary["agreement"] == [{"annotators": ["ann", "bob"], "shared": asked, "agreed": asked}]
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [token for token in TOKENS.values() if any(token.encode() in content for content in written)]

    queue = DuelQueue(tmp_path / "run" / "labelling" / "queue.arrow", TOKENS, annotators_per_duel=2)
    assert len(queue.verdicts(bought)) == 12 and queue.progress("ann").settled == asked
    assert queue.progress("ann").open == 0
    queue.close()


def test_settings_that_would_flip_coins_or_split_the_queue_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"would flip a coin for every tie"):
        oracle_factory(OracleConfig(kind="human"))
    with pytest.raises(ConfigError, match=r"needs oracle\.human\.folder"):
        oracle_factory(OracleConfig(kind="human", labels="deterministic"))
    with pytest.raises(ConfigError, match=r"choose one"):
        oracle_factory(OracleConfig(kind="human"), custom=len)
    with pytest.raises(ConfigError, match=r"evaluation\.oracle\.kind='human' needs a page of its own"):
        rayalign.run(
            "passive",
            "rayalign/Tabular-v0",
            run_dir=tmp_path / "run",
            **{"evaluation.oracle": OracleConfig(kind="human", labels="deterministic")},
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"one replica"):
        oracle_factory(OracleConfig(kind="human", labels="deterministic", num_replicas=2))
