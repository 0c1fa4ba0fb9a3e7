"""What flipped labels do to DPO, conservative DPO, robust DPO and IPO, and whether the heaviest pairs are the flipped.

    python tools/label_noise.py --out runs/frontier        measure, then print the tables: an hour, resumable

Pairs of the SFT model's answers, ordered by what careful annotators without bias would say, then 0, 10, 20 and 30% of
them flipped at random: the same answers each time. OUT is that of tools/frontier.py, whose SFT models it uses.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from frontier import BASE, DEMO, dpo, evaluation, run
from kilter import data, world
from kilter.records import Prompt, Ranking
from kilter.rundir import read_jsonl
from kilter.stats import mean_interval, proportion

CAREFUL = {"noise": 0.0, "tie_rate": 0.0, "side_bias": 0.0, "flattery_bias": 0.0, "harmless_length_bias": 0.0}
RATES = (0.0, 0.1, 0.2, 0.3)
PER_KIND = 520
NAMES = {"dpo": "DPO", "conservative": "conservative DPO", "robust": "robust DPO", "ipo": "IPO"}


def losses(rate: float) -> dict[str, dict[str, Any]]:
    """Those that know of flips are told their share."""
    found: dict[str, dict[str, Any]] = {"dpo": {"name": "dpo", "beta": 0.1}, "ipo": {"name": "ipo", "beta": 1.0}}
    if rate:
        found["conservative"] = {"name": "dpo", "beta": 0.1, "label_smoothing": rate}
        found["robust"] = {"name": "robust", "beta": 0.1, "label_smoothing": rate}
    return found


def flip(clean: Path, to: Path, rate: float, seed: int) -> set[tuple[str, str, str]]:
    """Writes the pairs with this share of them turned round; returns (prompt, chosen, rejected) of those."""
    rows: list[Ranking] = data.read(clean, record="ranking").records
    annotators = world.panel(seed=seed, flip_rate=rate, **CAREFUL)
    prompts = [Prompt(prompt=row.prompt, kind=row.kind) for row in rows]
    judged = annotators.rank(prompts, [row.responses for row in rows])
    data.write(
        to, [Ranking(prompt=one.prompt, responses=one.responses, ranks=one.ranks, kind=one.kind) for one in judged]
    )
    return {
        (row.prompt[-1].content, row.responses[row.ranks.index(1)], row.responses[row.ranks.index(0)])
        for row, one in zip(rows, judged, strict=True)
        if row.ranks != one.ranks
    }


def measure(out: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each loss at each rate."""
    base = run(out, "base", seed, {name: DEMO[name] for name in BASE})
    sft, _, reward = (str(base.stage(at, name).result.resolve()) for at, name in enumerate(BASE, 1))
    prompts = {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": PER_KIND}}
    annotator = {"path": "kilter.world:panel", "options": CAREFUL}
    collect = DEMO["preferences"] | {"model": sft, "prompts": prompts, "annotator": annotator, "num_samples": 2}
    clean = run(out, "pairs", seed, {"pairs": collect}).stage(1, "pairs").result / "rankings.jsonl"
    rows = []
    for rate in RATES:
        name = f"flipped-{100 * rate:.0f}"
        pairs = out / f"seed-{seed}" / f"{name}.jsonl"
        flipped = flip(clean, pairs, rate, seed)
        made = {
            key: dpo(str(pairs.resolve()), loss) | {"model": sft, "heaviest": 50} for key, loss in losses(rate).items()
        }
        judged = evaluation({key: key for key in made}, sft, reward)
        done = run(out, name, seed, {**made, "evaluation": judged})
        summary = json.loads((done.path / "summary.json").read_text())["models"]
        untied = sum(len(set(row.ranks)) > 1 for row in data.read(pairs, record="ranking").records)
        for at, key in enumerate(made, 1):
            listed = read_jsonl(done.stage(at, key).path / "heaviest.jsonl")
            hits = sum(
                any((row["chosen"], row["rejected"]) == turned[1:] and turned[0] in row["prompt"] for turned in flipped)
                for row in listed
            )
            found = {name: summary[key][name]["mean"] for name in ("kl", "true_reward")}
            rows.append({"seed": seed, "rate": rate, "loss": key, "hits": hits, "listed": len(listed), **found})
            rows[-1]["share"] = len(flipped) / untied
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: true reward by loss and rate, and the flips among the heaviest."""
    lines = ["| loss | " + " | ".join(f"{rate:.0%} flipped" for rate in RATES) + " |", "|---|" + "---|" * len(RATES)]
    for key, name in NAMES.items():
        cells = []
        for rate in RATES:
            own = [row for row in rows if row["loss"] == key and row["rate"] == rate]
            if not own:
                cells.append("as DPO")
                continue
            found = mean_interval([row["true_reward"] for row in own])
            away = fmean(math.sqrt(max(row["kl"], 0.0)) for row in own)
            low, high = (pick(row["true_reward"] for row in own) for pick in (min, max))
            cells.append(f"{found.mean:.2f} ({low:.2f} to {high:.2f}), sqrt KL {away:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| flipped, of all pairs | of the 50 heaviest, by loss |", "|---|---|"]
    for rate in RATES[1:]:
        cells = []
        for key, name in NAMES.items():
            own = [row for row in rows if row["loss"] == key and row["rate"] == rate]
            found = proportion(sum(row["hits"] for row in own), sum(row["listed"] for row in own))
            cells.append(f"{name} {found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]")
        share = fmean(row["share"] for row in rows if row["rate"] == rate)
        lines.append(f"| {share:.1%} | {'; '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in measure(options.out, seed)]
    (options.out / "label_noise.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(tables(rows))


if __name__ == "__main__":
    main()
