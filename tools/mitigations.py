"""Mitigations against hacks: how much true reward each keeps, and how many answers it draws for it.

    python tools/mitigations.py --out runs/guard --seeds 8 12           run what is not there yet: resumable
    python tools/mitigations.py --out runs/guard --seeds 8 12 --table   the matrix of what is there

Hacks are the faults of tools/guard.py of which truth falls; OUT holds its bases. Each run is made again from the same
seed with each mitigation, and once as it is: there the guard only warns, and the policy after every rollout is kept.
All these policies answer the same 1,100 held-out prompts, those of the same weights once. What an early stop by an
oracle would have kept is what the best policy of the run as it is was worth: the best by one half of the prompts,
measured by the other, so that noise does not flatter it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from guard import DEMO, FELL, SEEDS_OF_A_BASE, base, run, stage_of
from kilter.errors import CheckError
from kilter.guard import rows_of
from kilter.rundir import read_jsonl, write_json
from kilter.stages.inputs import file_hash
from kilter.stages.snapshots import snapshots_in

HACKS = ("sign", "kl", "collapse", "apologies", "certainty", "flattery", "format", "nonsense", "refusal", "length")
AS_IT_IS = "as_it_is"
MITIGATIONS: dict[str, dict[str, Any]] = {
    "price": {"policy": {"kl_coef": 0.2}},
    "budget": {"policy": {"kl_coef": 0.05, "kl_controller": "budget", "kl_target": 1.0}},
    "raises_kl": {"guard": {"action": "raise_kl", "probe": ""}},
    "stops": {"guard": {"action": "stop", "probe": ""}},
    "stops_by_probe": {"guard": {"action": "stop"}},
    "goes_back": {"guard": {"action": "roll_back"}},
}
"""What of the stage each changes; the guard of the first two only warns. Without a probe it does not see truth."""
SAID = {
    "price": "a price of KL of 0.2",
    "budget": "a budget of 1 nat",
    "raises_kl": "guard raises KL",
    "stops": "guard stops",
    "stops_by_probe": "guard stops, with the probe",
    "goes_back": "guard goes back, with the probe",
}
ALL_ROLLOUTS = 100
"""Snapshots asked for: more than a run has rollouts, so that each has one."""


def changed(stage: Mapping[str, Any], mitigation: str) -> dict[str, Any]:
    """The stage with a mitigation; a guard that acts refuses what cannot be learned from, as it does by default."""
    changes = MITIGATIONS[mitigation]
    merged = {**stage, **{name: {**stage[name], **own} for name, own in changes.items()}}
    if "guard" in changes:
        merged["guard"].pop("actions")
    if changes.get("guard", {}).get("action") == "raise_kl":  # there has to be a price, and no controller of its own
        merged["policy"] = merged["policy"] | {"kl_coef": max(merged["policy"]["kl_coef"], 0.01)}
    return merged


def go(out: Path, kind: str, seed: int) -> None:
    """The runs of one hack, and one evaluation of all their policies."""
    made = base(out, seed // SEEDS_OF_A_BASE)
    stage = stage_of(out, made, kind, seed)
    where = out / "mitigations" / f"{kind}-{seed}"
    plain = run(where, AS_IT_IS, seed, {"rl": stage | {"snapshots": ALL_ROLLOUTS}}).stage(1, "rl")
    models = {"sft": made["sft"]}
    models |= {f"after_{step}": str(folder.resolve()) for step, folder in snapshots_in(plain.path)}
    models[AS_IT_IS] = str(plain.result.resolve())
    drawn = {AS_IT_IS: rollouts(plain.path)}
    for name in MITIGATIONS:
        try:
            done = run(where, name, seed, {"rl": changed(stage, name)}).stage(1, "rl")
            models[name], drawn[name] = str(done.result.resolve()), rollouts(done.path)
        except CheckError:  # before the first update: SFT is what is left
            models[name], drawn[name] = made["sft"], 1
    weights = {name: file_hash([Path(model) / "model.safetensors"]) for name, model in models.items()}
    first = {weight: name for name, weight in reversed(weights.items())}
    same = {name: first[weight] for name, weight in weights.items()}
    models = {name: model for name, model in models.items() if same[name] == name}
    truth = {key: DEMO["evaluation"][key] for key in ("stage", "truth")}
    truth |= {"models": models, "reference": made["sft"], "curve_prompts": 0, "sampling": stage["sampling"]}
    truth["prompts"] = {"path": "kilter.world:prompts", "options": {"split": "held_out", "per_kind": 100}}
    run(where, "measured", seed, {"evaluation": truth})
    write_json(where / "drawn.json", {"drawn": drawn, "same": same})


def rollouts(stage: Path) -> int:
    """How many were drawn: those that were thrown away too."""
    return sum(1 + int(row.get("rollout/put_back", 0)) for row in rows_of(read_jsonl(stage / "metrics.jsonl")))


class Measured(NamedTuple):
    """One run's policies, and how many rollouts each took."""

    kind: str
    best: float
    truth: dict[str, float]
    drawn: dict[str, int]


