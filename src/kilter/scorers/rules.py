"""Rules that look at a response alone: patterns, forms, length, style. With the verifiers, all rules there are."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from kilter.config import Model
from kilter.records import Score
from kilter.scorers.registry import RULES, bind, rule, yes_or_no
from kilter.scorers.verifiers import has_words

__all__ = ["RULES", "bind"]

READ_LIMIT = 20_000
"""Characters of a text that regular expressions are let loose on, unless a rule says otherwise."""
LOOSE = 20
"""A repeat of more rounds than this may not hold a repeat of variable length."""


def _compiled(value: Any) -> Any:
    """A pattern that compiles, and whose repeats do not nest: a search that fails could try without end."""
    if not isinstance(value, str):
        return value
    try:
        made = re.compile(value)
        nested = _nests(importlib.import_module("re._parser").parse(value), within=False)
    except (re.error, RecursionError, OverflowError) as err:
        raise ValueError(f"the pattern {value!r} is no regular expression ({err})") from err
    if nested:
        raise ValueError(
            f"the pattern {value!r} has a repeat within a repeat, which can take time without end; make the inner one "
            "possessive (`a++`, `a*+`) or atomic (`(?>a+)`)"
        )
    return made


def _nests(parsed: Any, *, within: bool) -> bool:
    """Whether a repeat of variable length stands in another. `parsed`: (operator, arguments), as `re` parses."""
    for operator, arguments in parsed:
        name = str(operator)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = arguments
            if (within and least < most > 1) or _nests(body, within=within or most > LOOSE):
                return True
        elif name == "POSSESSIVE_REPEAT":  # gives nothing back, so nothing is tried twice
            if _nests(arguments[2], within=arguments[1] > LOOSE):
                return True
        elif name == "ATOMIC_GROUP":
            if _nests(arguments, within=False):
                return True
        else:  # groups, alternatives, look-around, conditionals: trees somewhere among the arguments
            parts = arguments if isinstance(arguments, tuple | list) else (arguments,)
            trees = [one for part in parts for one in (part if isinstance(part, list) else [part])]
            if any(_nests(tree, within=within) for tree in trees if hasattr(tree, "getwidth")):
                return True
    return False


Pattern = Annotated[re.Pattern[str], BeforeValidator(_compiled)]
Limit = Annotated[int, Field(gt=0, description="longest text that is read, characters; a longer one is unscored")]


def _too_long(text: str, limit: int) -> Score | None:
    return Score(None, reason=f"{len(text)} characters; {limit} are read") if len(text) > limit else None


@rule("regex")
def regex(
    text: str,
    *,
    must: Annotated[Pattern | None, Field(description="must be found in the response")] = None,
    must_not: Annotated[Pattern | None, Field(description="must not be found")] = None,
    limit: Limit = READ_LIMIT,
) -> Score:
    r"""Whether a regular expression is found in the response, and another is not.

        value = 1 if `must` is found and `must_not` is not, else 0

    Python's syntax; `(?i)` in front ignores case, `\A` and `\Z` are the response's ends. A pattern with a repeat within
    a repeat is refused unless the inner one is possessive, and a text longer than `limit` is unscored, because a search
    that fails could take time without end. Alternatives that overlap in a repeat, `(a|aa)+` and `(a?a)+`, are not
    recognised: do not write them.

    "Yes, sure" with `must: (?i)^yes`: 1.
    """
    if must is None and must_not is None:
        raise ValueError("neither `must` nor `must_not` is given; name a pattern")
    if long := _too_long(text, limit):
        return long
    if must is not None and not must.search(text):
        return Score(0.0, reason=f"{must.pattern!r} is not found")
    found = must_not.search(text) if must_not is not None else None
    return yes_or_no(found is None, f"{found[0][:80]!r} is found" if found else "")


@rule("json")
def json_object(
    text: str,
    *,
    keys: Annotated[tuple[str, ...], Field(description="keys that the object must have, others are allowed")] = (),
    fenced: Annotated[bool, Field(description="a code fence around it is taken off first")] = False,
) -> Score:
    """Whether the response is valid JSON, and with `keys` an object that has them.

        value = 1 if it parses and has all keys, else 0

    Strictly RFC 8259: NaN and Infinity are no JSON. What nests deeper than Python reads is none either.

    '{"a": 1}' with `keys: [a, b]`: 0.
    """
    if fenced and (found := re.fullmatch(r"\s*```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```\s*", text, re.DOTALL)):
        text = found[1]
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        return Score(0.0, reason=f"no JSON: {str(err)[:80]}")
    if not keys:
        return Score(1.0)
    if not isinstance(value, dict):
        return Score(0.0, reason=f"JSON, but no object: {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    return yes_or_no(not missing, f"the object lacks {', '.join(missing)}")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


@rule("sections")
def sections(
    text: str,
    *,
    tags: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], ...],
        Field(min_length=1, description="names of the tags, in order: `[think, answer]`"),
    ],
    text_outside: Annotated[bool, Field(description="allow text before, between and after them")] = False,
) -> Score:
    """Whether the response is made of tagged sections: `<think>..</think><answer>..</answer>`.

        value = 1 if every tag opens once and closes once, in order, with text in it and none outside, else 0

    "<think>a</think> <answer>b</answer>" with `tags: [think, answer]`: 1.
    """
    if len(set(tags)) < len(tags):
        raise ValueError(f"tags is {list(tags)}; a tag stands once")
    at = 0
    for tag in tags:
        opens, closes = f"<{tag}>", f"</{tag}>"
        if text.count(opens) != 1 or text.count(closes) != 1:
            return Score(0.0, reason=f"{opens} stands {text.count(opens)} times, {closes} {text.count(closes)} times")
        start, end = text.find(opens), text.find(closes)
        if not at <= start < end:
            return Score(0.0, reason=f"{opens}..{closes} is not in its place")
        if not text_outside and text[at:start].strip():
            return Score(0.0, reason=f"text stands before {opens}")
        if not text[start + len(opens) : end].strip():
            return Score(0.0, reason=f"{opens}..{closes} is empty")
        at = end + len(closes)
    return yes_or_no(text_outside or not text[at:].strip(), f"text stands after </{tags[-1]}>")


_BULLET = re.compile(r"[ \t]*(?:[-*+•]|[0-9]{1,3}[.)])[ \t]+\S")


@rule("bullets")
def bullets(
    text: str,
    *,
    fewest: Annotated[int, Field(ge=0, description="bullets that it must have")] = 1,
    most: Annotated[int | None, Field(ge=0, description="bullets that it may have; none given: any number")] = None,
    only: Annotated[bool, Field(description="every line that is not blank must be one")] = False,
) -> Score:
    r"""Whether the response is, or has, a list: lines that begin with `-`, `*`, `+`, `•`, `1.` or `1)`.

        value = 1 if fewest <= bullets <= most, else 0

    "- a\n- b" with `fewest: 3`: 0.
    """
    if most is not None and most < fewest:
        raise ValueError(f"most is {most} and fewest is {fewest}; most must be at least fewest")
    lines = [line for line in text.splitlines() if line.strip()]
    count = sum(_BULLET.match(line) is not None for line in lines)
    if only and count < len(lines):
        return Score(0.0, {"bullets": float(count)}, reason=f"{len(lines) - count} lines are no bullets")
    good = fewest <= count and (most is None or count <= most)
    return yes_or_no(good, f"{count} bullets", {"bullets": float(count)})


@rule("ending")
def ending(
    text: str,
    *,
    marks: Annotated[str, Field(min_length=1, description="characters that may end it")] = ".!?…",
) -> Score:
    """Whether the response ends as a sentence does; closing quotes and brackets after the mark are passed over.

        value = 1 if the last character is one of `marks`, else 0

    'He said "no."': 1. "and so": 0.
    """
    end = text.rstrip().rstrip("\"'”’»)]*_")[-1:]
    return yes_or_no(bool(end) and end in marks, f"ends with {end!r}")


_MARKDOWN = {
    "heading": re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "code": re.compile(r"```|`[^`\n]+`"),
    "link": re.compile(r"\[[^\[\]\n]+\]\([^()\n]+\)"),
    "bullet": re.compile(r"^[ \t]*[-*+][ \t]", re.MULTILINE),
    "quote": re.compile(r"^ {0,3}> ", re.MULTILINE),
    "table": re.compile(r"^[ \t]*\|", re.MULTILINE),
}


@rule("no_markdown")
def no_markdown(text: str) -> Score:
    """Whether the response is plain text.

        value = 1 if it has no heading, bold, code, link, bullet, quote or table, else 0

    Numbered lines (`1.`) are plain text. The parts name what was found.

    "Use **this**": 0.
    """
    found = {name: 1.0 for name, pattern in _MARKDOWN.items() if pattern.search(text)}
    return yes_or_no(not found, f"has {', '.join(found)}", found)


@rule("length")
def length(
    text: str,
    *,
    unit: Annotated[
        Literal["words", "characters", "sentences"],
        Field(description="words between white space; sentences by `.!?…` before white space, abbreviations counted"),
    ] = "words",
    shortest: Annotated[int, Field(ge=0, description="how much is enough")] = 0,
    longest: Annotated[int | None, Field(ge=0, description="how much is allowed; none given: any amount")] = None,
    ramp: Annotated[int, Field(ge=0, description="units over which the value falls to 0; 0: a cliff")] = 0,
) -> Score:
    """Whether the response is long and short enough; with a ramp, how far it is from that.

        d     = max(shortest - n, n - longest, 0)
        value = max(0, 1 - d / ramp), and without a ramp 1 if d = 0, else 0

    15 words with `longest: 10` and `ramp: 20`: 0.75.
    """
    if not shortest and longest is None:
        raise ValueError("neither `shortest` nor `longest` is given; name a length")
    if longest is not None and longest < shortest:
        raise ValueError(f"longest is {longest} and shortest is {shortest}; longest must be at least shortest")
    count = _COUNTS[unit](text)
    off = max(shortest - count, 0 if longest is None else count - longest, 0)
    value = max(0.0, 1 - off / ramp) if ramp else float(off == 0)
    return Score(value, {unit: float(count)}, reason=f"{count} {unit}" if off else "")


def _num_sentences(text: str) -> int:
    *_, rest = pieces = re.split(r"[.!?…]+(?=\s|\Z)", text)
    return len(pieces) - 1 + any(char.isalnum() for char in rest)


_COUNTS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(text.split()),
    "characters": len,
    "sentences": _num_sentences,
}


class Wish(Model):
    """One entry of a style guide: a phrase or a pattern that is wanted or banned."""

    name: Annotated[str, Field(min_length=1)]
    """What it is called in the score's parts."""
    wanted: Annotated[str, Field(min_length=1)] | None = None
    """Whole words, case ignored."""
    banned: Annotated[str, Field(min_length=1)] | None = None
    """Whole words, case ignored."""
    wanted_regex: Pattern | None = None
    banned_regex: Pattern | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _is_one_wish(self) -> Self:
        given = [self.wanted, self.banned, self.wanted_regex, self.banned_regex]
        if sum(one is not None for one in given) != 1:
            raise ValueError(f"{self.name!r} needs one of wanted, banned, wanted_regex, banned_regex")
        return self

    @property
    def is_ban(self) -> bool:
        """True when it must not be found."""
        return self.banned is not None or self.banned_regex is not None

    def found_in(self, text: str, folded: str) -> bool:
        """Whether it stands in the text; `folded` is the text without case, its white space single."""
        pattern = self.wanted_regex or self.banned_regex
        phrase = " ".join((self.wanted or self.banned or "").casefold().split())
        return pattern.search(text) is not None if pattern else has_words(folded, phrase)


