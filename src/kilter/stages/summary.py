"""summary.json: every figure of a run, machine-readable, each `{mean, low, high, n}` or null."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kilter.config import Claim, EvalStage, Recipe
from kilter.evals import Answer, by_kind, figures, win_rate
from kilter.records import prompt_id
from kilter.rundir import RunDir, StageDir, read_jsonl, versions, write_json
from kilter.stages.evaluate import Evaluation
from kilter.stats import Interval, mean_interval

Figures = dict[str, dict[str, Interval | None]]
AUDIT_LIMIT = 0.02
NOT_MEASURED = (
    "models above 135 million parameters: none was run",
    "people: labels come from simulated annotators unless the recipe names a file",
    "other seeds: one run is one seed",
)


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """All that the evaluation stage found, ready for done.json."""
    stage = evaluation.stage
    answers = {name: evaluation.model(name, value) for name, value in stage.models.items()}
    found: dict[str, Any] = {}
    if stage.demonstrations.path:
        answers["demonstrations"] = evaluation.demonstrations()
        found["demonstrators"] = _demonstrators(answers["demonstrations"])
    if stage.oracle.path:
        oracle = [answer.true_reward for answer in evaluation.oracle() if answer.true_reward is not None]
        found.setdefault("demonstrators", {})["oracle"] = statistics.fmean(oracle)
    reference = next((name for name, value in stage.models.items() if value == stage.reference), None)
    models: Figures = {}
    for name, own in answers.items():
        models[name] = figures(own)
        if reference is not None:
            models[name]["win_rate_vs_sft"] = win_rate(own, answers[reference]) if name != "demonstrations" else None
    found["models"] = {name: {key: plain(value) for key, value in own.items()} for name, own in models.items()}
    found["by_kind"] = {
        name: {kind: {key: plain(value) for key, value in own.items()} for kind, own in by_kind(rows).items()}
        for name, rows in answers.items()
    }
    found["claims"] = [check(claim, answers) for claim in stage.claims]
    return found


def check(claim: Claim, answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Does the claim hold of the answers? None: it could not be measured."""
    return held(claim, *(values_of(answers, address) if address else {} for address in (claim.left, claim.right)))


def held(claim: Claim, left: Mapping[Any, float], right: Mapping[Any, float]) -> dict[str, Any]:
    """Does the claim hold of what was measured, by prompt or by what else pairs them? None: it was not measured."""
    values = list(left.values())
    if claim.right and claim.paired:
        values = [value - right[key] for key, value in left.items() if key in right]
    if not values or (claim.right and not right):
        return {"claim": claim.text, "held": None, "figure": None}
    interval = mean_interval(values)
    if claim.right and not claim.paired:
        less = statistics.fmean(right.values())
        interval = Interval(interval.mean - less, interval.low - less, interval.high - less, interval.n)
    holds = (claim.above is None or interval.low > claim.above) and (
        claim.below is None or interval.high <= claim.below
    )
    return {"claim": claim.text, "held": holds, "figure": plain(interval)}


def values_of(answers: Mapping[str, Sequence[Answer]], address: str) -> dict[str, float]:
    """Prompt -> value of `model.metric`, for the prompts where it was measured."""
    model, _, metric = address.partition(".")
    found = {}
    for answer in answers.get(model, ()):
        value = getattr(answer, metric, None) if metric in Answer.__slots__ else answer.flags.get(metric)
        if value is not None:
            found[prompt_id(answer.prompt.prompt)] = float(value)
    return found


def _demonstrators(answers: Sequence[Answer]) -> dict[str, Any]:
    rated = sorted(answer.true_reward for answer in answers if answer.true_reward is not None)
    if not rated:
        return {}
    best = rated[-max(1, len(rated) // 10) :]
    return {"true_reward": {**(plain(mean_interval(rated)) or {}), "best_tenth": statistics.fmean(best)}}


def plain(interval: Interval | None) -> dict[str, Any] | None:
    """As JSON."""
    return None if interval is None else interval.to_dict()


def write_summary(run: RunDir, recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> None:
    """Gather what every stage said."""
    evaluation = next((done[name] for name, stage in recipe.stages.items() if isinstance(stage, EvalStage)), {})
    reward = next((done[name] for name, stage in recipe.stages.items() if stage.stage == "reward"), {})
    checks = [
        {
            "name": f"both-ways check, {name}",
            "verdict": "passed",
            "value": figures["both_ways_gap"],
            "rule": "packed log-probs equal those of the untouched model, nats",
        }
        for name, figures in done.items()
        if "both_ways_gap" in figures
    ]
    checks += [
        {
            "name": f"audit of the reward model, {name}",
            "verdict": "not measured" if "passed" not in told else "passed" if told["passed"] else "failed",
            "value": ", ".join(told.get("failed", ())) or told.get("not_audited", ""),
            "rule": "no property beside quality is surely worth more than its threshold",
        }
        for name, told in ((name, figures["audit"]) for name, figures in done.items() if "audit" in figures)
    ]
    checks += _audited(evaluation.get("models", {}))
    parameters = next((figures["parameters"] for figures in done.values() if "parameters" in figures), None)
    summary = {
        "name": recipe.name,
        "world": recipe.world,
        "seed": recipe.seed,
        "versions": versions(),
        "model": {"name": _base(recipe), "parameters": parameters},
        "timings": {name: figures["seconds"] for name, figures in done.items()},
        "models": evaluation.get("models", {}),
        "by_kind": evaluation.get("by_kind", {}),
        "reward_model": {key: reward[key] for key in ("accuracy", "accuracy_on_labels") if key in reward},
        "demonstrators": evaluation.get("demonstrators", {}),
        "checks": checks,
        "claims": evaluation.get("claims", []),
        "not_measured": list(NOT_MEASURED),
        "work": {name: _work(run.stage(at, name), done[name]) for at, name in enumerate(recipe.stages, 1)},
        "stages": {name: _short(figures) for name, figures in done.items()},
    }
    write_json(run.path / "summary.json", summary)


def _audited(models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The truth audit on the answers of this run, of the model in which a second judge rejects most."""
    found = {name: figures["audit_rejects"] for name, figures in models.items() if figures.get("audit_rejects")}
    if not found:
        return []
    worst = max(found, key=lambda name: float(found[name]["mean"]))
    return [
        {
            "name": f"truth audit, worst of {len(found)} models: {worst}",
            "verdict": "passed" if found[worst]["mean"] < AUDIT_LIMIT else "failed",
            "value": found[worst],
            "rule": f"of what the truth likes, a second, stricter judge rejects less than {AUDIT_LIMIT:.0%}",
        }
    ]


def _work(stage: StageDir, figures: Mapping[str, Any]) -> dict[str, float]:
    """Tokens that a stage trained on and sampled: what a larger model would have to work through."""
    rows = read_jsonl(stage.metrics)
    sampled = sum(row["rollout/samples"] * row["rollout/length"] for row in rows if "rollout/samples" in row)
    return {
        "trained_tokens": sum(row.get("tokens") or 0.0 for row in rows),
        "sampled_tokens": sampled + figures.get("sampled_tokens", 0),
        "scored_tokens": sampled,
    }


def _base(recipe: Recipe) -> str:
    return next((stage.model for stage in recipe.stages.values() if hasattr(stage, "model")), "")


def _short(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in ("models", "by_kind", "claims", "demonstrators")}
