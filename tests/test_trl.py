"""What a run leaves for TRL: its `DPOTrainer` takes the preferences as they are, texts and chat messages."""

import pytest
from made_runs import made_run

from rayalign.ledger.ledger import Ledger
from rayalign.runs.preference_export import export_preferences

trl = pytest.importorskip("trl", reason="TRL is not installed")

TEMPLATE = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"


@pytest.mark.parametrize("conversational", [False, True])
def test_dpo_trainer_trains_on_the_preferences_as_they_are(tmp_path, conversational):
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = made_run(tmp_path / "run")
    ledger, chat = result.path / "ledger.arrow", "always" if conversational else "auto"
    assert export_preferences(ledger, tmp_path / "preferences", result.checkpoint, chat) is conversational
    rows = datasets.load_dataset(str(tmp_path / "preferences"), split="train")
    policy = AutoModelForCausalLM.from_pretrained(result.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(result.checkpoint)
    if conversational:
        tokenizer.chat_template = TEMPLATE
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "report_to": "none"}
    args = trl.DPOConfig(str(tmp_path / "trl"), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    trainer = trl.DPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokenizer)
    done = trainer.train()
    assert torch.isfinite(torch.tensor(done.training_loss))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())

    if not conversational:  # what TRL trains on is what was sampled, end-of-sequence included
        bought = {p.duel.id: p for p in Ledger(ledger, read_only=True).preferences()}
        for row in trainer.train_dataset:
            preference = bought[row["duel_id"]]
            assert row["prompt_ids"] == list(preference.duel.prompt.token_ids)
            assert row["chosen_ids"] == list(preference.winner.token_ids)
            assert row["rejected_ids"] == list(preference.loser.token_ids)
