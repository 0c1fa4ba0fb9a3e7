"""From records to groups of tokens, and from groups to the micro-batches of each step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from kilter.data.chat import Encoded
from kilter.data.convert import ranking_of
from kilter.errors import DataError
from kilter.records import (
    Conversation,
    Demonstration,
    Document,
    Judgement,
    PreferencePair,
    Ranking,
    Rating,
    Record,
    UnpairedFeedback,
)
from kilter.train import distributed
from kilter.tree import Batch, Group, Response, make_batches

OverLong = Literal["drop", "cut_prompt", "error"]
Score = Literal["responses", "all"]


class Encoder(Protocol):
    """The part of `data.chat.ChatEncoder` that is used here."""

    def prompt(self, messages: Conversation) -> tuple[int, ...]: ...

    def response(self, messages: Conversation, text: str) -> tuple[int, ...]: ...

    def rows(self, messages: Conversation) -> tuple[Encoded, ...]: ...

    def document(self, text: str) -> tuple[int, ...]: ...


# Records to groups ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the records: nothing is lost without being counted."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> groups left out."""
    cut: int = 0
    """Groups whose prompt lost its beginning."""

    def __str__(self) -> str:
        rows = [f"{count} dropped ({reason})" for reason, count in sorted(self.dropped.items())]
        return ", ".join([*rows, *([f"{self.cut} prompts cut"] if self.cut else [])]) or "nothing dropped or cut"


def fit_length(
    group: Group, max_tokens: int, *, over_long: OverLong, tally: Tally, bos_id: int | None = None
) -> Group | None:
    """Holds a group to `max_tokens` for its prompt with any one response. A response's end is never cut.

    Args:
        over_long: `drop` leaves the group out; `cut_prompt` takes tokens from the beginning of the prompt, a BOS there
            aside; `error` refuses it.
        tally: counts what was dropped or cut.
        bos_id: the token to keep at the beginning of a prompt that is cut.
    """
    longest = max(len(response.ids) for response in group.responses)
    length = len(group.prompt) + longest
    if length <= max_tokens:
        return group
    if over_long == "error":
        raise DataError(
            f"{group.name or 'record'}: {length} tokens, at most {max_tokens} fit; raise max_tokens, or set over_long "
            "to 'drop' or 'cut_prompt'"
        )
    first = group.prompt[:1] if bos_id is not None and group.prompt[:1] == (bos_id,) else ()
    room = max_tokens - longest - len(first)
    if over_long == "drop":
        tally.dropped[f"longer than {max_tokens} tokens"] += 1
        return None
    if room < 1:
        tally.dropped[f"response longer than {max_tokens} tokens"] += 1
        return None
    tally.cut += 1
    return replace(group, prompt=first + group.prompt[-room:])


def groups_of_demonstration(encoder: Encoder, record: Demonstration, score: Score = "responses") -> list[Group]:
    """Every assistant turn scored: one group, or one for each turn where the template is not prefix-stable.

    Args:
        score: `all` scores every token after the first, what users say and the template's own too.
    """
    return [_group_of_row(row, score) for row in encoder.rows(record.messages)]


def _group_of_row(row: Encoded, score: Score) -> Group:
    if score == "all":
        return Group(row.ids[:1], (Response(row.ids[1:]),))
    start = max(1, row.spans[0][0])  # the first token has nothing before it to be predicted from
    end = row.spans[-1][1]
    spans = tuple((max(a - start, 0), b - start) for a, b in row.spans)
    return Group(row.ids[:start], (Response(row.ids[start:end], spans),))


def groups_of_document(encoder: Encoder, record: Document, max_tokens: int) -> list[Group]:
    """Every token scored but the first. A long document is cut into pieces, each begun by the last token before it."""
    ids = encoder.document(record.text)
    starts = range(0, len(ids) - 1, max_tokens - 1)
    return [Group(ids[at : at + 1], (Response(ids[at + 1 : at + max_tokens]),)) for at in starts]


