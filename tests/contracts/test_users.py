"""Users as the oracle of whole runs: who chooses is heard once, who leaves costs nothing; regret is what they saw."""

import re
import threading
import time
from contextlib import contextmanager

import openai
import pytest
from documents import ROOT, blocks
from made_runs import SEA
from online_users import User, free_port
from whole_runs import SMALL, Killer, contents, kill_driver, spent, start_driver

import rayalign
from rayalign.env import make_world
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.serve.config import OracleConfig
from rayalign.serve.oracles import oracle_factory

TOKENS = {"ann": "the-secret-of-ann-1", "bob": "the-secret-of-bob-2", "eve": "the-secret-of-eve-3"}
WORLD = make_world("rayalign/Tabular-v0")


@pytest.fixture(scope="module")
def cluster(cluster_without_serve):
    """An endpoint needs its port."""


def context(i):
    return f"choose for c{i % 16}"


def truthful(prompt, first, second):
    """The better arm of the two; a tie where they are the same."""
    a, b = (WORLD.reward(WORLD.find(prompt), text) for text in (first, second))
    return "tie" if a == b else "first" if a > b else "second"


@contextmanager
def chatting(*users):
    """Until the end of the block, `users` chat."""
    try:
        yield users
    finally:
        for user in users:
            user.stop.set()
        for user in users:
            user.join(timeout=60)


class Documented(threading.Thread):
    """Runs the client of the documents until it was asked to choose; `said` has the comparison's id."""

    def __init__(self, port):
        super().__init__(daemon=True)
        (client,) = [block.code for block in blocks(ROOT / "docs" / "online_users.md", "python") if block.why_not_run]
        assert "127.0.0.1:8701" in client
        self.code, self.said, self.stop = client.replace("8701", str(port)), {}, threading.Event()
        self.start()

    def run(self):
        while not self.stop.is_set() and not self.said:
            names = {}
            try:
                exec(self.code, names)
            except openai.OpenAIError:  # nobody is there yet, or has just been killed
                self.stop.wait(0.2)
            if names.get("comparison"):
                self.said = {names["comparison"]["id"]: names["choice"]}


def regret_by_hand(seen):
    """Best reward minus the mean of what was shown, over all replies."""
    total = 0.0
    for reply in seen:
        prompt = WORLD.find(reply.prompt)
        rewards = [WORLD.reward(prompt, text) for text in reply.texts]
        total += WORLD.best_reward(prompt) - sum(rewards) / len(rewards)
    return total


def labels_by_choice(run_dir):
    """Of each duel of the ledger: its label, and both texts in the duel's own order."""
    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    return {p.duel.id: (p.label, p.duel.first.text, p.duel.second.text) for p in ledger.preferences()}


def check_labels(users, bought):
    """Every label of the ledger is what a user said, whichever answer they saw first."""
    said = {name: choice for user in users for name, choice in user.said.items()}
    shown = {reply.comparison: reply.texts for user in users for reply in user.seen if reply.comparison}
    swapped = 0
    for name, (label, first, second) in bought.items():
        texts, choice = shown[name], said[name]
        assert sorted(texts) == sorted((first, second))
        if choice == "tie":
            assert label == 0.5
        else:
            winner = texts[0] if choice == "first" else texts[1]
            assert winner == (first if label == 1.0 else second)
        swapped += texts != (first, second)
    return swapped


