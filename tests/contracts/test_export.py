"""What is exported is what others load, with a card that tells the truth."""

import json
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from whole_runs import SMALL

import rayalign
from rayalign import cli
from rayalign.after import export as export_run
from rayalign.after.export import check_loads, export
from rayalign.config import diff
from rayalign.errors import ConfigError, DataError
from rayalign.ledger.ledger import Ledger
from rayalign.loop import loop, preparation
from rayalign.models import hub_id
from rayalign.runs.stored import StoredRun


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """A run that trained adapters, whose labels cost half a unit each."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = {
        "learner.lora.rank": 2,
        "learner.adam_betas": (0.8, 0.9),
        "evaluation.every": 0,
        "oracle.price": 0.5,
        "env.seed": 2,
    }
    return rayalign.run("passive", "rayalign/Tabular-v0", budget=6, seed=3, run_dir=folder, **SMALL | settings)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    return export(finished.path, tmp_path_factory.mktemp("out") / "model")


def logits(model):
    return model(torch.tensor([[1, 2, 3]])).logits


def test_transformers_loads_the_merged_weights_of_the_checkpoint(finished, exported):
    one, other = (AutoModelForCausalLM.from_pretrained(path) for path in (finished.checkpoint, exported))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    words = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (finished.checkpoint, exported)]
    assert words[0] == words[1]
    assert not (exported / "adapter").exists()


def test_the_adapter_on_its_base_is_the_merged_model(finished, exported, tmp_path):
    from peft import PeftModel

    folder = export(finished.path, tmp_path / "adapter", adapter=True)
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(StoredRun.read(finished.path).config.policy)
    before = logits(base).detach().clone()
    adapted = logits(PeftModel.from_pretrained(base, folder))
    merged = logits(AutoModelForCausalLM.from_pretrained(exported))
    torch.testing.assert_close(adapted, merged)
    assert not torch.allclose(adapted, before)
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"


def test_datasets_reads_the_preferences_of_the_ledger_as_texts_or_as_chat_messages(finished, exported, tmp_path):
    import datasets

    bought = list(Ledger(finished.path / "ledger.arrow", read_only=True).preferences())
    texts = [(p.duel.prompt.text, p.winner.text, p.loser.text) for p in bought]
    roles = ("user", "assistant", "assistant")
    messages = [
        tuple([{"role": role, "content": text}] for role, text in zip(roles, row, strict=True)) for row in texts
    ]
    texts = [(prompt, f" {chosen}", f" {rejected}") for prompt, chosen, rejected in texts]  # its tokenizer has words
    in_chat = export(finished.path, tmp_path / "chat", conversational=True)
    for folder, expected in ((exported, texts), (in_chat, messages)):
        rows = datasets.load_dataset(str(folder / "preferences"), split="train")
        assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == expected


def test_the_card_has_the_runs_facts_for_people_and_for_the_hub(finished, exported):
    card = ModelCard.load(exported / "README.md")
    facts = card.data.to_dict()["rayalign"]
    last = finished.evaluations.to_pylist()[-1]
    assert facts["labels_spent"] == 6 and facts["price"] == 3.0 and facts["agent"] == "passive"
    assert facts["win_rate"] == finished.win_rate == card.data.eval_results[0].metric_value
    assert facts["win_rate_95"][0] <= finished.win_rate <= facts["win_rate_95"][1]
    assert facts["labels_spent_on_evaluation"] == last["labels_spent_on_evaluation"]
    assert f"{finished.win_rate:.3f}" in card.text and "| price of the labels | 3 |" in card.text
    assert str(finished.path) not in card.content and "\n| seed | 3 |\n" in card.text
    assert {"preference-learning", "passive", "dpo"} <= set(card.data.tags)  # the agent and its loss


def test_the_cards_command_prepares_the_same_run(finished, exported, monkeypatch):
    text = ModelCard.load(exported / "README.md").text.split("```\n")
    command = next(part for part in text if part.startswith("rayalign run")).replace("\\\n", " ")
    calls = []
    monkeypatch.setattr(loop, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    done = CliRunner().invoke(cli.app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    ((agent, env), settings), given = calls[0], {}
    for name, value in settings.items():
        given[name] = value
    plan = preparation.prepare(agent, env, given.pop("policy", None), None, None, given)
    different = diff(plan.config, StoredRun.read(finished.path).config)
    assert [line for line in different if not line.startswith(("run_dir", "logging."))] == []


def test_nothing_is_overwritten_and_what_can_not_be_exported_is_told(finished, exported, tmp_path):
    before = sorted(exported.rglob("*"))
    with pytest.raises(DataError, match="nothing is overwritten"):
        export(finished.path, exported)
    assert sorted(exported.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is there already"):
        export(finished.path, tmp_path / "file")
    with pytest.raises(DataError, match=r"no result\.json"):
        export(tmp_path, tmp_path / "out")


def test_an_adapter_of_a_run_without_one_and_weights_that_do_not_load_leave_nothing_behind(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_run, "ADAPTER", "another")
    with pytest.raises(ConfigError, match="there is no adapter"):
        export(finished.path, tmp_path / "out", adapter=True)
    monkeypatch.undo()
    broken = tmp_path / "broken"
    export(finished.path, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(DataError, match=r"does not fit its own config.*missing_keys"):
        check_loads(broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="can't be loaded again"):
        check_loads(broken)
    monkeypatch.setattr(export_run, "check_loads", lambda *_: (_ for _ in ()).throw(DataError("broken")))
    with pytest.raises(DataError, match="broken"):
        export(finished.path, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_hubs_id_is_found_where_the_hub_put_its_files(tmp_path):
    snapshot = tmp_path / "models--HuggingFaceTB--SmolLM2-135M" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub_id(snapshot) == "HuggingFaceTB/SmolLM2-135M"
    assert hub_id(tmp_path) is None
