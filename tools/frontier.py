"""True reward against distance from SFT: every preference method at five strengths and several seeds.

    python tools/frontier.py --out runs/frontier               measure what is not measured yet: hours, resumable
    python tools/frontier.py --out runs/frontier --methods dpo ppo --seeds 0
    python tools/frontier.py --out runs/frontier --draw docs    the figure, its numbers and tables of what is there

Each (seed, method) is a run of its own, `OUT/seed-S/METHOD`, beside the seed's `base` run: the demo's SFT model, its
preferences and its reward model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import yaml

from kilter.config import parse
from kilter.report.panels import line, words
from kilter.report.svg import axis_over, el
from kilter.rollout.algorithms import ALGORITHMS
from kilter.rundir import RunDir, read_jsonl
from kilter.stages import run_recipe
from kilter.stats import mean_interval

DEMO: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "src/kilter/world/demo.yaml").read_text())["stages"]
BASE = ("sft", "preferences", "reward")
BETAS = (3.0, 1.0, 0.3, 0.1, 0.02)
PRICES = (2.0, 1.0, 0.5, 0.2, 0.05)


def dpo(data: str, loss: dict[str, Any], *, learning_rate: float = 3e-4) -> dict[str, Any]:
    """One pass over the preferences with the demo's batches."""
    optim = {"row_tokens": 128, "learning_rate": learning_rate, "batch_size": 64}
    return {"stage": "prefer", "data": data, "loss": loss, "optim": optim, "heaviest": 0}


def kto(loss: dict[str, Any]) -> dict[str, Any]:
    """One pass over a thumb for each of as many answers to the same prompts."""
    stage = dpo("thumbs", loss)
    return stage | {"optim": stage["optim"] | {"batch_size": 256}}


def online(loss: dict[str, Any]) -> dict[str, Any]:
    """One step a round: online DPO."""
    stage = {key: DEMO["ppo"][key] for key in ("prompts", "sampling")}
    optim = {"row_tokens": 128, "learning_rate": 3e-4, "batch_size": 64}
    return stage | {"stage": "online", "loss": loss, "rounds": 60, "prompts_per_round": 64, "optim": optim}


def rl(algorithm: str, price: float, **changes: Any) -> dict[str, Any]:
    """The demo's PPO, or another algorithm on as many answers to the same prompts; `changes` are of its numbers."""
    stage = DEMO["ppo"] | {"snapshots": 0, "algorithm": algorithm}
    numbers = DEMO["ppo"]["policy"] | {"kl_coef": price}
    critic = ("gae_lambda", "value_learning_rate")
    kept = {name: number for name, number in numbers.items() if algorithm == "ppo" or name not in critic}
    return {**stage, "policy": {**kept, **changes}}


def on_one_trunk(price: float, value_from: str) -> dict[str, Any]:
    """The demo's PPO with an adapter on one frozen trunk, and the value on another, or on the policy's states."""
    stage = rl("ppo", price, value_from=value_from)
    optim = stage["optim"] | {"learning_rate": 3e-3}
    return stage | {"lora": {"rank": 32, "alpha": 32}, "optim": optim}


ON_ONE_TRUNK = {"ppo_adapters": "policy", "ppo_shared": "shared"}
"""PPO's layouts beside that of four full models -> what the value starts as."""
GRPO_WITH: dict[str, dict[str, Any]] = {
    "grpo_kl_in_reward": {"kl_in": "reward"},
    "grpo_all_tokens": {"aggregate": "token"},
    "grpo_exact_kl": {"kl_estimator": "exact"},
}
"""GRPO with one thing as another algorithm does it: what is it that sets it apart?"""


