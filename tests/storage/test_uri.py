"""Which run directories are in a bucket, and what is wrong with one is told before anything is bought."""

from pathlib import Path

import pytest
from made_runs import made_run
from typer.testing import CliRunner
from whole_runs import SMALL

import rayalign
from rayalign import storage
from rayalign.cli import app
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.loop import preparation
from rayalign.report.report import write_report
from rayalign.storage import objects
from rayalign.storage.objects import Bucket

NOWHERE = "s3://bucket/run?endpoint_override=127.0.0.1:9&scheme=http"


def new_run(run_dir, **given):
    return preparation.new_run("passive", "rayalign/Tabular-v0", run_dir=run_dir, given={**SMALL, **given})


@pytest.fixture
def told(monkeypatch):
    """`told(message)`: what a store whose client says `message` makes of `Bucket.check`."""

    def tell(message):
        def fail(*_):
            raise OSError(message)

        monkeypatch.setattr(Bucket, "_write", fail)
        with pytest.raises(ConfigError) as caught:
            Bucket("s3://bucket/run?region=x").check()
        return str(caught.value)

    return tell


@pytest.mark.parametrize(
    ("run_dir", "message"),
    [
        ("hdfs://host/run", r"hdfs:// is not supported. Use s3://"),
        ("s3://key:hidden@bucket/run", r"'s3://bucket/run' must not hold credentials"),
        ("s3://bucket/run?secret_key=hidden", r"has the option 'secret_key'. Only endpoint_override, scheme, region"),
        ("s3://bucket", "must name a folder in a bucket"),
        ("s3://bucket/a/../b", "must not have '..'"),
        (Path("s3://bucket/run"), "went through pathlib.Path; pass it as a string"),
    ],
)
def test_a_uri_that_can_not_be_one_is_refused_and_no_secret_repeated(run_dir, message):
    with pytest.raises(ConfigError, match=message) as caught:
        rayalign.run("passive", "rayalign/Tabular-v0", run_dir=run_dir)
    assert "hidden" not in str(caught.value)


def test_local_paths_stay_what_they_are(tmp_path):
    assert not storage.in_bucket(tmp_path)
    assert storage.absolute("runs/first") == str(Path("runs/first").absolute())
    assert storage.absolute("file:///tmp/first") == "/tmp/first"
    assert storage.join(tmp_path, "x") == str(tmp_path / "x")
    assert storage.folder_of(tmp_path) == storage.gathered(tmp_path) == storage.fetched(tmp_path) == tmp_path
    assert storage.take(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"oracle.kind": "human"}, "oracle.kind='human' keeps books of its own"),
        ({"oracle.kind": "users"}, "oracle.kind='users' keeps books of its own"),
        ({"oracle.num_replicas": 2}, "set oracle.num_replicas=1"),
        ({"loop.shared_budget": "cap.jsonl"}, "loop.shared_budget='cap.jsonl' is a file with a lock"),
    ],
)
def test_what_needs_files_is_refused_and_nothing_written(given, message, uri, bucket):
    with pytest.raises(ConfigError, match=message):
        new_run(uri, **given)
    assert bucket.names("") == []


def test_what_can_not_work_in_a_bucket_says_so(tmp_path):
    for call in (
        lambda: rayalign.compare(["passive", "sea"], out=NOWHERE),
        lambda: rayalign.replay(tmp_path, "passive", run_dir=NOWHERE),
        lambda: rayalign.trainable("passive", folder=NOWHERE),
        lambda: write_report([NOWHERE, NOWHERE]),
        lambda: rayalign.export(tmp_path, NOWHERE),
    ):
        with pytest.raises(ConfigError, match="must be a local path"):
            call()


def test_a_bucket_that_is_not_there_is_named(uri):
    with pytest.raises(ConfigError, match="There is no bucket 'elsewhere'"):
        new_run(uri.replace("s3://runs", "s3://elsewhere"))


def test_a_store_that_refuses_or_does_not_answer_is_told_what_to_do(told):
    denied = "When initiating upload: AWS Error ACCESS_DENIED during PutObject operation: no (Request ID: 1)"
    assert "refuses access (ACCESS_DENIED): set credentials" in told(denied)
    assert "is endpoint_override right?" in told("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


def test_a_run_that_is_there_is_not_overwritten_and_its_config_holds_no_secret(uri, bucket):
    plan = new_run(uri)
    with pytest.raises(ConfigError, match=r"already holds a run. `rayalign resume s3://"):
        new_run(uri)
    assert f"run_dir: {uri}\n" in bucket.get("config.yaml").decode()
    assert b"secret" not in b"".join(bucket.get(name) for name in bucket.names(""))
    with pytest.raises(ConfigError, match="is being run by process"):
        preparation.old_run(uri)
    storage.release(plan.config.run_dir)
    again = preparation.old_run(uri)
    assert again.config.loop == plan.config.loop
    storage.release(again.config.run_dir)


def test_a_copy_of_a_local_run_is_read_and_not_gone_on_with_as_its_labels_would_be_bought_again(uri, bucket, tmp_path):
    run = made_run(tmp_path / "mine")
    bucket.put_files({p.relative_to(run.path).as_posix(): p for p in run.path.rglob("*") if p.is_file()})
    with Ledger(storage.fetched_ledger(uri.replace("?", "/ledger.arrow?")), read_only=True) as ledger:
        assert ledger.spent == run.labels_spent > 0
    with pytest.raises(ConfigError, match=r"is a copy of a local run.*copy it to a folder, and resume that"):
        preparation.old_run(uri)


def test_a_resume_of_nothing_says_so(uri):
    done = CliRunner().invoke(app, ["resume", uri])
    assert done.exit_code == 2
    assert "holds no run (no config.yaml)" in done.output
    assert objects.RETRY_AFTER_S == ()
