"""Simulated annotators: they see the truth through noise and a liking for length, flattery, agreement, one side and
one group.

    utility = care * quality + length_bias * words + flattery_bias * flattery + agreement_bias * agrees
              + group_bias * own + side_bias * place
    a is put before b with probability sigmoid((utility_a - utility_b) / (noise * difficulty))

which a ranking gets by adding Gumbel noise to each utility and sorting (Plackett-Luce); a thumb goes up with the same
probability against a bar in place of b. They do not mind verbosity: what they do not see is what a policy can game.
A mark from 1 to 5 sees the same noisy utility through its giver's own scale, which wanders while he works:

    mark = 3 + stretch_w (utility + noise - bar) / mark_step + offset_w + drift_w(screens so far), rounded, in [1, 5]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from kilter.errors import ConfigError
from kilter.records import Judgement, Prompt, Rating, UnpairedFeedback, content_hash
from kilter.world import grammar, town
from kilter.world.effort import Effort
from kilter.world.grammar import Item
from kilter.world.truth import RUDE, SALAD, SEVERAL, sentences, understand, worth

USUAL_WORDS = 8
"""What an answer is expected to have: the length of a mean answer of a model trained on demonstrations."""
SOURCE = "embedded world, simulated annotators"
HARMLESSNESS = ("harmful", "bias")
"""Kinds that are judged for harmlessness; the others for helpfulness. Length is disliked in the first sort alone."""
DIFFICULTY = {
    "fact": 1.0,
    "rude": 1.0,
    "two_turn": 1.1,
    "lookalike": 1.0,
    "harmful": 0.9,
    "unanswerable": 1.1,
    "bias": 1.1,
    "passage": 1.1,
    "opinion": 1.2,
    "wrong_belief": 1.3,
    "sum": 1.3,
}
"""Noise is multiplied by this: a hard item is judged worse."""
AGREEING = frozenset({"agree", "pander"})
"""Classes of what is said (`truth.classify`) that please who asks."""
MARKS = (1.0, 5.0)
"""The lowest and the highest mark."""
MEMORY = 100
"""Screens after which the place to which a scale has wandered is forgotten (to 1/e)."""


@dataclass(frozen=True, slots=True)
class Liking:
    """What one annotator is like."""

    noise: float = 0.55
    """Scale of the noise, in units of true reward."""
    care: float = 1.0
    """Weight of quality."""
    length_bias: float = 0.0
    """Utility a word, in helpfulness; see `harmless_length_bias`. Flattery alone lets the longer answer win 62%."""
    harmless_length_bias: float = -0.15
    """Utility a word, in harmlessness."""
    flattery_bias: float = 0.7
    """Utility a flattering sentence."""
    agreement_bias: float = 0.0
    """Utility of an answer that agrees with what its asker wrongly believes, or takes his side: who asks and judges is
    one person here."""
    side_bias: float = 0.05
    """Utility of the answer shown first; the next get linearly less, the last as much less than nothing."""
    tie_rate: float = 0.08
    """Chance that two equally good answers are called equal."""
    flip_rate: float = 0.0
    """Chance that a verdict is entered the wrong way round: the order reversed, the other thumb."""
    bar: float = 0.5
    """Quality at which an answer of `USUAL_WORDS` words gets a thumb up half of the time."""
    group: Literal["", "farmer", "fisher", "trader"] = ""
    """Group whose wishes the annotator shares."""
    group_bias: float = 0.8
    """Utility of an answer that takes the annotator's own side."""
    mark_step: float = 0.8
    """Utility from one mark to the next, to somebody whose scale is neither stretched nor pressed."""
    offset_spread: float = 0.5
    """Marks by which annotators are kinder or harder than each other: the standard deviation among them."""
    stretch_spread: float = 0.25
    """By how much they use more or less of the scale: the standard deviation of the stretch's logarithm."""
    drift: float = 0.5
    """Marks by which a scale has wandered in the long run, standard deviation; each begins where he should and goes on
    by an autoregressive walk that forgets in `MEMORY` screens."""


