"""Every cause is named from figures in which it alone is wrong, and none from those of a healthy stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kilter.guard import CAUSES, Course, causes, in_words, why

RL: dict[str, float] = {
    "rollout/samples": 100.0,
    "rollout/paid_score_sem": 0.1,
    "rollout/kl_coef": 0.1,
    "rollout/kl_k1": 2.0,
    "rollout/kl_k1_sem": 0.2,
    "rollout/length": 10.0,
    "policy/approx_kl": 0.02,
    "policy/clip_fraction": 0.05,
}
PAIRS: dict[str, float] = {
    "rewards/accuracy": 0.7,
    "rewards/margin": 0.6,
    "displacement/chosen": -0.5,
    "displacement/rejected": -2.5,
    "grad_norm": 2.0,
}
OPTIONS = {"optim": {"max_grad_norm": 1.0, "batch_size": 64}}


def sampled(rollouts: int = 9, **changes: float) -> Course:
    """A stage of four steps a rollout."""
    row = RL | {
        ("policy/" if name in ("approx_kl", "clip_fraction") else "rollout/") + name: changes[name] for name in changes
    }
    return Course({}, [row] * rollouts, [{"policy/approx_kl": 0.02}] * (4 * rollouts))


def compared(steps: int = 30, options: dict[str, Any] | None = None, **changes: float) -> Course:
    named = {name.replace("_", "/", 1) if name != "grad_norm" else name: value for name, value in changes.items()}
    return Course({"optim": OPTIONS["optim"] | (options or {})}, [], [PAIRS | named] * steps)


# What is wrong, the name of the likely cause, and its figure worked out by hand.
WRONG = {
    "pay varies little": (sampled(paid_score_sem=0.001), "reward scale low", 0.001 * 10),
    "pay varies much": (sampled(paid_score_sem=3.0), "reward scale high", 3.0 * 10),
    "a dear nat": (sampled(kl_coef=5.0), "KL coefficient high", 5.0 * 0.2 / 0.1),
    "a nat for nothing": (sampled(kl_coef=0.0, kl_k1=8.0), "KL coefficient low", 0.8),
    "large steps": (sampled(approx_kl=0.9, clip_fraction=0.3), "learning rate high", 0.9),
    "no way gone": (sampled(kl_k1=0.01), "learning rate low", 0.001),
    "cut short": (sampled(clip_fraction=0.4), "clip range low", 0.4),
    "never cut": (sampled(clip_fraction=0.0, approx_kl=0.1), "clip range high", 0.1),
    "few answers": (sampled(samples=8.0, paid_score_sem=0.4), "batch low", 8),
    "few rollouts": (sampled(2), "batch high", 8),
    "labels of chance": (compared(rewards_accuracy=0.51, rewards_margin=0.1), "reward scale low", 0.01),
    "satisfied at once": (
        compared(rewards_margin=30.0, displacement_chosen=0.1, displacement_rejected=-0.2),
        "KL coefficient high",
        30,
    ),
    "never satisfied": (
        compared(rewards_margin=0.02, displacement_chosen=-10.0, displacement_rejected=-20.0),
        "KL coefficient low",
        10,
    ),
    "far away": (
        compared(rewards_margin=20.0, displacement_chosen=-60.0, displacement_rejected=-90.0),
        "learning rate high",
        90,
    ),
    "hardly moved": (
        compared(rewards_margin=0.01, displacement_chosen=0.01, displacement_rejected=-0.02),
        "learning rate low",
        0.02,
    ),
    "gradient cut to nothing": (compared(options={"max_grad_norm": 1e-4}), "clip range low", 2 / 1e-4),
    "few pairs": (compared(options={"batch_size": 2}), "batch low", 2),
    "few steps": (compared(3), "batch high", 3),
}


@pytest.mark.parametrize("course", [sampled(), compared(), Course({}, [], []), Course({}, [], [{"loss": 1.0}])])
def test_a_healthy_stage_names_nothing(course: Course) -> None:
    assert causes(course) == []


@pytest.mark.parametrize("what", WRONG)
def test_the_number_that_is_wrong_is_named_first(what: str) -> None:
    course, name, figure = WRONG[what]
    first = causes(course)[0]
    assert (first.cause, first.figure) == (name, pytest.approx(figure))
    ratio = first.figure / first.limit
    assert first.times == pytest.approx(max(ratio, 1 / ratio)) and first.times > 1
    assert "{" not in first.says and first.remedy


def test_every_cause_is_seen_by_a_test() -> None:
    seen = {(causes(course)[0].cause, causes(course)[0].says[:12]) for course, _, _ in WRONG.values()}
    assert len(seen) == len(CAUSES) == len(WRONG)
    assert all("{figure" in one.says and "{" not in one.remedy for one in CAUSES)


def test_an_unusual_scale_is_not_told_as_a_dear_nat_too() -> None:
    assert [one.cause for one in causes(sampled(paid_score_sem=0.001))] == ["reward scale low"]


def test_a_stage_that_goes_on_is_not_said_to_have_taken_few_steps() -> None:
    assert causes(sampled(2)._replace(ended=False)) == [] == causes(compared(3)._replace(ended=False))


def test_why_names_it_with_what_to_try(tmp_path: Path) -> None:
    folder = tmp_path / "stages/01-dpo"
    folder.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("stages: {dpo: {optim: {batch_size: 2, max_grad_norm: 1.0}}}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(PAIRS) + "\n" for _ in range(30)))
    said = in_words(why(tmp_path))
    assert (
        "01-dpo:\n  most likely wrong: batch low (8.0 times beyond what is usual): a step learns from 2 prompts" in said
    )
    assert "try: raise optim.batch_size" in said
    (tmp_path / "recipe.yaml").write_text("{not a recipe")
    assert in_words(why(tmp_path)).startswith("No stage of this run sampled")
