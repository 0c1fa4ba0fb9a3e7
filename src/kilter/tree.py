"""The token tree: the one batch layout of Kilter. A prompt is stored once, its responses hang below it.

A preference is a prompt with two responses, a ranking one with k, a group of rollouts one with n, a demonstration one
with one. Trees are packed side by side in rows; the N scored tokens are listed by index, so nothing after this module
shifts or masks anything.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from kilter.errors import DataError


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
    name: str = ""
    """Where it came from, in words: a file and its line, a record; becomes one of `Batch.names`."""


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

    def to(self, device: torch.device | str) -> TokenTree:
        """The same tree on another device."""
        return TokenTree(*(getattr(self, spec.name).to(device) for spec in fields(self)))


@dataclass(frozen=True, slots=True)
class Batch:
    """What the loop moves: a tree and what a method adds to it."""

    tree: TokenTree
    units: dict[str, float]
    """How many of each thing it holds: tokens (N), responses (R), prompts (G), pairs, ...: what sums are divided by."""
    ref_logprobs: Tensor | None = None
    """float[N], the reference's log-probs of the targets, filled by the source when a loss asks for it."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """By documented name: desirable[R], rank[R], old_logprobs[N], old_values[N], advantages[N], returns[N], ..."""
    names: tuple[str, ...] = ()
    """G names: where each group came from."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tree=self.tree.to(device),
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs.to(device),
            extras={name: value.to(device) for name, value in self.extras.items()},
        )


def scored(response: Response) -> int:
    """How many tokens of a response are scored."""
    if response.spans is None:
        return len(response.ids)
    return sum(end - start for start, end in response.spans)


def numbered(groups: Sequence[Group], name: str) -> list[Group]:
    """The groups with each response's number, counted through all of them, as `per_response[name]`: to know it again in
    a batch, whatever the packing."""
    found, first = [], 0
    for group in groups:
        responses = tuple(
            replace(response, per_response={**response.per_response, name: float(first + place)})
            for place, response in enumerate(group.responses)
        )
        found.append(replace(group, responses=responses))
        first += len(responses)
    return found


def size(group: Group) -> int:
    """How many positions of a row a group takes: its prompt once, and all its responses."""
    return len(group.prompt) + sum(len(response.ids) for response in group.responses)


def make_tree(rows: Sequence[Sequence[Group]], pad_id: int = 0) -> TokenTree:
    """Lays groups side by side in rows: in each group the prompt, then its responses one after another.

    Args:
        rows: B lists of groups, in the order of the rows; R and G count responses and groups in this order.
        pad_id: the token that stands in unused tails. Nothing reads it.
    Returns:
        A tree with T = the longest row (at least 1) and S = the most segments of a row (at least 1). Without any group
        it has one row of one unused position and N = R = 0, so that a forward and a backward still run.
    Raises:
        DataError: a response is empty, a span is out of range or out of order, or a scored token has nothing before it.
    """
    width = max((sum(size(group) for group in row) for row in rows), default=0) or 1
    height = max(len(rows), 1)
    tokens = np.full((height, width), pad_id, dtype=np.int64)
    positions = np.zeros((height, width), dtype=np.int64)
    segment = np.full((height, width), -1, dtype=np.int64)
    parents: list[list[int]] = [[] for _ in range(height)]  # per row and segment: the parent segment, itself at a root
    source: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    target: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    counts: list[int] = []
    last: list[int] = []
    group_of: list[int] = []
    num_groups = 0
    for b, row in enumerate(rows):
        at = 0
        for group in row:
            depth = len(group.prompt)
            root = len(parents[b])
            stem = at + depth - 1  # the prompt's last token predicts the first token of every response
            if depth:
                tokens[b, at : at + depth] = group.prompt
                positions[b, at : at + depth] = np.arange(depth)
                segment[b, at : at + depth] = root
                parents[b].append(root)
                at += depth
            for response in group.responses:
                length = len(response.ids)
                where = _scored_places(response, depth)
                ids = np.asarray(response.ids, dtype=np.int64)
                own = len(parents[b])
                tokens[b, at : at + length] = ids
                positions[b, at : at + length] = np.arange(depth, depth + length)
                segment[b, at : at + length] = own
                parents[b].append(root if depth else own)
                target.append(ids[where])
                before = at + where - 1
                if len(where) and where[0] == 0:
                    before[0] = stem
                source.append(b * width + before)
                counts.append(len(where))
                at += length
                last.append(b * width + at - 1)
                group_of.append(num_groups)
            num_groups += 1
    num_segments = max((len(row) for row in parents), default=0) or 1
    ancestors = np.zeros((height, num_segments, num_segments), dtype=np.bool_)
    ancestors[:, np.arange(num_segments), np.arange(num_segments)] = True
    for b, row_parents in enumerate(parents):
        ancestors[b, np.arange(len(row_parents)), row_parents] = True
    return TokenTree(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segment=torch.from_numpy(segment),
        ancestors=torch.from_numpy(ancestors),
        source=torch.from_numpy(np.concatenate(source)),
        target=torch.from_numpy(np.concatenate(target)),
        leaf=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)),
        last=torch.tensor(last, dtype=torch.int64),
        group=torch.tensor(group_of, dtype=torch.int64),
    )


def _scored_places(response: Response, depth: int) -> np.ndarray:
    """Indices into `response.ids` of the scored tokens, ascending; refuses what cannot be scored."""
    length = len(response.ids)
    if not length:
        raise DataError("a response has no tokens; every response needs at least its end token (drop the row)")
    spans = ((0, length),) if response.spans is None else response.spans
    end_before = 0
    for start, end in spans:
        if not end_before <= start < end <= length:
            raise DataError(
                f"span [{start}, {end}) of a response of {length} tokens is empty, out of range or out of order; "
                "spans are half-open, ascending, disjoint"
            )
        end_before = end
    if spans and spans[0][0] == 0 and not depth:
        raise DataError("a scored token has no token before it: an empty prompt predicts nothing; start it with BOS")
    if len(spans) == 1:
        return np.arange(*spans[0])
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(*span) for span in spans)])


def make_batch(rows: Sequence[Sequence[Group]], pad_id: int = 0) -> Batch:
    """One micro-batch of these rows, with what the responses carry concatenated in the order of the tree.

    Raises:
        DataError: some responses carry a number that others lack, or a per-token tensor has another length than its
            response has scored tokens.
    """
    groups = [group for row in rows for group in row]
    responses = [response for group in groups for response in group.responses]
    tree = make_tree(rows, pad_id)
    extras: dict[str, Tensor] = {}
    for name in _common_names([response.per_token for response in responses]):
        values = [torch.as_tensor(response.per_token[name]) for response in responses]
        for value, response in zip(values, responses, strict=True):
            if value.shape != (scored(response),):
                raise DataError(
                    f"{name!r} has shape {tuple(value.shape)} on a response of {scored(response)} scored tokens"
                )
        extras[name] = torch.cat(values)
    for name in _common_names([response.per_response for response in responses]):
        extras[name] = torch.tensor([response.per_response[name] for response in responses], dtype=torch.float32)
    pairs = sum(len(group.responses) * (len(group.responses) - 1) // 2 for group in groups)
    units: dict[str, float] = {
        "tokens": len(tree.source),
        "responses": len(responses),
        "prompts": len(groups),
        "pairs": pairs,
    }
    return Batch(tree, units, extras.pop("ref_logprobs", None), extras, tuple(group.name for group in groups))


def _common_names(carried: Sequence[Mapping[str, object]]) -> list[str]:
    names = list(carried[0]) if carried else []
    for row in carried:
        if row.keys() != set(names):
            odd = sorted(row.keys() ^ set(names))
            raise DataError(f"some responses of a batch carry {odd} and others do not; give it to all or to none")
    return names


def empty_batch(like: Batch | None = None) -> Batch:
    """A batch of nothing (N = R = 0) with the names of `like`: for a process that has run out before the others."""
    batch = make_batch([])
    if like is None:
        return batch
    return replace(
        batch,
        units=dict.fromkeys(like.units, 0.0),
        ref_logprobs=None if like.ref_logprobs is None else like.ref_logprobs[:0],
        extras={name: value[:0] for name, value in like.extras.items()},
    )


def make_batches(groups: Sequence[Group], *, row_tokens: int, batch_tokens: int, pad_id: int = 0) -> list[Batch]:
    """Packs whole groups into rows and rows into micro-batches; the same groups always give the same batches.

    Rows are filled longest group first, each group into the fullest row that still has room for it; wide ones are made
    about equally long, since the shorter of a micro-batch pay for the longest. Then rows, longest first, go into
    micro-batches. What is learned does not depend on any of it.

    Args:
        row_tokens: T of a row, at most; a group that is longer gets a row of its own length.
        batch_tokens: B x T of a micro-batch, at most; a row that is longer gets a micro-batch of its own.
    Returns:
        At least one batch: without groups, one empty batch.
    """
    if not groups:
        return [empty_batch()]
    rows = _evened([size(group) for group in groups], row_tokens)
    batches: list[Batch] = []
    at = 0
    while at < len(rows):
        width = sum(size(groups[i]) for i in rows[at])
        height = max(1, batch_tokens // max(width, 1))
        batches.append(make_batch([[groups[i] for i in row] for row in rows[at : at + height]], pad_id))
        at += height
    return batches


EVENED_FROM = 256
"""Rows up to this wide are many, and their tails are short."""


def _evened(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """`_pack`, with the smallest of a few budgets that gives no more rows."""
    rows = _pack(sizes, budget)
    if budget > EVENED_FROM and len(rows) > 1:
        mean = sum(sizes) / len(rows)
        for slack in (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5):
            tighter = _pack(sizes, min(budget, math.ceil(slack * mean)))
            if len(tighter) <= len(rows):
                return tighter
    return rows


def _pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: the indices in each row, rows by descending length."""
    rows: list[list[int]] = []
    used: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(room, (sizes[i], -1))
        if place == len(room):
            row = len(rows)
            rows.append([])
            used.append(0)
        else:
            row = room.pop(place)[1]
        rows[row].append(i)
        used[row] += sizes[i]
        if used[row] < budget:
            bisect.insort(room, (budget - used[row], row))
    return [rows[row] for row in sorted(range(len(rows)), key=lambda row: (-used[row], row))]


