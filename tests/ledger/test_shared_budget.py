"""A cap on the labels of many runs: whatever they do at the same time, and whenever they die, it holds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayalign.errors import BudgetError, ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.purchase import Purchaser
from rayalign.ledger.shared_budget import INHERITED, SharedBudget, create, reserved
from rayalign.types import Candidate, Duel, Prompt, Verdict


def duel(name, batch=0):
    first, second = (Candidate(text=f"{name}{i}", token_ids=(i,), logprobs=(0.0,), policy_version=0) for i in (1, 2))
    return Duel(id=name, batch=batch, prompt=Prompt(id="p", text="P", token_ids=(1,)), first=first, second=second)


class Yes:
    id = "yes"

    def judge(self, duels):
        return [Verdict(duel_id=d.id, probability=1.0) for d in duels]


class Run:
    """A run that only buys."""

    def __init__(self, folder, cap_file, budget=100):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.arrow")
        shared = SharedBudget(cap_file, folder)
        self.desk = Purchaser(self.ledger, Yes(), "deterministic", budget=budget, shared=shared)

    def buy(self, wanted):
        batch = self.ledger.num_collected
        duels = [duel(f"{self.folder.name}-{batch}-{i}", batch) for i in range(self.desk.reserve(wanted))]
        self.desk.commit(batch, duels)
        self.desk.label(duels)
        return len(duels)


@pytest.fixture
def cap(tmp_path):
    create(tmp_path / "cap.jsonl", 20)
    return tmp_path / "cap.jsonl"


def test_two_runs_buy_no_more_than_their_cap(cap, tmp_path):
    a, b = Run(tmp_path / "a", cap), Run(tmp_path / "b", cap)
    assert [a.buy(8), b.buy(8), a.buy(8), b.buy(8)] == [8, 8, 4, 0]
    assert a.ledger.spent + b.ledger.spent == 20
    assert a.desk.remaining == 0 and a.desk.shut_out and b.desk.shut_out


def test_a_runs_own_budget_holds_too_and_it_is_not_called_shut_out_then(cap, tmp_path):
    run = Run(tmp_path / "a", cap, budget=6)
    assert (run.buy(8), run.desk.remaining, run.desk.shut_out) == (6, 0, False)


def test_what_was_reserved_and_not_bought_is_given_back_at_the_end(cap, tmp_path):
    a, b = Run(tmp_path / "a", cap), Run(tmp_path / "b", cap)
    a.desk.reserve(15)
    assert b.desk.reserve(15) == 5
    a.desk.shared.settle(a.ledger.committed)
    assert b.desk.reserve(15) == 15


def test_a_reservation_of_a_run_that_lives_is_never_taken_and_one_of_a_dead_run_is(cap, tmp_path):
    a, b = Run(tmp_path / "a", cap), Run(tmp_path / "b", cap)
    a.buy(3)
    a.desk.reserve(12)
    assert b.buy(20) == 5
    a.ledger.close()  # it died between reserve and commit: 3 of its 15 were bought
    assert b.buy(20) == 12
    assert reserved(cap) == {"a": 3, "b": 17}
    again = Run(tmp_path / "a", cap)
    assert (again.desk.remaining, again.buy(1)) == (0, 0)


def test_committing_more_than_is_left_is_refused_and_nothing_is_recorded(cap, tmp_path):
    a, b = Run(tmp_path / "a", cap), Run(tmp_path / "b", cap)
    a.buy(15)
    with pytest.raises(BudgetError):
        b.desk.commit(0, [duel(f"x{i}") for i in range(6)])
    assert b.ledger.committed == 0


def test_labels_that_a_copy_inherited_were_paid_by_the_run_it_is_a_copy_of(cap, tmp_path):
    a = Run(tmp_path / "a", cap)
    a.buy(8)
    a.ledger.close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ledger.arrow").write_bytes((tmp_path / "a" / "ledger.arrow").read_bytes())
    (tmp_path / "b" / INHERITED).write_text(json.dumps({"labels": 8}))
    b = Run(tmp_path / "b", cap)
    assert (b.buy(8), b.buy(8), b.buy(8)) == (8, 4, 0)  # 8 paid by a, 12 by b
    assert b.ledger.spent == 20 and reserved(cap) == {"a": 8, "b": 12}


def test_the_cap_can_be_raised_and_not_lowered(cap, tmp_path):
    run = Run(tmp_path / "a", cap)
    assert run.buy(30) == 20
    create(cap, 25)
    assert run.buy(30) == 5
    with pytest.raises(ConfigError, match="max_labels=24 is less than 25"):
        create(cap, 24)
    with pytest.raises(ConfigError, match="max_labels=0"):
        create(cap, 0)


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_stops_everything(cap, tmp_path):
    with cap.open("ab") as file:
        file.write(b'{"run": "a", "lab')
    run = Run(tmp_path / "a", cap)
    assert run.buy(8) == 8
    assert all(json.loads(line) for line in cap.read_text().splitlines())
    with cap.open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(BudgetError, match=r"line 3 of .* is damaged"):
        run.buy(1)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"loop\.shared_budget='.*' is not there"):
        SharedBudget(tmp_path / "none.jsonl", tmp_path)


BUYER = """
import random, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_shared_budget import Run
run = Run(Path(sys.argv[1]), Path(sys.argv[2]), budget=10_000)
print("ready", flush=True)
rng = random.Random(sys.argv[1])
while run.desk.remaining:
    run.buy(rng.randint(1, 7))
"""


def test_parallel_buyers_that_are_killed_and_come_back_spend_the_cap_to_the_last_label_and_no_more(tmp_path):
    cap = tmp_path / "cap.jsonl"
    create(cap, 400)
    code = BUYER.format(tests=str(Path(__file__).parent))

    def start(name):
        command = [sys.executable, "-c", code, str(tmp_path / name), str(cap)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    buyers = {name: start(name) for name in ("a", "b", "c")}
    for buyer in buyers.values():
        assert buyer.stdout.readline() == "ready\n", buyer.stderr.read()
    time.sleep(0.15)
    os.kill(buyers["a"].pid, signal.SIGKILL)  # somewhere between reserving, committing and answering
    buyers["a"].wait(30)
    again = start("a")
    for buyer in (buyers["b"], buyers["c"], again):
        assert buyer.wait(120) == 0, buyer.stderr.read()
    bought = {}
    for name in buyers:
        with Ledger(tmp_path / name / "ledger.arrow", read_only=True) as ledger:
            bought[name] = ledger.committed
    assert sum(bought.values()) == 400 == sum(reserved(cap).values())
