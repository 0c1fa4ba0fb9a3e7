"""The audit as people ask for it: of a model on a file, written into the model's folder; and the gate that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kilter
from kilter import data
from kilter.config import OnlineStage, RlStage
from kilter.errors import CheckError
from kilter.evals.audit import Rewards, audit, best_of, likes, material, style_matrix
from kilter.records import Judgement, Ranking, Sample
from kilter.report.audit import audit_page
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rundir import write_json, write_text
from kilter.scorers.load import load_function
from kilter.stages.context import FUNCTION, Context
from kilter.stages.inputs import AUDIT, file_hash, folder_hash
from kilter.stages.scoring import is_model, scorer_of

VERSION = 1


def audit_file(model: str, path: str, *, prompts: int, format: str = "auto") -> dict[str, Any]:
    """Audit what `model` names (a reward model, a function, a rule sheet) on the comparisons of a file.

    Args:
        prompts: of which edited copies are scored, at most.
    Raises:
        DataError, ModelError, ConfigError: the file holds no comparisons or too few; there is no such model.
    """
    if FUNCTION.fullmatch(model) and isinstance(named := load_function(model), str | Path):
        model = str(named)
    read = data.read(path, format=format)
    material_of = material(read.records, prompts=prompts)
    scorer = scorer_of(model)
    rewards = Rewards(scorer)
    told = audit(scorer, material_of, rewards=rewards)
    every = [one for one in read.records if isinstance(one, Ranking | Judgement) and len(one.responses) >= 4]
    rewards.ask(Sample(record.prompt, text) for record in every for text in record.responses)
    proxy, gold = best_of(every, rewards)
    most = min(map(len, proxy), default=0)
    curve = best_of_n_curve(proxy, gold, ns=range(1, most + 1)) if len(proxy) > 1 else []
    folder, file = Path(model), Path(path)
    return {
        "version": VERSION,
        "kilter": kilter.__version__,
        "model": model,
        "weights": folder_hash(folder) if is_model(model) and folder.is_dir() else None,
        "data": {
            "path": path,
            "sha256": file_hash([file]) if file.is_file() else None,
            "format": read.format,
            "records": len(read.records),
            "comparisons": len(material_of.verdicts),
        },
        **told.to_dict(),
        "style": style_matrix(every, rewards) if read.format == "rm-bench" else None,
        "best_of_n": [
            {
                "n": point.n,
                "kl": point.kl,
                "reward": point.proxy.to_dict(),
                "beats": None if point.gold is None else point.gold.to_dict(),
            }
            for point in curve
        ],
        "likes": likes(scorer, material_of, rewards),
    }


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
