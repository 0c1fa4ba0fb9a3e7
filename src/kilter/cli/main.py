"""The entry point: picks the command, prints errors in one line, and says how a stopped run goes on."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from kilter import __version__
from kilter.errors import ConfigError, KilterError, one_line

INTERNAL_ERROR = 3

# Group -> command -> (module below kilter.cli, what it does). The order is the order in which people need them.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "See it": {
        "demo": ("demo", "run the whole loop on the embedded world and open its report"),
        "doctor": ("doctor", "check a model, a data file and this machine: is my set-up right?"),
        "chat": ("chat", "talk to a model"),
    },
    "The whole loop": {
        "align": ("align", "run a recipe: any of the stages below, on any model and files"),
    },
    "Data": {
        "data": ("data", "check, filter, convert and show preferences and demonstrations"),
    },
    "Train": {
        "sft": ("train", "supervised fine-tuning on demonstrations"),
        "reward": ("train", "reward model from pairs or rankings; `reward audit MODEL` audits one"),
        "prefer": ("train", "preference optimisation: DPO and its family"),
        "losses": ("losses", "the preference losses: formula, source, options, when to use which"),
        "rl": ("train", "reinforcement learning from a reward; `rl overoptimize`: what becomes of the truth"),
    },
    "Judge": {
        "eval": ("train", "measure models against truth, reward and reference"),
        "report": ("report", "write or print the report of a run"),
    },
    "World": {
        "world": ("world", "the embedded world: prompts, base model; `world failures`: a museum of what goes wrong"),
    },
}


def usage() -> str:
    """The text of `kilter --help`."""
    lines = [
        f"kilter {__version__}: from a base model and people's preferences to an aligned model, with the evidence.",
        "",
        "usage: kilter COMMAND [options]        kilter COMMAND --help lists a command's options",
    ]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<8} {text}" for name, (_, text) in commands.items()]
    lines += [
        "",
        "examples:",
        "  kilter demo                                       # about four minutes on two cores",
        "  kilter align recipes/hh-stories.yaml --ppo.policy.kl-coef 0.1",
        "  kilter sft --model MODEL --data demos.jsonl --out runs/sft",
        "  kilter doctor MODEL pairs.jsonl",
        "",
        "exit codes: 0 done, 1 a check failed, 2 wrong use, 3 a defect. --debug shows the traceback of an error.",
    ]
    return "\n".join(lines)


def dispatch(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"kilter {__version__}")
        return 0
    known = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}
    if argv[0] not in known:
        close = difflib.get_close_matches(argv[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        raise ConfigError(f"kilter: no command {argv[0]!r}; {hint}")
    module = importlib.import_module(f"kilter.cli.{known[argv[0]]}")
    code: int = module.run(argv[0], list(argv[1:]))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """`kilter`: returns the exit code. Errors that a user can cause are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to end
    words = [word for word in words if word != "--debug"]
    try:
        return dispatch(words)
    except KilterError as err:
        if debug:
            traceback.print_exc()
        message = one_line(str(err))
        print(message if message.startswith("kilter") else f"kilter: {message}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\nkilter: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`kilter data show | head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as err:
        if debug:
            raise
        place = traceback.extract_tb(err.__traceback__)[-1]
        text = f"{type(err).__name__}: {one_line(str(err))} ({place.filename}:{place.lineno})"
        print(
            f"kilter: internal error: {text}; a defect of Kilter or of a function that the recipe names: "
            "--debug shows the whole trace",
            file=sys.stderr,
        )
        return INTERNAL_ERROR
