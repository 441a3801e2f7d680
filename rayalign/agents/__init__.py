"""Agents: ways of spending labels. To add one, write its file and its line in `AGENTS`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rayalign.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rayalign.agents.agent import Agent

AGENTS: dict[str, type[Agent] | str] = {
    "active_dpo": "rayalign.agents.active_dpo:ActiveDPO",
    "ae_borda": "rayalign.agents.ae_borda:AEBorda",
    "ae_borda_dpo": "rayalign.agents.ae_borda_dpo:AEBordaDPO",
    "ae_dpo": "rayalign.agents.ae_dpo:AEDPO",
    "apl": "rayalign.agents.apl:APL",
    "aplp": "rayalign.agents.aplp:APLP",
    "apo": "rayalign.agents.apo:APO",
    "delta_ucb": "rayalign.agents.dts:DeltaUCB",
    "drts": "rayalign.agents.dts:DRTS",
    "dts": "rayalign.agents.dts:DTS",
    "passive": "rayalign.agents.passive:Passive",
    "random": "rayalign.agents.pair_pool:Random",
    "sea": "rayalign.agents.sea:SEA",
    "selm": "rayalign.agents.selm:SELM",
    "us_dpo": "rayalign.agents.us_dpo:USDPO",
    "xpo": "rayalign.agents.xpo:XPO",
}
"""Name -> class, or where to import it from (`module:Class`), so that listing agents imports none of them."""


def list_agents() -> list[str]:
    """Registered names, sorted."""
    return sorted(AGENTS)


def agent_class(name: str) -> type[Agent]:
    """The class of a registered name or of an import path `module:Class`. `ConfigError` if there is none."""
    from rayalign.agents.agent import Agent

    found = AGENTS.get(name, name)
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        if not attribute:
            raise ConfigError(f"agent={name!r} is not registered. {did_you_mean(name, AGENTS)}")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"agent={name!r} can't be imported: {error}. Write it as 'package.module:Class'."
            ) from error
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ConfigError(f"agent={name!r} is {found!r}, not a subclass of rayalign.agents.agent.Agent.")
    return found


def make_agent(agent: str | type[Agent] | Agent, **settings: Any) -> Agent:
    """An agent by name, import path, class or example, with its settings changed.

    Settings are the fields of its config: nested (`posterior={"members": 5}`) or dotted
    (`**{"posterior.members": 5}`), without the prefix `agent.`.

    >>> make_agent("passive", beta=0.2).config.beta
    0.2
    """
    from rayalign.agents.agent import Agent
    from rayalign.config import apply

    if isinstance(agent, Agent):
        return type(agent)(apply(agent.config, settings)) if settings else agent
    kind = agent_class(agent) if isinstance(agent, str) else agent
    return kind(apply(kind.Config(), settings))