def strengths(method: str, pairs: str) -> dict[str, dict[str, Any]]:
    """Label -> stage, from the one that stays nearest to SFT to the one that goes furthest."""
    match method:
        case "dpo":
            return {f"beta {beta:g}": dpo(pairs, {"name": "dpo", "beta": beta}) for beta in BETAS}
        case "ipo":
            return {f"beta {beta:g}": dpo(pairs, {"name": "ipo", "beta": beta}) for beta in (10.0, 3.0, 1.0, 0.5, 0.2)}
        case "orpo":
            return {f"beta {beta:g}": dpo(pairs, {"name": "orpo", "beta": beta}) for beta in (0.1, 0.3, 1.0, 3.0, 10.0)}
        case "simpo":  # nothing holds it near its start but the length of the way
            rates = (2e-5, 5e-5, 1e-4, 2e-4, 4e-4)
            return {f"rate {rate:g}": dpo(pairs, {"name": "simpo"}, learning_rate=rate) for rate in rates}
        case "kto":
            return {f"beta {beta:g}": kto({"name": "kto", "beta": beta}) for beta in BETAS}
        case "online":  # as many answers as PPO's: 60 x 64 x 2
            return {f"beta {beta:g}": online({"name": "dpo", "beta": beta}) for beta in BETAS}
        case "ppo" | "grpo" | "rloo":
            return {f"KL {price:g}": rl(method, price) for price in PRICES}
        case _ if method in ON_ONE_TRUNK:
            return {f"KL {price:g}": on_one_trunk(price, ON_ONE_TRUNK[method]) for price in PRICES}
        case "dr_grpo":
            return {f"KL {price:g}": rl(method, price) for price in (2.0, 1.0, 0.5)}
        case _ if method in GRPO_WITH:
            return {f"KL {price:g}": rl("grpo", price, **GRPO_WITH[method]) for price in (2.0, 1.0, 0.5)}
        case _:
            raise ValueError(method)


NAMES = {
    "dpo": "DPO",
    "ipo": "IPO",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "kto": "KTO, from thumbs",
    "online": "online DPO",
    "ppo": "PPO",
    "ppo_adapters": "PPO, adapters",
    "ppo_shared": "PPO, value on the policy",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "dr_grpo": "Dr. GRPO",
    "grpo_kl_in_reward": "GRPO, KL in the reward",
    "grpo_all_tokens": "GRPO, all tokens alike",
    "grpo_exact_kl": "GRPO, exact KL",
    "best_of_n": "best of n",
}
METHODS = tuple(NAMES)
PAIRED = (
    ("online", "dpo"),
    ("ppo", "dpo"),
    ("ppo_adapters", "dpo"),
    ("ppo_shared", "dpo"),
    ("grpo", "dpo"),
    ("rloo", "dpo"),
    ("dr_grpo", "grpo"),
    *((name, "grpo") for name in ("grpo_kl_in_reward", "grpo_all_tokens", "grpo_exact_kl")),
    ("ppo", "online"),
    ("ipo", "dpo"),
    ("kto", "dpo"),
)
"""Which methods are compared at equal KL, the one over the other."""


def evaluation(models: dict[str, str], sft: str, reward: str, **more: Any) -> dict[str, Any]:
    """The demo's, on the same held-out prompts, without what only the demo's report needs."""
    kept = ("stage", "prompts", "truth", "measure", "sampling")
    stage = {key: DEMO["evaluation"][key] for key in kept}
    return stage | {"models": models, "reference": sft, "reward": reward, "curve_prompts": 0} | more


def run(out: Path, name: str, seed: int, stages: dict[str, Any]) -> RunDir:
    """One run directory, made or gone on with."""
    recipe = {"name": name, "seed": seed, "world": "embedded world", "threads": 1, "stages": stages}
    return run_recipe(parse(recipe, name), out / f"seed-{seed}" / name)


