"""The collector: the loop's own side of the house. Prompts become candidates, candidates duels, duels labels.

One batch, top to bottom (`Collector.collect`):

    gate      wait until the learner has published weights that are fresh enough     learner  -> window
    sync      send them to the engines, read version and checksum back               window   -> pool
    generate  candidates for the prompts on the table                                pool     -> candidates
    select    the agent picks pairs, and labels some of them itself if it wants      agent    -> duels
    label     commit the batch to the ledger, then ask the oracle                    env      -> preferences
    add       the learner may fetch the batch                                        window   -> learner
    observe   meanwhile the agent learns from what came back, too                    agent

Everything random in batch `b` is drawn from generators seeded with (run seed, b, purpose), and the prompt
position is a function of b. So the ledger alone says where a run stands: after a crash the collector opens
it, asks again what was asked and not answered (same ids), replays the agent from its last checkpoint, and
goes on with the next batch.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import Agent, AgentContext, Choice
from rayalign.env.dueling_bandit import DuelingBanditVector
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.env.wrappers import LabelBudgetVector
from rayalign.errors import OracleError, RayalignError
from rayalign.heldout import HeldOut
from rayalign.learner.stream import EndOfStream, PleasePublish, Span
from rayalign.ledger import Ledger
from rayalign.logs import RunLog
from rayalign.purchase import Purchaser
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.model_pool import ModelPool
from rayalign.rollout.pool import RolloutPool
from rayalign.rollout.weights import Weights, load_weights, save_weights
from rayalign.run_config import RunConfig
from rayalign.scoring.pool import ScorerPool
from rayalign.staleness import Window
from rayalign.stopwatch import Stopwatch
from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt, TrainBatch

log = logging.getLogger(__name__)

GENERATE, SELECT, OBSERVE, SHUFFLE = range(4)
"""Purposes of a batch's random streams."""


HELD = "held after an evaluation"
"""Phase of a guided run that waits to be let on."""
HOLD_POLL_S = 0.1
ALLOWED = "allowed_evaluations"
"""A file in the run directory of a guided run: how many evaluations it may make before it waits."""


def allowed_evaluations(run_dir: Path) -> int | None:
    """What the file says; None: the run is not guided."""
    try:
        return int((run_dir / ALLOWED).read_text())
    except FileNotFoundError:
        return None


