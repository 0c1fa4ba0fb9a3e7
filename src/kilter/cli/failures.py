"""`kilter world failures`: rewards that are wrong in one way each, what becomes of the policy, and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kilter.config import Model


class FailuresOptions(Model):
    """A museum of failures on the embedded world: signs the wrong way round, no price on KL, padding, sycophancy,
    collapse, a specification met to the letter, and more. Each is a recipe, run beside the same with the fault mended;
    what is claimed is measured, and what the guard saw is told."""

    out: Path = Path("runs/failures")
    """Folder of the museum: a run directory for each exhibit, and failures.html, .json, .svg and .md."""
    only: tuple[str, ...] = ()
    """These exhibits; none given: all."""
    museum: Path | None = None
    """A YAML file of exhibits in place of the package's own (`kilter/world/failures.yaml`)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random number follows from it."""
    quick: bool = False
    """Everything very small, two minutes: it shows what is made, and measures nothing."""
    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of a process; 0: OMP_NUM_THREADS, or its share of the cores."""
    jobs: Annotated[int, Field(ge=1)] = 2
    """Processes: stages that do not wait for each other run side by side."""
    dry_run: bool = False
    """Say what would be run, and run nothing."""
    as_json: bool = False
    """Print every figure as JSON."""


def run(options: FailuresOptions) -> int:
    """Run what is not done, measure, write, print."""
    from kilter.stages.exhibited import figures_of, write_museum
    from kilter.stages.failures import Building, read_museum, small

    museum = read_museum(options.museum)
    if options.quick:
        museum = small(museum)
    about = {"seed": options.seed, "threads": options.threads, "jobs": options.jobs}
    building = Building(museum, options.out, only=options.only, **about)
    if options.dry_run:
        print("\n".join(building.planned()))
        return 0
    building.build()
    told = figures_of(building)
    page = write_museum(told, building.out)
    if options.as_json:
        print(json.dumps(told, ensure_ascii=False, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    from kilter.report.failures import lines_of

    shown = Table("exhibit", "claims", "measured", "seen by")
    for row in lines_of(told):
        shown.add_row(*row)
    Console().print(shown, markup=False)
    print(f"seconds of all stages, by the clock: {sum(told['seconds'].values()):,.0f}")
    print(page)
    return 0
