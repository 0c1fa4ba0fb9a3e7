"""What the docstrings and signatures of the losses say, as text: `kilter losses` and docs/losses.md.

A docstring is a sentence, a formula (indented), the source with its departures, when to use it, and what it returns
with its value at a known point, each a paragraph.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

from kilter.losses.registry import (
    PAIR_LOSSES,
    RANKED_LOSSES,
    REWARD_LOSSES,
    UNPAIRED_LOSSES,
    PreferenceLoss,
    Range,
    all_losses,
)

TABLES = {
    "pairs and rankings": PAIR_LOSSES,
    "whole rankings": RANKED_LOSSES,
    "thumbs": UNPAIRED_LOSSES,
    "rewards": REWARD_LOSSES,
}
HEAD = """# Losses

Made from the code by `kilter losses --markdown`; a test holds this page to it. Each is one function of log-probs in
`src/kilter/losses`, checked against arithmetic written out by hand, a re-derivation in plain Python, finite differences
in float64 and, where it has the loss, TRL 1.16.0. `kilter prefer --loss.name NAME --loss.OPTION VALUE`; several with
weights under `mix:` in a recipe. Those over rewards train reward models: `kilter reward --loss.name NAME`.

Log-probs are sums over a response's scored tokens, means where the table says so; |y| is the number of them. A ranking
gives all its pairs to a pair loss; a tied pair counts half in each direction. A loss is a mean over the whole step's
pairs, prompts or tokens of chosen responses, whatever the micro-batches, the packing and the number of processes.
"""


class Entry(NamedTuple):
    """A loss in words."""

    summary: str
    formula: str
    source: str
    use: str
    returns: str


def entry(name: str) -> Entry:
    """The docstring of a registered loss by its parts. Raises ValueError when one is missing."""
    text = inspect.getdoc(all_losses()[name].fn) or ""
    parts = text.split("\n\n")
    if len(parts) != 5 or not parts[1].startswith("    ") or not parts[4].startswith("Returns:\n"):
        raise ValueError(f"loss {name!r}: its docstring needs a sentence, a formula, a source, a use, what it returns")
    summary, formula, source, use, returns = parts
    return Entry(
        _line(summary), inspect.cleandoc(formula), _line(source), _line(use), _line(returns.removeprefix("Returns:\n"))
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def options(loss: PreferenceLoss) -> list[str]:
    """One line for each option: default, what it is, what it may be, what is usual."""
    lines = []
    for name, allowed in loss.ranges.items():
        default = loss.defaults[name]
        if not isinstance(allowed, Range):
            lines.append(f"{name} = {default}: one of {', '.join(allowed)}")
            continue
        low, high = allowed.usual
        lines.append(f"{name} = {default:g}: {allowed.what}; {allowed}, usual {low:g} to {high:g}")
    return lines


def needs(loss: PreferenceLoss) -> str:
    """What it reads, and what it is a mean over."""
    per = f"per {loss.unit.removesuffix('s').replace('_', ' ')}"
    if "rewards" in loss.inputs:
        beside = [name for name in loss.inputs if name not in ("rewards", "group", "rank")]
        return f"{' and '.join(['rewards', *beside])}; {per}"
    reads = "mean log-probs" if loss.length_normalized else "summed log-probs"
    models = "policy and reference" if loss.needs_reference else "policy alone"
    return f"{reads} of {models}; {per}"


def text(name: str) -> str:
    """All of one loss for a terminal."""
    found, loss = entry(name), all_losses()[name]
    parts = [f"{name}: {found.summary}", _indented(found.formula), found.source, found.use, f"Reads {needs(loss)}."]
    parts += ["\n".join(options(loss))] if loss.ranges else []
    return "\n\n".join([*parts, found.returns])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def markdown() -> str:
    """docs/losses.md."""
    lines = [HEAD, "| loss | data | what it does | when |", "|---|---|---|---|"]
    every = [(data, name, entry(name).summary) for data, table in TABLES.items() for name in table]
    for data, name, summary in every:
        use = entry(name).use.removeprefix("Use it ").split(";")[0].rstrip(".")
        lines.append(f"| [`{name}`](#{name}) | {data} | {summary} | {use} |")
    for _, name, summary in every:
        found, loss = entry(name), all_losses()[name]
        parts = [f"## {name}", summary, f"```text\n{found.formula}\n```", found.source, found.use]
        lines += ["", "\n\n".join([*parts, f"Reads {needs(loss)}. Returns {found.returns}"])]
        lines += ["", *(f"- `{option.partition(':')[0]}`:{option.partition(':')[2]}" for option in options(loss))]
    return "\n".join(lines).rstrip() + "\n"
