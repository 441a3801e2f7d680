"""People as the oracle of a whole run: every label is an answer of somebody, and no answer is asked for twice."""

import json
import random
import re
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pyarrow as pa
import pytest
from whole_runs import SMALL, Killer, contents, kill_driver, spent, start_driver

import rayalign
from rayalign.after.serving import serve_oracle
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.runs.logs import read_timeline
from rayalign.serve.config import OracleConfig
from rayalign.serve.labelling.app import HEADERS
from rayalign.serve.labelling.config import HumanConfig
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.oracles import oracle_factory

TOKENS = {"ann": "the-secret-of-ann-1", "bob": "the-secret-of-bob-2"}


class Annotator(threading.Thread):
    """Logs in as `name` as soon as the page is there and votes until `stop` is set: for the later text of the two.

    `ponder(duel)` is called before each vote, and may take its time.
    """

    def __init__(self, name, port, token="", ponder=lambda duel: None):
        super().__init__(daemon=True)
        self.name_, self.token, self.ponder = name, token or TOKENS[name], ponder
        self.answers, self.stop = [], threading.Event()
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
            self.stop.wait(0.1)
        return {}

    def run(self):
        self.post("/api/login", token=self.token)
        while not self.stop.is_set():
            task = self.post("/api/next").get("task")
            if task is None:
                self.stop.wait(0.1)
                continue
            self.ponder(task["duel"])
            left, right = task["left"], task["right"]
            choice = "tie" if left == right else "left" if left > right else "right"
            if self.post("/api/answer", duel=task["duel"], choice=choice):
                self.answers.append(task["duel"])


@contextmanager
def answering(*people):
    """Until the end of the block, `people` answer."""
    try:
        yield people
    finally:
        for person in people:
            person.stop.set()
        for person in people:
            person.join(timeout=60)


def asked_and_answered(run_dir):
    """When each duel was put into the queue and answered, by the queue's own log: asked once, answered once."""
    puts, answers = {}, {}
    for batch in pa.ipc.open_stream(pa.memory_map(str(run_dir / "labelling" / "queue.arrow"))):
        for row in batch.to_pylist():
            seen = {"put": puts, "answer": answers}.get(row["event"], {})
            assert row["duel"] not in seen, f"{row['event']} twice"
            seen[row["duel"]] = row["time"]
    assert puts.keys() == answers.keys()
    return puts, answers


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(cluster_without_serve):
    """A page needs its port."""


def test_labels_charged_are_rows_of_the_ledger_are_duels_that_two_people_voted_on(small_run, tmp_path, capfd):
    port = free_port()
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    settings = {
        "oracle": "human",
        "oracle.human.port": port,
        "oracle.human.tokens_file": str(tmp_path / "tokens"),
        "oracle.human.annotators_per_duel": 2,
        "oracle.human.undo_s": 0.0,
        "evaluation.every": 0,
        "logging.report": True,
    }
    with answering(*(Annotator(name, port) for name in TOKENS)) as people:
        result = small_run(budget=12, max_staleness=0, **settings)
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
    [pair] = summary["agreement"]
    assert (pair["annotators"], pair["shared"], pair["agreed"]) == (["ann", "bob"], asked, asked)
    assert pair["kappa"] == summary["krippendorff_alpha"] == 1.0
    assert (
        f"agree on 100.0% of {asked} duels that both judged, Cohen&#39;s kappa 1.00"
        in (result.path / "report.html").read_text()
    )
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [token for token in TOKENS.values() if any(token.encode() in content for content in written)]

    waited = [(row["batch"], row["staleness"], row["outstanding"]) for row in result.history.to_pylist()]
    assert waited == [(0, 0, 4), (1, 0, 4), (2, 0, 4)], "with max_staleness=0 each batch is waited for"

    queue = DuelQueue(tmp_path / "run" / "labelling" / "queue.arrow", TOKENS, annotators_per_duel=2)
    assert len(queue.verdicts(bought)) == 12 and queue.progress("ann").settled == asked
    assert queue.progress("ann").open == 0
    queue.close()


def test_training_goes_on_while_people_think_and_whoever_is_killed(small_run, tmp_path):
    """Ann broods over one of the first duels until a policy was trained without her; the collector and the page die."""
    port, run_dir = free_port(), tmp_path / "run"
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    brooded, has_one = [], threading.Event()

    def brood(duel):
        has_one.set()
        deadline = time.monotonic() + 200
        while not brooded and time.monotonic() < deadline:
            if any(row["role"] == "learner" and row["stage"] == "learn" for row in read_timeline(run_dir)):
                brooded.append(duel)
            time.sleep(0.1)

    def wait_for_ann(duel):
        has_one.wait(60)
        time.sleep(random.random() / 5)

    brooding = Annotator("ann", port, ponder=brood)
    others = Annotator("bob", port, ponder=wait_for_ann)
    killers = [Killer(run_dir, "ray::ServeReplica", labels=6), Killer(run_dir, "ray::Collector", labels=12)]
    settings = {"oracle.human.port": port, "oracle.human.tokens_file": str(tmp_path / "tokens")}
    with answering(brooding, others):
        result = small_run(budget=24, oracle="human", **settings, **{"oracle.human.undo_s": 0.0})
    assert all(killer.killed for killer in killers)

    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    puts, answers = asked_and_answered(run_dir)
    evaluated = {p.duel.id for p in Ledger(run_dir / "evaluation.arrow", read_only=True).preferences()}
    bought = [p.duel for p in ledger.preferences()]
    assert result.labels_spent == ledger.spent == len(bought) == 24 == len(answers) - len(evaluated)
    assert sorted(brooding.answers + others.answers) == sorted(answers)

    open_long = next(duel for duel in bought if duel.id == brooded[0])
    learnt = min(row["end"] for row in read_timeline(run_dir) if (row["role"], row["stage"]) == ("learner", "learn"))
    assert open_long.batch == 0 and puts[open_long.id] < learnt < answers[open_long.id]
    streamed = [[p.duel for p in ledger.stream_batch(i)] for i in range(ledger.num_streamed)]
    assert open_long not in streamed[0] and any(duel.batch == 1 for duel in streamed[0]), "others took its place"
    staleness = [value for value in result.history["staleness"].to_pylist() if value is not None]
    assert len(staleness) >= 5, "but for the batch that the collector died of"
    assert [len(batch) for batch in streamed] == [4] * 6 and max(staleness) == 1
    versions = result.evaluations["version"].to_pylist()
    assert versions[-1] == 6, "the last answers are trained on"


