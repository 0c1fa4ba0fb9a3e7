"""Reinforcement learning as a stage: roles, reward, rollouts, snapshots along the way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from kilter import data
from kilter.config import OnlineStage, PolicyConfig, Recipe, RlStage
from kilter.errors import ConfigError
from kilter.models.build import policy_trunk, ppo_trunk
from kilter.models.sampling import Sampling
from kilter.models.save import save_causal_lm
from kilter.records import PreferencePair, Prompt, Scorer, prompt_id
from kilter.rollout.algorithms import ALGORITHMS
from kilter.rollout.experience import Correction
from kilter.rollout.policy import PolicySource, Steered, check_numbers
from kilter.rollout.reward import paid_rewards
from kilter.scorers.check import check_scorer
from kilter.stages.audit import check_audit
from kilter.stages.canaries import Canaries
from kilter.stages.context import HELD_OUT, Context
from kilter.stages.further import further_scorers
from kilter.stages.guard import Guard, check_guard, seen_by_reward
from kilter.stages.samplers import sampler_of
from kilter.stages.scoring import is_model, reward_of, scorer_of
from kilter.stages.snapshots import Snapshots, snapshot_places
from kilter.stages.training import (
    Equipment,
    check_tokens,
    check_trunk,
    compute_dtype,
    convert,
    equip,
    held_as,
    lora_of,
    source_of,
    train,
)
from kilter.train.checks import check_signs, require
from kilter.train.loop import BatchSource
from kilter.train.policy import PolicyGradient
from kilter.train.ptx import Ptx, PtxSource
from kilter.train.sources import GroupSource, Pool
from kilter.tree import Group, Response


def check_algorithms(recipe: Recipe) -> None:
    """Refuses a recipe whose numbers an algorithm cannot work with, before any work.

    Raises:
        ConfigError: see `Algorithm.resolved`, `PolicyGradient` and `check_numbers`; with the stage.
    """
    for name, stage in recipe.stages.items():
        if isinstance(stage, RlStage):
            try:
                numbers, _ = _planned(stage)
                check_numbers(stage.algorithm, numbers, Sampling.of(stage.sampling), stage.prompts_per_rollout)
                check_guard(stage.guard, numbers)
            except ConfigError as err:
                raise ConfigError(f"stages.{name}: {err}") from err


def _planned(stage: RlStage) -> tuple[PolicyConfig, PolicyGradient]:
    """The stage's numbers with nothing left open, and what it minimises."""
    algorithm = ALGORITHMS[stage.algorithm]
    numbers = algorithm.resolved(stage.algorithm, stage.policy)
    weighted = stage.sampler.engine != "native"
    return numbers, algorithm.objective(numbers, longest=stage.sampling.max_new_tokens, weighted=weighted)


