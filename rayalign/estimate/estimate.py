"""What a run will cost, before it is started: labels and money, tokens, memory per role and per GPU, time.

settings -> labels, calls, price     exact, but for retries                               `rayalign.estimate.purchases`
         -> tokens                   from the prompts and the longest response, or the mean one that was measured
         -> memory                   by the models' configs                    `rayalign.estimate.memory` and `gpus`
         -> time of labelling        where a limit says it                                `rayalign.estimate.labelling`
a few batches here -> time           if it is asked for                                 `rayalign.estimate.calibration`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayalign.agents.agent import Agent
from rayalign.estimate.calibration import Calibration, calibrate
from rayalign.estimate.gpus import FullestGpu, fullest_gpu
from rayalign.estimate.labelling import LabelTime, label_times
from rayalign.estimate.memory import memory_of
from rayalign.estimate.purchases import Purchases, num_evaluations, purchases_of
from rayalign.estimate.role import RoleMemory, Unknown
from rayalign.estimate.room import check_room
from rayalign.estimate.shape import ModelShape
from rayalign.loop.preparation import Plan
from rayalign.models import with_weights
from rayalign.rollout.encode import PromptEncoder
from rayalign.runs.config import RunConfig

SAMPLED_PROMPTS = 64
START_S = 40.0
"""From the command to the first batch: Ray, Serve, Train and small models, on two cores. Large models take longer."""
CALLS_S = 0.2
"""What actors' calls, logs and files add to each batch."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Numbers of tokens."""

    batches: int
    generated: float
    """Responses, for training and evaluation."""
    trained: float
    """Prompts and responses through forward and backward."""
    referred: float
    """Prompts and responses through the reference."""
    prompt_mean: float
    prompt_longest: int
    response_mean: float
    measured: bool
    """Whether `response_mean` was measured; else it is the longest that is allowed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All of it."""

    purchases: Purchases
    tokens: Tokens
    shape: ModelShape
    memory: list[RoleMemory]
    uncounted: list[Unknown]
    """Roles whose model's config can't be had."""
    fullest: FullestGpu | None
    """None without GPUs."""
    labelling: tuple[LabelTime, ...]
    calibration: Calibration | None
    seconds: float | None
    """Of the whole run, labelling included as far as it is known; None without a calibration."""


def estimate(plan: Plan, *, with_calibration: bool = False) -> Estimate:
    """What `plan` will cost; its policy's weights need not be here (`prepare(..., weights=False)`).

    A calibration fetches and loads them, and runs a few batches in this process; `ConfigError` if they don't fit here.
    """
    config, agent = plan.config, plan.agent
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    lengths = [len(encoder.encode(plan.world.prompt(i)).token_ids) for i in range(SAMPLED_PROMPTS)]
    heldout = len(plan.world.heldout(config.evaluation.num_prompts))
    shape = ModelShape.of(config.policy)
    batch_prompts = agent.prompts_per_batch(config.loop.batch_size)
    found = None
    if with_calibration:
        check_room(config, agent, shape, max(lengths), batch_prompts, plan.oracle)
        config = replace(config, policy=str(with_weights(config.policy)))
        found = calibrate(config, plan.world, agent, plan.oracle)
    tokens, bought = tokens_of(config, agent, lengths, heldout, found), purchases_of(config, heldout)
    memory, uncounted = memory_of(config, agent, shape, max(lengths), batch_prompts)
    labelling = label_times(config, bought, found.label_seconds if found else None, plan.oracle)
    return Estimate(
        purchases=bought,
        tokens=tokens,
        shape=shape,
        memory=memory,
        uncounted=uncounted,
        fullest=fullest_gpu(memory, sleeping=config.loop.sleep_engines),
        labelling=labelling,
        calibration=found,
        seconds=None if found is None else seconds_of(config, tokens.batches, found, labelling),
    )


# -- tokens -----------------------------------------------------------------------------------------------------------
def tokens_of(
    config: RunConfig, agent: Agent, prompt_lengths: list[int], heldout: int, found: Calibration | None
) -> Tokens:
    """By the number of batches that the agent expects; responses as long as measured, else as long as allowed.

    An agent that skips prompts, because their answers are alike, buys fewer labels a batch, and needs more batches.
    """
    size, batches = config.loop.batch_size, agent.expected_batches(config.loop.budget, config.loop.batch_size)
    if found is not None and 0 < found.duels < size:
        batches = math.ceil(batches * size / found.duels)
    prompt = float(np.mean(prompt_lengths))
    response = config.rollout.max_tokens if found is None else found.response_tokens
    samples = sum(proposal.n for proposal in agent.proposals() if proposal.source != "data")
    picked_from = config.evaluation.best_of_n if config.evaluation.best_of_n > 1 else 0
    answers = num_evaluations(config) * heldout * (1 + picked_from)
    pairs = batches * (size if found is None else found.duels)
    sides = 2 * pairs * (prompt + response)
    referred = sides if agent.needs_reference() else 0.0
    return Tokens(
        batches=batches,
        generated=(batches * agent.prompts_per_batch(size) * samples + answers) * response,
        trained=sides * config.learner.updates_per_batch * config.loop.epochs,
        referred=referred,
        prompt_mean=prompt,
        prompt_longest=max(prompt_lengths),
        response_mean=response,
        measured=found is not None,
    )


# -- time -------------------------------------------------------------------------------------------------------------
def seconds_of(config: RunConfig, batches: int, found: Calibration, labelling: Sequence[LabelTime] = ()) -> float:
    """The whole run. Engines, scorers and workers share their work evenly; what they tell each other is not counted."""
    seconds = found.seconds
    generate = seconds.get("generate", 0.0) / max(1, config.rollout.num_replicas)
    learn = seconds.get("learn", 0.0) / config.learner.num_workers
    label = sum(oracle.training or 0.0 for oracle in labelling) / batches
    collecting = generate + seconds.get("select", 0.0) + label + CALLS_S
    # The agent observes while the learner learns; weights come when both are done.
    learning = max(learn, seconds.get("observe", 0.0)) + seconds.get("sync", 0.0)
    batch = collecting + learning if config.loop.max_staleness == 0 else max(collecting, learning)
    evaluate = num_evaluations(config) * seconds.get("evaluate", 0.0) / max(1, config.rollout.num_replicas)
    evaluate += sum(oracle.evaluation or 0.0 for oracle in labelling)
    more_epochs = batches * (config.loop.epochs - 1) * (learn + seconds.get("sync", 0.0))
    return START_S + batches * batch + more_epochs + evaluate
