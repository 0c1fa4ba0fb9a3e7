"""What heads are worth: ensembles under label noise, a head for each group of people, a head apart from length.

    python tools/reward_models.py --out runs/rewards                 measure what is not measured yet; resumable
    python tools/reward_models.py --out runs/rewards --seeds 0 1     some seeds

Each seed has its own SFT model, prompts and annotators. All reward models of a seed learn from the same judgements and
choose among the same answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frontier import DEMO, run
from kilter import world
from kilter.data.chat import ChatEncoder
from kilter.models.build import policy_trunk
from kilter.models.generation import Sampling
from kilter.models.load import load_tokenizer
from kilter.records import Prompt, Sample
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rollout.collect import collect
from kilter.rundir import write_json
from kilter.scorers import load_reward_scorer
from kilter.stats import mean_interval

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
    return DEMO["reward"] | {"optim": optim} | more


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
    sft: str, seed: int, per_kind: int, kinds: tuple[str, ...] = world.KINDS
) -> tuple[list[Prompt], list[list[str]]]:
    """Answers of the SFT model to held-out prompts, `DRAWN` each."""
    prompts = world.prompts(split="held_out", per_kind=per_kind, seed=seed, kinds=kinds)
    encoder = ChatEncoder(load_tokenizer(sft))
    drawn = collect(
        policy_trunk(sft).eval(),
        "policy",
        encoder,
        prompts,
        num_samples=DRAWN,
        sampling=Sampling(max_new_tokens=72),
        generator=torch.Generator().manual_seed(seed),
        batch_size=256,
    )
    return prompts, [[one.text for one in row] for row in drawn]


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
    true = _rows(world.true_reward().score(samples))
    found = {}
    for name in ENSEMBLES:
        for how in HOW if "heads" in ENSEMBLES[name] else HOW[:1]:
            scores = load_reward_scorer(places[name], combine=how).score(samples)
            (point,) = best_of_n_curve(_rows(scores), true, ns=[BEST_OF])
            assert point.gold is not None
            found[f"{name} {how['how']}"] = point.gold.to_dict()
        figures = json.loads((done.stage(list(stages).index(name) + 1, name).path / "done.json").read_text())
        found[f"{name} accuracy"] = figures.get("accuracy", figures)
    found["mean of answers"] = mean_interval(np.array(true).ravel()).to_dict()
    return found


def groups(out: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """Accuracy for each group's people, careful ones, on prompts that are theirs to decide."""
    stages: dict[str, Any] = {name: DEMO[name] for name in ("sft", "preferences")}
    stages["preferences"] = DEMO["preferences"] | {"annotator": "kilter.world:society"}
    stages["preferences"].pop("truth")
    stages |= {"one": reward(epochs=1), "groups": reward(epochs=1, heads={"kind": "groups"})}
    for name in ("one", "groups"):
        stages[name].pop("truth")
    done = run(out, "groups", seed, stages)
    places = {name: str(done.stage(at, name).result.resolve()) for at, name in enumerate(stages, 1)}
    prompts, texts = answers(places["sft"], seed, 4 * per_kind, kinds=("opinion",))
    unique = [list(dict.fromkeys(row)) for row in texts]
    judged = world.society(noise=0.0, tie_rate=0.0, side_bias=0.0).rank(prompts, unique)
    found: dict[str, Any] = {}
    for name in ("one", "groups"):
        scorer = load_reward_scorer(places[name])
        right: dict[str, list[float]] = {}
        for one in judged:
            scores = scorer.score([Sample(one.prompt, text) for text in one.responses])
            values = [score.parts.get(one.group, score.value) for score in scores]
            right.setdefault(one.group, []).extend(_right(values, [-rank for rank in one.ranks]))
        found[name] = {group: mean_interval(values).to_dict() for group, values in right.items()}
        found[f"{name} worst"] = min(value["mean"] for value in found[name].values())
    return found


LENGTH_BIAS = 0.05
LENGTHS = {
    "one": {},
    "length": {"heads": {"kind": "length"}},
    "length 3": {"heads": {"kind": "length", "length_coef": 3.0}},
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
    values = {name: np.array(_rows(judge.score(samples))) for name, judge in judges.items()}
    found = {}
    for name, rows in values.items():
        within = [table - table.mean(1, keepdims=True) for table in (rows, size.reshape(rows.shape))]
        found[name] = {
            "within": float(np.corrcoef(*[table.ravel() for table in within])[0, 1]),
            "over all": float(np.corrcoef(rows.ravel(), size)[0, 1]),
            "accuracy": float(
                np.mean([hit for row, true in zip(rows, values["truth"], strict=True) for hit in _right(row, true)])
            ),
        }
    return found


def _right(values: Any, true: Any) -> list[float]:
    """Of each two that differ in truth, whether they are ordered so."""
    return [
        float((values[one] - values[other]) * (true[one] - true[other]) > 0)
        for one in range(len(true))
        for other in range(one)
        if true[one] != true[other]
    ]


def _rows(scores: Any) -> list[list[float]]:
    values = [score.value for score in scores]
    low = min(value for value in values if value is not None)
    filled = [low if value is None else value for value in values]
    return [filled[at : at + DRAWN] for at in range(0, len(filled), DRAWN)]


MEASURES = {"ensembles": ensembles, "groups": groups, "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--per-kind", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.measure:
            file = options.out / f"seed-{seed}" / f"{name}.json"
            if not file.exists():
                write_json(file, MEASURES[name](options.out, seed, options.per_kind))
            print(f"seed {seed}, {name}: {json.dumps(json.loads(file.read_text()), indent=1)}", flush=True)


if __name__ == "__main__":
    main()
