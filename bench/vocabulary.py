"""What a larger vocabulary costs in memory: the peak of a DPO run less its weights, gradients and optimizer state.

    python bench/vocabulary.py [--vocabularies 49152 151936]

The body is that of the 30M model of bench/preferences.py, 8 pairs a step, micro-batches of 1,024 tokens, one process
for each vocabulary. Printed: the net peak above the loaded libraries, and how much the largest grows over the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from kilter.models.build import policy_trunk
from kilter.train import preferences
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.reference import with_reference
from kilter.tree import Group, Response, make_batches
from preferences import EOS, SIZES, lengths, model_of

PAIRS, STEPS = 8, 3
BUDGET = {"row_tokens": 1024, "batch_tokens": 1024}
MIB = 2**20


def peak() -> float:
    """Of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(vocabulary: int) -> dict[str, float]:
    """One run, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())

    groups = [
        Group(
            ids(prompt), tuple(Response((*ids(n), EOS), per_response={"rank": float(r)}) for r, n in enumerate(answers))
        )
        for prompt, *answers in lengths(PAIRS * STEPS, 2)
    ]
    libraries = peak()
    trunk = policy_trunk(model_of(SIZES["30m"]._replace(vocab=vocabulary), 0), reference=True)
    trunk.train_only("policy")
    parameters = sum(parameter.numel() for parameter in trunk.models["policy"].parameters())
    groups = with_reference(trunk, groups, **BUDGET)
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=1e-6))
    objective = preferences.preference("dpo")
    for at in range(0, len(groups), PAIRS):
        train_step(state, objective, make_batches(groups[at : at + PAIRS], **BUDGET))
    held = 5 * 4 * parameters / MIB  # float32: policy, its gradient, two moments, the reference
    return {"vocabulary": vocabulary, "peak": peak() - libraries, "held": held, "net": peak() - libraries - held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = []
    for vocabulary in options.vocabularies:
        words = [sys.executable, __file__, "--one", str(vocabulary)]
        rows.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print("{vocabulary:7,} words: peak {peak:,.0f} MiB, of it {held:,.0f} held, net {net:,.0f}".format(**rows[-1]))
    print(f"growth of the net peak: {rows[-1]['net'] / rows[0]['net'] - 1:.1%}")


if __name__ == "__main__":
    main()
