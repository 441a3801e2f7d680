"""Whole runs whose labels come from a language model behind HTTP: what is charged, what is not, and what is kept."""

import json
from pathlib import Path

import pytest
import ray
from chat_server import TEMPLATE, ChatServer, digit, shown, status, token
from whole_runs import contents

import rayalign
from rayalign.errors import ConfigError, OracleError
from rayalign.ledger.ledger import Ledger
from rayalign.serve.judge_stats import judge_stats

KEY = "sk-very-secret-9876543210"
UNREADABLE = ("choose for c0", "choose for c1", "choose for c2", "choose for c3")


@pytest.fixture(scope="module")
def key():
    """In the environment before Ray is started, as users have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def cluster(key, cluster_without_serve):
    """One that knows the key."""


def moody(body, n):
    """Prefers later names; a rate limit now and then, and a quarter of the prompts make it talk."""
    prompt, first, second = shown(body)
    if n % 10 == 3:
        return status(429, f"too fast, {KEY}", {"Retry-After": "0.01"})
    if prompt in UNREADABLE:
        return token("Well")
    return digit(0.9 if first > second else 0.1 if first < second else 0.5)


def settings(server, **judge):
    judge = {"base_url": server.url, "api_key_env": "A_KEY", "template": TEMPLATE, "backoff_s": 0.01, **judge}
    named = {f"oracle.judge.{name}": value for name, value in judge.items()}
    return {"oracle.kind": "judge", "oracle.target": "m", "oracle.judge.price": 0.25, **named}


def journalled(run_dir):
    lines = [line for file in (run_dir / "oracle").glob("answers-*.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line)["duel_id"] for line in lines]


def test_labels_of_a_judge_are_charged_once_and_unreadable_verdicts_never(small_run, tmp_path):
    with ChatServer(moody, key=KEY) as server:
        result = small_run(budget=24, **settings(server, retries=2))
    run_dir = tmp_path / "run"
    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    answers = journalled(run_dir)
    assert result.labels_spent == ledger.spent == len(contents(run_dir)) == 24
    assert len(answers) == len(set(answers)) == 24 + result.labels_spent_on_evaluation
    assert not [p for p in ledger.preferences() if p.duel.prompt.text in UNREADABLE]
    assert ledger.committed == 24, "what an unreadable verdict had reserved is free again"

    stats = judge_stats(run_dir / "oracle")
    assert stats.calls == len(server.bodies) and stats.answers == 2 * len(answers)
    assert stats.wasted > 0 and stats.not_billed > 0
    assert stats.spent == 0.25 * (stats.calls - stats.not_billed) == 0.25 * (stats.answers + stats.wasted)
    assert ledger.price == 0.25 * 2 * 24, "the ledger charges the calls of its labels"
    assert stats.position_bias == pytest.approx(0) and stats.order_disagreement == 0

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for folder in (run_dir, session / "logs") for path in folder.rglob("*") if path.is_file()]
    assert run_dir / "config.yaml" in files and len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_run_stops_before_its_judge_costs_too_much_and_goes_on_with_more_money(small_run, tmp_path):
    with ChatServer(lambda body, n: digit(0.9 if shown(body)[1] > shown(body)[2] else 0.1), key=KEY) as server:
        chosen = settings(server, max_spend=5.25, concurrency=2)
        with pytest.raises(OracleError, match=r"has cost 5\.25 and another call costs 0\.25"):
            small_run(budget=24, **chosen, **{"evaluation.every": 0, "evaluation.num_prompts": 1})
        assert len(server.bodies) == 21
        before = contents(tmp_path / "run")
        result = rayalign.resume(tmp_path / "run", **{"oracle.judge.max_spend": 100})
    assert contents(tmp_path / "run")[: len(before)] == before and result.labels_spent == 24
    assert len(server.bodies) == 2 * (24 + result.labels_spent_on_evaluation), "no order of a duel was asked twice"


def test_a_judge_without_its_key_stops_the_run_before_anything_is_bought(small_run, tmp_path):
    with ChatServer(moody, key=KEY) as server:
        with pytest.raises(ConfigError, match="'NO_KEY': that environment variable is not set"):
            small_run("no-variable", **settings(server, api_key_env="NO_KEY"))
        with pytest.raises(OracleError, match="names no variable"):
            small_run("no-key", **settings(server, api_key_env=""))
    assert server.bodies == []
