"""A reward model as a scorer: one number per answer, read at its last token, from packed trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kilter.data.chat import ChatEncoder
from kilter.models.attention import text_config
from kilter.models.trunk import Trunk
from kilter.records import Conversation, Sample, Score
from kilter.tree import Group, Response, make_batches


class RewardModelScorer:
    """Scores with a role of a trunk that has a scalar head.

    Answers are encoded from their text with the reward model's own tokenizer and template, so a reward model of another
    family works. An answer that was cut by the length limit is read without an end token: it has none. Samples of one
    prompt share its tokens, and the score of a sample depends on nothing beside it, beyond rounding.

    Args:
        trunk: holds `role`, with a head.
        encoder: of the reward model's tokenizer.
        role: usually "reward".
        name: how reports call it.
        row_tokens, batch_tokens: budgets of a packed row and of a micro-batch; they change speed and memory alone.
        max_tokens: a longer prompt with answer is not scored; None: the model's number of positions.
    """

    def __init__(
        self,
        trunk: Trunk,
        encoder: ChatEncoder,
        *,
        role: str = "reward",
        name: str = "reward model",
        row_tokens: int = 192,
        batch_tokens: int = 8192,
        max_tokens: int | None = None,
    ) -> None:
        self.name = name
        self._trunk, self._encoder, self._role = trunk, encoder, role
        self._row_tokens, self._batch_tokens = row_tokens, batch_tokens
        model = trunk.models[trunk.roles[role].model]
        positions = getattr(text_config(model.config), "max_position_embeddings", None)
        self._max_tokens = max_tokens if max_tokens is not None else positions

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in order; unscored, with the reason, when empty or longer than the model reads."""
        scores: list[Score | None] = [None] * len(samples)
        answers: dict[Conversation, list[tuple[int, tuple[int, ...]]]] = {}
        prompts: dict[Conversation, tuple[int, ...]] = {}
        for at, sample in enumerate(samples):
            if sample.messages not in prompts:
                prompts[sample.messages] = self._encoder.prompt(sample.messages)
            ids = self._answer_ids(sample)
            length = len(prompts[sample.messages]) + len(ids)
            if not ids:
                scores[at] = Score(None, reason="the answer is empty and was cut")
            elif self._max_tokens is not None and length > self._max_tokens:
                scores[at] = Score(None, reason=f"{length} tokens; the reward model reads {self._max_tokens}")
            else:
                answers.setdefault(sample.messages, []).append((at, ids))
        groups = [
            Group(prompts[messages], tuple(Response(ids, per_response={"sample": float(at)}) for at, ids in rows))
            for messages, rows in answers.items()
        ]
        for at, value in self._rewards(groups):
            finite = value - value == 0
            scores[at] = Score(value) if finite else Score(None, reason=f"the reward model gave {value}")
        return [score for score in scores if score is not None]

    def _answer_ids(self, sample: Sample) -> tuple[int, ...]:
        ids = self._encoder.response(sample.messages, sample.text)
        while not sample.finished and ids and ids[-1] in self._encoder.stop_ids:
            ids = ids[:-1]
        return ids

    def _rewards(self, groups: Sequence[Group]) -> list[tuple[int, float]]:
        """(sample, reward) of every answer."""
        if not groups:
            return []
        device = next(self._trunk.parameters()).device
        found: list[tuple[int, float]] = []
        batches = make_batches(
            groups, row_tokens=self._row_tokens, batch_tokens=self._batch_tokens, pad_id=self._encoder.pad_id
        )
        with torch.no_grad():
            for batch in batches:
                rewards = self._trunk(batch.tree.to(device), {self._role: "rewards"})[self._role]
                places = batch.extras["sample"].to(torch.int64)
                found += zip(places.tolist(), rewards.tolist(), strict=True)
        return found
