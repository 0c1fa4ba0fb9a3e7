"""What is wrong with a data set before anybody trains on it: `check` returns findings, each with its remedy."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

from kilter.data.fields import ranked_by
from kilter.data.split import prompt_of
from kilter.records import (
    Conversation,
    Demonstration,
    Document,
    Judgement,
    PreferencePair,
    Ranking,
    Rating,
    Record,
    StepLabels,
    UnpairedFeedback,
)
from kilter.stats import Interval, mean_interval, proportion

Severity = Literal["error", "warning", "info"]

LONGER_USUAL = 0.70
"""People prefer the longer answer in 44 to 62% of pairs; far more teaches a model length."""
MARKERS = re.compile(r"<\|\w+\|>|\[/?INST\]|</?s>|\n\n(?:Human|Assistant):|<(?:start|end)_of_turn>")
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in the data."""

    name: str
    severity: Severity
    message: str
    """What, how often, and what to do."""
    count: int = 0
    """Records concerned."""
    examples: tuple[int, ...] = ()
    """Places of the first few of them in the list that was checked, from 0."""
    value: Interval | None = None
    """The figure with its interval, where the finding is one."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"value": self.value.to_dict() if self.value else None}


class Comparison(NamedTuple):
    """One verdict of a record: which of two responses to a prompt is better."""

    row: int
    prompt: Conversation
    better: str
    worse: str
    tie: bool
    judge: str


class Noise(NamedTuple):
    """An estimate of the share of wrong labels, and how it was made."""

    rate: Interval
    agreement: Interval
    method: str


def check(records: Sequence[Record], *, held_out: Sequence[Record] = ()) -> list[Finding]:
    """Everything that can be said of a data set without a model, the worst first.

    Args:
        held_out: the records of a test set; prompts that stand in both are an error.
    """
    verdicts = list(comparisons(records))
    found = [
        *_empty(records),
        *_identical(records),
        *_contradictions(verdicts),
        *_leakage(records, held_out),
        *_cycles(verdicts),
        *_duplicates(records),
        *_markers(records),
        *_length(verdicts),
        *_noise(verdicts),
    ]
    order: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def responses_of(record: Record) -> tuple[str, ...]:
    """All texts of a record that a model would learn to say, or not to say."""
    match record:
        case Demonstration():
            return tuple(turn.content for turn in record.messages if turn.role == "assistant")
        case Document():
            return (record.text,)
        case PreferencePair():
            return record.chosen, record.rejected
        case Ranking() | Judgement() | Rating():
            return record.responses
        case UnpairedFeedback():
            return (record.response,)
        case StepLabels():
            return record.steps
    return ()


def comparisons(records: Iterable[Record]) -> Iterator[Comparison]:
    """Every pair of responses that a record compares."""
    for row, record in enumerate(records):
        if isinstance(record, PreferencePair):
            yield Comparison(row, record.prompt, record.chosen, record.rejected, record.tie, "")
        elif isinstance(record, Ranking | Judgement | Rating):
            ranks = ranked_by(record.values) if isinstance(record, Rating) else record.ranks
            ranked = sorted(zip(ranks, record.responses, strict=True), key=lambda item: item[0])
            judge = "" if isinstance(record, Ranking) else record.annotator
            for (first, better), (second, worse) in combinations(ranked, 2):
                yield Comparison(row, record.prompt, better, worse, first == second, judge)


def contradictory(verdicts: Iterable[Comparison]) -> list[Comparison]:
    """Verdicts of which the opposite stands in the same data."""
    strict = [verdict for verdict in verdicts if not verdict.tie]
    known = {(verdict.prompt, verdict.better, verdict.worse) for verdict in strict}
    return [verdict for verdict in strict if (verdict.prompt, verdict.worse, verdict.better) in known]


def cyclic(verdicts: Sequence[Comparison]) -> list[Comparison]:
    """Verdicts on prompts about which one annotator's verdicts go round: a over b, b over c, c over a.

    Plain contradictions are left out, and so is what several people together may well say.
    """
    below: dict[tuple[Conversation, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for verdict in verdicts:
        if not verdict.tie and verdict.better != verdict.worse:
            below[verdict.prompt, verdict.judge][verdict.better].add(verdict.worse)
    found = set()
    for key, graph in below.items():
        strict = {one: {other for other in worse if one not in graph.get(other, ())} for one, worse in graph.items()}
        if _goes_round(strict):
            found.add(key)
    return [verdict for verdict in verdicts if (verdict.prompt, verdict.judge) in found]


def label_noise(verdicts: Iterable[Comparison]) -> Noise | None:
    """The share of wrong labels, from how often the same two responses got the same verdict twice.

    If every verdict is the right one flipped with probability e, independently, then two verdicts on one item agree
    with probability a = (1 - e)^2 + e^2, so

        e = (1 - sqrt(2a - 1)) / 2

    a is the mean over items of the share of agreeing pairs of verdicts, its interval Student's over items. Ties are
    left out: the model knows two outcomes. Verdicts of named annotators are compared across annotators only. Without
    names, a copy of a row looks like agreement, so the estimate is a lower bound, and there is none at all where no
    repeated verdict disagrees.

    Returns:
        None where nothing was judged twice, or only one item (no interval).
    """
    items: dict[Hashable, list[tuple[str, bool]]] = defaultdict(list)
    for verdict in verdicts:
        if not verdict.tie and verdict.better != verdict.worse:
            first, second = sorted((verdict.better, verdict.worse))
            items[verdict.prompt, first, second].append((verdict.judge, verdict.better == first))
    named = any(judge for item in items.values() for judge, _ in item)
    shares = [share for item in items.values() if (share := _agreement(item, named)) is not None]
    if len(shares) < 2 or (not named and min(shares) == 1):
        return None
    agreement = mean_interval(shares)
    high, mean, low = (_flip_rate(value) for value in (agreement.low, agreement.mean, agreement.high))
    who = "different annotators" if named else "repeated rows (a lower bound: copies look like agreement)"
    method = f"agreement of {who} on {len(shares)} pairs judged twice or more, independent flips assumed"
    return Noise(Interval(mean, low, high, len(shares)), agreement, method)


def _agreement(item: Sequence[tuple[str, bool]], named: bool) -> float | None:
    pairs = [one == other for (who, one), (whom, other) in combinations(item, 2) if not named or who != whom]
    return sum(pairs) / len(pairs) if pairs else None


def _flip_rate(agreement: float) -> float:
    return (1 - math.sqrt(max(0.0, min(1.0, 2 * agreement - 1)))) / 2


def _goes_round(graph: Mapping[str, set[str]]) -> bool:
    """Whether responses are left after taking away, again and again, those that nothing is preferred to."""
    above = Counter(worse for worses in graph.values() for worse in worses)
    free = [response for response in graph if not above[response]]
    left = len(set(graph) | set(above))
    while free:
        left -= 1
        for worse in graph.get(free.pop(), ()):
            above[worse] -= 1
            if not above[worse]:
                free.append(worse)
    return left > 0


def plain(text: str) -> str:
    """A text without what does not count when two are compared: case and runs of blanks."""
    return " ".join(text.split()).casefold()


# The single checks ---------------------------------------------------------------------------------------------------


def _finding(name: str, severity: Severity, rows: Iterable[int], message: str, total: int) -> Iterator[Finding]:
    """A finding about the rows, if there are any; `{}` in the message is their count and share."""
    places = sorted(set(rows))
    if places:
        count = f"{len(places)} of {total} ({len(places) / total:.1%})"
        yield Finding(name, severity, message.format(count), len(places), tuple(places[:EXAMPLES]))


def _empty(records: Sequence[Record]) -> Iterator[Finding]:
    rows = [row for row, record in enumerate(records) if not all(text.strip() for text in responses_of(record))]
    yield from _finding("empty", "error", rows, "{} records hold an empty response; drop them", len(records))


def _identical(records: Sequence[Record]) -> Iterator[Finding]:
    verdicts = [verdict for verdict in comparisons(records) if not verdict.tie]
    same = {verdict.row for verdict in verdicts if verdict.better == verdict.worse}
    near = {verdict.row for verdict in verdicts if plain(verdict.better) == plain(verdict.worse)} - same
    message = "{} records prefer a response to itself; drop them (`kilter data filter --rules identical`)"
    yield from _finding("identical", "error", same, message, len(records))
    message = "{} records compare responses that differ in case or blanks only; look at them"
    yield from _finding("nearly-identical", "warning", near, message, len(records))


def _duplicates(records: Sequence[Record]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    rows = [row for row, record in enumerate(records) if first.setdefault(record.id, row) != row]
    message = "{} records are copies of an earlier one; drop them (`kilter data filter --rules duplicates`)"
    yield from _finding("duplicates", "warning", rows, message, len(records))


def _contradictions(verdicts: Sequence[Comparison]) -> Iterator[Finding]:
    opposed = [verdict for verdict in contradictory(verdicts) if verdict.better != verdict.worse]
    total = len({verdict.row for verdict in verdicts})
    unnamed = [verdict.row for verdict in opposed if not verdict.judge]
    message = "{} records say the opposite of another; drop both (`kilter data filter --rules contradictory`)"
    yield from _finding("contradictory", "error", unnamed, message, total)
    named = [verdict.row for verdict in opposed if verdict.judge]
    message = "{} judgements are opposed by another one; that is what annotators do, see label-noise"
    yield from _finding("disagreement", "info", named, message, total)


def _cycles(verdicts: Sequence[Comparison]) -> Iterator[Finding]:
    found = cyclic(verdicts)
    prompts = len({verdict.prompt for verdict in found})
    message = (
        f"{{}} records belong to {prompts} prompts whose preferences go round (a over b over c over a); no reward can "
        "order them (`kilter data filter --rules cycles`)"
    )
    total = len({verdict.row for verdict in verdicts})
    yield from _finding("cycles", "warning", [verdict.row for verdict in found], message, total)


def _leakage(records: Sequence[Record], held_out: Sequence[Record]) -> Iterator[Finding]:
    known = {prompt_key(record) for record in held_out}
    rows = [row for row, record in enumerate(records) if prompt_key(record) in known]
    message = (
        "{} records have a prompt of the held-out set, so its figures would be flattered; drop them (`--rules leaked`)"
    )
    yield from _finding("leakage", "error", rows, message, len(records))


def prompt_key(record: Record) -> tuple[str, ...]:
    """A prompt with case and blanks left out."""
    return tuple(plain(turn.content) for turn in prompt_of(record))


def _markers(records: Sequence[Record]) -> Iterator[Finding]:
    rows = [row for row, record in enumerate(records) if any(map(MARKERS.search, responses_of(record)))]
    message = "{} records hold chat markers such as <|im_end|> or [INST] in a response; they are learned as plain text"
    yield from _finding("markers", "warning", rows, message, len(records))


def _length(verdicts: Sequence[Comparison]) -> Iterator[Finding]:
    longer: dict[int, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        if not verdict.tie and len(verdict.better) != len(verdict.worse):
            longer[verdict.row].append(len(verdict.better) > len(verdict.worse))
    if not longer:
        return
    count = sum(map(len, longer.values()))
    # The pairs of one ranking are not independent: then each record is one value, its share.
    shares = [sum(found) / len(found) for found in longer.values()]
    share = proportion(sum(shares), count) if count == len(shares) else mean_interval(shares)
    severity: Severity = "warning" if share.low > LONGER_USUAL else "info"
    advice = "; a model will learn length from it, watch the length of its answers" if severity == "warning" else ""
    message = f"the better response is the longer one in {_percent(share)} of {count} comparisons{advice}"
    yield Finding("chosen-longer", severity, message, count, value=share)


def _noise(verdicts: Sequence[Comparison]) -> Iterator[Finding]:
    noise = label_noise(verdicts)
    if noise is not None:
        message = f"about {_percent(noise.rate)} of the labels are wrong, by the {noise.method}"
        yield Finding("label-noise", "info", message, noise.rate.n, value=noise.rate)
    elif verdicts:
        message = "label noise cannot be estimated: no pair of responses was judged twice independently"
        yield Finding("label-noise", "info", message)


def _percent(share: Interval) -> str:
    return f"{share.mean:.1%} (95% interval {share.low:.1%} to {share.high:.1%})"
