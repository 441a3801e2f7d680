"""A comparison from its rows to its answer: runs side by side on one cluster, kept and resumed."""

import json
import re

import pytest
import ray
from whole_runs import SMALL, contents

import rayalign


@pytest.fixture(scope="module")
def comparison(cluster, tmp_path_factory):
    """Two rows, two seeds, two runs at a time."""
    return compare(tmp_path_factory.mktemp("comparison") / "out")


def compare(out, **changes):
    rows = ["passive", "twice=passive:learner.updates_per_batch=2"]
    given = {"seeds": 2, "budget": 12, "parallel": 2, **SMALL, **changes}
    return rayalign.compare(rows, "rayalign/Tabular-v0", out=out, **given)


@pytest.mark.timeout(600)
def test_every_row_is_run_with_every_seed_and_the_answer_is_written_down(comparison):
    assert {name: len(runs) for name, runs in comparison.runs.items()} == {"passive": 2, "twice": 2}
    assert {run.labels_spent for runs in comparison.runs.values() for run in runs} == {12} and not comparison.failed
    assert [run.steps for run in comparison.runs["twice"]] == [6, 6]
    stored = json.loads((comparison.path / "comparison.json").read_text())
    assert stored["settings_that_differ"] == {"learner.updates_per_batch": {"passive": 1, "twice": 2}}
    assert stored["answers"]["twice"]["sentence"] == comparison.sentences[0]
    assert comparison.sentences[0] in (comparison.path / "comparison.md").read_text()
    page = (comparison.path / "comparison.html").read_text()
    assert "learner.updates_per_batch" in page and not re.findall(r"""src\s*=\s*["']?https?:""", page)
    assert (comparison.path / "comparison_win_rate.png").stat().st_size > 1000


def test_rows_get_the_same_prompts_in_the_same_order(comparison):
    folders = {run.name: run for run in (comparison.path / "runs").iterdir()}
    assert len(folders) == 4
    first = [c for name, folder in folders.items() if name.endswith("seed1") for c in [contents(folder)[:4]]]
    assert first[0] == first[1]  # of the first batch, before any update, even the answers are the same


def test_nothing_of_a_run_is_left_on_the_cluster(comparison):
    assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


@pytest.mark.timeout(600)
def test_a_second_call_runs_only_what_is_missing(comparison):
    bought = {folder.name: contents(folder) for folder in (comparison.path / "runs").iterdir()}
    (one, *_) = sorted((comparison.path / "runs").iterdir())
    (one / "result.json").unlink()
    events, bills = [], []
    again = compare(
        comparison.path,
        announce=bills.append,
        show=lambda board, job, event: events.append((job.folder.name, event)),
    )
    assert "2 rows x 2 seeds x 12 labels = 48, of which 48 bought already" in bills[0]
    assert [event for event in events if event[1] != "running"] == [(one.name, "start"), (one.name, "done")]
    assert {folder.name: contents(folder) for folder in (comparison.path / "runs").iterdir()} == bought
    assert again.sentences == comparison.sentences
