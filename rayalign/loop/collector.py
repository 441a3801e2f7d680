"""The collector: the loop's own side of the house. Prompts become candidates, candidates duels, duels labels.

One batch, top to bottom (`Collector.collect`):

    gate      wait until the learner has published weights that are fresh enough     learner  -> window
    sync      send them to the engines, read version and checksum back               window   -> pool
    generate  candidates for the prompts on the table                                pool     -> candidates
    select    the agent picks pairs, and labels some of them itself if it wants      agent    -> duels
    label     commit the batch to the ledger, then ask the oracle                    env      -> preferences
    stream    what is answered can be trained on                                     window   -> learner
    observe   meanwhile the agent learns from what came back, too                    agent

What is committed together is a *collected batch*, what is trained on together a *stream batch* (see `ledger`). They
are the same unless the oracle is late, as people are: then `label` waits for nobody, a second thread asks after what
is outstanding, and stream batches come to be as answers do, while this one generates as far ahead as the gate lets it.

Everything random in batch `b` is drawn from generators seeded with (run seed, b, purpose), and the prompt
position is a function of b. So the ledger alone says where a run stands: after a crash the collector opens
it, asks again what was asked and not answered (same ids), replays the agent from its last checkpoint, and
goes on with the next batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.agent import Agent, AgentContext, Choice, Chooser
from rayalign.env.dueling_bandit import DuelingBanditVector
from rayalign.env.labels import LATE_POLL_S, Oracle
from rayalign.env.world import World
from rayalign.env.wrappers import LabelBudgetVector
from rayalign.errors import OracleError, RayalignError, StorageError, WaitError
from rayalign.learner.stream import EndOfStream, PleasePublish, Span
from rayalign.ledger.purchase import Purchaser
from rayalign.ledger.shared_budget import SharedBudget
from rayalign.loop.duel_statistics import duel_statistics
from rayalign.loop.engines import Engines
from rayalign.loop.heldout import HeldOut
from rayalign.loop.staleness import Window
from rayalign.loop.stopwatch import Stopwatch
from rayalign.loop.train_batches import TrainBatches
from rayalign.random_streams import GENERATE, SELECT, stream
from rayalign.rollout.weights import Weights, load_weights, save_weights
from rayalign.runs.agent_state import load_agent, observe_rng, save_agent
from rayalign.runs.config import RunConfig
from rayalign.runs.logs import RunLog
from rayalign.serve.kinds import oracle_kind
from rayalign.storage import open_place
from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt, TrainBatch

log = logging.getLogger(__name__)

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

    kind_of_engines = Engines

    def __init__(self, config: RunConfig, world: World, agent: Agent, oracle: Oracle, eval_oracle: Oracle) -> None:
        self.config, self.world, self.agent = config, world, agent
        self.chooser: Chooser = agent
        self.place = open_place(config.run_dir)
        self.run_dir = self.place.folder
        self.pinned = self.run_dir / "pinned"
        self.log = RunLog(self.run_dir, config.logging, resolved=config)
        self.ledger = self.place.ledger("ledger.arrow")
        self.lock = threading.Lock()  # guards the ledger, which the learner's threads read
        self.oracle, self.eval_oracle = oracle, eval_oracle
        self.window = Window()
        self.table: Sequence[Prompt] = ()
        self.phase = "starting"
        self.error: str | None = None
        self.failure: BaseException | None = None
        self.warning: str | None = None
        self.record: dict[str, Any] = {}
        self.batches = TrainBatches(config.loop, self.ledger, self.lock, self.window)
        self._observed = 0
        self._late = self._waits = False
        self._asked_in = [self.ledger]
        self.engines = self.kind_of_engines(config, agent)
        self._learner_at = 0
        self._learner_record: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._guarded, name="collect", daemon=True)
        self._thread.start()

    # ==== the loop =============================================================================================
    def _guarded(self) -> None:
        try:
            self._recover()
            self._late = self.purchaser.late
            if self._late:
                threading.Thread(target=self._ask_after, name="answers", daemon=True).start()
            self._run()
            self.phase = "done"
        except BaseException as error:  # whatever it is, the learner must not wait for a dead thread
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:  # the other thread's error is a consequence
            self.failure, self.phase = error, "failed"
            self.error = str(error) if isinstance(error, RayalignError) else traceback.format_exc()
            log.error("collector stopped: %s", self.error)
            self.window.fail(error)
            with contextlib.suppress(StorageError):  # it may be what stopped us
                self.place.save()
        self.window.fail(error)

    def _run(self) -> None:
        first = self.ledger.num_streamed
        if self.ledger.num_collected == 0 and self.heldout.due(0):
            self.phase = "evaluating the initial policy"
            self._evaluate()
        while not self._stop.is_set() and not self._has_stalled(first):
            self.phase = "collecting"
            if self.purchaser.remaining:
                self.collect(self.ledger.num_collected)
            elif self.ledger.num_outstanding:
                self._wait_for_answers()
            else:
                break
        self._settle()
        end = self.ledger.num_collected * self.config.loop.epochs
        self.window.finish(end)
        self.phase = "finishing"
        self._wait_for_version(end)
        save_agent(self.agent, self.run_dir, self._observed)
        self.engines.wake()
        self._sync(newest=None)
        self._evaluate()

    def _settle(self) -> None:
        """What was set aside in a shared budget and not bought is others' again."""
        if self.purchaser.shared is not None:
            if self.purchaser.shut_out:
                self.warning = (
                    f"stopped at {self.ledger.spent} of {self.config.loop.budget} labels: the budget that it shares "
                    "with other runs is spent."
                )
            self.purchaser.shared.settle(self.ledger.committed)

    def collect(self, batch: int) -> None:
        """Collect batch `batch`, and have the agent observe the stream batches that its answers close."""
        clock = Stopwatch()
        self._begin(batch, clock)
        version = self.engines.version
        with clock("generate"):
            prompts = [self.engines.encoder.encode(prompt) for prompt in self.table]
            candidates = self.engines.propose(prompts, batch, GENERATE)
            self.engines.sleep()
        with clock("select"):
            choices = self.agent.select(batch, prompts, candidates, self._rng(batch, SELECT))
            duels, synthetic = self._duels(batch, prompts, candidates, choices)
            duels = duels[: self.purchaser.reserve(len(duels))]  # the last batch of the budget is a short one
        with clock("label"):
            self._commit(batch, duels, synthetic, version=version, choices=len(choices))
            _, _, _, _, info = self.env.step(duels)
            self.table = info["prompts"]
        facts = {"version": version, "staleness": batch - version}
        facts["skipped"] = len(prompts) - len({choice.prompt for choice in choices})
        self._end(batch, duels, synthetic, info, facts, clock)

    def _begin(self, batch: int, clock: Stopwatch) -> None:
        """Pass the gate of batch `batch` with the engines up to date, and evaluate if it is time to."""
        oldest, newest = self.agent.sampling_window(batch, self.config.loop.max_staleness)
        with clock("gate"):
            self._wait_for_version(oldest)
        with clock("sync"):
            self.engines.wake()
            self._sync(newest)
        if newest is None:
            self._evaluate_if_due(clock)
        else:
            self._evaluate_newest_if_due(clock)
        self._hold()

    def _commit(
        self, batch: int, duels: Sequence[Duel], synthetic: Sequence[Preference], *, version: int, choices: int
    ) -> None:
        """Write the batch down, before anybody is asked."""
        header = {"version": version, "published": self.window.published, "choices": choices}
        with self.lock:
            self.purchaser.commit(batch, duels, synthetic, meta=header)

    def _end(
        self,
        batch: int,
        duels: Sequence[Duel],
        synthetic: Sequence[Preference],
        info: Mapping[str, Any],
        facts: Mapping[str, Any],
        clock: Stopwatch,
    ) -> None:
        """What is answered goes to the learner and the agent; what became of the batch, to the log.

        `info` is what a step of the environment says of the duels, `facts` are numbers for the record.
        """
        if not self.purchaser.late:  # at hand already, so that the ledger is read only after a restart
            bought = [p for p in info["preferences"][: len(duels)] if p is not None]
            self.batches.put(batch, (*bought, *synthetic))
        self.window.extend(self.ledger.num_streamed)
        with clock("observe"):
            learnt = self._observe(batch)

        outcomes = [self.ledger.outcome(duel.id) for duel in duels]
        self.record = {
            "batch": batch,
            "labels": self.ledger.spent,
            "time": time.time(),
            "asked": len(duels),
            "synthetic": len(synthetic),
            **facts,
            "failed": sum(outcome is not None and outcome[0] is None for outcome in outcomes),
            "outstanding": self.ledger.num_outstanding,
            **duel_statistics(self.world, duels, info, late=self.purchaser.late),
            **{f"seconds/{stage}": seconds for stage, seconds in clock.seconds().items()},
            **learnt,
            **{f"rollout/{name}": value for name, value in self.engines.policy.stats().items()},
        }
        self.log.metrics(self.record)
        for stage, start, end in clock.spans:
            self.log.timeline("collector", stage, batch, start, end)
        self.place.save_if_due()

    def _hold(self) -> None:
        """Go no further than the evaluation that whoever guides the run has let it go to (`rayalign.loop.guided`)."""
        while (allowed := allowed_evaluations(self.run_dir)) is not None and self.heldout.num_done >= allowed:
            self.phase = HELD
            if self._stop.wait(HOLD_POLL_S):
                raise self.failure or RayalignError("the run is being stopped.")

    # ==== pieces of the loop ===================================================================================
    def _wait_for_version(self, oldest: int) -> None:
        """Wait at the gate; what is answered meanwhile is observed meanwhile."""
        self._waits, version = True, None
        while version is None:
            self._observe()
            version = self.window.wait_for_version(
                oldest,
                self.config.loop.gate_timeout_s,
                lambda: f"The learner last asked for batch {self._learner_at}. ",
                seen=self._observed,
            )
        self._waits = False

    def _observe(self, collected: int | None = None) -> dict[str, float]:
        """The agent learns from the stream batches that were closed since.

        Its numbers are logged, or returned for the record of batch `collected`.
        """
        record: dict[str, float] = {}
        while self._observed < self.window.streamed:
            index = self._observed
            found = self.agent.observe(
                index, self.batches[index].preferences, observe_rng(self.config.loop.seed, index)
            )
            self._observed += 1
            if self._observed % self.config.loop.agent_checkpoint_every == 0:
                save_agent(self.agent, self.run_dir, self._observed)
                self.place.save()
            facts = {f"agent/{name}": value for name, value in found.items()}
            if index == collected:
                record = facts
            elif facts:
                self.log.metrics({"batch": index, **facts})
        return record

    def _has_stalled(self, first: int) -> bool:
        """Whether the last `max_stalled_batches` batches, none before `first`, brought no label, and none will come."""
        last, most = self.ledger.num_streamed, self.config.loop.max_stalled_batches
        if last < first + most or last < self.ledger.num_collected:
            return False
        if self.ledger.labels_before(last) > self.ledger.labels_before(last - most):
            return False
        if self.ledger.header(last - 1)["duels"]:
            raise OracleError(
                f"the oracle {self.oracle.id} gave no usable verdict in {most} batches in a row; nothing was charged "
                "for them. Look at its log (failures are in the ledger), then `rayalign resume`."
            )
        self.warning = (
            f"stopped early at {self.ledger.spent} of {self.config.loop.budget} labels: the agent asked for none in "
            f"{most} batches in a row, as a policy does whose samples have all become the same text."
        )
        log.warning(self.warning)
        return True

    # ==== a late oracle =========================================================================================
    def _ask_after(self) -> None:
        """Every second, in a thread of its own: are there answers by now? They go on as in `collect`."""
        try:
            last = time.monotonic()
            while not self._stop.wait(LATE_POLL_S) and self.failure is None:
                if self.purchaser.poll() or not self.ledger.num_outstanding:
                    last = time.monotonic()
                self.window.extend(self.ledger.num_streamed)
                if time.monotonic() - last > self.config.oracle.request_timeout_s:
                    raise WaitError(
                        f"waited {self.config.oracle.request_timeout_s:g} s (oracle.request_timeout_s) for an answer "
                        f"of the oracle {self.oracle.id}, which has {self.ledger.num_outstanding} duels. Nothing is "
                        "lost: `rayalign resume` waits on."
                    )
        except BaseException as error:
            self._fail(error)

    def _wait_for_answers(self) -> None:
        """All of the budget is on order: observe what comes, until there is something else to do."""
        self._waits = True
        while self.ledger.num_outstanding and not self.purchaser.remaining and not self._stop.is_set():
            self.window.wait_for_version(0, timeout_s=0.0)  # raises what stopped the run
            self._observe()
            time.sleep(LATE_POLL_S / 4)
        self._waits = False

    def _late_status(self) -> dict[str, Any]:
        """Whom the run waits for, how many duels they have, and where people find them."""
        if not self._late:
            return {}
        kind = oracle_kind(self.config.oracle.kind)
        address, waiting = kind.http(self.config.oracle), sum(ledger.num_outstanding for ledger in self._asked_in)
        page = f", page at {address.url}" if address else ""
        status: dict[str, Any] = {"queue": f"{waiting} duels in the queue{page}" if waiting else None}
        if self._waits:
            learning = self.window.published < self.window.streamed
            status["phase"] = f"waiting for {'the learner' if learning or not waiting else kind.who}"
        return status

    def _sync(self, newest: int | None) -> None:
        """Give the pool the newest weights, unless the agent wants it to stay where it is."""
        weights = self.window.weights
        if (
            weights is None
            or weights.version <= self.engines.version
            or (newest is not None and newest <= self.engines.version)
        ):
            return
        if newest is not None:
            assert weights.version <= newest, f"published {weights.version} has passed the agent's window, {newest}"
            save_weights(weights, self.pinned)  # a resumed round can't get them from the learner any more
            self.place.save()
        self.engines.load(weights)

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

    def _evaluate_if_due(self, clock: Stopwatch) -> None:
        """Evaluate the engines' weights if the labels behind them have passed the next mark of the schedule."""
        if self.heldout.due(self._labels_behind(self.engines.version)):
            with clock("evaluate"):
                self._evaluate()

    def _evaluate_newest_if_due(self, clock: Stopwatch) -> None:
        """The same where the agent keeps older weights in the engines: the newest take their place for a while.

        They are those that everything answered so far makes, so that equal runs evaluate equal versions.
        """
        answered = self.window.streamed
        if not self.heldout.due(self._labels_behind(answered)):
            return
        with clock("gate"):
            self._wait_for_version(answered)
        with clock("evaluate"):
            newest = self.window.weights
            if newest is None or newest.version == self.engines.version:
                return self._evaluate()
            if not self.pinned.exists():  # the run was begun by a rayalign that did not write version 0 down
                return
            kept = load_weights(self.pinned)
            self.engines.policy.sync(newest)
            self._evaluate()
            self.engines.policy.sync(kept)

    def _wants_initial(self) -> bool:
        """Whether version 0 has to be written down, to come back to it after an evaluation of a newer one."""
        if not self.config.evaluation.every or self.pinned.exists():
            return False
        return self.agent.sampling_window(0, self.config.loop.max_staleness)[1] is not None

    def _evaluate(self) -> None:
        version = self.engines.version
        record = self.heldout.evaluate(self.engines.policy, self.chooser, version, labels=self._labels_behind(version))
        self.log.evaluation(record)
        self.place.save()
        self.record = {**self.record, "win_rate": record["win_rate"], "win_rate_stderr": record["stderr"]}

    def _labels_behind(self, version: int) -> int:
        """Oracle labels that weights version `version` was trained on."""
        return self.ledger.labels_before(version)

    def _rng(self, *words: int) -> np.random.Generator:
        return stream(self.config.loop.seed, *words)

    # ==== recovery =============================================================================================
    def _recover(self) -> None:
        """Everything that a run needs and a crash takes away, from the run directory.

        Engines and oracle start while this process makes its own things; all are there before anything is bought.
        """
        config, agent = self.config, self.agent
        engines = self.engines
        engines.start()
        self.heldout = HeldOut(
            config.evaluation,
            self.world,
            engines.encoder,
            self.eval_oracle,
            self.run_dir,
            ledger=self.place.ledger("evaluation.arrow"),
            sampling=config.rollout.sampling(n=1),
            identity=config.identity,
            seed=config.loop.seed,
        )
        if config.evaluation.oracle is None:
            self._asked_in = [self.ledger, self.heldout.ledger]
        num_prompts = agent.prompts_per_batch(config.loop.batch_size)
        agent.setup(
            AgentContext(
                policy=Path(config.policy),
                seed=config.loop.seed,
                batch_size=config.loop.batch_size,
                device=config.loop.agent_device,
                sample_prompts=[engines.encoder.encode(self.world.prompt(i)) for i in range(num_prompts)],
                scorer=engines.scorer,
            )
        )
        engines.wait_until_started()
        self.purchaser = Purchaser(
            self.ledger,
            self.oracle,
            mode=config.oracle.labels,
            seed=config.loop.seed,
            budget=config.loop.budget,
            late=getattr(self.oracle, "late", False),
            shared=SharedBudget(config.loop.shared_budget, self.run_dir) if config.loop.shared_budget else None,
        )
        with self.lock:
            self.purchaser.recover()
        self._observed = load_agent(agent, self.run_dir, most=self.ledger.num_streamed)
        self.window.extend(self.ledger.num_streamed)
        self._observe()
        done = self.ledger.num_collected
        if self.pinned.exists():
            self.engines.load(load_weights(self.pinned))

        bandit = DuelingBanditVector(self.world, num_envs=num_prompts, labeler=self.purchaser)
        self.env = LabelBudgetVector(bandit, budget=config.loop.budget, spent=self.ledger.spent)
        _, info = self.env.reset(seed=config.loop.seed, options={"index": done * num_prompts})
        self.table = info["prompts"]
        if self.engines.version == 0:
            self.heldout.prepare(engines.policy)
            self.place.save()

    # ==== what the learner and the driver ask, from other threads ==============================================
    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish | None:
        """See `learner.stream.BatchSource`; None instead of an error when nothing came within `timeout_s`."""
        self._learner_at = index
        if index > self.window.published or (index == 0 and self._wants_initial()):
            return PleasePublish()
        there = self.window.wait_for_batch(index, timeout_s)
        if not there:
            return EndOfStream() if there is False else None
        return self.batches[index]

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """See `learner.stream.BatchSource`."""
        if weights.version == 0:
            save_weights(weights, self.pinned)
            self.place.save()
        self.window.publish(weights)
        batch = weights.version - 1
        if batch < 0:
            return
        self._learner_record = {f"learner/{name}": value for name, value in metrics.items()}
        self.log.metrics({"batch": batch, **self._learner_record})
        for stage, start, end in spans:
            self.log.timeline("learner", stage, batch, start, end)

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
            "collected": self.ledger.num_collected,
            "streamed": self.window.streamed,
            "published": self.window.published,
            **self._late_status(),
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

    def save(self) -> None:
        """See `storage.Place`: what the learner's last words were is in it."""
        self.place.save()

    def close(self) -> None:
        """Stop the engines and close the files. Nothing that was bought is lost by not calling it."""
        self._stop.set()
        self.engines.close()
        self.log.close()
