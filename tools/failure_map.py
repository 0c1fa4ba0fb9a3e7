"""Runs with one number that is wrong: which of them fail, and whether `kilter report why` names the number.

    python tools/failure_map.py --out runs/guard --seeds 2 5           run what is not there yet: an hour, resumable
    python tools/failure_map.py --out runs/guard --seeds 2 5 --table   the tables of what is there

Five numbers of PPO and of DPO, each far too low and far too high, the others as they are. A run has failed if truth
rose by less than 80% of what it did with the numbers as they are. OUT is that of tools/guard.py, whose bases it uses:
the rules of `kilter.guard.causes` were looked for on bases 0 and 1, and later ones say what they are worth.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from guard import DEMO, base, run
from kilter.guard import why
from kilter.rundir import write_text

AS_IT_IS = "as it is"
Changes = Mapping[str, Any]
PPO: dict[str, Changes] = {
    AS_IT_IS: {},
    "reward scale low": {"weight": 0.01},
    "reward scale high": {"weight": 100.0},
    "KL coefficient low": {"policy": {"kl_coef": 0.0}},
    "KL coefficient high": {"policy": {"kl_coef": 20.0}},
    "clip range low": {"policy": {"clip_range": 0.001}},
    "clip range high": {"policy": {"clip_range": 50.0}},
    "learning rate low": {"learning_rate": 5e-6},
    "learning rate high": {"learning_rate": 2e-2},
    "batch low": {"prompts_per_rollout": 3, "rollouts": 36},
    "batch high": {"prompts_per_rollout": 192, "rollouts": 2},
}
DPO: dict[str, Changes] = {
    AS_IT_IS: {},
    "reward scale low": {"noise": 20.0},
    "reward scale high": {"noise": 0.0},
    "KL coefficient low": {"beta": 0.002},
    "KL coefficient high": {"beta": 100.0},
    "clip range low": {"max_grad_norm": 1e-4},
    "clip range high": {"max_grad_norm": 1e4},
    "learning rate low": {"learning_rate": 2e-6},
    "learning rate high": {"learning_rate": 1e-2},
    "batch low": {"batch_size": 4},
    "batch high": {"batch_size": 1024},
}
"""The scale of a reward is, for DPO, how sharply those who compare see it: the noise of the annotators. Its clip is
that of the gradient's norm."""
MAPS = {"ppo": PPO, "dpo": DPO}
KEPT = 0.8
"""Share of the rise of truth below which a run has failed."""


def folder(name: str) -> str:
    """Of a setting."""
    return name.replace(" ", "_").lower()


def ppo(made: Mapping[str, str], sheet: Path, changes: Changes) -> dict[str, Any]:
    """One stage; the reward stands on a sheet, which gives it its weight."""
    write_text(sheet, yaml.safe_dump({"rules": [{"model": made["reward"], "weight": changes.get("weight", 1.0)}]}))
    numbers = {"kl_coef": 0.2, "kl_controller": "fixed", "normalize_reward": False, "value_learning_rate": 1e-3}
    return {
        "stage": "rl",
        "algorithm": "ppo",
        "model": made["sft"],
        "reward": str(sheet.resolve()),
        "audit": "ignore",
        "prompts": DEMO["ppo"]["prompts"],
        "rollouts": changes.get("rollouts", 12),
        "prompts_per_rollout": changes.get("prompts_per_rollout", 32),
        "num_samples": 4,
        "sampling": {"max_new_tokens": 60},
        "policy": {**numbers, "epochs": 2, "minibatches": 2, **changes.get("policy", {})},
        "optim": {"row_tokens": 128, "learning_rate": changes.get("learning_rate", 1e-3), "batch_tokens": 8192},
        "guard": {"actions": {"no_signal": "warn"}},
    }


def dpo(made: Mapping[str, str], changes: Changes) -> dict[str, Any]:
    """One stage."""
    optim = {"row_tokens": 128, "learning_rate": 3e-4, "batch_size": 64}
    given = {name: value for name, value in changes.items() if name in ("learning_rate", "batch_size", "max_grad_norm")}
    return {
        "stage": "prefer",
        "model": made["sft"],
        "data": "labels" if "noise" in changes else made["rankings"],
        "loss": {"name": "dpo", "beta": changes.get("beta", 0.3)},
        "heaviest": 0,
        "optim": optim | given,
    }


