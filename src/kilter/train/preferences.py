"""Objectives of preference losses: any registered one by name, alone or mixed with others by weight.

`Comparison` reads pairs and rankings, `Thumbs` single responses. Both read each response's log-prob once, whatever the
mixture, and hand every loss the inputs that its signature names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kilter.errors import CheckError, ConfigError
from kilter.losses import RANKED_LOSSES, UNPAIRED_LOSSES, PreferenceLoss, bind, preference_losses
from kilter.ops import pairs_in_groups, sum_by
from kilter.train import distributed
from kilter.train.objectives import LossOutput, extra, side_by_side, summed
from kilter.tree import Batch, part


@dataclass(frozen=True)
class Term:
    """One loss of a mixture: its name, its options (the others keep their defaults), its weight."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def loss(self) -> PreferenceLoss:
        """The registered loss."""
        return preference_losses()[self.name]

    @property
    def beta(self) -> float:
        """The scale of its implicit reward."""
        return float(self.options.get("beta", self.loss.defaults.get("beta", 1.0)))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.loss.fn(*[inputs[name] for name in self.loss.inputs], **self.options)


def preference(
    name: str = "dpo",
    options: Mapping[str, Any] | None = None,
    *,
    role: str = "policy",
    reference_free: bool = False,
) -> Comparison | Thumbs:
    """One preference loss by name. Raises ConfigError as `mixture` does."""
    return mixture([Term(name, options or {})], role=role, reference_free=reference_free)