def unroll(tree: TokenTree) -> TokenTree:
    """The ordinary padded batch: one response a row, each with its own copy of its path, nothing shared.

    `source[n]`, `target[n]`, `leaf[n]`, `last[r]` and `group[r]` keep their order and meaning, so any loss reads either
    tree. For models that cannot take the tree's mask (ALiBi, state space), and for the check that compares both.
    """
    num_responses = len(tree.last)
    if not num_responses:
        return tree
    width = tree.tokens.shape[1]
    row, end = tree.last // width, tree.last % width
    segment = tree.segment[row]  # [R, T]
    seen = _on_path(tree).gather(1, segment.clamp(min=0)) & (segment >= 0)
    seen &= torch.arange(width, device=tree.tokens.device) <= end[:, None]
    lengths = seen.sum(1)
    longest = int(lengths.max())
    keep = torch.arange(longest, device=tree.tokens.device) < lengths[:, None]  # [R, T']
    tokens = torch.full_like(keep, 0, dtype=tree.tokens.dtype)
    tokens[keep] = tree.tokens[row][seen]
    positions = torch.zeros_like(tokens)
    positions[keep] = tree.positions[row][seen]
    return TokenTree(
        tokens=tokens,
        positions=positions,
        segment=torch.where(keep, 0, -1),
        ancestors=torch.ones((num_responses, 1, 1), dtype=torch.bool, device=tree.tokens.device),
        source=tree.leaf * longest + tree.positions.flatten()[tree.source],
        target=tree.target,
        leaf=tree.leaf,
        last=torch.arange(num_responses, device=tree.tokens.device) * longest + lengths - 1,
        group=tree.group,
    )


