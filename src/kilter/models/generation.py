"""Sampling from a role of a trunk with a key-value cache, in plain torch, on any Hugging Face decoder.

Each prompt is prefilled once and its cache handed to all its samples; rows that have ended leave the batch. A sample is
drawn by inverse CDF from uniforms that belong to (prompt, sample, step), so it does not depend on what else stands in
its batch, beyond rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kilter.errors import ConfigError, ModelError
from kilter.models.attention import text_config
from kilter.models.trunk import Trunk

KEPT_SHARE = 0.75
"""Ended rows leave the batch once at most this share of it is alive: copying the cache then pays for itself."""
COLUMN_BLOCK = 16
"""A cache grows by this many tokens at a time."""
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The defaults are the model's own distribution, which is what PPO needs."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token. 0 to 2."""
    top_k: int = 0
    """Only the k likeliest tokens can be drawn; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this share of the probability; 1: all. In (0, 1]."""
    max_new_tokens: int = 64
    """An answer that has not ended after this many tokens is cut, and not `finished`."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature, self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k, self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 keeps every token)"),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"sampling.{name} is {value}; it must be {rule}")

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own distribution, unchanged."""
        return self.temperature == 1.0 and self.top_k == 0 and self.top_p == 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. It has at least one token: the end token alone is an answer."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    """The answer's tokens, the end token included when `finished`."""
    logprobs: tuple[float, ...]
    """Per token, nats, of the distribution sampled from (temperature, top-k and top-p applied); greedy: all 0."""
    finished: bool
    """Ended by a stop token, not by `max_new_tokens`."""


def generate(
    trunk: Trunk,
    role: str,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    generator: torch.Generator,
    batch_size: int = 128,
) -> list[list[Completion]]:
    """Draws `num_samples` answers to each prompt from `role`.

    Draws len(prompts) x num_samples x max_new_tokens uniforms from `generator`, whatever the answers' lengths, so its
    state afterwards depends on the request alone.

    Args:
        prompts: token ids, each at least one.
        stop_ids: tokens that end an answer; they belong to it.
        batch_size: rows decoded side by side. It changes speed and memory, and samples only by rounding.
    Returns:
        [prompt][sample].
    Raises:
        ModelError: a prompt leaves no room in the model's positions, the model has no key-value cache, or its
            log-probs are not numbers.
    """
    uniforms = torch.rand(
        (len(prompts), num_samples, sampling.max_new_tokens), generator=generator, device=generator.device
    )
    found: dict[tuple[int, int], Completion] = {}
    places = [
        (prompt, sample)
        for prompt in sorted(range(len(prompts)), key=lambda prompt: len(prompts[prompt]))
        for sample in range(num_samples)
    ]
    with _ready(trunk, role) as model:
        decoder = _Decoder(model, trunk.compute_dtype)
        decoder.check(prompts, sampling.max_new_tokens)
        uniforms = uniforms.to(decoder.device)
        for start in range(0, len(places), batch_size):
            chunk = places[start : start + batch_size]
            rows = torch.tensor(chunk, device=decoder.device)
            drawn = decoder.decode(
                [prompts[prompt] for prompt in dict(chunk)],
                owner=torch.unique_consecutive(rows[:, 0], return_inverse=True)[1],
                uniforms=uniforms[rows[:, 0], rows[:, 1]],
                sampling=sampling,
                stop_ids=stop_ids,
            )
            for (prompt, sample), (ids, logprobs, finished) in zip(chunk, drawn, strict=True):
                found[prompt, sample] = Completion(tuple(prompts[prompt]), tuple(ids), tuple(logprobs), finished)
    return [[found[prompt, sample] for sample in range(num_samples)] for prompt in range(len(prompts))]


@contextmanager
def _ready(trunk: Trunk, role: str) -> Iterator[nn.Module]:
    """The role's model with its adapter in place, in evaluation mode and without gradients; as it was, afterwards."""
    with trunk.acting_as(role) as model, torch.no_grad():
        was_training = model.training
        model.eval()  # gradient checkpointing switches the cache off in training mode
        try:
            yield model
        finally:
            model.train(was_training)


Drawn = tuple[list[int], list[float], bool]


