"""Kilter beside TRL 1.16.0, step by step on the same batches, one process each, in turn on one pinned core.

    python bench/preferences.py                              DPO at 4M parameters, some minutes
    python bench/preferences.py --method sft --size 30m --steps 12 --out bench.json
    python bench/preferences.py --quick                      the first step's losses alone, in float32: are they equal?

Ways: `kilter` (reference log-probs known, as from the cache), `kilter-live` (the reference in every step), `trl` at its
defaults, `trl-best` (no gradient checkpointing, reference known), `trl-grouped` (the same, batches of like lengths),
for SFT `trl-packed`. All but TRL's defaults compute in bfloat16 where the processor has it, or in float32 if asked.
Every way takes the same prompts in each step but the grouped one, which sorts them over the run. Both sides start from
the same weights, and the first step's losses must agree before anything is timed: to 1e-4 in float32, to 2e-3 in
bfloat16, whose rounding alone moves a loss by a thousandth. Lengths are those of HH-RLHF where shared/ is beside the
checkout, else the world's; the tokens are random, the model has the shape named and random weights.

Printed are medians over the steps, ratios of medians with TRL's ways above Kilter's, the peak of each process above its
loaded libraries, and what share of the best matrix rate at the model's own shapes Kilter reaches on distinct tokens.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "hh_rlhf"
MAX_TOKENS = 1024
PAD, EOS = 0, 1


class Size(NamedTuple):
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int


SIZES = {
    "4m": Size(2048, 256, 4, 4, 4, 688),
    "30m": Size(16384, 384, 13, 6, 6, 1024),
    "135m": Size(49152, 576, 30, 9, 3, 1536),
}
METHODS = ("dpo", "orpo", "simpo", "kto", "sft", "reward", "reward4")
WAYS = {
    "dpo": ["kilter", "kilter-live", "trl", "trl-best", "trl-grouped"],
    "sft": ["kilter", "trl", "trl-best", "trl-grouped", "trl-packed"],
}
Step = Callable[[int], float]


# Data ----------------------------------------------------------------------------------------------------------------


def lengths(count: int, responses: int) -> list[tuple[int, ...]]:
    """(prompt, responses) in words and signs, of conversations that people had."""
    found: list[tuple[int, ...]] = []

    def words(text: str) -> int:
        return max(1, len(re.findall(r"\w+|[^\w\s]", text)))

    for file in sorted(SHARED.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as rows:
            for row in map(json.loads, rows):
                chosen, rejected = row["chosen"], row["rejected"]
                cut = chosen.rfind("\n\nAssistant:") + len("\n\nAssistant:")
                if rejected[:cut] == chosen[:cut]:
                    found.append((words(chosen[:cut]), words(chosen[cut:]), words(rejected[cut:])))
    if not found:
        from kilter import world

        for record in world.demonstrations(per_kind=100):
            asked, answer = (
                " ".join(turn.content for turn in part) for part in (record.messages[:-1], record.messages[-1:])
            )
            found.append((words(asked), words(answer), words(answer)))
    rng = random.Random(0)
    rng.shuffle(found)
    kept = [row for row in found if row[0] + max(row[1:]) < MAX_TOKENS - 2]
    drawn = [kept[place % len(kept)] for place in range(count)]
    return [
        (row[0], *(rng.choice(kept)[1] if place > 1 else row[1 + place] for place in range(responses))) for row in drawn
    ]


def texts(size: Size, count: int, responses: int) -> list[tuple[str, ...]]:
    """Prompt and responses as words `w17` of a vocabulary in which each is one token."""
    rng = random.Random(1)
    rows = lengths(count, responses)
    return [tuple(" ".join(f"w{rng.randrange(2, size.vocab)}" for _ in range(n)) for n in row) for row in rows]


def tokenizer_of(size: Size) -> Any:
    import tokenizers
    import transformers

    vocab = {"<pad>": PAD, "<eos>": EOS} | {f"w{place}": place for place in range(2, size.vocab)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def model_of(size: Size, seed: int, kind: str = "LlamaForCausalLM", *, scale: float = 1.5) -> Any:
    """Random weights; two seeds disagree by 0.45 nats a token as they are drawn, by 0.67 at 1.5 times that."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=2 * MAX_TOKENS,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return model


# Kilter --------------------------------------------------------------------------------------------------------------


