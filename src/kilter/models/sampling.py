"""How a token is drawn: what may be drawn, from which uniform number, and where an answer ends. No model is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilter.config import DecodingConfig
from kilter.errors import ConfigError

BLOCK = 256
"""Words of the vocabulary summed together before one of them is looked for."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The defaults are the model's own distribution, which is what PPO needs.

    What is left out is left out in this order: repetition, temperature, top-k, top-p, min-p; each sees what the one
    before left, as in transformers.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token. 0 to 2."""
    top_k: int = 0
    """Only the k likeliest tokens can be drawn; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together hold this share of the probability; 1: all. In (0, 1]. (Holtzman et al.
    2020, arXiv 1904.09751)"""
    max_new_tokens: int = 64
    """An answer that has not ended after this many tokens is cut, and not `finished`."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest; 0: all. In [0, 1]. (Nguyen et al. 2024, arXiv
    2407.01082)"""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer hold already, and multiplies negative ones; 1: none.
    Above 0. (Keskar et al. 2019, arXiv 1909.05858, section 4.1)"""
    stop: tuple[str, ...] = ()
    """An answer ends when its text holds one of these. The tokens stay; texts are cut before it."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature, self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k, self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "in (0, 1] (1 keeps every token)"),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            "min_p": (self.min_p, 0 <= self.min_p <= 1, "in [0, 1] (0 keeps every token)"),
            "repetition_penalty": (self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is none)"),
            "stop": (self.stop, all(self.stop), "texts that are not empty"),
        }
        for name, (value, holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"sampling.{name} is {value}; it must be {rule}")

    @classmethod
    def of(cls, config: DecodingConfig) -> Sampling:
        """As a recipe or a command line says it."""
        return cls(**{name: getattr(config, name) for name in DecodingConfig.model_fields})

    @property
    def is_plain(self) -> bool:
        """Draws from the model's own distribution, unchanged."""
        return self.temperature == 1.0 and not self.restricts and self.repetition_penalty == 1.0

    @property
    def restricts(self) -> bool:
        """Leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def settled(self, text: str) -> str:
        """What of the text of an unfinished answer no stop text can take back."""
        begun = (stop[:length] for stop in self.stop for length in range(len(stop), 0, -1))
        return text[: len(text) - max((len(part) for part in begun if text.endswith(part)), default=0)]

    def cut(self, text: str) -> str:
        """The text before the first of the `stop` texts in it."""
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return text[: min(places)] if places else text


# Random numbers ------------------------------------------------------------------------------------------------------

_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw_seeds(generator: torch.Generator, num_prompts: int, num_samples: int) -> Tensor:
    """int64[P, n]: a seed for each sample. The generator moves by the request alone, whatever the answers' lengths."""
    return torch.randint(2**62, (num_prompts, num_samples), generator=generator, device=generator.device)


def uniforms(seeds: Tensor, steps: int) -> Tensor:
    """The first `steps` numbers of each seed's own stream, the same on every device.

    Number i of seed s is the upper 24 bits of splitmix64's output at s + (i + 1) 0x9E3779B97F4A7C15 (Steele, Lea, Flood
    2014, "Fast splittable pseudorandom number generators", figure 17), over 2^24.

    Args:
        seeds: int64[...].
    Returns:
        float32[..., steps], in [0, 1): at most 1 - 2^-24.
    """
    z = seeds[..., None] + torch.arange(1, steps + 1, device=seeds.device) * _GOLDEN  # wraps, as it should
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return _shifted(z ^ _shifted(z, 31), 40).float() / 2**24


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift of signed numbers drags the sign along."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


# One token -----------------------------------------------------------------------------------------------------------


