"""What a replay's learner gets its batches from: a ledger that is read and never written, and no oracle to ask.

ledger, read only --> LedgerBatches --> batch v --> learner --> weights v + 1 --+
^                                    |
+-- held back until version v is evaluated, where that is due
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign import storage
from rayalign.agents.agent import Agent, AgentContext
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, RayalignError
from rayalign.learner.stream import EndOfStream, PleasePublish, Span
from rayalign.ledger.ledger import Ledger
from rayalign.loop.heldout import HeldOut
from rayalign.loop.staleness import Window
from rayalign.loop.train_batches import place_in_epoch
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.pool import RolloutPool
from rayalign.rollout.weights import Weights
from rayalign.runs.agent_state import has_opinion, observe_rng, save_agent
from rayalign.runs.config import RunConfig
from rayalign.runs.logs import RunLog
from rayalign.types import LabelSource, Preference, Prompt, TrainBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Whose labels a replay trains on, and how they are cut; `replay.yaml` in its directory is one of these."""

    ledger: str = ""
    """The file of the ledger, or its URI in a bucket."""
    batches: int = 0
    """Stream batches of the ledger that are used: those that were there when the replay began."""
    batch_size: int = 0
    """Duels per training batch, in the order of the stream; 0 keeps the stream's own batches."""
    synthetic: bool = True
    """Train on the pairs that the ledger's agent labelled itself, too."""

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ConfigError(f"batch_size={self.batch_size} must not be negative; 0 keeps the ledger's batches.")


class LedgerBatches:
    """Training batches out of a ledger: `epochs` passes, the first in the ledger's order. Thread-safe."""

    def __init__(self, config: ReplayConfig, file: str | Path | None = None, *, seed: int = 0, epochs: int = 1) -> None:
        """`file` is the ledger as this machine has it already; None fetches it if it is in a bucket."""
        self.config, self.seed, self.epochs = config, seed, epochs
        self._ledger = Ledger(file or storage.fetched_ledger(config.ledger), read_only=True)
        bought = [self._ledger.bought(batch) for batch in range(config.batches)]
        if not config.synthetic:
            bought = [[True] * sum(flags) for flags in bought]
        self._chunks = _cut([len(flags) for flags in bought], config.batch_size)
        self._labels = [0]
        for chunk in self._chunks:
            self._labels.append(self._labels[-1] + sum(sum(bought[batch][i:j]) for batch, i, j in chunk))

    @property
    def per_epoch(self) -> int:
        """Training batches in one pass."""
        return len(self._chunks)

    def __len__(self) -> int:
        """Training batches in all passes."""
        return self.per_epoch * self.epochs

    @property
    def num_labels(self) -> int:
        """Labels of the oracle's among the duels."""
        return self._labels[-1]

    def labels(self, version: int) -> int:
        """Different labels of the oracle's that weights version `version` was trained on."""
        return self._labels[min(version, self.per_epoch)]

    def __getitem__(self, index: int) -> TrainBatch:
        epoch, position = place_in_epoch(self.seed, index, self.per_epoch)
        preferences = tuple(self.preferences(position))
        seen = epoch * self.num_labels + self._labels[index - epoch * self.per_epoch + 1]
        progress = min(1.0, seen / max(1, self.num_labels * self.epochs))
        return TrainBatch(index=index, preferences=preferences, meta={"progress": progress})

    def preferences(self, position: int) -> list[Preference]:
        """What batch `position` of the first pass has."""
        return [p for batch, start, stop in self._chunks[position] for p in self._of(batch)[start:stop]]

    def _of(self, batch: int) -> list[Preference]:
        every = self._ledger.stream_batch(batch)
        return every if self.config.synthetic else [p for p in every if p.source is LabelSource.ORACLE]