def kilter_step(method: str, way: str, size: Size, rows: list[tuple[str, ...]], per_step: int, low: bool) -> Step:
    import torch

    from kilter.models.build import policy_trunk, reward_trunk
    from kilter.models.roles import Role
    from kilter.train import objectives, preferences, rewards
    from kilter.train.loop import TrainState, train_step
    from kilter.train.optimizer import make_optimizer
    from kilter.train.preferences import Term
    from kilter.train.reference import with_reference
    from kilter.tree import Group, Response, make_batches

    tokenizer, scale = tokenizer_of(size), scale_of(low)
    dtype = torch.bfloat16 if low else None

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    def response(text: str, **numbers: float) -> Response:
        return Response((*ids(text), EOS), per_response=numbers)

    def groups_of(rows: list[tuple[str, ...]]) -> list[Group]:
        if method == "sft":
            return [Group(ids(prompt), (response(answer),)) for prompt, answer, *_ in rows]
        if method == "kto":  # as TRL borrows: the completion of the row before
            own = [
                response(answer, desirable=float(place % 2), mismatched=0.0)
                for place, (_, answer, *_) in enumerate(rows)
            ]
            borrowed = [
                Response(other.ids, per_response={**mine.per_response, "mismatched": 1.0})
                for mine, other in zip(own, own[-1:] + own[:-1], strict=True)
            ]
            return [Group(ids(row[0]), pair) for row, *pair in zip(rows, own, borrowed, strict=True)]
        return [
            Group(
                ids(prompt),
                tuple(response(answer, rank=float(rank), margin=0.0) for rank, answer in enumerate(answers)),
            )
            for prompt, *answers in rows
        ]

    if method.startswith("reward"):
        classifier = model_of(size, 0, "LlamaForSequenceClassification", scale=scale)
        generator = torch.Generator().manual_seed(0)
        trunk = reward_trunk(model_of(size, 0, scale=scale), generator=generator, compute_dtype=dtype)
        with torch.no_grad():
            trunk.heads["reward"].weight.copy_(classifier.score.weight)
        objective: Any = rewards.reward_model(centring_coef=0.0)
    else:
        trunk = policy_trunk(model_of(size, 0, scale=scale), compute_dtype=dtype)
        if method in ("dpo", "kto"):
            trunk.add_model("reference", model_of(size, 1, scale=scale).requires_grad_(False))
            trunk.add_role("reference", Role("reference"))
        objective = {
            "sft": lambda: objectives.sft(),
            "dpo": lambda: preferences.preference("dpo"),
            "kto": lambda: preferences.preference("kto"),
            "simpo": lambda: preferences.preference("simpo"),
            "orpo": lambda: preferences.mixture([Term("orpo", {"nll_coef": 0.0}), Term("nll")]),
        }[method]()
    trunk.train_only(*objective.roles)
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=1e-6))
    steps = [groups_of(rows[at : at + per_step]) for at in range(0, len(rows), per_step)]
    budget = {"row_tokens": 1024, "batch_tokens": 1024}
    needs_reference = method in ("dpo", "kto")
    if needs_reference and way == "kilter":
        steps = [with_reference(trunk, groups, **budget) for groups in steps]

    def step(place: int) -> float:
        groups = steps[place]
        if needs_reference and way == "kilter-live":
            groups = with_reference(trunk, groups, **budget)
        figures = train_step(state, objective, make_batches(groups, **budget))
        return figures["loss/orpo"] if method == "orpo" else figures["loss"]

    return step


# TRL -----------------------------------------------------------------------------------------------------------------


