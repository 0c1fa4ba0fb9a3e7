"""Sampling from a role: prompts in, tokens out, with their log-probs under the distribution that they were drawn from.

A sample is decided by its seed: its uniform numbers are a function of that alone, and each token is drawn by inverse
CDF. So it does not depend, but for rounding, on what is sampled beside it; and how many rows go side by side is the
caller's number, never a guess about memory, so that a resumed run draws the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kilter.errors import ModelError
from kilter.models.attention import attention_kinds, text_config
from kilter.models.cached import CachedRows
from kilter.models.decoding import SharedRows
from kilter.models.sampling import Sampling, Stops, draw, uniforms
from kilter.models.trunk import Trunk, decoder

ADMITTED_SHARE = 0.25
"""Waiting prompts are taken in once this share of the rows is free: taking in a few at a time is slow."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. It has at least one token: the end token alone is an answer."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    """The answer's tokens, the end token included when `finished`."""
    logprobs: tuple[float, ...]
    """Per token, nats, of the distribution sampled from (all of `Sampling` applied); greedy: all 0."""
    finished: bool
    """Ended by a stop token or a stop text, not by `max_new_tokens`."""


class Sampler(Protocol):
    """Answers prompts from one policy, wherever that is held."""

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Tensor, *, sampling: Sampling, stops: Stops
    ) -> list[list[Completion]]:
        """Answers, [prompt][sample]: one for each of `seeds` int64[P, n] (`draw_seeds`)."""
        ...


