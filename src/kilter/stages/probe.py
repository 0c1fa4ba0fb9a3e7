"""What preference optimisation did to a policy, on fresh answers and on plain text, beside the model it started from.

Training's own figures are of other people's answers: they do not say how far the policy has gone from its start on what
it writes itself, whether its answers grew, or what it has forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kilter.config import OnlineStage, PreferStage
from kilter.models.build import policy_trunk
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Document, Prompt
from kilter.report.preferences import FORGETTING
from kilter.rollout.collect import Rollout, collect, positions, token_log_ratios
from kilter.stages.context import Context
from kilter.stages.training import Equipment
from kilter.stats import Interval, mean_interval, paired_difference
from kilter.train.preferences import Term
from kilter.train.reference import with_reference
from kilter.train.sources import groups_of
from kilter.tree import Group

MOST_PIECES = 256
"""Of plain text, each of at most `optim.max_tokens` tokens."""


def run_probe(
    context: Context,
    trunk: Trunk,
    equipment: Equipment,
    stage: PreferStage | OnlineStage,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Figures with 95% intervals: `fresh/kl` (nats an answer), `fresh/length` (tokens), `fresh/entropy` (nats a token),
    `plain_text/loss` (nats a token); the last three also `_before`."""
    chosen = _first(trunk, equipment, prompts, stage)
    if not chosen:
        return {}
    context.watch.say(f"  {len(chosen)} prompts answered anew")
    start = _start(trunk, equipment, stage)
    models = {"before": start, "after": (trunk, "policy")}
    trunk.eval()
    sampling = Sampling(max_new_tokens=stage.probe.max_new_tokens)
    found: dict[str, Interval] = {}
    texts = _texts(context, trunk, equipment, stage, chosen)
    losses: dict[str, list[float]] = {}
    for when, (model, role) in models.items():
        rows = collect(
            NativeSampler(model, role),
            equipment.encoder,
            chosen,
            num_samples=1,
            sampling=sampling,
            generator=context.generator("probe"),
        )
        rollouts = [row[0] for row in rows]
        suffix = "" if when == "after" else "_before"
        found[f"fresh/length{suffix}"] = mean_interval([len(one.completion.ids) for one in rollouts])
        found[f"fresh/entropy{suffix}"] = mean_interval([_surprisal(one) for one in rollouts])
        if when == "after":
            ratios = token_log_ratios(*start, rollouts, equipment.encoder.pad_id)
            found["fresh/kl"] = mean_interval([float(one.sum()) for one in ratios])
        losses[when] = _losses(model, role, texts, equipment.encoder.pad_id)
        if losses[when]:
            found[f"plain_text/loss{suffix}"] = mean_interval(losses[when])
    if losses["after"]:
        found["plain_text/rise"] = paired_difference(losses["after"], losses["before"])
    _say(context, stage, found)
    return {name: interval.to_dict() for name, interval in found.items()}


def _first(
    trunk: Trunk, equipment: Equipment, prompts: Sequence[Prompt], stage: PreferStage | OnlineStage
) -> list[Prompt]:
    """The first different prompts that leave room for an answer."""
    room = positions(trunk, ["policy"]) - stage.probe.max_new_tokens + 1
    different = {prompt.prompt: prompt for prompt in prompts}
    fitting = [prompt for prompt in different.values() if len(equipment.encoder.prompt(prompt.prompt)) <= room]
    return fitting[: stage.probe.prompts]


def _start(trunk: Trunk, equipment: Equipment, stage: PreferStage | OnlineStage) -> tuple[Trunk, str]:
    """The model that training began with, and its role; it is the trunk's reference where that has not moved."""
    if "reference" in trunk.roles and not stage.reference and not stage.sync_every:
        return trunk, "reference"
    return policy_trunk(equipment.folder).eval(), "policy"


def _surprisal(rollout: Rollout) -> float:
    """Nats a token: its mean over answers is an unbiased estimate of the entropy where all are equally long."""
    return -sum(rollout.completion.logprobs) / len(rollout.completion.logprobs)


def _texts(
    context: Context, trunk: Trunk, equipment: Equipment, stage: PreferStage | OnlineStage, prompts: Sequence[Prompt]
) -> list[Group]:
    """Pieces of plain text: of what the recipe names, or of the words of the prompts."""
    if stage.probe.text.path:
        records = context.records("probe.text", stage.probe.text, "document")
    else:
        records = [Document(text="\n".join(message.content for message in prompt.prompt)) for prompt in prompts]
    limit = int(min(stage.optim.max_tokens, positions(trunk, ["policy"])))
    return groups_of(equipment.encoder, records, max_tokens=limit).groups[:MOST_PIECES]


def _losses(model: Trunk, role: str, texts: Sequence[Group], pad_id: int) -> list[float]:
    """-log p of each piece, nats a token."""
    held = with_reference(model, texts, role=role, pad_id=pad_id, name="logprobs") if texts else []
    return [-float(group.responses[0].per_token["logprobs"].mean()) for group in held]


def _say(context: Context, stage: PreferStage | OnlineStage, found: Mapping[str, Interval]) -> None:
    lines = [
        f"  fresh answers: KL from the start {found['fresh/kl'].mean:.2f} nats; "
        f"{_moved(found, 'fresh/length', 1)} tokens; entropy {_moved(found, 'fresh/entropy', 2)} nats a token"
    ]
    if "plain_text/loss" in found:
        lines.append(f"  loss on plain text {_moved(found, 'plain_text/loss', 2)} nats a token")
    if "plain_text/rise" in found and found["plain_text/rise"].mean > FORGETTING:
        lines.append(f"  {advice(stage, found['plain_text/rise'].mean)}")
    for line in lines:
        context.watch.say(line)


def _moved(found: Mapping[str, Interval], name: str, digits: int) -> str:
    return f"{found[f'{name}_before'].mean:.{digits}f} -> {found[name].mean:.{digits}f}"


def advice(stage: PreferStage | OnlineStage, rise: float) -> str:
    """What to do when plain text has become less likely by `rise` nats a token."""
    first = Term(stage.loss.name, stage.loss.options)
    remedies = [f"raise loss.beta (it is {first.beta:g})"] if first.loss.needs_reference else []
    remedies += [f"lower optim.learning_rate (it is {stage.optim.learning_rate:g})"]
    if "nll" not in [loss.name for loss in stage.mix]:
        remedies.append("add {name: nll, weight: 0.2} to mix")
    return f"plain text has become less likely by {rise:.2f} nats a token: {', or '.join(remedies)}"
