"""Checks at the start of a run: a set-up that would train the wrong thing is refused by name before the first update.

Each check returns a `Verdict`; `require` raises for those that failed. `doctor` prints the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kilter.errors import CheckError
from kilter.ops import kl_k3, sum_by
from kilter.train import distributed
from kilter.train.loop import measure
from kilter.train.preferences import preference
from kilter.tree import Batch, TokenTree

TOLERANCE = 1e-3
"""Nats by which two forwards of the same weights may differ in float32. Seen: below 1e-5 between two packings."""
LOW_PRECISION_TOLERANCE = 0.3
"""The same where a dtype below float32 computes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check says."""

    name: str
    passed: bool
    value: str
    rule: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The check in one line."""
        text = f"{self.name}: {self.value}; rule: {self.rule}"
        return text if self.passed else f"{text}; {self.remedy}"


def require(*verdicts: Verdict) -> None:
    """Raises CheckError with the lines of the verdicts that failed."""
    failed = [verdict.line for verdict in verdicts if not verdict.passed]
    if failed:
        raise CheckError("\n".join(failed))


# The first batch -----------------------------------------------------------------------------------------------------


def check_scored(batches: Sequence[Batch]) -> Verdict:
    """Every response has a scored token: a template whose mask is empty trains nothing, with a normal-looking curve."""
    empty = sum(int((_scored_tokens(batch.tree) == 0).sum()) for batch in batches)
    responses = sum(len(batch.tree.last) for batch in batches)
    return Verdict(
        "empty mask",
        responses > 0 and empty == 0,
        f"{empty} of {responses} responses have no scored token",
        "every response has at least one",
        "look at the chat template and at the spans it gives (`kilter data show`)",
    )


def check_end_scored(batches: Sequence[Batch], stop_ids: Collection[int]) -> Verdict:
    """Responses end with a scored end token: without one the model never learns to stop."""
    ends = responses = 0
    for batch in batches:
        tree = batch.tree
        ends_leaf = torch.zeros(len(tree.last), dtype=torch.bool, device=tree.leaf.device)
        stops = torch.isin(tree.target, torch.tensor(sorted(stop_ids), device=tree.target.device))
        ends_leaf[tree.leaf[stops]] = True
        ends += int(ends_leaf.sum())
        responses += len(tree.last)
    return Verdict(
        "EOS unscored",
        ends > 0 or responses == 0,
        f"{ends} of {responses} responses have a scored end token (one of {sorted(stop_ids)})",
        "responses end with a scored end token, or the model never learns to stop",
        "score the end token: it must not be masked as padding, nor left out by the template",
    )


def check_bos(batches: Sequence[Batch], bos_id: int | None, stop_ids: Collection[int] = ()) -> Verdict:
    """BOS stands once: a path does not start with two, and no response starts with one.

    BOS further inside a path is left alone (some templates begin every turn with it), and so is a response that starts
    with BOS where that is also an end token.
    """
    bos = -1 if bos_id is None else bos_id
    doubled = 0
    for batch in batches:
        tree = batch.tree
        is_bos = (tree.tokens == bos) & (tree.segment >= 0)  # bool[B, T]
        same_segment = tree.segment[:, 1:] == tree.segment[:, :-1]
        doubled += int((is_bos[:, 1:] & is_bos[:, :-1] & same_segment & (tree.positions[:, 1:] == 1)).sum())
        if bos not in stop_ids:
            first = torch.ones_like(tree.leaf, dtype=torch.bool)  # bool[N], the first scored token of each response
            first[1:] = tree.leaf[1:] != tree.leaf[:-1]
            doubled += int((tree.target[first] == bos).sum())
    return Verdict(
        "doubled BOS",
        doubled == 0,
        "there is no BOS token" if bos_id is None else f"{doubled} paths or responses start with a BOS too many",
        "BOS stands once, at the start of the prompt",
        "remove `bos_token` from the chat template, or stop the tokenizer from adding it",
    )


def _scored_tokens(tree: TokenTree) -> Tensor:
    return torch.bincount(tree.leaf, minlength=len(tree.last))


# Policy, reference, old policy ---------------------------------------------------------------------------------------


