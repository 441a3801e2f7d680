"""Costs worked out before a run, against sums done by hand for models whose shapes are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_shapes import BIG, TINY, TINY_PARAMETERS
from tiny_judges import save_llama
from typer.testing import CliRunner

from rayalign.agents import make_agent
from rayalign.agents.agent import Agent
from rayalign.cli import app
from rayalign.config import apply
from rayalign.estimate.calibration import Calibration
from rayalign.estimate.estimate import CALLS_S, START_S, seconds_of, tokens_of
from rayalign.estimate.labelling import LabelTime
from rayalign.estimate.memory import memory_of
from rayalign.estimate.policy_memory import engine_memory, learner_memory
from rayalign.estimate.purchases import calls_per_label, num_evaluations, price_per_label, purchases_of
from rayalign.estimate.shape import ModelShape
from rayalign.learner.config import LearnerConfig
from rayalign.learner.policy import load_policy
from rayalign.rollout.config import RolloutConfig
from rayalign.runs.config import RunConfig


def parts(agent: Agent | None = None, **settings: object) -> dict[str, int]:
    config = apply(LearnerConfig(), settings)
    return learner_memory(config, agent or Agent(), BIG, longest=50, batch_size=8).parts


def test_a_shape_is_read_off_the_policys_config_and_its_parameters_are_counted() -> None:
    shape = ModelShape.of(TINY)
    assert shape.parameters == TINY_PARAMETERS == 347_008
    assert (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary) == (2, 128, 256, 73)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.dtype) == (4, 4, 32, "float32")
    # rank 8 on q, k, v, o (128 + 128 each), gate, up and down (128 + 256 each), in two layers; never on the head
    assert shape.adapters(8) == 2 * 8 * (4 * 256 + 3 * 384)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    policy = load_policy(TINY, apply(LearnerConfig(), {"lora.rank": 8}), seed=0)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == ModelShape.of(TINY).adapters(8)


def test_plain_float32_takes_sixteen_bytes_a_parameter_and_four_more_for_the_reference() -> None:
    found = parts()
    assert (found["weights"], found["gradients"], found["optimizer"], found["reference"]) == (4e6, 4e6, 8e6, 4e6)


def test_plain_bfloat16_keeps_float32_masters() -> None:
    found = parts(dtype="bfloat16")
    assert (found["weights"], found["gradients"], found["optimizer"], found["reference"]) == (2e6, 2e6, 12e6, 2e6)


def test_a_loss_without_reference_keeps_none() -> None:
    assert "reference" not in parts(Simpo())


class Simpo(Agent):
    def needs_reference(self) -> bool:
        return False


def test_lora_trains_float32_adapters_and_needs_no_second_model() -> None:
    found = parts(**{"dtype": "bfloat16", "lora.rank": 10})
    adapters = 10 * (200 + 400)
    assert found["weights"] == 2e6 + 4 * adapters
    assert (found["gradients"], found["optimizer"]) == (4 * adapters, 8 * adapters)
    assert "reference" not in found


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer", "reference"),
    [
        ("ddp", 2e6, 4e6, 12e6, 2e6),  # buckets double the gradients
        ("zero1", 2e6, 2e6, 3e6, 2e6),
        ("zero2", 2e6, 0.5e6, 3e6, 2e6),
        ("zero3", 0.5e6, 0.5e6, 3e6, 0.5e6),
    ],
)
def test_zero_shards_optimizer_then_gradients_then_weights_over_four_workers(
    strategy: str, weights: float, gradients: float, optimizer: float, reference: float
) -> None:
    found = parts(strategy=strategy, num_workers=4, dtype="bfloat16")
    assert (found["weights"], found["gradients"]) == (weights, gradients)
    assert (found["optimizer"], found["reference"]) == (optimizer, reference)


def test_offload_moves_the_optimizer_and_under_zero3_the_weights_to_the_cpu() -> None:
    config = apply(LearnerConfig(), {"strategy": "zero3", "num_workers": 4, "dtype": "bfloat16", "offload": True})
    role = learner_memory(config, Agent(), BIG, longest=50, batch_size=8)
    assert role.host == {"optimizer": 3e6, "weights": 0.5e6}
    assert not {"optimizer", "weights"} & set(role.parts)


def test_activations_grow_with_the_tokens_of_a_micro_batch_up_to_its_bound() -> None:
    # 8 duels are 16 rows of 50 tokens; a layer keeps 6 x 100 + 3 x 100 + 3 x 20 + 4 x 300 numbers of a token
    assert parts()["activations"] == 16 * 50 * 4 * 2160 * 4
    assert parts(micro_batch_tokens=200)["activations"] == 200 * 4 * 2160 * 4
    assert parts(micro_batch_tokens=1)["activations"] == 2 * 50 * 4 * 2160 * 4  # one duel always goes
    assert parts(gradient_checkpointing=True)["activations"] == 16 * 50 * (4 * 100 + 2160) * 4


def test_activations_are_about_what_a_real_backward_pass_keeps() -> None:
    policy = load_policy(TINY, LearnerConfig(), seed=0)
    rows, length = 8, 20
    ids = torch.randint(2, 70, (rows, length))
    response = torch.zeros(rows, length, dtype=torch.bool)
    response[:, 10:] = True
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = policy.hidden(ids, torch.ones_like(ids))
    assert hidden.requires_grad
    expected = rows * length * ModelShape.of(TINY).activation_values(False) * 4
    assert 0.67 < sum(kept.values()) / expected < 1.5


def test_a_cache_holds_keys_and_values_of_every_row() -> None:
    # 2 x 4 layers x 2 heads x 10 numbers of 4 bytes a token; 6 prompts x 5 samples of 20 + 30 tokens
    config = apply(RolloutConfig(), {"engine": "transformers", "max_tokens": 30})
    found = engine_memory(config, BIG, prompt_tokens=20, samples=5, batch_prompts=6)
    assert found.parts["KV cache"] == 30 * 50 * 640
    assert found.parts["weights"] == 4e6
    bounded = apply(config, {"max_batch_tokens": 500})
    assert engine_memory(bounded, BIG, prompt_tokens=20, samples=5, batch_prompts=6).parts["KV cache"] == 500 * 640
    halves = apply(config, {"num_replicas": 2})
    assert engine_memory(halves, BIG, prompt_tokens=20, samples=5, batch_prompts=6).parts["KV cache"] == 15 * 50 * 640


def test_float16_weights_are_float32_on_a_cpu() -> None:
    half = replace(BIG, dtype="float16")
    assert engine_memory(RolloutConfig(), half, prompt_tokens=9, samples=1, batch_prompts=1).parts["weights"] == 4e6


def test_agents_that_ask_more_models_have_more_roles() -> None:
    def roles(name: str) -> list[str]:
        return [role.role for role in memory_of(RunConfig(), make_agent(name), BIG, 20, 8)[0]]

    assert roles("passive") == ["engine", "learner"]
    assert roles("apl") == ["engine", "scorer", "learner"]
    assert "reference engine" in roles("xpo")


def run_config(**settings: object) -> RunConfig:
    return apply(RunConfig(), settings)


@pytest.mark.parametrize(
    ("budget", "every", "at_start", "evaluations"),
    [(100, 0, True, 2), (100, 50, True, 3), (100, 30, True, 5), (100, 30, False, 4), (100, 200, False, 1)],
)
def test_evaluations_happen_at_the_start_at_multiples_and_at_the_end(budget, every, at_start, evaluations) -> None:
    config = run_config(
        **{"loop.budget": budget, "evaluation.every": every, "evaluation.at_start": at_start}  # type: ignore[arg-type]
    )
    assert num_evaluations(config) == evaluations


def test_a_judge_is_paid_by_the_call_in_both_orders_and_for_what_is_asked_again() -> None:
    config = run_config(
        **{
            "loop.budget": 1000,
            "evaluation.every": 500,
            "oracle.kind": "judge",
            "oracle.judge.price": 0.01,
            "oracle.judge.recheck": 0.1,
            "oracle.judge.max_spend": 20.0,
        }
    )
    assert calls_per_label(config.oracle) == 2.1
    found = purchases_of(config, heldout=100)
    assert (found.labels, found.evaluation_labels) == (1000, 300)  # at 0, 500 and 1000 labels
    assert found.calls == pytest.approx(2.1 * 1300)
    assert found.money == pytest.approx(27.3)
    (judge,) = found.judges
    assert judge.money == pytest.approx(27.3) and "oracle.judge.max_spend=20 is LESS" in judge.verdict()
    once = apply(config, {"oracle.judge.order": "random", "oracle.judge.recheck": 0.0})
    assert purchases_of(once, heldout=100).calls == 1300


def test_each_judge_is_held_against_its_own_cap_and_one_without_a_price_is_named() -> None:
    config = run_config(
        **{
            "loop.budget": 1000,
            "evaluation.every": 500,
            "oracle.kind": "judge",
            "oracle.judge.price": 1.0,
            "oracle.judge.order": "random",
            "oracle.judge.max_spend": 10.0,
            "evaluation.oracle.kind": "judge",
            "evaluation.oracle.judge.price": 0.01,
            "evaluation.oracle.judge.max_spend": 1e6,
        }
    )
    labels, evaluation = purchases_of(config, heldout=100).judges
    assert (labels.section, labels.money) == ("oracle", 1000.0) and "LESS" in labels.verdict()
    assert (evaluation.section, evaluation.money) == ("evaluation.oracle", 6.0) and "enough" in evaluation.verdict()
    unpriced = apply(config, {"evaluation.oracle.judge.max_spend": 0.0, "evaluation.oracle.judge.price": 0.0})
    assert "evaluation.oracle.judge.price is not set" in purchases_of(unpriced, heldout=100).judges[1].verdict()


def test_a_label_of_another_oracle_has_the_price_that_is_set() -> None:
    config = run_config(**{"loop.budget": 10, "evaluation.every": 0, "oracle.price": 0.5})
    assert price_per_label(config.oracle) == 0.5
    assert purchases_of(config, heldout=4).money == 0.5 * (10 + 2 * 4)


def test_sea_needs_more_batches_where_it_labels_pairs_itself() -> None:
    sea = make_agent("sea")
    sea = type(sea)(replace(sea.config, gamma_burn_in=320, gamma_after=0.5))
    assert sea.expected_batches(320, 32) == 10
    assert sea.expected_batches(640, 32) == 10 + 20
    assert Agent().expected_batches(100, 32) == 4


def test_tokens_are_those_of_all_batches_and_answers() -> None:
    config = run_config(
        **{"loop.budget": 64, "loop.batch_size": 32, "rollout.max_tokens": 10, "evaluation.every": 0, "loop.epochs": 2}
    )
    found = tokens_of(config, Agent(), [20, 40], heldout=5, found=None)
    assert found.batches == 2 and found.prompt_mean == 30 and found.prompt_longest == 40 and not found.measured
    assert found.generated == (2 * 32 * 2 + 2 * 5) * 10
    assert found.trained == 2 * (2 * 32 * 2 * 40)
    assert found.referred == 2 * 32 * 2 * 40


def test_an_agent_that_skips_half_of_its_prompts_needs_twice_the_batches() -> None:
    config = run_config(**{"loop.budget": 64, "loop.batch_size": 32, "rollout.max_tokens": 10, "evaluation.every": 0})
    measured = Calibration(seconds={}, response_tokens=4.0, duels=16.0)
    found = tokens_of(config, Agent(), [30], heldout=5, found=measured)
    assert found.batches == 4
    assert found.referred == 4 * 16 * 2 * 34
    assert found.generated == (4 * 32 * 2 + 2 * 5) * 4
    full = replace(measured, duels=32.0)
    assert tokens_of(config, Agent(), [30], heldout=5, found=full).batches == 2


def test_time_adds_up_in_turn_and_overlaps_where_generation_may_run_ahead() -> None:
    seconds = {"generate": 4.0, "select": 1.0, "learn": 3.0, "observe": 2.0, "sync": 0.5, "evaluate": 10.0}
    found = Calibration(seconds=seconds, response_tokens=1.0, duels=1.0)
    config = run_config(**{"evaluation.every": 0, "rollout.num_replicas": 2})
    assert seconds_of(config, 10, found) == pytest.approx(START_S + 10 * (2 + 1 + CALLS_S + 3 + 0.5) + 2 * 5)
    ahead = apply(config, {"loop.max_staleness": 1})
    assert seconds_of(ahead, 10, found) == pytest.approx(START_S + 10 * 3.5 + 2 * 5)


def test_time_of_labelling_is_part_of_the_time_for_the_budget_and_for_evaluation() -> None:
    found = Calibration(seconds={"generate": 4.0, "learn": 3.0}, response_tokens=1.0, duels=1.0)
    config = run_config(**{"evaluation.every": 0})
    slow = LabelTime(section="oracle", training=50.0, evaluation=7.0, how="")
    unknown = LabelTime(section="evaluation.oracle", training=None, evaluation=None, how="people")
    without = seconds_of(config, 10, found)
    assert seconds_of(config, 10, found, [slow, unknown]) == pytest.approx(without + 57)
    ahead = apply(config, {"loop.max_staleness": 1})  # 4.2 s of generation and 5 s of labelling, beside 3 s of learning
    assert seconds_of(ahead, 10, found, [slow]) == pytest.approx(START_S + 10 * (4 + CALLS_S + 5) + 7)


def test_the_command_tells_the_costs_and_buys_and_writes_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        app,
        ["estimate", "sea", "--budget", "640", "--set", "agent.gamma_burn_in=320", "--set", "agent.gamma_after=0.5"],
    )
    assert done.exit_code == 0, done.output
    told = {
        cells[0].strip(): cells[1].strip() for line in done.stdout.splitlines() if len(cells := line.split("│")[1:]) > 2
    }
    assert told["labels"] == "640"
    assert told["batches"] == "30"
    assert told["parameters"] == "347k"
    assert told["time"] == "not known"
    assert told["memory, posterior"].endswith("(cpu)")
    assert "memory, the fullest GPU" not in told and "time of labelling, oracle" not in told
    assert not list(tmp_path.iterdir())


def test_a_calibration_times_every_stage_and_free_oracles_and_knows_the_length_of_responses(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    judge = save_llama(tmp_path_factory.mktemp("judge"))
    monkeypatch.chdir(tmp_path)
    settings = ["evaluation.num_prompts=8", "loop.batch_size=8", "evaluation.oracle.kind=reward_model"]
    settings.append(f"evaluation.oracle.target={judge}")
    changes = [word for setting in settings for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["estimate", "passive", "--calibrate", *changes])
    assert done.exit_code == 0, done.output
    assert "measured here" in done.stdout and "not known" not in done.stdout
    for stage in ("generate", "select", "observe", "learn", "sync", "evaluate", "time of labelling, oracle"):
        assert stage in done.stdout
    for section in ("oracle", "evaluation.oracle"):
        (line,) = [line for line in done.stdout.splitlines() if f"time of labelling, {section} " in line]
        assert "min" in line and "measured here, by 1 at a time" in line
    assert not list(tmp_path.iterdir())


def test_a_calibration_in_which_all_answers_are_alike_says_that_no_label_would_be_bought() -> None:
    done = CliRunner().invoke(app, ["estimate", "passive", "--calibrate", "--set", "rollout.temperature=0"])
    assert done.exit_code == 2, done.output
    assert "agent 'passive' found no pair to ask about in 3 batches of 32 prompts" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate", "see"], "Did you mean 'sea'"),
        (["estimate", "none.py"], "'none.py' is not a file"),
        (["estimate", "sea", "--budget", "0"], "loop.budget=0 must be at least 1"),
        (["estimate", "sea", "--set", "learner.dtyp=float32"], "is not a setting"),
        (["estimate", "sea", "--policy", "/no/such/model"], "policy='/no/such/model'"),
    ],
)
def test_mistakes_are_told_as_the_run_would_tell_them(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
