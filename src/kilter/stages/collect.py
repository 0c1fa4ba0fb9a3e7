"""Sampling responses and having them ranked; and best-of-n, which trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kilter import data
from kilter.config import BestOfNStage, CollectStage
from kilter.data.agree import agreement_of
from kilter.data.convert import ranking_of
from kilter.data.judgements import verdicts
from kilter.errors import ConfigError, DataError
from kilter.models.build import policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling
from kilter.records import Judgement, Prompt, Ranking, Sample, Scorer, prompt_id
from kilter.rollout.collect import collect
from kilter.rundir import write_folder, write_json
from kilter.stages.context import FEEDBACK, RANKINGS, RATINGS, Context, score_truth
from kilter.stages.scoring import reward_of, scorer_of
from kilter.stages.training import equip
from kilter.stats import mean_interval, proportion

AGREEMENT = "agreement.json"
SHARE = 512  # prompts answered between two lines of progress


def run_collect(context: Context, stage: CollectStage) -> dict[str, Any]:
    """k responses to each prompt, judged: rankings.jsonl and judgements.jsonl, feedback.jsonl, or ratings.jsonl."""
    equipment = equip(context, stage.model)
    annotator = context.call("annotator", stage.annotator, seed=context.seed("annotator"))
    prompts: list[Prompt] = context.records("prompts", stage.prompts, "prompt")
    sampler = NativeSampler(policy_trunk(equipment.folder), "policy", batch_size=stage.sampling.batch_size)
    generator = context.generator("samples")
    context.watch.begin(context.name, len(prompts))
    texts: list[list[str]] = []
    tokens = 0
    for at in range(0, len(prompts), SHARE):
        drawn = collect(
            sampler,
            equipment.encoder,
            prompts[at : at + SHARE],
            num_samples=stage.num_samples,
            sampling=Sampling.of(stage.sampling),
            generator=generator,
        )
        texts += [[rollout.text for rollout in row] for row in drawn]
        new = sum(len(rollout.completion.ids) for row in drawn for rollout in row)
        tokens += new
        context.watch.step(len(texts), tokens=new)
    # An empty answer cannot be judged by anybody, and one prompt's equal answers say nothing about each other.
    unique = [list(dict.fromkeys(text for text in row if text.strip())) for row in texts]
    found: dict[str, Any] = {"prompts": len(prompts), "sampled_tokens": tokens}
    if stage.label:
        scorer = scorer_of(reward_of(context, stage.reward))
        chosen = least_sure(scorer, prompts, unique)[: stage.label]
        prompts, unique = [prompts[at] for at in chosen], [unique[at] for at in chosen]
        found["chosen"] = len(chosen)
    if stage.ask == "thumbs":
        feedback = annotator.thumbs(prompts, unique)
        with write_folder(context.folder.result) as folder:
            data.write(folder / FEEDBACK, feedback)
        found["thumbs"] = len(feedback)
        if feedback:
            found["desirable"] = proportion(sum(one.desirable for one in feedback), len(feedback)).to_dict()
        return found
    if stage.ask == "ratings":
        rated = [(prompt, row) for prompt, row in zip(prompts, unique, strict=True) if row]
        ratings = annotator.ratings([prompt for prompt, _ in rated], [row for _, row in rated])
        with write_folder(context.folder.result) as folder:
            data.write(folder / RATINGS, ratings)
        found["rated"] = len(ratings)
        if values := [value for one in ratings for value in one.values]:
            found["value"] = mean_interval(values).to_dict()
        return found | _labelled(context, stage, [ranking_of(one) for one in ratings])
    kept = [(prompt, row) for prompt, row in zip(prompts, unique, strict=True) if len(row) > 1]
    judgements = annotator.rank([prompt for prompt, _ in kept], [row for _, row in kept])
    rankings = [ranking_of(one) for one in judgements]
    with write_folder(context.folder.result) as folder:
        data.write(folder / RANKINGS, rankings)
        data.write(folder / "judgements.jsonl", judgements)
    found["ranked"] = len(rankings)
    if stage.again and kept:
        found["agreement"] = _asked_again(context, stage, kept, judgements)
    return found | _labelled(context, stage, rankings)


def _labelled(context: Context, stage: CollectStage, rankings: list[Ranking]) -> dict[str, Any]:
    """How often the labels order two responses as the truth does, where the stage names one."""
    if not stage.truth.path:
        return {}
    asked, judged = [Prompt(prompt=one.prompt) for one in rankings], [one.responses for one in rankings]
    true = score_truth(context.call("truth", stage.truth), asked, judged)
    return {"label_accuracy": _label_accuracy(rankings, true)}


def _asked_again(
    context: Context, stage: CollectStage, kept: Sequence[tuple[Prompt, list[str]]], judgements: Sequence[Judgement]
) -> dict[str, Any] | None:
    """Some prompts' responses ranked by a second crowd: again.jsonl, agreement.json, and its measures.

    None: whoever judged said the same of everything, which has no agreement beyond chance.
    """
    chosen = np.random.default_rng(context.seed("again")).permutation(len(kept))[: stage.again]
    annotator = context.call("annotator", stage.annotator, seed=context.seed("annotator again"))
    asked = [kept[at] for at in sorted(chosen)]
    prompts = {prompt_id(prompt.prompt) for prompt, _ in asked}
    # A crowd drawn anew has people of the same names; they are others.
    second = [
        replace(one, annotator=f"{one.annotator or annotator.name} (again)")
        for one in annotator.rank([prompt for prompt, _ in asked], [row for _, row in asked])
    ]
    first = [replace(one, annotator=one.annotator or annotator.name) for one in judgements]
    data.write(context.folder.path / "again.jsonl", second)
    try:
        told = agreement_of(
            verdicts([*(one for one in first if prompt_id(one.prompt) in prompts), *second]),
            seed=context.seed("agreement") % 2**32,
        )
    except DataError as err:
        context.watch.say(f"  agreement not measured: {err}")
        return None
    write_json(context.folder.path / AGREEMENT, told.to_dict())
    return {name: interval.to_dict() for name, interval in told.measures.items()}


def least_sure(scorer: Scorer, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> list[int]:
    """Places of the prompts on whose answers the heads of a reward model disagree most, those first.

    Disagreement is the mean over a prompt's answers of the standard deviation over heads, each head's numbers less
    their mean over these answers: comparisons leave the level free, so heads that differ in it agree.

    Raises:
        ConfigError: the scorer has one head, which disagrees with nobody.
    """
    samples = [Sample(prompt.prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    scores = iter(scorer.score(samples))
    found = []
    for row in texts:
        heads = [list(score.parts.values()) for score in [next(scores) for _ in row] if score.value is not None]
        if any(len(said) < 2 for said in heads):
            raise ConfigError(
                f"{scorer.name} has one head and cannot say of what it is not sure; train it with heads.kind ensemble"
            )
        table = np.array(heads)  # float[answers, K]
        found.append(float((table - table.mean(0)).std(1, ddof=1).mean()) if len(table) > 1 else 0.0)
    return sorted(range(len(found)), key=lambda at: -found[at])


def _label_accuracy(rankings: list[Ranking], true: list[list[float]]) -> dict[str, Any]:
    right = total = 0
    for ranking, values in zip(rankings, true, strict=True):
        for a in range(len(values)):
            for b in range(a):
                if values[a] != values[b] and ranking.ranks[a] != ranking.ranks[b]:
                    right += (values[a] > values[b]) == (ranking.ranks[a] < ranking.ranks[b])
                    total += 1
    return proportion(right, total).to_dict()


def run_best_of_n(context: Context, stage: BestOfNStage) -> dict[str, Any]:
    """Nothing is trained: the result says which model answers and which reward model chooses."""
    about = {
        "model": context.model(stage.model),
        "reward": reward_of(context, stage.reward),
        "num_samples": stage.num_samples,
        "combine": None if stage.combine is None else stage.combine.model_dump(),
    }
    with write_folder(context.folder.result) as folder:
        write_json(folder / "best_of_n.json", about)
    return about
