"""What comes after a run takes one that is in a bucket, on a machine with nothing of it, and leaves it as it was."""

import json
import urllib.request

import pytest
import yaml
from online_users import free_port
from s3_server import bucket_of
from safetensors.torch import load_file
from whole_runs import SMALL, start_driver

import rayalign
from rayalign.after import harness
from rayalign.after.aligned import Aligned
from rayalign.after.answers import write_answers
from rayalign.errors import ConfigError, DataError
from rayalign.ledger.ledger import Ledger
from rayalign.runs.result import Result
from rayalign.storage import join
from rayalign.storage.objects import Bucket

LABELS = 12
SETTINGS = {
    "budget": LABELS,
    "seed": 3,
    **SMALL,
    "evaluation.every": 0,
    "agent.num_candidates": 4,
    "agent.gamma_burn_in": 8,
    "agent.posterior.updates": 2,
}


@pytest.fixture(scope="module")
def uri(no_cluster, tmp_path_factory):
    """A finished run of `sea` in a bucket, whose machine's folders are gone."""
    folder = tmp_path_factory.mktemp("bucket")
    with bucket_of(folder / "first machine") as uri:
        with (folder / "shown").open("w") as shown:
            done = start_driver(folder / "driver.py", "sea", shown, run_dir=uri, **SETTINGS).wait(timeout=400)
        assert done == 0, (folder / "shown").read_text()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RAYALIGN_CACHE", str(folder / "second machine"))
            yield uri


@pytest.fixture(autouse=True)
def as_it_was(uri):
    """The run in the bucket, object by object."""
    bucket = Bucket(uri)
    before = {name: bucket.get(name) for name in bucket.names("")}
    yield
    assert {name: bucket.get(name) for name in bucket.names("")} == before


def test_an_export_of_a_run_in_a_bucket_has_its_weights_labels_and_facts(uri, tmp_path):
    out = rayalign.export(uri, tmp_path / "model")
    one, other = load_file(Result.load(uri).checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["rayalign"]["labels_spent"] == LABELS
    assert "second machine" not in (out / "README.md").read_text()


def test_answers_and_the_harness_name_a_run_in_a_bucket_by_its_uri(uri, tmp_path):
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "p1"}]))
    write_answers(uri, questions, tmp_path / "answers.json", format="alpaca_eval", best_of=3)
    (answer,) = json.loads((tmp_path / "answers.json").read_text())
    assert answer["generator"] == "first" and answer["output"]
    aligned = Aligned.find(uri)
    assert aligned.policy in " ".join(harness.harness_command(aligned, "mine", tmp_path / "results"))


def test_a_run_in_a_bucket_is_served_under_its_own_name(uri):
    with rayalign.serve_policy(uri, port=free_port(), best_of=2) as server:
        assert server.model == "first"
        body = json.dumps({"model": "first", "prompt": "p1"}).encode()
        request = urllib.request.Request(
            f"{server.url}/completions", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            assert json.load(reply)["choices"][0]["text"]


def test_a_replay_of_a_run_in_a_bucket_goes_on_and_is_exported_when_its_copies_are_gone(uri, tmp_path, monkeypatch):
    settings = {"synthetic": False, "run_dir": tmp_path / "replay", "logging.progress": "off"}
    result = rayalign.replay(uri, "passive", **settings)
    assert result.labels_replayed == LABELS and result.labels_spent == 0
    named = yaml.safe_load((result.path / "replay.yaml").read_text())["ledger"]
    assert named == join(uri, "ledger.arrow")

    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "third machine"))
    assert rayalign.replay(uri, "passive", **settings) == result  # finished: read back
    assert rayalign.replay(named, "passive", **settings) == result  # by its ledger
    rayalign.export(result.path, tmp_path / "model")
    assert (tmp_path / "model" / "preferences" / "preferences.parquet").is_file()


def test_a_run_that_was_copied_to_a_bucket_without_its_objects_for_resuming_is_read_all_the_same(uri, tmp_path):
    bucket, copy = Bucket(uri), Bucket(uri.replace("/first?", "/copy?"))
    for name in bucket.names(""):
        if not name.startswith("live/"):
            copy.put(name, bucket.get(name))
    copied = Result.load(str(copy.uri)).path
    assert Ledger(copied / "ledger.arrow", read_only=True).spent == LABELS
    assert Aligned.find(str(copy.uri)).name == "copy"


def test_what_is_no_finished_run_is_named_as_the_user_named_it(uri, tmp_path):
    nowhere = uri.replace("/first?", "/nowhere?")
    with pytest.raises(DataError, match=r"s3://runs/.*/nowhere.* holds no finished run"):
        rayalign.export(nowhere, tmp_path / "out")
    with pytest.raises(DataError, match=r"s3://runs/.*/nowhere.* holds no finished run"):
        Aligned.find(nowhere)
    with pytest.raises(DataError, match=r"s3://runs/.*/nowhere.* is neither a run directory"):
        rayalign.replay(nowhere, "passive")
    with pytest.raises(ConfigError, match="trained all weights"):
        rayalign.export(uri, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()
