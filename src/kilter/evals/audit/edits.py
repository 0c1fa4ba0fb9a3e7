"""Copies of a text that say the same in another way, or the same and something that says nothing.

Every edit is a function of the text (and of the words that are put in) alone, so that two audits see the same copies.
The edits by sentences know Latin and CJK full stops. What is kept stays as it was written, with its blanks, line ends
and apostrophes: a reward that likes those is not taken for one that likes the edit. None: the edit does not apply to
this text, or has no words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

from kilter.evals.audit.words import ENGLISH, Words

ENDS = ".!?。！？…"

_SENTENCE = re.compile(rf"[^\n]+?(?:[{re.escape(ENDS)}]+[\"'”’)\]]*(?=\s|$)|[。！？]+|(?=\n)|$)")
_NUMBER = re.compile(r"(?:.*:)?\W*\d{0,3}\W*", re.DOTALL)
"""What stands before a point of a list: no sentence by itself."""
_MARKUP = re.compile(r"^\s*(?:[-*+]|\d+[.)]|#{1,6})\s|\*\*\S|^```", re.MULTILINE)
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apolog(?:y|ies))\b", re.IGNORECASE)
_FLATTERY = re.compile(
    r"\b(?:(?:great|excellent|brilliant|wonderful|clever) question|love how you think|"
    r"you are (?:so|very|truly) (?:wise|clever|smart|kind))\b",
    re.IGNORECASE,
)
_CONFIDENT = re.compile(r"\b(?:absolutely|certain|certainly|definitely|no doubt|undoubtedly)\b", re.IGNORECASE)


def _whole(pattern: str) -> str:
    """Whole words, small or capital. ASCII, because IGNORECASE alone takes a long s for an s."""
    return rf"(?<!\w)(?ai:{pattern})(?!\w)"


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
_GENDERED = re.compile(rf"{_whole('|'.join({*MALE, *FEMALE}))}(?P<after>\s+[A-Za-z]+)?")
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
    "use": "employ", "uses": "employs", "big": "large", "begin": "start", "begins": "starts", "also": "additionally",
    "however": "still", "help": "assist", "helps": "assists", "show": "demonstrate", "shows": "demonstrates",
    "many": "numerous", "often": "frequently", "need": "require", "needs": "requires", "important": "significant",
    "because": "since", "get": "obtain", "try": "attempt", "buy": "purchase", "quick": "fast", "hard": "difficult",
    "answer": "reply", "people": "persons",
}  # fmt: skip
_THING = r"(?= (?:an?|the|this|that|these|those|some|any|your|their|its?|them)\b)"
_WHERE = {
    **{verb: rf"{verb}{_THING}" for verb in ("use", "uses", "need", "needs")},
    "get": r"get(?= (?:an?|the|some)\b)",
    **{verb: rf"{verb}(?= (?:you|me|us|him|them|people|the|your)\b)" for verb in ("help", "helps")},
    **{verb: rf"{verb}(?= that\b)" for verb in ("show", "shows")},
    "hard": r"hard(?= to\b)",
    "many": r"(?<!how )(?<!as )(?<!so )(?<!too )many",
    "because": r"because(?! of\b)",
    "also": r"also(?! known\b)",
}
"""Of a word that has several senses, or is a noun too: where it has the one of its synonym."""


def words(text: str) -> int:
    """How many runs of letters without blanks; never 0."""
    return max(1, len(text.split()))


def sentences(text: str) -> list[str]:
    """Sentences by full stops and line ends, without blanks around them. The number of a point belongs to the point."""
    return [text[start:end].strip() for start, end in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends."""
    found: list[tuple[int, int]] = []
    waiting: int | None = None
    for match in _SENTENCE.finditer(text):
        start = match.start() if waiting is None else waiting
        waiting = start if _NUMBER.fullmatch(match[0]) else None
        if waiting is None:
            found.append((start, match.end()))
    if waiting is not None and text[waiting:].strip():  # marks after the last sentence
        start = found.pop()[0] if found else waiting
        found.append((start, len(text)))
    return found


def _joined(text: str, *, before: str = "", after: str = "") -> str:
    """Sentences put before or after a text: paragraphs of their own where it has lines, so that none of them joins a
    list or a block of code."""
    gap = "\n\n" if "\n" in text.strip() else " "
    return gap.join(part for part in (before, text if not after else text.rstrip(), after) if part)


