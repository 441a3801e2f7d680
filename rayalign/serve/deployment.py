"""The oracle as a Ray Serve application: one deployment whose replicas judge lists of duels.

    caller: judge(columns) --+
    caller: judge(columns) --+-> serve.batch gathers calls for `batch_wait_s`
    caller: judge(columns) --+        |
                                      v  one at a time per replica; what arrives meanwhile is judged together next
                             journal: already answered? -> the paid answer, again
                                      | the rest, `max_batch_size` duels in one go
                             claims: another replica is asking right now? -> its answer, when it is there
                                      | nobody is
                             oracle.judge -> checked -> journal, fsync -> back to each caller

A late oracle (people) is polled instead: the same way, but with nothing gathered and nobody waiting.
A failure is not journalled: it is not charged, and asking again may succeed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray import serve

from rayalign import storage
from rayalign.env.labels import LateOracle, Oracle
from rayalign.errors import ConfigError, OracleError, RayalignError, UnfinishedError, WaitError
from rayalign.serve.config import OracleConfig
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.kinds import import_attribute, oracle_kind
from rayalign.serve.wire import DuelColumns, VerdictColumns
from rayalign.system.claims import Claims
from rayalign.types import Duel, Verdict

CALLS_GATHERED = 64
"""Calls that end the waiting for more."""
CALLS_AT_ONCE = 64 * CALLS_GATHERED
"""Calls a replica holds, waiting or running; more wait at their callers."""
WAIT_FOR_OTHERS_S = 0.02
"""Between two looks at what another replica, which is asking about the same duels, has answered."""
AUTOSCALING = {"upscale_delay_s": 5.0, "downscale_delay_s": 60.0}
"""Seconds that calls are too many, or too few, before the number of replicas follows. Serve counts every 10 s."""
OVER_HTTP = "rayalign.serve.http.deployment:HttpDeployment"
"""The deployment of an oracle that other programs ask, too."""
BROKEN_AFTER = 3
"""Unexpected errors in a row (not `OracleError`s) after which a replica reports itself unhealthy."""


class OracleDeployment:
    """One replica. Everything that blocks runs in its only worker thread, so an oracle needs no locks."""

    def __init__(self, config: OracleConfig, factory: Callable[[], Oracle], journal_dir: str | None) -> None:
        try:
            self.oracle = factory()
            self.oracle_id = self.oracle.id
        except RayalignError:
            raise
        except Exception as error:
            raise OracleError(f"the oracle could not be made: {type(error).__name__}: {error}") from error
        if config.most_replicas > 1 and hasattr(self.oracle, "poll") and not getattr(self.oracle, "shared", False):
            raise ConfigError(
                f"oracle.num_replicas={config.num_replicas} (max_replicas={config.max_replicas}): {self.oracle_id} "
                "answers late, and two replicas of it would each ask about the same duels. Set oracle.num_replicas=1 "
                "and oracle.max_replicas=0; an oracle that asks elsewhere, by the duels' ids, may say `shared = True`."
            )
        self.config = config
        if journal_dir is not None:
            _keep(self.oracle, journal_dir)
        self.journal = None if journal_dir is None else storage.open_journal(journal_dir)
        self.claims = None if journal_dir is None else Claims(storage.scratch_of(journal_dir))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="oracle")
        self._waiting: list[tuple[DuelColumns, asyncio.Future[VerdictColumns]]] = []
        self._busy = asyncio.Lock()
        self._answering: asyncio.Future[None] | None = None
        self._unexpected = 0
        self._gather.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    # -- called through the handle ------------------------------------------------------------------------------
    async def judge(self, call: DuelColumns) -> VerdictColumns:
        """One verdict per duel, in order."""
        if len(call) >= self.config.max_batch_size or self.config.batch_wait_s == 0:
            return await self._enqueue(call)
        answer = await self._gather(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def poll(self, call: DuelColumns) -> VerdictColumns:
        """Of a late oracle: verdicts on those of the duels that have one; whoever is new is taken in."""
        loop = asyncio.get_running_loop()
        answer = await asyncio.shield(loop.run_in_executor(self._worker, self._poll_call, call))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def describe(self) -> tuple[str, bool]:
        """The oracle's id, and whether it is a late one: it is polled then, and nobody waits in `judge`."""
        return self.oracle_id, hasattr(self.oracle, "poll")

    async def check_health(self) -> None:
        """Serve calls it every `health_check_period_s` and replaces a replica that raises three times in a row."""
        if self._unexpected >= BROKEN_AFTER:
            raise OracleError(f"oracle {self.oracle_id} broke {self._unexpected} times in a row.")
        check = getattr(self.oracle, "check_health", None)
        if check is not None:
            check()

    # -- batching -------------------------------------------------------------------------------------------------
    @serve.batch(max_batch_size=CALLS_GATHERED, max_concurrent_batches=CALLS_AT_ONCE // CALLS_GATHERED)
    async def _gather(self, calls: list[DuelColumns]) -> list[VerdictColumns | BaseException]:
        return await asyncio.gather(*map(self._enqueue, calls), return_exceptions=True)

    async def _enqueue(self, call: DuelColumns) -> VerdictColumns:
        """Whoever gets the lock judges for everybody who waits: batches grow while the oracle is busy."""
        answer: asyncio.Future[VerdictColumns] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        async with self._busy:
            if self._waiting:
                waiting, self._waiting = self._waiting, []
                # A task of its own: who gives up takes nobody's answer along.
                self._answering = asyncio.ensure_future(self._answer(waiting))
                await asyncio.shield(self._answering)
        return await answer

    async def _answer(self, waiting: Sequence[tuple[DuelColumns, asyncio.Future[VerdictColumns]]]) -> None:
        loop = asyncio.get_running_loop()
        # Shielded: a caller that gives up does not cancel what others wait for, nor the journal of what was paid.
        answers = await asyncio.shield(loop.run_in_executor(self._worker, self._judge_calls, [c for c, _ in waiting]))
        for (_, future), answer in zip(waiting, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    # -- in the worker thread -------------------------------------------------------------------------------------
    def _judge_calls(self, calls: Sequence[DuelColumns]) -> list[VerdictColumns | Exception]:
        """An answer or an error per call; if judging all together fails, each call stands for itself."""
        duels = [call.unpack() for call in calls]
        try:
            verdicts = self._verdicts([duel for group in duels for duel in group])
        except Exception as error:
            self._unexpected = 0 if isinstance(error, OracleError) else self._unexpected + 1
            if len(calls) > 1:
                return [answer for call in calls for answer in self._judge_calls([call])]
            return [error if isinstance(error, RayalignError) else self._broken(error)]
        self._unexpected = 0
        return [VerdictColumns.pack([verdicts[duel.id] for duel in group]) for group in duels]

    def _verdicts(self, duels: Sequence[Duel]) -> Mapping[str, Verdict]:
        """By duel id: what was already paid for, and the oracle's answers, which are on disk before they are told."""
        unique = {duel.id: duel for duel in duels}
        known = self._answered(list(unique))
        rest = [duel for id_, duel in unique.items() if id_ not in known]
        give_up = time.monotonic() + self.config.request_timeout_s
        while rest:
            go, rest = rest[: self.config.max_batch_size], rest[self.config.max_batch_size :]
            new, elsewhere = self._asked_here(go)
            known |= new
            if new:
                give_up = time.monotonic() + self.config.request_timeout_s
            if elsewhere:
                if not new:
                    self._wait_for_others(elsewhere, give_up)
                known |= self._answered([duel.id for duel in elsewhere])
                rest += [duel for duel in elsewhere if duel.id not in known]
        return known

    def _asked_here(self, go: Sequence[Duel]) -> tuple[dict[str, Verdict], list[Duel]]:
        """Verdicts on those of the duels that nobody else is asking about now, and the duels that somebody is."""
        if self.claims is None:
            return self._ask(go), []
        mine = set(self.claims.claim(duel.id for duel in go))
        try:
            known = self._answered(list(mine))  # somebody may have answered, and then let go
            known |= self._ask([duel for duel in go if duel.id in mine and duel.id not in known])
        finally:
            self.claims.release(mine)
        return known, [duel for duel in go if duel.id not in mine]

    def _ask(self, duels: Sequence[Duel]) -> dict[str, Verdict]:
        if not duels:
            return {}
        try:
            return self._kept(duels, self.oracle.judge(duels))
        except UnfinishedError as error:
            named = {duel.id: duel for duel in duels}
            self._kept([named[verdict.duel_id] for verdict in error.answered], error.answered)
            raise

    def _kept(self, duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
        """The verdicts on `duels` by id: checked, priced, and on disk."""
        priced = [self._priced(verdict) for verdict in checked(self.oracle_id, duels, verdicts)]
        if self.journal is not None:
            self.journal.record(priced)
        return {verdict.duel_id: verdict for verdict in priced}

    def _answered(self, ids: Sequence[str]) -> dict[str, Verdict]:
        return {} if self.journal is None else dict(self.journal.lookup(ids))

    def _wait_for_others(self, duels: Sequence[Duel], until: float) -> None:
        if time.monotonic() > until:
            raise WaitError(
                f"waited {self.config.request_timeout_s:g} s (oracle.request_timeout_s) for another replica of the "
                f"oracle {self.oracle_id} that is asking about {len(duels)} of the same duels ({duels[0].id}, ...)."
            )
        time.sleep(WAIT_FOR_OTHERS_S)

    def _poll_call(self, call: DuelColumns) -> VerdictColumns | Exception:
        try:
            known = self._polled(call.unpack())
        except Exception as error:
            self._unexpected = 0 if isinstance(error, OracleError) else self._unexpected + 1
            return error if isinstance(error, RayalignError) else self._broken(error)
        self._unexpected = 0
        return VerdictColumns.pack(list(known.values()))

    def _polled(self, duels: Sequence[Duel]) -> Mapping[str, Verdict]:
        """What was answered, now or before; new answers are on disk before they are told."""
        asked = {duel.id: duel for duel in duels}
        known = self._answered(list(asked))
        rest = {name: duel for name, duel in asked.items() if name not in known}
        verdicts = cast(LateOracle, self.oracle).poll(list(rest.values())) if rest else []
        if foreign := [verdict.duel_id for verdict in verdicts if verdict.duel_id not in rest]:
            raise OracleError(f"oracle {self.oracle_id} answered duel {foreign[0]}, which nobody asked about.")
        return known | self._kept([rest[verdict.duel_id] for verdict in verdicts], verdicts)

    def _priced(self, verdict: Verdict) -> Verdict:
        if verdict.price or verdict.failure is not None or not self.config.price:
            return verdict
        return replace(verdict, price=self.config.price)

    def _broken(self, error: Exception) -> OracleError:
        return OracleError(f"oracle {self.oracle_id} raised {type(error).__name__}: {error}")


def checked(oracle_id: str, duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> Sequence[Verdict]:
    """`verdicts` if they answer `duels` in order, with probabilities in [0, 1] and prices.

    Else `OracleError` naming the duel: what was refused later would stay in the journal and be refused for ever.
    """
    if len(verdicts) != len(duels):
        raise OracleError(f"oracle {oracle_id} gave {len(verdicts)} verdicts on {len(duels)} duels: it owes one each.")
    for duel, verdict in zip(duels, verdicts, strict=True):
        if verdict.duel_id != duel.id:
            raise OracleError(f"oracle {oracle_id} answered duel {verdict.duel_id} where {duel.id} was asked.")
        p = verdict.probability
        if (p is None) == (verdict.failure is None):
            raise OracleError(f"oracle {oracle_id} has to give duel {duel.id} a probability or a failure: {verdict}.")
        if p is not None and not (math.isfinite(p) and 0 <= p <= 1):
            raise OracleError(f"oracle {oracle_id} answered {p!r} for duel {duel.id}; a probability is in [0, 1].")
        if not (math.isfinite(verdict.price) and verdict.price >= 0):
            raise OracleError(f"oracle {oracle_id} asks {verdict.price!r} for duel {duel.id}, which is not a price.")
    return verdicts


def build_app(
    config: OracleConfig,
    factory: Callable[[], Oracle],
    journal_dir: str | Path | None = None,
    service: ServiceConfig | None = None,
) -> serve.Application:
    """The Serve application of `factory`'s oracle, with replicas, autoscaling and health checks from `config`.

    With a `service` it answers other programs over HTTP, too.
    """
    options: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.max_replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": config.num_replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.target_ongoing,
                **AUTOSCALING,
            }
        }
    folder = None if journal_dir is None else storage.absolute(journal_dir)
    kind = oracle_kind(config.kind)
    path = kind.deployment if service is None else kind.served or OVER_HTTP
    deployment = serve.deployment(
        import_attribute(path, f"the deployment of oracle.kind={config.kind}"),
        name="oracle",
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "label_selector": config.nodes,
        },
        max_ongoing_requests=CALLS_AT_ONCE,
        health_check_period_s=config.health_check_period_s,
        health_check_timeout_s=max(30.0, config.health_check_period_s),
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        max_constructor_retry_count=1,  # an oracle that can't be made is an error, not something to try again
        **options,
    )
    return deployment.bind(config, factory, folder, *([] if service is None else [service]))


def _keep(oracle: Oracle, journal_dir: str) -> None:
    """Tell an oracle that keeps something where to: scores that need not be found twice, books of calls, a name.

    In a bucket one that knows of buckets keeps what must not be lost there; what others keep goes with the machine, and
    kinds that can't bear that (`needs_files`) were refused.
    """
    in_bucket = getattr(oracle, "keep_in_bucket", None)
    keep_in = getattr(oracle, "keep_in", None)
    if in_bucket is not None and storage.in_bucket(journal_dir):
        in_bucket(journal_dir)
    elif keep_in is not None:
        keep_in(storage.scratch_of(journal_dir))