def run_rl(context: Context, stage: RlStage) -> dict[str, Any]:
    """Policy gradients; the model at the start is the reference."""
    numbers, objective = _planned(stage)
    equipment = equip(context, stage.model)
    prompts: list[Prompt] = context.records("prompts", stage.prompts, "prompt")
    reward = reward_of(context, stage.reward)
    audited = check_audit(context, stage, reward)
    seen = seen_by_reward(context, [reward, *(reward_of(context, one.reward) for one in stage.also)], prompts)
    dtype = compute_dtype(stage.precision)
    scorer = scorer_of(reward, combine=stage.combine, dtype=dtype, device=stage.precision.device)
    held: dict[str, Any] = {"lora": lora_of(stage.lora), "generator": context.generator("adapters")}
    held |= held_as(stage.precision)
    if objective.value is not None:
        from_reward = reward if numbers.value_from == "reward" and is_model(reward) else None
        shared = numbers.value_from == "shared"
        trunk = ppo_trunk(equipment.folder, from_reward, value="policy" if shared else "own", **held)
    else:
        trunk = policy_trunk(equipment.folder, reference=True, **held)
    trunk.train_only(*objective.roles)
    if stage.signs == "heed":
        require(*check_signs(partial(paid_rewards, kl_coef=numbers.kl_coef), kl_penalty=numbers.kl_coef != 0))
    accuracy = check_reward(context, stage, scorer, prompts)
    also = further_scorers(context, stage, dtype)
    gap = check_trunk(context, trunk, "policy", prompt_groups(equipment, prompts), stage.precision)
    sampler = sampler_of(stage, trunk, equipment)
    canaries = Canaries(context, stage, sampler, equipment.encoder)
    guard = Guard(context, stage, trunk.parameters_of("policy"), canaries)
    source = PolicySource(
        trunk,
        equipment.encoder,
        prompts,
        scorer,
        sampler=sampler,
        sampling=Sampling.of(stage.sampling),
        config=numbers,
        algorithm=stage.algorithm,
        rollouts=stage.rollouts,
        also=also,
        prompts_per_rollout=stage.prompts_per_rollout,
        num_samples=stage.samples,
        generator=context.generator("rollouts"),
        row_tokens=stage.optim.row_tokens,
        batch_tokens=stage.optim.batch_tokens,
        judge=guard,
        signs=stage.signs,
        correction=Correction(stage.sampler.cap, stage.sampler.max_gap) if objective.weighted else None,
    )
    for line in source.turned:
        context.watch.say(f"  ignored: {line}")
    places = snapshot_places(stage.rollouts, stage.snapshots)
    snapshots = Snapshots(context, trunk, equipment, {place * source.steps_per_rollout for place in places})
    rates = {"value": numbers.value_learning_rate} if numbers.value_learning_rate else None

    def on_step(step: int, figures: dict[str, float]) -> None:
        source.look(figures)
        guard.step(figures)
        if step % source.steps_per_rollout == 0:
            figures |= source.figures
        snapshots.look(step)

    steps = stage.rollouts * source.steps_per_rollout
    learned: Any = Steered(objective, source)
    drawn: BatchSource = source
    if stage.ptx.data:
        learned = Ptx(learned, stage.ptx.coef)
        drawn = PtxSource(source, ptx_text(context, equipment, stage, steps), lambda: not source.warming_up)
    state = train(
        context,
        equipment,
        trunk,
        learned,
        drawn,
        stage.optim,
        steps,
        role_learning_rates=rates,
        on_step=on_step,
        stop=lambda _step, _figures: source.stopped is not None,
        also={"guard": guard},
    )
    if source.stopped:
        context.watch.say(f"  stopped at step {state.step}: {source.stopped}")
    if guard.restore():
        context.watch.say("  the best policy that the guard saw takes its place")
    save_causal_lm(trunk, "policy", context.folder.result, equipment.template())
    return {
        "both_ways_gap": gap,
        "reward_accuracy": accuracy,
        "reward_audit": audited,
        "signs": source.turned,
        "prompts_seen_by_reward": seen,
        "steps": state.step,
        "stopped": source.stopped,
        "guard": [alarm["symptom"] for alarm in guard.alarms],
        "dropped": source.num_dropped,
    }


def check_reward(
    context: Context, stage: RlStage | OnlineStage, scorer: Scorer, prompts: Sequence[Prompt]
) -> dict[str, Any] | None:
    """The reward prefers the better of held-out pairs, or the run is refused; None: there were no pairs to ask.

    Pairs carry no truth: a verifier is told that of the stage's own prompts, where a pair answers one of them.
    """
    pairs: list[PreferencePair] = []
    if stage.pairs.path:
        pairs = context.records("pairs", stage.pairs, "pair")
    elif stage.reward in context.recipe.stages:
        path = context.earlier(stage.reward).path / HELD_OUT
        pairs = list(data.read(path, record="pair").records) if path.stat().st_size else []  # type: ignore[arg-type]
    if not pairs:
        context.watch.say("  no held-out pairs: whether the reward prefers better answers was not checked")
        return None
    found = check_scorer(
        scorer, pairs, truths={prompt_id(prompt.prompt): prompt.truth for prompt in prompts if prompt.truth}
    )
    if not found.sure:
        context.watch.say(f"  {found}: this may be chance; what it teaches may be worth nothing")
    return found.accuracy.to_dict()


def ptx_text(context: Context, equipment: Equipment, stage: RlStage, steps: int) -> GroupSource:
    """The text beside the rollouts, for so many steps; it begins again, in a new order, as often as that takes."""
    pools = []
    for place, one in enumerate(stage.ptx.data):
        records = context.records(f"ptx.data[{place}]", one, one.kind)
        groups = convert(context, equipment, records, stage.optim, one.path, one.score).groups
        check_tokens(equipment, groups, ends=one.kind != "document")
        pools.append(Pool(groups, one.weight))
    first, *more = pools
    share = first.weight / sum(pool.weight for pool in pools)
    optim = stage.optim.model_copy(update={"batch_size": stage.ptx.batch_size})
    epochs = steps * stage.ptx.batch_size * share / len(first.groups)
    pad_id = equipment.encoder.pad_id
    return source_of(context, first.groups, optim, epochs, pad_id, weight=first.weight, more=more)


def prompt_groups(equipment: Equipment, prompts: Sequence[Prompt]) -> list[Group]:
    """Groups for the both-ways check: prompts answered by their own first tokens."""
    found = []
    for prompt in prompts[:8]:
        ids = equipment.encoder.prompt(prompt.prompt)
        found.append(Group(ids, (Response(ids[:12]), Response(ids[-8:]))))
    return found
