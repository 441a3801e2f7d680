"""Answers in other people's formats, by real engines in this process; and the harness's command."""

import json
import sys

import pytest
import torch
from made_runs import made_run
from random_policies import save_policy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rayalign.after.aligned import Aligned, load_chooser
from rayalign.after.answers import TEMPERATURES, read_rows, write_answers
from rayalign.after.harness import harness_command, run_harness
from rayalign.agents.sea import SEA
from rayalign.cli import app
from rayalign.errors import ConfigError, DataError, RayalignError
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.types import Prompt

HERE = {"rollout.num_replicas": 0, "rollout.engine": "transformers", "rollout.max_tokens": 6}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return str(save_policy(tmp_path_factory.mktemp("chat") / "chatty", template=True))


@pytest.fixture(scope="module")
def passive(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("passive") / "run")


@pytest.fixture(scope="module")
def sea(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("sea") / "run", "sea")


def greedy(policy, *messages):
    encoder = PromptEncoder(policy)
    talk = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), messages, strict=False)
    ]
    prompt = encoder.encode(Prompt(id="p", text="", token_ids=(), meta={"messages": talk}))
    sampling = Aligned.find(policy, HERE).rollout.sampling(n=1, temperature=0)
    return TransformersEngine(policy).generate([prompt], sampling, seed=0)[0][0].text


def test_alpaca_evals_file_has_instruction_output_generator_and_the_dataset(chat, tmp_path):
    rows = [
        {"dataset": "helpful_base", "instruction": "w1 w2", "output": "theirs", "generator": "them"},
        {"instruction": "w3", "input": "w4"},
    ]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    out = write_answers(chat, tmp_path / "eval.json", tmp_path / "out.json", format="alpaca_eval", **HERE)
    assert json.loads(out.read_text()) == [
        {
            "dataset": "helpful_base",
            "instruction": "w1 w2",
            "output": greedy(chat, "w1 w2"),
            "generator": "chatty",
        },
        {"instruction": "w3", "input": "w4", "output": greedy(chat, "w3\n\nw4"), "generator": "chatty"},
    ]


