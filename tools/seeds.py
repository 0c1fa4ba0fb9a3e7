"""Runs the demo under several seeds and prints, for each, which of its claims hold. Resumable; long; never in CI.

python tools/seeds.py --seeds 0 1 2 3 4 --out runs/seeds [-- options of `kilter demo`]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def figure(summary: dict[str, Any], model: str, metric: str) -> float | None:
    """The mean of one figure, or None."""
    found = summary["models"].get(model, {}).get(metric)
    return None if found is None else float(found["mean"])


def gap_closed(summary: dict[str, Any], model: str) -> float | None:
    """Share of the way from SFT to the oracle answer in true reward."""
    sft, reached = figure(summary, "sft", "true_reward"), figure(summary, model, "true_reward")
    oracle = summary["demonstrators"].get("oracle")
    return None if sft is None or reached is None or oracle is None else (reached - sft) / (oracle - sft)


def main() -> int:
    """Exit 0 when every claim holds under every seed and the reward model reaches 75% everywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("rest", nargs="*", help="options of `kilter demo`, after --")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0
    for seed in options.seeds:
        run = options.out / str(seed)
        words = [sys.executable, "-m", "kilter.cli", "demo", "--seed", str(seed), "--out", str(run), *options.rest]
        begun = time.monotonic()
        with subprocess.Popen(words) as demo:
            try:
                if demo.wait():
                    return demo.returncode
            finally:
                demo.terminate()  # whatever ends this tool ends the run too; it goes on with the next call
        wall = time.monotonic() - begun
        summary = json.loads((run / "summary.json").read_text())
        accuracy = summary["reward_model"]["accuracy"]
        print(
            f"seed {seed}: reward model orders {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        )
        failed += accuracy["mean"] < 0.75
        for name in ("base", "sft", "best_of_n", "dpo", "ppo", "ppo_without_kl"):
            closed = gap_closed(summary, name)
            values = [(metric, figure(summary, name, metric)) for metric in ("true_reward", "proxy_reward", "kl")]
            told = "  ".join(f"{metric} {value:.3f}" for metric, value in values if value is not None)
            print(f"  {name:<16}{told}  gap closed {'-' if closed is None else format(closed, '.2f')}")
        for claim in summary["claims"]:
            failed += claim["held"] is not True
            print(f"  {'holds ' if claim['held'] else 'FAILS '} {claim['claim']}  {claim['figure']}")
        print(f"  {wall:.0f} s in this call; work: {summary['timings']}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
