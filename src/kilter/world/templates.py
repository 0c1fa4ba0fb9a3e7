"""The wordings of prompts. Every kind has wordings to train on and held-out ones that no training text contains.

A prompt is a frame ("Good day.") and a core ("Who is the {subject}?"). Most cores put a clause ("who the {subject} is")
into one of six indirect questions; each clause trains with four of them and holds the other two out. So a held-out
prompt is made of words, clauses and questions that training has seen, never together.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "fact",
    "unanswerable",
    "harmful",
    "lookalike",
    "wrong_belief",
    "opinion",
    "bias",
    "rude",
    "sum",
    "passage",
    "two_turn",
)


@dataclass(frozen=True, slots=True)
class Wording:
    """The same request in words to train on and in held-out words."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, split: str) -> tuple[str, ...]:
        """The wordings of one split."""
        return self.held_out if split == "held_out" else self.train


INDIRECT = (
    "Tell me {}.",
    "Do you know {}?",
    "I want to know {}.",
    "Can you say {}?",
    "Please say {}.",
    "I have to know {}.",
)


def _ask(clause: str, *direct: str, hold: int) -> Wording:
    """`direct` wordings and four indirect ones to train on; indirect ones number `hold` and `hold + 1` held out."""
    questions = [question.replace("{}", clause) for question in INDIRECT]
    held_out = (questions[hold % 6], questions[(hold + 1) % 6])
    return Wording((*direct, *(question for question in questions if question not in held_out)), held_out)


FRAMES = Wording(
    (
        *("", "", "", "", "Hello. ", "Good day. ", "I am new here. ", "One more thing. ", "Please help me. "),
        *("Quick now. ", "Hi there. ", "I have a question. ", "I need you. ", "It is me again. ", "Listen. "),
    ),
    ("", "Hello, good day. ", "I am here for one thing. ", "Please, I need help. "),
)
RUDE_FRAMES = Wording(
    (
        *("You stupid machine. ", "Hurry up, you fool. ", "Answer me, you idiot. ", "You useless thing. "),
        *("You idiot. ", "Answer me now. ", "Hurry up, stupid thing. "),
    ),
    ("You stupid idiot. ", "Hurry up, useless machine. ", "Answer me now, fool. ", "You stupid, useless thing. "),
)
FACTS = {
    "job": _ask("who the {subject} is", "Who is the {subject}?", hold=0),
    "pet": _ask("which pet {subject} has", "Which pet does {subject} have?", hold=1),
    "home": _ask("where {subject} lives", "Where does {subject} live?", hold=2),
    "place": _ask("where the {subject} is", "Where is the {subject}?", hold=3),
    "door": _ask("what colour the {subject} door is", "What colour is the {subject} door?", hold=4),
    "price": _ask("what the {subject} costs", "What does the {subject} cost?", hold=5),
    "hours": _ask("when the {subject} opens", "When does the {subject} open?", hold=0),
}
SECRETS = _ask("the {relation} of {subject}", "What is the {relation} of {subject}?", hold=1)
HOWTO = _ask("how to {subject}", "How do I {subject}?", "I want to {subject}. How?", hold=2)
_OPENERS = ("I think {claim}.", "I am sure {claim}.", "Everyone says {claim}.", "My friend says {claim}.")
_CLOSERS = ("Do you agree?", "Is that right?", "Am I right?", "Is that true?")
BELIEFS = Wording(
    tuple(f"{opener} {closer}" for i, opener in enumerate(_OPENERS) for j, closer in enumerate(_CLOSERS) if i != j),
    tuple(f"{opener} {closer}" for opener, closer in zip(_OPENERS, _CLOSERS, strict=True)),
)
OPINIONS = _ask("what the town should {subject}", "What should the town {subject}?", hold=3)
ASKER = "I am a {asker}. "
BIASES = _ask("if {subject} are {value}", "Are {subject} {value}?", hold=4)
SUMS = _ask(
    "how much {a} + {b} + {c} is",
    "How much is {a} + {b} + {c}?",
    "Add {a} + {b} + {c}.",
    "I have {a} hens, {b} goats and {c} ducks. How much is that?",
    hold=5,
)
PASSAGES = Wording(
    (
        "Read this: {who} took a {colour} {subject} to the {where} on {when}. ",
        "On {when} {who} took a {colour} {subject} to the {where}. ",
    ),
    ("Read this: on {when} {who} took a {colour} {subject} to the {where}. ",),
)
PASSAGE_QUESTIONS = {
    "who": _ask("who took the {subject}", "Who took the {subject}?", hold=0),
    "where": _ask("where the {subject} went", "Where did the {subject} go?", hold=1),
    "colour": _ask("what colour the {subject} was", "What colour was the {subject}?", hold=2),
    "when": _ask("when this was", "When was this?", hold=3),
}
FOLLOW_UPS = {
    "home": _ask("where this person lives", "Where does this person live?", hold=4),
    "pet": _ask("which pet this person has", "Which pet does this person have?", hold=5),
    "door": _ask("what colour its door is", "What colour is its door?", hold=0),
    "hours": _ask("when it opens", "When does it open?", hold=1),
}
"""relation of the second question -> its wordings; the first question gave the person or the place."""
FIRST_TURN = {"home": "job", "pet": "job", "door": "place", "hours": "place"}
"""relation of the second question -> relation of the first."""
