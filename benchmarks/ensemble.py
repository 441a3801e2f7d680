"""What K = 20 heads cost beside one: python benchmarks/ensemble.py

Two sizes, random weights (speed does not depend on values), one batch of SEA each: M = 20 candidates a prompt are
read by the frozen backbone and scored by the heads, then the posterior takes its m = 5 steps.

    tiny    TinyWorld's policy (width 128, 2 layers), 32 prompts of 22 tokens, responses of 14
    small   SmolLM2-135M (width 576, 30 layers), 2 prompts of 48 tokens, responses of 48
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayalign.agents.posteriors.ensemble import EnsembleConfig, RewardEnsemble
from rayalign.agents.posteriors.features import FeatureConfig, Features
from rayalign.types import Candidate, Prompt

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 2, "heads": 4, "prompts": 32, "prompt_tokens": 22, "response_tokens": 14},
    "small": {"width": 576, "layers": 30, "heads": 9, "prompts": 2, "prompt_tokens": 48, "response_tokens": 48},
}
VOCABULARY, CANDIDATES = 1000, 20


def median_ms(call: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:]))


def save_backbone(folder: Path, width: int, layers: int, heads: int) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=int(width * 8 / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
    )
    LlamaModel(config).save_pretrained(folder)


def work(size: dict[str, Any]) -> tuple[list[Prompt], list[Candidate]]:
    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(VOCABULARY, size=n)))

    prompts = [Prompt(id=str(p), text="", token_ids=ids(size["prompt_tokens"])) for p in range(size["prompts"])]
    owners = [prompt for prompt in prompts for _ in range(CANDIDATES)]
    length = size["response_tokens"]
    return owners, [Candidate(text="", token_ids=ids(length), logprobs=(), policy_version=0) for _ in owners]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print("size   features   scoring K=1  K=20   features+scoring K=20/K=1   m=5 updates K=1  K=20   (ms)")
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_backbone(Path(folder), size["width"], size["layers"], size["heads"])
            features = Features(FeatureConfig(cache_responses=0), Path(folder))
        owners, responses = work(size)
        reading = median_ms(lambda: features(owners, responses), repeats)  # noqa: B023
        x = features(owners, responses)
        scoring, updating = {}, {}
        for members in (1, 20):
            posterior = RewardEnsemble(EnsembleConfig(members=members), features.dim, seed=0)
            posterior.standardize.add(x)
            pairs = torch.randn(512, 2, features.dim)
            posterior.add(pairs, torch.ones(512), np.random.default_rng(0))
            scoring[members] = median_ms(lambda: posterior.rewards(x), repeats)  # noqa: B023
            updating[members] = median_ms(lambda: posterior.update(np.random.default_rng(0)), repeats)  # noqa: B023
        ratio = (reading + scoring[20]) / (reading + scoring[1])
        print(
            f"{name:6} {reading:8.1f}   {scoring[1]:11.2f}  {scoring[20]:4.1f}   {ratio:25.2f}   "
            f"{updating[1]:15.1f}  {updating[20]:4.0f}"
        )


if __name__ == "__main__":
    main()
