"""A run from the first prompt to the result, and what its user may rely on."""

import json
import re
import signal

import pyarrow.compute as pc
import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import WITH_ENGINE, contents

import rayalign
from rayalign.errors import ConfigError
from rayalign.ledger.ledger import Ledger
from rayalign.system import share


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """One finished run that several tests look at; its budget is no multiple of the batch."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = WITH_ENGINE | {"logging.report": True}
    return rayalign.run("passive", "rayalign/Tabular-v0", budget=22, seed=3, run_dir=folder, **settings)


def test_labels_charged_equal_rows_labelled_equal_answers_given_equal_the_budget(finished):
    ledger = Ledger(finished.path / "ledger.arrow", read_only=True)
    answers = [
        json.loads(line)
        for file in (finished.path / "oracle").glob("*")
        for line in file.read_text().splitlines()
        if line
    ]
    rows = [p.duel.id for p in ledger.preferences()]
    evaluation = Ledger(finished.path / "evaluation.arrow", read_only=True)
    assert finished.labels_spent == ledger.spent == len(rows) == len(set(rows)) == 22
    assert finished.labels_spent_on_evaluation == evaluation.spent
    assert len({a["duel_id"] for a in answers}) == 22 + evaluation.spent


def test_the_checkpoint_is_a_hugging_face_model_that_differs_from_the_initial_policy(finished):
    policy = AutoModelForCausalLM.from_pretrained(finished.checkpoint)
    AutoTokenizer.from_pretrained(finished.checkpoint)
    initial = AutoModelForCausalLM.from_pretrained(rayalign.env.make_world("rayalign/Tabular-v0").default_policy())
    changed = [not a.equal(b) for a, b in zip(policy.parameters(), initial.parameters(), strict=True)]
    assert any(changed)


def test_preferences_are_read_by_datasets_as_they_are(finished):
    import datasets

    rows = datasets.load_dataset("parquet", data_dir=str(finished.path / "preferences"), split="train")
    assert {"prompt", "chosen", "rejected"} <= set(rows.column_names)
    assert len(rows) == finished.preferences.num_rows == 22


def test_every_batch_of_the_synchronous_loop_is_strictly_on_policy(finished):
    history = finished.history
    assert history["staleness"].to_pylist() == [0] * 6
    assert history["version"].to_pylist() == list(range(6))
    assert pc.sum(history["asked"]).as_py() == 22


def test_the_same_seed_writes_the_same_ledger(finished, small_run):
    again = small_run(budget=22, **WITH_ENGINE)
    assert contents(again.path) == contents(finished.path)


def test_ctrl_c_after_a_run_is_pythons_own_again(finished):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_read_back_and_not_run_again(finished, capsys):
    config = (finished.path / "config.yaml").read_text()
    (finished.path / "config.yaml").write_text(config.replace("progress: 'off'", "progress: plain"))
    try:
        assert rayalign.resume(finished.path) == finished
    finally:
        (finished.path / "config.yaml").write_text(config)
    assert "is finished; a larger budget goes on with it" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_a_larger_budget(small_run):
    first = small_run(budget=10)
    bought = contents(first.path)
    more = rayalign.resume(first.path, budget=18)
    assert more.labels_spent == 18 and contents(more.path)[:10] == bought
    assert more.evaluations["version"].to_pylist()[-1] == 5  # 4 + 4 + 2 labels, then 4 + 4


def test_adapters_alone_travel_where_the_engine_can_add_them(small_run):
    result = small_run(budget=12, **WITH_ENGINE | {"learner.lora.rank": 2, "evaluation.every": 0})
    assert (result.path / "checkpoint" / "adapter" / "adapter_config.json").exists()
    assert max(result.history["version"].to_pylist()) == 2


def test_a_run_directory_that_holds_a_run_is_refused(finished, small_run):
    with pytest.raises(ConfigError, match=r"already holds a run.*rayalign resume"):
        small_run(run_dir=finished.path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("agent.beta", 0.2),
        ("oracle.kind", "data"),
        ("oracle.target", "elsewhere:function"),
        ("oracle.labels", "deterministic"),
        ("oracle.scale", 2.0),
        ("oracle.judge.template", "summary"),
    ],
)
def test_resume_refuses_settings_that_change_what_the_labels_mean(finished, setting, value):
    with pytest.raises(ConfigError, match=rf"bought for: {re.escape(setting)}"):
        rayalign.resume(finished.path, **{setting: value})


def test_a_rejected_resume_leaves_a_finished_run_finished(finished):
    config, result = ((finished.path / name).read_text() for name in ("config.yaml", "result.json"))
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.transport='nccl' is for learners of your own"):
        rayalign.resume(finished.path, budget=30, **{"rollout.vllm.transport": "nccl"})
    assert (finished.path / "config.yaml").read_text() == config
    assert (finished.path / "result.json").read_text() == result


def test_the_report_is_one_file_that_needs_no_network(finished):
    page = (finished.path / "report.html").read_text()
    assert "22" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import""", page)


def test_what_somebody_else_uses_of_the_cluster_is_not_planned_with(cluster):
    """A run that counted on it would wait for its learner for ever: a service beside it gives nothing back."""
    other = Other.remote()
    ray.get(other.here.remote())
    assert share.resources()["CPU"] == ray.cluster_resources()["CPU"] - 0.5
    ray.kill(other)
    assert share.resources()["CPU"] == ray.cluster_resources()["CPU"], "it is free a moment later"


@ray.remote(num_cpus=0.5)
class Other:
    def here(self):
        return True
