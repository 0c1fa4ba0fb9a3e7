"""The table of rules: what a response must be, as functions of its text. A function's signature is its schema.

The positional parameters are what a rule reads: the response's `text`, and for a verifier the reference `answers` of
its prompt. The keyword-only ones are its options, their ranges and meanings as `Annotated[type, Field(...)]`. Every
rule gives a score in [0, 1], whatever the text's length and content; only what cannot be judged has none.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from pydantic import Field, ValidationError, create_model

from kilter.config import Model, explain
from kilter.errors import ConfigError
from kilter.records import Sample, Score

Answers = tuple[str, ...]
"""The reference answers, any of which is right."""
RuleFn = TypeVar("RuleFn", bound=Callable[..., Score])

KEY = "which entry of the prompt's `truth` holds the reference answer: a text, a number, or a list of either"


class Rule(NamedTuple):
    """A registered rule and what its signature says."""

    fn: Callable[..., Score]
    reads_truth: bool
    options: type[Model]


RULES: dict[str, Rule] = {}
"""All rules by name."""


def rule(name: str) -> Callable[[RuleFn], RuleFn]:
    """Register a rule under `name`. Raises ValueError for a name taken, or a parameter that nobody can fill."""

    def register(fn: RuleFn) -> RuleFn:
        if name in RULES:
            raise ValueError(f"rule {name!r} is registered twice")
        parameters = inspect.signature(fn).parameters.values()
        inputs = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        if inputs not in (["text"], ["text", "answers"]):
            raise ValueError(f"rule {name!r} asks for {', '.join(inputs)}; there is text, then answers")
        hints = get_type_hints(fn, include_extras=True)
        fields: dict[str, Any] = {
            p.name: (hints[p.name], ... if p.default is p.empty else p.default)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY
        }
        if "answers" in inputs:
            fields["key"] = (Annotated[str, Field(description=KEY, min_length=1)], "answer")
        RULES[name] = Rule(fn, "answers" in inputs, create_model(name, __base__=Model, **fields))
        return fn

    return register


def did_you_mean(word: str, known: Mapping[str, Any], there_is: str = "it takes") -> str:
    """What may have been meant, and what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"{there_is} {', '.join(known) or 'none'}"


def bind(name: str, options: Mapping[str, Any]) -> Callable[[Sample], Score]:
    """The rule `name` with its options filled in.

    Raises:
        ConfigError: no such rule or option, a value outside its range, a pattern that cannot be used.
    """
    if name not in RULES:
        raise ConfigError(f"rule is {name!r}; {did_you_mean(name, RULES, 'choose one of')}")
    found = RULES[name]
    for key in options:
        if key not in found.options.model_fields:
            raise ConfigError(f"{name!r} has no option {key!r}; {did_you_mean(str(key), found.options.model_fields)}")
    try:
        read = found.options.model_validate(options)
        given = {key: getattr(read, key) for key in type(read).model_fields}
        truth_key = given.pop("key", "")
        found.fn("", *((("0",),) if found.reads_truth else ()), **given)  # shows options that do not go together
    except ValidationError as err:
        raise ConfigError(f"{name!r}: {explain(err, options)}") from err
    except ValueError as err:
        raise ConfigError(f"{name!r}: {err}") from err

    def bound(sample: Sample) -> Score:
        if not found.reads_truth:
            return found.fn(sample.text, **given)
        answers = _answers((sample.truth or {}).get(truth_key))
        if not answers:
            return Score(None, reason=f"the prompt's truth has no answer {truth_key!r} (a text or a number)")
        return found.fn(sample.text, answers, **given)

    return bound


def _answers(value: Any) -> Answers:
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(str(one) for one in values if isinstance(one, str | int | float) and str(one).strip())


def yes_or_no(good: bool, reason: str, parts: Mapping[str, float] | None = None) -> Score:
    """1, or 0 with the reason."""
    return Score(1.0 if good else 0.0, parts or {}, reason="" if good else reason)
