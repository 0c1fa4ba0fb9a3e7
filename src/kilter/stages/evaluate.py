"""The evaluation stage: every model answers the same held-out prompts; truth, proxy and reference judge the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kilter.config import EvalStage
from kilter.data.chat import ChatEncoder
from kilter.errors import CheckError, ModelError
from kilter.evals import Answer, read_answers, write_answers
from kilter.models.build import policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.load import load_tokenizer
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Demonstration, Prompt, Sample, Scorer
from kilter.rollout.best_of_n import best_of_n, best_of_n_kl
from kilter.rollout.collect import Rollout, collect, token_log_ratios
from kilter.stages.context import Context
from kilter.stages.scoring import chooser_of, reward_of, scorer_of


@dataclass(frozen=True)
class Judges:
    """Everything that measures an answer."""

    reference: Trunk
    encoder: ChatEncoder
    proxy: Scorer | None
    truth: Scorer | None
    measure: Callable[[Prompt, str], dict[str, bool | None]] | None

    def token_kl(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """log p / q of each sampled token, nats: p is the model that sampled, q the reference."""
        return token_log_ratios(self.reference, "policy", rollouts, self.encoder.pad_id)

    def judge(self, answers: Sequence[Answer]) -> list[Answer]:
        """The answers with true reward, proxy reward and flags."""
        samples = [
            Sample(one.prompt.prompt, one.text, finished=one.finished, truth=one.prompt.truth) for one in answers
        ]
        proxies = self.proxy.score(samples) if self.proxy else [None] * len(answers)
        truths = self.truth.score(samples) if self.truth else [None] * len(answers)
        made = []
        for one, proxy, true in zip(answers, proxies, truths, strict=True):
            made.append(
                replace(
                    one,
                    proxy_reward=proxy.value if proxy else None,
                    true_reward=true.value if true else None,
                    parts=dict(true.parts) if true else {},
                    flags=self.measure(one.prompt, one.text) if self.measure else {},
                )
            )
        return made


class Evaluation:
    """One evaluation stage at work. Models that are measured already are read back, so a killed stage goes on."""

    def __init__(self, context: Context, stage: EvalStage) -> None:
        self.context, self.stage = context, stage
        self.folder = context.run.path / "evaluation"
        self.prompts: list[Prompt] = context.records("prompts", stage.prompts, "prompt")
        self.sampling: Sampling = Sampling.of(stage.sampling)
        reference = context.model(stage.reference)
        proxy = None if stage.reward is None else scorer_of(reward_of(context, stage.reward))
        self.judges = Judges(
            policy_trunk(reference).eval(),
            ChatEncoder(load_tokenizer(reference)),
            proxy,
            context.call("truth", stage.truth) if stage.truth.path else None,
            context.function("measure", stage.measure) if stage.measure.path else None,
        )

    def measured(self, name: str, make: Callable[[], list[Answer]]) -> list[Answer]:
        """The judged answers under `name`, from the file where it is there."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            write_answers(path, self.judges.judge(make()))
        return read_answers(path)

    def model(self, name: str, value: str) -> list[Answer]:
        """A model's answers to all prompts; a best-of-n stage is a model too."""
        folder = Path(self.context.model(value))
        if (folder / "best_of_n.json").exists():
            return self.measured(name, lambda: self._best_of_n(folder, name))
        return self.measured(name, lambda: self.answers(str(folder), self.prompts, name))

    def answers(self, folder: str, prompts: Sequence[Prompt], purpose: str) -> list[Answer]:
        """One sampled answer to each prompt, with its KL from the reference."""
        return self._as_answers(self.sample(folder, prompts, purpose))

    def sample(self, folder: str, prompts: Sequence[Prompt], purpose: str) -> list[Rollout]:
        """One sampled answer to each prompt."""
        trunk = policy_trunk(folder).eval()
        encoder = ChatEncoder(load_tokenizer(folder))
        if encoder.prompt(prompts[0].prompt) != self.judges.encoder.prompt(prompts[0].prompt):
            raise ModelError(
                f"{folder}: its tokenizer or template is not that of the reference {self.stage.reference!r}, so a KL "
                "between them means nothing; evaluate models of one family together"
            )
        drawn = collect(
            NativeSampler(trunk, "policy", batch_size=self.stage.sampling.batch_size),
            encoder,
            prompts,
            num_samples=1,
            sampling=self.sampling,
            generator=self.context.generator(f"samples/{purpose}"),
        )
        return [row[0] for row in drawn]

    def _as_answers(self, rollouts: Sequence[Rollout]) -> list[Answer]:
        return [
            Answer(one.prompt, one.text, len(one.completion.ids), one.completion.finished, kl=float(kl.sum()))
            for one, kl in zip(rollouts, self.judges.token_kl(rollouts), strict=True)
        ]

    def _best_of_n(self, folder: Path, name: str) -> list[Answer]:
        about = json.loads((folder / "best_of_n.json").read_text(encoding="utf-8"))
        trunk = policy_trunk(about["model"]).eval()
        if self.judges.proxy is None:
            raise CheckError(
                f"models.{name} is best-of-n, which needs the evaluation's `reward`; name the reward model"
            )
        chosen = best_of_n(
            NativeSampler(trunk, "policy", batch_size=self.stage.sampling.batch_size),
            self.judges.encoder,
            self.prompts,
            chooser_of(about),
            n=about["num_samples"],
            sampling=self.sampling,
            generator=self.context.generator(f"samples/{name}"),
        )
        kl = best_of_n_kl(about["num_samples"])
        rollouts = [one.chosen for one in chosen]
        return [
            Answer(one.prompt, one.text, len(one.completion.ids), one.completion.finished, kl=kl) for one in rollouts
        ]

    def demonstrations(self) -> list[Answer]:
        """What the demonstrators say to the same kinds of prompts."""

        def make() -> list[Answer]:
            records: list[Demonstration] = self.context.records(
                "demonstrations", self.stage.demonstrations, "demonstration"
            )
            kinds = {prompt.id: prompt.kind for prompt in self.prompts}
            made = []
            for record in records:
                prompt = Prompt(prompt=record.messages[:-1])
                prompt = replace(prompt, kind=kinds.get(prompt.id, ""))
                ids = self.judges.encoder.response(prompt.prompt, record.messages[-1].content)
                made.append(Answer(prompt, record.messages[-1].content, len(ids)))
            return made

        return self.measured("demonstrations", make)

    def oracle(self) -> list[Answer]:
        """The best answer known to each prompt."""
        function = self.context.function("oracle", self.stage.oracle)
        return self.judges.judge([Answer(prompt, function(prompt)) for prompt in self.prompts])


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, each kind as often as the others, the first of each."""
    by_kind: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.kind, []).append(prompt)
    share = -(-count // max(len(by_kind), 1))
    return [prompt for own in by_kind.values() for prompt in own[:share]][:count]