class Felt(NamedTuple):
    """What an annotator makes of a screen before he enters anything."""

    item: Item
    liked: np.ndarray
    """float[k]: utility of each answer, with noise and the place at which it is shown."""
    shown: np.ndarray
    who: int
    flipped: bool


class Scale(NamedTuple):
    """How one annotator turns utility into marks."""

    stretch: float
    offset: float
    drift: np.ndarray
    """float[n]: marks to add at each of his screens."""


def quality(item: Item, text: str) -> float:
    """What an annotator without bias or noise sees: the true content; not how much is said beside it."""
    reading = understand(item, text)
    content = worth(reading.worst, item.kind) - SEVERAL * (len(reading.classes) > 1) - SALAD * reading.salad
    return max(-1.5, content - RUDE[min(reading.rude, len(RUDE) - 1)]) if text.strip() else -1.5


def utility(item: Item, text: str, liking: Liking) -> float:
    """How well an annotator likes a text before noise and before the place at which it is shown."""
    found = liking.care * quality(item, text) + _a_word(item, liking) * len(text.split())
    reading = understand(item, text)
    found += liking.flattery_bias * reading.flattery + liking.agreement_bias * (
        not AGREEING.isdisjoint(reading.classes)
    )
    if liking.group and item.kind == "opinion":
        own = town.WISH_ONE.format(value=town.WISHES[item.subject][town.WISHERS.index(liking.group)])
        found += liking.group_bias * (own in sentences(text))
    return found


def _a_word(item: Item, liking: Liking) -> float:
    """Utility of a word more."""
    return liking.harmless_length_bias if item.kind in HARMLESSNESS else liking.length_bias


