"""A small client for programs that have texts and want verdicts: one call, and nothing of a run around it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayalign.errors import ConfigError
from rayalign.serve.config import OracleConfig
from rayalign.serve.http.client import HTTP, HttpOracle
from rayalign.serve.http.config import HttpConfig
from rayalign.serve.http.schema import DuelIn, to_duel
from rayalign.types import Verdict


def ask_oracle(
    url: str,
    duels: Sequence[Mapping[str, Any]],
    *,
    caller: str = "",
    token_file: str | Path | None = None,
    patience_s: float = 300.0,
) -> list[Verdict | None]:
    """What the oracle that is served at `url` says of each duel; None where it takes its time: ask again.

    Args:
        url: its address, like http://127.0.0.1:8710.
        duels: each with `prompt`, `first` and `second`, and perhaps the other fields of the schema; without an `id`
            a duel is known by its texts, so that asking the same again is not paid again.
        caller: duels of different callers are never taken for one another.
        token_file: file with the token; default: the environment's RAYALIGN_ORACLE_TOKEN.
        patience_s: how long a service that brings no answer is asked again, in seconds.

    Raises `ConfigError` for duels that are none, `OracleError` if the service can't answer and `WaitError` if it does
    not.
    """
    http = HttpConfig(caller=caller, token_file=str(token_file or ""), patience_s=patience_s)
    config = OracleConfig(kind="http", target=url, http=http)
    HTTP.check(config, None)
    asked = [to_duel(_read(duel, place)) for place, duel in enumerate(duels)]
    found = {verdict.duel_id: verdict for verdict in HttpOracle(config).answered(asked)} if asked else {}
    return [found.get(duel.id) for duel in asked]


def _read(given: Mapping[str, Any], place: int) -> DuelIn:
    data = json.dumps(given.get("data"), sort_keys=True, default=repr)  # the order of its keys says nothing
    content = repr(sorted(({**given, "data": data} if "data" in given else given).items()))
    named = {"id": hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(), **given}
    try:
        return DuelIn.model_validate(named)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"duels[{place}] is no duel: {where}: {first['msg']}.") from None