def draw(logits: Tensor, points: Tensor, sampling: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token at quantile `points` of each row's distribution, by inverse CDF in the order of the vocabulary.

    Args:
        logits: float32[rows, vocabulary].
        points: float32[rows], in [0, 1): at most 1 - 2^-24.
        seen: bool[rows, vocabulary], the tokens that prompt and answer hold; read if there is a repetition penalty.
    Returns:
        int[rows] tokens and float[rows] their log-probs under the distribution drawn from (greedy: 0).
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None
        factor = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(points)
    logits = restrict(logits / sampling.temperature if sampling.temperature != 1 else logits, sampling)
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp_()
    # In two rounds, a block and then a word in it: to add up the whole vocabulary one by one is slow.
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).view(len(weights), -1, BLOCK)
    mass = blocks.sum(-1).cumsum(-1)
    total = mass[:, -1:]
    point = points[:, None] * total  # below the total even after rounding, because points are
    block = torch.searchsorted(mass, point, right=True).clamp_(max=mass.shape[-1] - 1)
    before = torch.where(block > 0, mass.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1)
    # A block's sum and the last of its partial sums round differently: never past the last word that has weight.
    within = torch.minimum((point - before).clamp_(min=0), inside[:, -1:].nextafter(inside.new_zeros(())))
    token = block * BLOCK + torch.searchsorted(inside, within, right=True)
    token.clamp_(max=logits.shape[-1] - 1)  # weights that are not numbers lead nowhere
    logprob = logits.gather(-1, token) - highest - total.log()
    return token[:, 0], logprob[:, 0]


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sets the logits that top-k, then top-p, then min-p, leave out to -inf. Ties at the k-th place all stay."""
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= sampling.top_p  # what stands before it already holds top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if sampling.min_p > 0:
        share = logits.softmax(-1)
        logits = logits.masked_fill(share < sampling.min_p * share.amax(-1, keepdim=True), -torch.inf)
    return logits


# Ends ----------------------------------------------------------------------------------------------------------------


class Stops:
    """Where answers end: at a stop token, or where the text holds a stop text.

    Texts are looked at only after tokens that can be the end of a stop text, so a row seldom costs anything.

    Args:
        ids: tokens that end an answer; they belong to it.
        texts: see `Sampling.stop`.
        decode: the text of tokens; needed for `texts`.
    """

    def __init__(
        self, ids: Collection[int], texts: Sequence[str] = (), *, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        if texts and decode is None:
            raise ConfigError(f"stop texts {list(texts)} are looked for in what tokens say; give `decode`")
        self.ids, self.texts = tuple(ids), tuple(texts)
        self._decode = decode
        self._last = {text[-1] for text in texts}
        self._can_end = torch.empty(0, dtype=torch.int8)  # by token: 1 can end a stop text, 0 cannot, -1 not known yet

    def ended(self, token: Tensor, asked: Tensor, answer: Callable[[int], Sequence[int]]) -> Tensor:
        """bool[rows]: which rows end with the token just drawn.

        Args:
            token: int[rows].
            asked: bool[rows], the rows to look at.
            answer: the tokens of a row by its place, the one just drawn included.
        """
        found = torch.zeros_like(token, dtype=torch.bool)
        for stop in self.ids:
            found |= token == stop
        if self._decode is not None and self.texts:
            possible = self._possible(token.cpu()).to(token.device)
            for place in (possible & asked & ~found).nonzero()[:, 0].tolist():
                text = self._decode(answer(place))
                found[place] = any(stop in text for stop in self.texts)
        return found

    def _possible(self, token: Tensor) -> Tensor:
        """bool[rows]: tokens with which a stop text can end."""
        assert self._decode is not None
        if (missing := int(token.max()) + 1 - len(self._can_end)) > 0:
            self._can_end = torch.nn.functional.pad(self._can_end, (0, missing), value=-1)
        for new in torch.unique(token[self._can_end[token] < 0]).tolist():
            piece = self._decode((new,))
            # A token alone may lose its spaces, or be a part of a letter.
            can = "\ufffd" in piece or any(letter.isspace() or letter in piece for letter in self._last)
            self._can_end[new] = can
        return self._can_end[token] > 0