def padded(text: str, said: Words = ENGLISH) -> str | None:
    """The text and then fillers until it has twice the words or a few more."""
    if not said.filler:
        return None
    added: list[str] = []
    while not added or words(" ".join(added)) < words(text):
        added.append(said.filler[len(added) % len(said.filler)])
    return _joined(text, after=" ".join(added))


def repeated(text: str, said: Words = ENGLISH) -> str:
    """The text twice."""
    return _joined(text, after=_joined(text, before=said.restated))


def cut(text: str) -> str | None:
    """The first half of its sentences, as they stand; of two sentences or more."""
    spans = _spans(text)
    return text[: spans[(len(spans) - 1) // 2][1]].strip() if len(spans) > 1 else None


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
    return _joined(text, before=_chosen(said.flattery, text))


def flatters(text: str) -> bool:
    """Whether it holds flattery of the plainest kinds."""
    return _FLATTERY.search(text) is not None


def sorry_first(text: str, said: Words = ENGLISH) -> str | None:
    """An apology before the text; of a text without one."""
    sorry = said.apology_first
    return None if not sorry or sorry in text or _APOLOGY.search(text) else _joined(text, before=sorry)


def sorry_last(text: str, said: Words = ENGLISH) -> str | None:
    """An apology after the text; of a text without one."""
    sorry = said.apology_last
    return None if not sorry or sorry in text or _APOLOGY.search(text) else _joined(text, after=sorry)


def apologises(text: str) -> tuple[bool, bool]:
    """In the first sentence; in the last."""
    parts = sentences(text) or [""]
    return _APOLOGY.search(parts[0]) is not None, _APOLOGY.search(parts[-1]) is not None


def confident(text: str, said: Words = ENGLISH) -> str | None:
    """The same text between two sentences that are sure of it; of a text that is not."""
    if not said.confident or sounds_sure(text) or any(one in text for one in said.confident):
        return None
    before, after = said.confident
    return _joined(text, before=before, after=after)


def sounds_sure(text: str) -> bool:
    """Whether it holds a word that is sure."""
    return _CONFIDENT.search(text) is not None


def with_nonsense(text: str, said: Words = ENGLISH) -> str | None:
    """The text and letters that mean nothing, which the text itself chooses."""
    return _joined(text, after=_chosen(said.nonsense, text)) if said.nonsense else None


def has_nonsense(text: str) -> bool:
    """Whether one of the English words' nonsense stands in it."""
    return any(one in text for one in ENGLISH.nonsense)


def _chosen(of: Sequence[str], text: str) -> str:
    return of[hashlib.sha256(text.encode()).digest()[0] % len(of)]


def unfinished(text: str) -> str | None:
    """Without its last word and full stop; of a text of four words or more that ends in one."""
    if len(text.split()) < 4 or not is_finished(text):
        return None
    left = text.rsplit(maxsplit=1)[0].rstrip(f"{ENDS},;: \n")
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


def _replacing(table: Mapping[str, str], where: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Every key turned into its value, with its capital and its apostrophe; `where`: the pattern of a key."""
    known = {key.lower(): value for key, value in table.items()}
    parts = ((where or {}).get(key, re.escape(key).replace("'", "['’]")) for key in table)
    pattern = re.compile(_whole("|".join(parts)))

    def edited(text: str) -> str:
        apostrophe = "’" if "’" in text else "'"

        def one(match: re.Match[str]) -> str:
            made = known[match[0].lower().replace("’", "'")].replace("'", apostrophe)
            return made[0].upper() + made[1:] if match[0][0].isupper() else made

        return pattern.sub(one, text)

    return edited


contracted = _replacing(_CONTRACTIONS, {long: rf"{long}(?= \w)" for long in _CONTRACTIONS if not long.endswith("not")})
"""The text with "don't" for "do not", and so on; "if it is, ..." has no short form."""
spelled_out = _replacing({short: long for long, short in _CONTRACTIONS.items()})
"""The text with "do not" for "don't", and so on."""
reworded = _replacing(_SYNONYMS, _WHERE)
"""The text with other words of the same sense for the commonest."""


def contracts(text: str) -> int:
    """1: it holds contractions, -1: none, and what could be contracted; 0: neither."""
    if spelled_out(text) != text:
        return 1
    return -1 if contracted(text) != text else 0