def test_mt_benchs_second_turn_sees_the_first_and_categories_have_their_temperatures(chat, tmp_path):
    rows = [
        {"question_id": 81, "category": "math", "turns": ["w1", "w2 w3"]},
        {"question_id": 82, "category": "writing", "turns": ["w1", "w2 w3"]},
        {"question_id": 83, "category": "coding", "turns": ["w5"]},
    ]
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for seed in (0, 1):
        out = write_answers(
            chat, questions, tmp_path / f"{seed}.jsonl", format="mt_bench", name="mine", seed=seed, **HERE
        )
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    first = greedy(chat, "w1")
    assert [row["question_id"] for row in found[0]] == [81, 82, 83]
    assert set(found[0][0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert found[0][0]["model_id"] == "mine" and len({row["answer_id"] for row in found[0]}) == 3
    assert found[0][0]["choices"] == [{"index": 0, "turns": [first, greedy(chat, "w1", first, "w2 w3")]}]
    assert found[0][2]["choices"][0]["turns"] == [greedy(chat, "w5")]
    same = [one["choices"] == other["choices"] for one, other in zip(*found, strict=True)]
    assert same == [True, False, True]  # what is sampled depends on the seed
    assert TEMPERATURES["math"] == 0.0 and TEMPERATURES["writing"] == 0.7


def test_best_of_n_is_the_posteriors_pick_among_the_same_samples(sea, tmp_path):
    agent = load_chooser(str(sea.path))
    assert isinstance(agent, SEA) and agent.posterior.num_labels == 12  # observed again from the ledger
    rows = [{"instruction": f"pick for c{i}"} for i in range(4)]
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    questions, out = tmp_path / "eval.json", tmp_path / "out.json"
    write_answers(sea.path, questions, out, format="alpaca_eval", best_of=6, seed=3)
    aligned = Aligned.find(sea.path)
    encoder, engine = PromptEncoder(aligned.policy), TransformersEngine(aligned.policy)
    prompts = [encoder.encode(Prompt(id="question", text=row["instruction"], token_ids=())) for row in rows]
    groups = engine.generate(prompts, aligned.rollout.sampling(n=6), seed=3)
    picks = [agent.best_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    assert [row["output"] for row in json.loads(out.read_text())] == [
        group[pick].text for group, pick in zip(groups, picks, strict=True)
    ]
    assert any(picks)


def test_nobody_picks_where_nobody_has_learned_to(chat, passive, sea, tmp_path):
    (tmp_path / "eval.json").write_text('[{"instruction": "w1"}]')

    def best_of_4(what, **more):
        write_answers(what, tmp_path / "eval.json", tmp_path / "out.json", format="alpaca_eval", best_of=4, **more)

    with pytest.raises(ConfigError, match=r"'passive' has no model of its own.*rayalign replay"):
        best_of_4(passive.path)
    with pytest.raises(ConfigError, match="is no run directory"):
        best_of_4(chat)
    with pytest.raises(ConfigError, match=r"rollout\.temperature=0 makes them all the same"):
        best_of_4(sea.path, **{"rollout.temperature": 0.0})
    with pytest.raises(ConfigError, match="temperature=0 makes them all the same"):
        best_of_4(sea.path, temperature=0.0)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("text", "format", "message"),
    [
        ("", "alpaca_eval", "no questions"),
        ("{", "alpaca_eval", "neither a JSON list nor JSON lines"),
        ("[3]", "alpaca_eval", "question 1 is a JSON int"),
        ('[{"instruction": "w"}, {"prompt": "w"}]', "alpaca_eval", "question 2: field 'instruction'"),
        ('{"question_id": 1, "turns": "w"}', "mt_bench", "question 1: field 'turns'"),
        ('{"question_id": 1, "turns": [""]}', "mt_bench", "question 1: field 'turns'"),
        ('{"turns": ["w"]}', "mt_bench", "question_id"),
    ],
)
def test_mistakes_in_the_questions_are_told_with_their_place(tmp_path, text, format, message):
    (tmp_path / "questions").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "questions", format)


def test_mistakes_in_what_is_asked_for_are_told_and_nothing_is_overwritten(chat, passive, tmp_path):
    questions, out = tmp_path / "eval.json", tmp_path / "out.json"
    questions.write_text(json.dumps([{"instruction": "w1 " * 300}]))
    with pytest.raises(ConfigError, match="Did you mean 'alpaca_eval'"):
        write_answers(chat, questions, out, format="alpaca")
    with pytest.raises(DataError, match=r"more than rollout\.max_prompt_tokens|exceeds the"):
        write_answers(chat, questions, out, format="alpaca_eval", **HERE)
    with pytest.raises(ConfigError, match=r"learner\.learning_rate has no meaning after the run"):
        write_answers(chat, questions, out, format="alpaca_eval", **{"learner.learning_rate": 1.0})
    with pytest.raises(DataError, match="no directory"):
        write_answers(chat, questions, tmp_path / "no" / "out.json", format="alpaca_eval")
    out.write_text("mine")
    with pytest.raises(DataError, match="nothing is overwritten"):
        write_answers(chat, questions, out, format="alpaca_eval")
    assert out.read_text() == "mine"


def test_a_later_turn_that_could_become_too_long_is_told_before_the_first_is_answered(chat, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["w1", "w2"]}')
    settings = HERE | {"rollout.max_prompt_tokens": 20, "rollout.max_tokens": 30}
    with pytest.raises(ConfigError, match=r"turn 2 of 'w1' can be (\d+) tokens.*Set rollout\.max_prompt_tokens=\1"):
        write_answers(chat, tmp_path / "q.jsonl", tmp_path / "out.jsonl", format="mt_bench", **settings)


def test_a_second_turn_needs_a_chat_template(passive, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["pick for c0", "c1"]}')
    with pytest.raises(DataError, match="no chat template"):
        write_answers(passive.path, tmp_path / "q.jsonl", tmp_path / "out.jsonl", format="mt_bench")
    assert not list(tmp_path.glob("*out*"))


# -- the harness ------------------------------------------------------------------------------------------------------
def test_the_harness_is_given_the_policy_its_chat_template_and_the_tasks(chat, passive):
    aligned = Aligned.find(chat, {"rollout.dtype": "bfloat16"})
    command = harness_command(aligned, "ifeval, gsm8k", "results", limit=5, extra=["--num_fewshot", "2"])
    assert command == [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", json.dumps({"pretrained": chat, "dtype": "bfloat16"})),
        *("--tasks", "ifeval", "gsm8k", "--output_path", "results", "--device", "cpu"),
        *("--apply_chat_template", "--limit", "5", "--num_fewshot", "2"),
    ]
    assert "--apply_chat_template" not in harness_command(Aligned.find(passive.path), "ifeval", "results")
    with pytest.raises(ConfigError, match="needs names of tasks"):
        harness_command(aligned, " , ", "results")
    with pytest.raises(DataError, match=r"include_path=.*is no directory"):
        harness_command(aligned, "mine", "results", include_path="tasks-that-are-not-there")


TASK = """
task: chooses
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_the_harness_itself_scores_the_policy_as_its_own_logits_do(chat, tmp_path):
    pytest.importorskip("lm_eval", reason="rayalign[harness] is not installed")
    tokenizer, model = AutoTokenizer.from_pretrained(chat), AutoModelForCausalLM.from_pretrained(chat)
    questions, choices = ["w1 w2", "w3 w4", "w5"], [" w7", " w8"]
    rows = []
    for question in questions:
        message = {"role": "user", "content": question}
        ids = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likely = int(model(ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["w7", "w8"])].argmax())
        rows.append({"question": question, "choices": choices, "answer": likely})
    rows[0]["answer"] = 1 - rows[0]["answer"]  # one that the policy gets wrong
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "chooses.yaml").write_text(TASK % (tmp_path / "tasks" / "rows.jsonl"))
    arguments = ["evaluate", chat, "--harness", "chooses", "--include-path", str(tmp_path / "tasks")]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "results").glob("*/results_*.json")
    assert json.loads(written.read_text())["results"]["chooses"]["acc,none"] == pytest.approx(2 / 3)


def test_a_harness_that_is_missing_or_fails_is_told(chat, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rayalign\[harness\]'"):
        run_harness(chat, "ifeval", tmp_path / "results")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr("rayalign.after.harness.harness_command", lambda *_, **__: failing)
    with pytest.raises(RayalignError, match="exit code 3"):
        run_harness(chat, "ifeval", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old").write_text("")
    with pytest.raises(DataError, match="is there already"):
        run_harness(chat, "ifeval", tmp_path / "results")


def test_the_command_line_writes_answers(chat, tmp_path):
    (tmp_path / "eval.json").write_text('[{"instruction": "w1"}]')
    arguments = ["evaluate", chat, "--format", "alpaca_eval", "--prompts", str(tmp_path / "eval.json")]
    settings = [word for name, value in HERE.items() for word in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.json"), *settings])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())[0]["output"] == greedy(chat, "w1")
    wrong = CliRunner().invoke(app, ["evaluate", chat, "--out", str(tmp_path / "o")])
    assert wrong.exit_code == 2 and "--harness" in wrong.output
