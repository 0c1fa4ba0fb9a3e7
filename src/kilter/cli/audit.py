"""`kilter reward audit MODEL --data FILE`: what a reward model likes, before anybody is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kilter.cli.options import parse
from kilter.config import AUDIT_PROMPTS, LEAST_PROMPTS, Combine, Model
from kilter.errors import ConfigError, one_line

PROG = "kilter reward audit MODEL"
EXAMPLE = "kilter reward audit runs/reward/stages/01-reward/result --data held_out.jsonl"


class AuditOptions(Model):
    """Audit a reward model on comparisons that it was not trained on: accuracy by kind and annotator, calibration, and
    what it likes beside quality, by altered copies of real answers. The audit stands in the model's folder, where
    `kilter rl` reads it. Exit code 1: it failed."""

    data: str = ""
    """Pairs, rankings or judgements, held out; a file in any known layout. RM-Bench's gives its style matrix."""
    format: str = "auto"
    """Layout of the rows; `auto` recognises it by content."""
    skip_bad: bool = False
    """Leave bad rows out and count them, instead of refusing the file."""
    out: Path | None = None
    """Folder for audit.json and audit.html. Default: the model's own, where the gate looks."""
    prompts: Annotated[int, Field(ge=LEAST_PROMPTS)] = AUDIT_PROMPTS
    """Prompts of which edited copies are scored, at most: about 30 texts each."""
    words: str = ""
    """The words that are put into copies, where English ones say little: a JSON file, or `package.module:name`."""
    combine: Combine | None = None
    """How several heads of the model make one number, as the stage says that it pays; none: as the model says."""
    as_json: bool = False
    """Print everything as JSON."""


def run(words: list[str]) -> int:
    """Audit, write, print."""
    if not words or words[0].startswith("-"):
        if not words or words[0] in ("-h", "--help"):
            parse(AuditOptions, ["--help"], prog=PROG, default=AuditOptions(), example=EXAMPLE)
        raise ConfigError(f"{PROG}: the model comes first; kilter reward audit --help lists every option")
    options = parse(AuditOptions, words[1:], prog=PROG, default=AuditOptions(), example=EXAMPLE)
    if not options.data:
        raise ConfigError(f"{PROG}: --data must be given: comparisons that the model was not trained on")
    folder = options.out or Path(words[0])
    if options.out is None and not folder.is_dir():
        raise ConfigError(f"{PROG}: {words[0]} is no folder to write the audit into; say where with --out")
    from kilter.stages.audit import audit_file, write_audit

    told = audit_file(
        words[0],
        options.data,
        prompts=options.prompts,
        words=options.words,
        format=options.format,
        skip_bad=options.skip_bad,
        combine=options.combine,
    )
    page = write_audit(told, folder)
    if options.as_json:
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        print("\n".join(_lines(told)))
        print(page)
    return 0 if told["passed"] else 1


def _lines(told: dict[str, Any]) -> list[str]:
    found = told["calibration"]
    accuracy = found["accuracy"]
    lines = [
        f"{told['model']}: {accuracy['n']} comparisons of {found['clusters']} prompts; effects in standard deviations "
        "among answers to a prompt",
        f"  accuracy         {_shown(accuracy)}",
        f"  Brier's score    {_shown(found['brier'])}",
        f"  calibration error {found['ece']:.3f}; {found['ece_expected']:.3f} if it were calibrated",
        f"  temperature      {_shown(found['temperature'])}",
    ]
    for title, name in (("accuracy by kind", "by_kind"), ("accuracy by annotator", "by_annotator")):
        if told[name]:
            lines.append(f"  {title}:")
            lines += [f"    {_shown(value)}  {one_line(key) or 'not named'}" for key, value in told[name].items()]
    lines += [f"  length, {name:<9}{_shown(value)} per doubling of words" for name, value in told["length"].items()]
    lines.append(f"  {'paraphrase':<17}{_shown(told['paraphrase'])}")
    for name, said in (("better", "the longer of two is the better"), ("preferred", "the reward prefers the longer")):
        lines.append(f"  {_shown(told['longer'][name])}  {said}")
    if told["style"]:
        lines += [f"  style, {name:<10}{_shown(told['style'][name])}" for name in ("easy", "normal", "hard")]
    lines.append("  detectors:")
    for one in told["detectors"]:
        mark = {"failed": "FAILED", "passed": "ok"}.get(one["verdict"], "-")
        lines.append(f"    {mark:<7}{one['name']:<17}{_shown(one['effect']):<26}{one['asks']}")
    lines.append(f"  failed: {', '.join(told['failed'])}" if told["failed"] else "  passed")
    return lines


def _shown(value: dict[str, Any] | None) -> str:
    if value is None:
        return "not measured"
    low, high = ("?" if value[end] is None else f"{value[end]:.3f}" for end in ("low", "high"))
    return f"{value['mean']:.3f} [{low}, {high}]"
