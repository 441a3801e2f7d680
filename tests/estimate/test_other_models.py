"""Memory of models that are not the policy: oracles' and posteriors', against what the real ones hold once loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_shapes import TINY
from tiny_judges import save_bert, save_llama

from rayalign.agents import make_agent
from rayalign.agents.agent import AgentContext
from rayalign.config import apply
from rayalign.errors import ConfigError
from rayalign.estimate.memory import memory_of
from rayalign.estimate.oracle_memory import oracle_memory
from rayalign.estimate.posterior_memory import posterior_memory
from rayalign.estimate.role import RoleMemory, Unknown
from rayalign.estimate.shape import ModelShape
from rayalign.runs.config import RunConfig
from rayalign.serve.classifier import Classifier
from rayalign.serve.config import OracleConfig

# Of `save_llama`: 48 words of width 32, MLP 64, two layers, and a head of one row
LINEAR = 2 * (4 * 32 * 32 + 3 * 32 * 64)
LLAMA = LINEAR + 2 * 2 * 32 + 48 * 32 + 32 + 32


def oracle(**settings: object) -> OracleConfig:
    return apply(OracleConfig(), settings)


def memory(config: OracleConfig) -> RoleMemory:
    found = oracle_memory("oracle", config, prompt_tokens=20, response_tokens=10)
    assert isinstance(found, RoleMemory)
    return found


@pytest.mark.parametrize("save", [save_llama, save_bert])
def test_a_reward_model_is_counted_as_it_is_loaded(save, tmp_path) -> None:
    config = oracle(kind="reward_model", target=save(tmp_path), num_replicas=2)
    model = Classifier(config, labels=(1,), what="a scalar reward model").model
    found = memory(config)
    assert found.parts["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (found.role, found.processes, found.device, found.gpus) == ("oracle", 2, "cpu", 0.0)


def test_weights_of_a_reward_model_are_not_read(tmp_path) -> None:
    config = oracle(kind="pairwise", target=save_llama(tmp_path), max_replicas=3)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"not weights")
    found = memory(config)
    assert found.parts["weights"] == 4 * LLAMA and found.processes == 3
    assert found.parts["activations"] == 2048 * (2 * 32 + max(4 * 32, 3 * 64)) * 4  # tokens x a layer's numbers


def test_few_bits_and_bfloat16_take_less_and_the_head_and_embeddings_stay(tmp_path) -> None:
    target = save_llama(tmp_path)
    half = oracle(kind="reward_model", target=target, dtype="bfloat16", gpus_per_replica=0.25)
    assert (memory(half).parts["weights"], memory(half).device, memory(half).gpus) == (2 * LLAMA, "gpu", 0.25)
    rest = 2 * (LLAMA - LINEAR)
    assert memory(apply(half, {"quantization": "int8"})).parts["weights"] == rest + LINEAR
    assert memory(apply(half, {"quantization": "int4"})).parts["weights"] == rest + LINEAR // 2 + LINEAR // 64 * 4


def test_a_model_is_spread_over_the_gpus_of_its_replica_unless_one_is_named(tmp_path) -> None:
    spread = oracle(kind="reward_model", target=save_llama(tmp_path), gpus_per_replica=2.0)
    assert memory(spread).parts["weights"] == 4 * LLAMA // 2 and memory(spread).spread == 2
    assert memory(apply(spread, {"device": "cuda"})).parts["weights"] == 4 * LLAMA
    assert memory(apply(spread, {"device": "cpu"})).device == "cpu"


def test_a_local_judge_holds_a_cache_and_the_logits_of_every_token_that_it_answers() -> None:
    judge = {"kind": "judge", "target": str(TINY), "judge.base_url": "local", "judge.concurrency": 4}
    config = oracle(**judge, **{"judge.verdict": "text", "judge.max_tokens": 100})
    found = memory(config).parts
    assert found["weights"] == 4 * ModelShape.of(TINY).parameters
    assert found["logits"] == 4 * 100 * 73 * 4
    tokens = found["KV cache"] // (2 * 2 * 128 * 4)  # keys and values, two layers
    assert tokens % 4 == 0 and tokens // 4 - 140 > 50  # rules, and 20 + 2 x 10 + 100 of texts and answer


def test_a_judge_behind_an_endpoint_and_the_worlds_truth_hold_no_model() -> None:
    assert oracle_memory("oracle", oracle(kind="judge", target="some/model"), 20, 10) is None
    assert oracle_memory("oracle", oracle(), 20, 10) is None


def test_a_model_that_is_not_there_is_named_and_the_rest_is_counted() -> None:
    config = apply(RunConfig(policy=str(TINY)), {"evaluation.oracle.kind": "reward_model"})
    config = apply(config, {"evaluation.oracle.target": "/no/such/model"})
    known, unknown = memory_of(config, make_agent("passive"), ModelShape.of(TINY), 20, 8)
    assert [role.role for role in known] == ["engine", "learner"]
    (missing,) = unknown
    assert missing.role == "evaluation.oracle" and "evaluation.oracle.target='/no/such/model'" in missing.why


def run_config(name: str, **settings: object) -> tuple[RunConfig, object]:
    own = {key.removeprefix("agent."): value for key, value in settings.items() if key.startswith("agent.")}
    agent = make_agent(name, **own)
    others = {key: value for key, value in settings.items() if not key.startswith("agent.")}
    return apply(RunConfig(policy=str(TINY), agent_name=name, agent=agent.config), others), agent


def posterior(name: str, **settings: object) -> RoleMemory:
    config, agent = run_config(name, **settings)
    found = posterior_memory(config, agent)  # type: ignore[arg-type]
    assert isinstance(found, RoleMemory)
    return found


@pytest.mark.parametrize("layers", [0, 1])
def test_sea_has_a_backbone_and_an_ensemble_as_it_makes_them(layers: int) -> None:
    settings = {"agent.features.layers": layers, "agent.posterior.members": 3, "agent.posterior.hidden": 16}
    config, agent = run_config("sea", **settings)
    agent.setup(AgentContext(policy=TINY, seed=0, batch_size=8))  # type: ignore[attr-defined]
    backbone = agent.features._backbone.model  # type: ignore[attr-defined]
    ensemble = agent.posterior  # type: ignore[attr-defined]
    heads = sum(tensor.numel() for tensor in ensemble.heads.values())
    found = posterior("sea", **settings, **{"loop.budget": 100, "agent.features.cache_responses": 50})
    assert found.parts["weights"] == sum(p.numel() * 4 for p in backbone.parameters())
    assert found.parts["ensemble"] == 6 * 4 * heads
    assert found.parts["labels"] == 100 * (2 * 128 * 4 + 3)
    assert found.parts["features"] == 50 * 128 * 4
    assert (found.role, found.device, found.gpus) == ("posterior", "cpu", 0.0)
    assert isinstance(config, RunConfig)


def test_a_posterior_is_where_the_agent_is_and_a_kernel_stays_on_the_cpu() -> None:
    on_gpu = {"loop.agent_device": "cuda", "loop.collector_gpus": 0.03, "loop.budget": 1000}
    sea = posterior("dts", **on_gpu, **{"agent.features.dtype": "bfloat16"})
    assert (sea.device, sea.gpus, sea.host) == ("gpu", 0.03, {})
    borda = posterior("ae_borda", **on_gpu)
    assert borda.host == {"kernel": 8 * 1000 * (1000 + 128)} and "kernel" not in borda.parts
    assert "kernel" in posterior("ae_borda").parts


def test_agents_without_a_model_of_their_own_and_sea_that_learns_none_need_nothing() -> None:
    passive, agent = run_config("passive")
    assert posterior_memory(passive, agent) is None  # type: ignore[arg-type]
    silent = {"agent.posterior.updates": 0, "agent.exploration": "passive", "agent.gamma_after": 1.0}
    config, sea = run_config("sea", **silent)
    assert posterior_memory(config, sea) is None  # type: ignore[arg-type]


def test_a_backbone_that_is_not_there_is_named_and_too_many_layers_are_a_mistake() -> None:
    config, sea = run_config("sea", **{"agent.features.backbone": "/no/such/model"})
    found = posterior_memory(config, sea)  # type: ignore[arg-type]
    assert isinstance(found, Unknown) and "agent.features.backbone='/no/such/model'" in found.why
    config, sea = run_config("sea", **{"agent.features.layers": 9})
    with pytest.raises(ConfigError, match=r"agent.features.layers=9, but the backbone 'policy' has 2"):
        posterior_memory(config, sea)  # type: ignore[arg-type]


def test_numbers_of_a_forward_pass_are_about_what_a_real_one_takes(tmp_path) -> None:
    """The profiler's peak of a layer's tensors, against the sum that is told."""
    target = save_llama(tmp_path, hidden_size=128, intermediate_size=512)
    model = Classifier(oracle(kind="reward_model", target=target), labels=(1,), what="a scalar reward model").model
    rows, length = 32, 32
    ids = torch.full((rows, length), 9)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen,
        torch.inference_mode(),
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    level = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    shape = replace(ModelShape.of(TINY), hidden=128, intermediate=512, heads=2, kv_heads=2, head_dim=64)
    assert 0.6 < most / (rows * length * shape.forward_values * 4) < 1.6
