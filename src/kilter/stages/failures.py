"""`kilter world failures`: the runs of the museum, each a run directory.

    OUT/shared             the policy at the start, a sound reward model, a clean run
    OUT/sheets             rule sheets of the exhibits
    OUT/EXHIBIT            its reward models, its runs, its evaluation

A run that has ended is not done again, a killed one goes on, and one exhibit more leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kilter.config import SHARED, SHEETS, Exhibit, Museum, Recipe, explain, parse, read_yaml
from kilter.errors import ConfigError
from kilter.guard import SYMPTOMS
from kilter.report.failures import SIGNS
from kilter.rundir import RunDir, StageDir, write_text
from kilter.scorers.registry import did_you_mean
from kilter.stages.reinforce import check_algorithms
from kilter.stages.run import run_recipe
from kilter.stages.scoring import check_rewards

COMMON = "shared"
"""Name of the run that comes first."""
QUICK: Mapping[str, Mapping[str, Any]] = {
    "sft": {"epochs": 1},
    "collect": {"num_samples": 3},
    "reward": {"epochs": 1, "held_out": 0.0, "audit": {"prompts": 0}},
    "rl": {"rollouts": 3, "prompts_per_rollout": 6, "num_samples": 2},
}
"""What stages of each kind are changed to where everything is to be very small."""
QUICK_PROMPTS, QUICK_TOKENS = 6, 12


def read_museum(path: Path | None = None) -> Museum:
    """The package's own museum, or another one.

    Raises:
        ConfigError: no such file, or it holds something else; in one line.
    """
    if path is None:
        with resources.as_file(resources.files("kilter.world") / "failures.yaml") as own:
            return read_museum(own)
    raw = read_yaml(path, what="a museum")
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: holds no mapping; write `shared:` and `exhibits:`")
    try:
        return Museum.model_validate(raw)
    except ValidationError as err:
        raise ConfigError(f"{path}: {explain(err, raw)}") from err


def small(museum: Museum) -> Museum:
    """The same museum, everything very small: it shows what is made, and measures nothing."""
    made = museum.model_dump()
    for stages in (made["shared"], *(one["stages"] for one in made["exhibits"].values())):
        for stage in stages.values():
            stage |= QUICK.get(stage.get("stage", ""), {})
            for place in ("prompts", "data"):
                options = stage[place].get("options", {}) if isinstance(stage.get(place), dict) else {}
                options |= {"per_kind": QUICK_PROMPTS} if "per_kind" in options else {}
            if "sampling" in stage:
                stage["sampling"] = stage["sampling"] | {"max_new_tokens": QUICK_TOKENS}
    return Museum.model_validate(made)


class Building:
    """The museum in its folder.

    Args:
        only: names of exhibits; none given: all.
    Raises:
        ConfigError: an exhibit or a detector that there is none of, or stages that no recipe can have; before any work.
    """

    def __init__(self, museum: Museum, out: Path, *, seed: int, threads: int, jobs: int, only: Sequence[str] = ()):
        self.museum, self.out = museum, out.resolve()
        self._about = {"seed": seed, "threads": threads, "jobs": jobs, "world": "embedded world"}
        if unknown := [name for name in only if name not in museum.exhibits]:
            raise ConfigError(f"--only {unknown[0]}: {did_you_mean(unknown[0], museum.exhibits, 'choose among')}")
        for name, one in museum.exhibits.items():
            known = {SIGNS: None, **SYMPTOMS}
            if unknown := [detector for detector in one.detectors if detector not in known]:
                said = did_you_mean(unknown[0], known, "choose among")
                raise ConfigError(f"exhibits.{name}.detectors: {unknown[0]!r}; {said}")
        self.exhibits = {name: one for name, one in museum.exhibits.items() if not only or name in only}
        self.shared = parse({"name": COMMON, **self._about, "stages": museum.shared}, COMMON)
        self.recipes = {name: self._recipe(name, one) for name, one in self.exhibits.items()}

    def build(self) -> None:
        """Do every run that is not done.

        Raises:
            KilterError: bad input, before any exhibit is run; a folder that holds another museum.
        """
        for recipe in (self.shared, *self.recipes.values()):
            check_algorithms(recipe)
        run_recipe(self.shared, self.out / COMMON)
        for name, exhibit in self.exhibits.items():
            for sheet, raw in exhibit.sheets.items():
                text = yaml.safe_dump(self._placed(raw, name), sort_keys=False, allow_unicode=True)
                write_text(self._sheet(name, sheet), text)
        for recipe in self.recipes.values():
            check_rewards(recipe)
        for name, recipe in self.recipes.items():
            run_recipe(recipe, self.out / name)

    def planned(self) -> list[str]:
        """What `build` would run, a line a run directory; nothing is loaded."""
        return [
            f"{self.out / recipe.name}: {', '.join(recipe.stages)}" for recipe in (self.shared, *self.recipes.values())
        ]

    def stage(self, exhibit: str, name: str) -> StageDir:
        """The folder of a stage: one of the exhibit's, or `shared.NAME`."""
        shared = name.startswith(SHARED)
        recipe = self.shared if shared else self.recipes[exhibit]
        name = name.removeprefix(SHARED)
        return RunDir(self.out / recipe.name).stage(list(recipe.stages).index(name) + 1, name)

    def _recipe(self, name: str, exhibit: Exhibit) -> Recipe:
        """The evaluation is given its models: the policy at the start, and each run."""
        stages = self._placed(exhibit.stages, name)
        start = self._result(SHARED + self.museum.start)
        models = {label(run): self._placed(run, name) for run in exhibit.runs}
        for stage in stages.values():
            if stage.get("stage") == "eval":
                stage |= {"models": {"start": start} | models, "reference": start}
        return parse({"name": name, **self._about, "stages": stages}, f"exhibits.{name}")

    def _placed(self, value: Any, exhibit: str) -> Any:
        """With the paths of what `shared.NAME` and `sheets.NAME` name."""
        if isinstance(value, Mapping):
            return {key: self._placed(one, exhibit) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self._placed(one, exhibit) for one in value]
        if isinstance(value, str) and value.startswith(SHARED):
            return self._result(value)
        if isinstance(value, str) and value.startswith(SHEETS):
            return str(self._sheet(exhibit, value.removeprefix(SHEETS)))
        return value

    def _sheet(self, exhibit: str, name: str) -> Path:
        if name not in self.exhibits[exhibit].sheets:
            known = self.exhibits[exhibit].sheets
            raise ConfigError(f"exhibits.{exhibit}: {SHEETS}{name}; {did_you_mean(name, known, 'its sheets are')}")
        return self.out / "sheets" / f"{exhibit}-{name}.yaml"

    def _result(self, name: str) -> str:
        """The model's folder that a shared stage leaves."""
        name = name.removeprefix(SHARED)
        if name not in self.museum.shared:
            raise ConfigError(f"{SHARED}{name}; {did_you_mean(name, self.museum.shared, 'the shared stages are')}")
        place = list(self.museum.shared).index(name) + 1
        return str(self.out / COMMON / "stages" / f"{place:02d}-{name}" / "result")


def label(run: str) -> str:
    """What a run is called on the page and in its evaluation."""
    return run.removeprefix(SHARED)
