"""`loop.budget`, `test_a_label_is_...`, `rayalign/Haiku-v0` in running text become links to where they are explained.

No page has to write the link: what `site_pages` gave an id can be found by its name.
"""

from __future__ import annotations

from collections.abc import Iterator

from docutils import nodes
from site_pages import label_of
from sphinx.application import Sphinx

from rayalign.agents import agent_class, list_agents
from rayalign.env import list_envs

PAGES_OF_AGENTS = ("agents", "index")
"""Where the name of an agent is a link; elsewhere `random` may be any value of any setting."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def link_names(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Wrap each inline code that is a known name into a link to its label."""
    labels = app.env.domains.standard_domain.anonlabels
    for node in list(doctree.findall(nodes.literal)):
        if node["ids"] or not isinstance(node.parent, nodes.Element) or inside_link(node):
            continue
        for label in labels_of(node.astext(), docname):
            if label in labels:
                page, anchor = labels[label][:2]
                uri = app.builder.get_relative_uri(docname, page)
                link = nodes.reference("", "", refuri=f"{uri}#{anchor}" if anchor else uri, internal=True)
                node.replace_self(link)
                link += node
                break


def labels_of(text: str, docname: str) -> Iterator[str]:
    """Labels that explain `text`, best first."""
    name = text.partition("=")[0].strip().lower()
    if text.startswith("test_"):
        yield text
    elif text.startswith("rayalign/"):
        yield f"env-{text.removeprefix('rayalign/')}".lower()
    elif name.startswith("agent."):
        yield from (label_of(name, f"agent-{agent}") for agent in simplest_first())
    elif name.startswith("env."):
        yield from (label_of(name, f"env-{world.removeprefix('rayalign/')}") for world in list_envs())
    elif "." in name:
        yield label_of(name.replace("evaluation.oracle.", "oracle."))
    elif docname in PAGES_OF_AGENTS:
        yield f"agent-{text}"


def simplest_first() -> list[str]:
    """Agents, those that inherit least before those that change what others do."""
    return sorted(list_agents(), key=lambda name: len(agent_class(name).Config.__mro__))


def inside_link(node: nodes.Node) -> bool:
    """Whether it is part of a link, or of a heading, which is copied into tables of contents."""
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.reference | nodes.title):
            return True
        parent = parent.parent
    return False
