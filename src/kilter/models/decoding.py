"""Decoding with the prompt's keys and values held once for all its answers.

A cohort is some prompts of like length with answers that began together. Its cache is the prompts' keys and values, one
copy for all answers, and the answers' own, one column a step. All cohorts go through the model as one row of tokens,
each token at its own position; only attention knows cohorts, and asks each prompt's keys for all its answers at once:
memory is read once where a cache for each answer reads it n times. Answers that have ended leave, and prompts that wait
take their place as a new cohort.

Attention is told through a keyword of the forward, as `segments` is; a model whose attention cannot be told so goes by
transformers' own cache (`cached`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.models.attention import unread_masks
from kilter.models.heads import logits_of

ALIKE = 4.0
"""A cohort's prompts are padded to its longest: at most this many times its shortest, plus `SLACK`."""
SLACK = 64
KEPT_SHARE = 0.75
"""Ended rows leave once at most this share of a cohort is alive: copying its cache then pays for itself."""
ROW_TOKENS = 4096
"""Prompts are taken in by rows of so many tokens."""
FIRST_COLUMNS = 32
"""Room for so many tokens of an answer at first; it doubles."""


class Together(Protocol):
    """Rows that decode from one cache."""

    def __len__(self) -> int:
        """How many."""
        ...

    def keep(self, kept: Tensor) -> None:
        """Leaves these rows, int[m], in order."""
        ...


T = TypeVar("T", bound=Together)


def without_dead(parts: Sequence[T], alive: Tensor) -> tuple[list[T], Tensor | None]:
    """Drops dead rows where that pays, part by part, and parts that are dead altogether.

    Args:
        alive: bool[rows], of all parts one after the other.
    Returns:
        (the parts that are left, the places int[m] of the rows that stay; None: all stay).
    """
    left, kept, start = [], [], 0
    for part in parts:
        own = alive[start : start + len(part)]
        places = own.nonzero()[:, 0]
        if 0 < len(places) <= KEPT_SHARE * len(own):
            part.keep(places)
        elif len(places):
            places = torch.arange(len(own), device=own.device)
        kept.append(places + start)
        start += len(own)
        left += [part] if len(places) else []
    found = torch.cat(kept)
    return left, None if len(found) == len(alive) else found