def group_of_responses(
    encoder: Encoder, prompt: Conversation, texts: Sequence[str], numbers: Sequence[Mapping[str, float]]
) -> Group:
    """A prompt with its responses, each with its own numbers."""
    responses = [
        Response(encoder.response(prompt, text), per_response=dict(held))
        for text, held in zip(texts, numbers, strict=True)
    ]
    return Group(encoder.prompt(prompt), tuple(responses))


def groups_of_record(encoder: Encoder, record: Record, *, max_tokens: int, score: Score = "responses") -> list[Group]:
    """The groups of any record that can be trained on; a document comes in pieces of at most `max_tokens`.

    Pairs, rankings and ratings carry `rank` (0 is best), `margin` and the record's `weight` for each response, ratings
    `value` and `error` too, unpaired feedback `desirable` (1 or 0). A pair's margin stands on the chosen response, so
    that the difference within the pair is the margin.
    """
    if isinstance(record, Demonstration):
        return groups_of_demonstration(encoder, record, score)
    if isinstance(record, Document):
        return groups_of_document(encoder, record, max_tokens)
    if isinstance(record, PreferencePair | Ranking | Judgement | Rating):
        order = ranking_of(record)
        numbers = [{"rank": float(rank), "margin": 0.0, "weight": record.weight} for rank in order.ranks]
        if isinstance(record, PreferencePair):
            numbers[0]["margin"] = record.margin or 0.0
        if isinstance(record, Rating):
            errors = record.errors or (0.0,) * len(record.values)
            for held, value, error in zip(numbers, record.values, errors, strict=True):
                held |= {"value": float(value), "error": float(error)}
        return [group_of_responses(encoder, record.prompt, order.responses, numbers)]
    if isinstance(record, UnpairedFeedback):
        numbers = [{"desirable": float(record.desirable)}]
        return [group_of_responses(encoder, record.prompt, (record.response,), numbers)]
    raise DataError(
        f"record {record.id}: a {type(record).__name__} cannot be trained on as it is; give demonstrations, pairs, "
        "rankings or unpaired feedback"
    )


@dataclass(frozen=True)
class Conversion:
    """Groups made of records."""

    groups: list[Group]
    records: list[int]
    """Which record each group came from."""
    tally: Tally


def groups_of(
    encoder: Encoder,
    records: Sequence[Record],
    *,
    max_tokens: int,
    over_long: OverLong = "drop",
    bos_id: int | None = None,
    score: Score = "responses",
) -> Conversion:
    """The groups of many records, those too long dropped or cut as said and counted.

    Args:
        score: of demonstrations, the answers or `all` tokens.
    Raises:
        DataError: nothing is left.
    """
    found: list[Group] = []
    places: list[int] = []
    tally = Tally()
    for number, record in enumerate(records):
        for group in groups_of_record(encoder, record, max_tokens=max_tokens, score=score):
            kept = fit_length(
                replace(group, name=record.origin), max_tokens, over_long=over_long, tally=tally, bos_id=bos_id
            )
            if kept is not None:
                found.append(kept)
                places.append(number)
    if not found:
        raise DataError(f"no record is left of {len(records)} ({tally}); give more data, or raise max_tokens")
    return Conversion(found, places, tally)


# Groups to batches ---------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """Groups that are drawn beside others, by weight."""

    groups: Sequence[Group]
    weight: float = 1.0


