"""`kilter report RUN`: write report.html and card.md from a run's files, and print the main figures.

`kilter report why RUN` says what the run showed that should not be, and what the likely causes are."""

from __future__ import annotations

from pathlib import Path

from kilter.errors import ConfigError

HELP = """usage: kilter report RUN
       kilter report why RUN

Write RUN/report.html and RUN/card.md from the run's files and print the main figures. Nothing is trained or sampled.
With `why`: say in plain words which symptoms each stage that sampled showed (docs/guard.md), since which rollout, their
likely causes, and what to try; which numbers of the recipe its figures speak against; which rows a step came from whose
gradient jumped.

examples:
  kilter report runs/demo
  kilter report why runs/demo"""


def run(command: str, argv: list[str]) -> int:
    """Write the report and print a summary, or say why the run went as it did."""
    asked = argv[:1] == ["why"]
    argv = argv[1:] if asked else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if len(argv) > 1 or argv[0].startswith("-"):
        raise ConfigError(f"kilter {command}: takes one run directory and no options, got {' '.join(argv)}")
    if asked:
        from kilter.guard import in_words, why

        print(in_words(why(Path(argv[0]))))
        return 0
    from rich.console import Console

    from kilter.report import terminal_summary, write_report

    page = write_report(Path(argv[0]))
    Console().print(terminal_summary(Path(argv[0])))
    print(page)
    return 0