class _Decoder:
    """A Hugging Face decoder as the sampler calls it: left-padded prompts once, then one token a row and step.

    The model builds its own masks from a two-dimensional one, so windows, ALiBi and any attention implementation hold.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype | None) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.config = text_config(model.config)
        self.device: torch.device = next(model.parameters()).device
        self.takes = set(inspect.signature(model.forward).parameters)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if "past_key_values" not in self.takes or not kinds <= ATTENTION_LAYERS:
            odd = ", ".join(sorted(kinds - ATTENTION_LAYERS)) or "no past_key_values"
            raise ModelError(
                f"{type(model).__name__} has layers without a key-value cache ({odd}); sampling needs a decoder whose "
                "layers are all attention"
            )

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Every prompt has a token, and prompt and answer fit into the model's positions."""
        limit = getattr(self.config, "max_position_embeddings", None)
        for at, prompt in enumerate(prompts):
            if not len(prompt):
                raise ModelError(f"prompt {at} has no tokens; a prompt needs at least one (start it with BOS)")
            if limit is not None and len(prompt) + max_new_tokens - 1 > limit:
                raise ModelError(
                    f"prompt {at} has {len(prompt)} tokens and sampling.max_new_tokens is {max_new_tokens}, but the "
                    f"model has {limit} positions; drop long prompts or lower max_new_tokens"
                )

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        owner: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        stop_ids: Collection[int],
    ) -> list[Drawn]:
        """One batch: `owner` int[rows] says which prompt each row answers, `uniforms` float[rows, steps] its draws."""
        num_rows, num_steps = uniforms.shape
        width = max(len(prompt) for prompt in prompts)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        cache = Cache(layer_class_to_replicate=_Layer)
        logits = self._prefill(prompts, padding, cache)[owner]
        for layer in cache.layers:
            layer.keep(owner)
        padding = padding[owner]
        stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=self.device)
        stops[[stop for stop in stop_ids if stop < len(stops)]] = True

        ids = torch.zeros((num_rows, num_steps), dtype=torch.long, device=self.device)
        logprobs = torch.zeros((num_rows, num_steps), device=self.device)
        rows = torch.arange(num_rows, device=self.device)  # which row of the request stands in each row of the batch
        alive = torch.ones(num_rows, dtype=torch.bool, device=self.device)
        look_every = 1 if self.device.type == "cpu" else 8  # to look is to wait for the device
        for step in range(num_steps):
            token, logprob = draw(logits, uniforms[rows, step], sampling)
            ids[rows, step], logprobs[rows, step] = token, logprob
            alive &= ~stops[token]
            if step + 1 == num_steps:
                break
            if step % look_every == 0:
                num_alive = int(alive.sum())
                if not num_alive:
                    break
                if num_alive <= KEPT_SHARE * len(rows):
                    kept = alive.nonzero()[:, 0]
                    rows, alive, padding, token = rows[kept], alive[kept], padding[kept], token[kept]
                    for layer in cache.layers:
                        layer.keep(kept)
            logits = self._forward(token[:, None], padding, width + step, cache)
        return _cut(ids, logprobs, stops)

    def _prefill(self, prompts: Sequence[Sequence[int]], padding: Tensor, cache: Cache) -> Tensor:
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.tensor([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        return self._forward(tokens.to(self.device), padding, 0, cache)

    def _forward(self, tokens: Tensor, padding: Tensor, start: int, cache: Cache) -> Tensor:
        """Logits [rows, vocabulary] after `tokens` int[rows, q], whose first stands in column `start`."""
        end = start + tokens.shape[1]
        columns = torch.arange(_columns(end) if start else end, device=self.device)
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": (columns >= padding[:, None]) & (columns < end),
            "position_ids": (columns[start:end] - padding[:, None]).clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            logits: Tensor = self.model(**{name: value for name, value in inputs.items() if name in self.takes}).logits
        return logits[:, -1].float()


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


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The token at quantile `uniforms` of each row's distribution, by inverse CDF in the order of the vocabulary.

    Args:
        logits: float32[rows, vocabulary].
        uniforms: float32[rows], in [0, 1): at most 1 - 2^-24.
    Returns:
        int[rows] tokens and float[rows] their log-probs under the distribution drawn from (greedy: 0).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms)
    logprobs = torch.log_softmax(restrict(logits / sampling.temperature, sampling), -1)
    mass = logprobs.exp().cumsum(-1)
    point = uniforms[:, None] * mass[:, -1:]  # below the total even after rounding, because uniforms are
    token = torch.searchsorted(mass, point, right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits that top-k, then top-p, leave out to -inf. Ties at the k-th place all stay."""
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= sampling.top_p  # what stands before it already holds top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def _cut(ids: Tensor, logprobs: Tensor, stops: Tensor) -> list[Drawn]:
    """Each row up to and including its first stop token."""
    ended = stops[ids]
    finished = ended.any(-1)
    lengths = torch.where(finished, ended.int().argmax(-1) + 1, ids.shape[1])
    drawn = [
        (row[:length], numbers[:length], end)
        for row, numbers, length, end in zip(
            ids.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
        )
    ]
    if any(number != number for _, numbers, _ in drawn for number in numbers):
        raise ModelError("sampling log-probs are not numbers (NaN); the model's weights or logits are not finite")
    return drawn