class NativeSampler:
    """Samples from a role of a trunk, in this process.

    Args:
        batch_size: rows decoded side by side. It changes speed and memory, and samples only by rounding.
    """

    def __init__(self, trunk: Trunk, role: str, *, batch_size: int = 256) -> None:
        self._trunk, self._role, self._batch_size = trunk, role, batch_size

    @property
    def _device(self) -> torch.device:
        return next(self._trunk.parameters()).device

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Tensor,
        *,
        sampling: Sampling,
        stops: Stops,
        limits: Tensor | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`.

        Args:
            limits: int[P, n], a limit of its own for each answer, tokens; at most `max_new_tokens`.
        Raises:
            ModelError: a prompt leaves no room in the model's positions, the model has no key-value cache, or its
                log-probs are not numbers.
        """
        request = _Request(prompts, seeds.to(self._device), limits, sampling, stops)
        for _ in self._steps(request):
            pass
        return request.completions()

    def stream(self, prompt: Sequence[int], seed: int, *, sampling: Sampling, stops: Stops) -> Iterator[list[int]]:
        """One answer as it is drawn: after each token all tokens so far.

        Until it is exhausted or closed the role's adapter is in place and gradients are off, for the caller too.
        """
        request = _Request([prompt], torch.tensor([[seed]], device=self._device), None, sampling, stops)
        for _ in self._steps(request):
            yield request.answer(0)

    def _steps(self, request: _Request) -> Iterator[None]:
        with _ready(self._trunk, self._role) as model:
            _check(model, request.prompts, request.sampling.max_new_tokens)
            inner: Any = decoder(model)
            kinds = attention_kinds(inner)
            rows = CachedRows(model) if isinstance(kinds, str) or not kinds.segments else SharedRows(model, inner)
            yield from _draw_all(rows, request, self._batch_size)


@contextmanager
def _ready(trunk: Trunk, role: str) -> Iterator[nn.Module]:
    """The role's model with its adapter in place, in evaluation mode and without gradients; as it was, afterwards."""
    with trunk.acting_as(role) as model, torch.no_grad():
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()  # gradient checkpointing switches the cache off in training mode
        try:
            with trunk.lowered(), trunk.autocast(device):
                yield model
        finally:
            model.train(was_training)


def _check(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Every prompt has a token, and prompt and answer fit into the model's positions."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    for at, prompt in enumerate(prompts):
        if not len(prompt):
            raise ModelError(f"prompt {at} has no tokens; a prompt needs at least one (start it with BOS)")
        if limit is not None and len(prompt) + max_new_tokens - 1 > limit:
            raise ModelError(
                f"prompt {at} has {len(prompt)} tokens and sampling.max_new_tokens is {max_new_tokens}, but the "
                f"model has {limit} positions; drop long prompts or lower max_new_tokens"
            )


class _Request:
    """What is asked for, and what was drawn of it: row p n + s is sample s of prompt p."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], seeds: Tensor, limits: Tensor | None, sampling: Sampling, stops: Stops
    ) -> None:
        self.prompts, self.sampling, self.stops = prompts, sampling, stops
        self._per_prompt = seeds.shape[1]
        flat, steps = seeds.flatten(), sampling.max_new_tokens
        self.points = uniforms(flat, steps)
        self.limits = torch.full_like(flat, steps) if limits is None else limits.flatten().to(flat.device)
        self.ids = flat.new_zeros((len(flat), steps + 1))  # rows that have ended write into the last column
        self.logprobs = torch.zeros_like(self.ids, dtype=torch.float32)
        self.lengths = torch.zeros_like(flat)
        self.finished = torch.zeros_like(flat, dtype=torch.bool)
        self._order = sorted(range(len(prompts)), key=lambda prompt: len(prompts[prompt]))
        self._taken = 0

    @property
    def waiting(self) -> bool:
        """Not all rows were taken."""
        return self._taken < len(self.lengths)

    def take(self, most: int) -> tuple[list[Sequence[int]], Tensor, Tensor]:
        """The next rows by length of prompt, at most so many, whole prompts where they fit: the prompts, int[rows]
        which of them each row answers, and int[rows] their numbers in the request."""
        start, each = self._taken, self._per_prompt
        end = min(start + most, len(self.lengths))
        if end < len(self.lengths) and end - end % each > start:
            end -= end % each
        self._taken = end
        places = torch.arange(start, end, device=self.lengths.device)
        first = start // each
        taken = self._order[first : -(-end // each)]
        owner = places // each - first
        numbers = torch.tensor(taken, device=places.device)[owner] * each + places % each
        return [self.prompts[prompt] for prompt in taken], owner, numbers

    def record(self, rows: Tensor, alive: Tensor, token: Tensor, logprob: Tensor) -> Tensor:
        """Keeps the tokens of those rows that are alive; which are, after it."""
        column = torch.where(alive, self.lengths[rows], self.ids.shape[1] - 1)
        self.ids[rows, column], self.logprobs[rows, column] = token, logprob
        self.lengths[rows] += alive
        ended = self.stops.ended(token, alive, lambda place: self.answer(int(rows[place])))
        self.finished[rows] |= alive & ended
        return alive & ~ended & (self.lengths[rows] < self.limits[rows])

    def answer(self, row: int) -> list[int]:
        """The tokens of a row so far."""
        return self.ids[row, : int(self.lengths[row])].tolist()

    def completions(self) -> list[list[Completion]]:
        """All answers, [prompt][sample]."""
        drawn = zip(*(held.tolist() for held in (self.ids, self.logprobs, self.lengths, self.finished)), strict=True)
        found = [
            [
                Completion(tuple(prompt), tuple(ids[:length]), tuple(logprobs[:length]), finished)
                for ids, logprobs, length, finished in islice(drawn, self._per_prompt)
            ]
            for prompt in self.prompts
        ]
        if any(number != number for answers in found for answer in answers for number in answer.logprobs):
            raise ModelError("sampling log-probs are not numbers (NaN); the model's weights or logits are not finite")
        return found


def _draw_all(decoded: CachedRows | SharedRows, request: _Request, batch_size: int) -> Iterator[None]:
    """Takes waiting prompts in, draws a token for every row, drops what has ended, decodes; yields after each draw."""
    device = request.ids.device
    look_every = 1 if device.type == "cpu" else 8  # to look is to wait for the device
    rows = torch.empty(0, dtype=torch.long, device=device)  # which row of the request stands in each row decoded
    alive, token = rows.bool(), rows
    logits = torch.empty(0, device=device)
    seen: Tensor | None = None
    last_steps: deque[int] = deque()  # of what was admitted together, when the last of it has met its limit
    for step in count():
        if not (len(rows) or request.waiting):
            return
        free = batch_size - len(rows)
        if request.waiting and (not len(rows) or free >= ADMITTED_SHARE * batch_size):
            prompts, owner, numbers = request.take(free)
            first = decoded.admit(prompts, owner)
            logits = torch.cat([logits, first]) if len(rows) else first
            rows, alive = torch.cat([rows, numbers]), torch.cat([alive, torch.ones_like(numbers, dtype=torch.bool)])
            if request.sampling.repetition_penalty != 1:
                new = _held(prompts, first)[owner]
                seen = new if seen is None else torch.cat([seen, new])
            last_steps.append(step + int(request.limits[numbers].max()) - 1)
        points = request.points[rows, request.lengths[rows].clamp(max=request.points.shape[1] - 1)]
        token, logprob = draw(logits, points, request.sampling, seen)
        alive = request.record(rows, alive, token, logprob)
        yield
        if step % look_every == 0 or step == last_steps[0]:
            if (kept := decoded.keep(alive)) is not None:
                rows, alive, token = rows[kept], alive[kept], token[kept]
                seen = None if seen is None else seen[kept]
            while last_steps and last_steps[0] <= step:
                last_steps.popleft()
            if not len(rows):
                continue
        if seen is not None:
            seen[torch.arange(len(rows), device=device), token] = True
        logits = decoded.advance(token)


def _held(prompts: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """bool[prompts, V]: the tokens that each prompt holds."""
    held = torch.zeros((len(prompts), like.shape[-1]), dtype=torch.bool, device=like.device)
    for at, prompt in enumerate(prompts):
        held[at, torch.tensor(prompt, device=like.device)] = True
    return held
