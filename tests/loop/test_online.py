"""The collector that users ask, in this process: what is offered, what is bought, and what a crash leaves."""

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from whole_runs import SMALL

from rayalign.env.truth import TruthOracle
from rayalign.errors import DataError, RayalignError, RolloutError
from rayalign.ledger.ledger import Ledger
from rayalign.loop import preparation
from rayalign.loop.online import OnlineCollector
from rayalign.rollout.encode import PromptEncoder
from rayalign.serve.users.book import Told
from rayalign.serve.users.oracle import UsersOracle
from rayalign.serve.users.questions import UserQuestion
from rayalign.types import Prompt


class Here:
    """An oracle of users whose collector is in this process."""

    late = False
    id = UsersOracle.id

    def __init__(self):
        self.collector, self.asked = None, []

    def judge(self, duels):
        self.asked += [duel.id for duel in duels]
        return UsersOracle(self.collector).judge(duels)


class Run:
    """A collector without Ray, Train or HTTP; nobody trains, so `max_staleness` says how many batches there can be."""

    def __init__(self, folder, agent="passive", **settings):
        given = SMALL | {"oracle.kind": "users", "loop.budget": 6, "loop.max_staleness": 9, "evaluation.every": 0}
        given |= {"evaluation.at_start": False, **settings}
        self.plan = preparation.new_run(agent, "rayalign/Tabular-v0", run_dir=folder, given=given)
        self.world, self.folder = self.plan.world, folder
        self.encoder = PromptEncoder(self.plan.config.policy)
        self.oracle = Here()
        self.collector = None

    def start(self):
        agent = type(self.plan.agent)(self.plan.config.agent)
        judge = TruthOracle(self.world)
        self.collector = self.oracle.collector = OnlineCollector(
            self.plan.config, self.world, agent, self.oracle, judge
        )
        return self.collector

    def crash(self):
        """As a kill would leave it: the thread is stopped where it is, and the files are let go of."""
        self.collector.interrupt("killed")
        self.collector._thread.join(60)
        self.collector.close()
        self.collector.ledger.close()
        self.collector.heldout.ledger.close()

    def ask(self, *contexts, comparable=True, n=1, seed=None, **sampling):
        sampling = self.plan.config.rollout.sampling(n=n, **sampling)
        questions = [
            UserQuestion(
                prompt=self.encoder.encode(Prompt(id="request", text=f"choose for c{c}", token_ids=())),
                sampling=sampling,
                comparable=comparable,
                seed=seed,
            )
            for c in contexts
        ]
        return self.collector.answer(questions)

    def wait_until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline and self.collector.failure is None, self.collector.error
            time.sleep(0.02)

    def bought(self):
        return Ledger(self.folder / "ledger.arrow", read_only=True)


@pytest.fixture
def users_run(tmp_path):
    """`users_run(agent, **settings)`: a started `Run`."""
    started = []

    def make(agent="passive", **settings):
        run = Run(tmp_path / "run", agent, **settings)
        run.start()
        started.append(run)
        run.wait_until(run.collector._ready.is_set)
        return run

    yield make
    for run in started:
        run.crash()


def test_no_comparison_is_offered_for_which_the_budget_might_not_last(users_run):
    run = users_run(**{"oracle.users.choose_within_s": 1.0})
    first = run.ask(*range(8))
    assert [bool(answer.comparison) for answer in first] == [True] * 6 + [False] * 2
    assert [len(answer.choices) for answer in first] == [2] * 6 + [1] * 2
    assert not run.ask(1)[0].comparison, "all that is left of the budget may still be chosen"
    assert run.collector.choose(first[0].comparison, "skip", "") is Told.RECORDED
    (again,) = run.ask(1)
    assert again.comparison, "a skip gives its label back"
    for answer in (*first[1:4], again):
        assert run.collector.choose(answer.comparison, "first", "") is Told.RECORDED
    run.wait_until(lambda: run.collector.ledger.spent == 4)
    run.wait_until(lambda: run.collector.book.num_open == 0)
    assert run.collector.choose(first[4].comparison, "first", "") is Told.EXPIRED
    last = run.ask(1, 2, 3)
    assert [bool(answer.comparison) for answer in last] == [True, True, False], "those that nobody chose are offered"
    for answer in last[:2]:
        run.collector.choose(answer.comparison, "tie", "")
    run.wait_until(lambda: run.collector.ledger.spent == 6)
    assert not run.ask(4)[0].comparison


def test_a_choice_that_is_being_written_keeps_its_place_in_the_budget(users_run, monkeypatch):
    run, fsync = users_run(), os.fsync
    answers = run.ask(*range(6))
    writing, go_on, asked = threading.Event(), threading.Event(), []

    def slow(file):
        writing.set()
        go_on.wait(60)
        fsync(file)

    monkeypatch.setattr("rayalign.ledger.arrow_log.os.fsync", slow)
    choosing = threading.Thread(target=run.collector.choose, args=(answers[0].comparison, "tie", ""))
    choosing.start()
    assert writing.wait(60)
    asking = threading.Thread(target=lambda: asked.extend(run.ask(7)))
    asking.start()
    time.sleep(0.5)  # by now it waits to know how many comparisons are open
    go_on.set()
    choosing.join(60)
    asking.join(60)
    assert not asked[0].comparison


