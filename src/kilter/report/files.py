"""Reads the files of a run directory for the report. Nothing here fails on a missing or broken file: it is noted.

What the stages write, and the report reads (every part may be missing; a missing part is "not measured"):

`summary.json`
    world           "embedded world", or null for a real run. Every figure of the report says it.
    model           {"name": str, "parameters": int}
    seed            int;  versions: {package: version};  timings: {stage: seconds}, in the order the stages ran
    models          {name: {metric: {"mean", "low", "high", "n"} | null}}. Names as in `figures.MODEL_ORDER` or any
                    other; metrics as in `figures.METRICS`, `true_<part>`, or any other. KL from SFT, nats per answer.
                    Optional `gain_vs_sft`: the paired difference in true reward; else it is computed from the rows.
    by_kind         {model: {kind: {"true_reward": figure}}}
    reward_model    {"accuracy": figure, "accuracy_on_labels": figure}: against truth, against the annotators
    demonstrators   {"true_reward": figure + {"best_tenth": float}, "oracle": float}
    checks          [{"name", "verdict": "passed" | "failed" | other words, "value": figure | number | text, "rule"}]:
                    the both-ways gap, the truth audit, ...
    claims          [{"claim", "held": true | false | null, "figure": figure | number | text}]
    not_measured    [text, ...]
    stages          {stage: what it said at its end}: of preference optimisation `fresh/...`, `plain_text/...` (figures)
                    and `pair_weights/histogram` (counts in equal parts of [0, 1])
    work            optional, {stage: {"trained_tokens", "sampled_tokens", "scored_tokens"}}: for the estimate of what
                    a larger model would cost. A token trained on twice counts twice.

`evaluation/curve.jsonl`    {"method", "step", "seed", "kl": figure, "proxy_reward": figure,
                            "true_reward": figure | null}; for best-of-n `step` is n. Several seeds of one method become
                            a band over the steps that all of them have. Method "sft", step 0, is where all of them
                            begin; without it they begin at the summary's figures of SFT.
`evaluation/answers.jsonl`  {"method", "step", "seed"?, "kl", "prompt_id", "prompt": [{"role", "content"}], "kind",
                            "text", "tokens": [{"text", "value", "kl"}], "true_reward", "proxy_reward"}.
                            `value`: the reward head read at that token (proxy units); `kl`: log-ratio to SFT of that
                            token, nats; the tokens' texts joined are the text. `kl` of the row: the mean KL of that
                            point of the curve, so that all answers of one point share it; `method` and `step` as in the
                            curve. The same three prompts at every point; method "sft", step 0, is the answer before.
`evaluation/<model>.jsonl`  one row an evaluated answer: {"prompt_id", "prompt", "kind", "text", "finished",
                            "true_reward", "proxy_reward", ...}; several answers of one prompt are averaged.
`stages/NN-name/heaviest.jsonl` {"weight", "prompt", "chosen", "rejected"}: the pairs that a policy is most against.
`stages/NN-name/agreement.json` {"items", "annotators", "measures": {name: figure}, "by_kind": {kind: figure}}: of a
                    stage that had responses judged twice.
`stages/NN-name/result/audit.json`  what `kilter reward audit` says, beside its page audit.html.
`stages/NN-name/spikes.jsonl` {"step", "grad_norm", "usual", "rows": [{"name", "share", "norm", "prompt",
                    "responses"}]}: a step with an unusual gradient, and the rows behind it.
`stages/NN-name/metrics.jsonl`  {"step", "seconds", "loss/...": float, "rewards/...": float, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kilter.errors import RunError
from kilter.report.figures import number

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run directory in memory. `problems` says what could not be read, for the reader of the report."""

    folder: Path
    summary: Row = field(default_factory=dict)
    curve: list[Row] = field(default_factory=list)
    answers: list[Row] = field(default_factory=list)
    evaluated: dict[str, list[Row]] = field(default_factory=dict)
    metrics: dict[str, list[Row]] = field(default_factory=dict)
    heaviest: dict[str, list[Row]] = field(default_factory=dict)
    spikes: dict[str, list[Row]] = field(default_factory=dict)
    agreements: dict[str, Row] = field(default_factory=dict)
    audits: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, Row]:
        """The measured models: name -> metrics."""
        return {name: row for name, row in section(self.summary, "models").items() if isinstance(row, Mapping)}


