"""A label is money: charged == recorded == answered, whatever goes wrong."""

import math
import os
import subprocess
import sys
import threading

import pytest

from rayalign.env.labels import draw_label, judge_late
from rayalign.errors import BudgetError, ConfigError, LedgerError, OracleError, WaitError
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.purchase import AnswerJournal, Purchaser
from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt, Verdict


def duel(name: str, batch: int = 0) -> Duel:
    first, second = (
        Candidate(text=f"{name}{i}", token_ids=(i,), logprobs=(-1.0,), policy_version=batch) for i in (1, 2)
    )
    return Duel(id=name, batch=batch, prompt=Prompt(id="p", text="P", token_ids=(1,)), first=first, second=second)


class Counting:
    """An oracle that counts what it is asked, with a hook to misbehave."""

    id = "counting/1"

    def __init__(self, probability=0.75, spoil=lambda verdicts: verdicts):
        self.probability, self.spoil, self.asked, self.answered = probability, spoil, [], 0

    def judge(self, duels):
        self.asked.extend(d.id for d in duels)
        verdicts = self.spoil([Verdict(duel_id=d.id, probability=self.probability, price=0.5) for d in duels])
        self.answered += sum(v.probability is not None for v in verdicts)
        return verdicts


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.arrow") as opened:
        yield opened


def desk(ledger, oracle, **settings) -> Purchaser:
    return Purchaser(ledger, oracle, **{"mode": "deterministic", "budget": 10, **settings})


def test_a_label_is_charged_recorded_and_answered_once(ledger):
    oracle = Counting()
    purchaser = desk(ledger, oracle)
    duels = [duel("a"), duel("b")]
    purchaser.commit(0, duels)
    preferences = purchaser.label(duels)
    assert preferences == [Preference(duel=d, label=1.0, probability=0.75) for d in duels]
    assert ledger.spent == oracle.answered == len(ledger.stream_batch(0)) == 2
    assert ledger.price == 1.0 and purchaser.remaining == 8


def test_asking_again_returns_the_answer_that_was_paid_for(ledger):
    oracle = Counting()
    purchaser = desk(ledger, oracle)
    purchaser.commit(0, [duel("a")])
    assert purchaser.label([duel("a"), duel("a")]) == purchaser.label([duel("a")]) * 2
    assert oracle.asked == ["a"] and ledger.spent == 1


@pytest.mark.parametrize("mode", ["bernoulli", "deterministic"])
def test_labels_are_drawn_from_the_probability_by_duel_and_seed(ledger, mode):
    duels = [duel(str(i)) for i in range(200)]
    purchaser = desk(ledger, Counting(0.3), mode=mode, seed=4, budget=200)
    purchaser.commit(0, duels)
    labels = [p.label for p in purchaser.label(duels)]
    assert labels == [draw_label(0.3, d.id, mode, 4) for d in duels]
    assert abs(sum(labels) / 200 - (0.3 if mode == "bernoulli" else 0)) < 0.1


def test_budget_is_refused_before_the_oracle_is_asked(ledger):
    oracle = Counting()
    purchaser = desk(ledger, oracle, budget=3)
    purchaser.commit(0, [duel("a"), duel("b")])
    with pytest.raises(BudgetError, match=r"only 1 are left.*0 spent, 2 on order"):
        purchaser.commit(1, [duel("c", 1), duel("d", 1)])
    assert oracle.asked == [] and ledger.num_collected == 1
    purchaser.label([duel("a"), duel("b")])
    purchaser.commit(1, [duel("c", 1)])
    purchaser.label([duel("c", 1)])
    with pytest.raises(BudgetError, match="only 0 are left"):
        purchaser.commit(2, [duel("e", 2)])
    assert ledger.spent == oracle.answered == 3


def test_synthetic_pairs_cost_nothing_and_never_reach_the_oracle(ledger):
    oracle = Counting()
    purchaser = desk(ledger, oracle, budget=1)
    synthetic = [Preference(duel=duel(str(i)), label=0.0, source=LabelSource.SYNTHETIC) for i in range(5)]
    purchaser.commit(0, [duel("a")], synthetic)
    purchaser.label([duel("a")])
    assert oracle.asked == ["a"] and ledger.spent == 1 and len(ledger.stream_batch(0)) == 6
    purchaser.commit(
        1, [], [Preference(duel=duel("t", 1), label=1.0, source=LabelSource.SYNTHETIC)]
    )  # nothing left, still fine
    assert purchaser.label([p.duel for p in synthetic])[0].label == 0.0 and oracle.asked == ["a"]