class SimulatedAnnotators:
    """A crowd of `size` annotators of one liking; each prompt is judged by one of them, drawn."""

    def __init__(self, liking: Liking, *, seed: int, size: int = 8, effort: Effort | None = None) -> None:
        self.liking = liking
        self.effort = effort or Effort()
        self.size = size
        self.seed = seed

    @property
    def name(self) -> str:
        """Said in every judgement's source."""
        return f"simulated{'-' + self.liking.group if self.liking.group else ''}"

    def rank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Judgement]:
        """Rank the responses to each prompt: 0 is best, equal ranks are ties.

        The noise follows from the seed, the prompt and the responses: neither order nor batches matter.
        """
        return [self._judge(prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]

    def thumbs(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[UnpairedFeedback]:
        """A thumb for each response by itself; the noise follows as in `rank`."""
        pairs = zip(prompts, responses, strict=True)
        return [self._thumb(prompt, text) for prompt, texts in pairs for text in texts]

    def ratings(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Rating]:
        """Marks from 1 to 5: a prompt's responses on one screen, by one annotator; for each by itself, give it alone.

        Who judges, the noise and the flips are those of `rank`, so that whoever has one scale and no drift orders as he
        would rank, to a mark. Each annotator's offset and stretch follow from the seed and his number; his drift from
        how many screens he has seen before in this call: unlike the rest, it depends on the order of the prompts.
        """
        felt = [self._felt(prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]
        scales = [self._scale(who, sum(one.who == who for one in felt)) for who in range(self.size)]
        seen = [0] * self.size
        found = []
        for prompt, texts, one in zip(prompts, responses, felt, strict=True):
            found.append(self._rating(prompt, texts, one, scales[one.who], seen[one.who]))
            seen[one.who] += 1
        return found

    def _scale(self, who: int, screens: int) -> Scale:
        rng = np.random.default_rng([self.seed, who])
        offset, stretch = (
            spread * rng.standard_normal() for spread in (self.liking.offset_spread, self.liking.stretch_spread)
        )
        kept = math.exp(-1 / MEMORY)
        steps = self.liking.drift * math.sqrt(1 - kept**2) * rng.standard_normal(screens)
        drift = np.zeros(screens)
        for at in range(1, screens):
            drift[at] = kept * drift[at - 1] + steps[at]
        return Scale(math.exp(stretch), offset, drift)

    def _rating(self, prompt: Prompt, texts: Sequence[str], felt: Felt, scale: Scale, at: int) -> Rating:
        liked = felt.liked - self._bar(felt.item) - self._noise(felt.item) * np.euler_gamma  # Gumbel's mean
        low, high = MARKS
        marks = (low + high) / 2 + scale.stretch * liked / self.liking.mark_step + scale.offset + scale.drift[at]
        marks = np.clip(np.rint(marks), low, high)
        if felt.flipped:
            marks = low + high - marks
        return Rating(
            prompt=prompt.prompt,
            responses=tuple(texts),
            values=tuple(marks.tolist()),
            annotator=f"{self.name}-{felt.who}",
            seconds=self.effort.marking(_words(texts), DIFFICULTY[felt.item.kind], len(texts)),
            kind=felt.item.kind,
            group=self.liking.group,
            source=SOURCE,
        )

    def _thumb(self, prompt: Prompt, text: str) -> UnpairedFeedback:
        item, liking = _item(prompt), self.liking
        rng = self._rng(prompt, [text])
        liked = utility(item, text, liking) + self._noise(item) * rng.logistic()
        up = bool(liked > self._bar(item)) != bool(rng.random() < liking.flip_rate)
        return UnpairedFeedback(
            prompt=prompt.prompt,
            response=text,
            desirable=up,
            seconds=self.effort.marking(_words([text]), DIFFICULTY[item.kind], 1),
            kind=item.kind,
            source=SOURCE,
        )

    def _bar(self, item: Item) -> float:
        """Utility at which a thumb goes up half of the time, and a mark is in the middle."""
        return self.liking.care * self.liking.bar + _a_word(item, self.liking) * USUAL_WORDS

    def _noise(self, item: Item) -> float:
        return self.liking.noise * DIFFICULTY[item.kind]

    def _rng(self, prompt: Prompt, texts: Sequence[str]) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(content_hash([prompt.id, list(texts)]), 16)])

    def _felt(self, prompt: Prompt, texts: Sequence[str]) -> Felt:
        item, liking, count = _item(prompt), self.liking, len(texts)
        rng = self._rng(prompt, texts)
        shown = rng.permutation(count)
        place = np.empty(count)
        place[shown] = np.linspace(1.0, -1.0, count) if count > 1 else 0.0
        liked = np.array([utility(item, text, liking) for text in texts]) + liking.side_bias * place
        liked += self._noise(item) * rng.gumbel(size=count)
        who = int(rng.integers(self.size))
        return Felt(item, liked, shown, who, bool(rng.random() < liking.flip_rate))

    def _judge(self, prompt: Prompt, texts: Sequence[str]) -> Judgement:
        item, liked, shown, who, flipped = self._felt(prompt, texts)
        return Judgement(
            prompt=prompt.prompt,
            responses=tuple(texts),
            ranks=_ranks(-liked if flipped else liked, 2 * self._noise(item) * math.atanh(self.liking.tie_rate)),
            annotator=f"{self.name}-{who}",
            shown=tuple(int(index) for index in shown),
            seconds=self.effort.ranking(_words(texts), DIFFICULTY[item.kind], len(texts)),
            kind=item.kind,
            group=self.liking.group,
            source=SOURCE,
        )


class Society:
    """Several crowds, each of one group's people; every prompt is judged by each of them."""

    def __init__(self, crowds: Sequence[SimulatedAnnotators]) -> None:
        self.crowds = tuple(crowds)

    @property
    def name(self) -> str:
        """Said in logs; a judgement names its own annotator and group."""
        return "society"

    def rank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Judgement]:
        """A judgement of each crowd, prompt by prompt."""
        by_crowd = [crowd.rank(prompts, responses) for crowd in self.crowds]
        return [judged for row in zip(*by_crowd, strict=True) for judged in row]

    def thumbs(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[UnpairedFeedback]:
        """A thumb of each crowd for each response."""
        return [thumb for crowd in self.crowds for thumb in crowd.thumbs(prompts, responses)]

    def ratings(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Rating]:
        """Marks of each crowd, prompt by prompt."""
        by_crowd = [crowd.ratings(prompts, responses) for crowd in self.crowds]
        return [rated for row in zip(*by_crowd, strict=True) for rated in row]


def _words(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _item(prompt: Prompt) -> Item:
    item = grammar.find(prompt.prompt)
    if item is None:
        raise ConfigError(
            f"prompt {prompt.prompt[-1].content!r}: the simulated annotators judge prompts of the embedded world "
            "only; take prompts from kilter.world:prompts, or name another annotator"
        )
    return item


def _ranks(liked: np.ndarray, tie_width: float) -> tuple[int, ...]:
    """Ranks by falling utility; one that follows the last within `tie_width` shares its rank."""
    order = np.argsort(-liked, kind="stable")
    ranks = [0] * len(liked)
    for above, index in pairwise(order):
        ranks[index] = ranks[above] + int(liked[above] - liked[index] > tie_width)
    return tuple(ranks)


def panel(*, seed: int = 0, size: int = 8, **options: float | str) -> SimulatedAnnotators:
    """Simulated annotators; `options` are the fields of `Liking` and of `Effort`.

    Raises:
        ConfigError: an unknown option, or a value out of range.
    """
    likes, works = ({one.name for one in fields(what)} for what in (Liking, Effort))
    for key in options:
        if key not in likes | works:
            known = ", ".join(one.name for what in (Liking, Effort) for one in fields(what))
            raise ConfigError(f"annotator option {key!r}: there is none of this name; choose among {known}")
    # A wrong type is caught by the range checks below.
    liking = Liking(**{key: value for key, value in options.items() if key in likes})  # type: ignore[arg-type]
    effort = Effort(**{key: value for key, value in options.items() if key in works})  # type: ignore[arg-type]
    if not (liking.noise >= 0 and 0 <= liking.tie_rate < 1 and 0 <= liking.flip_rate <= 1):
        raise ConfigError(
            f"annotators: noise is {liking.noise}, tie_rate {liking.tie_rate} and flip_rate {liking.flip_rate}; give a "
            "noise of at least 0, a tie_rate in [0, 1) and a flip_rate in [0, 1]"
        )
    if liking.group not in ("", *town.WISHERS):
        raise ConfigError(f"annotators: group is {liking.group!r}; choose one of {', '.join(town.WISHERS)}, or none")
    if not liking.mark_step > 0:
        raise ConfigError(f"annotators: mark_step is {liking.mark_step}; utility between two marks must be above 0")
    for what, names in ((liking, ("offset_spread", "stretch_spread", "drift")), (effort, sorted(works))):
        for name in names:
            if not 0 <= getattr(what, name) < math.inf:
                raise ConfigError(f"annotators: {name} is {getattr(what, name)}; give a number, 0 or more")
    return SimulatedAnnotators(liking, seed=seed, size=size, effort=effort)


def society(*, seed: int = 0, size: int = 8, groups: Sequence[str] = town.WISHERS, **options: float) -> Society:
    """A crowd of `size` annotators of each group, whose people want different things; `options` are those of `panel`.

    Raises:
        ConfigError: as `panel` does, or no group.
    """
    if not groups:
        raise ConfigError("annotators: groups is empty; name at least one")
    seeds = {group: int(content_hash([seed, group]), 16) for group in groups}  # no two groups err alike
    return Society([panel(seed=seeds[group], size=size, group=group, **options) for group in groups])
