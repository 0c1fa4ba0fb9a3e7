"""The picture's data: reward against KL along every method's path, and three prompts' answers at each point."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kilter.errors import ModelError
from kilter.evals import Answer, figures
from kilter.models.build import load_reward_model, policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.load import load_tokenizer
from kilter.models.reward_heads import REWARD
from kilter.models.trunk import Trunk
from kilter.records import Prompt
from kilter.rollout.best_of_n import best_of_n_curve
from kilter.rollout.collect import Rollout, collect
from kilter.rundir import read_jsonl, write_jsonl
from kilter.stages.evaluate import Evaluation, spread
from kilter.stages.scoring import chooser_of, is_model
from kilter.stages.snapshots import snapshots_in
from kilter.stats import Interval
from kilter.tree import Group, Response, make_batch

Row = dict[str, Any]


def measure_path(evaluation: Evaluation, name: str, value: str) -> None:
    """Measure one model's path into its own file, evaluation/paths/NAME.jsonl; points that are there are kept."""
    prompts = spread(evaluation.prompts, evaluation.stage.curve_prompts)
    stages = evaluation.context.recipe.stages
    if not prompts:
        return
    path = Points(evaluation, name, prompts)
    if value == evaluation.stage.reference:
        path.policy("sft", 0, Path(evaluation.context.model(value)))
    if value not in stages:
        return
    folder = evaluation.context.earlier(value)
    if (folder.result / "best_of_n.json").exists():
        path.best_of_n(name, json.loads((folder.result / "best_of_n.json").read_text(encoding="utf-8")))
        return
    points = snapshots_in(folder.path)
    if points or stages[value].stage in ("prefer", "online", "rl"):
        last = int((folder.done or {}).get("steps", 0))
        for step, snapshot in [*points, (last, folder.result)]:
            path.policy(name, step, snapshot)


def write_curve(evaluation: Evaluation) -> None:
    """Measure what is not measured yet, and gather all paths in evaluation/curve.jsonl and evaluation/answers.jsonl."""
    models = evaluation.stage.models
    named = {name: value for name, value in models.items() if value == evaluation.stage.reference}
    first = named or {"sft": evaluation.stage.reference}  # the picture starts at the reference, listed or not
    rows = []
    for name, value in {**first, **models}.items():
        measure_path(evaluation, name, value)
        rows += read_jsonl(path_file(evaluation, name))
    write_jsonl(evaluation.folder / "answers.jsonl", [answer for row in rows for answer in row["answers"]])
    write_jsonl(evaluation.folder / "curve.jsonl", [row["point"] for row in rows])


def path_file(evaluation: Evaluation, name: str) -> Path:
    """Where a model's path lies: a point and its answers a line."""
    return evaluation.folder / "paths" / f"{name}.jsonl"