def test_a_failed_verdict_is_recorded_and_its_budget_is_free_again(ledger):
    def fail_b(verdicts):
        return [Verdict(duel_id="b", failure="no digit") if v.duel_id == "b" else v for v in verdicts]

    oracle = Counting(spoil=fail_b)
    purchaser = desk(ledger, oracle, budget=2)
    purchaser.commit(0, [duel("a"), duel("b")])
    assert [p and p.duel.id for p in purchaser.label([duel("a"), duel("b")])] == ["a", None]
    assert ledger.spent == oracle.answered == 1 and purchaser.remaining == 1
    assert ledger.known("b").failure == "no digit" and ledger.outstanding() == []
    assert purchaser.label([duel("b")]) == [None] and oracle.asked == ["a", "b"]  # a failure is final
    purchaser.commit(1, [duel("c", 1)])


@pytest.mark.parametrize("nonsense", [math.nan, -0.1, 1.5, math.inf])
def test_a_verdict_that_is_no_probability_names_oracle_and_duel_and_is_not_charged(ledger, nonsense):
    oracle = Counting(
        spoil=lambda vs: [Verdict(duel_id=v.duel_id, probability=nonsense) if v.duel_id == "b" else v for v in vs]
    )
    purchaser = desk(ledger, oracle)
    duels = [duel("a"), duel("b"), duel("c")]
    purchaser.commit(0, duels)
    with pytest.raises(OracleError, match=r"counting/1.*duel b.*probability="):
        purchaser.label(duels)
    assert ledger.spent == 2 and [d.id for d in ledger.outstanding()] == ["b"]  # a and c were answered, and are kept
    oracle.spoil = lambda verdicts: verdicts
    assert len(purchaser.label(duels)) == 3 and oracle.asked == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda vs: vs[:-1], "gave 1 verdicts for 2 duels"),
        (lambda vs: vs[::-1], "was asked duel a and answered b"),
        (lambda vs: [Verdict(duel_id=v.duel_id) for v in vs], "exactly one must be set"),
        (lambda vs: [Verdict(duel_id=v.duel_id, probability=1.0, failure="?") for v in vs], "exactly one must be set"),
        (lambda vs: [Verdict(duel_id=v.duel_id, probability=1.0, price=math.nan) for v in vs], "not a price"),
    ],
)
def test_a_muddled_reply_is_refused_whole_and_can_be_asked_again(ledger, spoil, message):
    oracle = Counting(spoil=spoil)
    purchaser = desk(ledger, oracle)
    duels = [duel("a"), duel("b")]
    purchaser.commit(0, duels)
    with pytest.raises(OracleError, match=message):
        purchaser.label(duels)
    assert ledger.spent == 0 and ledger.outstanding() == duels
    oracle.spoil = lambda verdicts: verdicts
    assert purchaser.recover() == 2 and ledger.spent == 2


def test_an_oracle_that_raises_loses_nothing(ledger):
    def down(verdicts):
        raise OracleError("oracle is down")

    oracle = Counting(spoil=down)
    purchaser = desk(ledger, oracle)
    purchaser.commit(0, [duel("a")])
    with pytest.raises(OracleError, match="down"):
        purchaser.label([duel("a")])
    assert ledger.committed == 1 and ledger.spent == 0 and ledger.outstanding() == [duel("a")]


def test_a_duel_that_was_never_committed_is_not_asked(ledger):
    oracle = Counting()
    with pytest.raises(LedgerError, match="never committed"):
        desk(ledger, oracle).label([duel("a")])
    assert oracle.asked == []


def test_a_resume_with_a_smaller_budget_asks_nothing(ledger):
    oracle = Counting()
    desk(ledger, oracle, budget=10).commit(0, [duel(str(i)) for i in range(4)])
    with pytest.raises(BudgetError, match="more than budget=3"):
        desk(ledger, oracle, budget=3).recover()
    assert oracle.asked == []


def test_evaluation_duels_are_asked_once_however_often_they_come(ledger):
    oracle = Counting()
    purchaser = desk(ledger, oracle, budget=None)
    for _ in range(2):
        purchaser.commit(None, [duel("a"), duel("a"), duel("b")])
        assert len(purchaser.label([duel("a"), duel("a"), duel("b")])) == 3
    assert oracle.asked == ["a", "b"] and ledger.spent == 2 and purchaser.remaining is None


