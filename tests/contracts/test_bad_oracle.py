"""An oracle that breaks in the middle of a run: one clear error, nothing bought is lost, and `resume` finishes it."""

import json
import threading
import time
from pathlib import Path

import pytest
from whole_runs import contents, spent

import rayalign
from rayalign.errors import OracleError
from rayalign.ledger.ledger import Ledger


def oracle_with_a_switch(flag: Path):
    """Prefers the alphabetically later response; while `flag` exists it does what is written there instead."""

    def prefer(prompt: str, first: str, second: str) -> float:
        if flag.exists():
            if flag.read_text() == "down":
                raise ConnectionError("the judge is not there")
            return float("nan")
        return float(first > second)

    return prefer


class Breaker(threading.Thread):
    """Writes `trouble` to `flag` as soon as the ledger of `run_dir` holds `labels` labels."""

    def __init__(self, run_dir: Path, flag: Path, trouble: str, labels: int) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.flag, self.trouble, self.labels = run_dir, flag, trouble, labels
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while spent(self.run_dir / "ledger.arrow") < self.labels and time.monotonic() < deadline:
            time.sleep(0.01)
        self.flag.write_text(self.trouble)


@pytest.mark.parametrize(("trouble", "message"), [("nan", "nan"), ("down", "the judge is not there")])
def test_an_oracle_that_breaks_stops_the_run_with_its_reason_and_resume_loses_nothing(
    small_run, tmp_path, trouble, message
):
    flag = tmp_path / "trouble"
    settings = {"oracle": oracle_with_a_switch(flag), "oracle.returns": "probability", "evaluation.every": 0}
    breaker = Breaker(tmp_path / "run", flag, trouble, labels=8)
    with pytest.raises(OracleError, match=message):
        small_run(budget=400, **settings)
    breaker.join()
    before = Ledger(tmp_path / "run" / "ledger.arrow", read_only=True)
    bought = contents(tmp_path / "run")
    assert 8 <= before.spent == len(bought) < 400

    flag.unlink()
    result = rayalign.resume(tmp_path / "run", budget=before.committed + 8)
    assert result.labels_spent == before.committed + 8
    assert contents(tmp_path / "run")[: len(bought)] == bought
    answers = [
        json.loads(line)["duel_id"]
        for file in (tmp_path / "run" / "oracle").glob("*")
        for line in file.read_text().splitlines()
    ]
    assert len(answers) == len(set(answers)) == result.labels_spent + result.labels_spent_on_evaluation


def test_an_oracle_that_is_down_from_the_start_costs_nothing(small_run, tmp_path):
    flag = tmp_path / "trouble"
    flag.write_text("down")
    with pytest.raises(OracleError, match="the judge is not there"):
        small_run(oracle=oracle_with_a_switch(flag), **{"oracle.returns": "probability", "evaluation.every": 0})
    assert spent(tmp_path / "run" / "ledger.arrow") == 0