def measured(out: Path, seeds: Sequence[int]) -> list[Measured]:
    """All runs of these seeds that have been measured and that lost truth as they are."""
    found = []
    for kind in HACKS:
        for seed in seeds:
            where = out / "mitigations" / f"{kind}-{seed}"
            if (where / "drawn.json").exists():
                about = json.loads((where / "drawn.json").read_text())
                folder = where / "measured/evaluation"
                rows = {name: read_jsonl(folder / f"{one}.jsonl") for name, one in about["same"].items()}
                truth = {name: [row["true_reward"] for row in own] for name, own in rows.items()}
                best, ended = oracle(truth), {name: fmean(truth[name]) for name in (AS_IT_IS, *MITIGATIONS)}
                if best - ended[AS_IT_IS] > FELL:
                    found.append(Measured(kind, best, ended, about["drawn"]))
    return found


def oracle(truth: Mapping[str, Sequence[float]]) -> float:
    """What the best policy of the run as it is is worth: chosen by every other prompt, measured on those between."""
    plain = {name: values for name, values in truth.items() if name not in MITIGATIONS}
    found = []
    for chosen, seen in ((0, 1), (1, 0)):
        best = max(plain, key=lambda name: fmean(plain[name][chosen::2]))
        found.append(fmean(plain[best][seen::2]))
    return fmean(found)


def matrix(found: Sequence[Measured]) -> str:
    """Markdown: hacks down, mitigations across; truth, and of what the run as it is lost from its best, the share that
    was kept, sums over runs. The last row tells rollouts."""
    names = list(MITIGATIONS)
    lines = ["| hack | runs | as it is | the oracle's stop | " + " | ".join(SAID[name] for name in names) + " |"]
    lines.append("|---" * (4 + len(names)) + "|")
    rows = [(kind, [one for one in found if one.kind == kind]) for kind in dict.fromkeys(one.kind for one in found)]
    for kind, own in [*rows, ("**all**", list(found))]:
        last, best = fmean(one.truth[AS_IT_IS] for one in own), fmean(one.best for one in own)
        cells = []
        for name in names:
            ended = fmean(one.truth[name] for one in own)
            cells.append(f"{ended:.2f} ({(ended - last) / (best - last):.2f})")
        lines.append(f"| {kind} | {len(own)} | {last:.2f} | {best:.2f} | {' | '.join(cells)} |")
    drawn = [f"{fmean(one.drawn[name] for one in found):.1f}" for name in (AS_IT_IS, *names)]
    lines.append(f"| rollouts drawn | | {drawn[0]} | {drawn[0]} | {' | '.join(drawn[1:])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(8, 12))
    parser.add_argument("--kinds", nargs="+", choices=HACKS, default=HACKS)
    parser.add_argument("--table", action="store_true", help="print the matrix of what is there")
    options = parser.parse_args()
    if options.table:
        print(matrix(measured(options.out, options.seeds)))
        return
    for seed in options.seeds:
        for kind in options.kinds:
            go(options.out, kind, seed)


if __name__ == "__main__":
    main()