def test_users_are_answered_and_what_they_choose_is_what_is_bought(small_run, tmp_path, capfd):
    """Ann chooses; Bob contradicts himself, skips and leaves; Eve takes one answer only, and wants others' choices."""
    port = free_port()
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    statuses, offered, lock = [], [], threading.Lock()

    def fickle(prompt, first, second):
        bob_turns = len(offered)
        with lock:
            offered.append(users["bob"].seen[-1].comparison)
        name = offered[-1]
        if bob_turns % 3 == 0:
            return None
        if bob_turns % 3 == 1:
            return "skip"
        users["bob"].say(name, "first")
        statuses.append(("again", users["bob"].say(name, "first")))
        statuses.append(("other", users["bob"].say(name, "second")))
        statuses.append(("eve", users["eve"].say(name, "first")))
        return None

    users = {
        "ann": User(port, context, truthful, token=TOKENS["ann"]),
        "bob": User(port, context, fickle, token=TOKENS["bob"]),
        "eve": User(port, context, truthful, token=TOKENS["eve"], more={"n": 1}),
    }
    settings = {
        "oracle": "users",
        "oracle.users.port": port,
        "oracle.users.tokens_file": str(tmp_path / "tokens"),
        "oracle.users.choose_within_s": 3.0,
        "logging.report": True,
    }
    with chatting(*users.values()):
        result = small_run(budget=26, **settings)
    assert f"http://127.0.0.1:{port}/v1" in capfd.readouterr().err

    bought = labels_by_choice(tmp_path / "run")
    assert result.labels_spent == len(bought) == 26, "the budget, exactly"
    assert result.history["asked"].to_pylist() == [4] * 6 + [2]
    assert 0 < check_labels(users.values(), bought) < 26, "which is shown first is a coin flip"
    said = {name: choice for user in users.values() for name, choice in user.said.items()}
    assert {name for name, choice in said.items() if choice != "skip"} == set(bought)
    assert set(statuses) == {("again", 200), ("other", 409), ("eve", 404)}
    assert not any(reply.comparison for reply in users["eve"].seen)

    seen = [reply for user in users.values() for reply in user.seen]
    online = result.online
    assert online["cumulative_regret"] == pytest.approx(regret_by_hand(seen))
    assert online["questions"] == online["known"] == len(seen)
    assert online["offered"] == sum(bool(reply.comparison) for reply in seen)
    assert online["chosen"] == 26 and online["skipped"] == list(said.values()).count("skip") > 0
    assert online["offered"] == 26 + online["skipped"] + online["expired"] + online["open"]
    by_batch = result.history["online/cumulative_regret"].to_pylist()
    assert by_batch == sorted(by_batch) and by_batch[-1] <= online["cumulative_regret"]
    page = (result.path / "report.html").read_text()
    assert "cumulative regret" in page and f"{online['questions']:,} answered" in page
    assert (result.path / "plots" / "online_regret.png").exists()
    written = [p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not [token for token in TOKENS.values() if any(token.encode() in content for content in written)]


def test_choices_outlive_the_collector_and_the_endpoint_and_sea_learns_from_them(small_run, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    # The endpoint last: on a slow machine a dozen labels are there before the driver has seen that all of Serve runs.
    killers = [Killer(run_dir, "ray::OnlineCollector", labels=6), Killer(run_dir, "ray::ServeReplica", labels=18)]
    settings = {"oracle.users.port": port, "oracle.users.choose_within_s": 3.0, "agent.gamma_burn_in": 8, **SEA}
    documented = Documented(port)
    with chatting(*(User(port, context, truthful) for _ in range(3)), documented) as (*users, _):
        result = small_run(budget=24, agent="sea", oracle="users", **settings)
    assert all(killer.killed for killer in killers)

    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    bought = [p for p in ledger.preferences() if p.source == "oracle"]
    labels = labels_by_choice(run_dir)
    assert result.labels_spent == ledger.spent == len(bought) == len({p.duel.id for p in bought}) == 24
    check_labels(users, {p.duel.id: labels[p.duel.id] for p in bought if p.duel.id not in documented.said})
    said = {name for user in (*users, documented) for name in user.said}
    assert documented.said
    assert said == {p.duel.id for p in bought}, "nobody chose in vain"
    assert result.history["agent/posterior_labels"].to_pylist()[-1] == 24
    assert any(p.source == "synthetic" for p in ledger.preferences()), "the posterior labels some pairs itself"
    assert result.online["chosen"] == 24
    assert result.online["cumulative_regret"] >= regret_by_hand([r for u in users for r in u.seen]) - 1e-6


def test_a_run_whose_driver_is_killed_is_resumed_with_all_that_users_chose(cluster, tmp_path):
    port, run_dir = free_port(), tmp_path / "run"
    settings = {**SMALL, "oracle.users.port": port, "oracle.users.choose_within_s": 3.0, "evaluation.every": 0}
    settings |= {"oracle": "users", "budget": 16, "run_dir": str(run_dir)}
    with chatting(*(User(port, context, truthful) for _ in range(2))) as users:
        driver = start_driver(tmp_path / "driver.py", "passive", **settings)
        deadline = time.monotonic() + 200
        while spent(run_dir / "ledger.arrow") < 5:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        kill_driver(driver)
        before = contents(run_dir)
        result = rayalign.resume(run_dir)
    assert contents(run_dir)[: len(before)] == before and len(before) < 16
    assert result.labels_spent == 16
    bought = labels_by_choice(run_dir)
    check_labels(users, bought)
    assert {name for user in users for name in user.said} == set(bought), "nobody chose in vain, or twice"


def test_settings_that_users_can_not_be_served_with_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"would flip a coin for every tie"):
        oracle_factory(OracleConfig(kind="users"))
    with pytest.raises(ConfigError, match=r"one endpoint, hence one replica"):
        oracle_factory(OracleConfig(kind="users", labels="deterministic", num_replicas=2))
    with pytest.raises(ConfigError, match=r"oracle\.users\.tokens_file is not set"):
        rayalign.run("passive", "rayalign/Tabular-v0", oracle="users", **{"oracle.users.host": "0.0.0.0"})
    run = {"env": "rayalign/Tabular-v0", "oracle": "users", "run_dir": tmp_path / "run", **SMALL}
    with pytest.raises(ConfigError, match=r"agent 'ae_dpo' works with pairs that the data has"):
        rayalign.run("ae_dpo", **{k: v for k, v in run.items() if not k.startswith("agent.")})
    with pytest.raises(ConfigError, match=r"loop\.sleep_engines=true"):
        rayalign.run("passive", **run, max_staleness=0, **{"loop.sleep_engines": True})
    assert not (tmp_path / "run").exists() and not spent(tmp_path / "run" / "ledger.arrow")
    assert re.match(r"choose for c\d+", context(3))