def mixture(terms: Sequence[Term], *, role: str = "policy", reference_free: bool = False) -> Comparison | Thumbs:
    """A weighted sum of preference losses, all over comparisons or all over thumbs. A tied pair counts half each way.

        loss = sum over terms of weight * sum of the term's losses / the whole step's count of its unit

    Args:
        role: whose log-probs train.
        reference_free: take the reference's log-probs as 0 in every loss that asks for them.
    Raises:
        ConfigError: no such loss, no such option, a value out of its range, a name twice, or two kinds of data.
    """
    for term in terms:
        try:
            bind(term.name, term.options)
        except ValueError as err:
            raise ConfigError(str(err)) from err
    names = [term.name for term in terms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the loss {twice[0]!r} stands twice in a mixture; add up the weights")
    over_thumbs = [name in UNPAIRED_LOSSES for name in names]
    if all(over_thumbs):
        return Thumbs(tuple(terms), role, reference_free)
    if any(over_thumbs):
        raise ConfigError(f"losses {', '.join(names)} read comparisons and thumbs; a mixture reads one kind of data")
    return Comparison(tuple(terms), role, reference_free)


class _Read(NamedTuple):
    """What one forward says of the responses, all of them or some."""

    logprobs: Tensor  # float[N]
    ref_logprobs: Tensor  # float[N]
    logps: Tensor  # float[R]
    ref_logps: Tensor  # float[R]
    tokens: Tensor  # float[R]
    likeness: Tensor | None  # float[R], w of `losses.pair.wpo`, without gradient

    def sides(self, loss: PreferenceLoss) -> tuple[Tensor, Tensor]:
        """float[R] each: log-probs under policy and reference, sums or means as the loss wants them."""
        if not loss.length_normalized:
            return self.logps, self.ref_logps
        return self.logps / self.tokens, self.ref_logps / self.tokens


@dataclass(frozen=True)
class _Preference(ABC):
    """What objectives over comparisons and over thumbs share."""

    terms: tuple[Term, ...]
    role: str = "policy"
    reference_free: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry the reference's log-probs."""
        return not self.reference_free and any(term.loss.needs_reference for term in self.terms)

    def asks_for(self, *names: str) -> bool:
        """Whether any loss has one of these inputs."""
        return any(name in names for term in self.terms for name in term.loss.inputs)

    @abstractmethod
    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput: ...

    @abstractmethod
    def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The step's batches with what is a function of the whole step."""

    def _read(self, trunk: nn.Module, batch: Batch) -> _Read:
        """One forward over all responses of a batch."""
        tree, num_responses = batch.tree, len(batch.tree.last)
        likeness = None
        if self.asks_for("likeness"):
            logprobs, _, collision = trunk(tree, {self.role: "token_stats"})[self.role].unbind(1)
        else:
            logprobs, collision = trunk(tree, {self.role: "logprobs"})[self.role], None
        tokens = sum_by(torch.ones_like(logprobs), tree.leaf, num_responses)
        if collision is not None:
            surplus = sum_by((logprobs - collision).detach(), tree.leaf, num_responses)
            likeness = (surplus / tokens).exp()
        ref_logprobs = torch.zeros_like(logprobs)
        if batch.ref_logprobs is not None and not self.reference_free:
            ref_logprobs = batch.ref_logprobs.to(logprobs.dtype)
        elif num_responses and self.needs_reference:
            raise CheckError(
                f"batch: no ref_logprobs, which {', '.join(repr(term.name) for term in self.terms)} needs; give the "
                "groups to `reference.with_reference` first"
            )
        return _Read(
            logprobs,
            ref_logprobs,
            sum_by(logprobs, tree.leaf, num_responses),
            sum_by(ref_logprobs, tree.leaf, num_responses),
            tokens,
            likeness,
        )

    def _rewards(self, read: _Read) -> Tensor:
        """float[R], the implicit reward of the first loss, without gradient."""
        logps, ref_logps = read.sides(self.terms[0].loss)
        return self.terms[0].beta * (logps - ref_logps).detach()


# Pairs and rankings --------------------------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    """Which response is preferred to which: Q directed pairs, a tie standing in both directions at half weight."""

    better: Tensor  # int[Q]; the first P are all pairs of all groups, behind them stand the tied ones the other way
    worse: Tensor  # int[Q]
    share: Tensor  # float[Q], the record's weight, half for both directions of a tie; times the gap in "pair_weight"
    ordered: Tensor  # float[P], 1, or 0 for a tie: it has no better side to show in figures


def _pairs(batch: Batch) -> _Pairs:
    rank = extra(batch, "rank", "a loss over comparisons")
    a, b = pairs_in_groups(batch.tree.group)
    first_is_better = rank[a] <= rank[b]
    better, worse = torch.where(first_is_better, a, b), torch.where(first_is_better, b, a)
    tied = rank[a] == rank[b]
    share = torch.where(tied, 0.5, 1.0)
    if "weight" in batch.extras:
        share = share * batch.extras["weight"][a]
    if "pair_weight" in batch.extras:
        share = share * (batch.extras["pair_weight"][a] - batch.extras["pair_weight"][b]).abs()
    return _Pairs(
        torch.cat([better, worse[tied]]),
        torch.cat([worse, better[tied]]),
        torch.cat([share, share[tied]]),
        (~tied).float(),
    )


RANKED_OVER_THE_STEP = ("ref_ranked", "rejected_ranked", "chosen_ranked")


@dataclass(frozen=True)
class Comparison(_Preference):
    """Pair losses over all pairs of each group and ranked losses over each group, weighted and summed."""

    @torch.no_grad()
    def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """What is a function of the whole step: the count of chosen tokens, the ranks of `aot`'s log-ratios."""
        if any(term.loss.unit == "chosen_tokens" for term in self.terms):
            batches = [_with_chosen_tokens(batch) for batch in batches]
        if not self.asks_for(*RANKED_OVER_THE_STEP):
            return batches
        rows = []  # float[4, Q] of each batch: both differences and both log-ratios
        for batch in batches:
            pairs, read = _pairs(batch), self._read(trunk, batch)
            ratios = read.logps - read.ref_logps
            rows.append(
                torch.stack(
                    [
                        (read.logps[pairs.better] - read.logps[pairs.worse]),
                        (read.ref_logps[pairs.better] - read.ref_logps[pairs.worse]),
                        ratios[pairs.better],
                        ratios[pairs.worse],
                    ]
                )
            )
        own = torch.cat(rows, dim=1)
        everywhere, at = distributed.gather_columns(own)
        policy, reference, chosen, rejected = everywhere
        found = (
            _value_of_same_rank(reference, policy),
            _value_of_same_rank(rejected, chosen),
            _value_of_same_rank(chosen, rejected),
        )
        sizes = [row.shape[1] for row in rows]
        columns = [torch.split(value[at : at + own.shape[1]], sizes) for value in found]
        return [
            replace(batch, extras=batch.extras | dict(zip(RANKED_OVER_THE_STEP, own_values, strict=True)))
            for batch, *own_values in zip(batches, *columns, strict=True)
        ]

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        pairs, read = _pairs(batch), self._read(trunk, batch)
        terms: dict[str, tuple[Tensor, str]] = {}
        for term in self.terms:
            if term.name in RANKED_LOSSES:
                logps, ref_logps = read.sides(term.loss)
                losses = term(
                    {
                        "logps": logps,
                        "ref_logps": ref_logps,
                        "group": batch.tree.group,
                        "rank": extra(batch, "rank", repr(term.name)),
                        "tokens": read.tokens,
                    }
                ) * batch.extras.get("weight", torch.ones_like(logps))
            else:
                losses = term(_pair_inputs(term.loss, batch, pairs, read)) * pairs.share
            terms[term.name] = (term.weight * losses.sum(), term.loss.unit)
        rewards = self._rewards(read)
        better, worse, ordered = pairs.better[: len(pairs.ordered)], pairs.worse[: len(pairs.ordered)], pairs.ordered
        metrics = side_by_side("rewards", rewards[better], rewards[worse], ordered)
        metrics["pairs/weight"] = (summed(torch.sigmoid(rewards[worse] - rewards[better]) * ordered), ordered.sum())
        shown = {"logps": read.logps.detach()}
        if self.needs_reference:
            shown["displacement"] = (read.logps - read.ref_logps).detach()
        for name, values in shown.items():
            sides = side_by_side(name, values[better], values[worse], ordered)
            metrics |= {key: sides[key] for key in (f"{name}/chosen", f"{name}/rejected")}
        return LossOutput(terms, metrics)

    @torch.no_grad()
    def margins(self, trunk: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(better, worse, by how much the implicit reward of the better one leads) of every pair that is no tie."""
        pairs, rewards = _pairs(batch), self._rewards(self._read(trunk, batch))
        untied = pairs.ordered > 0
        better, worse = (side[: len(untied)][untied] for side in (pairs.better, pairs.worse))
        return better, worse, rewards[better] - rewards[worse]


def _with_chosen_tokens(batch: Batch) -> Batch:
    """The batch with the count of its better responses' tokens, a response counting once for each pair it wins."""
    pairs = _pairs(batch)
    ones = torch.ones(len(batch.tree.leaf), dtype=torch.float64, device=batch.tree.leaf.device)
    tokens = sum_by(ones, batch.tree.leaf, len(batch.tree.last))
    return replace(batch, units=batch.units | {"chosen_tokens": float((tokens[pairs.better] * pairs.share).sum())})


def _value_of_same_rank(values: Tensor, by: Tensor) -> Tensor:
    """For each element of `by`, the element of `values` that has the same rank among its own."""
    found = torch.empty_like(values)
    found[by.argsort(stable=True)] = values.sort().values
    return found


def _pair_inputs(loss: PreferenceLoss, batch: Batch, pairs: _Pairs, read: _Read) -> Mapping[str, Tensor]:
    """The inputs of a pair loss by name, those that cost something only where it asks for them."""
    better, worse = pairs.better, pairs.worse
    logps, ref_logps = read.sides(loss)
    found = {
        "chosen": logps[better],
        "rejected": logps[worse],
        "ref_chosen": ref_logps[better],
        "ref_rejected": ref_logps[worse],
        "chosen_tokens": read.tokens[better],
        "rejected_tokens": read.tokens[worse],
    }
    if read.likeness is not None:
        found["likeness"] = read.likeness[better] * read.likeness[worse]
    if any(name.endswith("_head") for name in loss.inputs):
        shorter = torch.minimum(read.tokens[better], read.tokens[worse]).long()
        starts = read.tokens.cumsum(0).long() - read.tokens.long()
        for name, side in (("chosen_head", better), ("rejected_head", worse)):
            found[name] = _head(read.logprobs, starts[side], shorter)
            found[f"ref_{name}"] = _head(read.ref_logprobs, starts[side], shorter)
    return found | {name: batch.extras[name] for name in RANKED_OVER_THE_STEP if name in batch.extras}


def _head(logprobs: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Sums of `length` log-probs from `start` on; in float64, because a running total grows with the batch."""
    total = torch.cat([logprobs.new_zeros(1).double(), logprobs.double().cumsum(0)])
    return (total[start + length] - total[start]).to(logprobs.dtype)


# Single responses ----------------------------------------------------------------------------------------------------

THUMBS = ("desirable", "mismatched")
"""What responses with a thumb carry."""


@dataclass(frozen=True)
class Thumbs(_Preference):
    """Losses over single responses with a thumb up or down, weighted and summed, per prompt.

    Where a loss asks for `kl`, groups carry a second response that belongs to another prompt, marked `mismatched`: it
    only measures how far the policy is from the reference, before the step, and is no unit (`sources.with_mismatched`).
    """

    @property
    def needs_mismatched(self) -> bool:
        """Whether groups must carry responses of other prompts."""
        return self.asks_for("kl")

    @torch.no_grad()
    def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Fills in what is a function of the whole step, `kl` and `shift` of `registry.UNPAIRED_INPUTS`; then the
        responses that are not to be learned from have done their part.
        """
        marks = [self._thumbs(batch)[1] > 0 for batch in batches]
        found = self._over_the_step(trunk, batches, marks) if self.asks_for("kl", "shift") else {}
        learned = [
            part(batch, ~mark, extras=THUMBS) if mark.any() else batch
            for batch, mark in zip(batches, marks, strict=True)
        ]
        return [replace(batch, extras=batch.extras | found) for batch in learned]

    def _over_the_step(self, trunk: nn.Module, batches: Sequence[Batch], marks: Sequence[Tensor]) -> dict[str, Tensor]:
        sums = torch.zeros(2, 3, dtype=torch.float64, device=batches[0].tree.tokens.device)
        for batch, mismatched in zip(batches, marks, strict=True):
            measured = batch if self.asks_for("shift") else part(batch, mismatched, extras=THUMBS)
            thumb, mark = (values.double() for values in self._thumbs(measured))
            read = self._read(trunk, measured)
            kinds = torch.stack([mark, (1 - mark) * thumb, (1 - mark) * (1 - thumb)])
            sums += torch.stack([kinds @ (read.logps - read.ref_logps).double(), kinds.sum(1)])
        ratios, counts = distributed.total(sums)
        means = ratios / counts.clamp(min=1)
        shift = means[1:].sum() / (counts[1:] > 0).sum().clamp(min=1)
        return {"kl": means[0].clamp(min=0).float(), "shift": shift.float()}

    def _thumbs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Thumbs and marks of mismatched responses; float[R] each."""
        desirable = extra(batch, "desirable", "a loss over thumbs")
        if self.needs_mismatched:
            return desirable, extra(batch, "mismatched", "a loss with a mismatched baseline")
        return desirable, batch.extras.get("mismatched", torch.zeros_like(desirable))

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        desirable, _ = self._thumbs(batch)
        read = self._read(trunk, batch)
        rewards = self._rewards(read)
        terms: dict[str, tuple[Tensor, str]] = {}
        for term in self.terms:
            logps, ref_logps = read.sides(term.loss)
            inputs = {"logps": logps, "ref_logps": ref_logps, "desirable": desirable, "tokens": read.tokens}
            inputs |= {
                name: extra(batch, name, repr(term.name)) for name in ("kl", "shift") if name in term.loss.inputs
            }
            terms[term.name] = (term.weight * term(inputs).sum(), term.loss.unit)
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            f"rewards/{side}": (summed(rewards * weight), weight.sum())
            for side, weight in (("desirable", desirable), ("undesirable", 1 - desirable))
        }
        if self.needs_mismatched:
            metrics["kl/mismatched"] = (batch.extras["kl"].double(), 1.0)
        return LossOutput(terms, metrics)
