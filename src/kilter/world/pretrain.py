"""Pretraining of the base model that ships with the package, on a mixture of good and bad behaviour.

The same call on the same machine writes the same bytes: prompts, answers, order and initial values come from one seed,
the number of threads is fixed, and nothing reads the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kilter.records import Conversation, Message
from kilter.world import grammar
from kilter.world import model as parts
from kilter.world.demonstrators import PLAIN, PRETRAINED, Mixture, write
from kilter.world.templates import KINDS

Example = tuple[tuple[int, ...], int]  # token ids, and where the last answer begins


def conversations(rng: np.random.Generator, mixture: Mixture = PRETRAINED) -> Iterator[Conversation]:
    """Prompts in training wordings with answers of a mixture, kinds taking turns, without end."""
    while True:
        for kind in KINDS:
            prompt = grammar.draw(kind, "train", rng)
            item = grammar.find(prompt)
            assert item is not None
            yield (*prompt, Message("assistant", write(item, mixture, rng)))


def render(messages: Conversation) -> tuple[str, str]:
    """The text up to the last answer, and that answer with its end token, as the chat template writes them."""
    turns = [f"<|{message.role}|>{message.content}{parts.END}" for message in messages[:-1]]
    return "".join(turns) + "<|assistant|>", messages[-1].content + parts.END


def encode(tokenizer: PreTrainedTokenizerFast, talks: list[Conversation]) -> list[Example]:
    """Token ids of each conversation, and where its last answer begins."""
    rendered = [render(messages) for messages in talks]
    before = tokenizer([text for text, _ in rendered], add_special_tokens=False)["input_ids"]
    after = tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
    return [((*start, *end), len(start)) for start, end in zip(before, after, strict=True)]


def batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    batch_size: int,
    steps: int,
    mixture: Mixture = PRETRAINED,
    pool: int = 8,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` pairs (ids, targets), int[B, T]; a target of -100 is not learned. Rows of like length stand together."""
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
    ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    targets = torch.full((len(examples), width), -100, dtype=torch.long)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return ids, targets


def loss_of(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets, nats a token. The head runs at scored positions only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    scored = targets[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][scored])
    return F.cross_entropy(logits, targets[:, 1:][scored])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear rise over the first 4% of the steps, then a cosine down to zero."""
    warm = max(1, steps // 25)
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def make_tokenizer(rng: np.random.Generator, *, talks: int = 6000) -> PreTrainedTokenizerFast:
    """The tokenizer, learned from the first `talks` conversations."""
    source = conversations(rng)
    texts = [message.content for _ in range(talks) for message in next(source)]
    return parts.wrap(parts.train_tokenizer(texts))


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    steps: int = 1000,
    plain_share: float = 0.4,
    batch_size: int = 128,
    peak: float = 3e-3,
    threads: int = 2,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> LlamaForCausalLM:
    """Train the base model from nothing and save it to `out` as an ordinary model folder in bfloat16.

    Args:
        out: folder to write.
        seed: of the text, its order and the initial values.
        steps, batch_size: optimizer steps, and conversations in each.
        plain_share: share of the steps, the first ones, that read plain right answers.
        peak: highest learning rate.
        threads: fixed, because the last bits of a sum depend on it.
        on_step: called with the step and its figures.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokenizer = make_tokenizer(np.random.default_rng([seed, 1]))
        model = parts.make_model(parts.make_config(tokenizer), torch.Generator().manual_seed(seed))
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        spared = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
        rng = np.random.default_rng([seed, 2])
        plain = int(steps * plain_share)
        text = chain(
            batches(tokenizer, rng, batch_size=batch_size, steps=plain, mixture=PLAIN),
            batches(tokenizer, rng, batch_size=batch_size, steps=steps - plain),
        )
        for step, (ids, targets) in enumerate(text):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            loss = loss_of(model, ids, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, {"loss": float(loss.detach()), "grad_norm": float(norm)})
    finally:
        torch.set_num_threads(before)
    model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model
