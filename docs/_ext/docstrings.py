"""What autodoc reads: `Args:` becomes fields, what is drawn with spaces stays as it is, a dataclass has no signature.

Sphinx's own napoleon is used for the first, but not as an extension: it would cut the docstring of a field at its first
colon.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", without_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace the lines of a docstring, in place."""
    lines[:] = as_drawn(lines)
    if what in ("function", "method", "class"):
        lines[:] = GoogleDocstring(lines, Config(napoleon_use_rtype=False), app, what, name, obj, options).lines()


def without_fields(app: Sphinx, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """A dataclass lists its fields below, each with its meaning."""
    return ("", "") if what == "class" and dataclasses.is_dataclass(obj) else None


def as_drawn(lines: list[str]) -> list[str]:
    """Paragraphs that are indented, or have columns, as literal blocks.

    >>> as_drawn(["Head.", "", "a    first", "b    second"])
    ['Head.', '', '::', '', '    a    first', '    b    second', '']
    """
    out: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        block = paragraph.strip("\n").split("\n")
        drawn = all(line.startswith("    ") for line in block) or any(re.search(r"\S {3,}\S", line) for line in block)
        if drawn and ">>>" not in paragraph:
            indent = "" if block[0].startswith("    ") else "    "
            out += ["::", "", *(indent + line for line in block), ""]
        else:
            out += [*block, ""]
    return out if out[-1:] != ["", ""] else out[:-1]
