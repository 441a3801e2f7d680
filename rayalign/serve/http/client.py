"""The oracle that is served elsewhere: asks what `rayalign oracle` serves.

duels -> pieces -> POST /v1/verdicts -> verdicts
                   | silence, a drip, broken connection, 429, 5xx of a proxy: again, with the same ids, which are not
                   | paid twice   413: in halves        401, 404, 409, 422, 500 with words of the service's own: stop
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import secrets
import time
from collections.abc import Generator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import ValidationError

from rayalign.env.labels import Oracle, judge_late
from rayalign.env.world import World
from rayalign.errors import ConfigError, OracleError, WaitError
from rayalign.serve.config import OracleConfig
from rayalign.serve.deadline import LONGEST_IN_SILENCES, Deadlines
from rayalign.serve.endpoint import retry_after
from rayalign.serve.http.schema import Description, Problem, Reply
from rayalign.serve.http_guard import find_token
from rayalign.serve.kinds import OracleKind, check_target
from rayalign.serve.listening import is_loopback
from rayalign.storage.uri import Uri
from rayalign.types import Duel, Verdict

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
SHORT = 300
"""Most characters of the service's own words that are repeated."""


class HttpOracle:
    """The oracle at the address `config.target`. Not thread-safe.

    Raises `ConfigError` for a token that can't be one and `OracleError` if nothing answers, the token is not accepted
    or the answer is not that of a rayalign oracle: before anything is bought.
    """

    def __init__(self, config: OracleConfig) -> None:
        self.config = config
        self.url = config.target.rstrip("/")
        self.caller = config.http.caller
        self._token = find_token(config.http.token_file or None, config.http.token_env)
        parts = urlsplit(self.url)
        if self._token and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            log.warning("the token for %s travels unencrypted; put TLS in front of the service (https)", self.url)
        self._client = _client(self.url, _Bearer(self._token), config.http.timeout_s)
        self._deadlines = Deadlines(self._client.aclose)
        self.description = self._describe()
        self.id = f"http:{parts.netloc}/{self.description.oracle}"
        """`http:`, the address, and the oracle's own id."""

    def keep_in(self, folder: str | Path) -> None:
        """Ask in the name that is kept in `folder`, where the settings give none.

        Two runs of one seed name their duels alike. Each is charged for its own labels, so each has a caller's name.
        """
        self.caller = self.caller or _name_kept_in(Path(folder) / "caller")

    def keep_in_bucket(self, uri: str) -> None:
        """The same for a run in a bucket, whose name is made of where it is: nothing can lose it, and none is written.

        A run that is begun anew at the same place is the same caller: what was answered to the same duel is not paid
        again.
        """
        place = Uri.parse(uri).root  # not how the store is reached, which may change in between
        self.caller = self.caller or hashlib.blake2b(place.encode(), digest_size=16).hexdigest()

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel. Raises `OracleError` if the service can't answer, `WaitError` if it does not."""
        verdicts = self.answered(duels)
        if len(verdicts) < len(duels):
            raise OracleError(f"{self.url} has no answer to {len(duels) - len(verdicts)} of {len(duels)} duels yet.")
        return verdicts

    def answered(self, duels: Sequence[Duel]) -> list[Verdict]:
        """The verdicts that are there, in order; all of them, unless the oracle is late. Raises as `judge`."""
        size = self.description.max_duels
        pieces = [duels[start : start + size] for start in range(0, len(duels), size)]
        return [verdict for piece in pieces for verdict in self._ask(piece)]

    # -- inside -------------------------------------------------------------------------------------------------------
    def _ask(self, duels: Sequence[Duel]) -> list[Verdict]:
        question = {
            "oracle": self.description.oracle,
            "caller": self.caller,
            "duels": [_to_wire(duel) for duel in duels],
        }
        response = self._send("POST", "/v1/verdicts", json.dumps(question).encode(), len(duels))
        if response.status_code == 413 and len(duels) > 1:
            middle = len(duels) // 2
            return [*self._ask(duels[:middle]), *self._ask(duels[middle:])]
        if response.status_code != 200:
            raise OracleError(self._why(response))
        try:
            reply = Reply.model_validate_json(response.content)
        except ValidationError:
            raise OracleError(f"{self.url} did not answer as a rayalign oracle: {self._said(response)}") from None
        ids = [verdict.id for verdict in reply.verdicts]
        if ids != [duel.id for duel in duels]:
            raise OracleError(f"{self.url} was asked about {len(duels)} duels and answered about others, {ids[:3]}.")
        return [
            Verdict(duel_id=v.id, probability=v.probability, failure=v.failure, price=v.price)
            for v in reply.verdicts
            if not v.pending
        ]

    def _describe(self) -> Description:
        response = self._send("GET", "/v1/oracle", None, 0)
        if response.status_code != 200:
            raise OracleError(self._why(response))
        try:
            return Description.model_validate_json(response.content)
        except ValidationError:
            raise OracleError(
                f"oracle.target={self.url!r} is not the address of a rayalign oracle: {self._said(response)}"
            ) from None

    def _send(self, method: str, path: str, body: bytes | None, duels: int) -> httpx.Response:
        """The response, good or bad; what may pass is tried again. Raises `WaitError`, or `OracleError` at the start.

        The body stays the same, so that whatever the service is told twice it knows to be one question.
        """
        start, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            pause = min(FIRST_PAUSE_S * 2 ** min(attempt - 1, 16), LONGEST_PAUSE_S)
            try:
                call = self._client.request(
                    method,
                    self.url + path,
                    content=body,
                    headers={"Content-Type": "application/json"},
                    follow_redirects=False,  # nobody else gets to see the token
                )
                response = self._deadlines.within(LONGEST_IN_SILENCES * self.config.http.timeout_s, call)
                if not _may_pass(response, bought=bool(duels)):
                    return response
                why = f"HTTP {response.status_code}: {self._said(response)}"
                pause = min(max(pause, retry_after(response.headers)), LONGEST_PAUSE_S)
            except (httpx.TransportError, httpx.DecodingError, TimeoutError) as error:
                over = isinstance(error, TimeoutError | httpx.TimeoutException)
                why = "Timeout" if over else f"{type(error).__name__}: {self._clean(str(error))}"
            tried = f"oracle.target={self.url} {attempt} time{'s' if attempt > 1 else ''}"
            if not duels and attempt > self.config.retries:
                raise OracleError(
                    f"asked {tried} (oracle.retries) to say who it is, in vain. Last: {why}. Nothing was bought; start "
                    "the service, or correct the address."
                )
            if duels and time.monotonic() + pause - start > self.config.http.patience_s:
                raise WaitError(
                    f"asked {tried} within oracle.http.patience_s={self.config.http.patience_s:g} to judge {duels} "
                    f"duels, in vain. Last: {why}. What it answered is kept there: resume to ask again."
                )
            time.sleep(pause * random.uniform(0.75, 1.0))

    def _why(self, response: httpx.Response) -> str:
        said = self._said(response)
        if response.status_code == 401:
            where = self.config.http.token_file or f"${self.config.http.token_env}"
            shown = (
                f"the token in {where} is not accepted" if self._token else f"it wants a token, and {where} has none"
            )
            return f"{self.url}: {shown} (oracle.http.token_env, oracle.http.token_file). Nothing was charged."
        return f"{self.url} answers HTTP {response.status_code}: {said}"

    def _said(self, response: httpx.Response) -> str:
        try:
            text = Problem.model_validate_json(response.content).error.message
        except ValidationError:
            text = response.content[: 4 * SHORT].decode("utf-8", "replace")
        return self._clean(text)

    def _clean(self, text: str) -> str:
        text = " ".join((text.replace(self._token, "***") if self._token else text).split())
        return text if len(text) <= SHORT else text[:SHORT] + "..."