def measure(out: Path, seed: int, method: str) -> None:
    """One method at all its strengths."""
    base = run(out, "base", seed, {name: DEMO[name] for name in BASE})
    sft, pairs, reward = (str(base.stage(at, name).result.resolve()) for at, name in enumerate(BASE, 1))
    if method == "best_of_n":  # all n from the same samples, by the unbiased estimator
        stages = {"best_of_n": DEMO["best_of_n"] | {"model": sft, "reward": reward, "num_samples": 32}}
        models = {"best_of_n": "best_of_n", "sft": sft}
        run(out, method, seed, stages | {"evaluation": evaluation(models, sft, reward, curve_prompts=2200)})
        return
    stages = {"thumbs": DEMO["preferences"] | {"model": sft, "ask": "thumbs", "again": 0}} if method == "kto" else {}
    samples = method == "online" or method in (*ALGORITHMS, *GRPO_WITH, *ON_ONE_TRUNK)
    scored = {"reward": reward, "audit": "ignore"} if samples else {}
    made = strengths(method, f"{pairs}/rankings.jsonl").values()
    models = {f"{method}-{at}": f"{method}-{at}" for at in range(1, len(made) + 1)}
    stages |= {name: stage | {"model": sft} | scored for name, stage in zip(models, made, strict=True)}
    run(out, method, seed, stages | {"evaluation": evaluation(models, sft, reward)})


# The page ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One policy of one seed."""

    method: str
    strength: str
    seed: int
    kl: float
    true: float
    proxy: float


def read(out: Path) -> list[Row]:
    """All that is measured, in the order of methods, seeds and strengths."""
    rows = []
    for method in METHODS:
        for folder in sorted(out.glob(f"seed-*/{method}")):
            seed = int(folder.parent.name.removeprefix("seed-"))
            if not (folder / "summary.json").exists():
                continue
            if method == "best_of_n":
                points = [point for point in read_jsonl(folder / "evaluation/curve.jsonl") if point["method"] == method]
                labels = [f"n {point['step']}" for point in points]
            else:
                points = list(json.loads((folder / "summary.json").read_text())["models"].values())
                labels = list(strengths(method, ""))
            for label, point in zip(labels, points, strict=True):
                values = (point[name]["mean"] for name in ("kl", "true_reward", "proxy_reward"))
                rows.append(Row(method, label, seed, *values))
    return [row for row in rows if row.strength != "n 1"]


def starts(out: Path) -> dict[int, float]:
    """Seed -> true reward of SFT, from the best-of-n run: seeds without one are not drawn."""
    files = sorted(out.glob("seed-*/best_of_n/summary.json"))
    found = {int(file.parts[-3].removeprefix("seed-")): json.loads(file.read_text()) for file in files}
    return {seed: summary["models"]["sft"]["true_reward"]["mean"] for seed, summary in found.items()}


def paths(rows: Sequence[Row], start: Mapping[int, float]) -> dict[int, tuple[list[float], list[float]]]:
    """Seed -> (sqrt KL, true reward) along a method, from SFT outwards."""
    found = {}
    for seed in sorted({row.seed for row in rows}):
        points = sorted((math.sqrt(max(row.kl, 0.0)), row.true) for row in rows if row.seed == seed)
        x, y = zip(*[(0.0, start[seed]), *points], strict=True)
        found[seed] = (list(x), list(y))
    return found


