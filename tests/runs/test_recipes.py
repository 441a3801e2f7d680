"""That the recipes hold the papers' numbers, settings that exist, data that is read, and a place for everything."""

import ast
import inspect
import itertools
import math
import runpy
import typing
from pathlib import Path

import pytest
from dataset_rows import ROWS, write_rows
from recipe_variants import FILES, FOLDER, recipe, resolved, variants
from typer.testing import CliRunner

import rayalign.loop.loop
from rayalign.agents import agent_class, make_agent
from rayalign.cli import SHORT_NAMES, app, load_example
from rayalign.config import apply
from rayalign.env import make_world
from rayalign.env.prompts import Prompts
from rayalign.errors import ConfigError, ResourceError
from rayalign.runs.recipe import choices_of, settings_of
from rayalign.runs.resources import plan, shares
from rayalign.runs.config import RunConfig

ROWS_OF = {
    "trl-lib/tldr": "tldr",
    "HuggingFaceH4/ultrafeedback_binarized": "ultrafeedback",
    "Anthropic/hh-rlhf": "hh",
    "stanfordnlp/SHP": "shp",
    "data/haiku_train.csv": "haikus",
    "data/train_jeopardy_data.json": "jeopardy",
    "openai/webgpt_comparisons": "webgpt",
}
"""Data of a recipe -> rows of the same form."""


