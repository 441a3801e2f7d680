"""The oracle under Ray Serve with an HTTP door: each replica answers the handle's calls and HTTP requests alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve

from rayalign.env.labels import Oracle
from rayalign.errors import WaitError
from rayalign.serve.config import OracleConfig
from rayalign.serve.deployment import OracleDeployment
from rayalign.serve.http.app import build_app
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.wire import DuelColumns
from rayalign.types import Duel, Verdict


class ServedOracle(OracleDeployment):
    """What comes by HTTP is gathered, claimed and journalled like what comes through the handle."""

    def __init__(
        self, config: OracleConfig, factory: Callable[[], Oracle], journal_dir: str | None, service: ServiceConfig
    ) -> None:
        super().__init__(config, factory, journal_dir)
        self.service = service
        self.late = hasattr(self.oracle, "poll")

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._judge_duels, self.oracle_id, self.service, late=self.late)

    async def _judge_duels(self, duels: Sequence[Duel]) -> Sequence[Verdict]:
        if self.late:
            return (await self.poll(DuelColumns.pack(duels))).unpack()
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                return (await self.judge(DuelColumns.pack(duels))).unpack()
        except TimeoutError as error:
            if isinstance(error, WaitError):
                raise
            raise WaitError(
                f"waited {self.config.request_timeout_s:g} s (oracle.request_timeout_s) for the oracle "
                f"{self.oracle_id} to judge {len(duels)} duels. What it answers later is kept: ask again."
            ) from None


HttpDeployment: Any = serve.ingress()(ServedOracle)