def read_run(folder: Path) -> RunFiles:
    """Reads what there is. Raises RunError only when `folder` is no directory, or none of a run."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such directory; a report is made from a run's directory (give one under runs/)")
    if not any((folder / name).exists() for name in ("recipe.yaml", "summary.json", "stages", "evaluation")):
        raise RunError(
            f"{folder}: no run is in it (no recipe.yaml, summary.json, stages/); give a directory under runs/"
        )
    problems: list[str] = []
    evaluation = folder / "evaluation"
    evaluated = {
        path.stem: _rows(path, folder, problems)
        for path in sorted(evaluation.glob("*.jsonl"))
        if path.name not in ("curve.jsonl", "answers.jsonl")
    }
    return RunFiles(
        folder=folder,
        summary=_summary(folder / "summary.json", problems),
        curve=_rows(evaluation / "curve.jsonl", folder, problems),
        answers=_rows(evaluation / "answers.jsonl", folder, problems),
        evaluated=evaluated,
        metrics=_rows_each(folder, "stages/*/metrics.jsonl", problems),
        heaviest=_rows_each(folder, "stages/*/heaviest.jsonl", problems),
        spikes=_rows_each(folder, "stages/*/spikes.jsonl", problems),
        agreements=_each(folder, "stages/*/agreement.json", 1, problems),
        audits=_each(folder, "stages/*/result/audit.json", 2, problems),
        problems=problems,
    )


def _rows_each(folder: Path, pattern: str, problems: list[str]) -> dict[str, list[Row]]:
    """The rows of all files of a pattern, by the stage's folder."""
    return {path.parent.name: _rows(path, folder, problems) for path in sorted(folder.glob(pattern))}


def _each(folder: Path, pattern: str, up: int, problems: list[str]) -> dict[str, Row]:
    """The mappings of all files of a pattern, by the stage's folder, `up` levels above the file."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        if row := _mapping(path, path.relative_to(folder).as_posix(), problems):
            found[path.parents[up - 1].name] = row
    return found


def section(row: Row, key: str) -> Row:
    """The mapping at `key`, empty when it is missing or something else."""
    value = row.get(key)
    return value if isinstance(value, Mapping) else {}


def listing(row: Row, key: str) -> list[Any]:
    """The list at `key`, empty when it is missing or something else."""
    value = row.get(key)
    return value if isinstance(value, list) else []


def text_of(value: Any, default: str = "") -> str:
    """A string for a reader: text as it is, finite numbers written out, the rest `default`."""
    if isinstance(value, str):
        return value
    return default if number(value) is None else str(value)


def _summary(path: Path, problems: list[str]) -> Row:
    if not path.is_file():
        problems.append("summary.json is missing: the run has not reached its end")
        return {}
    return _mapping(path, path.name, problems)


def _mapping(path: Path, name: str, problems: list[str]) -> Row:
    try:
        value = json.loads(path.read_text("utf-8", "replace"))
    except (OSError, ValueError, RecursionError) as err:
        problems.append(f"{name} could not be read: {err}")
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{name} holds no mapping")
        return {}
    return value


def _rows(path: Path, folder: Path, problems: list[str]) -> list[Row]:
    """All rows that are JSON objects; the last line of a killed run may be cut short, which is noted and left out."""
    name = path.relative_to(folder).as_posix()
    rows: list[Row] = []
    bad: list[int] = []
    try:
        for place, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, Mapping):
                rows.append(row)
            else:
                bad.append(place)
    except OSError as err:
        problems.append(f"{name} could not be read: {err.strerror}")
    if bad:
        problems.append(f"{name}: {len(bad)} of {len(rows) + len(bad)} lines left out, the first is line {bad[0]}")
    return rows


def _lines(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file
