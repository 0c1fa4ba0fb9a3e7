"""`kilter doctor MODEL [DATA]`: is my set-up right? Each check with its verdict and remedy."""

from __future__ import annotations

from kilter.errors import ConfigError

HELP = """usage: kilter doctor MODEL [DATA]

Check a model, and how a data file looks to it, as a run would at its start: template, end of turn, BOS, scored tokens,
dropout, packing against the untouched model, log-probs and gradients, the signs of reward and KL, memory, this machine.
Exit code 1 when a check fails.

example:
  kilter doctor runs/sft/stages/01-sft/result pairs.jsonl"""


def run(command: str, argv: list[str]) -> int:
    """Print one line a check."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if len(argv) > 2 or any(word.startswith("-") for word in argv):
        raise ConfigError(f"kilter {command}: takes a model and at most one data file, got {' '.join(argv)}")
    from kilter.stages.doctor import examine

    verdicts = examine(argv[0], argv[1] if len(argv) > 1 else None)
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in verdicts:
        print(f"{'ok  ' if verdict.passed else 'FAIL'}  {verdict.name:<{width}}  {verdict.value}; rule: {verdict.rule}")
        if not verdict.passed:
            print(f"      remedy: {verdict.remedy}")
    failed = sum(not verdict.passed for verdict in verdicts)
    print(f"{len(verdicts)} checks, {failed} failed")
    return 1 if failed else 0
