"""The queue of duels: what is on disk, who is asked what, and what a crash can't take away."""

import random
import shutil
import threading

import pytest

from rayalign.errors import LabellingError, LedgerError
from rayalign.serve.labelling.aggregate import Agreement, agreement, by_dawid_skene, krippendorff_alpha, majority
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.types import Candidate, Duel, Prompt


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def duel(name, first="one", second="two"):
    def response(text):
        return Candidate(text=text, token_ids=(), logprobs=(), policy_version=0)

    prompt = Prompt(id="p", text=f"prompt of {name}", token_ids=())
    return Duel(id=name, batch=0, prompt=prompt, first=response(first), second=response(second))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_queue(tmp_path, clock):
    """Opens the queue of this test; closes the one that was open before, as a stopped process would."""
    opened = []

    def start(annotators=("ann", "bob"), path=tmp_path / "queue.arrow", **settings):
        while opened:
            opened.pop().close()
        opened.append(DuelQueue(path, annotators, clock=clock, **{"undo_s": 0.0, **settings}))
        return opened[-1]

    yield start
    for queue in opened:
        queue.close()


def test_a_duel_goes_to_as_many_annotators_as_asked_for_and_to_none_twice(open_queue):
    queue = open_queue(("ann", "bob", "cy"), annotators_per_duel=2)
    queue.put([duel("a"), duel("b"), duel("c")])
    given = []
    while tasks := {who: task for who in ("ann", "bob", "cy") if (task := queue.take(who))}:
        for who, task in tasks.items():
            given.append((task.duel, who))
            queue.answer(who, task.duel, "first")
    assert len(given) == len(set(given)) == 6
    assert sorted(name for name, _ in given) == ["a", "a", "b", "b", "c", "c"]


def test_the_majority_is_the_verdict_and_a_draw_is_a_tie(open_queue):
    queue = open_queue(("ann", "bob", "cy"), annotators_per_duel=3)
    votes = {"a": "first first second", "b": "first second tie", "c": "tie second second", "d": "tie tie first"}
    queue.put([duel(name) for name in votes])
    for name, choices in votes.items():
        assert queue.verdicts([name]) == {}
        for who, choice in zip(("ann", "bob", "cy"), choices.split(), strict=True):
            assert queue.take(who).duel == name
            queue.answer(who, name, choice)
    verdicts = queue.verdicts(votes)
    assert {name: verdict.probability for name, verdict in verdicts.items()} == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}


@pytest.mark.parametrize("votes", [["first", "second"], ["first", "first", "second", "second", "tie"]])
def test_no_order_of_the_votes_decides_a_draw(votes):
    assert majority(votes) == majority(votes[::-1]) == 0.5


def test_skipping_hands_the_duel_on_and_a_duel_that_all_skip_fails(open_queue):
    queue = open_queue()
    queue.put([duel("a"), duel("b")])
    assert queue.take("ann").duel == "a"
    queue.answer("ann", "a", "skip")
    assert queue.take("bob").duel == "a"
    queue.answer("bob", "a", "second")
    for who in ("ann", "bob"):
        assert queue.take(who).duel == "b"
        queue.answer(who, "b", "skip")
    verdicts = queue.verdicts(["a", "b"])
    assert (verdicts["a"].probability, verdicts["b"].probability) == (0.0, None)
    assert verdicts["b"].failure == "skipped by every annotator"
    assert queue.take("ann") is None


def test_fewer_votes_than_asked_for_count_when_everybody_else_has_skipped(open_queue):
    queue = open_queue(annotators_per_duel=2)
    queue.put([duel("a")])
    queue.take("ann"), queue.take("bob")
    queue.answer("ann", "a", "first")
    assert queue.verdicts(["a"]) == {}
    queue.answer("bob", "a", "skip")
    assert queue.verdicts(["a"])["a"].probability == 1.0


def test_an_abandoned_duel_is_given_to_somebody_else_and_the_late_answer_is_refused(open_queue, clock):
    queue = open_queue(lease_s=60)
    queue.put([duel("a")])
    assert queue.take("ann").duel == "a"
    clock.now += 59
    assert queue.take("bob") is None
    clock.now += 2
    assert queue.take("bob").duel == "a"
    with pytest.raises(LabellingError, match="given to somebody else"):
        queue.answer("ann", "a", "first")
    queue.answer("bob", "a", "second")
    assert queue.verdicts(["a"])["a"].probability == 0.0