def test_the_choice_is_of_the_answer_that_the_user_saw_there(users_run):
    run = users_run()
    answers = run.ask(*range(6))
    for answer in answers:
        run.collector.choose(answer.comparison, "first", "")
    run.wait_until(lambda: run.collector.ledger.spent == 6)
    labels = {p.duel.id: p for p in run.bought().preferences()}
    for answer in answers:
        preference = labels[answer.comparison]
        shown = preference.winner if preference.label == 1.0 else preference.loser
        assert (preference.winner.token_ids, preference.winner.text) == (
            answer.choices[0].token_ids,
            answer.choices[0].text,
        )
        assert shown is preference.duel.first
    assert {p.label for p in labels.values()} == {0.0, 1.0}, "the order in which they are shown is drawn"
    assert [d.batch for d in (p.duel for p in run.bought().preferences())] == [0] * 4 + [1] * 2


def test_while_the_learner_is_behind_users_are_answered_and_asked_nothing(users_run):
    run = users_run(**{"loop.max_staleness": 0})
    for answer in run.ask(*range(4)):
        run.collector.choose(answer.comparison, "second", "")
    run.wait_until(lambda: run.collector.ledger.spent == 4)
    began = time.monotonic()
    (answer,) = run.ask(5)
    assert not answer.comparison and len(answer.choices) == 1 and time.monotonic() - began < 5


def test_with_more_staleness_users_are_asked_for_as_many_batches_ahead(users_run):
    """Nobody trains: with `max_staleness=2` version 0 may generate batches 0, 1 and 2, and not one duel of batch 3."""
    run = users_run(**{"loop.max_staleness": 2, "loop.budget": 40})
    for batch in range(3):
        run.wait_until(lambda batch=batch: run.collector.ledger.spent == 4 * batch)
        answers = run.ask(*range(4))
        assert all(answer.comparison for answer in answers)
        for answer in answers:
            run.collector.choose(answer.comparison, "first", "")
    run.wait_until(lambda: run.collector.ledger.spent == 12)
    assert not run.ask(5)[0].comparison
    duels = [p.duel for p in run.bought().preferences()]
    assert {(d.batch, d.first.policy_version) for d in duels} == {(0, 0), (1, 0), (2, 0)}


def test_more_choices_than_a_batch_wait_for_the_next_one_and_close_the_gate(users_run):
    """With room for one version only, who chose beyond the batch is heard later; meanwhile no more is asked."""
    run = users_run(**{"loop.max_staleness": 0, "loop.budget": 12})
    answers = run.ask(*range(6))
    assert all(answer.comparison for answer in answers)
    for answer in answers:
        run.collector.choose(answer.comparison, "tie", "")
    run.wait_until(lambda: run.collector.ledger.spent == 4)
    assert run.collector.book.num_chosen == 2 and not run.ask(1)[0].comparison


def test_after_a_crash_what_was_chosen_and_not_bought_comes_first_in_its_order(users_run):
    run = users_run(**{"loop.batch_size": 3})
    answers = run.ask(*range(6))
    names = [answer.comparison for answer in answers]
    for i in (4, 1):
        assert run.collector.choose(names[i], "first", "") is Told.RECORDED
    regret = run.collector.book.numbers()["cumulative_regret"]
    run.crash()
    assert run.bought().spent == 0
    run.start()
    run.wait_until(run.collector._ready.is_set)
    assert run.collector.choose(names[4], "first", "") is Told.RECORDED, "a repeated post finds its choice"
    assert run.collector.choose(names[4], "tie", "") is Told.DIFFERENT
    assert run.collector.choose(names[0], "first", "") is Told.RECORDED, "an open comparison is still open"
    run.wait_until(lambda: run.collector.ledger.spent == 3)
    assert [p.duel.id for p in run.bought().preferences()] == [names[4], names[1], names[0]]
    assert run.collector.book.numbers()["cumulative_regret"] == regret


def test_a_crash_between_the_commit_and_the_label_asks_again_and_charges_once(users_run):
    run = users_run(**{"loop.batch_size": 3})
    names = [answer.comparison for answer in run.ask(*range(3))]
    judge, called = run.oracle.judge, threading.Event()

    def dies(duels):
        called.set()
        raise RolloutError("killed here")

    run.oracle.judge = dies
    for name in names:
        run.collector.choose(name, "tie", "")
    assert called.wait(60)
    run.crash()
    assert run.bought().num_outstanding == 3
    run.oracle.judge = judge
    run.start()
    run.wait_until(run.collector._ready.is_set)
    run.wait_until(lambda: run.collector.ledger.spent == 3)
    assert run.collector.book.num_chosen == 0 and run.oracle.asked == names


