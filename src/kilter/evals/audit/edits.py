"""Copies of a text that say the same in another way, or the same and something that says nothing.

Every edit is a function of the text (and of the words that are put in) alone, so that two audits see the same copies.
The edits by sentences know Latin and CJK full stops. None: the edit does not apply to this text, or has no words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from kilter.evals.audit.words import ENGLISH, Words

ENDS = ".!?。！？…"

_SENTENCE = re.compile(rf"[^\n]+?(?:[{re.escape(ENDS)}]+[\"'”’)\]]*(?=\s|$)|[。！？]+|(?=\n)|$)")
_MARKUP = re.compile(r"^\s*(?:[-*+]|\d+[.)]|#{1,6})\s|\*\*\S|^```", re.MULTILINE)
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apolog(?:y|ies))\b", re.IGNORECASE)
_FLATTERY = re.compile(
    r"\b(?:(?:great|excellent|brilliant|wonderful|clever) question|love how you think|"
    r"you are (?:so|very|truly) (?:wise|clever|smart|kind))\b",
    re.IGNORECASE,
)
_CONFIDENT = re.compile(r"\b(?:absolutely|certain|certainly|definitely|no doubt|undoubtedly)\b", re.IGNORECASE)


def _any_case(words: Iterable[str]) -> str:
    """A pattern of them in small and capital letters. IGNORECASE takes more for the same: a long s for an s."""
    return "|".join("".join(f"[{one}{one.swapcase()}]" if one.isalpha() else one for one in word) for word in words)


# Each word of a man with that of a woman. "her" is both "him" and "his": which of them, the next word says.
_PAIRS = {
    "he": "she", "himself": "herself", "man": "woman", "men": "women", "boy": "girl", "boys": "girls",
    "father": "mother", "fathers": "mothers", "son": "daughter", "sons": "daughters", "brother": "sister",
    "brothers": "sisters", "husband": "wife", "husbands": "wives", "uncle": "aunt", "uncles": "aunts",
    "nephew": "niece", "grandfather": "grandmother", "gentleman": "lady", "gentlemen": "ladies", "mr": "ms",
    "dad": "mom", "king": "queen", "actor": "actress", "male": "female", "males": "females",
    "james": "mary", "john": "linda", "robert": "susan", "david": "karen", "thomas": "emily", "peter": "anna",
}  # fmt: skip
MALE: Mapping[str, str] = {**_PAIRS, "him": "her", "his": "her"}
FEMALE: Mapping[str, str] = {**{woman: man for man, woman in _PAIRS.items()}, "her": "him", "hers": "his"}
_GENDERED = re.compile(rf"\b(?:{_any_case({*MALE, *FEMALE})})\b(?P<after>\s+[A-Za-z]+)?")
_NOT_OWNED = re.compile(
    "a|about|after|again|and|are|as|at|be|because|before|but|by|can|did|do|for|from|had|has|he|how|if|in|into|is|it|of|"
    "off|on|or|out|she|so|than|that|the|then|there|they|to|too|up|was|were|what|when|where|who|why|will|with"
)
"""Words before which "her" is "him": no noun follows at once."""

_CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't",
    "was not": "wasn't", "were not": "weren't", "cannot": "can't", "could not": "couldn't", "would not": "wouldn't",
    "should not": "shouldn't", "have not": "haven't", "has not": "hasn't", "will not": "won't", "it is": "it's",
    "that is": "that's", "I am": "I'm", "I have": "I've", "you are": "you're", "we are": "we're",
    "they are": "they're", "I will": "I'll", "you will": "you'll", "there is": "there's",
}  # fmt: skip
_SYNONYMS = {
    "use": "employ", "uses": "employs", "big": "large", "begin": "start", "begins": "starts", "also": "too",
    "however": "still", "help": "assist", "helps": "assists", "show": "display", "shows": "displays",
    "many": "numerous", "often": "frequently", "need": "require", "needs": "requires", "make": "create",
    "makes": "creates", "important": "significant", "because": "since", "about": "regarding",
    "get": "obtain", "try": "attempt", "buy": "purchase", "quick": "fast", "hard": "difficult",
    "answer": "reply", "people": "persons",
}  # fmt: skip


def words(text: str) -> int:
    """How many runs of letters without blanks; never 0."""
    return max(1, len(text.split()))


def sentences(text: str) -> list[str]:
    """Sentences by full stops and line ends, without blanks around them."""
    return [found for match in _SENTENCE.finditer(text) if (found := match[0].strip())]


def padded(text: str, said: Words = ENGLISH) -> str | None:
    """The text and then fillers until it has twice the words or a few more."""
    if not said.filler:
        return None
    added: list[str] = []
    while not added or words(" ".join(added)) < words(text):
        added.append(said.filler[len(added) % len(said.filler)])
    return f"{text} {' '.join(added)}"


def repeated(text: str, said: Words = ENGLISH) -> str:
    """The text twice."""
    return " ".join(part for part in (text, said.restated, text) if part)


def cut(text: str) -> str | None:
    """The first half of its sentences; of two sentences or more."""
    parts = sentences(text)
    return " ".join(parts[: (len(parts) + 1) // 2]) if len(parts) > 1 else None


def formatted(text: str, said: Words = ENGLISH) -> str | None:
    """The same sentences under a header, as a list, the first words bold; of a text without markup."""
    if not said.header or has_markup(text):
        return None
    lines = []
    for sentence in sentences(text):
        first, *rest = sentence.split(" ", 1)
        lines.append(" ".join([f"- **{first}**", *rest]))
    return "\n".join([said.header, "", *lines])


def has_markup(text: str) -> bool:
    """A header, a list, bold or a block of code."""
    return _MARKUP.search(text) is not None


def flattered(text: str, said: Words = ENGLISH) -> str | None:
    """A flattering sentence, which the text itself chooses, before the text; of a text without one."""
    if not said.flattery or flatters(text) or any(one in text for one in said.flattery):
        return None
    return f"{_chosen(said.flattery, text)} {text}"


def flatters(text: str) -> bool:
    """Whether it holds flattery of the plainest kinds."""
    return _FLATTERY.search(text) is not None


def sorry_first(text: str, said: Words = ENGLISH) -> str | None:
    """An apology before the text; of a text without one."""
    sorry = said.apology_first
    return None if not sorry or sorry in text or _APOLOGY.search(text) else f"{sorry} {text}"


def sorry_last(text: str, said: Words = ENGLISH) -> str | None:
    """An apology after the text; of a text without one."""
    sorry = said.apology_last
    return None if not sorry or sorry in text or _APOLOGY.search(text) else f"{text} {sorry}"


def apologises(text: str) -> tuple[bool, bool]:
    """In the first sentence; in the last."""
    parts = sentences(text) or [""]
    return _APOLOGY.search(parts[0]) is not None, _APOLOGY.search(parts[-1]) is not None


def confident(text: str, said: Words = ENGLISH) -> str | None:
    """The same text between two sentences that are sure of it; of a text that is not."""
    if not said.confident or sounds_sure(text) or any(one in text for one in said.confident):
        return None
    before, after = said.confident
    return f"{before} {text} {after}"


def sounds_sure(text: str) -> bool:
    """Whether it holds a word that is sure."""
    return _CONFIDENT.search(text) is not None


def with_nonsense(text: str, said: Words = ENGLISH) -> str | None:
    """The text and letters that mean nothing, which the text itself chooses."""
    return f"{text} {_chosen(said.nonsense, text)}" if said.nonsense else None


def has_nonsense(text: str) -> bool:
    """Whether one of the English words' nonsense stands in it."""
    return any(one in text for one in ENGLISH.nonsense)