def tables(rows: Sequence[Row], start: Mapping[int, float]) -> str:
    """Markdown: every method and strength, and two methods at equal KL."""
    seeds = sorted(start)
    lines = [
        f"SFT: true reward {_spread([start[seed] for seed in seeds])}.",
        "",
        "| method | strength | sqrt KL | true reward | proxy reward |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        for strength in dict.fromkeys(row.strength for row in rows if row.method == method):
            own = [row for row in rows if (row.method, row.strength) == (method, strength)]
            columns = (
                [math.sqrt(max(row.kl, 0.0)) for row in own],
                [row.true for row in own],
                [row.proxy for row in own],
            )
            lines.append(f"| {NAMES[method]} | {strength} | {' | '.join(map(_spread, columns))} |")
    lines += ["", "| true reward at equal KL | sqrt KL | difference, 95% over seeds |", "|---|---|---|"]
    for one, other in PAIRED:
        curves = [paths([row for row in rows if row.method == method], start) for method in (one, other)]
        shared = sorted(curves[0].keys() & curves[1].keys())
        for x in (0.5, 0.65, 0.8):  # between two policies that were measured, never between SFT and the first
            inside = [curve[seed][0][1] <= x <= curve[seed][0][-1] for curve in curves for seed in shared]
            if len(shared) < 2 or not all(inside):
                continue
            gaps = [float(np.interp(x, *curves[0][seed]) - np.interp(x, *curves[1][seed])) for seed in shared]
            found = mean_interval(gaps)
            said = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            lines.append(f"| {NAMES[one]} over {NAMES[other]} | {x:g} | {said} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest seed."""
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


PANEL, COLUMNS, MARGIN = (270.0, 210.0), 4, 46.0
COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#be185d", "#0f766e", "#4b5563")


def draw(rows: Sequence[Row], start: Mapping[int, float]) -> str:
    """An SVG of a panel for each method: its seeds as dots, their mean as a line, the other methods' means in grey."""
    methods = [method for method in METHODS if any(row.method == method for row in rows)]
    width, height = PANEL
    whole = (COLUMNS * width, -(-len(methods) // COLUMNS) * height + 30)
    xs, ys = [math.sqrt(max(row.kl, 0.0)) for row in rows], [row.true for row in rows]
    shapes = [el("rect", width=whole[0], height=whole[1], fill="#ffffff")]
    means = {method: _means([row for row in rows if row.method == method], start) for method in methods}
    for at, method in enumerate(methods):
        left, top = (at % COLUMNS) * width, (at // COLUMNS) * height
        across = axis_over([0.0, *xs], left + MARGIN, left + width - 12, pad=0.03)
        up = axis_over(ys, top + height - 34, top + 26, pad=0.05)
        for tick, said in up.labelled_ticks(5):
            shapes.append(line([(across.start, up(tick)), (across.end, up(tick))], "#e5e7eb", 1))
            shapes.append(words(said, across.start - 6, up(tick) + 4, "end", "#6b7280"))
        for tick, said in across.labelled_ticks(4):
            shapes.append(words(said, across(tick), up.start + 16, "middle", "#6b7280"))
        shapes += [line([(across(x), up(y)) for x, y in means[other]], "#d1d5db", 1.2) for other in methods]
        colour = COLOURS[at % len(COLOURS)]
        shapes.append(line([(across(x), up(y)) for x, y in means[method]], colour, 2.4))
        for row in rows:
            if row.method == method:
                place = (across(math.sqrt(max(row.kl, 0.0))), up(row.true))
                shapes.append(el("circle", cx=place[0], cy=place[1], r=3.0, fill=colour, fill_opacity=0.55))
        shapes.append(words(NAMES[method], across.start, top + 17, "start", colour, bold=True))
    below = (
        "across: square root of the KL from SFT, nats an answer; up: true reward; dots: seeds; grey: the other methods"
    )
    shapes.append(words(below, MARGIN, whole[1] - 10, "start", "#374151"))
    box = {"viewBox": f"0 0 {whole[0]:g} {whole[1]:g}", "xmlns": "http://www.w3.org/2000/svg"}
    return str(el("svg", *shapes, **box, font_family="system-ui, sans-serif", font_size=12.0)) + "\n"


def _means(rows: Sequence[Row], start: Mapping[int, float]) -> list[tuple[float, float]]:
    """SFT and each strength, averaged over seeds."""
    found = [(0.0, fmean(start.values()))]
    for strength in dict.fromkeys(row.strength for row in rows):
        own = [row for row in rows if row.strength == strength]
        found.append((fmean(math.sqrt(max(row.kl, 0.0)) for row in own), fmean(row.true for row in own)))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--draw", type=Path, help="write the figure and its numbers here; print the tables")
    parser.add_argument("--name", default="frontier", help="of these two files: NAME.svg, NAME.json")
    options = parser.parse_args()
    if options.draw is None:
        for seed in options.seeds:
            for method in options.methods:
                measure(options.out, seed, method)
        return
    start = starts(options.out)
    rows = [row for row in read(options.out) if row.seed in start and row.method in options.methods]
    options.draw.mkdir(parents=True, exist_ok=True)
    (options.draw / f"{options.name}.svg").write_text(draw(rows, start), encoding="utf-8")
    found = {"sft": start, "policies": [row._asdict() for row in rows]}
    (options.draw / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(tables(rows, start))


if __name__ == "__main__":
    main()