def test_a_late_answer_counts_while_nobody_else_has_the_duel(open_queue, clock):
    queue = open_queue(lease_s=60)
    queue.put([duel("a")])
    queue.take("ann")
    clock.now += 3600
    queue.answer("ann", "a", "first")
    assert queue.take("bob") is None
    assert queue.verdicts(["a"])["a"].probability == 1.0


def test_a_reload_in_the_middle_shows_the_same_duel_again(open_queue):
    queue = open_queue()
    queue.put([duel("a"), duel("b")])
    task = queue.take("ann")
    assert queue.take("ann") == task
    assert queue.take("bob").duel == "b"
    queue = open_queue()
    assert queue.take("ann") == task
    assert queue.take("bob").duel == "b"


def test_an_answer_counts_only_when_it_can_not_be_undone_any_more(open_queue, clock):
    queue = open_queue(undo_s=20)
    queue.put([duel("a"), duel("b")])
    queue.take("ann")
    queue.answer("ann", "a", "first")
    assert queue.verdicts(["a"]) == {}
    queue.undo("ann", "a")
    queue.undo("ann", "a")  # the reply to the first was lost
    assert queue.take("ann").duel == "a"
    queue.answer("ann", "a", "second")
    assert queue.take("ann").duel == "b"
    queue.answer("ann", "b", "first")  # the next answer ends the chance to undo the one before
    with pytest.raises(LabellingError, match="can't be undone"):
        queue.undo("ann", "a")
    assert {n: v.probability for n, v in queue.verdicts(["a", "b"]).items()} == {"a": 0.0}
    clock.now += 20
    with pytest.raises(LabellingError, match="can't be undone"):
        queue.undo("ann", "b")
    assert queue.verdicts(["b"])["b"].probability == 1.0


def test_a_verdict_that_was_handed_out_is_never_taken_back_even_if_the_clock_is(open_queue, clock):
    queue = open_queue(undo_s=20)
    queue.put([duel("a")])
    queue.take("ann")
    queue.answer("ann", "a", "first")
    clock.now += 30
    assert queue.verdicts(["a"])["a"].probability == 1.0
    clock.now -= 30
    assert queue.undoable("ann") is None
    with pytest.raises(LabellingError, match="can't be undone"):
        queue.undo("ann", "a")
    assert open_queue(undo_s=20).put([duel("a")])["a"].probability == 1.0


def test_a_skip_can_be_undone_unless_somebody_else_was_asked_by_then(open_queue):
    queue = open_queue(undo_s=20)
    queue.put([duel("a")])
    queue.take("ann")
    queue.answer("ann", "a", "skip")
    queue.undo("ann", "a")
    assert queue.take("ann").duel == "a"
    queue.answer("ann", "a", "skip")
    assert queue.take("bob").duel == "a"
    with pytest.raises(LabellingError, match="is with somebody else"):
        queue.undo("ann", "a")


def test_the_same_answer_again_is_one_answer_and_another_one_is_refused(open_queue):
    queue = open_queue(annotators_per_duel=2)
    queue.put([duel("a")])
    queue.take("ann")
    queue.answer("ann", "a", "first")
    queue.answer("ann", "a", "first")
    assert queue.progress("ann").answered == 1
    with pytest.raises(LabellingError, match="has your answer"):
        queue.answer("ann", "a", "second")


@pytest.mark.parametrize(
    ("annotator", "name", "choice", "message"),
    [
        ("bob", "a", "first", "was not given to you"),
        ("ann", "nothing", "first", "was not given to you"),
        ("eve", "a", "first", "'eve' is not an annotator"),
        ("ann", "a", "left", "must be one of"),
    ],
)
def test_an_answer_that_nobody_asked_for_is_refused(open_queue, annotator, name, choice, message):
    queue = open_queue()
    queue.put([duel("a")])
    queue.take("ann")
    with pytest.raises(LabellingError, match=message):
        queue.answer(annotator, name, choice)


