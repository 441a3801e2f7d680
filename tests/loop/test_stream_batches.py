"""What is trained on together: a fold over the ledger's events, checked against its definition by brute force."""

import random

import pytest

from rayalign.ledger.ledger import Ledger, fold
from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt, Verdict


def duel(name: str, batch: int) -> Duel:
    candidate = Candidate(text=name, token_ids=(1,), logprobs=(-1.0,), policy_version=batch)
    prompt = Prompt(id=name, text=name, token_ids=(1,))
    return Duel(id=name, batch=batch, prompt=prompt, first=candidate, second=candidate)


def commit(ledger: Ledger, asked: int, synthetic: int = 0) -> list[str]:
    """The next batch; returns the ids of the duels that are asked."""
    batch = ledger.num_collected
    names = [f"{batch}.{slot}" for slot in range(asked)]
    own = [
        Preference(duel=duel(f"{batch}.own{slot}", batch), label=1.0, source=LabelSource.SYNTHETIC)
        for slot in range(synthetic)
    ]
    ledger.commit(batch, [duel(name, batch) for name in names], own)
    return names


def answer(ledger: Ledger, names: list[str], failed: frozenset[str] = frozenset()) -> None:
    verdicts = [
        Verdict(duel_id=name, **({"failure": "?"} if name in failed else {"probability": 1.0})) for name in names
    ]
    ledger.answer(verdicts, [None if name in failed else 1.0 for name in names], oracle="test")


def stream(ledger: Ledger) -> list[list[str]]:
    return [[p.duel.id for p in ledger.stream_batch(i)] for i in range(ledger.num_streamed)]


def by_definition(ledger: Ledger) -> list[list[str]]:
    """The stream batches, from the events alone and without any cleverness."""
    batches, outcomes, place = [], [], {}
    for message in ledger.events():
        for event, name in zip(message["event"].to_pylist(), message["duel_id"].to_pylist(), strict=True):
            if event == "batch":
                batches.append(([], []))
            elif event == "requested" or event == "synthetic":
                place[name] = len(place)
                batches[-1][event == "synthetic"].append(name)
            else:
                outcomes.append((event, name))
    closed, start = [], 0
    for asked, own in batches:
        end = start + len(asked)
        if len(outcomes) < end:
            break
        answered = [name for event, name in outcomes[start:end] if event == "answered"]
        closed.append(sorted([*answered, *own], key=place.__getitem__))
        start = end
    return closed


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.arrow") as opened:
        yield opened


def test_an_oracle_that_answers_at_once_makes_stream_batches_of_collected_ones(ledger):
    answer(ledger, commit(ledger, 3, synthetic=1))
    assert stream(ledger) == [["0.0", "0.1", "0.2", "0.own0"]]
    answer(ledger, commit(ledger, 2), failed=frozenset({"1.0", "1.1"}))  # all failed: an empty batch, and no step
    commit(ledger, 0, synthetic=1)  # nobody is asked: nobody is waited for
    commit(ledger, 0)
    assert stream(ledger)[1:] == [[], ["2.own0"], []]
    answer(ledger, commit(ledger, 2), failed=frozenset({"4.0"}))
    assert stream(ledger)[4:] == [["4.1"]]
    assert [ledger.labels_before(i) for i in range(7)] == [0, 3, 3, 3, 3, 4, 4]


def test_late_answers_fill_stream_batches_in_the_order_in_which_they_come(ledger):
    commit(ledger, 4)
    commit(ledger, 4, synthetic=1)
    answer(ledger, ["0.1", "1.3"])
    answer(ledger, ["0.0"])
    assert ledger.num_streamed == 0
    answer(ledger, ["1.0", "0.3", "0.2"], failed=frozenset({"0.3"}))  # the first of these completes batch 0
    assert stream(ledger) == [["0.0", "0.1", "1.0", "1.3"]]
    assert ledger.labels_before(1) == 4 and ledger.labels_before(2) == ledger.spent == 5
    answer(ledger, ["1.1", "1.2"])
    assert stream(ledger)[1] == ["0.2", "1.1", "1.2", "1.own0"]  # one short: a failure is not made up for
    assert ledger.num_streamed == ledger.num_collected == 2


def test_duels_asked_aside_are_in_no_batch(ledger):
    ledger.commit(None, [duel("aside", 0)])
    names = commit(ledger, 2)
    answer(ledger, ["aside", names[1]])
    assert ledger.num_streamed == 0 and ledger.num_outstanding == 1
    answer(ledger, [names[0]])
    assert stream(ledger) == [names] and ledger.labels_before(1) == 2 and ledger.spent == 3


@pytest.mark.parametrize("seed", range(30))
def test_the_fold_is_the_definition_whatever_comes_when_and_closed_batches_never_change(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "ledger.arrow"
    ledger, open_, seen = Ledger(path), [], []
    for _ in range(40):
        if rng.random() < 0.4:
            open_ += commit(ledger, rng.choice([0, 1, 3, 4]), synthetic=rng.choice([0, 0, 2]))
        elif open_:
            rng.shuffle(open_)
            some = [open_.pop() for _ in range(rng.randint(1, len(open_)))]
            answer(ledger, some, failed=frozenset(name for name in some if rng.random() < 0.3))
        now = stream(ledger)
        assert now == by_definition(ledger) and now[: len(seen)] == seen
        assert len(now) <= ledger.num_collected and (open_ or len(now) == ledger.num_collected)
        seen = now
        if rng.random() < 0.2:  # a crash: the file alone says it all
            ledger.close()
            ledger = Ledger(path)
            assert stream(ledger) == seen
    answer(ledger, open_)
    labelled = sorted(p.duel.id for p in ledger.preferences())
    assert sorted(name for batch in stream(ledger) for name in batch) == labelled
    index = fold(ledger.events())
    assert index.stream_labels[-1] == ledger.labels_before(ledger.num_streamed) == ledger.spent
    ledger.close()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_the_gate_always_opens_again_and_bounds_what_is_outstanding(seed, max_staleness, tmp_path):
    """A collector, a learner and people in random order: failures, short batches and all."""
    rng = random.Random(seed)
    with Ledger(tmp_path / "ledger.arrow") as ledger:
        size, published, open_, steps = 4, 0, [], 0
        while ledger.num_collected < 25:
            steps += 1
            assert steps < 5000, "nobody can go on"
            who = rng.choice(["collector", "learner", "people"])
            if who == "collector" and ledger.num_collected - published <= max_staleness:
                open_ += commit(ledger, rng.randint(0, size), synthetic=rng.randint(0, 2))
                assert ledger.num_outstanding <= (max_staleness + 1) * size
            elif who == "learner" and published < ledger.num_streamed:
                published += 1
            elif who == "people" and open_:
                some = [open_.pop(rng.randrange(len(open_))) for _ in range(rng.randint(1, min(3, len(open_))))]
                answer(ledger, some, failed=frozenset(name for name in some if rng.random() < 0.5))
