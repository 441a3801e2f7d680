"""How much there is to learn in Haiku-v0: what a policy's samples score, term by term, before any training.

    python benchmarks/haiku_signal.py [--policy NAME] [--prompts 40] [--samples 8] [--engine vllm] [--show 3]

Prints the mean reward, the mean over prompts of the best and the worst sample, each term's mean, how many samples
of a prompt differ, how many end by themselves, how often a Bernoulli label agrees with the truth on a random
pair, and tokens per second.
"""

from __future__ import annotations

import argparse
import itertools
import time

import numpy as np

from rayalign.env.haiku import Haiku, score
from rayalign.models import resolve_policy
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.pool import RolloutPool


def main() -> None:
    """Sample, score, print."""
    world = Haiku()
    settings = {k.removeprefix("rollout."): v for k, v in world.defaults().items() if k.startswith("rollout.")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=world.default_policy())
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--temperature", type=float, default=settings["temperature"])
    parser.add_argument("--show", type=int, default=3, help="best and worst responses to print")
    options = parser.parse_args()

    policy = resolve_policy(options.policy)
    # No replicas: one engine in this process, without Ray.
    config = RolloutConfig(
        **settings | {"engine": options.engine, "num_replicas": 0, "temperature": options.temperature}
    )
    encoder = PromptEncoder(policy, config.max_prompt_tokens)
    prompts = [encoder.encode(prompt) for prompt in world.heldout(options.prompts)]
    with RolloutPool(config, policy) as pool:
        start = time.perf_counter()
        groups = pool.generate(prompts, config.sampling(options.samples), 0)
        seconds = time.perf_counter() - start

    scores = [[score(p.meta["subject"], c.text) for c in group] for p, group in zip(prompts, groups, strict=True)]
    reward_PN = np.array([[s.total for s in row] for row in scores])
    gaps = np.abs([[a - b for a, b in itertools.combinations(row, 2)] for row in reward_PN])
    every = [candidate for group in groups for candidate in group]
    tokens = sum(len(candidate.token_ids) for candidate in every)
    print(f"{len(prompts)} prompts x {options.samples} samples of {options.policy} at {options.temperature}")
    print(
        f"reward: mean {reward_PN.mean():.3f}, best {reward_PN.max(1).mean():.3f}, worst {reward_PN.min(1).mean():.3f}"
    )
    for term in ("form", "lines", "subject", "fresh", "clean"):
        print(f"  {term:8}{np.mean([[getattr(s, term) for s in row] for row in scores]):.3f}")
    print(f"distinct: {np.mean([len({c.text for c in group}) / len(group) for group in groups]):.1%}")
    print(f"finished: {np.mean([candidate.finished for candidate in every]):.1%}")
    if gaps.size:
        print(f"labels agree with the truth: {np.mean(1 / (1 + np.exp(-world.reward_scale * gaps))):.1%}")
    print(f"{tokens / len(every):.1f} tokens a response, {tokens / seconds:.0f} tokens/s")
    ranked = sorted(zip(reward_PN.ravel(), (c.text for c in every), strict=True), reverse=True)
    for reward, text in [*ranked[: options.show], *ranked[len(ranked) - options.show :]]:
        print(f"{reward:.3f}  {text!r}")


if __name__ == "__main__":
    main()
