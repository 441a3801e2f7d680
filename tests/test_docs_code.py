"""The Python of the documents runs, and so do their `rayalign run` and `rayalign resume` commands.

The first block of the quickstart is run for real, with fewer labels. In every other block `rayalign.run` does all that
it does before Ray is started: every name, value, file and model is checked, and the placement is planned; then it
returns the result of that one run. A block that would start something else says which test does, in a comment above it:
`<!-- not run: it starts a server; test_... -->`.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import gymnasium
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import ray
from documents import PAGES, ROOT, blocks, commands
from typer.testing import CliRunner

import rayalign
import rayalign.env.prompts
import rayalign.loop.loop
import rayalign.loop.preparation
from rayalign import config as settings
from rayalign.cli import app
from rayalign.env import ENVS
from rayalign.models import SMOLLM2, resolve_policy
from rayalign.runs.resources import plan
from rayalign.runs.result import Result
from rayalign.serve.call_book import Answer, CallBook, Question

QUICKSTART = ROOT / "docs" / "quickstart.md"
FEWER = {"loop.budget": 64, "evaluation.num_prompts": 8, "evaluation.every": 0, "logging.progress": "off"}
CLUSTER = {"CPU": 128.0, "GPU": 8.0}
"""Large enough for every placement that a page shows."""
RUNS = sorted({tuple(words) for page in PAGES for words in commands(page, "rayalign") if words[0] in ("run", "resume")})
RUNS = [words for words in RUNS if not words[1].startswith("tuned_examples/recipes/")]
"""Recipes have data to download: test_every_combination_of_choices_is_a_config_with_its_agent_and_loss checks them."""
RUNS = [words for words in RUNS if not any("://" in word for word in words)]
"""Buckets need a server: test_a_run_in_a_bucket_loses_its_machine_and_no_label has one."""


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all pages: prompts are read through Ray Data, which would start one for each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """The directory of a real run: the quickstart's first block, with 64 labels instead of 2,000."""
    execute = rayalign.loop.loop.execute

    def with_fewer_labels(plan_, *args):
        plan_ = dataclasses.replace(plan_, config=settings.apply(plan_.config, FEWER))
        (Path(plan_.config.run_dir) / "config.yaml").write_text(settings.to_yaml(plan_.config))
        return execute(plan_, *args)

    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("quickstart"))
        patch.setattr(rayalign.loop.loop, "execute", with_fewer_labels)
        exec(compile(blocks(QUICKSTART, "python")[0].code, str(QUICKSTART), "exec"), names)
    assert names["result"].labels_spent == FEWER["loop.budget"]
    return names["result"].path


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A working directory with the files that pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "tuned_examples").symlink_to(ROOT / "tuned_examples")
    rows = [{"prompt": f"Name {n} rivers.", "chosen": "Ebro.", "rejected": "No."} for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "best.parquet")
    (folder / "extremes.py").write_text(blocks(ROOT / "docs" / "adding_an_agent.md", "python")[0].code)
    book = CallBook(finished / "oracle")  # as if a judge had been asked
    book.answer(book.reserve("d", 0.002), Question("judge", "d", False, 0), Answer(0.7))
    with pytest.MonkeyPatch.context() as patch:  # the same file, read once
        patch.setattr(rayalign.env.prompts, "load_prompts", functools.cache(rayalign.env.prompts.load_prompts))
        yield folder


@pytest.fixture
def checked(finished, folder, monkeypatch):
    """Runs that were planned since the test began. They end before Ray is started; `RUN_DIR` is a finished one."""
    planned = []
    run_dir = folder / "RUN_DIR"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(finished, run_dir)

    def check(plan_, *_):
        plan(plan_.config, plan_.agent, CLUSTER, plan_.set_by_user)
        planned.append(plan_)
        shutil.rmtree(folder / "runs", ignore_errors=True)  # the next one may begin, and be named, in the same second
        return result

    @functools.cache
    def hub(name, weights):  # whatever has to be downloaded is SmolLM2 here, which a package brings along
        return resolve_policy(name if Path(name).is_dir() else SMOLLM2)

    result = Result.load(run_dir)
    known = set(ENVS)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(rayalign.loop.loop, "execute", check)
    monkeypatch.setattr(rayalign.loop.preparation, "resolve_policy", hub)
    yield planned
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for env_id in set(ENVS) - known:  # a page registers one of its own
        del ENVS[env_id], gymnasium.registry[env_id]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, checked):
    names = {"rayalign": rayalign, "__name__": "page"}
    calls = 0
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.why_not_run:
            assert run_elsewhere(block.why_not_run), f"{page.name}:{block.line} names no test: {block.why_not_run}"
            continue
        calls += len(re.findall(r"\brayalign\.(?:run|resume)\(", block.code))
        exec(code, names)
    assert len(checked) == calls, "a run was shown and not planned"


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_a_run_command_that_a_page_shows_has_settings_that_pass_all_checks(words, checked):
    if any(word.endswith("...") for word in words):
        pytest.skip("a value is left to the reader")
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert len(checked) == 1 or words[0] == "resume"


def test_the_example_agent_of_the_guide_selects_the_extremes():
    import numpy as np

    from rayalign.types import Candidate, Prompt

    names: dict = {}
    exec(blocks(ROOT / "docs" / "adding_an_agent.md", "python")[0].code, names)
    agent = names["Extremes"](names["ExtremesConfig"](num_candidates=3))
    group = [Candidate(text="x" * n, token_ids=(1,) * n, logprobs=(0.0,) * n, policy_version=0) for n in (2, 3, 1)]
    (choice,) = agent.select(0, [Prompt(id="p", text="", token_ids=())], [group], np.random.default_rng(0))
    assert (choice.first, choice.second) == (1, 2)
    assert agent.proposals()[0].n == 3


def test_the_quickstart_lists_what_a_run_leaves_behind_and_nothing_else(finished):
    table = QUICKSTART.read_text(encoding="utf-8").split("## What a run leaves behind")[1]
    named = {name for name in re.findall(r"`([\w.]+)`", table) if name in os.listdir(finished) or "." in name}
    left = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert left <= set(re.findall(r"`([\w.]+)`", table)), "the table lacks something"
    no_references = {"initial_answers.json"}  # TinyWorld has references, so nothing is compared with these
    assert named <= left | no_references, "the table has what a run does not leave behind"


def run_elsewhere(why: str) -> bool:
    """Whether a comment names a test that there is."""
    name = re.search(r"test_\w+", why)
    found = ["grep", "-rqw", "--include=test_*.py", f"def {name[0]}" if name else "nothing", str(ROOT / "tests")]
    return bool(name) and subprocess.run(found, check=False).returncode == 0
