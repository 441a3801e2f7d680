"""How much of best-of-20 SEA's reward posterior finds: no policy learning, no Ray.

    python benchmarks/posterior_offline.py --seeds 0 1 --backbones policy world --set posterior.regularization=0,1e-3

Random pairs of the initial policy's responses are labelled as TinyWorld's oracle does, 32 a batch, and observed by
SEA as in a run. On held-out prompts with 20 candidates each then:

    gain       [r*(arg max of the ensemble's mean) - r*(average)] / [r*(best of 20) - r*(average)]
    member     the same for the arg max of single members: what a Thompson sample is worth
    accuracy   share of candidate pairs, of unequal r*, that the ensemble's mean orders as r* does
    diversity  spread of the members' margins, as a share of what it was at the start
    disagree   chance that two members name different winners
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.agents import make_agent
from rayalign.agents.agent import AgentContext
from rayalign.agents.posteriors.ensemble import disagreement, spread
from rayalign.config import from_yaml_text
from rayalign.env.labels import draw_label
from rayalign.env.tinyworld.world import TinyWorld
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.engine import Sampling
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.types import Candidate, Duel, Preference, Prompt

BATCH, CANDIDATES = 32, 20


class Pool:
    """Prompts, candidates of the initial policy and their true rewards."""

    def __init__(self, world: TinyWorld, engine: TransformersEngine, prompts: Sequence[Prompt], n: int, seed: int):
        encoder = PromptEncoder(world.default_policy())
        self.prompts = [encoder.encode(prompt) for prompt in prompts]
        self.groups: list[list[Candidate]] = engine.generate(self.prompts, Sampling(n=n, max_tokens=14), seed)
        self.rewards_PN = np.array(
            [[world.reward(p, c.text) for c in group] for p, group in zip(self.prompts, self.groups, strict=True)]
        )


def labelled_batch(pool: Pool, world: TinyWorld, batch: int, seed: int) -> list[Preference]:
    preferences = []
    for p in range(batch * BATCH, (batch + 1) * BATCH):
        prompt, (first, second) = pool.prompts[p], pool.groups[p]
        if first.text == second.text:
            continue
        gap = world.reward_scale * (pool.rewards_PN[p, 0] - pool.rewards_PN[p, 1])
        duel = Duel(
            id=Duel.make_id("offline", batch, p, prompt, first, second),
            batch=batch,
            prompt=prompt,
            first=first,
            second=second,
        )
        label = draw_label(float(1 / (1 + np.exp(-gap))), duel.id, "bernoulli", seed)
        preferences.append(Preference(duel=duel, label=label))
    return preferences


def score(agent: Any, pool: Pool) -> dict[str, float]:
    rewards_EPN = torch.stack(agent._rewards(pool.prompts, pool.groups), dim=1)
    truth_PN, rows = pool.rewards_PN, np.arange(len(pool.prompts))
    average_P, best_P = truth_PN.mean(1), truth_PN.max(1)
    mean_PN = rewards_EPN.mean(0).numpy()
    members_EP = np.stack([truth_PN[rows, member.argmax(1)] for member in rewards_EPN.numpy()])
    true_gap, gap = truth_PN[:, 0::2] - truth_PN[:, 1::2], mean_PN[:, 0::2] - mean_PN[:, 1::2]
    possible = (best_P - average_P).mean()
    x = agent.features(
        [p for p, g in zip(pool.prompts, pool.groups, strict=True) for _ in g], [c for g in pool.groups for c in g]
    ).view(-1, 2, agent.features.dim)
    margins, start = agent.posterior.margins(x), agent.posterior.margins(x, at_start=True)
    return {
        "gain": (truth_PN[rows, mean_PN.argmax(1)] - average_P).mean() / possible,
        "member": (members_EP - average_P).mean() / possible,
        "accuracy": (np.sign(true_gap) == np.sign(gap))[true_gap != 0].mean(),
        "diversity": spread(margins) / spread(start),
        "disagree": disagreement(margins),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--backbones", nargs="+", default=["policy", "world"])
    parser.add_argument("--labels", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--set", nargs="*", default=[], help="name=value,value,...: every combination is tried")
    arguments = parser.parse_args()
    grid = [[(s.partition("=")[0], v) for v in s.partition("=")[2].split(",")] for s in arguments.set]
    for seed in arguments.seeds:
        world = TinyWorld(seed)
        policy = Path(world.default_policy())
        engine = TransformersEngine(policy)
        batches = -(-max(arguments.labels) // BATCH) + 8  # a few pairs are identical
        train = Pool(world, engine, [world.prompt(i) for i in range(batches * BATCH)], 2, seed=1)
        test = Pool(world, engine, world.heldout(200), CANDIDATES, seed=2)
        read: dict[str, Any] = {}
        for backbone, settings in itertools.product(arguments.backbones, itertools.product(*grid)):
            where = world.backbone() if backbone == "world" else backbone
            changes = {name: from_yaml_text(value) for name, value in settings}
            agent = make_agent("sea", **{"features.backbone": where, **changes})
            agent.setup(AgentContext(policy=policy, seed=seed, batch_size=BATCH))
            agent.features = read.setdefault(where, agent.features)  # each response is read once for all settings
            remaining, spent, started = sorted(arguments.labels), 0, time.perf_counter()
            for batch in range(batches):
                preferences = labelled_batch(train, world, batch, seed)
                spent += len(preferences)
                agent.observe(batch, preferences, np.random.default_rng([seed, batch]))
                if remaining and spent >= remaining[0]:
                    facts = " ".join(f"{name} {value:.3f}" for name, value in score(agent, test).items())
                    took = time.perf_counter() - started
                    print(
                        f"world {seed} {backbone:7} {dict(settings)} labels {remaining.pop(0):5d}: {facts} {took:.0f} s"
                    )


if __name__ == "__main__":
    main()
