"""What heads are worth: ensembles under label noise, a head for each group of people, a head apart from length; and
what the model is worth that a reward model starts from.

    python tools/reward_models.py --out runs/rewards                 measure what is not measured yet; resumable
    python tools/reward_models.py --out runs/rewards --seeds 0 1     some seeds
    python tools/reward_models.py --out runs/rewards --table         print the tables of what is there

Each seed has its own SFT model, prompts and annotators. All reward models of a seed learn from the same judgements and
choose among the same answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch

from frontier import DEMO, run
from kilter import world
from kilter.data.chat import ChatEncoder
from kilter.models.build import policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.load import load_tokenizer
from kilter.models.sampling import Sampling
from kilter.records import Prompt, Sample
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rollout.collect import collect
from kilter.rundir import write_json
from kilter.scorers import load_reward_scorer
from kilter.stats import mean_interval, paired_difference

NOISE = 0.25
DRAWN, BEST_OF = 24, 12
LORA = {"rank": 16, "alpha": 32.0}
ADAPTER_RATE = 3e-3
HOW: tuple[dict[str, Any], ...] = (
    {"how": "mean"},
    {"how": "min"},
    {"how": "mean_minus_variance", "variance_coef": 0.5},
)


def reward(**more: Any) -> dict[str, Any]:
    """The demo's reward model, otherwise."""
    optim = DEMO["reward"]["optim"] | more.pop("optim", {})
    return DEMO["reward"] | {"optim": optim, "audit": {"prompts": 0}} | more


ENSEMBLES = {
    "one": {},
    "heads": {"heads": {"kind": "ensemble"}},
    "adapter": {"lora": LORA, "optim": {"learning_rate": ADAPTER_RATE}},
    "adapters": {
        "lora": LORA,
        "heads": {"kind": "ensemble", "own_adapters": True},
        "optim": {"learning_rate": ADAPTER_RATE},
    },
}


def answers(
    sft: str,
    seed: int,
    per_kind: int,
    kinds: tuple[str, ...] = world.KINDS,
    *,
    split: Literal["train", "held_out"] = "held_out",
    drawn: int = DRAWN,
) -> tuple[list[Prompt], list[list[str]]]:
    """Answers of the SFT model to held-out prompts, or to others, `drawn` each."""
    prompts = world.prompts(split=split, per_kind=per_kind, seed=seed, kinds=kinds)
    encoder = ChatEncoder(load_tokenizer(sft))
    found = collect(
        NativeSampler(policy_trunk(sft).eval(), "policy"),
        encoder,
        prompts,
        num_samples=drawn,
        sampling=Sampling(max_new_tokens=72),
        generator=torch.Generator().manual_seed(seed),
    )
    return prompts, [[one.text for one in row] for row in found]


