"""The report of a run: one HTML file that needs nothing else, neither a script nor the network."""

from __future__ import annotations

import os
from pathlib import Path

from h2rec._files import replacing
from h2rec.training.report.page import render
from h2rec.training.report.run import ReportedRun, read_run

__all__ = ["ReportedRun", "read_run", "render", "write_report"]


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run directory, from its ``metrics.json``, ``config.json`` and ``metrics.csv`` files.

    Returns the path of the report. Raises ``FileNotFoundError`` without ``metrics.json`` (no model has been
    evaluated yet) and ``ValueError`` when a file of the run is not what training writes.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target