def trl_step(method: str, way: str, size: Size, rows: list[tuple[str, ...]], per_step: int, low: bool) -> Step:
    import datasets
    import torch
    import trl
    from torch.utils.data import DataLoader

    if way == "trl-grouped":
        rows = sorted(rows, key=lambda row: -max(len(row[0].split()) + len(answer.split()) for answer in row[1:]))
    pairs_each = 6 if method == "reward4" else 1
    options: dict[str, Any] = {
        "output_dir": "/nonexistent",
        "per_device_train_batch_size": per_step * pairs_each,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-6,
        "max_length": MAX_TOKENS,
        "disable_tqdm": True,
    }
    if way != "trl":
        options |= {"bf16": low, "gradient_checkpointing": False}
    tokenizer, scale = tokenizer_of(size), scale_of(low)
    if method == "sft":
        data = [{"prompt": prompt, "completion": " " + answer} for prompt, answer, *_ in rows]
    elif method == "kto":
        data = [
            {"prompt": prompt, "completion": " " + answer, "label": bool(place % 2)}
            for place, (prompt, answer, *_) in enumerate(rows)
        ]
    else:
        data = [
            {"prompt": prompt, "chosen": " " + answers[a], "rejected": " " + answers[b]}
            for prompt, *answers in rows
            for a in range(len(answers))
            for b in range(a + 1, len(answers))
        ]
    dataset = datasets.Dataset.from_list(data)
    common = {"train_dataset": dataset, "processing_class": tokenizer}
    kind = "LlamaForSequenceClassification" if method.startswith("reward") else "LlamaForCausalLM"
    model = model_of(size, 0, kind, scale=scale)
    if method == "dpo":
        known = {} if way == "trl" else {"precompute_ref_log_probs": True}
        trainer = trl.DPOTrainer(
            model, ref_model=model_of(size, 1, scale=scale).eval(), args=trl.DPOConfig(**options, **known), **common
        )
    elif method == "kto":
        known = {} if way == "trl" else {"precompute_ref_log_probs": True}
        trainer = trl.KTOTrainer(
            model, ref_model=model_of(size, 1, scale=scale).eval(), args=trl.KTOConfig(**options, **known), **common
        )
    elif method == "sft":
        packed = {"packing": True, "packing_strategy": "bfd"} if way == "trl-packed" else {}
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options, **packed), **common)
    elif method == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        loss = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
        trainer = CPOTrainer(model, CPOConfig(**options, **loss), **common)
    elif method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        trainer = ORPOTrainer(model, ORPOConfig(**options, beta=0.1), **common)
    else:
        options["center_rewards_coefficient"] = None
        trainer = trl.RewardTrainer(model, trl.RewardConfig(**options), **common)
    if way == "trl-packed":
        per_step = max(1, round(per_step * len(trainer.train_dataset) / len(rows)))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    loader = DataLoader(
        trainer.train_dataset, batch_size=per_step * pairs_each, shuffle=False, collate_fn=trainer.data_collator
    )
    batches = iter(loader)

    def step(_place: int) -> float:
        inputs = trainer._prepare_inputs(next(batches))
        loss = trainer.training_step(trainer.model, inputs)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if method == "orpo":  # the odds ratio's part: TRL counts the likelihood of prompts in the other
            return -0.1 * trainer._stored_metrics["train"]["log_odds_ratio"][-1]
        return float(loss)

    return step


def has_bfloat16() -> bool:
    from kilter.stages.training import processor_multiplies_in_bfloat16

    return processor_multiplies_in_bfloat16()


def scale_of(low: bool) -> float:
    """Of the weights: the larger they are, the more bfloat16 rounds, and the more a wrong loss stands out."""
    return 1.0 if low else 1.5


# One worker a way, and who asks them in turn -------------------------------------------------------------------------


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(options: argparse.Namespace) -> None:
    """A way of its own in a process of its own: a line in, a step, a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, set(range(options.cores)))
    import huggingface_hub.constants
    import torch
    import transformers

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(options.cores)
    transformers.utils.logging.disable_progress_bar()
    import datasets
    import peft
    import trl

    assert datasets and peft and trl  # both sides have loaded the same libraries
    size = SIZES[options.size]
    rows = texts(size, options.steps * options.batch, responses=4 if options.method == "reward4" else 2)
    loaded = peak_bytes()
    make = kilter_step if options.way.startswith("kilter") else trl_step
    step = make(options.method, options.way, size, rows, options.batch, not options.float32 and has_bfloat16())
    print("ready", file=answers, flush=True)
    for place, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        try:
            loss = step(place)
        except StopIteration:  # packed rows are fewer
            loss = float("nan")
        row = {"seconds": time.perf_counter() - start, "loss": loss, "bytes": peak_bytes() - loaded}
        print(json.dumps(row), file=answers, flush=True)


def rows_in_turn(options: argparse.Namespace, ways: list[str]) -> dict[str, list[dict[str, float]]]:
    """Every way's steps, one step each in turn."""
    workers = {}
    for way in ways:
        words = [sys.executable, __file__, "--work", "--way", way]
        words += [f"--{name}={getattr(options, name)}" for name in ("method", "size", "steps", "batch", "cores")]
        words += ["--float32"] if options.float32 else []
        log = subprocess.DEVNULL if not options.verbose else None
        workers[way] = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert workers[way].stdout.readline().strip() == "ready", f"{way} did not start: run with --verbose"
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for place in range(options.steps):
        for way, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            if not (told := worker.stdout.readline()):
                sys.exit(f"\n{way} ended in step {place + 1} with status {worker.wait()}; -9: memory was short")
            found[way].append(json.loads(told))
            print(f"\r{place + 1} of {options.steps}: {way:12}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return found


def matrix_rate(size: Size, tokens: int, cores: int, low: bool) -> float:
    """The best rate of products at the shapes of the model, flop/s: forward and both of the backward."""
    import torch

    os.sched_setaffinity(0, set(range(cores)))
    torch.set_num_threads(cores)
    dtype = torch.bfloat16 if low else torch.float32
    flops = seconds = 0.0
    shapes = [(size.hidden, size.hidden), (size.hidden, size.inner), (size.inner, size.hidden)]
    for rows, columns in shapes:
        x, w, y = (torch.randn(*of).to(dtype) for of in ((tokens, rows), (rows, columns), (tokens, columns)))
        for one, other in ((x, w), (y, w.T), (x.T, y)):
            times = []
            for _ in range(7):
                start = time.perf_counter()
                one @ other
                times.append(time.perf_counter() - start)
            flops += 2.0 * tokens * rows * columns
            seconds += min(times)
    return flops / seconds


def flops_of(size: Size, rows: list[tuple[int, ...]], method: str) -> float:
    """Least flops of training on these rows: 6 a parameter of the body and distinct token, 6 VH a scored token."""
    head = size.hidden // size.heads
    attention = 2 * size.hidden * size.hidden + 2 * size.hidden * head * size.kv_heads
    body = size.layers * (attention + 3 * size.hidden * size.inner)
    answers = [row[1:2] if method in ("sft", "kto") else row[1:] for row in rows]
    scored = sum(sum(row) + len(row) for row in answers)
    distinct = sum(row[0] for row in rows) + scored
    head_flops = 0 if method.startswith("reward") else 6.0 * size.vocab * size.hidden * scored
    return 6.0 * body * distinct + head_flops


def batches(rows: list[Any], per_step: int) -> Iterator[list[Any]]:
    for at in range(0, len(rows), per_step):
        yield rows[at : at + per_step]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="dpo")
    parser.add_argument("--size", choices=tuple(SIZES), default="4m")
    parser.add_argument("--ways", nargs="*", help="default: all that the method has")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="also where the processor has bfloat16")
    parser.add_argument("--out", type=Path, help="append the figures to this JSON-lines file")
    parser.add_argument("--quick", action="store_true", help="the first step's losses of every method at 4m, no times")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return 0
    if options.quick:
        options.steps, options.batch, options.float32 = 1, 4, True
        return max(compare(copy.copy(options), method) for method in METHODS)
    return compare(options, options.method)


