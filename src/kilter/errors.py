"""What a user can cause, as exceptions. Each message names the place, the value, the rule and the remedy.

The command line prints one line of it and leaves with `exit_code`: 2 for wrong use, 1 for a check that failed.
"""


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
