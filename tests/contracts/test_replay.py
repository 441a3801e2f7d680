"""A ledger teaches other agents offline: with what was bought, and with nothing else."""

import json

import pytest
from safetensors.torch import load_file
from whole_runs import SMALL, contents, spent

import rayalign
from rayalign.after.model_card import how_to_reproduce
from rayalign.after.replay import replay
from rayalign.after.replay_feed import LedgerBatches, ReplayConfig
from rayalign.errors import ConfigError, DataError
from rayalign.ledger.ledger import Ledger
from rayalign.runs.stored import StoredRun


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """A run of `sea`, which labels some pairs itself; two epochs; its budget is no multiple of the batch."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    settings = {
        "agent.num_candidates": 4,
        "agent.gamma_burn_in": 8,
        "agent.posterior.updates": 2,
        "loop.epochs": 2,
        "learner.schedule": "cosine",
        "evaluation.every": 0,
        "evaluation.best_of_n": 3,
    }
    return rayalign.run("sea", "rayalign/Tabular-v0", budget=22, seed=3, run_dir=folder, **SMALL | settings)


@pytest.fixture(scope="module")
def again(finished, tmp_path_factory):
    """The same agent with the same settings, judged by the world."""
    folder = tmp_path_factory.mktemp("again") / "replay"
    return replay(finished.path, oracle="world", run_dir=folder, **{"evaluation.every": 8, "logging.report": True})


def weights(result):
    return load_file(result.checkpoint / "model.safetensors")


def test_the_same_agent_replayed_with_the_same_settings_has_the_same_weights_bit_by_bit(finished, again):
    one, other = weights(finished), weights(again)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_the_same_agent_replayed_has_the_same_posterior_hence_the_same_best_of_n(finished, again):
    of_run, of_replay = (r.evaluations.to_pylist()[-1] for r in (finished, again))
    assert of_replay["best_of_n_win_rate"] == of_run["best_of_n_win_rate"]
    assert of_replay["win_rate"] == of_run["win_rate"] == again.win_rate
    states = [sorted((r.path / "agent").glob("observed-*"))[-1] / "sea.pt" for r in (finished, again)]
    assert states[0].parent.name == states[1].parent.name
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_replay_buys_nothing_and_leaves_the_ledger_alone(finished, again):
    assert again.labels_spent == 0 and again.labels_replayed == 22
    assert spent(finished.path / "ledger.arrow") == 22
    assert not (again.path / "ledger.arrow").exists() and not (again.path / "oracle").exists()
    files = (again.path / "oracle-evaluation").glob("*")
    answers = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    evaluation = Ledger(again.path / "evaluation.arrow", read_only=True)
    assert len(answers) == again.labels_spent_on_evaluation == evaluation.spent
    assert again.preferences.num_rows == finished.preferences.num_rows
    page = (again.path / "report.html").read_text()
    assert "22" in page and "none was bought" in page


def test_evaluations_of_a_replay_are_at_the_labels_that_its_weights_have_seen(again):
    rows = again.evaluations.to_pylist()
    ledger = [0, *again.history["labels"].to_pylist()]  # after each version; the second epoch has no new ones
    assert [row["labels"] for row in rows] == [ledger[row["version"]] for row in rows]
    assert rows[0]["version"] == 0 and rows[-1]["version"] == again.history.num_rows
    assert len(rows) == 4  # at the start, after 8 and 16 labels, at the end


def test_another_agent_learns_from_the_ledger_alone_and_without_an_oracle_nothing_is_evaluated(finished, tmp_path):
    settings = {"batch_size": 5, "synthetic": False, "epochs": 1, "run_dir": tmp_path / "passive"}
    result = replay(finished.path / "ledger.arrow", "passive", **settings)
    assert result.win_rate is None and result.labels_spent_on_evaluation == 0
    assert not (result.path / "evaluation.arrow").exists()
    assert result.history["learner/duels"].to_pylist() == [5.0, 5.0, 5.0, 5.0, 2.0]
    assert set(result.preferences["source"].to_pylist()) == {"oracle"}, "what was trained on, and no more"
    command, _ = how_to_reproduce(StoredRun.read(result.path), None)
    assert "--batch-size 5 --no-synthetic" in command and "agent." not in command and "--set loop" not in command
    one, other = weights(finished), weights(result)
    assert any(not one[name].equal(other[name]) for name in one)
    assert replay(finished.path / "ledger.arrow", "passive", **settings) == result  # finished: read back
    (result.path / "result.json").unlink()  # as if it was killed just before its end
    before = weights(result)
    resumed = replay(finished.path / "ledger.arrow", "passive", **settings)
    assert resumed == result and all(before[name].equal(value) for name, value in weights(resumed).items())
    with pytest.raises(ConfigError, match="another run, or a replay with other settings"):
        replay(finished.path, "passive", run_dir=result.path)
    with pytest.raises(ConfigError, match="holds a replay, which buys nothing"):
        rayalign.resume(result.path, budget=100)


def test_chunks_of_any_size_have_the_ledgers_labels_once_and_in_order(finished):
    path = str(finished.path / "ledger.arrow")
    every = [row[0] for row in contents(finished.path)]
    num_batches = Ledger(path, read_only=True).num_streamed
    for size in (0, 1, 3, 1000):
        batches = LedgerBatches(ReplayConfig(ledger=path, batches=num_batches, batch_size=size), epochs=2)
        epochs = [
            [p.duel.id for i in range(start, start + batches.per_epoch) for p in batches[i].preferences]
            for start in (0, batches.per_epoch)
        ]
        assert epochs[0] == every and sorted(epochs[1]) == sorted(every)
        assert size == 0 or all(len(batches[i].preferences) <= size for i in range(len(batches)))
        assert batches.labels(0) == 0 and batches.labels(batches.per_epoch) == batches.labels(len(batches)) == 22
        assert batches[len(batches) - 1].meta["progress"] == 1.0
    bought = LedgerBatches(ReplayConfig(ledger=path, batches=num_batches, batch_size=3, synthetic=False))
    assert sum(len(bought[i].preferences) for i in range(len(bought))) == 22 < len(every)
    assert [bought.labels(v) for v in (1, 2)] == [3, 6]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"agent": "xpo"}, ConfigError, "'xpo' trains on 'y_ref'.*over a ledger of its own"),
        ({"agent": "selm"}, ConfigError, "'selm' trains on 'ranks'"),
        ({"agent": "selm", "batch_size": 8}, ConfigError, "would cut through"),
        ({"agent": "pasive"}, ConfigError, "Did you mean 'passive'"),
        ({"loop.budget": 50}, ConfigError, "loop.budget has no meaning in a replay"),
        ({"oracle.kind": "world"}, ConfigError, r"evaluation\.oracle"),
        ({"oracle": "wrld"}, ConfigError, "Did you mean 'world'"),
        ({"env.seed": 1}, ConfigError, "env is not"),
        ({"batch_size": -1}, ConfigError, "batch_size=-1"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(finished, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        replay(finished.path, run_dir=tmp_path / "no", **arguments)
    assert not (tmp_path / "no").exists()


def test_a_ledger_without_its_run_needs_an_agent_a_policy_and_the_tokenizer_that_sampled_it(finished, tmp_path):
    alone = tmp_path / "alone.arrow"
    alone.write_bytes((finished.path / "ledger.arrow").read_bytes())
    with pytest.raises(ConfigError, match="agent is not set"):
        replay(alone)
    with pytest.raises(ConfigError, match="policy is not set"):
        replay(alone, "passive")
    other = rayalign.env.make_world("rayalign/TinyWorld-v0").default_policy()
    with pytest.raises(DataError, match="another tokenizer"):
        replay(alone, "passive", policy=other)
    with pytest.raises(DataError, match="neither a run directory"):
        replay(tmp_path / "nothing")
