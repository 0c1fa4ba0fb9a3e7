"""`kilter world prompts | demonstrations | pretrain | failures`: the embedded world by hand, what goes wrong in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kilter.cli import failures
from kilter.cli.options import new_jsonl, new_path, parse
from kilter.config import Model
from kilter.errors import ConfigError

HELP = """usage: kilter world ACTION [options]

  prompts           write prompts of the world as JSONL
  demonstrations    write demonstrations of mixed quality as JSONL
  pretrain          train the base model that ships with the package again, to the same bytes
  failures          run a museum of failures: wrong rewards, what becomes of the policy, and the fix

example:
  kilter world prompts --split held_out --per-kind 20 --out prompts.jsonl"""


class PromptOptions(Model):
    """Write prompts of the embedded world."""

    split: Literal["train", "held_out"] = "train"
    """Which wordings: no wording is in both."""
    per_kind: Annotated[int, Field(gt=0)] = 20
    """Prompts of each kind."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which ones are drawn."""
    kinds: tuple[str, ...] = ()
    """Only these kinds: sum, fact, ...; none: all."""
    out: Path | None = None
    """File to write; it must not exist yet."""


class DemonstrationOptions(PromptOptions):
    """Write demonstrations of mixed quality: a stated share of good answers and of each vice."""


class PretrainOptions(Model):
    """Train the base model of the embedded world from nothing; on one machine always to the same bytes."""

    out: Path | None = None
    """Folder to write; it must not exist yet."""


def run(command: str, argv: list[str]) -> int:
    """Dispatch to an action."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    actions: dict[str, tuple[type[Model], Callable[[Any], int]]] = {
        "prompts": (PromptOptions, _prompts),
        "demonstrations": (DemonstrationOptions, _demonstrations),
        "pretrain": (PretrainOptions, _pretrain),
        "failures": (failures.FailuresOptions, failures.run),
    }
    if argv[0] not in actions:
        raise ConfigError(f"kilter {command}: no action {argv[0]!r}; choose one of {', '.join(actions)}")
    options_type, action = actions[argv[0]]
    return action(parse(options_type, argv[1:], prog=f"kilter {command} {argv[0]}", default=options_type()))


def _prompts(options: PromptOptions) -> int:
    from kilter import data, world

    out = new_jsonl(options.out)
    data.write(out, world.prompts(options.split, **_drawn(options)))
    print(out)
    return 0


def _demonstrations(options: PromptOptions) -> int:
    from kilter import data, world

    out = new_jsonl(options.out)
    data.write(out, world.demonstrations(split=options.split, **_drawn(options)))
    print(out)
    return 0


def _drawn(options: PromptOptions) -> dict[str, Any]:
    """Which prompts."""
    kinds = {"kinds": options.kinds} if options.kinds else {}
    return {"seed": options.seed, "per_kind": options.per_kind, **kinds}


def _pretrain(options: PretrainOptions) -> int:
    out = new_path(options.out)
    from rich.console import Console
    from rich.progress import Progress

    from kilter.world.pretrain import STEPS, pretrain

    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("pretraining", total=STEPS)
        pretrain(out, on_step=lambda step, _figures: progress.update(task, completed=step))
    print(out)
    return 0
