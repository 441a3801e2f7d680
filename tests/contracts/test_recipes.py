"""A recipe from end to end, as small as it gets: Jeopardy! with AE-Borda-DPO, and its null rates."""

import json
import runpy
from pathlib import Path

import torch
from dataset_rows import ROWS
from random_policies import save_policy

import rayalign
from rayalign.ledger.ledger import Ledger
from rayalign.runs.recipe import settings_of

RECIPE = Path(__file__).parents[2] / "tuned_examples" / "recipes" / "ae_borda_dpo.py"
TOY = {
    "loop.batch_size": 4,
    "rollout.max_tokens": 3,
    "env.tokenizer": "",
    "env.max_prompt_tokens": 0,
    "oracle.kind": "function",
    "oracle.target": "operator:countOf",  # a function of two texts; of ours it makes 0, so every label is a tie
    "evaluation.oracle": None,
    "evaluation.num_prompts": 6,
    "evaluation.every": 0,
    "logging.progress": "off",
}
FAVOURITE = "w5"


def save_silent_policy(path):
    """Answers with end-of-sequence more often than not, whatever it is asked, and else with its favourite word."""
    from transformers import AutoModelForCausalLM

    save_policy(path, tie=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embeddings, which are all the same
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()  # e^6 : e^4 : 1 for each of the 65 others
        model.lm_head.weight[1] = 6.0 / model.config.hidden_size
        model.lm_head.weight[7 + 5] = 4.0 / model.config.hidden_size
    model.save_pretrained(path)
    return path


def rows(path, answer):
    """Clues whose right answer is `answer(i)`."""
    path.write_text("".join(json.dumps({**ROWS["jeopardy"](i), "answer": answer(i)}) + "\n" for i in range(24)))
    return str(path)


def test_jeopardy_spends_its_labels_and_logs_how_often_the_policy_says_nothing(cluster, tmp_path):
    settings = settings_of(runpy.run_path(str(RECIPE))["CONFIG"], {"task": "jeopardy", "placement": "laptop"})
    training = rows(tmp_path / "train.jsonl", lambda i: f"w{i}")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(
        "".join(
            json.dumps({**ROWS["jeopardy"](100 + i), "answer": FAVOURITE if i < 2 else "w9"}) + "\n" for i in range(6)
        )
    )
    settings |= TOY | {"env.path": training, "env.heldout": str(heldout), "budget": 8}
    settings |= {"policy": str(save_silent_policy(tmp_path / "policy")), "run_dir": str(tmp_path / "run")}
    result = rayalign.run(settings.pop("agent"), settings.pop("env"), **settings)

    bought = list(Ledger(result.path / "ledger.arrow", read_only=True).preferences())
    assert result.labels_spent == len(bought) == 8
    assert {(p.duel.first.source, p.duel.second.source) for p in bought} == {("policy", "reference")}
    before = result.evaluations.to_pylist()[0]
    assert before["metric/null_rate"] == 1.0, "greedily it says nothing"
    assert before["metric/right"] == 2 / 6, "made to speak, it says its favourite word"
    assert before["metric/null_rate_if_wrong"] == before["metric/null_rate_if_right"] == 1.0
    page = (result.path / "report.html").read_text()
    assert "null_rate_if_wrong" in page and "1.000 -&gt; 1.000" in page
