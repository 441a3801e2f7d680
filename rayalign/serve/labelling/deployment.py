"""The labelling page under Ray Serve: the oracle's only replica, which answers HTTP requests beside the handle's."""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.applications import Starlette

from rayalign.serve.deployment import OracleDeployment
from rayalign.serve.labelling.app import build_app
from rayalign.serve.labelling.oracle import HumanOracle


class _LabellingDeployment(OracleDeployment):
    """`judge` through the handle waits in the worker thread, while people answer over HTTP in the event loop."""

    def __serve_build_asgi_app__(self) -> Starlette:
        assert isinstance(self.oracle, HumanOracle)
        limit = self.config.human.max_requests
        return build_app(self.oracle.queue, self.oracle.tokens, self.oracle.guidelines, max_requests=limit)


LabellingDeployment: Any = serve.ingress()(_LabellingDeployment)
