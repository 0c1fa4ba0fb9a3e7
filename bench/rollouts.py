"""Sampling beside `model.generate` of transformers: the same prompts, n = 4 answers each, the same lengths, in turn.

    python bench/rollouts.py [--size 4m] [--prompts 16] [--rounds 5] [--cores 1]

Prompts and answers have the lengths of HH-RLHF where shared/ is beside the checkout, else the world's; the tokens are
random, the model has the shape named and random weights. Every answer ends at its own preset length, because a random
model never ends one. Both take the likeliest token, and in float32 the tokens must be the same before a time is told.
Ways: `kilter` and `generate` in float32, and each in bfloat16 where the processor has it. `generate` has all rows in
one batch, padded on the left, each prompt four times, as TRL's trainers call it. Where vLLM is installed (its build for
CPUs has an environment of its own), `vllm` too: in this process, on the same cores.

Printed are medians over the rounds and their ratios, the tokens a second, and the largest difference between the
log-probs of sampling and of training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from kilter.models.build import policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling, Stops, draw_seeds
from kilter.models.trunk import Trunk
from kilter.models.vllm_sampler import has_vllm
from kilter.train.reference import with_reference
from kilter.tree import Group, Response
from preferences import MAX_TOKENS, PAD, SIZES, has_bfloat16, lengths, model_of

SAMPLES = 4
Way = Callable[[list[list[int]]], list[list[int]]]


def kilter_way(trunk: Trunk, limits: torch.Tensor) -> Way:
    sampler = NativeSampler(trunk, "policy", batch_size=limits.numel())
    seeds = draw_seeds(torch.Generator().manual_seed(0), *limits.shape)
    sampling = Sampling(temperature=0.0, max_new_tokens=int(limits.max()))

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        drawn = sampler.sample(prompts, seeds, sampling=sampling, stops=Stops(()), limits=limits)
        return [list(one.ids) for row in drawn for one in row]

    return answer


def generate_way(model: Any, limits: torch.Tensor) -> Way:
    def answer(prompts: list[list[int]]) -> list[list[int]]:
        rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
        width = max(len(row) for row in rows)

        def ended(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            return ids.shape[1] - width >= limits.flatten()

        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=int(limits.max()),
            eos_token_id=None,
            pad_token_id=PAD,
            stopping_criteria=transformers.StoppingCriteriaList([ended]),
        )
        return [row[width : width + limit] for row, limit in zip(out.tolist(), limits.flatten().tolist(), strict=True)]

    return answer


def vllm_way(model: Any, limits: torch.Tensor, dtype: str, cores: int) -> Way:
    """By its engine alone: what a training run adds, sending the weights, is no part of it."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = vllm.LLM(
            model=folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=2 * MAX_TOKENS, disable_log_stats=True
        )

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        engine.reset_prefix_cache()  # or the second round would find the prompts of the first
        asked = [
            vllm.SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True, detokenize=False)
            for limit in limits.flatten().tolist()
        ]
        rows: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(SAMPLES)]
        return [list(one.outputs[0].token_ids) for one in engine.generate(rows, asked, use_tqdm=False)]

    return answer


def sampler_gap(trunk: Trunk, prompts: list[list[int]], limits: torch.Tensor) -> float:
    """Largest difference of a sampled token's log-prob between sampling and the trainer's packed forward, nats."""
    sampler = NativeSampler(trunk, "policy", batch_size=limits.numel())
    seeds = draw_seeds(torch.Generator().manual_seed(0), *limits.shape)
    sampling = Sampling(max_new_tokens=int(limits.max()))
    drawn = sampler.sample(prompts, seeds, sampling=sampling, stops=Stops(()), limits=limits)
    groups = [
        Group(tuple(prompt), tuple(Response(one.ids) for one in row))
        for prompt, row in zip(prompts, drawn, strict=True)
    ]
    trained = with_reference(trunk, groups, role="policy", pad_id=PAD, name="logprobs")
    return max(
        float((torch.tensor(one.logprobs) - response.per_token["logprobs"]).abs().max())
        for row, group in zip(drawn, trained, strict=True)
        for one, response in zip(row, group.responses, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="4m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--ways", nargs="*", help="default: all that this processor has")
    parser.add_argument("--quick", action="store_true", help="the same greedy tokens at 4m, no times")
    parser.add_argument("--out", type=Path, help="append the figures to this JSON-lines file")
    options = parser.parse_args()
    if options.ways and "kilter" not in options.ways:
        parser.error(f"--ways is {' '.join(options.ways)}; name kilter too, whose greedy tokens the others must give")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    os.sched_setaffinity(0, set(range(options.cores)))
    torch.set_num_threads(options.cores)
    if options.quick:
        options.size, options.rounds, options.prompts, options.ways = "4m", 0, 4, ["kilter", "generate"]
    size = SIZES[options.size]
    drawn = lengths(options.prompts, SAMPLES)
    rng = random.Random(2)
    prompts = [[rng.randrange(2, size.vocab) for _ in range(row[0])] for row in drawn]
    limits = torch.tensor([row[1:] for row in drawn])
    ways: dict[str, Way] = {}
    trunks: dict[str, Trunk] = {}
    for name in ["float32", *(["bfloat16"] if has_bfloat16() else [])]:
        low = name == "bfloat16"
        suffix = "-bf16" if low else ""
        trunks[name] = policy_trunk(model_of(size, 0), compute_dtype=torch.bfloat16 if low else None)
        ways[f"kilter{suffix}"] = kilter_way(trunks[name], limits)
        plain = model_of(size, 0).eval()
        if has_vllm() and (not options.ways or f"vllm{suffix}" in options.ways):
            ways[f"vllm{suffix}"] = vllm_way(plain, limits, name, options.cores)
        ways[f"generate{suffix}"] = generate_way(plain.to(torch.bfloat16) if low else plain, limits)
    ways = {name: way for name, way in ways.items() if not options.ways or name in options.ways}
    tokens = {name: way(prompts) for name, way in ways.items()}
    if any(tokens[name] != tokens["kilter"] for name in ("generate", "vllm") if name in tokens):
        print("the greedy tokens differ in float32: nothing is compared")
        return 1
    print(f"{limits.numel()} answers, {int(limits.sum())} greedy tokens: the same in float32")
    if options.quick:
        return 0
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(prompts)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    for name, median in medians.items():
        over = ", ".join(f"{medians[other] / median:5.2f} of {other}" for other in medians if "kilter" not in other)
        print(f"{name:14} {median:8.3f} s, {int(limits.sum()) / median:7.0f} tokens/s; times as fast: {over}")
    gaps = {name: sampler_gap(trunk, prompts, limits) for name, trunk in trunks.items()}
    for name, gap in gaps.items():
        print(f"sampler against trainer, {name}: largest difference of a token's log-prob {gap:.2g} nats")
    if options.out:
        row = {"size": options.size, "prompts": options.prompts, "cores": options.cores, "rounds": options.rounds}
        row |= {"tokens": int(limits.sum()), "medians": medians, "gaps": gaps}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