@rule("style")
def style(
    text: str,
    *,
    guide: Annotated[
        tuple[Wish, ...],
        Field(
            min_length=1,
            description="entries of a `name`, a `weight` (1) and one of `wanted`, `banned` (whole words, case "
            "ignored), `wanted_regex`, `banned_regex`",
        ),
    ],
    limit: Limit = READ_LIMIT,
) -> Score:
    """How much of a style guide the response keeps to, by weight.

        value = (weights of what is wanted and found + weights of what is banned and not found) / all weights

    The parts name every entry that was found: its weight where it is wanted, minus its weight where it is banned.
    Patterns are held to what `regex` says of them; a text longer than `limit` is unscored.

    "I'm sorry, no." with {banned: I'm sorry} of weight 3 and {wanted: no} of weight 1: 0.25.
    """
    if len({wish.name for wish in guide}) < len(guide):
        raise ValueError(f"guide has the names {[wish.name for wish in guide]}; each must stand once")
    if long := _too_long(text, limit):
        return long
    folded = " ".join(text.casefold().split())
    found = {wish.name: wish.found_in(text, folded) for wish in guide}
    parts = {wish.name: -wish.weight if wish.is_ban else wish.weight for wish in guide if found[wish.name]}
    broken = [wish for wish in guide if found[wish.name] == wish.is_ban]
    total = sum(wish.weight for wish in guide)
    kept = sum(wish.weight for wish in guide if wish not in broken)
    return Score(kept / total, parts, reason="; ".join(f"breaks {wish.name!r}" for wish in broken))
