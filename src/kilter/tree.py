"""The token tree: the one batch layout of Kilter. A prompt is stored once, its responses hang below it.

A preference is a prompt with two responses, a ranking one with k, a group of rollouts one with n, a demonstration one
with one. Trees are packed side by side in rows; the N scored tokens are listed by index, so nothing after this module
shifts or masks anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Response:
    """One response below a prompt: its tokens, which of them are scored, and the numbers a method hangs on them."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] | None = None
    """Half-open ranges of scored tokens, in order; None: all of `ids`."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> float[number of scored tokens]; becomes `Batch.extras[name]`, float[N]."""
    per_response: Mapping[str, float] = field(default_factory=dict)
    """name -> number; becomes `Batch.extras[name]`, float[R]."""


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses: the unit that packing never splits."""

    prompt: tuple[int, ...]
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class TokenTree:
    """B packed rows of T tokens, S segments a row; N scored tokens, R responses, G prompts.

    Query q sees key k of its row if and only if `k <= q` and `ancestors[segment[q], segment[k]]`.
    """

    tokens: Tensor  # int[B, T]      many small trees side by side in each row, parents before children
    positions: Tensor  # int[B, T]   depth of the token on its own path from its root: the model's position id
    segment: Tensor  # int[B, T]     which segment of the row; -1 = unused tail, which sees only itself
    ancestors: Tensor  # bool[B, S, S]  ancestors[b, s, a]: a is s itself, or lies on the way from the root to s
    source: Tensor  # int[N]         flat index of the position whose hidden state predicts target n
    target: Tensor  # int[N]         the token predicted there
    leaf: Tensor  # int[N]           which response target n belongs to, 0..R-1
    last: Tensor  # int[R]           flat index of each response's last token: where a reward head reads
    group: Tensor  # int[R]          which prompt response r answers, 0..G-1


@dataclass(frozen=True, slots=True)
class Batch:
    """What the loop moves: a tree and what a method adds to it."""

    tree: TokenTree
    units: dict[str, int]
    """How many of each thing it holds: tokens (N), responses (R), prompts (G), pairs, ...: what sums are divided by."""
    ref_logprobs: Tensor | None = None
    """float[N], the reference's log-probs of the targets, filled by the source when a loss asks for it."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """By documented name: desirable[R], rank[R], old_logprobs[N], old_values[N], advantages[N], returns[N], ..."""
