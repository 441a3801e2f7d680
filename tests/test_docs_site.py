"""The site: it builds without a warning and without a network, and has a page for everything there is."""

import doctest
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from html import unescape
from importlib import import_module
from pathlib import Path

import chromium
import pytest
from documents import ROOT
from PIL import Image

from rayalign.agents import agent_class, list_agents
from rayalign.config import describe
from rayalign.env import NUMERIC, list_envs
from rayalign.runs.config import RunConfig

DOCS = ROOT / "docs"


def build(docs: Path, out: Path) -> subprocess.CompletedProcess:
    """What `make docs` does, elsewhere; a second time it reads what is new alone."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", str(docs), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the pages: built from a copy, so that nothing generated is left in the repository."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("_build", "generated", "__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "rayalign", "tests", "tuned_examples"):
        (root / name).symlink_to(ROOT / name)
    done = build(root / "docs", root / "html")
    assert done.returncode == 0, done.stderr
    return root / "html"


def test_there_is_a_page_of_each_agent_with_its_box_and_every_setting(site):
    for name in list_agents():
        html = (site / "generated" / "agents" / f"{name}.html").read_text(encoding="utf-8")
        box = inspect.getmodule(agent_class(name)).__doc__.partition("\n\n")[2].partition("Differs from")[0]
        shown = unescape(re.sub(r"<[^>]+>", "", html))
        assert box.strip() and textwrap.dedent(box).strip("\n") in shown, f"{name}: the box is not shown as it is"
        missing = [s.name for s in describe(agent_class(name).Config) if f">agent.{s.name}<" not in html]
        assert not missing, f"{name}: {missing}"
        assert f"{name}_tinyworld.py" in html


def test_there_is_a_page_of_each_environment(site):
    for env_id in (*list_envs(), *NUMERIC):
        html = (site / "generated" / "environments" / f"{env_id.rpartition('/')[2]}.html").read_text(encoding="utf-8")
        assert env_id in html


def test_every_setting_of_a_run_is_explained_once(site):
    html = (site / "generated" / "settings.html").read_text(encoding="utf-8")
    names = re.findall(r"<tr[^>]*><td>(.*?)</td>", html, re.S)
    for setting in describe(RunConfig):
        if not setting.name.startswith(("agent.", "evaluation.oracle.")):
            assert sum(f">{setting.name}</span></code></p>" in name for name in names) == 1, setting.name


def test_a_setting_and_a_test_are_links_to_where_they_are_explained(site):
    html = (site / "reliability.html").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    tests = (site / "generated" / "tests.html").read_text(encoding="utf-8")
    for name in named:
        anchor = name.replace("_", "-")
        assert f'href="generated/tests.html#{anchor}"' in html and f'id="{anchor}"' in tests, name
    assert 'href="generated/settings.html#setting-loop-max-staleness"' in (site / "concepts.html").read_text()


def test_no_link_between_pages_is_broken(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for link in re.findall(r'<a [^>]*?href="([^"#]*)(?:#[^"]*)?"', text):
            if link and "://" not in link and not link.startswith("mailto:"):
                assert (path.parent / link).resolve().exists(), f"{path.name}: {link}"
        for link, anchor in re.findall(r'<a [^>]*?href="([^":#]*)#([^"]+)"', text):
            target = (path.parent / link).resolve() if link else path
            assert target not in ids or anchor in ids[target], f"{path.name}: {link}#{anchor}"


def test_no_page_fetches_anything_from_elsewhere(site):
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"(\w+:)?//", text)
        fetched += re.findall(r"<link[^>]+href=\"https?://", text) + re.findall(r"url\([\"']?https?:|@import", text)
        assert not fetched, path.name


def test_a_page_that_no_table_of_contents_names_and_a_link_into_nothing_fail_the_build(site):
    docs = site.parent / "docs"
    (docs / "orphan.md").write_text("# Nobody links here\nBut it links [to nothing](nothing.md).\n")
    done = build(docs, site)
    assert done.returncode != 0
    assert "orphan.md: WARNING: document isn't included in any toctree" in done.stderr
    assert "nothing.md" in done.stderr


def test_examples_in_the_site_s_own_code_give_what_they_show(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    results = [doctest.testmod(import_module(name)) for name in ("docstrings", "site_pages")]
    assert [result.failed for result in results] == [0, 0] and all(result.attempted for result in results)


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed: apt-get install chromium")
def test_the_screenshots_can_be_taken_again(tmp_path):
    command = [sys.executable, str(DOCS / "screenshots.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    taken = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert taken == {path.name: Image.open(path).size for path in (DOCS / "images").glob("*.png")}