class GroupSource:
    """Draws groups for each step, shuffled anew in every epoch, and packs them after.

    The order is a function of seed and epoch and the state is a position, so a run resumes in the middle of an epoch,
    and neither packing nor the number of processes changes what a step learns from. Steps run on over the ends of
    epochs; only the last step of all may be smaller.

    Args:
        groups: what to train on; every process holds all of them and takes its share of each step.
        batch_groups: groups a step, over all processes.
        row_tokens, batch_tokens: budgets of a row and of a micro-batch.
        seed: of the order.
        epochs: passes over the groups; a part of a pass is fine.
        shuffle: False keeps the order given.
        weight: of `groups` beside `more`. After n draws each pool has given its share of n, to within one; a pool that
            is used up begins again, in a new order.
        more: other pools.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        batch_groups: int,
        row_tokens: int,
        batch_tokens: int,
        seed: int = 0,
        epochs: float = 1.0,
        pad_id: int = 0,
        shuffle: bool = True,
        weight: float = 1.0,
        more: Sequence[Pool] = (),
    ) -> None:
        self.pools = [Pool(groups, weight), *more]
        if not all(pool.groups for pool in self.pools):
            raise DataError("nothing to train on: no groups; look at what the conversion dropped")
        self.batch_groups = batch_groups
        self.row_tokens, self.batch_tokens, self.pad_id = row_tokens, batch_tokens, pad_id
        self.seed, self.shuffle = seed, shuffle
        share = weight / sum(pool.weight for pool in self.pools)
        self.total = max(1, round(epochs * len(groups) / share))
        self.position = 0
        self._schedule = _schedule([pool.weight for pool in self.pools], self.total) if more else None
        self._orders: dict[int, tuple[int, list[int]]] = {}

    @property
    def num_steps(self) -> int:
        """How many steps there are in all."""
        return -(-self.total // self.batch_groups)

    def draw(self) -> list[Group]:
        """The groups of the next step, over all processes."""
        end = min(self.position + self.batch_groups, self.total)
        if self.position >= end:
            raise DataError(
                f"the source is at its end after {self.num_steps} steps; ask for fewer steps or more epochs"
            )
        drawn = [self._at(place) for place in range(self.position, end)]
        self.position = end
        return drawn

    def _at(self, place: int) -> Group:
        pool, place = (0, place) if self._schedule is None else (int(row[place]) for row in self._schedule)
        groups = self.pools[pool].groups
        epoch, offset = divmod(place, len(groups))
        if not self.shuffle:
            return groups[offset]
        if self._orders.get(pool, (-1, []))[0] != epoch:
            seed = [self.seed, epoch] if pool == 0 else [self.seed, epoch, pool]
            self._orders[pool] = (epoch, np.random.default_rng(seed).permutation(len(groups)).tolist())
        return groups[self._orders[pool][1][offset]]

    def next_step(self) -> list[Batch]:
        """This process's micro-batches of the next step."""
        own = distributed.share_of(self.draw())
        return make_batches(own, row_tokens=self.row_tokens, batch_tokens=self.batch_tokens, pad_id=self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self.seed, "num_groups": self._num_groups}

    @property
    def _num_groups(self) -> int:
        return sum(len(pool.groups) for pool in self.pools)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        for name, now in (("seed", self.seed), ("num_groups", self._num_groups)):
            if state[name] != now:
                raise DataError(
                    f"the source was saved with {name} {state[name]} and now has {now}: data or seed have changed; "
                    "start a new run directory"
                )
        self.position = state["position"]


def _schedule(weights: Sequence[float], total: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pool each of `total` draws is from, and its place among the pool's own draws.

    The k-th draw of a pool with share w is due at (k + 1/2) / w; draws go in the order in which they are due.
    """
    shares = np.asarray(weights) / sum(weights)
    counts = [math.ceil(share * total) + 1 for share in shares]
    due = np.concatenate([(np.arange(count) + 0.5) / share for count, share in zip(counts, shares, strict=True)])
    pool = np.repeat(np.arange(len(weights)), counts)
    within = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(due, kind="stable")[:total]
    return pool[order], within[order]


def with_mismatched(groups: Sequence[Group], *, seed: int = 0) -> list[Group]:
    """Each group of one response with a second one, marked `mismatched`: the response of another prompt.

    Losses over single responses measure on them how far the policy is from the reference (`preferences.Thumbs`).

    Raises:
        DataError: all prompts are the same, so there is no other one.
    """
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    found = list(groups)
    for place, number in enumerate(order):
        group = groups[number]
        others = (groups[order[(place + hop) % len(order)]] for hop in range(1, len(order)))
        other = next((other for other in others if other.prompt != group.prompt), None)
        if other is None:
            raise DataError("every prompt is the same, so no response belongs to another one; give more prompts")
        (own,), borrowed = group.responses, other.responses[0]
        found[number] = replace(
            group,
            responses=(
                replace(own, per_response={**own.per_response, "mismatched": 0.0}),
                replace(borrowed, per_response={**own.per_response, "mismatched": 1.0}),
            ),
        )
    return found
