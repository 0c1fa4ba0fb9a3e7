"""What the docstrings and signatures of the rules say, as text: docs/rewards.md.

A rule's docstring is a sentence, a formula (indented), notes (any number of paragraphs, perhaps none), and its value at
a known point, each a paragraph.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import yaml

from kilter.config import Model
from kilter.scorers.registry import RULES
from kilter.scorers.sheet import Entry, Sheet, load_rules

EXAMPLE = r"""rules:
  - {rule: number, find: marker, key: answer}             # 1 where the number after #### is the prompt's answer
  - {rule: length, longest: 120, ramp: 60, weight: 0.2}   # falls from 0.2 to 0 between 120 and 180 words
  - rule: style
    weight: 0.5
    guide:
      - {name: no apology, banned: I'm sorry, weight: 2}
      - {name: says so, wanted_regex: '(?i)\btherefore\b'}
  - {rule: ending, weight: 0.1}
at_most: 1.5
"""
HEAD = """# Rule rewards

Made from the code by `kilter.scorers.catalogue.markdown()`; a test holds this page to it. `reward: rules.yaml` in a
stage of kind `rl`, `online`, `best_of_n` or `eval` (`kilter rl --reward rules.yaml`) pays by a sheet of rules instead
of a reward model; `kilter.scorers.load_rules` reads one in Python. A wrong sheet is refused with its file and entry
before any work starts.

```yaml
{example}```

The sum is `capped(sum of weight * capped(value))`; this sheet gives {low:g} to {high:g}. Every rule gives a value in
[0, 1]; a function or a reward model gives what it gives, and `at_least` and `at_most` bound it. A score's `parts` are
the summands by the entries' names, and what a rule found as `name/part`; its `reason` says what failed.

**Truth.** A verifier (`exact`, `number`) compares with the `truth` of the prompt: a mapping in the prompts' file,
`{{"prompt": "2 + 3?", "truth": {{"answer": "5"}}}}`, of which `key` names the entry; one value instead of a
mapping is its `answer`. Demonstrations that are read as prompts (GSM8K's file as it is) have their own answer as
`answer`. Functions find it as `sample.truth`.

**Unscored is not 0.** A prompt without a reference, or a text too long for a pattern, is unscored, and so is the sum:
the answer is left out of training and counted (`rollout/unscored`). `unscored: 0` in an entry makes it count as 0,
`unscored: skip` leaves the entry out.

**The check on held-out pairs.** With `pairs:` a sheet must prefer the better answer like any other reward, or training
is refused. Pairs carry no truth, so a verifier is told that of the stage's own `prompts` where a pair answers one of
them; other pairs are left out, and when none remains the run is refused: leave `pairs` away for a sheet that verifies.
Without `pairs:` nothing is checked, and the run says so.
"""


class Words(NamedTuple):
    """A rule in words."""

    summary: str
    formula: str
    notes: str
    known: str


def entry(name: str) -> Words:
    """The docstring of a rule by its parts. Raises ValueError when one is missing."""
    parts = (inspect.getdoc(RULES[name].fn) or "").split("\n\n")
    if len(parts) < 3 or "value" not in parts[1] or not parts[1].startswith("    "):
        raise ValueError(f"rule {name!r}: its docstring needs a sentence, a formula, and its value at a known point")
    return Words(_line(parts[0]), inspect.cleandoc(parts[1]), _line(" ".join(parts[2:-1])), _line(parts[-1]))


def _line(text: str) -> str:
    return " ".join(text.split())


def options(model: type[Model]) -> list[str]:
    """One line for each option: default, what it is, what it may be."""
    lines = []
    for name, field in model.model_fields.items():
        default = "" if field.is_required() else f" = {_shown(field.get_default(call_default_factory=True))}"
        # Limits as pydantic holds them; a pattern of letters is said by the description.
        limits = [
            f"{sign} {value:g}"
            for limit in field.metadata
            for sign, at in ((">=", "ge"), (">", "gt"))
            if (value := getattr(limit, at, None)) is not None
        ]
        choices = re.findall(r"'([^']+)'", str(field.annotation)) if "Literal" in str(field.annotation) else []
        may = [f"one of {', '.join(choices)}"] if len(choices) > 1 else limits
        required = ["required"] if field.is_required() else []
        text = _line(field.description or "").rstrip(".")
        lines.append(f"- `{name}{default}`: {'; '.join([text, *may, *required])}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return "[]" if not value else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def markdown() -> str:
    """docs/rewards.md."""
    low, high = load_rules(yaml.safe_load(EXAMPLE)).range
    lines = [HEAD.format(example=EXAMPLE, low=low, high=high), "## Keys of an entry, and of the sheet", ""]
    lines += [*options(Entry), "", "Of the sheet itself:", "", *options(Sheet), "", "## Rules", ""]
    lines += ["| rule | what it asks | truth |", "|---|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {entry(name).summary} | {_reads(name)} |" for name in RULES]
    for name, found in RULES.items():
        said = entry(name)
        parts = [f"## {name}", said.summary, f"```text\n{said.formula}\n```", said.notes, f"For example {said.known}"]
        lines += ["", "\n\n".join(part for part in parts if part)]
        lines += ["", *options(found.options)] if found.options.model_fields else []
    return "\n".join(lines).rstrip() + "\n"


def _reads(name: str) -> str:
    return "yes" if RULES[name].reads_truth else ""
