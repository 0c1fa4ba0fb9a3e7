"""What a user can cause, as exceptions. Each message names the place, the value, the rule and the remedy.

The command line prints one line of it and leaves with `exit_code`: 2 for wrong use, 1 for a check that failed.
"""

import re

# Controls that reorder or hide text, or drive a terminal.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Text of a model, a file or a user with such controls shown by name: `⟨U+202E⟩`; newlines and tabs stay."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def one_line(text: str) -> str:
    """Such text on one line, whatever stands in it."""
    return visible(" ".join(text.split()))


class KilterError(Exception):
    """Base of every error that a user can cause."""

    exit_code = 2


class ConfigError(KilterError):
    """A recipe or an option is wrong: an unknown key, a value out of range, a stage that does not exist."""


class DataError(KilterError):
    """A data file or one of its rows is wrong. The message starts with `file:line:` where there is one."""


class ModelError(KilterError):
    """A model folder cannot be used: missing, of an unknown kind, or trained on another trunk."""


class RunError(KilterError):
    """A run directory cannot be used: of another recipe, not writable, or the disk is full."""


class CheckError(KilterError):
    """A check failed: of data, of a set-up at the start of a run, or of a training step."""

    exit_code = 1
