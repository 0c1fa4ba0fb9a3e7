"""What people wrote and judged, as plain frozen dataclasses. Text only: torch begins at the batch.

Every record can be written as one JSON object (`to_dict`) and read back (`from_dict`); its identity is the hash of its
content, so the same row in two files has one id, and splits go by `prompt_id`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


Conversation = tuple[Message, ...]


def content_hash(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_id(messages: Sequence[Message]) -> str:
    """Identity of a prompt: splits go by it, so a prompt never stands on both sides."""
    return content_hash([list(message) for message in messages])


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Base of all records: identity and JSON form. `source` says where it came from (file, annotator, principle)."""

    source: str = ""

    @property
    def id(self) -> str:
        """Hash of the content, `source` left out: the same row from two files is one record."""
        return content_hash({key: value for key, value in self.to_dict().items() if key != "source"})

    @property
    def origin(self) -> str:
        """What to call it when it is told of: where it came from, or its id where that is not known."""
        return self.source or self.id

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping with the record's `type`; fields at their default are left out."""
        row: dict[str, Any] = {"type": RECORD_NAMES[type(self)]}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value != spec.default and not (value == {} or value == ()):
                row[spec.name] = _plain(value)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError with the field's name."""
        values: dict[str, Any] = {}
        for spec in fields(cls):
            if spec.name in row:
                values[spec.name] = _frozen(spec.name, row[spec.name])
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _frozen(name: str, value: Any) -> Any:
    if name in ("messages", "prompt") and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(Message(item["role"], item["content"]) for item in value)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration(Record):
    """A conversation to imitate; it ends with an assistant turn, and every assistant turn is scored."""

    messages: Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Record):
    """Plain text to imitate from its first token to its end, without roles or template."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(Record):
    """A prompt without an answer, for sampling and evaluation. `kind` groups it; `truth` is what a judge needs."""

    prompt: Conversation
    kind: str = ""
    truth: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair(Record):
    """Two responses to one prompt, the better one named. `margin` is how much better; a tie has no better one."""

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float | None = None
    tie: bool = False
    kind: str = ""
    weight: float = 1.0
    """What each of its comparisons counts in a loss; 1 is usual."""
    group: str = ""
    """The group of annotators, or the criterion, that it speaks for: a reward stage can give each a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking(Record):
    """k responses to one prompt with their ranks: 0 is best, equal ranks are ties."""

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: str = ""
    weight: float = 1.0
    """What each of its comparisons counts in a loss; 1 is usual."""
    group: str = ""
    """The group of annotators, or the criterion, that it speaks for: a reward stage can give each a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating(Record):
    """k responses to one prompt, each with a number (higher is better): somebody's marks, or a scale made of
    comparisons. `errors` are the numbers' standard errors, where they are known."""

    prompt: Conversation
    responses: tuple[str, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...] = ()
    annotator: str = ""
    seconds: float | None = None
    kind: str = ""
    weight: float = 1.0
    """What each of its responses counts in a loss; 1 is usual."""
    group: str = ""
    """As a ranking's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedFeedback(Record):
    """One response with a thumb up (`desirable`) or down."""

    prompt: Conversation
    response: str
    desirable: bool
    seconds: float | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLabels(Record):
    """A response in steps with a label in [0, 1] for each: is this step right?"""

    prompt: Conversation
    steps: tuple[str, ...]
    labels: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement(Record):
    """One annotator's verdict: who ranked which responses, shown in which order, when, and how long it took."""

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str
    models: tuple[str, ...] = ()
    """Who wrote each response, where that is known: what `kilter data rate` rates."""
    shown: tuple[int, ...] = ()
    at: str = ""
    seconds: float | None = None
    kind: str = ""
    weight: float = 1.0
    """What each of its comparisons counts in a loss; 1 is usual."""
    group: str = ""
    """The group of annotators, or the criterion, that it speaks for: a reward stage can give each a head."""


RECORDS: dict[str, type[Record]] = {
    "demonstration": Demonstration,
    "document": Document,
    "prompt": Prompt,
    "pair": PreferencePair,
    "ranking": Ranking,
    "rating": Rating,
    "feedback": UnpairedFeedback,
    "steps": StepLabels,
    "judgement": Judgement,
}
RECORD_NAMES: dict[type[Record], str] = {record: name for name, record in RECORDS.items()}


@dataclass(frozen=True, slots=True)
class Sample:
    """One response as a scorer sees it."""

    messages: Conversation
    text: str
    ids: tuple[int, ...] = ()
    finished: bool = True
    """Ended by the end-of-turn token or a stop string, not by the length limit."""
    truth: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's own `truth`, for scorers that verify; empty where there is none."""


class Step(NamedTuple):
    """A step of an answer, and what of the answer's score it has earned."""

    end: int
    """Characters of the sample's text up to where the step ends, 1 and above."""
    reward: float


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer said of one sample. `value` None means it could not be scored; that is never 0."""

    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None
    reason: str = ""
    steps: tuple[Step, ...] = ()
    """Where in the answer parts of `value` were earned; what they leave of it is earned by the answer as a whole."""


class Scorer(Protocol):
    """Reward model, rule, judge, ensemble or truth: one protocol for training, best-of-n and evaluation."""

    @property
    def name(self) -> str: ...

    def score(self, samples: Sequence[Sample]) -> list[Score]: ...


class Annotator(Protocol):
    """Someone who ranks the responses to prompts: simulated people, an AI judge, a file of judgements."""

    @property
    def name(self) -> str: ...

    def rank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Judgement]: ...

    def thumbs(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[UnpairedFeedback]:
        """A thumb for each response by itself; only asked for by those who collect thumbs."""
        ...

    def ratings(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Rating]:
        """A number for each response, higher is better; only asked for by those who collect ratings."""
        ...