class LateHttpOracle(HttpOracle):
    """The same of an oracle that takes its time, as people do: a `LateOracle`."""

    shared = True  # the service knows duels by their ids, whichever replica asks

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel, waited for. Raises as `HttpOracle.judge`, and `WaitError` where it takes too long."""
        return judge_late(self, duels, self.config.request_timeout_s)

    def poll(self, duels: Sequence[Duel]) -> list[Verdict]:
        """Hand over the duels that are new; the verdicts on those that have one."""
        return self.answered(duels)


def _client(url: str, auth: httpx.Auth, silence_s: float) -> httpx.AsyncClient:
    """A client for `url`, through the proxy that the environment names for it."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = None if _is_excepted(parts.hostname or "", parts.port) else proxies.get(parts.scheme, proxies.get("all"))
    try:
        context = httpx.create_ssl_context()  # SSL_CERT_FILE, SSL_CERT_DIR
        return httpx.AsyncClient(auth=auth, timeout=silence_s, proxy=proxy, verify=context, trust_env=False)
    except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"the oracle at {url} can't be asked as the environment has it: {error}. Look at SSL_CERT_FILE, "
            f"{parts.scheme.upper()}_PROXY, ALL_PROXY and NO_PROXY."
        ) from None


def _is_excepted(host: str, port: int | None) -> bool:
    """Whether NO_PROXY names the host, or a network that it lies in: a proxy would get to see the token."""
    if proxy_bypass(f"{host}:{port}" if port else host):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    for name in getproxies().get("no", "").split(","):
        with contextlib.suppress(ValueError):
            if address in ip_network(name.strip().strip("[]"), strict=False):
                return True
    return False


