"""The users' endpoint under Ray Serve: the oracle's only replica, which answers HTTP requests beside the handle's."""

from __future__ import annotations

from typing import Any

from ray import serve

from rayalign.serve.deployment import OracleDeployment
from rayalign.serve.http_guard import HttpGuard
from rayalign.serve.users.app import build_app
from rayalign.serve.users.kind import desk_of, tokens_of


class _UsersDeployment(OracleDeployment):
    """Users are answered in the event loop; `judge` through the handle, which looks up what they chose, in a thread."""

    def __serve_build_asgi_app__(self) -> HttpGuard:
        tokens = tokens_of(self.config)
        return build_app(self.config.users, desk_of(self.config), tokens.digests() if tokens else ())


UsersDeployment: Any = serve.ingress()(_UsersDeployment)
