"""`kilter losses`: the losses, what each does, and its options."""

from __future__ import annotations

import difflib

from kilter.errors import ConfigError

HELP = """usage: kilter losses [NAME ...] [--markdown]

List the losses of preferences and of reward models, or print the formula, source, use and options of those named.
--markdown prints the page docs/losses.md.

example:
  kilter losses dpo simpo
  kilter prefer --loss.name simpo --loss.beta 2 --loss.gamma 1 ..."""


def run(_command: str, argv: list[str]) -> int:
    """Print the list, the losses named, or the page."""
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    from kilter.losses import all_losses, catalogue

    if "--markdown" in argv:
        print(catalogue.markdown(), end="")
        return 0
    known = all_losses()
    for name in argv:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "kilter losses lists them"
            raise ConfigError(f"kilter losses: no loss {name!r}; {hint}")
    if argv:
        print("\n\n".join(catalogue.text(name) for name in argv))
        return 0
    for data, table in catalogue.TABLES.items():
        print(f"over {data}:")
        for name in table:
            print(f"  {name:<18} {catalogue.entry(name).summary}")
    return 0
