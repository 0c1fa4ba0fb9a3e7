"""A user's own function as a scorer, named `package.module:function` in a recipe. Naming one runs its module's code."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kilter.errors import ConfigError
from kilter.records import Sample, Score, Scorer


def load_scorer(spec: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer that `package.module:name` stands for.

    `name` may be a function of (samples, **options) that returns a number, None or a `Score` for each sample; a class
    or a function of (**options) alone that makes a scorer; or a scorer object, which takes no options.

    Args:
        options: keyword arguments, known to the function or class.
    Raises:
        ConfigError: nothing importable of that name, unknown options, or what it names is none of these.
    """
    options = dict(options or {})
    found = load_function(spec)
    if not inspect.isclass(found) and callable(getattr(found, "score", None)):
        if options:
            raise ConfigError(f"{spec}: a scorer object takes no options, but {sorted(options)} are given; drop them")
    elif callable(found):
        if not _fits(found, **options):
            if _fits(found, (), **options):
                return FunctionScorer(spec, found, options)
            raise ConfigError(
                f"{spec}: the options {sorted(options)} do not fit {_signature(found)}; a scorer is a function of "
                "(samples, **options), or of (**options) alone when it makes one"
            )
        found = found(**options)
    if not callable(getattr(found, "score", None)):
        raise ConfigError(f"{spec}: {type(found).__name__} has no method `score`; give a function or a scorer")
    return Checked(getattr(found, "name", spec), found.score)


def load_function(spec: str) -> Any:
    """What `package.module:name` names. Raises ConfigError when there is no such thing."""
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"{spec!r} names no function; write it as `package.module:function`")
    try:
        module = importlib.import_module(module_name)
    except ImportError as err:
        raise ConfigError(f"{spec}: cannot import {module_name} ({err}); is it installed or on PYTHONPATH?") from err
    if not hasattr(module, name):
        public = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"))
        raise ConfigError(f"{spec}: {module_name} has no {name!r}; it has {public or 'no functions'}")
    return getattr(module, name)


def _fits(function: Callable[..., Any], *args: Any, **options: Any) -> bool:
    """Whether the function can be called so; it is not called."""
    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError:
        return False
    return True


def _signature(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', function)}{inspect.signature(function)}"


class Checked:
    """A scorer whose answers are checked: one for each sample, each a finite number, None or a `Score`."""

    def __init__(self, name: str, function: Callable[[Sequence[Sample]], Sequence[Any]]) -> None:
        self.name = name
        self._function = function

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Raises ConfigError when the user's code returns something else."""
        values = list(self._function(samples))
        if len(values) != len(samples):
            raise ConfigError(
                f"scorer {self.name}: {len(values)} scores for {len(samples)} samples; return one for each"
            )
        return [self._score(value) for value in values]

    def _score(self, value: Any) -> Score:
        score = value if isinstance(value, Score) else None
        number = score.value if score is not None else value
        if number is None:
            return score or Score(None, reason="the scorer returned None")
        if isinstance(number, str) or not hasattr(number, "__float__"):
            raise ConfigError(f"scorer {self.name} returned {number!r}; a score is a number, None or a Score")
        if not math.isfinite(float(number)):
            return Score(None, reason=f"the scorer returned {float(number)}")
        return score or Score(float(number))


class FunctionScorer(Checked):
    """A function of (samples, **options) as a scorer."""

    def __init__(self, name: str, function: Callable[..., Sequence[Any]], options: Mapping[str, Any]) -> None:
        super().__init__(name, lambda samples: function(samples, **options))
