"""The labelling page under Ray Serve: the oracle's only replica, which answers HTTP requests beside the handle's."""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.applications import Starlette

from rayalign.errors import OracleError
from rayalign.serve.deployment import OracleDeployment
from rayalign.serve.labelling.app import build_app
from rayalign.serve.labelling.config import HumanConfig
from rayalign.serve.labelling.oracle import HumanOracle


class _LabellingDeployment(OracleDeployment):
    """`judge` through the handle waits in the worker thread, while people answer over HTTP in the event loop."""

    def __serve_build_asgi_app__(self) -> Starlette:
        assert isinstance(self.oracle, HumanOracle)
        return build_app(self.oracle.queue, self.oracle.tokens, self.oracle.guidelines)


LabellingDeployment: Any = serve.ingress()(_LabellingDeployment)


def start_serve(human: HumanConfig, **options: Any) -> None:
    """Start Serve with its HTTP proxy at `human.host` and `human.port`. Raises `OracleError` if it runs elsewhere."""
    from ray.serve.exceptions import RayServeException

    wanted = {"host": human.host, "port": human.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=wanted, **options)
        found = serve.context._get_global_client().http_config
    except RayServeException as error:
        raise OracleError(f"the labelling page can't be served at {human.host}:{human.port}: {error}") from error
    if (found.host, found.port) != (human.host, human.port) or not serve.status().proxies:
        raise OracleError(
            f"Ray Serve runs on this cluster already, and not with HTTP at {human.host}:{human.port} "
            "(oracle.human.host and oracle.human.port). Its address can't be changed while it runs: stop it "
            "(`serve shutdown`), or use another cluster."
        )
