"""Other forwards for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, modules have these forwards; afterwards what they had, their class's or one of their own (as a hook of
    another library puts there).
    """
    before: list[tuple[Any, Any]] = []
    try:
        for module, forward in forwards:
            before.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            del module.forward
            if own is not None:
                module.forward = own
