"""The command line. Help texts of settings come from the configs' own docstrings.

    rayalign run tuned_examples/sea_tinyworld.py --set agent.num_candidates=10
    rayalign resume RUN_DIR        rayalign report RUN_DIR [RUN_DIR ...]
    rayalign compare --agents passive,sea,apl --seeds 5 --budget 2000
    rayalign replay LEDGER|RUN_DIR --agent NAME          rayalign export RUN_DIR --out DIR
    rayalign estimate sea --budget 2000 --calibrate
    rayalign serve RUN_DIR --port 8000                   rayalign evaluate RUN_DIR --format mt_bench ...
    rayalign oracle reward_model --target MODEL --port 8710
    rayalign agents [NAME]         rayalign envs [ID]         rayalign settings [SECTION]

A mistake in the input is one line and exit code 2; a traceback is a mistake of ours. A command is a function in one of
the modules imported here, which add it to `app`.
"""

from __future__ import annotations

from rayalign.cli import after, lists, oracle, runs, search  # noqa: F401 - adds the commands
from rayalign.cli.app import app
from rayalign.cli.runs import run_example
from rayalign.cli.search import show_table
from rayalign.example import SHORT_NAMES, load_example

__all__ = ["SHORT_NAMES", "app", "load_example", "main", "run_example", "show_table"]


def main() -> None:
    """Entry point of the `rayalign` command."""
    app()
