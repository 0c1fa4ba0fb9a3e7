"""The guard of a stage that samples: it looks at every rollout before anything is learned from it, and acts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kilter.config import GuardConfig, PolicyConfig, RlStage
from kilter.errors import CheckError, ConfigError
from kilter.guard import ALARMS, SYMPTOMS, Alarm, Steps, Watch, correlation, risen, text_figures, usual
from kilter.ops import mean_and_sem
from kilter.records import Prompt, Scorer, prompt_id
from kilter.rollout.source import Scored, Verdict, worth
from kilter.rundir import read_jsonl, write_jsonl
from kilter.scorers.registry import did_you_mean
from kilter.stages.context import TRAINED_ON, Context
from kilter.stages.scoring import models_in, reward_of, scorer_of

REFUSE = "refuse"
PUTS_BACK = {"roll_back", "stop"}
"""Actions for which a copy of the policy is kept."""


def check_guard(guard: GuardConfig, policy: PolicyConfig) -> None:
    """Refuses what a guard cannot do, before any work.

    Args:
        policy: its numbers, resolved.
    Raises:
        ConfigError: an unknown symptom, a price of KL that cannot be raised, half of a pair of options, or two canaries
            of one name.
    """
    for place, named in (("actions", guard.actions), ("thresholds", guard.thresholds)):
        if unknown := sorted(set(named) - set(SYMPTOMS)):
            raise ConfigError(
                f"guard.{place} names {unknown[0]!r}; {did_you_mean(unknown[0], SYMPTOMS, 'choose one of')}"
            )
    if bool(guard.passing.path) != bool(guard.least_passing):
        raise ConfigError(
            f"guard.passing is {guard.passing.path!r} and guard.least_passing {guard.least_passing:g}; give both, or "
            "neither"
        )
    names = [one.name for one in guard.canaries]
    if len(set(names)) < len(names):
        raise ConfigError(f"guard.canaries are named {', '.join(names)}; give each a `name` of its own")
    if "raise_kl" in (guard.action, *guard.actions.values()) and policy.kl_coef <= 0:
        raise ConfigError(
            f"guard raises the price of KL, and policy.kl_coef is {policy.kl_coef:g}, which no factor raises; set it "
            "above 0, or choose another action"
        )


def seen_by_reward(context: Context, rewards: Sequence[str], prompts: Sequence[Prompt]) -> float | None:
    """Share of the prompts that reward models learned from: what they say there is partly remembered.

    Args:
        rewards: what pays, as `scorer_of` takes it; of a rule sheet, the models that it names.
    Returns:
        None: no reward model is among them, or none says what it learned from.
    """
    asked = [prompt_id(prompt.prompt) for prompt in prompts]
    known: list[set[str]] = []
    for reward in rewards:
        for model in models_in(reward):
            path = Path(model) / TRAINED_ON
            if not path.exists():
                continue
            known.append({row["prompt_id"] for row in read_jsonl(path)})
            if share := fmean(one in known[-1] for one in asked):
                context.watch.say(
                    f"  {share:.0%} of the prompts are among those that {model} learned from: what it pays there is "
                    "partly remembered; draw others where there are any"
                )
    return fmean(any(one in ids for ids in known) for one in asked) if known else None


class Guard:
    """The judge of a source: figures of the texts, the watch, and what follows from an alarm.

    `canaries` gives the figures of what is asked beside, by the number of the rollout, from 0.

    Kept is the policy with the best probe so far or, without a probe, the last one of which no symptom was suspected.
    The optimizer's moments stay as they are when it is put back. The copy goes into the checkpoints.
    """

    def __init__(
        self,
        context: Context,
        stage: RlStage,
        parameters: Sequence[Tensor],
        canaries: Callable[[int], Mapping[str, float]] = lambda _rollout: {},
    ) -> None:
        config = stage.guard
        self._context, self._config, self._parameters, self._canaries = context, config, parameters, canaries
        self._probe: Scorer | None = None
        if config.probe:
            self._probe = scorer_of(reward_of(context, config.probe), device=stage.precision.device)
        self._passing: Callable[[Prompt, str], bool] | None = None
        thresholds = dict(config.thresholds)
        if config.passing.path:
            self._passing = context.function("guard.passing", config.passing)
            thresholds["failing"] = 1 - config.least_passing
        self._actions = {name: _action(config, name) for name in SYMPTOMS}
        self._watch = Watch(thresholds, without=[name for name, action in self._actions.items() if action == "off"])
        self._steps = Steps()
        self._usual: dict[str, float] | None = None
        self._kept: list[Tensor] = []
        self._best = -float("inf")
        self._bad = 0
        self.alarms: list[dict[str, Any]] = []

    def step(self, figures: Mapping[str, float]) -> None:
        """Takes in the figures of a step."""
        self._steps.add(figures)

    def __call__(self, answers: Scored, figures: dict[str, float]) -> Verdict:
        """Adds its figures to those of the rollout, and says what is to be done about it.

        Raises:
            CheckError: the first rollout shows that this run cannot do what it is for.
        """
        phrase = self._figures(answers, figures)
        figures |= self._canaries(len(self._watch.rows))
        alarms = self._watch.look({**figures, **self._steps.take()}, phrase=phrase)
        if refused := [one for one in alarms if self._actions[one.symptom] == REFUSE]:
            raise CheckError("\n".join(map(self._refusal, refused)))
        self._tell(alarms)
        shown = self._watch.shown
        if not (bad := self._acted_on(shown)):
            self._keep(figures)
            raises = any(self._actions[name] == "raise_kl" for name in shown)
            return Verdict(raise_kl=self._config.kl_factor if raises else 1.0)
        self._bad += 1
        if self._bad >= self._config.patience or "stop" in {self._actions[name] for name in bad}:
            times = f", {self._bad} times without a better policy" if self._bad > 1 else ""
            return Verdict(stop=f"the guard saw {', '.join(bad)}{times}")
        self._watch.forget(1)
        return Verdict(again=self.restore())

    def _acted_on(self, symptoms: Iterable[str]) -> list[str]:
        """Those about which the policy is put back."""
        return [name for name in symptoms if self._actions[name] in PUTS_BACK]

    def _figures(self, answers: Scored, figures: dict[str, float]) -> str:
        """Adds the figures of texts, probe and `passing`; returns the phrase that has spread most."""
        rollouts = [[one for one, _ in group] for group in answers]
        texts = [[one.text for one in group] for group in rollouts]
        scores = [[worth(score) for _, score in group] for group in answers]
        flat, paid = [text for row in texts for text in row], [score for row in scores for score in row]
        if self._usual is None:
            self._usual = usual(flat)
        phrase, rise = risen(flat, self._usual)
        found = text_figures(texts, scores) | {"phrase": rise}
        if self._probe is not None:
            said = self._probe.score([one.sample for group in rollouts for one in group])
            known = [(score.value, own) for score, own in zip(said, paid, strict=True) if score.value is not None]
            if known:
                values, own = map(list, zip(*known, strict=True))
                mean, sem = mean_and_sem(torch.tensor(values, dtype=torch.float64))
                found |= {"probe": float(mean), "probe_correlation": correlation(values, own)}
                found["probe_samples"] = float(len(values))
                if len(values) > 1:
                    found["probe_sem"] = float(sem)
        if self._passing is not None:
            found["passing"] = fmean(bool(self._passing(one.prompt, one.text)) for group in rollouts for one in group)
        figures |= {f"rollout/{name}": value for name, value in found.items()}
        return phrase

    def _keep(self, figures: Mapping[str, float]) -> None:
        """Takes a copy of a policy that is better than the one kept."""
        if not PUTS_BACK & set(self._actions.values()):
            return
        probe = figures.get("rollout/probe")
        better = not self._acted_on(self._watch.suspected) if probe is None else probe > self._best
        if better:
            self._best, self._bad = self._best if probe is None else probe, 0
            self._kept = [parameter.detach().clone() for parameter in self._parameters]

    def _refusal(self, alarm: Alarm) -> str:
        place = f"stages.{self._context.name}.guard"
        return (
            f"{alarm.symptom}: {alarm.says}; likely: {'; '.join(alarm.of.causes)}. {alarm.of.remedies[0]}, or set "
            f"{place}.actions to {{{alarm.symptom}: warn}} to train nevertheless"
        )

    def _tell(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self._context.watch.say(f"  guard: {alarm.symptom}: {alarm.says}")
        if alarms:
            self.alarms += [one.to_dict() | {"action": self._actions[one.symptom]} for one in alarms]
            write_jsonl(self._context.folder.path / ALARMS, self.alarms)

    def restore(self) -> bool:
        """Puts the kept policy back if a later one was bad and none since was better, and says whether."""
        if not (self._bad and self._kept):
            return False
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(value)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "watch": self._watch.state_dict(),
            "steps": self._steps.state_dict(),
            "usual": self._usual,
            "kept": self._kept,
            "best": self._best if self._best > -float("inf") else None,
            "bad": self._bad,
            "alarms": list(self.alarms),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._watch.load_state_dict(state["watch"])
        self._steps.load_state_dict(state["steps"])
        self._usual, self._kept, self._bad = state["usual"], list(state["kept"]), int(state["bad"])
        self._best = -float("inf") if state["best"] is None else float(state["best"])
        self.alarms = list(state["alarms"])


def _action(config: GuardConfig, symptom: str) -> str:
    """What is done about a symptom."""
    action = config.actions.get(symptom, config.action)
    if SYMPTOMS[symptom].refused:
        return action if action == "off" or symptom in config.actions else REFUSE
    return action
