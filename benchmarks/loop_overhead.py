"""The loop's own cost: collector, oracle under Serve, ledger and stream; engines and learner do nothing.

    python benchmarks/loop_overhead.py [--batches 200] [--batch-size 128] [--max-staleness 1]

Candidates are made up (64 tokens each) instead of sampled, and the "learner" fetches a batch through the real
stream, in another process, and publishes a weight of one number. Everything else is the real thing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import ray
import torch

from rayalign.agents import make_agent
from rayalign.env import make_world
from rayalign.evaluation.evaluate import EvaluationConfig
from rayalign.learner.stream import EndOfStream
from rayalign.loop.collector import Collector
from rayalign.loop.collector_client import CollectorClient
from rayalign.loop.engines import Engines
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Sampling
from rayalign.rollout.weights import Weights, pack
from rayalign.runs.config import LoopConfig, RunConfig
from rayalign.runs.logs import read_metrics
from rayalign.serve import start_oracle, stop_oracle
from rayalign.serve.oracles import oracle_factory
from rayalign.types import Candidate, Prompt

TOKENS = tuple(range(64))


class NoPool:
    """Answers at once with made-up candidates."""

    version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[list[Candidate]]:
        """`sampling.n` different candidates of 64 tokens for each prompt."""
        one = Candidate(text="", token_ids=(), logprobs=(0.5,) * 64, policy_version=self.version)
        return [
            [replace(one, text=f"answer {seed} {p} {i}", token_ids=(p, i, *TOKENS[2:])) for i in range(sampling.n)]
            for p in range(len(prompts))
        ]

    def sync(self, weights: Weights) -> None:
        """Run the new version."""
        self.version = weights.version

    def stats(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def close(self) -> None:
        """Nothing to stop."""


class NoEngines(Engines):
    """Engines that do nothing."""

    def _make_pool(self, name: str) -> NoPool:  # type: ignore[override]
        return NoPool()


class BareCollector(Collector):
    """The collector with engines that do nothing."""

    kind_of_engines = NoEngines


@ray.remote(num_cpus=0.5)
def learner_that_does_nothing(source: CollectorClient) -> float:
    """Fetch and publish until the end; returns seconds from the first batch's arrival to the end."""
    start, version = None, 0
    while not isinstance(source.next_batch(version, 300.0), EndOfStream):
        start = start or time.perf_counter()
        version += 1
        source.publish(pack(version, {"weight": torch.zeros(1)}), {"loss": 0.0})
    return time.perf_counter() - (start or 0.0)


def main() -> None:
    """Run the loop and print batches per second and where a batch's time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-staleness", type=int, default=1)
    options = parser.parse_args()

    world = make_world("rayalign/Tabular-v0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            agent_name="passive",
            env="rayalign/Tabular-v0",
            policy=str(world.default_policy()),
            run_dir=folder,
            loop=LoopConfig(
                budget=options.batches * options.batch_size,
                batch_size=options.batch_size,
                max_staleness=options.max_staleness,
                collector_cpus=1.0,
            ),
            rollout=RolloutConfig(engine="transformers", num_replicas=0),
            evaluation=EvaluationConfig(every=0, at_start=False, num_prompts=1, against="initial"),
        )
        oracle = start_oracle(
            config.oracle, oracle_factory(config.oracle, world), name="oracle", journal_dir=f"{folder}/o"
        )
        collector = CollectorClient.start(config, world, make_agent("passive"), oracle, oracle, kind=BareCollector)
        seconds = ray.get(learner_that_does_nothing.remote(collector), timeout=600)
        collector.raise_failure()
        rows = [row for row in read_metrics(folder) if "seconds/label" in row]
        print(f"{options.batches} batches of {options.batch_size} duels: {options.batches / seconds:.1f} batches/s")
        for stage in ("gate", "sync", "generate", "select", "label", "observe"):
            times = sorted(row[f"seconds/{stage}"] for row in rows)
            print(f"  {stage:9s} median {1e3 * times[len(times) // 2]:7.2f} ms")
        collector.close()
        stop_oracle("oracle")
    ray.shutdown()


if __name__ == "__main__":
    main()
