"""What a recipe's `reward:` names: an earlier stage, a reward model, a function, or a rule sheet; and the words of
its audit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kilter.config import Combine, Recipe, RewardStage, RlStage, Stage
from kilter.errors import ConfigError, KilterError
from kilter.evals.audit import ENGLISH, Words, read_words
from kilter.records import Scorer
from kilter.scorers.load import load_function, load_scorer
from kilter.scorers.reward_model import load_reward_scorer
from kilter.scorers.sheet import is_sheet, load_rules
from kilter.stages.context import FUNCTION, Context


def is_model(value: str) -> bool:
    """Whether it names a reward model, and no function or rule sheet."""
    return not (FUNCTION.fullmatch(value) or is_sheet(value))


def models_in(value: str) -> tuple[str, ...]:
    """The reward models that it names: itself, those of a rule sheet, or of a function none."""
    return (value,) if is_model(value) else load_rules(value).models if is_sheet(value) else ()


def reward_of(context: Context, value: str) -> str:
    """What `scorer_of` takes, for any `reward:`."""
    if FUNCTION.fullmatch(value) and isinstance(folder := load_function(value), str | Path):
        return str(folder)
    return context.model(value) if is_model(value) else value


def scorer_of(
    value: str, *, combine: Combine | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Scorer:
    """A reward model's folder, a function `package.module:name` or a rule sheet as a scorer.

    Args:
        combine: how several heads of a reward model make one number; None: as the reward model says.
        device: where a reward model is held.
    """
    if FUNCTION.fullmatch(value):
        return load_scorer(value)
    if is_sheet(value):
        return load_rules(value, dtype=dtype)
    said = None if combine is None else combine.model_dump()
    return load_reward_scorer(value, combine=said, compute_dtype=dtype, device=device)


def chooser_of(about: Mapping[str, Any]) -> Scorer:
    """What chooses in a best-of-n, from its file `best_of_n.json`."""
    combine = about["combine"]
    return scorer_of(about["reward"], combine=None if combine is None else Combine(**combine))


def words_of(name: str) -> Words:
    """The words that are put into copies: a JSON file's, a mapping's named `package.module:name`, or, of "", English.

    Raises:
        ConfigError: there is no such file or mapping, or it holds something else.
    """
    if not name:
        return ENGLISH
    return read_words(load_function(name) if FUNCTION.fullmatch(name) else Path(name))


def check_rewards(recipe: Recipe) -> None:
    """Refuses a recipe whose rule sheets or words are wrong, or that combines what has no heads, before any work.

    Raises:
        ConfigError, ModelError: see `load_rules` and `words_of`; with the stage.
    """
    for name, stage in recipe.stages.items():
        if isinstance(stage, RewardStage):
            try:
                words_of(stage.audit.words)
            except KilterError as err:
                raise type(err)(f"stages.{name}.audit: {err}") from err
        for place, value, combine in rewards_in(stage):
            if combine is not None and not is_model(value):
                raise ConfigError(
                    f"stages.{name}.{place.removesuffix('reward')}combine is for the heads of a reward model, and "
                    f"{value} is none; drop it"
                )
            if is_sheet(value):
                try:
                    load_rules(value)
                except KilterError as err:
                    raise type(err)(f"stages.{name}.{place}: {err}") from err


def rewards_in(stage: Stage) -> list[tuple[str, str, Combine | None]]:
    """(place, value, how heads are combined) of each scorer that a stage names, its `reward` first."""
    value = getattr(stage, "reward", None)
    found = [("reward", value, getattr(stage, "combine", None))] if isinstance(value, str) else []
    if isinstance(stage, RlStage):
        found += [(f"also[{at}].reward", one.reward, one.combine) for at, one in enumerate(stage.also)]
        found += [("guard.probe", stage.guard.probe, None)] if stage.guard.probe else []
        found += [(f"guard.canaries[{at}].reward", one.reward, None) for at, one in enumerate(stage.guard.canaries)]
    return found
