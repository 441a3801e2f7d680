"""A whole run whose labels come over HTTP, from an oracle that `rayalign oracle` serves in a cluster of its own."""

import threading
import time

import pytest
from served_oracle import START_S, TOKEN, Served, asking
from whole_runs import contents, spent

from rayalign.env import make_world
from rayalign.env.truth import TruthOracle
from rayalign.errors import OracleError
from rayalign.ledger.ledger import Ledger

BUDGET = 120  # a run that lasts longer than it takes to kill its oracle


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


@pytest.mark.timeout(400)
def test_a_run_is_labelled_over_http_and_survives_a_service_that_is_killed_and_started_again(
    served, small_run, tmp_path
):
    run_dir, bought = tmp_path / "run", []

    def lose_it_and_start_again():
        while spent(run_dir / "ledger.arrow") < 8:
            time.sleep(0.02)
        served.lose()
        bought.append(spent(run_dir / "ledger.arrow"))
        served.start()

    killer = threading.Thread(target=lose_it_and_start_again, daemon=True)
    killer.start()
    result = small_run(budget=BUDGET, **asking(served))
    killer.join(START_S)
    assert served.starts == 2 and bought[0] < BUDGET, "it was in the middle of the run"

    ledger, answers = Ledger(run_dir / "ledger.arrow", read_only=True), served.answers()
    assert result.labels_spent == ledger.spent == len(contents(run_dir)) == BUDGET
    assert len(answers) == len(set(answers)) == BUDGET + result.labels_spent_on_evaluation
    assert ledger.price == 0.5 * BUDGET, "at the service's price"
    truth = TruthOracle(make_world("rayalign/Tabular-v0"))
    labels = list(ledger.preferences())
    right = [verdict.probability for verdict in truth.judge([label.duel for label in labels])]
    assert [label.probability for label in labels] == pytest.approx(right)

    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert run_dir / "config.yaml" in files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_run_that_is_not_let_in_stops_before_anything_is_bought(served, small_run, tmp_path):
    before = len(served.answers())
    with pytest.raises(OracleError, match=r"it wants a token, and \$RAYALIGN_ORACLE_TOKEN has none"):
        small_run("run", budget=4, **asking(served, **{"oracle.http.token_file": ""}))
    assert spent(tmp_path / "run" / "ledger.arrow") == 0 and len(served.answers()) == before
