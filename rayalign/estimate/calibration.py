"""How long one batch takes on this machine: the real engine, agent and learner, in this process, without Ray.

Nothing is bought: the initial policy answers unlabelled prompts, and the labels that agent and learner are timed with
are coin flips that nobody keeps. Oracles that cost nothing are asked for the time that it takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.agents.agent import Agent, AgentContext
from rayalign.env.world import World
from rayalign.errors import DataError
from rayalign.estimate.labelling import make_free_oracles
from rayalign.estimate.room import in_one_process
from rayalign.learner.policy import load_policy, merged_state
from rayalign.learner.reference import Reference
from rayalign.learner.strategies import make_strategy
from rayalign.learner.update import update
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.replica import make_engine
from rayalign.rollout.weights import pack
from rayalign.runs.config import RunConfig
from rayalign.scoring.pool import ScorerPool
from rayalign.types import Candidate, Duel, Preference, Prompt, TrainBatch

BATCHES = 3
"""Of which the first warms up and does not count."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds of each stage of one batch, and lengths that were seen; all by one process per role."""

    seconds: dict[str, float]
    """generate, select, learn, sync, observe; and evaluate, of one evaluation."""
    response_tokens: float
    """Mean length of a sampled response."""
    duels: float
    """Mean number of pairs that the agent chose for a batch."""
    label_seconds: dict[str, float] = field(default_factory=dict)
    """Of one label by one process, by section; of oracles that cost nothing (`rayalign.estimate.labelling`)."""


@dataclass
class _Clock:
    laps: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str, times: int = 1) -> Iterator[None]:
        """Times a stage that does something `times` times over; a lap is one of them."""
        start = time.perf_counter()
        yield
        self.laps.setdefault(stage, []).append((time.perf_counter() - start) / times)

    def seconds(self) -> dict[str, float]:
        """The median lap of each stage, without the first where there are more."""
        return {stage: float(np.median(laps[1:] or laps)) for stage, laps in self.laps.items()}


def calibrate(config: RunConfig, world: World, agent: Agent, custom: Any = None) -> Calibration:
    """Run a few batches of everything but the purchase. Takes as long as they take, and the loading of the models.

    `custom` is an oracle that was given by hand, which is not asked. Raises `DataError` if the agent finds no pair.
    """
    config = in_one_process(config)
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    size = agent.prompts_per_batch(config.loop.batch_size)
    engine: Any = make_engine(config.rollout, config.policy)
    scorer = ScorerPool(replace(config.scorer, num_replicas=0), config.policy) if agent.needs_scorer() else None
    prompts = [encoder.encode(world.prompt(i)) for i in range(size)]
    agent.setup(
        AgentContext(
            policy=Path(config.policy),
            seed=config.loop.seed,
            batch_size=config.loop.batch_size,
            device=config.loop.agent_device,
            sample_prompts=prompts,
            scorer=scorer,
        )
    )
    device = torch.device("cuda" if config.learner.gpus_per_worker > 0 else "cpu")
    learner = config.learner
    policy = load_policy(config.policy, learner, config.loop.seed)
    frozen = Reference.of(agent, learner, policy)
    strategy = make_strategy(policy, learner, device)
    reference = Reference(agent, learner, strategy, None if frozen is None else strategy.shard(frozen))
    oracles = make_free_oracles(config, world, custom)
    clock, labelling, lengths, chosen = _Clock(), _Clock(), [], []
    for batch in range(BATCHES):
        rng = np.random.default_rng([config.loop.seed, batch])
        prompts = [encoder.encode(world.prompt(batch * size + i)) for i in range(size)]
        with clock("generate"):
            candidates = _candidates(config, agent, engine, encoder, prompts, batch)
        lengths += [len(c.token_ids) for group in candidates for c in group]
        with clock("select"):
            choices = agent.select(batch, prompts, candidates, rng)
        flips = _coin_flips(batch, prompts, candidates, choices, rng)
        chosen.append(len(flips))
        for section, oracle in oracles.items() if flips else ():
            with labelling(section, len(flips)):
                oracle.judge([flip.duel for flip in flips])
        if flips:
            with clock("observe"):
                agent.observe(batch, flips, rng)
        trained = tuple(agent.training_duels(flips))
        if trained:
            with clock("learn"):
                known = reference.logprobs(0, trained)
                for _ in range(learner.updates_per_batch):
                    update(strategy, agent, TrainBatch(index=batch, preferences=trained), known, learner, 0.0)
        with clock("sync"):
            engine.load(pack(batch + 1, merged_state(policy)))
    if not any(chosen):
        raise DataError(
            f"agent {config.agent_name!r} found no pair to ask about in {BATCHES} batches of {size} prompts: the "
            "initial policy's answers are all alike. Raise rollout.temperature or rollout.max_tokens; a run would stop "
            f"after loop.max_stalled_batches={config.loop.max_stalled_batches} such batches."
        )
    heldout = [encoder.encode(prompt) for prompt in world.heldout(config.evaluation.num_prompts)]
    with clock("evaluate"):
        engine.generate(heldout, config.rollout.sampling(n=1, temperature=config.evaluation.temperature), 0)
    return Calibration(
        seconds=clock.seconds(),
        response_tokens=float(np.mean(lengths or [0])),
        duels=float(np.mean(chosen)),
        label_seconds=labelling.seconds(),
    )


def _candidates(
    config: RunConfig, agent: Agent, engine: Any, encoder: PromptEncoder, prompts: list[Prompt], batch: int
) -> list[list[Candidate]]:
    groups: list[list[Candidate]] = [[] for _ in prompts]
    for part, proposal in enumerate(agent.proposals()):
        if proposal.source == "data":
            found = [list(encoder.given_pair(prompt)) for prompt in prompts]
        else:
            found = engine.generate(prompts, config.rollout.sampling(n=proposal.n), seed=batch * 100 + part)
        for group, more in zip(groups, found, strict=True):
            group.extend(replace(candidate, source=proposal.source) for candidate in more)
    return groups


def _coin_flips(
    batch: int, prompts: list[Prompt], candidates: list[list[Candidate]], choices: Any, rng: np.random.Generator
) -> list[Preference]:
    """The agent's pairs with labels that mean nothing."""
    return [
        Preference(
            duel=Duel(
                id=f"calibration-{batch}-{slot}",
                batch=batch,
                prompt=prompts[choice.prompt],
                first=candidates[choice.prompt][choice.first],
                second=candidates[choice.prompt][choice.second],
                meta=choice.meta,
            ),
            label=float(rng.integers(2)),
        )
        for slot, choice in enumerate(choices)
    ]