def _on_path(tree: TokenTree) -> Tensor:
    """bool[R, S]: the segments of its row on each response's path."""
    return tree.ancestors[tree.last // tree.tokens.shape[1], tree.segment.flatten()[tree.last]]


def part(batch: Batch, keep: Tensor, *, extras: Collection[str]) -> Batch:
    """Some of a batch's responses, each on its path: rows shrink to what these need, units stay those of the whole.

    Args:
        keep: bool[R].
        extras: names of those that go along; each is [R]. The others are left out.
    """
    tree = batch.tree
    height, width = tree.tokens.shape
    needed = torch.zeros(tree.ancestors.shape[:2], dtype=torch.int64, device=tree.tokens.device)
    needed.index_add_(0, tree.last[keep] // width, _on_path(tree)[keep].long())
    held = (needed.gather(1, tree.segment.clamp(min=0)) > 0) & (tree.segment >= 0)  # [B, T]
    narrow = max(int(held.sum(1).max()), 1)
    at_row, at = held.nonzero(as_tuple=True)
    place = at_row * narrow + (held.cumsum(1) - 1)[held]
    moved = torch.zeros(height * width, dtype=torch.int64, device=tree.tokens.device)
    moved[at_row * width + at] = place

    def laid(values: Tensor, tail: int) -> Tensor:
        rows = values.new_full((height * narrow,), tail)
        rows[place] = values[held]
        return rows.view(height, narrow)

    scored_here, number = keep[tree.leaf], keep.cumsum(0) - 1
    groups, group = torch.unique(tree.group[keep], return_inverse=True)
    smaller = TokenTree(
        tokens=laid(tree.tokens, 0),
        positions=laid(tree.positions, 0),
        segment=laid(tree.segment, -1),
        ancestors=tree.ancestors,
        source=moved[tree.source[scored_here]],
        target=tree.target[scored_here],
        leaf=number[tree.leaf[scored_here]],
        last=moved[tree.last[keep]],
        group=group,
    )
    known = batch.ref_logprobs
    carried = {name: batch.extras[name][keep] for name in extras if name in batch.extras}
    return replace(
        batch,
        tree=smaller,
        ref_logprobs=None if known is None else known[scored_here],
        extras=carried,
        names=tuple(batch.names[place] for place in groups.tolist()) if batch.names else (),
    )


def split_by_response(values: Tensor, leaf: Tensor, num_responses: int) -> list[Tensor]:
    """Cuts per-token values [N] into one tensor per response, in order; waits for the device."""
    counts = torch.bincount(leaf, minlength=num_responses).tolist()
    return list(torch.split(values, counts)) if counts else []
