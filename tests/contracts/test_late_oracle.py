"""An oracle of one's own that takes its time: an agent with a posterior runs on what has arrived."""

import time
from collections import Counter

from whole_runs import contents

from rayalign.ledger.ledger import Ledger
from rayalign.types import Verdict


def oracle_that_takes_its_time(seconds, fails):
    """Answers each duel that long after it was given it, and every `fails`-th one never: that is a failure."""

    class Thoughtful:
        id = "thoughtful:1"

        def __init__(self):
            self.since = {}

        def judge(self, duels):
            raise AssertionError("a late oracle is not waited for")

        def poll(self, duels):
            now = time.monotonic()
            for duel in duels:
                self.since.setdefault(duel.id, now)
            ripe = [duel for duel in duels if now - self.since[duel.id] >= seconds * (1 + int(duel.id[:2], 16) % 3)]
            return [
                Verdict(duel_id=duel.id, failure="no opinion")
                if int(duel.id, 16) % fails == 0
                else Verdict(duel_id=duel.id, probability=float(duel.first.text > duel.second.text))
                for duel in ripe
            ]

    return Thoughtful()


def test_a_posterior_learns_from_late_answers_and_failures_are_neither_charged_nor_waited_for(small_run):
    result = small_run(
        agent="sea",
        budget=24,
        max_staleness=2,
        oracle=oracle_that_takes_its_time(0.4, fails=5),
        **{
            "evaluation.every": 0,
            "evaluation.at_start": False,
            "loop.agent_checkpoint_every": 1,
            "agent.gamma_burn_in": 8,
            "agent.gamma_after": 0.5,
        },
    )
    ledger = Ledger(result.path / "ledger.arrow", read_only=True)
    rows = contents(result.path)
    events = Counter(name for message in ledger.events() for name in message["event"].to_pylist())
    assert result.labels_spent == ledger.spent == events["answered"] == 24 and events["failed"] > 0
    assert events["requested"] == 24 + events["failed"], "what failed is asked about in another duel, and paid once"
    assert ledger.num_streamed == ledger.num_collected == events["batch"] > 6
    streamed = [p.duel.id for i in range(ledger.num_streamed) for p in ledger.stream_batch(i)]
    assert sorted(streamed) == sorted(row[0] for row in rows) and len(rows) == 24 + events["synthetic"]
    mixed = [{p.duel.batch for p in ledger.stream_batch(i)} for i in range(ledger.num_streamed)]
    assert max(map(len, mixed)) > 1, "answers that came first are trained on first"
    assert max(result.history["staleness"].to_pylist()) in (1, 2)
    observed = sorted(path.name for path in (result.path / "agent").glob("observed-*"))
    assert observed[-1] == f"observed-{ledger.num_streamed:06d}"
    assert result.history["agent/posterior_labels"].to_pylist()[-1] == 24
    assert result.evaluations["version"].to_pylist() == [ledger.num_streamed]
