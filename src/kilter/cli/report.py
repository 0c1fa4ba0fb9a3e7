"""`kilter report RUN`: write report.html and card.md from a run's files, and print the main figures."""

from __future__ import annotations

from pathlib import Path

from kilter.errors import ConfigError

HELP = """usage: kilter report RUN

Write RUN/report.html and RUN/card.md from the run's files and print the main figures. Nothing is trained or sampled.

example:
  kilter report runs/demo"""


def run(command: str, argv: list[str]) -> int:
    """Write the report and print a summary."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if len(argv) > 1 or argv[0].startswith("-"):
        raise ConfigError(f"kilter {command}: takes one run directory and no options, got {' '.join(argv)}")
    from rich.console import Console

    from kilter.report import terminal_summary, write_report

    page = write_report(Path(argv[0]))
    Console().print(terminal_summary(Path(argv[0])))
    print(page)
    return 0