def go(out: Path, method: str, name: str, number: int) -> None:
    """One run of the map: the stage, and truth on held-out prompts."""
    made = base(out, number)
    made["rankings"] = str(Path(made["sft"]).parents[1] / "02-preferences/result/rankings.jsonl")
    changes, stages = MAPS[method][name], dict[str, Any]()
    if "noise" in changes:
        options = {"flattery_bias": 0.0, "length_bias": 0.0, "noise": changes["noise"]}
        annotator = {"path": "kilter.world:panel", "options": options}
        stages["labels"] = DEMO["preferences"] | {"again": 0, "model": made["sft"], "annotator": annotator}
    where = out / "map" / f"{method}-{folder(name)}-{number}"
    stages[method] = ppo(made, where.with_suffix(".yaml"), changes) if method == "ppo" else dpo(made, changes)
    stages["evaluation"] = {
        "stage": "eval",
        "models": {"sft": made["sft"], method: method},
        "reference": made["sft"],
        "curve_prompts": 0,
        "prompts": {"path": "kilter.world:prompts", "options": {"split": "held_out", "per_kind": 40}},
        "truth": "kilter.world:true_reward",
        "sampling": {"max_new_tokens": 60},
    }
    run(where.parent, where.name, number, stages)


# The tables ----------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """One run of the map."""

    method: str
    name: str
    rise: float
    """Of truth over SFT."""
    failed: bool
    said: str
    """The number that `why` names first, with its direction; "": none."""


def shown(out: Path, numbers: range) -> list[Shown]:
    """All runs of these bases that have ended."""
    found = []
    for method, settings in MAPS.items():
        for number in numbers:
            usual = _rise(out, method, AS_IT_IS, number)
            for name in settings:
                rise = _rise(out, method, name, number)
                if rise is None or usual is None:
                    continue
                told = [one for one in why(_folder(out, method, name, number)) if one.stage.endswith(f"-{method}")]
                causes = [cause.cause for one in told for cause in one.causes]
                found.append(Shown(method, name, rise, rise < KEPT * usual, causes[0] if causes else ""))
    return found


def _folder(out: Path, method: str, name: str, number: int) -> Path:
    return out / "map" / f"{method}-{folder(name)}-{number}"


def _rise(out: Path, method: str, name: str, number: int) -> float | None:
    path = _folder(out, method, name, number) / "summary.json"
    if not path.exists():
        return None
    models = json.loads(path.read_text())["models"]
    return float(models[method]["true_reward"]["mean"] - models["sft"]["true_reward"]["mean"])


def tables(out: Path, numbers: range) -> str:
    """Markdown: of each method the settings, how many runs failed, what `why` said of those and of the others."""
    told, lines = shown(out, numbers), list[str]()
    for method, settings in MAPS.items():
        lines += [
            f"{method.upper()}:",
            "",
            "| setting | runs | truth above SFT | failed | named first, of the failed | of the others |",
            "|---|---|---|---|---|---|",
        ]
        for name in settings:
            own = [one for one in told if (one.method, one.name) == (method, name)]
            if own:
                failed = [one for one in own if one.failed]
                others = [one for one in own if not one.failed]
                cells = (
                    f"{fmean(one.rise for one in own):+.2f}",
                    f"{len(failed)}",
                    _counted(failed),
                    _counted(others),
                )
                lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
        failed = [one for one in told if one.method == method and one.failed]
        right = sum(one.said == one.name for one in failed)
        lines += ["", f"Named rightly: {right} of {len(failed)} failed runs.", "", *_confusion(failed), ""]
    return "\n".join(lines)


def _confusion(failed: list[Shown]) -> list[str]:
    """Markdown: failed runs by what was wrong (rows) and what was named first (columns)."""
    counted = Counter((one.name, one.said or "nothing") for one in failed)
    names = [name for name in PPO if name != AS_IT_IS]
    columns = [*names, "nothing"]
    lines = [
        f"| wrong, of {len(failed)} | {' | '.join(_short(name) for name in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name in names:
        cells = (str(counted[name, said] or ("." if said != name else 0)) for said in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _short(name: str) -> str:
    """For the head of a narrow column."""
    for word in ("reward ", " coefficient", " range", "learning "):
        name = name.replace(word, "")
    return name


def _counted(runs: list[Shown]) -> str:
    counted = Counter(one.said or "nothing" for one in runs)
    return ", ".join(f"{name} {count}" for name, count in counted.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    parser.add_argument("--seeds", type=int, nargs=2, default=(2, 5), help="bases from, to (left out)")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    if options.table:
        print(tables(options.out, range(*options.seeds)))
        return
    for number in range(*options.seeds):
        for method, settings in MAPS.items():
            for name in settings:
                go(options.out, method, name, number)


if __name__ == "__main__":
    main()