def ensembles(out: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """True reward of best-of-n by reward models that learned from labels of which a quarter is turned round."""
    stages = {name: DEMO[name] for name in ("sft", "preferences")}
    noisy = {"path": "kilter.world:panel", "options": {"flip_rate": NOISE}}
    stages["preferences"] = DEMO["preferences"] | {"annotator": noisy}
    stages |= {name: reward(**more) for name, more in ENSEMBLES.items()}
    done = run(out, "ensembles", seed, stages)
    places = {name: str(done.stage(at, name).result.resolve()) for at, name in enumerate(stages, 1)}
    prompts, texts = answers(places["sft"], seed, per_kind)
    samples = [Sample(prompt.prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    true = rows_of(world.true_reward().score(samples))
    found = {}
    for name in ENSEMBLES:
        for how in HOW if "heads" in ENSEMBLES[name] else HOW[:1]:
            scores = load_reward_scorer(places[name], combine=how).score(samples)
            (point,) = best_of_n_curve(rows_of(scores), true, ns=[BEST_OF])
            assert point.gold is not None
            found[f"{name} {how['how']}"] = point.gold.to_dict()
        figures = json.loads((done.stage(list(stages).index(name) + 1, name).path / "done.json").read_text())
        found[f"{name} accuracy"] = figures["accuracy"]
    found["mean of answers"] = mean_interval(np.array(true).ravel()).to_dict()
    return found


GROUP_BIAS = 2.0


def groups(out: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """Accuracy for careful people of each group on prompts about which they disagree: one head for all, or one each."""
    society = {"path": "kilter.world:society", "options": {"group_bias": GROUP_BIAS}}
    asked = {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": 700, "kinds": ["opinion"]}}
    stages: dict[str, Any] = {name: DEMO[name] for name in ("sft", "preferences")}
    stages["preferences"] = DEMO["preferences"] | {"annotator": society, "prompts": asked}
    stages["preferences"].pop("truth")
    stages |= {"one": reward(), "groups": reward(heads={"kind": "groups"})}
    for name in ("one", "groups"):
        stages[name].pop("truth")
    done = run(out, "groups", seed, stages)
    places = {name: str(done.stage(at, name).result.resolve()) for at, name in enumerate(stages, 1)}
    prompts, texts = answers(places["sft"], seed, 4 * per_kind, kinds=("opinion",))
    unique = [list(dict.fromkeys(row)) for row in texts]
    judged = world.society(noise=0.0, tie_rate=0.0, side_bias=0.0, group_bias=GROUP_BIAS).rank(prompts, unique)
    found: dict[str, Any] = {}
    for name in ("one", "groups"):
        scorer = load_reward_scorer(places[name])
        right: dict[str, list[float]] = {}
        for one in judged:
            scores = scorer.score([Sample(one.prompt, text) for text in one.responses])
            values = [score.parts.get(one.group, score.value) for score in scores]
            right.setdefault(one.group, []).extend(ordered(values, [-rank for rank in one.ranks]))
        found[name] = {group: mean_interval(values).to_dict() for group, values in right.items()}
        found[f"{name} worst"] = min(value["mean"] for value in found[name].values())
    return found


LENGTH_BIAS = 0.05
LENGTHS = {
    "one": {},
    "length": {"heads": {"kind": "length"}},
}


def lengths(out: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """How far rewards go with length among answers to a prompt, and how often they order two as the truth does."""
    stages: dict[str, Any] = {name: DEMO[name] for name in ("sft", "preferences")}
    liking = {"path": "kilter.world:panel", "options": {"length_bias": LENGTH_BIAS}}
    stages["preferences"] = DEMO["preferences"] | {"annotator": liking}
    names = {name: name.replace(" ", "_") for name in LENGTHS}
    stages |= {names[name]: reward(**more) for name, more in LENGTHS.items()}
    done = run(out, "lengths", seed, stages)
    places = {name: str(done.stage(at, name).result.resolve()) for at, name in enumerate(stages, 1)}
    prompts, texts = answers(places["sft"], seed, per_kind)
    encoder = ChatEncoder(load_tokenizer(places["sft"]))
    samples = [Sample(prompt.prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    size = np.array([len(encoder.response(one.messages, one.text)) for one in samples], dtype=float)
    judges = {"truth": world.true_reward()} | {name: load_reward_scorer(places[at]) for name, at in names.items()}
    values = {name: np.array(rows_of(judge.score(samples))) for name, judge in judges.items()}
    found: dict[str, Any] = {}
    for name, rows in values.items():
        within = [table - table.mean(1, keepdims=True) for table in (rows, size.reshape(rows.shape))]
        found[name] = {
            "within": float(np.corrcoef(*[table.ravel() for table in within])[0, 1]),
            "over all": float(np.corrcoef(rows.ravel(), size)[0, 1]),
            "accuracy": float(
                np.mean([hit for row, true in zip(rows, values["truth"], strict=True) for hit in ordered(row, true)])
            ),
        }
    for name, place in names.items():
        figures = json.loads((done.stage(list(stages).index(place) + 1, place).path / "done.json").read_text())
        found[name]["held out"] = figures["held_out/rewards/length_correlation"]
        found[name]["held out accuracy"] = figures["accuracy"]["mean"]
        found[name]["held out on labels"] = figures["accuracy_on_labels"]["mean"]
    return found


def ordered(values: Any, true: Any) -> list[float]:
    """Of each two that differ in truth, 1 where they are ordered so and 0 where not."""
    return [
        float((values[one] - values[other]) * (true[one] - true[other]) > 0)
        for one in range(len(true))
        for other in range(one)
        if true[one] != true[other]
    ]


def rows_of(scores: Any) -> list[list[float]]:
    """Scores prompt by prompt, `DRAWN` each; an answer that cannot be scored gets the lowest score of all."""
    values = [score.value for score in scores]
    low = min(value for value in values if value is not None)
    filled = [low if value is None else value for value in values]
    return [filled[at : at + DRAWN] for at in range(0, len(filled), DRAWN)]


STARTS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "base": {"model": "kilter.world:MODEL_PATH"},
    "random": {"start": "random"},
}


def starts(out: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """How often reward models of the same data order two answers as the truth does, by what they started from."""
    stages: dict[str, Any] = {name: DEMO[name] for name in ("sft", "preferences")}
    stages |= {f"from_{name.lower()}": reward(**more) for name, more in STARTS.items()}
    done = run(out, "starts", seed, stages)
    prompts, texts = answers(str(done.stage(1, "sft").result), seed, per_kind)
    samples = [Sample(prompt.prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    true = rows_of(world.true_reward().score(samples))
    found = {}
    for at, name in enumerate(STARTS, 3):
        scores = rows_of(load_reward_scorer(done.stage(at, f"from_{name.lower()}").result).score(samples))
        hits = [fmean(ordered(*pair)) for pair in zip(scores, true, strict=True) if len(set(pair[1])) > 1]
        found[name] = mean_interval(hits).to_dict()
    return found


MEASURES = {"ensembles": ensembles, "groups": groups, "lengths": lengths, "starts": starts}


def tables(out: Path) -> str:
    """Markdown: each figure as its mean over seeds with a 95% t interval, and the differences seed by seed."""
    held: dict[str, list[dict[str, Any]]] = {
        name: [json.loads(file.read_text()) for file in sorted(out.glob(f"seed-*/{name}.json"))] for name in MEASURES
    }
    lines = [
        f"| chooses the best of {BEST_OF} | true reward | over one model | over one adapter |",
        "|---|---|---|---|",
    ]
    for name in [key for key in held["ensembles"][0] if not key.endswith("accuracy")]:
        rows = [[found[key]["mean"] for found in held["ensembles"]] for key in (name, "one mean", "adapter mean")]
        over = " | ".join("" if rows[0] == other else _signed(rows[0], other) for other in rows[1:])
        lines.append(f"| {name} | {_figure(rows[0])} | {over} |")
    lines += ["", "| groups | worst group's accuracy |", "|---|---|"]
    one, own = ([found[f"{name} worst"] for found in held["groups"]] for name in ("one", "groups"))
    lines += [
        f"| one head | {_figure(one)} |",
        f"| a head each | {_figure(own)} |",
        f"| difference | {_signed(own, one)} |",
    ]
    lines += [
        "",
        "| length | correlation, held out | accuracy, held out | on the annotators' labels |",
        "|---|---|---|---|",
    ]
    for name in LENGTHS:
        columns = [[found[name][key] for found in held["lengths"]] for key in LENGTH_COLUMNS]
        lines.append(f"| {name} | {' | '.join(map(_figure, columns))} |")
    lines += ["", "| start | accuracy |", "|---|---|"]
    for name in STARTS if held["starts"] else ():
        lines.append(f"| {name} | {_figure([found[name]['mean'] for found in held['starts']])} |")
    return "\n".join(lines)


LENGTH_COLUMNS = ("held out", "held out accuracy", "held out on labels")


def _figure(values: Sequence[float]) -> str:
    found = mean_interval(values)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _signed(values: Sequence[float], others: Sequence[float]) -> str:
    found = paired_difference(values, others)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--per-kind", type=int, default=40)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(tables(options.out))
        return
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.measure:
            file = options.out / f"seed-{seed}" / f"{name}.json"
            if not file.exists():
                write_json(file, MEASURES[name](options.out, seed, options.per_kind))
            print(f"seed {seed}, {name}: {json.dumps(json.loads(file.read_text()), indent=1)}", flush=True)


if __name__ == "__main__":
    main()