def world_of(settings, tmp_path, **changes):
    """The recipe's world on a small local file whose rows have the form of its data."""
    ending = Path(settings["env.path"]).suffix or ".jsonl"  # of files: that of the authors' own
    path = write_rows(tmp_path / f"rows{ending}", ROWS_OF[settings["env.path"]])
    here = {name.removeprefix("env."): value for name, value in settings.items() if name.startswith("env.")}
    assert set(here) <= set(inspect.signature(Prompts).parameters)
    for name in ("split", "heldout_split", "revision", "tokenizer", "max_prompt_tokens", "max_row_tokens"):
        here.pop(name, None)  # of the data on the hub
    return make_world(settings["env"], **{**here, "path": path, "heldout": 0.25, **changes})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_header_says_command_hardware_placement_source_and_that_it_was_not_run(file):
    head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    for word in ("Command", "Choices", "Hardware", "Placement", "Result      NOT RUN", "Source", "ray job submit"):
        assert word in head, f"{file.name}: its docstring does not say {word!r}"
    assert f"rayalign run tuned_examples/recipes/{file.name}" in head
    for choice, (kind, _) in choices_of(recipe(file.stem)).items():
        assert f"recipe.{choice}" in head, f"{file.name}: its docstring does not name recipe.{choice}"
        assert all(str(value) in head for value in typing.get_args(kind)), f"{file.name}: values of recipe.{choice}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_combination_of_choices_is_a_config_with_its_agent_and_loss(file):
    found = list(variants(file.stem))
    assert len(found) >= 6
    for choices, settings in found:
        config = resolved(settings)
        assert config.agent.loss == choices.get("loss", settings["agent.loss"])
        assert type(config.agent) is agent_class(settings["agent"]).Config
        assert config.loop.budget >= config.loop.batch_size > 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_combination_fits_the_machine_it_is_for_and_says_so_where_there_is_less(file):
    for choices, settings in variants(file.stem):
        config, agent = resolved(settings), make_agent(settings["agent"])
        agent = type(agent)(config.agent)
        gpus = sum(share.processes * share.gpus for share in shares(config, agent))
        if choices["placement"] == "laptop":
            assert gpus == 0 and plan(config, agent, {"CPU": 2.0})
            continue
        machine = choices["gpus"] or math.ceil(gpus)
        assert machine - 1 < gpus <= machine and machine in (1, 2, 8)
        assert plan(config, agent, {"CPU": 96.0, "GPU": float(machine)}) == config, "nothing has to be scaled down"
        with pytest.raises(
            ResourceError, match=rf"asks for {gpus:g} GPUs, but the cluster has {machine // 2}: .*learner"
        ):
            plan(config, agent, {"CPU": 96.0, "GPU": float(machine // 2)})


PAPERS = [
    # SEA, app. F.1
    ("tldr_pythia", {}, {"budget": 50_000, "env.limit": 50_000, "loop.batch_size": 128, "rollout.temperature": 0.7,
     "learner.learning_rate": 5e-7, "learner.schedule": "cosine", "agent.num_candidates": 20, "agent.beta": 0.1,
     "agent.posterior.members": 20, "agent.posterior.hidden": 128, "agent.posterior.updates": 5,
     "agent.gamma_burn_in": 1000, "agent.gamma_after": 0.7, "evaluation.num_prompts": 1000,
     "evaluation.temperature": 0.0, "evaluation.against": "initial", "loop.max_staleness": 0,
     "oracle.target": "Skywork/Skywork-Reward-Llama-3.1-8B", "oracle.labels": "deterministic",
     "agent": "sea", "agent.loss": "dpo", "agent.exploration": "bai_ts", "oracle.kind": "reward_model",
     "env.path": "trl-lib/tldr", "policy": "trl-lib/pythia-1b-deduped-tldr-sft"}),
    ("tldr_pythia", {"loss": "slic"}, {"agent.loss": "slic", "agent.beta": 0.2}),
    ("tldr_pythia", {"agent": "xpo", "size": "2.8b"}, {"agent.alpha": 5e-6, "agent.beta": 0.1}),
    ("tldr_pythia", {"agent": "apl"}, {"agent.prompts_per_duel": 1024 // 128, "agent.num_candidates": 8}),
    ("tldr_pythia", {"agent": "offline", "loss": "ipo"}, {"agent": "passive", "agent.schedule": "offline",
     "agent.loss": "ipo", "agent.beta": 0.2}),
    ("tldr_pythia", {"agent": "passive", "loss": "ipo"}, {"agent": "passive", "agent.schedule": "online",
     "agent.loss": "ipo", "agent.beta": 0.2}),
    ("tldr_pythia", {"agent": "offline"}, {"agent.loss": "dpo", "agent.beta": 0.1}),
    ("tldr_pythia", {"size": "2.8b"}, {"policy": "trl-lib/pythia-2.8b-deduped-tldr-sft"}),
    ("tldr_pythia", {"size": "6.9b"}, {"policy": "trl-lib/pythia-6.9b-deduped-tldr-sft"}),
    # SEA, app. F.2
    ("ultrafeedback_llama3", {}, {"agent.loss": "simpo", "agent.beta": 10.0, "agent.gamma_over_beta": 0.3,
     "learner.learning_rate": 8e-7, "loop.batch_size": 128, "evaluation.temperature": 0.9, "rollout.temperature": 0.7,
     "env.max_prompt_tokens": 1800, "oracle.target": "RLHFlow/ArmoRM-Llama3-8B-v0.1", "agent.num_candidates": 20,
     "agent": "sea", "agent.exploration": "bai_ts", "agent.posterior.members": 20, "agent.posterior.hidden": 128,
     "agent.posterior.updates": 5, "agent.gamma_burn_in": 1000, "agent.gamma_after": 0.7, "learner.schedule": "cosine",
     "policy": "meta-llama/Meta-Llama-3-8B-Instruct", "env.path": "HuggingFaceH4/ultrafeedback_binarized"}),
    ("ultrafeedback_llama3", {"agent": "passive"}, {"agent": "passive", "agent.schedule": "online",
     "agent.loss": "simpo"}),
    ("ultrafeedback_llama3", {"agent": "offline"}, {"agent": "passive", "agent.schedule": "offline",
     "agent.loss": "simpo"}),
    # SELM, app. D; duels, three a prompt
    ("selm_ultrafeedback", {"model": "llama3"}, {"agent.alpha": 1e-4, "loop.batch_size": 3 * 128, "agent.iterations": 3,
     "learner.learning_rate": 5e-7, "agent.final_learning_rate": 1e-7 / 5e-7, "agent.decay": "linear",
     "agent.warmup": 0.1, "policy": "meta-llama/Meta-Llama-3-8B-Instruct", "agent": "selm", "agent.fresh": 1,
     "agent.cycle": "cosine", "agent.beta": 0.01, "agent.batches_per_iteration": 61_135 // 3 // 128,
     "budget": 3 * 3 * 128 * (61_135 // 3 // 128), "oracle.labels": "deterministic"}),
    ("selm_ultrafeedback", {"model": "zephyr"}, {"agent.alpha": 1e-3, "loop.batch_size": 3 * 256, "agent.decay": "last",
     "policy": "HuggingFaceH4/mistral-7b-sft-beta", "agent.iterations": 3, "agent.warmup": 0.1, "agent.beta": 0.01,
     "learner.learning_rate": 5e-7, "budget": 3 * 3 * 256 * (61_135 // 3 // 256)}),
    ("selm_ultrafeedback", {"model": "zephyr", "stage": "dpo"}, {"loop.batch_size": 256, "oracle.kind": "data",
     "budget": 256 * (61_135 // 3 // 256), "agent.beta": 0.01, "learner.learning_rate": 5e-7,
     "evaluation.oracle.kind": "reward_model", "evaluation.oracle.dtype": "bfloat16",
     "evaluation.oracle.num_replicas": 4}),
    # AE-Borda, app. K.1 and section 6.2
    ("ae_borda_dpo", {}, {"agent.beta": 0.1, "agent.dropout.rate": 0.05, "agent.dropout.width": 4.0,
     "learner.learning_rate": 5e-7, "loop.batch_size": 32, "agent.prompts_per_duel": 96 // 32, "evaluation.every": 4096,
     "oracle.target": "gpt-4o-mini", "evaluation.oracle.target": "gpt-4o", "evaluation.oracle.judge.order": "both",
     "evaluation.metrics": ()}),
    ("ae_borda_dpo", {"task": "shp"}, {"evaluation.every": 2048}),
    ("ae_borda_dpo", {"task": "haikus"}, {"evaluation.every": 2048}),
    ("ae_borda_dpo", {"task": "jeopardy"}, {"evaluation.every": 4096, "evaluation.metrics": ("null_rate",)}),
    # AE-DPO, app. H and K.2
    ("ae_dpo", {}, {"agent.beta": 0.1, "agent.dropout.rate": 0.05, "agent.dropout.width": 4.0, "budget": 100_000,
     "learner.learning_rate": 5e-7, "loop.batch_size": 32, "agent.prompts_per_duel": 128 // 32, "oracle.kind": "data",
     "evaluation.every": 2048, "evaluation.against": "reference", "evaluation.oracle.target": "gpt-3.5-turbo",
     "agent": "ae_dpo", "evaluation.oracle.judge.order": "both", "env.tokenizer": "huggyllama/llama-7b"}),
    ("ae_dpo", {"agent": "uniform"}, {"agent": "ae_dpo", "agent.prompts_per_duel": 1}),
    ("ae_dpo", {"task": "jeopardy", "agent": "us_dpo"}, {"agent": "us_dpo", "evaluation.metrics": ("null_rate",)}),
    # ActiveDPO, section 4
    ("active_dpo", {}, {"agent.num_candidates": 3, "agent.prompts_per_duel": 1000 // 50, "loop.batch_size": 50,
     "learner.updates_per_batch": 4, "learner.learning_rate": 1e-4, "learner.lora.rank": 128,
     "learner.lora.alpha": 512.0, "agent.dim": 8192, "evaluation.num_prompts": 100,
     "oracle.target": "OpenAssistant/reward-model-deberta-v3-large", "agent": "active_dpo",
     "agent.normalize": "response", "agent.loss": "dpo", "env.tokenizer": "google/gemma-2b"}),
    ("active_dpo", {"model": "qwen3-4b"}, {"env.tokenizer": "Qwen/Qwen3-4B"}),
    ("active_dpo", {"model": "llama-2-7b"}, {"env.tokenizer": "meta-llama/Llama-2-7b-hf"}),
    *(("active_dpo", {"agent": name}, {"agent": name, "agent.num_candidates": 3, "agent.prompts_per_duel": 20})
      for name in ("random", "apo", "aplp")),
    ("active_dpo", {"task": "webgpt"}, {"oracle.target": "OpenAssistant/reward-model-deberta-v3-large-v2"}),
]  # fmt: skip
"""What the papers print, typed in from there; what follows from it, and what was chosen where they print nothing."""


@pytest.mark.parametrize(
    ("name", "choices", "printed"), PAPERS, ids=[f"{n}-{'-'.join(c.values())}" for n, c, _ in PAPERS]
)
def test_the_numbers_are_those_that_the_paper_prints(name, choices, printed):
    settings = settings_of(recipe(name), choices)
    assert {key: settings[key] for key in printed} == printed


def test_selm_learns_at_the_rates_of_the_paper():
    for model, expected in (("llama3", [5e-7, 3e-7, 1e-7]), ("zephyr", [5e-7, 5e-7, 1e-7])):
        config = resolved(settings_of(recipe("selm_ultrafeedback"), {"model": model}))
        agent, n = agent_class("selm")(config.agent), config.agent.batches_per_iteration
        peaks = [max(agent.learning_rate_factor(t * n + b) for b in range(n)) for t in range(3)]
        assert [config.learner.learning_rate * peak for peak in peaks] == pytest.approx(expected)
        assert agent.prompts_per_batch(config.loop.batch_size) * n * 3 <= 61_135, "no prompt comes twice"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_columns_that_a_recipe_asks_for_are_those_of_its_data(file, tmp_path):
    seen = set()
    for _, settings in variants(file.stem):
        data = (settings["env.path"], settings.get("env.format"))
        if data in seen:
            continue
        seen.add(data)
        source = world_of(settings, tmp_path).source
        row = next(iter(source.prompts(_row(settings), "row 1")))
        assert row.text
        given = make_agent(settings["agent"]).proposals()
        if any(proposal.source == "data" for proposal in given):
            assert row.pair is not None
        if settings["oracle.kind"] == "data":
            assert row.meta["preferred"] in (0, 1)
        if settings["evaluation.against"] == "reference" or "{reference}" in settings.get("oracle.judge.template", ""):
            assert row.reference
    assert seen


def _row(settings):
    return ROWS[ROWS_OF[settings["env.path"]]](0)


def test_there_is_a_recipe_for_everything_that_the_papers_compare():
    found = {(name, *pair) for name in (file.stem for file in FILES) for _, s in variants(name) for pair in _labels(s)}
    for size in ("1b", "2.8b", "6.9b"):
        policy = f"trl-lib/pythia-{size}-deduped-tldr-sft"
        for agent, losses in {
            "passive": ("dpo", "ipo", "slic"),
            "sea": ("dpo", "ipo", "slic"),
            "xpo": ("dpo",),
            "apl": ("dpo",),
        }.items():
            assert {("tldr_pythia", policy, agent, loss) for loss in losses} <= found
    assert ("ultrafeedback_llama3", "meta-llama/Meta-Llama-3-8B-Instruct", "sea", "simpo") in found


def _labels(settings):
    yield settings.get("policy"), settings["agent"], settings["agent.loss"]


def test_choices_and_settings_are_typed_on_the_command_line(monkeypatch):
    calls = []
    monkeypatch.setattr(rayalign.loop.loop, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    file = str(FOLDER / "tldr_pythia.py")
    typed = [
        "run",
        file,
        "--set",
        "recipe.size=2.8b",
        "--set",
        "agent.beta=0.3",
        "--set",
        "recipe.agent=xpo",
        "--seed",
        "4",
    ]
    assert CliRunner().invoke(app, typed).exit_code == 0
    ((agent, _), settings) = calls[0]
    assert agent == "xpo" and settings["policy"] == "trl-lib/pythia-2.8b-deduped-tldr-sft"
    assert settings["agent.beta"] == "0.3" and settings["loop.seed"] == 4, "a setting comes after all choices"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["recipe.size=3b"], "recipe.size='3b' must be '1b' | '2.8b' | '6.9b'"),
        (["recipe.sise=1b"], "recipe.sise is not a choice of this example. Did you mean 'size'"),
        (["recipe.agent=apl", "recipe.loss=ipo"], "recipe.loss='ipo': apl is built on DPO"),
    ],
)
def test_a_choice_that_is_none_is_refused(changes, message):
    typed = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(app, ["run", str(FOLDER / "tldr_pythia.py"), *typed])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_an_example_without_choices_says_so():
    plain = FOLDER.parent / "sea_tinyworld.py"
    with pytest.raises(
        ConfigError, match=r"recipe\.size is not a choice of this example\. This example has no choices"
    ):
        load_example(str(plain), {"size": "1b"})
    done = CliRunner().invoke(app, ["run", "sea", "--set", "recipe.size=1b"])
    assert done.exit_code == 2 and "has no choices" in done.output