@torch.no_grad()
def check_policy_is_reference(
    trunk: nn.Module, batches: Sequence[Batch], *, role: str = "policy", tolerance: float = TOLERANCE
) -> list[Verdict]:
    """Before the first update policy and reference are one: KL 0 and, where there are pairs, DPO loss ln 2.

    Runs the policy as training does (in train mode), so that dropout shows.

    Args:
        batches: with `ref_logprobs`.
    """
    device = distributed.device_of(trunk)
    trunk.train()
    gap, kl, tokens = 0.0, 0.0, 0
    for batch in (batch.to(device) for batch in batches):
        assert batch.ref_logprobs is not None, "check_policy_is_reference needs batches with ref_logprobs"
        logprobs = trunk(batch.tree, {role: "logprobs"})[role]
        if len(logprobs):
            gap = max(gap, _worst(logprobs - batch.ref_logprobs))
            kl += float(kl_k3(logprobs, batch.ref_logprobs).sum())
            tokens += len(logprobs)
    verdicts = [
        Verdict(
            "policy is the reference",
            gap <= tolerance,
            f"log-probs differ by up to {gap:.2e} nats, KL {kl / max(tokens, 1):.2e} nats a token",
            f"at the start they are one model: at most {tolerance:g} nats, KL 0",
            "give both the same weights, switch dropout off, and compute the reference from these very tokens",
        )
    ]
    num_pairs = sum(batch.units["pairs"] for batch in batches)
    if num_pairs and all("rank" in batch.extras for batch in batches):
        loss = _dpo_loss(trunk, batches, role)
        off = abs(loss - math.log(2))
        verdicts.append(
            Verdict(
                "DPO starts at ln 2",
                off <= tolerance,
                f"loss {loss:.6f}",
                f"with policy = reference the loss is ln 2 = {math.log(2):.6f}",
                "see the check above; if it passed, the pairs are put together wrongly",
            )
        )
    return verdicts


def _dpo_loss(trunk: nn.Module, batches: Sequence[Batch], role: str) -> float:
    return measure(trunk, preference("dpo", role=role), batches)["loss/dpo"]


@torch.no_grad()
def check_first_ratio(
    trunk: nn.Module, batches: Sequence[Batch], *, role: str = "policy", tolerance: float = TOLERANCE
) -> Verdict:
    """At PPO's first pass every ratio is 1: the old log-probs are those of this policy, for these tokens.

    Args:
        batches: with `extras["old_logprobs"]`.
    """
    device = distributed.device_of(trunk)
    trunk.train()
    low, high = 1.0, 1.0
    for batch in (batch.to(device) for batch in batches):
        ratio = (trunk(batch.tree, {role: "logprobs"})[role] - batch.extras["old_logprobs"]).exp()
        if len(ratio):
            low, high = min(low, float(ratio.min())), max(high, float(ratio.max()))
            if not math.isfinite(float(ratio.sum())):
                high = math.inf
    return Verdict(
        "first PPO ratio",
        max(high - 1, 1 - low) <= tolerance,
        f"between {low:.6f} and {high:.6f}",
        f"1 before the first update, within {tolerance:g}",
        "sampler and trainer see different models: compare temperature, top-k, dropout, dtype and tokens",
    )


def _worst(difference: Tensor) -> float:
    worst = float(difference.abs().max())
    return worst if math.isfinite(worst) else math.inf


# Signs ---------------------------------------------------------------------------------------------------------------

PaidReward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(scores [R], logprobs [N], ref_logprobs [N], leaf [N]) -> what each token is paid [N]: `rollout.reward.paid_rewards`
with its coefficient filled in."""


def check_signs(paid: PaidReward, *, kl_penalty: bool = True) -> list[Verdict]:
    """On two made-up responses the paid reward strictly rises with the score and falls with the log-ratio.

    Each sign is tried on its own, because either alone ruins a model: a reward negated with the KL penalty kept is
    fluent and maximally bad, a KL bonus is gibberish.

    Args:
        paid: what the run pays with, called as it will be.
        kl_penalty: False where the penalty is switched off on purpose: then the log-ratio must change nothing.
    """
    leaf = torch.tensor([0, 0, 0, 1, 1])
    ref_logprobs = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0])

    def total(scores: tuple[float, float], log_ratios: tuple[float, float]) -> list[float]:
        logprobs = ref_logprobs + torch.tensor(log_ratios)[leaf]
        rewards = paid(torch.tensor(scores), logprobs, ref_logprobs, leaf)
        return [float(value) for value in sum_by(rewards.double(), leaf, 2)]

    better, worse = total((0.5, -0.5), (0.0, 0.0)), total((-0.5, 0.5), (0.0, 0.0))
    rises = better[0] > worse[0] and worse[1] > better[1]
    near, far = total((0.3, 0.3), (0.0, 0.4)), total((0.3, 0.3), (0.4, 0.0))
    falls = near[0] > far[0] and far[1] > near[1]
    flat = near == far
    return [
        Verdict(
            "sign of the reward",
            rises,
            f"score 0.5 is paid {better[0]:.4f} and {worse[1]:.4f}, score -0.5 {worse[0]:.4f} and {better[1]:.4f}",
            "the paid reward rises with the score",
            "do not negate the score: the policy would learn to be as bad as it can",
        ),
        Verdict(
            "sign of the KL",
            falls if kl_penalty else flat,
            f"log-ratio 0 is paid {near[0]:.4f} and {far[1]:.4f}, log-ratio 0.4 a token {far[0]:.4f} and {near[1]:.4f}",
            "the paid reward falls with the log-ratio" if kl_penalty else "without a penalty the log-ratio is not paid",
            "kl_coef must be above 0 and its term taken away: a bonus for leaving the reference gives gibberish",
        ),
    ]