# -- late oracles -------------------------------------------------------------------------------------------------
class Thinking:
    """A late oracle: `answers` has what people have said so far."""

    id = "thinking/1"

    def __init__(self, spoil=lambda verdicts: verdicts):
        self.asked, self.answers, self.spoil, self.enter = [], {}, spoil, lambda: None

    def poll(self, duels):
        self.enter()
        self.asked += [d.id for d in duels if d.id not in self.asked]
        return self.spoil([self.answers[d.id] for d in duels if d.id in self.answers])

    def judge(self, duels):
        raise AssertionError("nobody waits for a late oracle")

    def say(self, *names, probability=1.0):
        self.answers |= {name: Verdict(duel_id=name, probability=probability) for name in names}


def test_a_late_oracle_gets_its_duels_at_once_and_is_paid_as_answers_come(ledger):
    oracle = Thinking()
    purchaser = desk(ledger, oracle, late=True, budget=3)
    duels = [duel("a"), duel("b"), duel("c")]
    purchaser.commit(0, duels)
    assert purchaser.label(duels) == [None] * 3 and oracle.asked == ["a", "b", "c"]
    assert (ledger.spent, purchaser.remaining, purchaser.poll()) == (0, 0, 0), "what is on order is reserved"
    oracle.say("c")
    assert purchaser.poll() == 1 and purchaser.poll() == 0
    assert [p and p.label for p in purchaser.label(duels)] == [None, None, 1.0]
    oracle.say("a", probability=0.0)
    oracle.answers["b"] = Verdict(duel_id="b", failure="skipped")
    assert purchaser.poll() == 2 and (ledger.spent, ledger.num_outstanding, purchaser.remaining) == (2, 0, 1)
    assert {p.duel.id: p.label for p in ledger.stream_batch(0)} == {"a": 0.0, "c": 1.0}


def test_nobody_waits_while_a_late_oracle_is_asked(ledger):
    """The next batch is committed, and labels are looked up, while a poll is under way."""
    oracle, inside, go_on = Thinking(), threading.Event(), threading.Event()
    purchaser = desk(ledger, oracle, late=True)
    purchaser.commit(0, [duel("a")])
    purchaser.label([duel("a")])
    oracle.say("a")

    def stay():
        inside.set()
        assert go_on.wait(20)

    oracle.enter = stay
    thread = threading.Thread(target=purchaser.poll)
    thread.start()
    assert inside.wait(20)
    purchaser.commit(1, [duel("b", 1)])
    assert purchaser.remaining == 8
    go_on.set()
    thread.join(20)
    assert ledger.spent == 1 and [d.id for d in ledger.outstanding()] == ["b"]


def test_a_restarted_desk_asks_a_late_oracle_after_what_is_outstanding(ledger):
    oracle = Thinking()
    first = desk(ledger, oracle, late=True)
    first.commit(0, [duel("a"), duel("b")])  # and dies before anybody hears of it
    again = desk(ledger, oracle, late=True)
    assert again.recover() == 2 and oracle.asked == ["a", "b"] and ledger.spent == 0
    oracle.say("a", "b")
    assert again.poll() == 2 and desk(ledger, oracle, late=True).recover() == 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda vs: [*vs, *vs], "answered one twice"),
        (lambda vs: [Verdict(duel_id="zzz", probability=1.0)], "none of them: .*zzz"),
    ],
)
def test_a_late_reply_about_the_wrong_duels_is_refused_whole(ledger, spoil, message):
    oracle = Thinking(spoil)
    purchaser = desk(ledger, oracle, late=True)
    purchaser.commit(0, [duel("a")])
    oracle.say("a")
    with pytest.raises(OracleError, match=message):
        purchaser.label([duel("a")])
    assert ledger.spent == 0 and ledger.num_outstanding == 1
    oracle.spoil = lambda verdicts: verdicts
    assert purchaser.poll() == 1 and ledger.spent == 1


def test_waiting_for_a_late_oracle_ends_with_what_is_missing():
    oracle = Thinking()
    oracle.say("a")
    with pytest.raises(WaitError, match=r"thinking/1 to judge 1 of 2 duels, b among them"):
        judge_late(oracle, [duel("a"), duel("b")], timeout_s=0.0)
    oracle.say("b", probability=0.0)
    assert [v.probability for v in judge_late(oracle, [duel("b"), duel("a"), duel("b")], 5.0)] == [0.0, 1.0, 0.0]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"oracle\.labels='coin'"):
        Purchaser(None, Counting(), mode="coin")
    with pytest.raises(ConfigError, match="budget=0"):
        Purchaser(None, Counting(), budget=0)


