"""What is read off hidden states: log-probs of given targets through the model's own language head, or one number.

Both run only at the positions that were asked for. The language head runs in chunks that are computed again in the
backward, so `[tokens, vocabulary]` never exists for more than one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kilter import ops
from kilter.models.attention import text_config

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 16.8 million, 64 MiB in float32."""


class ScalarHead(nn.Module):
    """One number per hidden state: `w . h`, in float32; no bias, as in `AutoModelForSequenceClassification`."""

    def __init__(self, hidden_size: int, *, std: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        weight = torch.zeros(1, hidden_size)
        if std:
            weight.normal_(std=std, generator=generator)
        self.weight = nn.Parameter(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """float[N, H] -> float32[N]."""
        with torch.autocast(hidden.device.type, enabled=False):
            # Not a view: FSDP2 hooks what the trunk returns, and loses its hook where a view is changed in place.
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1).clone()


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The model's own logits, float32[N, V], for final hidden states [N, H].

    What families do after the last matrix is done here too: divided by `logits_scaling` (Granite), multiplied by
    `logit_scale` (Cohere), capped as `c tanh(x / c)` by `final_logit_softcapping` (Gemma). What is not known here shows
    as a difference in `check.both_ways`.
    """
    config = text_config(model.config)
    head = model.get_output_embeddings()
    if hidden.dtype == torch.float32:  # as Mamba leaves them also where its weights are in bfloat16
        hidden = hidden.to(head.weight.dtype)
    logits: Tensor = head(hidden).float()
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        logits = logits / scaling
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def target_logprobs(model: Any, hidden: Tensor, target: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """log p(target | hidden), nats, float32[N], through the model's own head; log-softmax in float32.

    Args:
        hidden: float[N, H], final hidden states (after the model's last norm).
        target: int[N].
        chunk_elements: logits held at once; when all N x V fit, nothing is computed twice.
    """

    def logprobs(hidden: Tensor, target: Tensor) -> Tensor:
        return -F.cross_entropy(logits_of(model, hidden), target, reduction="none")

    return _in_chunks(logprobs, model, chunk_elements, hidden, target)


def token_stats(model: Any, hidden: Tensor, target: Tensor, *, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """What the policy says of each position beside the target's log-prob, float32[N, 3].

    Columns:
        0: `target_logprobs`, the only column with a gradient.
        1: entropy, -sum_v p(v) log p(v), nats.
        2: log of the collision probability, log sum_v p(v)^2, nats.
    """

    def stats(hidden: Tensor, target: Tensor) -> Tensor:
        logits = logits_of(model, hidden)
        with torch.no_grad():
            logp = F.log_softmax(logits, dim=-1)
            entropy, collision = -(logp.exp() * logp).sum(-1), torch.logsumexp(2 * logp, dim=-1)
        return torch.stack([-F.cross_entropy(logits, target, reduction="none"), entropy, collision], dim=1)

    return _in_chunks(stats, model, chunk_elements, hidden, target)


class Other(NamedTuple):
    """What a KL is measured to."""

    model: Any
    """Of the vocabulary of the policy's; it may be the same."""
    hidden: Tensor
    """float[N, H'], its final hidden states."""


def whole_stats(
    model: Any,
    hidden: Tensor,
    target: Tensor,
    *,
    to: Other | None = None,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Target log-probs and, with their gradients, numbers of the whole distribution p at each position, float32[N, C].

    Each head runs once, in the chunks of `target_logprobs`, so its numbers are the same bits; logits of both models are
    held at once. In a backward over more than one chunk both heads run once more.

    Columns, those asked for in this order:
        log p(target), `target_logprobs`.
        to: KL(p || q), nats, `ops.kl_exact`; log q(target). No gradient goes to q.
        entropy: -sum_v p(v) log p(v), nats.

    Args:
        hidden, target, chunk_elements: of `target_logprobs`.
    """

    def stats(hidden: Tensor, target: Tensor, *others: Tensor) -> Tensor:
        logp = F.log_softmax(logits_of(model, hidden), dim=-1)
        columns = [logp.gather(1, target[:, None])[:, 0]]
        if to is not None:
            with torch.no_grad():
                logq = F.log_softmax(logits_of(to.model, *others), dim=-1)
            columns += [ops.kl_exact(logp, logq), logq.gather(1, target[:, None])[:, 0]]
        if entropy:
            columns.append(-(logp.exp() * logp).sum(-1))
        return torch.stack(columns, dim=1)

    others = () if to is None else (to.hidden,)
    return _in_chunks(stats, model, chunk_elements, hidden, target, *others)


def _in_chunks(read: Callable[..., Tensor], model: Any, chunk_elements: int, *columns: Tensor) -> Tensor:
    """`read` on as many positions at once as `chunk_elements` logits allow; more than one chunk is computed twice."""
    rows, count = max(1, chunk_elements // text_config(model.config).vocab_size), len(columns[0])
    if count <= rows:
        return read(*columns)
    parts = []
    for start in range(0, count, rows):
        piece = [column[start : start + rows] for column in columns]
        parts.append(checkpoint(read, *piece, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)
