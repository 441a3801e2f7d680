"""Starting and stopping the oracle's service, and asking it.

`OracleClient` is an `Oracle` whose work happens elsewhere, and a `LateOracle` if that one is. It may be sent to any
process of the cluster.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayalign import errors, storage
from rayalign.env.labels import Oracle, judge_late
from rayalign.errors import OracleError, RayalignError, ResourceError, WaitError
from rayalign.serve.applications import (
    ServeElsewhereError,
    StartError,
    is_there,
    last_line,
    start_serve,
    start_serve_at,
    stop_application,
    wait_until_running,
)
from rayalign.serve.config import OracleConfig
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.kinds import Address, oracle_kind
from rayalign.serve.wire import DuelColumns
from rayalign.system import share
from rayalign.types import Duel, Verdict

RETRY_PAUSE_S = 0.2
"""Before the first repetition of a call; doubles with each, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 5.0


class OracleClient:
    """Asks the oracle service `app`. Picklable; safe to use from several threads, not inside an event loop.

    It may be made and sent away while the service is still starting: whoever uses it first waits for that.

    Args:
        known: the oracle's id and whether it is late, if somebody asked the service already.
    """

    def __init__(self, app: str, config: OracleConfig, known: tuple[str, bool] | None = None) -> None:
        self.app, self.config, self._known = app, config, known
        self._handle: Any = None
        self._asked: set[str] = set()
        self._free = threading.Condition()

    @property
    def id(self) -> str:
        """Names kind and version of the oracle in the ledger."""
        return self.connect()[0]

    @property
    def late(self) -> bool:
        """Whether answers may come after hours, as people's do."""
        return self.connect()[1]

    def connect(self) -> tuple[str, bool]:
        """Wait until the service answers; its oracle's id, and whether that is late.

        Raises what kept the oracle from being made (as `OracleError` if it is not an error of ours), and `WaitError`
        after `oracle.start_timeout_s`.
        """
        from ray import serve

        if self._known is None:
            deadline = time.monotonic() + self.config.start_timeout_s
            _wait_until_running(self.app, self.config, deadline)
            described = serve.get_app_handle(self.app).describe.remote()
            self._known = described.result(timeout_s=max(1.0, deadline - time.monotonic()))
        return self._known

    def __reduce__(self) -> tuple[Any, ...]:
        return OracleClient, (self.app, self.config, self._known)

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel, in order.

        A call whose replica died is made again with the same ids, which the service does not charge twice. Raises
        `OracleError` if the oracle can't answer, and `WaitError` if it does not; what it had already answered is
        kept by the service and given again when asked again.
        """
        if not duels:
            return []
        if self.late:  # whoever judges is not kept waiting by who waits
            return judge_late(self, duels, self.config.request_timeout_s)
        unique = {duel.id: duel for duel in duels}
        with self._only_asker_of(set(unique)):
            verdicts = self._ask(list(unique.values()), "judge", self.config.request_timeout_s)
        return [verdicts[duel.id] for duel in duels]

    def poll(self, duels: Sequence[Duel]) -> list[Verdict]:
        """The verdicts on those of `duels` that are there, of an oracle that is `late`; waits for the service alone.

        Raises as `judge` does; a replica has `oracle.start_timeout_s` to answer, in case it has just been replaced.
        """
        if not duels:
            return []
        unique = list({duel.id: duel for duel in duels}.values())
        with self._only_asker_of({duel.id for duel in unique}):
            return list(self._ask(unique, "poll", self.config.start_timeout_s).values())

    # -- asking ---------------------------------------------------------------------------------------------------
    def _ask(self, duels: Sequence[Duel], method: str, timeout_s: float) -> dict[str, Verdict]:
        pieces = [DuelColumns.pack(piece) for piece in self._pieces(duels)]
        running = deque((piece, 0, self._send(piece, method)) for piece in pieces)
        verdicts: dict[str, Verdict] = {}
        failed: RayalignError | None = None
        while running:
            piece, attempt, response = running.popleft()
            try:
                answer = self._result(piece, attempt, response, timeout_s)
            except RayalignError as error:
                # The other pieces are being paid for: they are waited for, so that nobody asks them a second time
                # while they run. After a timeout that would take for ever, and they are called off instead.
                failed = failed or error
                if isinstance(error, WaitError):
                    _cancel(response for _, _, response in [(piece, attempt, response), *running])
                    break
                continue
            if answer is not None:
                verdicts.update((verdict.duel_id, verdict) for verdict in answer)
            elif failed is None:
                time.sleep(min(RETRY_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
                running.appendleft((piece, attempt + 1, self._send(piece, method)))
        if failed is not None:
            raise failed
        return verdicts

    def _pieces(self, duels: Sequence[Duel]) -> Iterator[Sequence[Duel]]:
        """Even shares for all replicas, none larger than what is judged in one go."""
        share = -(-len(duels) // self.config.most_replicas)
        size = min(share, self.config.max_batch_size)
        return (duels[start : start + size] for start in range(0, len(duels), size))

    def _send(self, piece: DuelColumns, method: str) -> Any:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        if self._handle is None:
            try:
                self._handle = serve.get_app_handle(self.app)
            except RayServeException as error:
                raise OracleError(f"the oracle service {self.app!r} is not running on this cluster: {error}") from error
        return getattr(self._handle, method).remote(piece)

    def _result(self, piece: DuelColumns, attempt: int, response: Any, timeout_s: float) -> list[Verdict] | None:
        """The verdicts of a piece, or None if its replica died and the call should be made again."""
        from ray import exceptions as ray_errors
        from ray.serve import exceptions as serve_errors

        try:
            return response.result(timeout_s=timeout_s).unpack()
        except TimeoutError as error:
            setting = "start" if self.late else "request"
            raise WaitError(
                f"waited {timeout_s:g} s (oracle.{setting}_timeout_s) for the oracle {self.id} to answer about "
                f"{len(piece)} duels ({piece.ids[0]}, ...) in the Serve application {self.app!r}. "
                "It may be stuck, overloaded or without resources; what it answers later is kept for the next time."
            ) from error
        except (
            ray_errors.RayActorError,
            ray_errors.ObjectLostError,
            ray_errors.WorkerCrashedError,
            serve_errors.ReplicaUnavailableError,
        ) as error:
            if attempt < self.config.retries:
                return None
            raise OracleError(
                f"the oracle {self.id} died {attempt + 1} time{'s' if attempt else ''} on the same {len(piece)} duels "
                f"({piece.ids[0]}, ...); oracle.retries={self.config.retries}. Last: {last_line(str(error))}"
            ) from error
        except ray_errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RayalignError):
                raise cause from None
            raise OracleError(f"the oracle {self.id} failed: {type(cause).__name__}: {cause}") from error
        except (serve_errors.RayServeException, ray_errors.RayError) as error:
            message = getattr(error, "message", None) or str(error)
            raise OracleError(f"the oracle service {self.app!r} can't be reached: {message}") from error

    @contextmanager
    def _only_asker_of(self, ids: set[str]) -> Iterator[None]:
        """An id that another thread is asking waits until that thread has its answer."""
        with self._free:
            if not self._free.wait_for(lambda: self._asked.isdisjoint(ids), self.config.request_timeout_s):
                raise WaitError(
                    f"waited {self.config.request_timeout_s:g} s for another thread that asks the oracle {self.id} "
                    f"about some of the same {len(ids)} duels."
                )
            self._asked |= ids
        try:
            yield
        finally:
            with self._free:
                self._asked -= ids
                self._free.notify_all()


def start_oracle(
    config: OracleConfig,
    factory: Callable[[], Oracle],
    name: str,
    journal_dir: str | Path | None = None,
    service: ServiceConfig | None = None,
) -> OracleClient:
    """Serve the oracle that `factory` makes as application `name`, and wait until it answers.

    Args:
        factory: picklable; called once in each replica (see `rayalign.serve.oracles.oracle_factory`).
        name: of the Serve application; one that runs under the same name is replaced.
        journal_dir: where paid answers are kept, on a disk that all replicas share; None keeps none.
        service: how other programs may ask it over HTTP; None: they can't.

    Raises what the factory raises (as `OracleError` if it is not an error of ours), `ResourceError` if the cluster is
    too small, and `WaitError` after `oracle.start_timeout_s`; then nothing is left running. Needs `ray.init`.
    """
    import ray
    from ray import serve

    from rayalign.serve.deployment import build_app

    _check_fits(config, ray.cluster_resources())
    if journal_dir is not None and not storage.in_bucket(journal_dir):
        Path(journal_dir).mkdir(parents=True, exist_ok=True)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # dead replicas are dealt with here, not by the reader
    address = oracle_kind(config.kind).http(config) if service is None else service.address
    share.outside(_start_serve, address)  # Serve outlives the run, whose placement group it must not depend on
    if is_there(name):
        serve.delete(name)
    app = build_app(config, factory, journal_dir, service)
    target = serve.RunTarget(app, name=name, route_prefix=None if address is None else "/")
    client = OracleClient(name, config)
    try:
        serve.run_many([target], wait_for_applications_running=False)
        client.connect()
    except BaseException:
        stop_application(name)
        raise
    return client


def stop_oracle(name: str, *, stop_serve: bool = True) -> None:
    """Stop the application `name`, and Serve itself if nothing else runs on it; see `stop_application`."""
    stop_application(name, stop_serve=stop_serve)


def _start_serve(address: Address | None) -> None:
    """Serve itself, where it does not run yet; with HTTP at `address`. Raises `OracleError` if it runs elsewhere."""
    if address is None:
        return start_serve()
    host, port, section = address
    try:
        return start_serve_at(host, port, f" ({section}.host and {section}.port)")
    except ServeElsewhereError as error:
        raise OracleError(f"the oracle {error}") from error


def _check_fits(config: OracleConfig, cluster: dict[str, float]) -> None:
    for kind, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
        have = cluster.get(kind, 0.0)
        if config.num_replicas * each > have + 1e-9:
            raise ResourceError(
                f"oracle.num_replicas={config.num_replicas} with oracle.{kind.lower()}s_per_replica={each:g} need "
                f"{config.num_replicas * each:g} {kind}s, but the cluster has {have:g}. Lower one of the two, or add "
                "nodes."
            )


def _wait_until_running(name: str, config: OracleConfig, deadline: float) -> None:
    try:
        wait_until_running(name, deadline)
    except StartError as error:
        raise _start_error(str(error)) from None
    except TimeoutError as error:
        raise WaitError(
            f"waited {config.start_timeout_s:g} s (oracle.start_timeout_s) for the oracle service {name!r} to start. "
            f"Its status: {error}"
        ) from None


def _start_error(status: str) -> RayalignError:
    """The exception that is at the end of the traceback in a deployment's status."""
    found = re.findall(r"^(?:\w+\.)*(\w+): (.*)$", status, flags=re.MULTILINE)
    name, message = found[-1] if found else ("", last_line(status))
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, RayalignError):
        return kind(message)
    return OracleError(f"the oracle did not start: {name}: {message}")


def _cancel(responses: Any) -> None:
    for response in responses:
        response.cancel()
