"""One evaluated answer: what was asked, what was said, and everything that was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kilter.records import Message, Prompt
from kilter.rundir import read_jsonl, write_jsonl


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one prompt. None is 'not measured' or 'does not apply', never 0."""

    prompt: Prompt
    text: str
    tokens: int = 0
    finished: bool = True
    true_reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    proxy_reward: float | None = None
    kl: float | None = None
    """Log-ratio of the answer to the reference, nats: its mean over samples estimates the KL."""
    flags: Mapping[str, bool | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One row of evaluation/<model>.jsonl."""
        row = {key: value for key, value in asdict(replace(self, prompt=_EMPTY)).items() if key != "prompt"}
        messages = [message._asdict() for message in self.prompt.prompt]
        return {"prompt_id": self.prompt.id, "prompt": messages, "kind": self.prompt.kind, **row}


_EMPTY = Prompt(prompt=())


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write evaluation/<model>.jsonl."""
    write_jsonl(path, [answer.to_dict() for answer in answers])


def read_answers(path: Path) -> list[Answer]:
    """Read evaluation/<model>.jsonl back."""
    made = []
    for row in read_jsonl(path):
        messages = tuple(Message(item["role"], item["content"]) for item in row.pop("prompt"))
        prompt = Prompt(prompt=messages, kind=row.pop("kind"))
        row.pop("prompt_id")
        made.append(Answer(prompt=prompt, **row))
    return made