class Collector:
    """Steps the environment, batch after batch, in a thread of its own; serves the learner from the others.

    Ray restarts it as an actor (`max_restarts=-1`): the constructor is also the recovery.
    """

    def __init__(self, config: RunConfig, world: World, agent: Agent, oracle: Oracle, eval_oracle: Oracle) -> None:
        self.config, self.world, self.agent = config, world, agent
        self.run_dir = Path(config.run_dir)
        self.log = RunLog(self.run_dir, config.logging, resolved=config)
        self.ledger = Ledger(self.run_dir / "ledger.arrow")
        self.lock = threading.Lock()  # guards the ledger, which the learner's threads read
        self.purchaser = Purchaser(
            self.ledger, oracle, mode=config.oracle.labels, seed=config.loop.seed, budget=config.loop.budget
        )
        self.oracle, self.eval_oracle = oracle, eval_oracle
        self.window = Window()
        self.table: Sequence[Prompt] = ()
        self.phase = "starting"
        self.error: str | None = None
        self.failure: BaseException | None = None
        self.warning: str | None = None
        self.record: dict[str, Any] = {}
        self._batches: OrderedDict[int, TrainBatch] = OrderedDict()
        self._pools: list[ModelPool] = []
        self._learner_at = 0
        self._learner_record: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guarded, name="collect", daemon=True)
        self._thread.start()

    # ==== the loop =============================================================================================
    def _guarded(self) -> None:
        try:
            self._recover()
            self._run()
            self.phase = "done"
        except BaseException as error:  # whatever it is, the learner must not wait for a dead thread
            self.failure, self.phase = error, "failed"
            self.error = str(error) if isinstance(error, RayalignError) else traceback.format_exc()
            log.error("collector stopped: %s", self.error)
            self.window.fail(error)

    def _run(self) -> None:
        batch, stalled = self.window.collected, 0
        while self.ledger.spent < self.config.loop.budget and not self._stop.is_set():
            self.phase = "collecting"
            bought, failed = self.collect(batch)
            stalled = 0 if bought else stalled + 1
            if stalled >= self.config.loop.max_stalled_batches:
                if failed:
                    raise OracleError(
                        f"the oracle {self.oracle.id} gave no usable verdict in {stalled} batches in a row; nothing "
                        "was charged for them. Look at its log (failures are in the ledger), then `rayalign resume`."
                    )
                self.warning = (
                    f"stopped early at {self.ledger.spent} of {self.config.loop.budget} labels: the agent asked for "
                    f"none in {stalled} batches in a row, as a policy does whose samples have all become the same text."
                )
                log.warning(self.warning)
                break
            batch += 1
        end = batch * self.config.loop.epochs
        self.window.finish(end)
        self.phase = "finishing"
        self._wait_for_version(end)
        self._wake()
        self._sync(newest=None)
        self._evaluate()

    def collect(self, batch: int) -> tuple[int, int]:
        """Collect batch `batch`; returns how many labels were bought and how many verdicts failed."""
        clock = Stopwatch()
        config, agent = self.config, self.agent

        oldest, newest = agent.sampling_window(batch, config.loop.max_staleness)
        with clock("gate"):
            self._wait_for_version(oldest)
        with clock("sync"):
            self._wake()
            self._sync(newest)
        if self.heldout.due(self.ledger.spent):
            with clock("evaluate"):
                self._evaluate()

        self._hold()

        version = self.pool.version
        with clock("generate"):
            prompts = [self.encoder.encode(prompt) for prompt in self.table]
            candidates = self._propose(prompts, batch)
            self._sleep()
        with clock("select"):
            choices = agent.select(batch, prompts, candidates, self._rng(batch, SELECT))
            duels, synthetic = self._duels(batch, prompts, candidates, choices)
            duels = duels[: self.env.remaining]  # the last batch of the budget is a short one
        with clock("label"):
            header = {"version": version, "published": self.window.published, "choices": len(choices)}
            with self.lock:
                self.purchaser.commit(batch, duels, synthetic, meta=header)
            _, _, _, _, info = self.env.step(duels)
            self.table = info["prompts"]
            bought: list[Preference] = [p for p in info["preferences"][: len(duels)] if p is not None]
        with self.lock:
            self._remember(batch, tuple([*bought, *synthetic]), self.ledger.spent)
        self.window.add(batch)
        with clock("observe"):
            facts = agent.observe(batch, [*bought, *synthetic], self._rng(batch, OBSERVE))
            if (batch + 1) % config.loop.agent_checkpoint_every == 0:
                self._save_agent(observed=batch + 1)

        failed = len(duels) - len(bought)
        self.record = {
            "batch": batch,
            "labels": self.ledger.spent,
            "time": time.time(),
            "version": version,
            "staleness": batch - version,
            "asked": len(duels),
            "synthetic": len(synthetic),
            "skipped": len(prompts) - len({choice.prompt for choice in choices}),
            "failed": failed,
            **self._duel_statistics(bought, info),
            **{f"seconds/{stage}": seconds for stage, seconds in clock.seconds().items()},
            **{f"agent/{name}": value for name, value in facts.items()},
            **{f"rollout/{name}": value for name, value in self.pool.stats().items()},
        }
        self.log.metrics(self.record)
        for stage, start, end in clock.spans:
            self.log.timeline("collector", stage, batch, start, end)
        return len(bought), failed

    def _hold(self) -> None:
        """Go no further than the evaluation that whoever guides the run has let it go to (`rayalign.guided`)."""
        while (allowed := allowed_evaluations(self.run_dir)) is not None and self.heldout.num_done >= allowed:
            self.phase = HELD
            if self._stop.wait(HOLD_POLL_S):
                raise self.failure or RayalignError("the run is being stopped.")

    # ==== pieces of the loop ===================================================================================
    def _wait_for_version(self, oldest: int) -> None:
        self.window.wait_for_version(
            oldest, self.config.loop.gate_timeout_s, lambda: f"The learner last asked for batch {self._learner_at}. "
        )

    def _sync(self, newest: int | None) -> None:
        """Give the pool the newest weights, unless the agent wants it to stay where it is."""
        weights = self.window.weights
        if (
            weights is None
            or weights.version <= self.pool.version
            or (newest is not None and newest <= self.pool.version)
        ):
            return
        if newest is not None:
            assert weights.version <= newest, f"published {weights.version} has passed the agent's window, {newest}"
            save_weights(weights, self.run_dir / "pinned")  # a resumed round can't get them from the learner any more
        self._load(weights)

    def _load(self, weights: Weights) -> None:
        """Weights to all who hold the current policy."""
        self.pool.sync(weights)
        if self.scorer is not None:
            self.scorer.sync(weights)

    def _wake(self) -> None:
        if self.config.loop.sleep_engines:
            for pool in self._pools:
                pool.wake()

    def _sleep(self) -> None:
        """Collocated on a GPU, the engines' memory is the learner's until the next batch."""
        if self.config.loop.sleep_engines:
            for pool in self._pools:
                pool.sleep()

    def _propose(self, prompts: Sequence[Prompt], batch: int) -> list[list[Candidate]]:
        groups: list[list[Candidate]] = [[] for _ in prompts]
        for part, proposal in enumerate(self.agent.proposals()):
            if proposal.source == "data":
                for prompt, group in zip(prompts, groups, strict=True):
                    group.extend(self.encoder.given_pair(prompt))
                continue
            pool = self.pool if proposal.source == "policy" else self.reference_pool
            sampling = self.config.rollout.sampling(n=proposal.n)
            seed = int(self._rng(batch, GENERATE, part).integers(2**62))
            for group, sampled in zip(groups, pool.generate(prompts, sampling, seed), strict=True):
                group.extend(replace(candidate, source=proposal.source) for candidate in sampled)
        return groups

    def _duels(
        self,
        batch: int,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[Candidate]],
        choices: Sequence[Choice],
    ) -> tuple[list[Duel], list[Preference]]:
        """Choices as duels to buy and as the agent's own preferences."""
        duels: list[Duel] = []
        synthetic: list[Preference] = []
        for slot, choice in enumerate(choices):
            prompt, group = prompts[choice.prompt], candidates[choice.prompt]
            first, second = group[choice.first], group[choice.second]
            name = Duel.make_id(self.config.identity, batch, slot, prompt, first, second)
            duel = Duel(id=name, batch=batch, prompt=prompt, first=first, second=second, meta=choice.meta)
            if choice.label is None:
                duels.append(duel)
            else:
                synthetic.append(Preference(duel=duel, label=choice.label, source=LabelSource.SYNTHETIC))
        return duels, synthetic

    def _duel_statistics(self, bought: Sequence[Preference], info: Mapping[str, Any]) -> dict[str, float]:
        """What the labelled duels themselves were worth to a user who saw them (explore and exploit), where known."""
        statistics: dict[str, float] = {}
        asked = np.asarray(info["labelled"], dtype=bool)
        for name in ("regret_reward", "regret_preference"):
            if name in info and asked.any():
                statistics[name] = float(np.mean(np.asarray(info[name])[asked]))
        if self.world.has_truth:
            wins = [
                0.5
                + 0.5
                * np.sign(self.world.reward(p.duel.prompt, shown.text) - self.world.reward(p.duel.prompt, reference))
                for p in bought
                if (reference := p.duel.prompt.reference) is not None
                for shown in (p.duel.first, p.duel.second)
            ]
            if wins:
                statistics["online_win_rate"] = float(np.mean(wins))
        return statistics

    def _evaluate(self) -> None:
        version = self.pool.version
        record = self.heldout.evaluate(self.pool, self.agent, version, labels=self._labels_behind(version))
        self.log.evaluation(record)
        self.record = {**self.record, "win_rate": record["win_rate"], "win_rate_stderr": record["stderr"]}

    def _labels_behind(self, version: int) -> int:
        """Oracle labels that weights version `version` was trained on."""
        return self.ledger.labels_before(version)

    def _rng(self, batch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.loop.seed, batch, *purpose])

    # ==== recovery =============================================================================================
    def _recover(self) -> None:
        """Everything that a run needs and a crash takes away, from the run directory."""
        config, agent = self.config, self.agent
        self.encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
        self.pool = self._make_pool("rollout")
        self.reference_pool = self._make_pool("reference") if agent.samples_reference() else self.pool
        self.scorer: ScorerPool | None = None
        if agent.needs_scorer():
            self.scorer = ScorerPool(config.scorer, config.policy, name=f"{config.name}-scorer")
            self._pools.append(self.scorer)
        self.heldout = HeldOut(
            config.evaluation,
            self.world,
            self.encoder,
            self.eval_oracle,
            self.run_dir,
            sampling=config.rollout.sampling(n=1),
            identity=config.identity,
            seed=config.loop.seed,
        )
        num_prompts = agent.prompts_per_batch(config.loop.batch_size)
        agent.setup(
            AgentContext(
                policy=Path(config.policy),
                seed=config.loop.seed,
                batch_size=config.loop.batch_size,
                device=config.loop.agent_device,
                sample_prompts=[self.encoder.encode(self.world.prompt(i)) for i in range(num_prompts)],
                scorer=self.scorer,
            )
        )
        with self.lock:
            self.purchaser.recover()
        done = self.ledger.num_batches
        for batch in range(self._load_agent(), done):
            agent.observe(batch, self.ledger.batch(batch), self._rng(batch, OBSERVE))
        self.window.restart(collected=done)
        pinned = self.run_dir / "pinned"
        if pinned.exists():
            self._load(load_weights(pinned))

        bandit = DuelingBanditVector(self.world, num_envs=num_prompts, labeler=self.purchaser)
        self.env = LabelBudgetVector(bandit, budget=config.loop.budget, spent=self.ledger.spent)
        _, info = self.env.reset(seed=config.loop.seed, options={"index": done * num_prompts})
        self.table = info["prompts"]
        if self.pool.version == 0:
            self.heldout.prepare(self.pool)
        if done == 0 and self.heldout.due(0):
            self.phase = "evaluating the initial policy"
            self._evaluate()

    def _make_pool(self, name: str) -> RolloutPool:
        pool = RolloutPool(self.config.rollout, self.config.policy, name=f"{self.config.name}-{name}")
        self._pools.append(pool)
        return pool

    def _save_agent(self, observed: int) -> None:
        """Checkpoint the agent's state after `observed` batches; it appears whole or not at all."""
        folder = self.run_dir / "agent" / f"observed-{observed:06d}"
        partial = folder.with_suffix(".partial")
        for path in (partial, folder):
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)
        self.agent.save(partial)
        partial.rename(folder)
        for old in sorted(folder.parent.glob("observed-??????"))[:-2]:
            shutil.rmtree(old)

    def _load_agent(self) -> int:
        """Load the newest checkpoint of the agent that the ledger vouches for; returns how many batches it observed."""
        for folder in sorted((self.run_dir / "agent").glob("observed-??????"), reverse=True):
            observed = int(folder.name[-6:])
            if observed <= self.ledger.num_batches:
                self.agent.load(folder)
                return observed
        return 0

    # ==== what the learner and the driver ask, from other threads ==============================================
    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish | None:
        """See `learner.stream.BatchSource`; None instead of an error when nothing came within `timeout_s`."""
        self._learner_at = index
        if index > self.window.published:
            return PleasePublish()
        there = self.window.wait_for_batch(index, timeout_s)
        if not there:
            return EndOfStream() if there is False else None
        return self._train_batch(index)

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """See `learner.stream.BatchSource`."""
        self.window.publish(weights)
        batch = weights.version - 1
        self._learner_record = {f"learner/{name}": value for name, value in metrics.items()}
        self.log.metrics({"batch": batch, **self._learner_record})
        for stage, start, end in spans:
            self.log.timeline("learner", stage, batch, start, end)

    def _train_batch(self, index: int) -> TrainBatch:
        """Batch `index` of the stream: a batch of the ledger, in a new order each epoch."""
        with self.lock:
            if (batch := self._batches.get(index)) is not None:
                return batch
            collected = self.window.collected
            epoch, position = (index // collected, index % collected) if self.window.end is not None else (0, index)
            if epoch > 0:
                position = int(self._rng(epoch, SHUFFLE).permutation(collected)[position])
            spent = self.ledger.labels_before(position + 1)
            return self._remember(index, tuple(self.ledger.batch(position)), epoch * self.config.loop.budget + spent)

    def _remember(self, index: int, preferences: tuple[Preference, ...], spent: int) -> TrainBatch:
        """Keep the last few batches of the stream, so that the ledger is read only after a restart."""
        progress = min(1.0, spent / (self.config.loop.budget * self.config.loop.epochs))
        self._batches[index] = TrainBatch(index=index, preferences=preferences, meta={"progress": progress})
        while len(self._batches) > self.config.loop.max_staleness + 4:
            self._batches.popitem(last=False)
        return self._batches[index]

    def status(self) -> dict[str, Any]:
        """A snapshot for the progress display, the driver and error messages."""
        return {
            "budget": self.config.loop.budget,
            **self.record,
            **self._learner_record,
            "labels": self.ledger.spent,
            "phase": self.phase,
            "error": self.error,
            "warning": self.warning,
            "collected": self.window.collected,
            "published": self.window.published,
        }

    def interrupt(self, reason: str) -> None:
        """Break the run off: the learner is told so instead of a batch. Nothing that was bought is lost."""
        if self.phase not in ("done", "failed"):
            self.error, self.failure = reason, RayalignError(reason)
            self._stop.set()
            self.window.fail(self.failure)

    def failed_with(self) -> RayalignError | None:
        """What stopped the collector, if anything did."""
        if self.failure is None or isinstance(self.failure, RayalignError):
            return self.failure
        return RayalignError(f"the collector stopped: {self.error}")

    def close(self) -> None:
        """Stop the engines and close the files. Nothing that was bought is lost by not calling it."""
        self._stop.set()
        for pool in self._pools:
            pool.close()
        self.log.close()