class _Bearer(httpx.Auth):
    """Shows the token; given as `auth`, so that no ~/.netrc is looked at."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Called by httpx."""
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _may_pass(response: httpx.Response, *, bought: bool) -> bool:
    """Whether asking again may help. An error in JSON is the oracle's own word, any other one a proxy's.

    A service that is being started again is not known to its proxy yet, which then says 404. Before anything was
    bought that is rather a wrong address.
    """
    status, own_word = response.status_code, response.headers.get("content-type", "").startswith("application/json")
    if status == 500 or (status == 404 and bought):
        return not own_word
    return status in (408, 425, 429, 502, 503, 504)


def _to_wire(duel: Duel) -> dict[str, Any]:
    prompt = duel.prompt
    row: dict[str, Any] = {
        "id": duel.id,
        "prompt": _sendable(prompt.text),
        "first": _sendable(duel.first.text),
        "second": _sendable(duel.second.text),
        "prompt_id": prompt.id[:200] or None,
    }
    if prompt.reference is not None:
        row["reference"] = _sendable(prompt.reference)
    data = {key: value for key, value in prompt.meta.items() if isinstance(key, str) and _is_json(value)}
    messages = data.pop("messages", None)
    if messages is not None:
        row["messages"] = [{"role": m["role"], "content": _sendable(m["content"])} for m in messages]
    return row | ({"data": data} if data else {})


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value).encode()
    except (TypeError, ValueError):
        return False
    return True


def _sendable(text: str) -> str:
    """`text`, with what is no character replaced: half a surrogate pair has no place in a request."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _name_kept_in(path: Path) -> str:
    """What the file says; the first of all replicas makes it, whole or not at all."""
    if not path.exists():
        draft = path.with_name(f"caller-{os.getpid()}-{secrets.token_hex(4)}.new")
        draft.write_text(secrets.token_hex(16), encoding="ascii")
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="ascii").strip()


# -- the kind ---------------------------------------------------------------------------------------------------------
def _check(config: OracleConfig, world: World | None) -> None:
    check_target(config)
    try:
        url = urlsplit(config.target)
        httpx.URL(config.target)
        _ = url.port
    except (ValueError, httpx.InvalidURL) as error:
        shown = "" if "@" in config.target else f"={config.target!r}"
        raise ConfigError(f"oracle.target{shown} is no address: {error}.") from None
    if "@" in url.netloc or url.query:  # may hold a secret, so it is not repeated
        raise ConfigError(
            "oracle.target must not hold credentials or a query: it is written to the run directory. Export the token "
            "in an environment variable, and name that in oracle.http.token_env."
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(f"oracle.target={config.target!r} must be like https://host or http://127.0.0.1:8710.")


def _complete(config: OracleConfig, run_dir: Path) -> OracleConfig:
    file = config.http.token_file
    http = dataclasses.replace(config.http, token_file=str(Path(file).absolute()) if file else "")
    return dataclasses.replace(config, http=http)


def _make(config: OracleConfig, world: World | None) -> Oracle:
    oracle = HttpOracle(config)
    if not oracle.description.late:
        return oracle
    if config.labels == "bernoulli" and oracle.description.oracle.startswith("human:"):
        raise ConfigError(
            f"people judge at oracle.target={oracle.url}, and labels='bernoulli' would flip a coin for every tie that "
            "they see; set oracle.labels=deterministic (evaluation.oracle.labels, if they judge the evaluation)."
        )
    return LateHttpOracle(config)


HTTP = OracleKind(make=_make, check=_check, complete=_complete, who="the oracle's service")