# -- crashes ------------------------------------------------------------------------------------------------------
CRASHING_DESK = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from test_purchase import *
from rayalign.ledger.ledger import Ledger
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
oracle = JournalledOracle(sys.argv[1] + "/journal")
ledger = Ledger(sys.argv[1] + "/ledger.arrow")
purchaser = Purchaser(ledger, oracle, mode="bernoulli", seed=1, budget=4)
if sys.argv[2] == "between purchase and reply": oracle.leave = die
if sys.argv[2] == "between reply and record": ledger.answer = die
purchaser.commit(0, [duel("a"), duel("b")])
if sys.argv[2] == "before asking": die()
purchaser.label([duel("a"), duel("b")])
die()
"""


class JournalledOracle:
    """What a server does: look into the journal, buy the rest, write it down, reply."""

    id = "journalled/1"

    def __init__(self, folder):
        self.journal, self.bought, self.leave = AnswerJournal(folder), folder + "-bought", lambda: None

    def num_bought(self):
        with open(self.bought) as file:
            return len(file.read())

    def judge(self, duels):
        known = self.journal.lookup(d.id for d in duels)
        new = [Verdict(duel_id=d.id, probability=0.5, price=1.0) for d in duels if d.id not in known]
        with open(self.bought, "a") as file:
            file.write("x" * len(new))
        self.journal.record(new)
        self.leave()
        known |= {v.duel_id: v for v in new}
        return [known[d.id] for d in duels]


@pytest.mark.parametrize("moment", ["before asking", "between purchase and reply", "between reply and record", "after"])
def test_a_crash_at_any_moment_does_not_buy_twice(tmp_path, moment):
    here = os.path.dirname(__file__)
    killed = subprocess.run([sys.executable, "-c", CRASHING_DESK, str(tmp_path), moment, here], timeout=60)
    assert killed.returncode == -9
    oracle = JournalledOracle(str(tmp_path / "journal"))
    with Ledger(tmp_path / "ledger.arrow") as ledger:
        purchaser = Purchaser(ledger, oracle, mode="bernoulli", seed=1, budget=4)
        assert purchaser.recover() == (0 if moment == "after" else 2)
        assert ledger.spent == oracle.num_bought() == 2 and ledger.price == 2.0
        assert [p.label for p in ledger.stream_batch(0)] == [draw_label(0.5, n, "bernoulli", 1) for n in "ab"]
        assert purchaser.remaining == 2


# -- the journal --------------------------------------------------------------------------------------------------
def test_replicas_see_each_others_answers(tmp_path):
    one, two = AnswerJournal(tmp_path), AnswerJournal(tmp_path)
    one.record([Verdict(duel_id="a", probability=1 / 3, price=0.25)])
    assert two.lookup(["a", "b"]) == {"a": Verdict(duel_id="a", probability=1 / 3, price=0.25)}
    two.record([Verdict(duel_id="b", probability=0.0)])
    assert set(one.lookup(["a", "b"])) == {"a", "b"}


def test_failures_are_not_journalled_because_they_were_not_paid(tmp_path):
    journal = AnswerJournal(tmp_path)
    journal.record([Verdict(duel_id="a", failure="timeout")])
    assert journal.lookup(["a"]) == {}


def test_the_earlier_of_two_answers_holds(tmp_path):
    one, two = AnswerJournal(tmp_path), AnswerJournal(tmp_path)
    one.record([Verdict(duel_id="a", probability=0.1)])
    two.record([Verdict(duel_id="a", probability=0.9)])
    assert {j.lookup(["a"])["a"].probability for j in (one, two, AnswerJournal(tmp_path))} == {0.1}


def test_a_torn_line_is_not_an_answer_and_spoils_no_other(tmp_path):
    journal = AnswerJournal(tmp_path)
    journal.record([Verdict(duel_id="a", probability=0.1)])
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("ab") as torn:
        torn.write(b'{"duel_id": "b", "proba')
    again = AnswerJournal(tmp_path)
    assert set(again.lookup(["a", "b"])) == {"a"}
    again.record([Verdict(duel_id="b", probability=0.2)])
    assert set(AnswerJournal(tmp_path).lookup(["a", "b"])) == {"a", "b"}
