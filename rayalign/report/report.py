"""The report of one run, or of several side by side: PNG plots and one HTML page that needs nothing but itself.

run directories -> RunRecord -> one_run, several_runs: facts, tables, figures -> page -> report.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rayalign import storage
from rayalign.errors import DataError
from rayalign.report.one_run import one_run
from rayalign.report.page import render
from rayalign.report.several_runs import several_runs
from rayalign.runs.record import RunRecord


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write PNG plots and one HTML page about one run, or a comparison of several; returns the page's path.

    One run: `report.html` and `plots/` in its directory. Several: `comparison.html` and `comparison-plots/` in the
    directory that holds them all. `out` names another place for the page. Unfinished runs are reported as far as
    they got. Of a run in a bucket the page goes there, and the path is that of a copy. Raises `DataError` if a
    directory holds no run.
    """
    if out is not None:
        storage.local_only(out, "out")
    elif len(run_dirs) > 1:
        for run_dir in run_dirs:
            storage.local_only(run_dir, "run_dirs (without out)")
    records = [RunRecord.read(run_dir) for run_dir in run_dirs]
    if not records:
        raise DataError("There is no run to report on; name at least one run directory.")
    single, beside = len(records) == 1, out is None
    if out is None:
        common = Path(os.path.commonpath([record.path.absolute() for record in records]))
        out = records[0].path / "report.html" if single else common / "comparison.html"
    page = Path(out)
    plots = page.parent / ("plots" if single else f"{page.stem}-plots")
    render(one_run(records[0], plots) if single else several_runs(records, plots), page)
    if beside and storage.in_bucket(run_dirs[0]):
        storage.upload(run_dirs[0], page.parent, page.name, plots.name)
    return page
