"""Online and iterative preference optimisation as a source of batches: sample, score, pair, hand out.

With one step a round this is online DPO (Guo et al. 2024, arXiv 2402.04792); with many it is iterative DPO (Xu et al.
2023, arXiv 2312.16682). The pairs are of the policy's own answers, so the loss and its source know nothing of each
other: any loss over comparisons learns from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean
from typing import Literal, Unpack

import torch

from kilter import ops
from kilter.data.chat import ChatEncoder
from kilter.errors import CheckError
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Scorer
from kilter.rollout.collect import Rollout
from kilter.rollout.source import Drawing, RolloutSource, Scored, worth
from kilter.train.reference import with_reference
from kilter.tree import Group, Response

Pairing = Literal["best_worst", "all"]


class PairSource(RolloutSource):
    """A round's answers as comparisons: ranks by score, and the log-probs of the reference as it is at its start.

    "best_worst" keeps the best and the worst answer to each prompt. "all" keeps them all, and each pair of unequal
    scores weighs by its gap: over the round's pairs, the mean weight is 1 (`extras["pair_weight"]`).

    Args:
        epochs, minibatches: passes over a round's pairs, and steps in each of them.
        pairing: which answers to a prompt are compared.
        min_margin: prompts whose best and worst answer are closer than this, in the score's unit, are left out; where
            they are equal they always are.
        truncation_penalty: taken from the score of an answer that met the length limit, in the score's unit.
        reference: whether the loss asks for the reference's log-probs; the trunk then has a role "reference".
        drawing: see `RolloutSource`.
    Raises:
        CheckError: the scorer tells the answers of the first round apart to fewer prompts than there are steps. A later
            round of that kind ends training: the answers have become alike, or equally good.
    """

    def __init__(
        self,
        trunk: Trunk,
        encoder: ChatEncoder,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        epochs: int,
        minibatches: int,
        pairing: Pairing = "best_worst",
        min_margin: float = 0.0,
        truncation_penalty: float = 0.0,
        reference: bool = True,
        **drawing: Unpack[Drawing],
    ) -> None:
        reads = ("policy", "reference") if reference else ("policy",)
        super().__init__(
            trunk, encoder, prompts, scorer, epochs=epochs, minibatches=minibatches, reads=reads, **drawing
        )
        self._pairing, self._min_margin = pairing, min_margin
        self._truncation_penalty, self._reference = truncation_penalty, reference

    def _learn(self, answers: Scored) -> None:
        groups = [
            Group(
                group[0][0].completion.prompt,
                tuple(Response(rollout.completion.ids) for rollout, _ in group),
                group[0][0].prompt.origin,
            )
            for group in answers
        ]
        if self._reference:  # of all answers, so that the round's KL is that of the policy and not of the extremes
            groups = with_reference(
                self._trunk,
                groups,
                row_tokens=self._budget["row_tokens"],
                batch_tokens=self._budget["batch_tokens"],
                pad_id=self._budget["pad_id"],
            )
        paid = [[self._paid(rollout, worth(score)) for rollout, score in group] for group in answers]
        picked = [self._compared(scores) for scores in paid]
        what = f"tells the answers apart (by {self._min_margin:g} or more) to"
        remedy = "lower min_margin, draw more answers a prompt, or look whether the policy's answers still differ"
        if few := self._too_few(sum(map(bool, picked)), what, "the steps of a round", remedy):
            if not self.num_rollouts:
                raise CheckError(few)
            self.stopped = few  # what was learned so far is kept
            self._lay_out([], [])
            return
        weight = None if self._pairing == "best_worst" else 1 / _mean_gap(paid, picked)
        compared = [
            replace(group, responses=tuple(_ranked(group, scores, places, weight)))
            for group, scores, places in zip(groups, paid, picked, strict=True)
            if places
        ]
        self._lay_out(compared, self._draw_steps(len(compared)))
        self.figures = self._figures(answers, groups)
        margins = [
            scores[places[0]] - scores[places[-1]] for scores, places in zip(paid, picked, strict=True) if places
        ]
        self.figures |= {
            "rollout/margin": fmean(margins),
            "rollout/prompts_kept": len(compared) / self._num_prompts,
        }

    def _paid(self, rollout: Rollout, score: float) -> float:
        return score - (0.0 if rollout.completion.finished else self._truncation_penalty)

    def _compared(self, scores: Sequence[float]) -> list[int]:
        """The answers to a prompt that are compared, best first; none where nothing tells them apart."""
        ranked = sorted(range(len(scores)), key=lambda at: -scores[at])
        gap = scores[ranked[0]] - scores[ranked[-1]]
        if gap <= 0 or gap < self._min_margin:
            return []
        return [ranked[0], ranked[-1]] if self._pairing == "best_worst" else ranked

    def _figures(self, answers: Scored, groups: Sequence[Group]) -> dict[str, float]:
        """Of all scored answers of a round; a mean over them has its standard error beside it, `_sem`."""
        flat = [(rollout, score) for group in answers for rollout, score in group]
        rollouts = [rollout for rollout, _ in flat]
        per_answer = {
            "score": [worth(score) for _, score in flat],
            "length": [float(len(rollout.completion.ids)) for rollout in rollouts],
        }
        if self._reference and self._sampling.is_plain:
            ref_logps = [float(one.per_token["ref_logprobs"].sum()) for group in groups for one in group.responses]
            logps = [sum(rollout.completion.logprobs) for rollout in rollouts]
            per_answer["kl_k1"] = [one - other for one, other in zip(logps, ref_logps, strict=True)]
        found = {"samples": float(len(flat)), "unscored": float(len(self.rollouts) - len(flat))}
        for name, values in per_answer.items():
            mean, sem = ops.mean_and_sem(torch.tensor(values, dtype=torch.float64))
            found |= {name: float(mean), f"{name}_sem": float(sem)}
        found["truncated"] = fmean(not rollout.completion.finished for rollout in rollouts)
        found["distinct"] = len({rollout.text for rollout in rollouts}) / len(rollouts)
        surprisals = [-logprob for rollout in rollouts for logprob in rollout.completion.logprobs]
        found["entropy"] = fmean(surprisals)  # nats a token, from the samples
        return {f"rollout/{name}": value for name, value in found.items()}


def _mean_gap(paid: Sequence[Sequence[float]], picked: Sequence[Sequence[int]]) -> float:
    """Over all pairs of compared answers."""
    return fmean(
        abs(scores[one] - scores[two])
        for scores, places in zip(paid, picked, strict=True)
        for one, two in combinations(places, 2)
    )


def _ranked(group: Group, scores: Sequence[float], places: Sequence[int], weight: float | None) -> list[Response]:
    """The compared answers with their ranks (of equals the same), and where pairs weigh, their places on that scale."""
    found = []
    for at in places:
        numbers = {"rank": float(sum(scores[other] > scores[at] for other in places))}
        if weight is not None:
            numbers["pair_weight"] = weight * scores[at]
        found.append(replace(group.responses[at], per_response=numbers))
    return found