class Points:
    """The points of one method."""

    def __init__(self, evaluation: Evaluation, name: str, prompts: Sequence[Prompt]) -> None:
        self.evaluation, self.prompts = evaluation, prompts
        shown = spread(prompts, evaluation.stage.slider_prompts * 3)[::3]
        self.shown = {prompt.id for prompt in shown[: evaluation.stage.slider_prompts]}
        self.file = path_file(evaluation, name)
        self.rows = read_jsonl(self.file)

    @property
    def done(self) -> set[tuple[str, int]]:
        """(method, step) of the points that are there."""
        return {(row["point"]["method"], row["point"]["step"]) for row in self.rows}

    @cached_property
    def coach(self) -> Callable[[Rollout], list[float]] | None:
        """Loaded when the first answer is shown: a path that is measured already needs none."""
        return _coach(self.evaluation)

    def policy(self, method: str, step: int, folder: Path) -> None:
        """One policy as a point, and its answers to the slider's prompts."""
        if (method, step) in self.done:
            return
        rollouts = self.evaluation.sample(str(folder), self.prompts, f"curve/{method}/{step}")
        kls = self.evaluation.judges.token_kl(rollouts)
        answers = [
            Answer(one.prompt, one.text, len(one.completion.ids), one.completion.finished, kl=float(kl.sum()))
            for one, kl in zip(rollouts, kls, strict=True)
        ]
        judged = self.evaluation.judges.judge(answers)
        found = figures(judged)
        kl = found["kl"]
        rows = []
        for rollout, answer, token_kl in zip(rollouts, judged, kls, strict=True):
            if answer.prompt.id in self.shown:
                rows.append(self._shown(method, step, kl, rollout, answer, token_kl))
        measured = {name: found[name] for name in ("kl", "proxy_reward", "true_reward")}
        self._write(rows, measured, method, step)

    def best_of_n(self, method: str, about: Row) -> None:
        """Best-of-n for n = 1, 2, 4, ...: all from the same samples, by the unbiased estimator."""
        total = int(about["num_samples"])
        counts = [2**power for power in range(total.bit_length()) if 2**power <= total]
        if all((method, count) in self.done for count in counts):
            return
        judges = self.evaluation.judges
        drawn = collect(
            NativeSampler(
                policy_trunk(about["model"]).eval(), "policy", batch_size=self.evaluation.stage.sampling.batch_size
            ),
            judges.encoder,
            self.prompts,
            num_samples=total,
            sampling=self.evaluation.sampling,
            generator=self.evaluation.context.generator(f"curve/{method}"),
        )
        flat = [one.sample for row in drawn for one in row]
        chooser = chooser_of(about)
        proxy = _rows([score.value for score in chooser.score(flat)], total)
        gold = None if judges.truth is None else _rows([score.value for score in judges.truth.score(flat)], total)
        for point in best_of_n_curve(proxy, gold, ns=counts):
            kl = Interval(point.kl, point.kl, point.kl, len(self.prompts))
            rows = []
            for row, scores in zip(drawn, proxy, strict=True):
                if row[0].prompt.id in self.shown:
                    at = max(range(point.n), key=lambda place, scores=scores: scores[place])  # type: ignore[misc]
                    [token_kl] = judges.token_kl([row[at]])
                    [answer] = judges.judge(
                        [Answer(row[at].prompt, row[at].text, finished=row[at].completion.finished)]
                    )
                    rows.append(self._shown(method, point.n, kl, row[at], answer, token_kl))
            self._write(rows, {"kl": kl, "proxy_reward": point.proxy, "true_reward": point.gold}, method, point.n)

    def _shown(
        self, method: str, step: int, kl: Interval | None, rollout: Rollout, answer: Answer, token_kl: torch.Tensor
    ) -> Row:
        ids = rollout.completion.ids
        values = self.coach(rollout) if self.coach else [None] * len(ids)
        texts = [self.evaluation.judges.encoder.decode(ids[: at + 1]) for at in range(len(ids))]
        pieces = [after[len(before) :] for before, after in zip(["", *texts], texts, strict=False)]
        tokens = [
            {"text": text, "value": value, "kl": float(one)}
            for text, value, one in zip(pieces, values, token_kl, strict=True)
            if text
        ]
        return {
            "method": method,
            "step": step,
            "seed": self.evaluation.context.recipe.seed,
            "kl": kl.mean if kl else None,
            "prompt_id": answer.prompt.id,
            "prompt": [message._asdict() for message in answer.prompt.prompt],
            "kind": answer.prompt.kind,
            "text": answer.text,
            "tokens": tokens,
            "true_reward": answer.true_reward,
            "proxy_reward": answer.proxy_reward,
        }

    def _write(self, answers: list[Row], found: dict[str, Any], method: str, step: int) -> None:
        plain = {name: _plain(value) if isinstance(value, Interval) else value for name, value in found.items()}
        point = {"method": method, "step": step, "seed": self.evaluation.context.recipe.seed, **plain}
        self.rows.append({"point": point, "answers": answers})
        write_jsonl(self.file, self.rows)


def _coach(evaluation: Evaluation) -> Callable[[Rollout], list[float]] | None:
    """The reward head read after each token of an answer; None where the reward has none, or reads other tokens."""
    stage = evaluation.stage
    if stage.reward is None or not is_model(stage.reward):
        return None
    folder = evaluation.context.model(stage.reward)
    reference = evaluation.context.model(stage.reference)
    try:
        if load_tokenizer(folder).get_vocab() != load_tokenizer(reference).get_vocab():
            return None
        trunk = load_reward_model(folder).eval()
    except ModelError:
        return None
    if REWARD not in trunk.roles:  # several heads: no one number a token
        return None
    return lambda rollout: _values(trunk, rollout)


@torch.no_grad()
def _values(trunk: Trunk, rollout: Rollout) -> list[float]:
    tree = make_batch([[Group(rollout.completion.prompt, (Response(rollout.completion.ids),))]]).tree
    before = trunk(tree, {REWARD: "values"})[REWARD]  # float[N], read before each token
    last = trunk(tree, {REWARD: "rewards"})[REWARD]
    return [float(value) for value in torch.cat([before[1:], last])]


def _rows(values: Sequence[float | None], width: int) -> list[list[float]]:
    """[prompt][sample]; an answer that could not be scored is never chosen and never good."""
    low = min((value for value in values if value is not None), default=0.0)
    filled = [low if value is None else value for value in values]
    return [filled[at : at + width] for at in range(0, len(filled), width)]


def _plain(interval: Interval | None) -> Any:
    return None if interval is None else interval.to_dict()
