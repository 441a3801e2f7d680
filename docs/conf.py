"""How the site is built: `make docs`. Everything is in the repository: nothing is fetched, no web font, no tracker.

Sphinx because it reads docstrings, links names, and fails on an orphan or a dead link; MyST so that the pages are the
Markdown that is read in the repository; Furo because it is small and needs no build of its own.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from rayalign import __version__  # noqa: E402 - found through the line above

project = "rayalign"
author = "the authors of rayalign"
copyright = author
version = release = __version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "docstrings", "site_pages", "name_links"]
exclude_patterns = ["_build", "results/*_notes.md"]  # notes are part of the page that the benchmark writes
source_suffix = {".md": "markdown"}

# -- Markdown: what GitHub reads, and definition lists, targets for links and ids in tables
myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3
highlight_language = "text"

# -- docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
toc_object_entries = False  # the API page's would be longer than the screen
default_role = "code"  # docstrings write `name` as Markdown does
python_use_unqualified_type_names = True

# -- the look
html_theme = "furo"
html_title = "rayalign"
html_static_path = ["_static"]
html_css_files = ["site.css"]