def _cut(sizes: Sequence[int], batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Chunks of (batch, start, stop): the batches themselves, or `batch_size` duels each, the last one shorter.

    >>> _cut([2, 3, 0], 0)
    [[(0, 0, 2)], [(1, 0, 3)], [(2, 0, 0)]]
    >>> _cut([2, 3, 0], 4)
    [[(0, 0, 2), (1, 0, 2)], [(1, 2, 3)]]
    """
    if not batch_size:
        return [[(batch, 0, size)] for batch, size in enumerate(sizes)]
    chunks: list[list[tuple[int, int, int]]] = []
    room = 0
    for batch, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                chunks.append([])
                room = batch_size
            stop = min(size, start + room)
            chunks[-1].append((batch, start, stop))
            room -= stop - start
            start = stop
    return chunks


class ReplayFeed:
    """A `BatchSource`, run as an actor behind a `CollectorClient`; evaluates as the collector of a run does.

    Ray restarts it when it dies: the learner then publishes again, and what was already evaluated is not again.
    """

    def __init__(
        self, config: RunConfig, replay: ReplayConfig, agent: Agent, world: World | None, judge: Oracle | None
    ) -> None:
        self.config, self.agent, self.world, self.judge = config, agent, world, judge
        self.run_dir = Path(config.run_dir)
        self.log = RunLog(self.run_dir, config.logging, resolved=config)
        self.batches = LedgerBatches(replay, seed=config.loop.seed, epochs=config.loop.epochs)
        self.window = Window()
        self.pool: RolloutPool | None = None
        self.phase, self.error = "starting", ""
        self.failure: BaseException | None = None
        self._released = -1  # the newest version whose evaluation, if it was due, is over
        self._moved = threading.Condition()
        self._record: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._guarded, name="replay", daemon=True)
        self._thread.start()

    # ==== the loop: one version of the weights after the other ===============================================
    def _guarded(self) -> None:
        try:
            self._run()
            self.phase = "done"
        except BaseException as error:  # whatever it is, the learner must not wait for a dead thread
            self.failure, self.phase = error, "failed"
            self.error = str(error) if isinstance(error, RayalignError) else traceback.format_exc()
            log.error("replay stopped: %s", self.error)
            self.window.fail(error)
            self._release(len(self.batches))

    def _run(self) -> None:
        encoder = PromptEncoder(
            self.config.policy, self.config.rollout.max_prompt_tokens, chat=self.config.rollout.chat
        )
        learns = has_opinion(self.agent)
        if learns:
            self.agent.setup(self._context(encoder))
        heldout = self._heldout(encoder)
        end = len(self.batches)
        for version in range(end + 1):
            self.phase = "training"
            self.window.wait_for_version(version, self.config.loop.gate_timeout_s)
            if learns and 0 < version <= self.batches.per_epoch:
                observed = self.batches.preferences(version - 1)
                self.agent.observe(version - 1, observed, observe_rng(self.config.loop.seed, version - 1))
            last, now = version == end, self.window.published == version  # else it is an old one, after a restart
            if heldout is not None and now and (last or heldout.due(self.batches.labels(version))):
                self.phase = "evaluating"
                self._evaluate(heldout, version)
            self._release(version)
        if learns:
            save_agent(self.agent, self.run_dir, observed=self.batches.per_epoch)

    def _context(self, encoder: PromptEncoder) -> AgentContext:
        size = self.config.loop.batch_size
        number = self.agent.prompts_per_batch(size)
        return AgentContext(
            policy=Path(self.config.policy),
            seed=self.config.loop.seed,
            batch_size=size,
            device=self.config.loop.agent_device,
            sample_prompts=[encoder.encode(prompt) for prompt in self._prompts(number)],
        )

    def _prompts(self, number: int) -> list[Prompt]:
        if self.world is not None:
            return [self.world.prompt(i) for i in range(number)]
        return [preference.duel.prompt for preference in self.batches.preferences(0)[:number]]

    def _heldout(self, encoder: PromptEncoder) -> HeldOut | None:
        if self.world is None or self.judge is None:
            return None
        self.pool = RolloutPool(self.config.rollout, self.config.policy, name=f"{self.config.name}-replay")
        heldout = HeldOut(
            self.config.evaluation,
            self.world,
            encoder,
            self.judge,
            self.run_dir,
            sampling=self.config.rollout.sampling(n=1),
            identity=self.config.identity,
            seed=self.config.loop.seed,
        )
        heldout.prepare(self.pool)
        return heldout

    def _evaluate(self, heldout: HeldOut, version: int) -> None:
        assert self.pool is not None
        if self.config.loop.sleep_engines:
            self.pool.wake()
        weights = self.window.weights
        if weights is not None and weights.version != self.pool.version:
            self.pool.sync(weights)
        record = heldout.evaluate(self.pool, self.agent, version, labels=self.batches.labels(version))
        self.log.evaluation(record)
        self._record |= {"win_rate": record["win_rate"], "win_rate_stderr": record["stderr"]}
        if self.config.loop.sleep_engines:
            self.pool.sleep()

    def _release(self, version: int) -> None:
        with self._moved:
            self._released = version
            self._moved.notify_all()

    # ==== what the learner and the driver ask, from other threads ==============================================
    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish | None:
        """See `learner.stream.BatchSource`; None instead of an error when nothing came within `timeout_s`."""
        if index > self.window.published:
            return PleasePublish()
        with self._moved:
            if not self._moved.wait_for(lambda: self._released >= index or index >= len(self.batches), timeout_s):
                return None
        if self.failure is not None or index >= len(self.batches):
            return EndOfStream()
        return self.batches[index]

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """See `learner.stream.BatchSource`."""
        batch = weights.version - 1
        numbers = {f"learner/{name}": value for name, value in metrics.items()}
        row = {"batch": batch, "labels": self.batches.labels(weights.version), "version": batch, "time": time.time()}
        self.log.metrics({**row, **numbers})
        for stage, start, end in spans:
            self.log.timeline("learner", stage, batch, start, end)
        self._record |= {**row, **numbers}
        self.window.publish(weights)

    def status(self) -> dict[str, Any]:
        """A snapshot for the progress display, the driver and error messages."""
        return {"budget": self.config.loop.budget, "labels": 0, **self._record, "phase": self.phase}

    def failed_with(self) -> RayalignError | None:
        """What stopped the replay, if anything did."""
        if self.failure is None or isinstance(self.failure, RayalignError):
            return self.failure
        return RayalignError(f"the replay stopped: {self.error}")

    def close(self) -> None:
        """Stop the engines and close the files."""
        if self.pool is not None:
            self.pool.close()
        self.log.close()
