"""What the trunk costs over the bare Hugging Face model: forward and backward on the same packed tokens, one thread.

    python bench/trunk.py [row_tokens]

Four ways, in turn, so that a busy machine slows all alike; the median of processor seconds is printed, and what of the
trunk's time goes into packing and mask.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch.nn import functional as F

from kilter.models.attention import AttentionKinds, attention_kinds, tree_masks
from kilter.models.build import policy_trunk
from kilter.tree import Group, Response, make_batches, unroll

ROUNDS = 9


def main(row_tokens: int = 512) -> None:
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    trunk = policy_trunk(model)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2048, (length,), generator=generator).tolist())

    groups = [Group(ids(30), (Response(ids(25)), Response(ids(20)))) for _ in range(24)]
    (batch,) = make_batches(groups, row_tokens=row_tokens, batch_tokens=1 << 20)
    tree = batch.tree
    kinds = attention_kinds(model)
    assert isinstance(kinds, AttentionKinds)
    mask = tree_masks(tree, kinds, torch.float32)
    alone = unroll(tree)

    def trunk_packed() -> None:
        trunk(tree, {"policy": "logprobs"})["policy"].sum().backward()

    def bare_packed() -> None:
        logits = model(tree.tokens, mask, tree.positions, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(logits[tree.source], tree.target, reduction="sum").backward()

    def bare_causal() -> None:
        logits = model(tree.tokens, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(logits[tree.source], tree.target, reduction="sum").backward()

    def bare_padded() -> None:
        logits = model(alone.tokens, (alone.segment >= 0).long(), use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(logits[alone.source], alone.target, reduction="sum").backward()

    ways: list[Callable[[], None]] = [trunk_packed, bare_packed, bare_causal, bare_padded]
    seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for _ in range(ROUNDS + 1):
        for way in ways:
            model.zero_grad()
            start = time.process_time()
            way()
            seconds[way.__name__].append(time.process_time() - start)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, tokens {tuple(tree.tokens.shape)}, N {len(tree.source)}")
    for name, rows in seconds.items():
        print(f"{name:14} {1e3 * statistics.median(rows[1:]):7.1f} ms")
    start = time.process_time()
    for _ in range(20):
        make_batches(groups, row_tokens=row_tokens, batch_tokens=1 << 20)
    packed = time.process_time()
    for _ in range(20):
        tree_masks(tree, kinds, torch.float32)
    print(f"packing {50 * (packed - start):.2f} ms, mask {50 * (time.process_time() - packed):.2f} ms")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
