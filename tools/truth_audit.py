"""Reinforcement learning straight on the true reward, without KL, and then the audit: does anything score that is bad?

    python tools/truth_audit.py --out runs/truth-audit [--seed 0]

A policy that is paid by the truth finds the holes in its parser. Those of its answers to held-out prompts that score
above 0.5 are read again by `kilter.world.audit`, which shares no code with it. Resumable; some minutes; never in CI.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import kilter
from kilter.evals import read_answers
from kilter.stages.summary import AUDIT_LIMIT
from kilter.stats import proportion
from kilter.world.audit import audit
from kilter.world.grammar import to_prompt


def recipe(seed: int) -> dict[str, Any]:
    """SFT, then PPO on the truth, then the answers to 200 held-out prompts of each kind."""
    optim = {"row_tokens": 128, "batch_size": 64, "learning_rate": 1e-3}
    sampling = {"max_new_tokens": 72}
    stages = {
        "sft": {
            "stage": "sft",
            "model": "kilter.world:MODEL_PATH",
            "data": {"path": "kilter.world:demonstrations", "options": {"per_kind": 100}},
            "epochs": 2,
            "optim": optim,
        },
        "ppo": {
            "stage": "rl",
            "model": "sft",
            "reward": "kilter.world:true_reward",
            "prompts": {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": 200}},
            "rollouts": 60,
            "prompts_per_rollout": 96,
            "num_samples": 4,
            "sampling": sampling,
            "policy": {"kl_coef": 0.0, "kl_controller": "fixed", "epochs": 2, "value_from": "policy"},
            "optim": {**optim, "learning_rate": 4e-4, "batch_tokens": 16384},
        },
        "evaluation": {
            "stage": "eval",
            "models": {"sft": "sft", "ppo": "ppo"},
            "reference": "sft",
            "prompts": {"path": "kilter.world:prompts", "options": {"split": "held_out", "per_kind": 200}},
            "truth": "kilter.world:true_reward",
            "measure": "kilter.world:measure",
            "sampling": sampling,
        },
    }
    return {"name": "truth-audit", "seed": seed, "world": "embedded world", "threads": 1, "stages": stages}


def main() -> int:
    """Exit 0 when the audit rejects fewer than 2% of the answers that truth scores above 0.5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/truth-audit"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kilter.align(recipe(options.seed), out=options.out)
    failed = False
    for name in ("sft", "ppo"):
        answers = read_answers(options.out / "evaluation" / f"{name}.jsonl")
        liked = [answer for answer in answers if answer.flags["audit_rejects"] is not None]
        rejected = [answer for answer in liked if answer.flags["audit_rejects"]]
        share = proportion(len(rejected), len(liked))
        mean = sum(answer.true_reward or 0.0 for answer in answers) / len(answers)
        print(
            f"{name}: true reward {mean:.3f}; of {len(liked)} answers above 0.5 the audit rejects {len(rejected)}, "
            f"{share.mean:.2%} [{share.low:.2%}, {share.high:.2%}]"
        )
        for answer in rejected[:10]:
            reason = audit(to_prompt(answer.prompt.prompt), answer.text).reason
            print(f"    {answer.true_reward:.2f}  {answer.text!r}: {reason}")
        failed = failed or share.mean >= AUDIT_LIMIT
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
