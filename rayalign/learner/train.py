"""The learner as a Ray Train job: asks for batch v, makes weights v + 1 of it, publishes them, and so on.

    resume at version v
      +--> ask the source for batch v         waits for labels         (collector -> learner)
      |    reference log-probabilities        once per duel
      |    update                             the agent's loss, one optimizer step
      |    publish weights v + 1              unblocks generation      (learner -> collector)
      +--- checkpoint, now and then           what a killed worker comes back to
    end of stream: the final Hugging Face directory

Everything a worker needs to come back is in its checkpoint and in the source: after a crash Ray Train starts the
workers again, they load version v from the checkpoint and ask for batch v again; no label is bought for that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from rayalign import storage
from rayalign.agents.agent import Agent
from rayalign.errors import ConfigError, DataError, RayalignError, WaitError
from rayalign.learner.config import LearnerConfig
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.policy import (
    adapter_config,
    adapter_state,
    load_policy,
    merged_state,
    validate,
    write_final,
)
from rayalign.learner.reference import Reference
from rayalign.learner.strategies import gather_objects, make_strategy
from rayalign.learner.stream import BatchSource, EndOfStream, PleasePublish, Span
from rayalign.learner.update import batch_tokens, learning_rate, update
from rayalign.rollout.weights import Weights, pack
from rayalign.types import TrainBatch

__all__ = ["LearnerSetup", "LearnerTrainer", "make_trainer", "train_loop", "validate"]

PUBLISH_MODES = ("merged", "adapter")
SLOWEST_UPDATE_S = 1800.0
"""How long a worker waits for the others inside an update before Ray Train restarts them all."""


@dataclass(frozen=True, kw_only=True)
class LearnerSetup:
    """Everything a learner worker is given; travels pickled."""

    agent: Agent
    """Never set up: only the hooks that `Agent` lists under "in the learner" are called."""
    config: LearnerConfig
    """How preferences become weights."""
    policy: str
    """Hugging Face directory of the initial policy, version 0."""
    source: BatchSource
    """Where batches come from and weights go."""
    final_dir: str
    """Where the final Hugging Face directory is written: weights (adapters merged) and tokenizer; with LoRA the
    adapter itself in `adapter/` inside it."""
    publish: str = "merged"
    """LoRA only: `merged` publishes whole weights, `adapter` the adapters alone (for engines that can add them)."""
    seed: int = 0
    """Of adapters' initial values and dropout."""

    def __post_init__(self) -> None:
        if self.publish not in PUBLISH_MODES:
            raise ConfigError(f"learner publish={self.publish!r} must be one of {', '.join(PUBLISH_MODES)}.")
        if self.publish == "adapter" and not self.config.lora.rank:
            raise ConfigError(
                "learner publish='adapter' needs adapters, but learner.lora.rank=0. Set a rank, or 'merged'."
            )


