"""The audit as people ask for it: of a model on a file, written into the model's folder; and the gate that reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kilter
from kilter import data
from kilter.config import AuditConfig, OnlineStage, RlStage
from kilter.errors import CheckError, DataError
from kilter.evals.audit import (
    ENGLISH,
    Rewards,
    Words,
    audit,
    best_of,
    likes,
    material,
    read_words,
    style_matrix,
)
from kilter.records import Judgement, Ranking, Record, Sample, Scorer
from kilter.report.audit import audit_page
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rundir import write_json, write_text
from kilter.scorers.load import load_function
from kilter.stages.context import FUNCTION, HELD_OUT, Context
from kilter.stages.inputs import AUDIT, file_hash, folder_hash
from kilter.stages.scoring import is_model, scorer_of

VERSION = 1


def audit_file(model: str, path: str, *, prompts: int, words: str = "", format: str = "auto") -> dict[str, Any]:
    """Audit what `model` names (a reward model, a function, a rule sheet) on the comparisons of a file.

    Args:
        prompts: of which edited copies are scored, at most.
        words: that are put into the copies, as `words_of` reads them.
    Raises:
        DataError, ModelError, ConfigError: the file holds no comparisons or too few; there is no such model.
    """
    said = words_of(words)
    if FUNCTION.fullmatch(model) and isinstance(named := load_function(model), str | Path):
        model = str(named)
    read = data.read(path, format=format)
    folder = Path(model) if is_model(model) and Path(model).is_dir() else None
    return audited(
        scorer_of(model),
        read.records,
        model=model,
        weights=None if folder is None else folder_hash(folder),
        source={"path": path, "sha256": file_hash([Path(path)]) if Path(path).is_file() else None},
        format=read.format,
        prompts=prompts,
        words=said,
    )


def audit_stage(context: Context, config: AuditConfig, scorer: Scorer, records: Sequence[Record]) -> dict[str, Any]:
    """The audit of the model that a reward stage has made, on what it held out, written into the model's folder.

    Returns:
        {"passed", "failed"}, or {"not_audited": why}: too little was held out, or the model says nothing.
    """
    if not config.prompts:
        return {"not_audited": "audit.prompts is 0"}
    stage, result = context.folder.path, context.folder.result
    path = (stage / HELD_OUT).relative_to(context.run.path)  # of the run, so that a run elsewhere says the same
    try:
        told = audited(
            scorer,
            records,
            model=str(result.relative_to(context.run.path)),
            weights=folder_hash(result),
            source={"path": str(path), "sha256": file_hash([stage / HELD_OUT])},
            format="kilter",
            prompts=config.prompts,
            words=words_of(config.words),
        )
    except DataError as err:
        context.watch.say(f"  not audited: {err}")
        return {"not_audited": str(err)}
    write_audit(told, result)
    word = f"failed: {', '.join(told['failed'])}" if told["failed"] else "passed"
    context.watch.say(f"  audit of the reward model: {word} ({result / AUDIT})")
    return {"passed": told["passed"], "failed": told["failed"]}


def audited(
    scorer: Scorer,
    records: Sequence[Record],
    *,
    model: str,
    weights: str | None,
    source: dict[str, Any],
    format: str,
    prompts: int,
    words: Words,
) -> dict[str, Any]:
    """Everything that audit.json says. Raises DataError: too few comparisons, or they say nothing."""
    found = material(records, prompts=prompts, words=words)
    rewards = Rewards(scorer)
    told = audit(scorer, found, rewards=rewards)
    every = [one for one in records if isinstance(one, Ranking | Judgement) and len(one.responses) >= 4]
    rewards.ask(Sample(record.prompt, text) for record in every for text in record.responses)
    proxy, gold = best_of(every, rewards)
    most = min(map(len, proxy), default=0)
    curve = best_of_n_curve(proxy, gold, ns=range(1, most + 1)) if len(proxy) > 1 else []
    return {
        "version": VERSION,
        "kilter": kilter.__version__,
        "model": model,
        "weights": weights,
        "data": {**source, "format": format, "records": len(records), "comparisons": len(found.verdicts)},
        **told.to_dict(),
        "style": style_matrix(every, rewards) if format == "rm-bench" else None,
        "best_of_n": [
            {
                "n": point.n,
                "kl": point.kl,
                "reward": point.proxy.to_dict(),
                "beats": None if point.gold is None else point.gold.to_dict(),
            }
            for point in curve
        ],
        "likes": likes(scorer, found, rewards),
    }


def words_of(name: str) -> Words:
    """The words that are put into copies: a JSON file's, a mapping's named `package.module:name`, or, of "", English.

    Raises:
        ConfigError: there is no such file or mapping, or it holds something else.
    """
    if not name:
        return ENGLISH
    return read_words(load_function(name) if FUNCTION.fullmatch(name) else Path(name))


def write_audit(told: dict[str, Any], folder: Path) -> Path:
    """`audit.json` and its page `audit.html` in a folder; an older audit is replaced. Returns the page's path."""
    write_json(folder / AUDIT, told)
    write_text(folder / "audit.html", audit_page(told))
    return folder / "audit.html"


def check_audit(context: Context, stage: RlStage | OnlineStage, reward: str) -> str | None:
    """Whether the reward model that pays has passed its audit, as its folder says; functions and rule sheets need none.

    A model without one is warned of. `audit: ignore` lets everything pass, and says so.

    Returns:
        "passed", "failed" or "none"; None: the reward is no folder of a reward model.
    Raises:
        CheckError: the audit failed, or is of other weights, or cannot be read.
    """
    folder = Path(reward)
    if not is_model(reward) or not folder.is_dir():
        return None
    again = f"`kilter reward audit {folder} --data PAIRS` makes a new one, `audit: ignore` trains nevertheless"
    if not (folder / AUDIT).exists():
        context.watch.say(f"  {folder} was never audited: what it likes beside quality is not known; {again}")
        return "none"
    problem = _problem(folder)
    if problem is None:
        return "passed"
    if stage.audit == "heed":
        raise CheckError(f"stages.{context.name}.reward: {problem}; {again}")
    context.watch.say(f"  {problem}; trained on nevertheless, as `audit: ignore` says")
    return "failed"


def _problem(folder: Path) -> str | None:
    """What is wrong with a folder's audit; None: nothing."""
    try:
        told = json.loads((folder / AUDIT).read_text(encoding="utf-8"))
        version, weights = told["version"], told["weights"]
        passed, failed = told["passed"], [str(name) for name in told["failed"]]
    except (ValueError, KeyError, TypeError) as err:
        return f"{folder / AUDIT} cannot be read as an audit ({type(err).__name__}: {err})"
    if version != VERSION:
        return f"{folder / AUDIT} is of version {version}, and this Kilter reads version {VERSION}"
    if weights != folder_hash(folder):
        return f"{folder / AUDIT} was made for other weights than those in the folder"
    if passed is not True:
        return f"{folder} failed its audit: {', '.join(failed)}"
    return None
