"""Pretraining of the base model that ships with the package, on a mixture of good and bad behaviour.

The same call on the same machine writes the same bytes: prompts, answers, order and initial values come from one seed,
the number of threads is fixed, and nothing reads the clock.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kilter.errors import RunError
from kilter.records import Conversation, Message
from kilter.rundir import write_folder
from kilter.train.checkpoint import CheckpointStore
from kilter.train.loop import TrainState
from kilter.world import grammar
from kilter.world import model as parts
from kilter.world.demonstrators import PLAIN, PRETRAINED, Mixture, write, write_and_react
from kilter.world.templates import KINDS

Example = tuple[list[int], list[int]]  # token ids, and the same with IGNORED where nothing is to be learned
IGNORED = -100
REACTIONS = 0.7
"""Share of the mixture's conversations in which the user then says whether the answer was right.

A large model has met people's reactions to answers in its text, and a reward model builds on that. Without them a model
of this size has no notion of "right" to build on.
"""
REACTION_WEIGHT = 4.0
"""Weight of a reaction's token in the loss, of an answer's: 1. A reaction has few tokens and is hard: at equal weight
the model tells a right passage answer from a wrong one no better than chance, at this one in four of five cases."""


# What takes most learning stands more often among the plain right answers.
PLAIN_KINDS = (*KINDS, *(4 * ("sum",)), "passage", "passage", "fact", "fact", "wrong_belief", "two_turn", "lookalike")
# Where telling right from wrong takes most learning; the first phase has its own.
MIXED_KINDS = (*KINDS, "fact", "passage", "rude", "two_turn", "passage")
STEPS = 2400
CHECKPOINT_EVERY = 100


def conversations(rng: np.random.Generator, mixture: Mixture = PRETRAINED) -> Iterator[Conversation]:
    """Prompts in training wordings with answers of a mixture and some reactions to them, kinds taking turns."""
    while True:
        for kind in PLAIN_KINDS if mixture is PLAIN else MIXED_KINDS:
            prompt = grammar.draw(kind, "train", rng)
            item = grammar.find(prompt)
            assert item is not None
            if mixture is PLAIN or rng.random() >= REACTIONS:
                yield (*prompt, Message("assistant", write(item, mixture, rng)))
            else:
                text, reaction = write_and_react(item, mixture, rng)
                yield (*prompt, Message("assistant", text), Message("user", reaction))


def render(messages: Conversation) -> tuple[str, str]:
    """The text up to the last answer, and what is learned: that answer and what follows it."""
    turns = [f"<|{message.role}|>{message.content}{parts.END}" for message in messages]
    answer = max(place for place, message in enumerate(messages) if message.role == "assistant")
    start = len("".join(turns[:answer]) + "<|assistant|>")
    text = "".join(turns)
    return text[:start], text[start:]


def encode(tokenizer: PreTrainedTokenizerFast, talks: list[Conversation]) -> list[Example]:
    """Token ids of each conversation, and what is to be learned of it."""
    rendered = [render(talk) for talk in talks]
    before = tokenizer([text for text, _ in rendered], add_special_tokens=False)["input_ids"]
    after = tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
    return [(start + end, [IGNORED] * len(start) + end) for start, end in zip(before, after, strict=True)]


def batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    batch_size: int,
    steps: int,
    mixture: Mixture = PRETRAINED,
    pool: int = 8,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` pairs (ids, targets), int[B, T]; IGNORED is not learned. Rows of like length stand together."""
    source = conversations(rng, mixture)
    done = 0
    while done < steps:
        examples = encode(tokenizer, [next(source) for _ in range(batch_size * pool)])
        examples.sort(key=lambda example: len(example[0]))
        for number in rng.permutation(pool)[: steps - done]:
            yield _pad(examples[number * batch_size : (number + 1) * batch_size], int(tokenizer.pad_token_id))
            done += 1


def _pad(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in examples)
    ids = [tokens + [pad_id] * (width - len(tokens)) for tokens, _ in examples]
    targets = [goal + [IGNORED] * (width - len(goal)) for _, goal in examples]
    return torch.tensor(ids), torch.tensor(targets)


def loss_of(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets, nats a token, what follows an answer's end `REACTION_WEIGHT` fold.

    The head runs at scored positions only.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = targets[:, 1:]
    scored = wanted != IGNORED
    logits = model.lm_head(hidden[:, :-1][scored])
    ends = (wanted == model.config.eos_token_id).long()
    follows = ends.cumsum(1) - ends > 0
    weight = torch.where(follows, REACTION_WEIGHT, 1.0)[scored]
    losses = F.cross_entropy(logits, wanted[scored], reduction="none")
    return (losses * weight).sum() / weight.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear rise over the first 4% of the steps, then a cosine down to zero."""
    warm = max(1, steps // 25)
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def make_tokenizer(rng: np.random.Generator, *, talks: int = 6000) -> PreTrainedTokenizerFast:
    """The tokenizer, learned from the first `talks` conversations."""
    source = conversations(rng)
    texts = [message.content for _ in range(talks) for message in next(source)]
    return parts.wrap(parts.train_tokenizer(texts))


@dataclass(frozen=True)
class _Options:
    """What a checkpoint was made with: another run does not go on from it."""

    values: dict[str, Any]
    folder: Path

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.values:
            raise RunError(f"{self.folder}: checkpoints of a run with {state}, not {self.values}; delete the folder")


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    plain_share: float = 0.3,
    batch_size: int = 128,
    peak: float = 3e-3,
    threads: int = 1,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> LlamaForCausalLM:
    """Train the base model from nothing and save it to `out` as an ordinary model folder in bfloat16.

    Killed and called again, it goes on from its last checkpoint, in `<out>.checkpoints`, to the same bytes.

    Args:
        out: folder to write.
        seed: of the text, its order and the initial values.
        steps, batch_size: optimizer steps, and conversations in each.
        plain_share: share of the steps, the first ones, that read plain right answers.
        peak: highest learning rate.
        threads: fixed, because the last bits of a sum depend on it.
        on_step: called with the step and its figures.
    Raises:
        RunError: `out` cannot be written, or the checkpoints beside it are of another call.
    """
    store = CheckpointStore(out.with_name(f"{out.name}.checkpoints"), keep=1)
    values = {"seed": seed, "steps": steps, "plain_share": plain_share, "batch_size": batch_size}
    options = _Options({**values, "peak": peak, "threads": threads}, store.folder)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokenizer = make_tokenizer(np.random.default_rng([seed, 1]))
        model = parts.make_model(parts.make_config(tokenizer), torch.Generator().manual_seed(seed))
        decayed = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() > 1]
        spared = [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
        state = TrainState(model, optimizer)
        if not store.resume(state, {"options": options}):
            store.save(state, {"options": options})  # before any work: a folder that cannot be written is refused here
        rng = np.random.default_rng([seed, 2])
        plain = int(steps * plain_share)
        text = chain(
            batches(tokenizer, rng, batch_size=batch_size, steps=plain, mixture=PLAIN),
            batches(tokenizer, rng, batch_size=batch_size, steps=steps - plain),
        )
        for ids, targets in islice(text, state.step, None):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, steps, peak)
            loss = loss_of(model, ids, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state.step += 1
            if state.step % CHECKPOINT_EVERY == 0:
                store.save(state, {"options": options})
            if on_step is not None:
                on_step(state.step, {"loss": float(loss.detach()), "grad_norm": float(norm)})
    finally:
        torch.set_num_threads(before)
    model.to(torch.bfloat16)
    with write_folder(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    shutil.rmtree(store.folder)
    return model