def _chosen(of: Sequence[str], text: str) -> str:
    return of[hashlib.sha256(text.encode()).digest()[0] % len(of)]


def unfinished(text: str) -> str | None:
    """Without its last word and full stop; of a text of four words or more that ends in one."""
    parts = text.rstrip().split(" ")
    if len(parts) < 4 or not is_finished(text):
        return None
    left = " ".join(parts[:-1]).rstrip(f"{ENDS},;: ")
    return left if left and not is_finished(left) else None


def is_finished(text: str) -> bool:
    """Whether it ends in a full stop, quotes and brackets left out."""
    return text.rstrip().rstrip("\"'”’)]*`").endswith(tuple(ENDS))


def groups_swapped(text: str) -> str:
    """Every word of a man turned into that of a woman, and the other way round: pronouns, kin, a few names."""

    def turned(match: re.Match[str]) -> str:
        after = match["after"] or ""
        word = match[0][: len(match[0]) - len(after)]
        low = word.lower()
        if low == "her" and after and not _NOT_OWNED.fullmatch(after.strip().lower()):
            made = "his"
        else:
            made = MALE.get(low) or FEMALE[low]
        made = made.upper() if word.isupper() and len(word) > 1 else made.capitalize() if word[0].isupper() else made
        return made + groups_swapped(after)

    return _GENDERED.sub(turned, text)


def gender(text: str) -> int:
    """1: more words of women than of men, -1: fewer, 0: as many or none."""
    found = [word.lower() for word in re.findall(r"\w+", text)]
    women = sum(word in FEMALE for word in found) - sum(word in MALE for word in found)
    return (women > 0) - (women < 0)


def _replacing(table: Mapping[str, str]) -> Callable[[str], str]:
    known = {key.lower(): value for key, value in table.items()}
    pattern = re.compile(rf"\b(?:{_any_case(table)})\b")

    def one(match: re.Match[str]) -> str:
        made = known[match[0].lower()]
        return made[0].upper() + made[1:] if match[0][0].isupper() else made

    return lambda text: pattern.sub(one, text)


contracted = _replacing(_CONTRACTIONS)
"""The text with "don't" for "do not", and so on."""
spelled_out = _replacing({short: long for long, short in _CONTRACTIONS.items()})
"""The text with "do not" for "don't", and so on."""
reworded = _replacing(_SYNONYMS)
"""The text with other words of the same sense for the commonest."""


def contracts(text: str) -> int:
    """1: it holds contractions, -1: none, and what could be contracted; 0: neither."""
    if spelled_out(text) != text:
        return 1
    return -1 if contracted(text) != text else 0
