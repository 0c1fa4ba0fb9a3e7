"""`kilter align RECIPE`: a recipe of any stages, with options on top by stage name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import create_model

from kilter.cli.execute import execute
from kilter.cli.options import RunOptions, parse, with_run_options
from kilter.config import load
from kilter.config import parse as parse_recipe
from kilter.errors import ConfigError

HELP = """usage: kilter align RECIPE [--STAGE.KEY VALUE ...] [options]

Run the stages of a recipe in order. `kilter align RECIPE --help` lists every option of that recipe.

example:
  kilter align recipes/hh-stories.yaml --ppo.policy.kl-coef 0.1 --seed 3 --out runs/mine"""


def run(command: str, argv: list[str]) -> int:
    """Load the recipe named first, put the options on top, run it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0].startswith("-"):
        raise ConfigError(f"kilter align: the recipe comes first, before {argv[0]}; kilter align RECIPE [options]")
    return run_file(f"kilter {command} {argv[0]}", Path(argv[0]), argv[1:])


def run_file(prog: str, path: Path, argv: list[str]) -> int:
    """Run the recipe at `path` with the options in `argv` on top."""
    recipe = load(path)
    fields: dict[str, Any] = {name: (type(stage), stage) for name, stage in recipe.stages.items()}
    for name in fields:
        field = name.replace("-", "_")
        if field in RunOptions.model_fields or hasattr(RunOptions, field):
            raise ConfigError(f"{path}: stages.{name} has the name of an option; give the stage another name")
    model = create_model("RecipeOptions", __base__=RunOptions, __doc__=f"The stages of {path}.", **fields)
    first = next(iter(fields))
    options = parse(model, argv, prog=prog, default=model(), example=f"{prog} --{first}.seed-offset 1 --dry-run")
    changed = recipe.model_copy(update={"stages": {name: getattr(options, name) for name in fields}})
    final = with_run_options(parse_recipe(changed.model_dump(), prog), options)
    return execute(final, options.out or Path("runs") / recipe.name, dry_run=options.dry_run, memory=options.memory)
