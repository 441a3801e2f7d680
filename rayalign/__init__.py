"""rayalign: the most aligned language model out of a fixed number of preference labels.

Importing this module starts nothing and loads neither torch nor Ray; the names below do so when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayalign.after.export import export
    from rayalign.after.replay import replay
    from rayalign.after.serving import serve_oracle, serve_policy
    from rayalign.agents import list_agents
    from rayalign.env import list_envs
    from rayalign.loop.loop import resume, run
    from rayalign.runs.result import Result
    from rayalign.serve.http.ask import ask_oracle
    from rayalign.studies.comparison import Comparison
    from rayalign.studies.tune import trainable

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "Result",
    "ask_oracle",
    "compare",
    "export",
    "list_agents",
    "list_envs",
    "replay",
    "resume",
    "run",
    "serve_oracle",
    "serve_policy",
    "trainable",
]

_HOMES = {
    "run": "rayalign.loop.loop",
    "resume": "rayalign.loop.loop",
    "replay": "rayalign.after.replay",
    "export": "rayalign.after.export",
    "ask_oracle": "rayalign.serve.http.ask",
    "serve_oracle": "rayalign.after.serving",
    "serve_policy": "rayalign.after.serving",
    "Result": "rayalign.runs.result",
    "compare": "rayalign.studies.comparison",
    "Comparison": "rayalign.studies.comparison",
    "trainable": "rayalign.studies.tune",
    "list_agents": "rayalign.agents",
    "list_envs": "rayalign.env",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rayalign' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
