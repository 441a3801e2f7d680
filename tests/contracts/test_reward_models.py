"""A whole run that one Hugging Face model labels and another one evaluates: each is asked its own duels, once."""

import json
import shutil

import pytest
from tiny_judges import save_bert, save_llama
from whole_runs import contents

import rayalign
from rayalign.ledger.ledger import Ledger
from rayalign.serve.config import OracleConfig
from rayalign.serve.oracles import oracle_factory

WORDS = ["choose", "pick", "for", *(f"c{i}" for i in range(16)), *(f"a{i}" for i in range(8))]


def answers(folder):
    """What a service wrote down: a line for each answer that was paid."""
    return sorted(line for file in folder.glob("answers-*.jsonl") for line in file.read_text().splitlines())


def test_a_reward_model_labels_a_run_and_a_pairwise_model_evaluates_it(small_run, tmp_path):
    rewards, pairs = save_llama(tmp_path / "rewards", words=WORDS), save_bert(tmp_path / "pairs", words=WORDS)
    settings = {"oracle.kind": "reward_model", "oracle.target": rewards, "oracle.price": 0.5}
    settings |= {"evaluation.oracle.kind": "pairwise", "evaluation.oracle.target": pairs, "evaluation.every": 0}
    result, run_dir = small_run(budget=10, **settings), tmp_path / "run"

    for kind, target, name, folder, charged, price in (
        ("reward_model", rewards, "ledger", "oracle", result.labels_spent, 0.5),
        ("pairwise", pairs, "evaluation", "oracle-evaluation", result.labels_spent_on_evaluation, 0.0),
    ):
        ledger, judge = (
            Ledger(run_dir / f"{name}.arrow", read_only=True),
            oracle_factory(OracleConfig(kind=kind, target=target))(),
        )
        labelled = list(ledger.preferences())
        assert charged == ledger.spent == len(labelled) and ledger.price == price * charged
        paid = [json.loads(line)["duel_id"] for line in answers(run_dir / folder)]
        assert sorted(paid) == sorted(p.duel.id for p in labelled)
        assert {name for event in ledger.events() for name in event["oracle"].to_pylist()} - {None} == {judge.id}
        verdicts = judge.judge([p.duel for p in labelled])
        assert [p.probability for p in labelled] == pytest.approx([v.probability for v in verdicts], abs=1e-5)
    assert result.labels_spent == 10 and result.labels_spent_on_evaluation > 0

    before = contents(run_dir), answers(run_dir / "oracle"), answers(run_dir / "oracle-evaluation")
    shutil.rmtree(rewards), shutil.rmtree(pairs)  # there is nobody to ask
    assert rayalign.resume(run_dir) == result
    assert (contents(run_dir), answers(run_dir / "oracle"), answers(run_dir / "oracle-evaluation")) == before