def test_which_response_is_left_is_drawn_by_annotator_and_duel_and_recorded(open_queue):
    queue = open_queue(annotators_per_duel=2)
    names = [f"duel-{i}" for i in range(40)]
    queue.put([duel(name) for name in names])
    left = {}
    for who in ("ann", "bob"):
        for name in names:
            task = queue.take(who)
            left[who, name] = task.left
            queue.answer(who, name, queue.choice_of(who, name, "left"))
    assert 10 < sum(text == "one" for (who, _), text in left.items() if who == "ann") < 30
    assert any(left["ann", name] != left["bob", name] for name in names)
    for name, verdict in queue.verdicts(names).items():
        both = {left["ann", name], left["bob", name]}
        assert verdict.probability == (0.5 if len(both) == 2 else float(both == {"one"}))
    reopened = open_queue(annotators_per_duel=2, seed=1)  # another seed: what was recorded holds
    assert all((left[who, n] == "one") == (reopened.choice_of(who, n, "left") == "first") for who, n in left)


def test_put_again_returns_what_was_answered_and_refuses_other_texts_under_the_same_id(open_queue):
    queue = open_queue()
    assert queue.put([duel("a")]) == {}
    queue.take("ann")
    queue.answer("ann", "a", "tie")
    assert queue.put([duel("a"), duel("b"), duel("b")])["a"].probability == 0.5
    assert queue.progress("ann").open == 1
    with pytest.raises(LabellingError, match="with other texts"):
        queue.put([duel("a", first="changed")])


def test_a_crash_at_any_byte_loses_nothing_that_was_acknowledged_and_asks_nothing_twice(open_queue, tmp_path, clock):
    queue = open_queue()
    path = tmp_path / "queue.arrow"
    queue.put([duel("a"), duel("b")])
    acknowledged = [(path.stat().st_size, {})]
    for name in ("a", "b"):
        queue.take("ann")
        queue.answer("ann", name, "second")
        acknowledged.append((path.stat().st_size, {n: "second" for n in ("a", "b")[: len(acknowledged)]}))
    queue.close()
    start = acknowledged[0][0]
    for size in range(start, path.stat().st_size + 1, 61):
        torn = tmp_path / "torn.arrow"
        shutil.copy(path, torn)
        with torn.open("ab") as file:
            file.truncate(size)
        expected = max((entry for entry in acknowledged if entry[0] <= size), key=lambda entry: entry[0])[1]
        again = open_queue(path=torn)
        assert again.progress("ann").answered == len(expected)
        while task := again.take("ann"):
            assert task.duel not in expected
            again.answer("ann", task.duel, "second")
        assert {n: v.probability for n, v in again.verdicts(["a", "b"]).items()} == {"a": 0.0, "b": 0.0}


def test_what_the_disk_refuses_has_not_happened(open_queue, monkeypatch):
    queue = open_queue()
    queue.put([duel("a")])
    queue.take("ann")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rayalign.ledger.arrow_log.os.fsync", full)
        with pytest.raises(LedgerError, match="No space left"):
            queue.answer("ann", "a", "first")
    assert queue.progress("ann").answered == 0
    queue.answer("ann", "a", "second")
    assert open_queue().verdicts(["a"])["a"].probability == 0.0


def test_annotators_at_the_same_time_get_every_duel_exactly_once(open_queue):
    people = [f"p{i}" for i in range(4)]
    queue = open_queue(people)
    names = [f"d{i}" for i in range(60)]
    queue.put([duel(name) for name in names])
    given, errors = [], []

    def work(who):
        try:
            while task := queue.take(who):
                given.append(task.duel)
                queue.answer(who, task.duel, "first")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert sorted(given) == sorted(names)
    assert len(queue.verdicts(names)) == len(names)


def test_agreement_counts_the_same_votes_on_shared_duels(open_queue):
    queue = open_queue(annotators_per_duel=2)
    queue.put([duel(name) for name in "abc"])
    for who, choices in {"ann": "first tie second", "bob": "first second skip"}.items():
        for choice in choices.split():
            queue.answer(who, queue.take(who).duel, choice)
    [pair], alpha = queue.agreement()
    assert pair == Agreement(annotators=("ann", "bob"), shared=2, agreed=1, kappa=pair.kappa)
    assert alpha == pytest.approx(alpha_by_hand([("first", "first"), ("tie", "second")]))
    progress = queue.progress("bob")
    assert (progress.answered, progress.skipped) == (2, 1)