# ==== in each worker ==========================================================================================
def train_loop(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray Train runs in each worker; `settings["setup"]` is a `LearnerSetup`.

    Returns `{"version", "metrics"}`, or `{"error"}`: errors of our own family are the same at every retry, and Ray
    Train retries whatever is raised, so they are handed back for `LearnerTrainer.fit` to raise.
    """
    try:
        return _Worker(settings["setup"]).run()
    except RayalignError as error:
        return {"error": getattr(error, "cause", error)}  # Ray wraps what comes from the source's actor


class _Worker:
    """One worker's run from its checkpoint to the end of the stream."""

    def __init__(self, setup: LearnerSetup) -> None:
        self.setup, self.config, self.agent = setup, setup.config, setup.agent
        torch.set_num_threads(self.config.threads_per_worker or max(1, int(self.config.cpus_per_worker)))
        policy = self._load_policy()
        frozen = Reference.of(self.agent, self.config, policy)
        self.strategy = make_strategy(policy, self.config, get_device())
        if frozen is not None:
            frozen = self.strategy.shard(frozen)
        self.reference = Reference(self.agent, self.config, self.strategy, frozen)
        self.version = 0
        self.saved_version = 0
        self.metrics: dict[str, float] = {}
        self.spans: list[Span] = []  # of work since weights were last offered
        self._resume()

    def run(self) -> dict[str, Any]:
        """The loop of this file's head."""
        while True:
            with self._timed("wait"):
                reply = self._next_batch()
            if isinstance(reply, EndOfStream):
                break
            if isinstance(reply, PleasePublish):
                self._publish()
                continue
            self._learn(reply)
            self._publish()
            if self.version % self.config.checkpoint_every == 0:
                self._checkpoint()
        if self.version != self.saved_version:
            self._checkpoint()
        self._finish()
        return {"version": self.version, "metrics": self.metrics}

    def _load_policy(self) -> PolicyModule:
        """The initial policy, or its error on all workers where one has it: the others would wait for that one."""
        policy, failure = None, None
        try:
            policy = load_policy(self.setup.policy, self.config, self.setup.seed)
        except RayalignError as error:
            failure = error
        for theirs in gather_objects(failure):
            if theirs is not None:
                raise theirs
        assert policy is not None
        return policy

    # -- one turn of the loop ---------------------------------------------------------------------------------
    def _next_batch(self) -> TrainBatch | EndOfStream | PleasePublish:
        """Batch `version`, agreed upon by all workers: one that asks later may get another kind of answer."""
        failure = ""
        reply: TrainBatch | EndOfStream | PleasePublish = PleasePublish()
        try:
            reply = self.setup.source.next_batch(self.version, self.config.batch_timeout_s)
        except WaitError as error:
            failure = str(error)
        answers = self.strategy.gather((failure, type(reply).__name__))
        if failures := sorted(f for f, _ in answers if f):
            raise WaitError(failures[0])
        if any(kind == PleasePublish.__name__ for _, kind in answers):
            return PleasePublish()
        return reply

    def _learn(self, batch: TrainBatch) -> None:
        assert batch.index == self.version, f"asked for batch {self.version}, got {batch.index}"
        torch.manual_seed(hash((self.setup.seed, self.version, self.strategy.rank)) % 2**63)  # adapters' dropout
        batch = replace(batch, preferences=tuple(self.agent.training_duels(batch.preferences)))
        with self._timed("reference"):
            references = self.reference.logprobs(batch.index, batch.preferences)
        rate = learning_rate(self.config, batch.index, float(batch.meta.get("progress", 0.0)))
        rate *= self.agent.learning_rate_factor(batch.index)
        with self._timed("learn"):
            for _ in range(self.config.updates_per_batch):
                self.metrics = update(self.strategy, self.agent, batch, references, self.config, rate)
        if self.metrics:
            spent = sum(self._seconds(stage) for stage in ("learn", "reference"))
            self.metrics["tokens_per_s"] = batch_tokens(batch.preferences) * self.config.updates_per_batch / spent
        self.version += 1

    def _publish(self) -> None:
        """Offer the current weights; with them the seconds by stage since they were last offered."""
        stages = {stage for stage, _, _ in self.spans}
        metrics = self.metrics | {f"seconds/{stage}": self._seconds(stage) for stage in stages}
        with self._timed("publish"):
            weights = self._weights()
            if weights is not None:
                self.setup.source.publish(weights, metrics, self.spans)
            self.strategy.gather(None)  # nobody asks for the next batch before these weights are out
            self.spans = []

    def _weights(self) -> Weights | None:
        """The current version, packed; None on every worker but the first."""
        first, policy = self.strategy.rank == 0, self.strategy.policy
        if self.setup.publish == "adapter":
            state = adapter_state(policy, self.strategy.gathered, keep=first)
            return pack(self.version, state, adapter_config(policy)) if first else None
        state = merged_state(policy, self.strategy.gathered, keep=first)
        return pack(self.version, state) if first else None

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def _checkpoint(self) -> None:
        """Report weights, optimizer and reference to Ray Train; every worker adds its files to the same checkpoint."""
        with self._timed("checkpoint"), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.strategy.save(folder)
            self.reference.save(folder)
            if self.strategy.rank == 0:
                (folder / "learner.json").write_text(json.dumps(self._facts()))
            checkpoint = Checkpoint.from_directory(name) if any(folder.iterdir()) else None
            ray.train.report({**self.metrics, "version": self.version}, checkpoint=checkpoint)
        self.saved_version = self.version

    def _facts(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "strategy": self.config.strategy,
            "workers": self.strategy.world_size,
            "metrics": self.metrics,
        }

    def _resume(self) -> None:
        """Back to the last checkpoint, where there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as name:
            folder = Path(name)
            facts = json.loads((folder / "learner.json").read_text())
            for field, now in (("strategy", self.config.strategy), ("workers", self.strategy.world_size)):
                if facts[field] != now and "zero" in facts["strategy"] + self.config.strategy:
                    raise DataError(
                        f"the checkpoint in {checkpoint.path} was written with {field}={facts[field]!r}, which "
                        f"DeepSpeed can't restore with {field}={now!r}; resume with the settings of the run."
                    )
            self.strategy.load(folder)
            self.reference.load(folder)
        self.version = self.saved_version = facts["version"]
        self.metrics = facts["metrics"]

    # -- the end ------------------------------------------------------------------------------------------------
    def _finish(self) -> None:
        """Write the final directory; it appears whole or not at all, in a bucket file by file."""
        first, policy, setup = self.strategy.rank == 0, self.strategy.policy, self.setup
        state = merged_state(policy, self.strategy.gathered, keep=first)
        adapter = adapter_state(policy, self.strategy.gathered, keep=first) if self.config.lora.rank else {}
        if not first:
            return
        target = None if storage.in_bucket(setup.final_dir) else Path(setup.final_dir)
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=target and target.parent))
        try:
            write_final(setup.policy, state, building)
            if adapter:
                from safetensors.torch import save_file

                (building / "adapter").mkdir()
                save_file(adapter, building / "adapter" / "adapter_model.safetensors")
                text = json.dumps(adapter_config(policy), indent=2, default=str)
                (building / "adapter" / "adapter_config.json").write_text(text)
            if target is None:
                return storage.replace_folder(setup.final_dir, building)
            building.chmod(0o755)
            if target.exists():  # left by a run that was killed between here and its last report
                shutil.rmtree(target)
            building.replace(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.time()  # on the clock of the collector's spans, to be drawn side by side
        yield
        self.spans.append((stage, start, time.time()))

    def _seconds(self, stage: str) -> float:
        return sum(end - start for name, start, end in self.spans if name == stage)


# ==== in the driver ============================================================================================
class LearnerTrainer(TorchTrainer):
    """A `TorchTrainer` whose `fit` raises what stopped the workers as what it is."""

    def fit(self) -> Result:
        """Run to the end of the stream, through worker failures. `return_value` has the last version and metrics.

        Raises errors of our own family as they are, and Ray Train's `TrainingFailedError` when workers failed more
        often than `learner.max_failures`.
        """
        # Ray Train reads its settings in the process that calls fit. Its controller looks at the workers every 2 s
        # by default, and takes one report at a look: checkpoints of short batches would wait for it.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        if (
            ray.is_initialized() and len(ray.nodes()) == 1
        ):  # nobody announces the loss of the only node: spare the process that listens
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            result = super().fit()
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, ctrl_c)  # Ray Train's own would ask for a controller that is gone
        value = result.return_value
        if isinstance(value, dict) and isinstance(value.get("error"), RayalignError):
            raise value["error"]
        return result


def make_trainer(
    setup: LearnerSetup, config: LearnerConfig | None = None, *, storage_path: str, name: str
) -> LearnerTrainer:
    """The learner as a trainer; call its `fit`.

    Args:
        setup: what the workers are given.
        config: replaces `setup.config`.
        storage_path: directory that every node sees, or a URI; with `name` the place of the checkpoints.
        name: of the run; a trainer made with the same place resumes at the latest checkpoint there.
    """
    if config is not None:
        setup = replace(setup, config=config)
    config = setup.config
    gpu = config.gpus_per_worker > 0
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if gpu else {})
    return LearnerTrainer(
        train_loop,
        train_loop_config={"setup": setup},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout_s=int(config.batch_timeout_s + SLOWEST_UPDATE_S),  # workers wait for each other's answer
        ),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=gpu,
            resources_per_worker=resources,
            label_selector=config.nodes or None,
        ),
        run_config=RunConfig(
            name=name,
            **storage.ray_storage(storage_path),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
