"""Is the length of a packed row free? The same pairs in rows of 256 to 8,192 tokens, one step each in turn.

    python bench/rows.py [--size 4m] [--rounds 7]

Prints the time of a distinct token for each length of row, over the shortest, and the ratio of the largest to the
smallest: 1 would be free. One thread on one pinned core; lengths and models are those of bench/preferences.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from kilter.models.build import policy_trunk
from kilter.train import preferences
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer
from kilter.tree import Group, Response, make_batches, size
from preferences import EOS, SIZES, lengths, model_of

ROWS = (256, 512, 1024, 2048, 4096, 8192)
PAIRS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="4m")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    shape = SIZES[options.size]
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, shape.vocab, (length,), generator=generator).tolist())

    groups = [
        Group(
            ids(prompt), tuple(Response((*ids(n), EOS), per_response={"rank": float(r)}) for r, n in enumerate(answers))
        )
        for prompt, *answers in lengths(PAIRS, 2)
        if prompt + sum(answers) < min(ROWS)  # every pair fits the shortest row
    ]
    tokens = sum(size(group) for group in groups)
    trunk = policy_trunk(model_of(shape, 0))
    objective = preferences.preference("simpo")
    trunk.train_only("policy")
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=1e-6))
    cut = {rows: make_batches(groups, row_tokens=rows, batch_tokens=8192) for rows in ROWS}
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(options.rounds + 1):
        for rows, batches in cut.items():
            start = time.perf_counter()
            train_step(state, objective, batches)
            seconds[rows].append(time.perf_counter() - start)
    medians = {rows: statistics.median(times[1:]) for rows, times in seconds.items()}
    print(f"{options.size}: {len(groups)} pairs, {tokens} distinct tokens")
    for rows, median in medians.items():
        shapes = ", ".join("x".join(map(str, batch.tree.tokens.shape)) for batch in cut[rows])
        print(f"rows of {rows:5}  {1e6 * median / tokens:7.1f} us a token, {median / medians[256]:.2f}  ({shapes})")
    print(f"largest over smallest: {max(medians.values()) / min(medians.values()):.2f}")


if __name__ == "__main__":
    main()