def test_regret_is_that_of_what_was_shown(users_run):
    run = users_run()
    answers = [*run.ask(0, 1), *run.ask(2, comparable=False), *run.ask(3, comparable=False, n=3)]
    total = 0.0
    for context, answer in enumerate(answers):
        utilities = run.world.utilities_PN[context]
        worth = [utilities[run.world.arms.index(choice.text)] for choice in answer.choices]
        total += utilities.max() - np.mean(worth)
    numbers = run.collector.book.numbers()
    assert numbers["cumulative_regret"] == pytest.approx(total) and numbers["questions"] == 4


def test_where_the_truth_is_not_known_no_regret_is_made_up(users_run, monkeypatch):
    run = users_run()
    monkeypatch.setattr(type(run.world), "find", lambda self, text: None)
    run.ask(0, 1)
    assert "cumulative_regret" not in run.collector.book.numbers()


def test_own_sampling_is_respected_and_a_seed_gives_the_same_answer(users_run):
    run = users_run()
    once, again = (run.ask(3, comparable=False, n=4, seed=11)[0] for _ in range(2))
    assert [c.text for c in once.choices] == [c.text for c in again.choices]
    greedy = run.ask(3, 3, 3, comparable=False, temperature=0.0)
    assert len({answer.choices[0].text for answer in greedy}) == 1


def test_a_prompt_that_can_not_be_used_is_an_error_of_its_question_and_a_broken_engine_of_the_run(users_run):
    run = users_run()
    generate = run.collector.engines.policy.generate

    def refuses(*_, **__):
        raise DataError("this prompt can't be used.")

    run.collector.engines.policy.generate = refuses
    (answer,) = run.ask(1)
    assert isinstance(answer, DataError) and run.collector.failure is None
    run.collector.engines.policy.generate = generate
    assert run.ask(1)[0].choices

    def breaks(*_, **__):
        raise RolloutError("replicas keep dying.")

    run.collector.engines.policy.generate = breaks
    (answer,) = run.ask(1)
    assert isinstance(answer, RayalignError) and isinstance(run.collector.failure, RolloutError)
    run.collector._thread.join(60)
    assert run.collector.phase == "failed"


def test_an_agent_that_labels_pairs_itself_shows_one_answer_and_keeps_the_pair_for_the_batch(users_run):
    settings = {
        "agent.num_candidates": 4,
        "agent.posterior.updates": 5,
        "agent.gamma_burn_in": 0,
        "agent.gamma_after": 0.5,
        "loop.batch_size": 2,
        "loop.budget": 2,
    }
    run = users_run("sea", **settings)
    answers = run.ask(*range(10))
    assert sum(bool(answer.comparison) for answer in answers) == 2
    assert 0 < run.collector.book.num_synthetic <= 2
    for answer in answers:
        if answer.comparison:
            run.collector.choose(answer.comparison, "first", "")
    run.wait_until(lambda: run.collector.ledger.spent == 2)
    sources = [p.source for p in run.bought().preferences()]
    assert sources.count("oracle") == 2 and "synthetic" in sources and run.collector.book.num_synthetic == 0


@pytest.mark.parametrize(("agent", "given"), [("xpo", {}), ("selm", {"agent.fresh": 3})])
def test_agents_that_sample_the_reference_or_rank_ask_a_user_one_thing_at_a_time(users_run, agent, given):
    run = users_run(agent, **given)
    answers = run.ask(*range(8))
    assert [bool(answer.comparison) for answer in answers] == [True] * 6 + [False] * 2
    assert all(c.source == "policy" for answer in answers[6:] for c in answer.choices), "nobody is served the reference"
    for answer in answers[:6]:
        run.collector.choose(answer.comparison, "first", "")
    run.wait_until(lambda: run.collector.ledger.spent == 6)
    duels = [p.duel for p in run.bought().preferences()]
    assert len({d.prompt.id for d in duels}) == 6
    for d in duels:
        assert (d.first.source, d.second.source) == ("policy", "reference" if agent == "xpo" else "policy")
        assert ("y_ref" in d.meta) == (agent == "xpo"), "what the loss needs travels with the duel"


@contextmanager
def held(lock):
    """Somebody else has the models."""
    holds, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            holds.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait(60)
    try:
        yield
    finally:
        release.set()
        thread.join(60)


def test_a_choice_is_recorded_while_the_models_are_at_work(users_run):
    run = users_run()
    (answer,) = run.ask(1)
    with held(run.collector.models):
        assert run.collector.choose(answer.comparison, "tie", "") is Told.RECORDED
        assert run.collector.status()["online"]["chosen"] == 1


def test_a_prompt_of_the_world_has_its_id_and_another_one_an_id_by_its_tokens(users_run):
    run = users_run()
    prompt = run.encoder.encode(Prompt(id="request", text="choose for c3", token_ids=()))
    assert run.collector._known(prompt).id == run.world.find("choose for c3").id
    other = replace(prompt, text="choose for nobody")
    assert run.collector._known(other).id.startswith("user-") and run.collector._known(other).reference is None