class Cohort:
    """Answers that began together, to prompts of like length.

    Args:
        prompts: token ids.
        owner: int[rows], the prompt that each row answers, in order.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> None:
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=owner.device)
        self.owner = owner
        self.steps = 0
        """Tokens whose keys and values the answers have."""
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [prompts, heads, length, size]
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [rows, heads, columns, size]
        self._hidden: dict[int | None, Tensor | None] = {}
        self._lay()

    def __len__(self) -> int:
        return len(self.owner)

    def _lay(self) -> None:
        """Where each row stands among the answers of its prompt: [prompts, most answers], as if all had as many."""
        counts = torch.bincount(self.owner, minlength=len(self.lengths))
        self._most = int(counts.max())
        rows = torch.arange(len(self.owner), device=self.owner.device)
        self._among = rows - (counts.cumsum(0) - counts)[self.owner]
        self._filled: Tensor | None = None  # place -> row, where some have fewer
        if len(rows) != len(self.lengths) * self._most:
            self._filled = self.owner.new_zeros(len(self.lengths) * self._most)
            self._filled[self.owner * self._most + self._among] = rows

    @property
    def positions(self) -> Tensor:
        """int[rows], of the token that is decoded now."""
        return self.lengths[self.owner] + self.steps

    def take_prompts(self, layer: int, keys: Tensor, values: Tensor, places: Sequence[tuple[int, int, int]]) -> None:
        """Keys and values [heads, tokens, size] of some prompts: (prompt, start, end) of each."""
        if layer not in self._prompts:
            room = (len(self.lengths), keys.shape[0], int(self.lengths.max()), keys.shape[2])
            self._prompts[layer] = (keys.new_zeros(room), values.new_zeros(room))
        for held, whole in zip(self._prompts[layer], (keys, values), strict=True):
            for prompt, start, end in places:
                held[prompt, :, : end - start] = whole[:, start:end]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """One token's attention of every row: query [rows, heads, size], key and value [rows, fewer heads, size]."""
        num_rows, num_heads, size = key.shape
        keys, values = self._grown(layer, key, value)
        keys[:, :, self.steps], values[:, :, self.steps] = key, value
        first = 0 if window is None else max(0, self.steps + 1 - window)
        keys, values = (held[:, :, first : self.steps + 1].flatten(0, 1) for held in (keys, values))
        query = (query * scale).view(num_rows, num_heads, -1, size)
        own = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)).view(num_rows, num_heads, -1, keys.shape[1])
        in_sight = window is None or self.steps + 1 < window  # of the prompts, anything at all
        scores = torch.cat([self._of_prompts(layer, query, window), own], -1) if in_sight else own
        shares = torch.softmax(scores, -1)
        out = torch.bmm(shares[..., -keys.shape[1] :].flatten(0, 1), values).view(*query.shape[:3], values.shape[2])
        return (out + self._from_prompts(layer, shares) if in_sight else out).flatten(1, 2)

    def _of_prompts(self, layer: int, query: Tensor, window: int | None) -> Tensor:
        """Scores of the rows' prompts [rows, heads, group, length], for query [rows, heads, group, size]."""
        keys, _ = self._prompts[layer]
        num_prompts, num_heads, length, _ = keys.shape
        together = self._together(query)
        scores = torch.bmm(together, keys.flatten(0, 1).transpose(1, 2)).view(num_prompts, num_heads, -1, length)
        if (hidden := self._out_of_sight(length, window)) is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return self._apart(scores, query.shape[2])

    def _from_prompts(self, layer: int, shares: Tensor) -> Tensor:
        """What the rows take from their prompts [rows, heads, group, size], by shares [rows, heads, group, more]."""
        _, values = self._prompts[layer]
        found = torch.bmm(self._together(shares[..., : values.shape[2]]), values.flatten(0, 1))
        return self._apart(found.view(*values.shape[:2], -1, values.shape[3]), shares.shape[2])

    def _together(self, of_rows: Tensor) -> Tensor:
        """[rows, heads, group, x] -> [prompts heads, answers group, x]; an answer that is gone has another's."""
        if self._filled is not None:
            of_rows = of_rows.index_select(0, self._filled)
        num_prompts, (heads, group, last) = len(self.lengths), of_rows.shape[1:]
        by_prompt = of_rows.view(num_prompts, self._most, heads, group, last).transpose(1, 2)
        return by_prompt.reshape(num_prompts * heads, self._most * group, last)

    def _apart(self, of_prompts: Tensor, group: int) -> Tensor:
        """[prompts, heads, answers group, x] -> [rows, heads, group, x]."""
        prompts, heads, _, last = of_prompts.shape
        by_answer = of_prompts.view(prompts, heads, self._most, group, last).transpose(1, 2)
        return by_answer.flatten(0, 1) if self._filled is None else by_answer[self.owner, self._among]

    def _out_of_sight(self, length: int, window: int | None) -> Tensor | None:
        """bool[prompts, 1, 1, length], True where a column is padding or has left the window; None: nowhere."""
        if window not in self._hidden:
            columns = torch.arange(length, device=self.lengths.device)
            seen = columns < self.lengths[:, None]
            if window is not None:
                seen = seen & (columns > self.lengths[:, None] + self.steps - window)
            self._hidden[window] = None if bool(seen.all()) else ~seen[:, None, None]
        return self._hidden[window]

    def _grown(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's own keys and values, with room for this step."""
        if layer not in self._own:
            room = (*key.shape[:2], FIRST_COLUMNS, key.shape[2])
            self._own[layer] = (key.new_empty(room), value.new_empty(room))
        keys, values = self._own[layer]
        if self.steps == keys.shape[2]:
            keys, values = (torch.cat([held, torch.empty_like(held)], dim=2) for held in (keys, values))
            self._own[layer] = (keys, values)
        return keys, values

    def step(self) -> None:
        """The token of this step is in every layer."""
        self.steps += 1
        self._hidden = {window: held for window, held in self._hidden.items() if window is None}

    def keep(self, kept: Tensor) -> None:
        """Leaves these rows, int[m], in order; prompts that nobody answers any more go too, once they are many."""
        self.owner = self.owner[kept]
        for layer, (keys, values) in self._own.items():
            self._own[layer] = (self._picked(keys, kept), self._picked(values, kept))
        answered = torch.unique(self.owner)
        if len(answered) <= KEPT_SHARE * len(self.lengths):
            self.owner = torch.searchsorted(answered, self.owner)
            self.lengths = self.lengths[answered]
            longest = int(self.lengths.max())
            for layer, (keys, values) in self._prompts.items():
                self._prompts[layer] = (keys[answered, :, :longest], values[answered, :, :longest])
            self._hidden = {}
        self._lay()

    def _picked(self, held: Tensor, kept: Tensor) -> Tensor:
        """Those rows, with as many columns; only what is written is copied."""
        picked = held.new_empty((len(kept), *held.shape[1:]))
        picked[:, :, : self.steps] = held[:, :, : self.steps].index_select(0, kept)
        return picked


class Decoding:
    """What attention is told: prompts whose keys are to be taken in, or cohorts whose rows take a step."""

    def __init__(self, cohorts: Sequence[Cohort], prompts: Sequence[tuple[int, int, int]] = ()) -> None:
        """`prompts`: of the one cohort that takes them in: which, and its start and end in the row of tokens."""
        self.cohorts, self.prompts = cohorts, prompts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, heads, tokens, size], key and value [1, fewer heads, tokens, size] -> [1, tokens, heads, size]."""
        if self.prompts:
            return self._prompts(layer, query, key, value, scale, window)
        out, start = [], 0
        for cohort in self.cohorts:
            here = slice(start, start + len(cohort))
            asked, new_key, new_value = (states[0, :, here].transpose(0, 1) for states in (query, key, value))
            out.append(cohort.attend(layer, asked, new_key, new_value, scale, window))
            start = here.stop
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def _prompts(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        (cohort,) = self.cohorts
        cohort.take_prompts(layer, key[0], value[0], self.prompts)
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for _, start, end in self.prompts:
            length = end - start
            mask = None
            if window is not None and length > window:
                back = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
                mask = (back >= 0) & (back < window)
            part = F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[:, start:end] = part.transpose(1, 2)
        return out


def forward(model: Any, tokens: Tensor, positions: Tensor, decoding: Decoding) -> Tensor:
    """Final hidden states [tokens, H] of one row of tokens.

    Args:
        model: a decoder, without its language head, whose attention is `segments.attend`.
        tokens, positions: int[tokens].
    """
    hidden: Tensor = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=unread_masks(model),
        use_cache=False,
        decoding=decoding,
    ).last_hidden_state
    return hidden[0]


def prefill(model: Any, inner: Any, prompts: Sequence[Sequence[int]], cohort: Cohort) -> Tensor:
    """Takes the prompts of a cohort in, one after the other in rows of tokens; logits [prompts, V] after each.

    Args:
        model, inner: with and without its language head.
    """
    device = cohort.owner.device
    ends = []
    for start, end in _shares([len(prompt) for prompt in prompts]):
        row = prompts[start:end]
        tokens = torch.tensor([token for prompt in row for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in row])
        last = cohort.lengths[start:end].cumsum(0)
        first = last - cohort.lengths[start:end]
        places = list(zip(range(start, end), first.tolist(), last.tolist(), strict=True))
        ends.append(forward(inner, tokens, positions, Decoding([cohort], places))[last - 1])
    return logits_of(model, torch.cat(ends))


def _shares(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where to cut prompts into rows of about `ROW_TOKENS`."""
    start = total = 0
    for at, length in enumerate(lengths):
        if total and total + length > ROW_TOKENS:
            yield start, at
            start, total = at, 0
        total += length
    yield start, len(lengths)


