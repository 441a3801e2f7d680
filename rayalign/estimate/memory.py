"""How much memory each role of a run needs, worked out from the models' configs: no weights are loaded, or fetched.

learner, engines, scorer    `rayalign.estimate.policy_memory`
oracle                      `rayalign.estimate.oracle_memory`
an agent's own model        `rayalign.estimate.posterior_memory`
"""

from __future__ import annotations

from dataclasses import replace

from rayalign.agents.agent import Agent
from rayalign.estimate.oracle_memory import oracle_memory
from rayalign.estimate.policy_memory import engine_memory, learner_memory, scorer_memory
from rayalign.estimate.posterior_memory import posterior_memory
from rayalign.estimate.role import RoleMemory, Unknown
from rayalign.estimate.shape import ModelShape
from rayalign.runs.config import RunConfig


def memory_of(
    config: RunConfig, agent: Agent, shape: ModelShape, prompt_tokens: int, batch_prompts: int, *, oracles: bool = True
) -> tuple[list[RoleMemory], list[Unknown]]:
    """Every role of a run that holds a model, in the order in which they start, and those that can't be counted.

    Args:
        shape: of the policy.
        prompt_tokens: of the longest prompt that was seen.
        batch_prompts: prompts of a batch.
        oracles: False leaves out the models of oracles.
    """
    answer = config.rollout.max_tokens
    found: list[RoleMemory | Unknown | None] = []
    if oracles:
        found.append(oracle_memory("oracle", config.oracle, prompt_tokens, answer))
        if config.evaluation.oracle is not None:
            found.append(oracle_memory("evaluation.oracle", config.evaluation.oracle, prompt_tokens, answer))
    found.append(posterior_memory(config, agent))
    samples = max((p.n for p in agent.proposals()), default=1)
    engine = engine_memory(config.rollout, shape, prompt_tokens, samples, batch_prompts)
    found.append(engine)
    if agent.samples_reference():
        found.append(replace(engine, role="reference engine"))
    if agent.needs_scorer():
        found.append(scorer_memory(config.scorer, shape))
    found.append(learner_memory(config.learner, agent, shape, prompt_tokens + answer, config.loop.batch_size))
    known = [role for role in found if isinstance(role, RoleMemory)]
    return known, [role for role in found if isinstance(role, Unknown)]