def test_a_run_whose_driver_is_killed_while_people_think_is_resumed_and_asks_nobody_twice(cluster, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    settings = {**SMALL, "oracle.human.port": port, "logging.progress": "plain", "evaluation.every": 0}
    settings |= {"oracle": "human", "budget": 16, "seed": 3, "run_dir": str(run_dir)}
    driver = start_driver(tmp_path / "driver.py", "passive", (tmp_path / "shown.txt").open("w"), **settings)
    tokens = run_dir / "labelling" / "tokens"
    deadline = time.monotonic() + 200
    while not tokens.exists():
        assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "shown.txt").read_text()
        time.sleep(0.1)
    token = tokens.read_text().split()[1]
    with answering(Annotator("annotator", port, token)):
        while spent(run_dir / "ledger.arrow") < 5:
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "shown.txt").read_text()
            time.sleep(0.05)
    kill_driver(driver)
    before = contents(run_dir)
    assert 5 <= len(before) < 16
    assert re.search(  # "waiting for people" or "collecting", as it happens to be when a line is due
        rf": \d+/16 labels, \d+ duels in the queue, page at http://127\.0\.0\.1:{port}/",
        (tmp_path / "shown.txt").read_text(),
    )

    with answering(Annotator("annotator", port, token)):
        result = rayalign.resume(run_dir)
    assert result.labels_spent == len(contents(run_dir)) == 16
    labels = {row[0]: row[-1] for row in contents(run_dir)}
    assert all(labels[row[0]] == row[-1] for row in before)
    _, answers = asked_and_answered(run_dir)
    assert len(answers) == 16 + result.labels_spent_on_evaluation


def test_people_who_are_served_apart_label_a_run_and_judge_its_evaluation(small_run, tmp_path):
    port, apart = free_port(), tmp_path / "apart"
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    settings = {"oracle.human.tokens_file": str(tmp_path / "tokens"), "oracle.human.undo_s": 0.0}
    settings |= {"oracle.cpus_per_replica": 0.0}  # the run counts on both CPUs
    with (
        serve_oracle("human", port=port, folder=apart, **settings) as server,
        answering(*(Annotator(name, port) for name in TOKENS)) as people,
    ):
        assert f"http://127.0.0.1:{port}/ - log in with a token from {tmp_path / 'tokens'}" in server.notice
        for path, kind in (
            ("/", "text/html"),
            ("/static/page.css", "text/css"),
            ("/static/page.js", "text/javascript"),
        ):
            reply = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30)
            assert reply.status_code == 200 and reply.headers["content-type"].split(";")[0] == kind
            assert reply.headers.items() >= {name.lower(): value for name, value in HEADERS.items()}.items()
        asked = {"oracle.kind": "http", "oracle.target": server.url, "oracle.labels": "deterministic"}
        asked |= {f"evaluation.{name}": value for name, value in asked.items()}
        result = small_run(budget=8, max_staleness=1, **asked, **{"evaluation.every": 0, "evaluation.at_start": False})
    assert result.labels_spent == len(contents(tmp_path / "run")) == 8 and result.labels_spent_on_evaluation > 0
    for preference in Ledger(tmp_path / "run" / "ledger.arrow", read_only=True).preferences():
        first, second = preference.duel.first.text, preference.duel.second.text
        assert preference.label == (0.5 if first == second else float(first > second))
    queue = DuelQueue(apart / "labelling" / "queue.arrow", TOKENS)
    votes = sum(len(person.answers) for person in people)
    assert queue.progress("ann").settled == votes == 8 + result.labels_spent_on_evaluation, "each was asked once"
    queue.close()


def test_settings_that_would_flip_coins_or_split_the_queue_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"would flip a coin for every tie"):
        oracle_factory(OracleConfig(kind="human"))
    with pytest.raises(ConfigError, match=r"needs oracle\.human\.folder"):
        oracle_factory(OracleConfig(kind="human", labels="deterministic"))
    with pytest.raises(ConfigError, match=r"asks no others"):
        oracle_factory(
            OracleConfig(kind="human", labels="deterministic", human=HumanConfig(aggregate="dawid_skene", folder="x"))
        )
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