def alpha_by_hand(pairs):
    """1 - D_o / D_e for two votes per duel, from the definition: values that differ, within and across duels."""
    values = [vote for pair in pairs for vote in pair]
    observed = sum(a != b for a, b in pairs) / len(pairs)
    across = [a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j]
    return 1 - observed / (sum(across) / len(across))


def test_agreement_beyond_chance_is_what_the_definitions_say():
    votes = ["first first", "first first", "second second", "tie second", "first second", "second second", "tie tie"]
    pairs = [tuple(line.split()) for line in votes]
    both = [{"ann": a, "bob": b} for a, b in pairs]
    [found] = agreement([*both, {"ann": "first"}])
    # Cohen 1960: p_o = 5/7; p_e = (3 * 2 + 2 * 4 + 2 * 1) / 49
    assert found.kappa == pytest.approx((5 / 7 - 16 / 49) / (1 - 16 / 49)) and (found.shared, found.agreed) == (7, 5)
    duels = {str(i): by for i, by in enumerate(both)} | {"alone": {"ann": "first"}}
    assert krippendorff_alpha(duels) == pytest.approx(alpha_by_hand(pairs))


def test_agreement_beyond_chance_is_not_defined_where_everybody_always_says_the_same():
    votes = {str(i): {"ann": "first", "bob": "first"} for i in range(3)}
    assert krippendorff_alpha(votes) is None and agreement(votes.values())[0].kappa is None
    assert krippendorff_alpha({"a": {"ann": "first"}}) is None and krippendorff_alpha({}) is None


def test_dawid_skene_believes_those_who_agree_with_others_and_not_the_majority_of_a_clique_of_guessers():
    """Three reliable people and two who guess: where the guessers and one of the others outvote two, two are right."""
    rng, truth, votes = random.Random(1), {}, {}
    for i in range(200):
        truth[str(i)] = rng.choice(["first", "second"])
        wrong = "first" if truth[str(i)] == "second" else "second"
        votes[str(i)] = {who: truth[str(i)] if rng.random() < 0.95 else wrong for who in ("ann", "bob", "cy")} | {
            who: rng.choice(["first", "second"]) for who in ("dan", "eve")
        }
    probability = {"first": 1.0, "second": 0.0}
    by_votes = sum(majority(by.values()) == probability[truth[name]] for name, by in votes.items())
    weighed = by_dawid_skene(votes, votes)
    assert sum(weighed[name] == probability[truth[name]] for name in votes) >= by_votes + 10


def test_dawid_skene_calls_a_draw_and_an_agreed_tie_a_tie():
    votes = {"drawn": {"ann": "first", "bob": "second"}, "tie": {"ann": "tie", "bob": "tie"}}
    assert by_dawid_skene(votes, ["drawn", "tie"]) == {"drawn": 0.5, "tie": 0.5}


def test_a_label_made_by_dawid_skene_is_settled_once_and_read_back(open_queue):
    people = ("ann", "bob", "cy")
    queue = open_queue(people, annotators_per_duel=3, aggregate=by_dawid_skene)
    names = [str(i) for i in range(12)]
    queue.put([duel(name) for name in [*names, "skipped"]])
    for i, name in enumerate([*names, "skipped"]):
        for who in people:
            assert queue.take(who).duel == name
            choice = "skip" if name == "skipped" else "second" if who == "cy" else ("first", "second")[i % 2]
            queue.answer(who, name, choice)
    before = queue.verdicts([*names, "skipped"])
    assert [before[name].probability for name in names] == [1.0, 0.0] * 6, "cy always says the same, whatever he sees"
    assert before["skipped"].failure == "skipped by every annotator"
    again = open_queue(people, annotators_per_duel=3, aggregate=lambda votes, duels: pytest.fail("settled already"))
    assert again.verdicts(names) == {name: before[name] for name in names}


def test_text_that_is_no_utf8_is_asked_all_the_same(open_queue):
    queue = open_queue()
    queue.put([duel("a", first="\ud800broken", second="nul \0")])
    task = queue.take("ann")
    assert {task.left, task.right} == {"?broken", "nul \0"}
    assert queue.put([duel("a", first="\ud800broken", second="nul \0")]) == {}