def compare(options: argparse.Namespace, method: str) -> int:
    """Runs all ways of a method, holds their first losses together, prints and keeps the figures."""
    options.method = method
    ways = options.ways or WAYS.get(method, ["kilter", "trl", "trl-best", "trl-grouped"])
    if options.quick:
        ways = ["kilter", "trl-best"]
    low = not options.float32 and has_bfloat16()
    found = rows_in_turn(options, ways)
    first = found["kilter"][0]["loss"]
    for way in ways:
        if way in ("trl-grouped", "trl-packed"):
            continue  # other rows in its first step
        gap, bound = abs(found[way][0]["loss"] - first), 2e-3 if way == "trl" or low else 1e-4
        print(f"{method} {options.size} {way:12} first loss {found[way][0]['loss']:.6f}, {gap:.1e} from Kilter's")
        if gap > bound * max(1.0, abs(first)):
            print(f"the losses differ by more than {bound:g}: nothing is compared")
            return 1
    if options.quick:
        return 0
    medians = {
        way: statistics.median(row["seconds"] for row in rows[1:] if row["loss"] == row["loss"])
        for way, rows in found.items()
    }
    means = {
        way: statistics.fmean(row["seconds"] for row in rows[1:] if row["loss"] == row["loss"])
        for way, rows in found.items()
    }
    size = SIZES[options.size]
    drawn = lengths(options.steps * options.batch, 4 if method == "reward4" else 2)
    flops = statistics.median(flops_of(size, rows, method) for rows in list(batches(drawn, options.batch))[1:])
    tokens = round(statistics.fmean(sum(row) for row in drawn) * options.batch)
    share = flops / medians["kilter"] / matrix_rate(size, tokens, options.cores, low)
    for way, seconds in medians.items():
        peak = found[way][-1]["bytes"] / 2**20
        speed = f"{seconds:8.3f} s a step, {options.batch / seconds:7.1f} prompts/s"
        ratios = f"{seconds / medians['kilter']:5.2f} (of means {means[way] / means['kilter']:5.2f})"
        print(f"{way:12} {speed}, peak {peak:6.0f} MiB; time over Kilter's {ratios}")
    rate = "bfloat16" if low else "float32"
    print(f"Kilter's share of the best {rate} matrix rate at these shapes, distinct tokens: {share:.0%}")
    if options.out:
        row = {
            "method": method,
            "size": options.size,
            "cores": options.cores,
            "steps": options.steps,
            "batch": options.batch,
            "bfloat16": low,
            "medians": medians,
            "means": means,
            "bytes": {way: rows[-1]["bytes"] for way, rows in found.items()},
            "share_of_matrix_rate": share,
        }
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