def cohorts_of(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where to cut prompts that are ordered by length, so that none is padded to much more than it has."""
    start = 0
    for at, length in enumerate(lengths):
        if length > ALIKE * lengths[start] + SLACK:
            yield start, at
            start = at
    yield start, len(lengths)


class SharedRows:
    """Rows that decode side by side, in cohorts; see `cached.CachedRows` for what is asked of them."""

    def __init__(self, model: Any, inner: Any) -> None:
        """`model`, `inner`: with and without its language head."""
        self._model, self._inner = model, inner
        self._cohorts: list[Cohort] = []

    def admit(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """Takes rows in; row i answers prompt `owner[i]`, in order of prompts that are in order of length."""
        logits = []
        for start, end in cohorts_of([len(prompt) for prompt in prompts]):
            own = owner[(owner >= start) & (owner < end)] - start
            cohort = Cohort(prompts[start:end], own)
            logits.append(prefill(self._model, self._inner, prompts[start:end], cohort)[own])
            self._cohorts.append(cohort)
        return torch.cat(logits)

    def advance(self, token: Tensor) -> Tensor:
        """One more token of every row; the logits after it, float32[rows, V]."""
        positions = torch.cat([cohort.positions for cohort in self._cohorts])
        hidden = forward(self._inner, token, positions, Decoding(self._cohorts))
        for cohort in self._cohorts:
            cohort.step()
        return logits_of(self._model, hidden)

    def keep(self, alive: Tensor) -> Tensor | None:
        """Drops dead rows where that pays: `alive` bool[rows]; the places of those that stay, None: all stay."""
        self._cohorts, kept = without_dead(self._cohorts, alive)
        return kept
