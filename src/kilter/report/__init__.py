"""The report of a run: one offline page, a model card and a summary for the terminal, from the run's files alone.

What the files must hold is in `files.py`. Nothing here loads torch, and nothing needs the process that made the run.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType

from kilter.report.files import read_run
from kilter.report.page import render_both
from kilter.report.terminal import summarize
from kilter.rundir import write_text

__all__ = ["terminal_summary", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `card.md` beside the run's files and returns the page's path.

    The same files give the same bytes. What is missing is shown as not measured. Raises RunError when `run_dir` is no
    directory or cannot be written.
    """
    page, card = render_both(read_run(run_dir))
    write_text(run_dir / "report.html", page)
    write_text(run_dir / "card.md", card)
    return run_dir / "report.html"


def terminal_summary(run_dir: Path) -> RenderableType:
    """The run's main figures as something `rich` can print. Raises RunError when `run_dir` is no directory."""
    return summarize(read_run(run_dir))
