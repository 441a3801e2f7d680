"""What the collector generates and scores with: engines with the current policy, and with the frozen reference.

prompts --> encoder --> policy, reference or the data's own pair --> candidates, as the agent's proposals say
weights --> policy and scorer, which agree on what the current policy is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayalign.agents.agent import Agent
from rayalign.random_streams import stream
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.model_pool import ModelPool
from rayalign.rollout.pool import RolloutPool
from rayalign.rollout.weights import Weights
from rayalign.runs.config import RunConfig
from rayalign.scoring.pool import ScorerPool
from rayalign.types import Candidate, Prompt


class Engines:
    """The pools that a run's agent needs."""

    policy: RolloutPool
    reference: RolloutPool
    scorer: ScorerPool | None
    encoder: PromptEncoder

    def __init__(self, config: RunConfig, agent: Agent) -> None:
        self.config, self.agent = config, agent
        self._pools: list[ModelPool] = []

    def start(self) -> None:
        """Have them start in the background; `wait_until_started` waits for them."""
        config, agent = self.config, self.agent
        self.policy = self._make_pool("rollout")
        self.reference = self._make_pool("reference") if agent.samples_reference() else self.policy
        self.scorer = None
        if agent.needs_scorer():
            wait = config.scorer.gpus_per_replica > 0
            self.scorer = ScorerPool(config.scorer, config.policy, name=f"{config.name}-scorer", wait=wait)
            self._pools.append(self.scorer)
        self.encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)

    def wait_until_started(self) -> None:
        """Until all engines are there. Raises what one could not start for."""
        for pool in self._pools:
            pool.wait_until_started()

    @property
    def version(self) -> int:
        """Of the weights that the current policy's engines run."""
        return self.policy.version

    def load(self, weights: Weights) -> None:
        """Weights to all who hold the current policy."""
        self.policy.sync(weights)
        if self.scorer is not None:
            self.scorer.sync(weights)

    def propose(self, prompts: Sequence[Prompt], *words: int) -> list[list[Candidate]]:
        """Candidates for each prompt; `words` name the random stream."""
        groups: list[list[Candidate]] = [[] for _ in prompts]
        for part, proposal in enumerate(self.agent.proposals()):
            if proposal.source == "data":
                for prompt, group in zip(prompts, groups, strict=True):
                    group.extend(self.encoder.given_pair(prompt))
                continue
            pool = self.policy if proposal.source == "policy" else self.reference
            sampling = self.config.rollout.sampling(n=proposal.n)
            seed = int(stream(self.config.loop.seed, *words, part).integers(2**62))
            for group, sampled in zip(groups, pool.generate(prompts, sampling, seed), strict=True):
                group.extend(replace(candidate, source=proposal.source) for candidate in sampled)
        return groups

    def sleep(self) -> None:
        """Collocated on a GPU, the engines' memory is the learner's until `wake`."""
        if self.config.loop.sleep_engines:
            for pool in self._pools:
                pool.sleep()

    def wake(self) -> None:
        """The engines can generate again."""
        if self.config.loop.sleep_engines:
            for pool in self._pools:
                pool.wake()

    def close(self) -> None:
        """Stop them."""
        for pool in self._pools:
            pool.close()

    def _make_pool(self, name: str) -> RolloutPool:
        rollout = self.config.rollout
        wait = rollout.gpus_per_replica > 0  # engines that start together on one GPU miscount its free memory
        pool = RolloutPool(rollout, self.config.policy, name=f"{self.config.name}-{name}", wait=wait)
        self._pools.append(pool)
        return pool
