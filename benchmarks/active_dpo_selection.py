"""ActiveDPO's greedy batch out of a pool, time and memory: python benchmarks/active_dpo_selection.py

k = 50 of n = 3,000 pairs with d = 8,192 features (ActiveDPO's own numbers) from V = reg I, and after 500 earlier duels.
Then the same picks as inverting V before every pick, O(k n d^3) as the paper counts, on sizes that this can do.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from rayalign.agents.posteriors.gradient_features import greedy_batch, pair_features


def make_features(rng: np.random.Generator, pairs: int, dim: int) -> np.ndarray:
    """Pairs of correlated float32 gradients: all responses share a direction, as a model's do."""
    shared = rng.normal(size=dim).astype(np.float32)
    gradients = rng.standard_normal(size=(2 * pairs, dim), dtype=np.float32) + shared
    rows = np.arange(0, 2 * pairs, 2)
    return pair_features(gradients, rows, rows + 1)


def naive(features: np.ndarray, asked: np.ndarray, reg: float, count: int) -> list[int]:
    """V is inverted before every pick, in float64."""
    features = features.astype(np.float64)
    v = reg * np.eye(features.shape[1]) + asked.T.astype(np.float64) @ asked
    picks: list[int] = []
    for _ in range(count):
        values = np.einsum("pd,de,pe->p", features, np.linalg.inv(v), features, optimize=True)
        values[picks] = -1
        picks.append(int(np.argmax(values)))
        v += np.outer(features[picks[-1]], features[picks[-1]])
    return picks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--reg", type=float, default=1.0)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    features = np.concatenate([make_features(rng, 500, options.dim) for _ in range(-(-options.pairs // 500))])
    features = features[: options.pairs]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for asked in (features[:0], make_features(rng, 500, options.dim)):
        start = time.perf_counter()
        greedy_batch(features, asked, options.reg, options.count)
        print(
            f"{options.count} of {options.pairs}, d = {options.dim}, {len(asked)} duels before: "
            f"{time.perf_counter() - start:.2f} s"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"whole process: {peak:.0f} MiB at its peak, {peak - before:.0f} of them since the features were there")

    for pairs, dim, count, reg in ((300, 64, 50, 1.0), (300, 64, 50, 0.01), (200, 300, 40, 0.1)):
        for seed in range(5):
            rng = np.random.default_rng(seed)
            features, asked = make_features(rng, pairs, dim), make_features(rng, 20, dim)
            assert greedy_batch(features, asked, reg, count)[0] == naive(features, asked, reg, count)
    print("same picks as inverting V every time: 15 of 15 pools")


if __name__ == "__main__":
    main()
