"""What a guard that acts keeps of the true reward, beside an early stop by an oracle.

    python tools/guard_acts.py --out runs/guard --seeds 8 12           run what is not there yet: resumable
    python tools/guard_acts.py --out runs/guard --seeds 8 12 --table   the table of what is there

Runs are those of tools/guard.py, whose bases and planted faults OUT holds. Each is made three times from the same seed,
the same bits up to the first alarm: its guard only warns, and the policy after every rollout is kept; or it stops at
what it sees, without a probe; or it goes back to the best policy by its probe. All these policies answer the same 2,200
held-out prompts. The oracle is the best of the run that was only warned, by these answers: noise makes it look better
than it is, never worse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from guard import CLEAN, DEMO, FELL, KINDS, SEEDS_OF_A_BASE, SIGN_PAIRS, base, run, stage_of
from kilter.errors import CheckError
from kilter.stages.snapshots import snapshots_in

WARNED = "warned"
ACTS: dict[str, dict[str, Any]] = {
    "stop": {"action": "stop", "actions": {}, "probe": ""},
    "roll_back": {"action": "roll_back", "actions": {}},
}
"""What the guard does that acts; what cannot be learned from is refused, as it is by default."""
ALL_ROLLOUTS = 100
"""Snapshots asked for: more than a run has rollouts, so that each has one."""


def go(out: Path, kind: str, seed: int) -> None:
    """The three runs of one kind, and one evaluation of all their policies."""
    made = base(out, seed // SEEDS_OF_A_BASE)
    stage = stage_of(out, made, kind, seed)
    where = out / "acts" / f"{kind}-{seed}"
    warned = run(where, WARNED, seed, {"rl": stage | {"snapshots": ALL_ROLLOUTS}}).stage(1, "rl")
    models = {"sft": made["sft"]}
    models |= {f"after_{step}": str(folder.resolve()) for step, folder in snapshots_in(warned.path)}
    models[WARNED] = str(warned.result.resolve())
    for name, changes in ACTS.items():
        try:
            ended = run(where, name, seed, {"rl": stage | {"guard": stage["guard"] | changes}})
            models[name] = str(ended.stage(1, "rl").result.resolve())
        except CheckError:  # before the first update: SFT is what is left
            models[name] = made["sft"]
    truth = {key: DEMO["evaluation"][key] for key in ("stage", "prompts", "truth")}
    truth |= {"models": models, "reference": made["sft"], "curve_prompts": 0, "sampling": stage["sampling"]}
    run(where, "measured", seed, {"evaluation": truth})


class Kept(NamedTuple):
    """Truth of one run's policies."""

    kind: str
    last: float
    """Of the run that was only warned."""
    best: float
    acted: dict[str, float]


def kept(out: Path, seeds: Sequence[int]) -> list[Kept]:
    """Of all runs of these seeds that have been measured and that lost truth when the guard only warned."""
    found = []
    for kind in KINDS:
        for seed in seeds:
            summary = out / "acts" / f"{kind}-{seed}/measured/summary.json"
            if summary.exists():
                told = json.loads(summary.read_text())["models"]
                truth = {name: one["true_reward"]["mean"] for name, one in told.items()}
                best = max(value for name, value in truth.items() if name not in ACTS)
                if best - truth[WARNED] > FELL:
                    found.append(Kept(kind, truth[WARNED], best, {name: truth[name] for name in ACTS}))
    return found


def table(found: Sequence[Kept]) -> str:
    """Markdown: a row for each kind; what was kept is the sum over runs of what was saved, over that of the oracle."""
    lines = [
        "| kind | runs that lost truth | at the end | the oracle's stop | "
        + " | ".join(f"{name}: truth | kept" for name in ACTS)
        + " |",
        "|---" * (4 + 2 * len(ACTS)) + "|",
    ]
    rows = [(kind, [one for one in found if one.kind == kind]) for kind in KINDS]
    for name, own in [*rows, ("**all**", found)]:
        if own:
            last, best = fmean(one.last for one in own), fmean(one.best for one in own)
            shown = []
            for act in ACTS:
                ended = fmean(one.acted[act] for one in own)
                shown.append(f"{ended:.2f} | {(ended - last) / (best - last):.2f}")
            lines.append(f"| {name} | {len(own)} | {last:.2f} | {best:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(8, 12))
    faults = [kind for kind in KINDS if kind not in (*CLEAN, SIGN_PAIRS)]
    parser.add_argument("--kinds", nargs="+", choices=faults, default=faults)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.table:
        print(table(kept(options.out, options.seeds)))
        return
    for seed in options.seeds:
        for kind in options.kinds:
            go(options.out, kind, seed)


if __name__ == "__main__":
    main()
