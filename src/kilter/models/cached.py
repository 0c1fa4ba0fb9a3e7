"""Decoding through transformers' own cache: each answer with its prompt's keys and values, under the model's own masks.

The way for models whose attention cannot be told of cohorts (`decoding`): ALiBi, capped scores, eager attention. The
model builds its masks from a two-dimensional one, so windows, ALiBi and any attention implementation hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kilter.errors import ModelError
from kilter.models.attention import text_config
from kilter.models.decoding import without_dead

COLUMN_BLOCK = 16
"""A cache grows by this many tokens at a time."""
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


class CachedRows:
    """Rows that decode side by side, those admitted together in one cache, left-padded."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        self._chunks: list[_Chunk] = []
        kinds = set(getattr(text_config(model.config), "layer_types", None) or ())
        if "past_key_values" not in self._takes or not kinds <= ATTENTION_LAYERS:
            odd = ", ".join(sorted(kinds - ATTENTION_LAYERS)) or "no past_key_values"
            raise ModelError(
                f"{type(model).__name__} has layers without a key-value cache ({odd}); sampling needs a decoder whose "
                "layers are all attention"
            )

    def admit(self, prompts: Sequence[Sequence[int]], owner: Tensor) -> Tensor:
        """Takes rows in; row i answers prompt `owner[i]`. Their first logits, float32[rows, V]."""
        width = max(len(prompt) for prompt in prompts)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=owner.device)
        tokens = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        chunk = _Chunk(padding, width, Cache(layer_class_to_replicate=_Layer))
        logits = self._forward(tokens.to(owner.device), chunk, 0)
        chunk.keep(owner)
        self._chunks.append(chunk)
        return logits[owner]

    def advance(self, token: Tensor) -> Tensor:
        """One more token of every row; the logits after it, float32[rows, V]."""
        parts, start = [], 0
        for chunk in self._chunks:
            own = token[start : start + len(chunk)]
            start += len(own)
            parts.append(self._forward(own[:, None], chunk, chunk.length))
            chunk.length += 1
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def keep(self, alive: Tensor) -> Tensor | None:
        """Drops dead rows where that pays: `alive` bool[rows]; the places of those that stay, None: all stay."""
        self._chunks, kept = without_dead(self._chunks, alive)
        return kept

    def _forward(self, tokens: Tensor, chunk: _Chunk, start: int) -> Tensor:
        """Logits [rows, vocabulary] after `tokens` int[rows, q], whose first stands in column `start`."""
        end = start + tokens.shape[1]
        columns = torch.arange(_columns(end) if start else end, device=tokens.device)
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": (columns >= chunk.padding[:, None]) & (columns < end),
            "position_ids": (columns[start:end] - chunk.padding[:, None]).clamp(min=0),
            "past_key_values": chunk.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        logits: Tensor = self._model(**{name: value for name, value in inputs.items() if name in self._takes}).logits
        return logits[:, -1].float()


class _Chunk:
    """Rows with one cache: how many columns each is padded by, and how many there are."""

    def __init__(self, padding: Tensor, length: int, cache: Any) -> None:
        self.padding, self.length, self.cache = padding, length, cache

    def __len__(self) -> int:
        return len(self.padding)

    def keep(self, kept: Tensor) -> None:
        """Leaves these rows, in this order; a row may stand several times."""
        self.padding = self.padding[kept]
        for layer in self.cache.layers:
            layer.keep(kept)


def _columns(length: int) -> int:
    """How many columns a cache of this length has."""
    return -(-length // COLUMN_BLOCK) * COLUMN_BLOCK


class _Layer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, columns, size].

    It grows by whole blocks of columns, so that a step writes one column and copies nothing, and hands out *all* its
    columns, the unused ones for the mask to hide: read without gaps, memory is up to three times as fast (seen on a
    CPU). Windowed layers keep all columns too: the mask holds the window.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self.keys = _grown(self.keys, start, self.length)
            self.values = _grown(self.values, start, self.length)
            self.keys[:, :, start : self.length] = key_states
            self.values[:, :, start : self.length] = value_states
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Leaves these rows, in this order; a row may stand several times."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        end = self.length + query_length
        return (_columns(end) if self.is_initialized else end), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def _grown(held: Tensor, length: int, needed: int) -> Tensor:
    """`held` with room for `needed` columns; the new ones are 0, so that a hidden column stays a number."""
    if held.shape[2] == _columns(needed):
        return held
    grown = held.new_zeros((held.shape[0], held.shape[1], _columns(needed), held.shape[3]))
    grown[:, :, :length] = held[:, :, :length]
    return grown
