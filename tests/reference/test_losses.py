"""The losses again, one number at a time in plain Python floats, compared on random inputs.

Written from the papers and not from the code: loops, no tensors, no shared helper.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from kilter import losses, ops


def tensor(values: list[float] | list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def joined(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


def preferred(margin: float) -> float:
    """Bradley and Terry's probability of a win, as strengths over their sum."""
    return math.exp(margin) / (math.exp(margin) + 1) if margin < 0 else 1 / (1 + math.exp(-margin))


def noisy(win: float, eps: float) -> float:
    """Cross-entropy of a label that is flipped with probability eps."""
    return -((1 - eps) * math.log(win) + eps * math.log(1 - win))


def ratios(row: dict[str, float]) -> tuple[float, float]:
    return row["chosen"] - row["ref_chosen"], row["rejected"] - row["ref_rejected"]


def slow_dpo(row: dict[str, float], beta: float, label_smoothing: float = 0.0) -> float:
    """Rafailov et al. eq. 7, as the probability that the implicit rewards give to the label."""
    good, bad = (beta * ratio for ratio in ratios(row))
    return noisy(math.exp(good) / (math.exp(good) + math.exp(bad)), label_smoothing)


def slow_robust(row: dict[str, float], beta: float, label_smoothing: float) -> float:
    """The combination of both labels' losses whose mean over flips is the clean label's."""
    good, bad = (beta * ratio for ratio in ratios(row))
    clean, flipped = -math.log(preferred(good - bad)), -math.log(preferred(bad - good))
    a, b = np.linalg.solve(
        [[1 - label_smoothing, label_smoothing], [label_smoothing, 1 - label_smoothing]], [1.0, 0.0]
    ).tolist()
    return a * clean + b * flipped


def slow_ipo(row: dict[str, float], beta: float) -> float:
    good, bad = ratios(row)
    return (good - bad) ** 2 - (good - bad) / beta + 1 / (4 * beta**2)


def slow_hinge(row: dict[str, float], beta: float) -> float:
    good, bad = ratios(row)
    margin = beta * good - beta * bad
    return 1 - margin if margin < 1 else 0.0


def slow_f_dpo(row: dict[str, float], beta: float, divergence: str, alpha: float) -> float:
    """f by its definition, f' by a difference quotient (Wang et al. 2023, table 1)."""
    f = {
        "reverse_kl": lambda u: u * math.log(u),
        "forward_kl": lambda u: -math.log(u),
        "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha": lambda u: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
    }[divergence]

    def slope(u: float) -> float:
        step = 1e-5 * u
        return (f(u + step) - f(u - step)) / (2 * step)

    good, bad = (slope(math.exp(ratio)) for ratio in ratios(row))
    return -math.log(preferred(beta * (good - bad)))


def slow_exo(row: dict[str, float], beta: float, label_smoothing: float) -> float:
    """KL from the policy's distribution over the pair to the label's, summed over the two."""
    weights = [math.exp(beta * ratio) for ratio in ratios(row)]
    policy = [weight / sum(weights) for weight in weights]
    label = [1 - label_smoothing, label_smoothing]
    return sum(p * math.log(p / q) for p, q in zip(policy, label, strict=True))


def slow_nca(row: dict[str, float], beta: float) -> float:
    good, bad = (beta * ratio for ratio in ratios(row))
    return -math.log(preferred(good)) - (math.log(1 - preferred(good)) + math.log(1 - preferred(bad))) / 2


def slow_bco_pair(row: dict[str, float], beta: float) -> float:
    good, bad = (beta * ratio for ratio in ratios(row))
    return -math.log(preferred(good) * (1 - preferred(bad)))


def slow_sppo(row: dict[str, float], beta: float) -> float:
    """Each log-ratio towards (win probability - 1/2) / beta."""
    return sum((ratio - (win - 0.5) / beta) ** 2 for ratio, win in zip(ratios(row), (1, 0), strict=True))


def slow_apo_zero(row: dict[str, float], beta: float) -> float:
    good, bad = (beta * ratio for ratio in ratios(row))
    return -preferred(good) + preferred(bad) + 1


def slow_apo_down(row: dict[str, float], beta: float) -> float:
    good, bad = (beta * ratio for ratio in ratios(row))
    return preferred(good) - preferred(good - bad) + 1


def slow_discopop(row: dict[str, float], beta: float, tau: float) -> float:
    good, bad = ratios(row)
    margin = beta * (good - bad)
    share = preferred(margin / tau)
    return (1 - share) * math.log(1 + math.exp(-margin)) + share / math.exp(margin)


def slow_ld_dpo(row: dict[str, float], beta: float, alpha: float) -> float:
    """Liu et al. 2024: the tail's likelihood to the power of alpha."""

    def cut(name: str) -> float:
        head, whole = row[f"{name}_head"], row[name]
        return head + alpha * (whole - head)

    good = cut("chosen") - cut("ref_chosen")
    bad = cut("rejected") - cut("ref_rejected")
    return -math.log(preferred(beta * (good - bad)))


def slow_wpo(row: dict[str, float], beta: float) -> float:
    return row["likeness"] * slow_dpo(row, beta)


def slow_rpo(row: dict[str, float], beta: float, nll_coef: float) -> float:
    return slow_dpo(row, beta) + nll_coef * -row["chosen"] / row["chosen_tokens"]


def slow_orpo(row: dict[str, float], beta: float, nll_coef: float) -> float:
    odds = {side: math.exp(row[side]) / (1 - math.exp(row[side])) for side in ("chosen", "rejected")}
    log_ratio = math.log(odds["chosen"] / odds["rejected"])
    return -nll_coef * row["chosen"] - beta * math.log(preferred(log_ratio))


def slow_simpo(row: dict[str, float], beta: float, gamma: float, label_smoothing: float) -> float:
    return noisy(preferred(beta * row["chosen"] - beta * row["rejected"] - gamma), label_smoothing)


def slow_alphapo(row: dict[str, float], beta: float, gamma: float, alpha: float) -> float:
    rewards = {side: (1 - math.exp(row[side]) ** -alpha) / alpha for side in ("chosen", "rejected")}
    return -math.log(preferred(beta * (rewards["chosen"] - rewards["rejected"]) - gamma))


def slow_cpo(row: dict[str, float], beta: float, nll_coef: float, label_smoothing: float) -> float:
    win = math.exp(beta * row["chosen"]) / (math.exp(beta * row["chosen"]) + math.exp(beta * row["rejected"]))
    return noisy(win, label_smoothing) - nll_coef * row["chosen"] / row["chosen_tokens"]


def slow_kto(row: dict[str, float], beta: float, desirable_weight: float, undesirable_weight: float) -> float:
    """lambda - v(x, y), eqs. 6 and 7."""
    gain = beta * (row["logps"] - row["ref_logps"] - row["kl"])
    if row["desirable"]:
        return desirable_weight - desirable_weight * preferred(gain)
    return undesirable_weight - undesirable_weight * preferred(-gain)


def slow_apo_zero_unpaired(
    row: dict[str, float], beta: float, desirable_weight: float, undesirable_weight: float
) -> float:
    return slow_kto({**row, "kl": 0.0}, beta, desirable_weight, undesirable_weight)


def slow_bco(row: dict[str, float], beta: float) -> float:
    """Cross-entropy of a classifier."""
    good = preferred(beta * (row["logps"] - row["ref_logps"]) - beta * row["shift"])
    return -math.log(good if row["desirable"] else 1 - good)


def slow_nll(row: dict[str, float]) -> float:
    return -row["chosen"]


SLOW = {name.removeprefix("slow_"): function for name, function in list(globals().items()) if name.startswith("slow_")}
SLOW["dpo_norm"] = slow_dpo
STEP_WIDE = {"aot", "aot_unpaired", "dpo_pl", "tpo", "tpo_l"}
"""Losses of more than one row: they have tests of their own below."""


def random_options(name: str, rng: random.Random) -> dict[str, Any]:
    """Every option drawn anew, inside its range."""
    found: dict[str, Any] = {}
    for key, allowed in losses.preference_losses()[name].ranges.items():
        if isinstance(allowed, losses.Range):
            low = max(allowed.above, allowed.at_least, 0.02)
            found[key] = rng.uniform(low, min(allowed.below, 2.0) * 0.95)
        else:
            found[key] = rng.choice(allowed)
    return found


def random_row(name: str, rng: random.Random) -> dict[str, float]:
    row = {key: -3 * rng.random() - 0.01 for key in losses.preference_losses()[name].inputs}
    row |= {key: float(rng.randint(1, 9)) for key in row if key.endswith("tokens")}
    row |= {key: rng.random() for key in row if key in ("likeness", "kl", "shift")}
    row |= {key: float(rng.random() < 0.5) for key in row if key == "desirable"}
    return row


@pytest.mark.parametrize("name", sorted(set(losses.preference_losses()) - STEP_WIDE))
def test_preference_losses(name: str) -> None:
    assert name in SLOW, f"{name!r} has no plain re-derivation"
    rng = random.Random(name)
    for _ in range(40):
        row, options = random_row(name, rng), random_options(name, rng)
        got = losses.bind(name, options)(*[tensor([value]) for value in row.values()])
        assert got.item() == pytest.approx(SLOW[name](row, **options), rel=1e-7, abs=1e-9), (row, options)


def slow_plackett_luce(rewards: list[float], ranks: list[int]) -> float:
    """The probability of the order, chosen one after another from those that are left."""
    left = sorted(range(len(rewards)), key=lambda i: ranks[i])
    probability = 1.0
    while left:
        probability *= math.exp(rewards[left[0]]) / sum(math.exp(rewards[i]) for i in left)
        del left[0]
    return -math.log(probability)


@pytest.mark.parametrize("seed", range(4))
def test_dpo_over_rankings(seed: int) -> None:
    rng = random.Random(seed)
    beta = rng.uniform(0.05, 1)
    sizes = [rng.randint(1, 5) for _ in range(6)]
    logps = [[-9 * rng.random() for _ in range(k)] for k in sizes]
    ref_logps = [[-9 * rng.random() for _ in range(k)] for k in sizes]
    ranks = [rng.sample(range(k), k) for k in sizes]
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    got = losses.dpo_pl(
        tensor(joined(logps)), tensor(joined(ref_logps)), torch.tensor(group), tensor(joined(ranks)), beta=beta
    )
    slow = [
        slow_plackett_luce([beta * (x - y) for x, y in zip(*rows, strict=True)], order)
        for *rows, order in zip(logps, ref_logps, ranks, strict=True)
    ]
    each = [got[[g == number for g in group]].sum().item() for number in range(len(sizes))]
    assert each == pytest.approx(slow, rel=1e-9)


def slow_triples(logps: list[float], ranks: list[int], beta: float, gamma: float, eps: float) -> float:
    """Every response below the best against every worse one."""
    total = 0.0
    for x, better in zip(logps, ranks, strict=True):
        for y, worse in zip(logps, ranks, strict=True):
            if 0 < better < worse:
                total += noisy(preferred(beta * (x - y) - gamma), eps)
    return total


@pytest.mark.parametrize("seed", range(4))
def test_triple_preferences(seed: int) -> None:
    rng = random.Random(seed)
    beta, gamma, eps, coef = rng.uniform(0.05, 1), rng.uniform(0, 2), rng.uniform(0, 0.4), rng.uniform(0, 2)
    sizes = [3, 3, 1, 4, 2, 5]
    logps = [[-9 * rng.random() for _ in range(k)] for k in sizes]
    tokens = [[float(rng.randint(1, 9)) for _ in range(k)] for k in sizes]
    ranks = [rng.sample(range(k), k) for k in sizes]
    group = torch.tensor([g for g, k in enumerate(sizes) for _ in range(k)])
    columns = (tensor(joined(logps)), group, tensor(joined(ranks)))
    options = {"beta": beta, "nll_coef": coef, "label_smoothing": eps}
    summed = losses.RANKED_LOSSES["tpo"].fn(*columns, tensor(joined(tokens)), **options)
    means = losses.RANKED_LOSSES["tpo_l"].fn(*columns, gamma=gamma, **options)
    for number, (own, lengths, order) in enumerate(zip(logps, tokens, ranks, strict=True)):
        best = order.index(0)
        found = [values[group == number].sum().item() for values in (summed, means)]
        slow = slow_triples(own, order, beta, 0.0, eps) - coef * own[best] / lengths[best]
        assert found[0] == pytest.approx(slow, rel=1e-9)
        assert found[1] == pytest.approx(slow_triples(own, order, beta, gamma, eps) - coef * own[best], rel=1e-9)


def slow_aot(rows: list[list[float]], beta: float, eps: float, paired: bool) -> float:
    """Melnyk et al. 2024: sort both sides of the step, then compare rank by rank."""
    chosen, rejected, ref_chosen, ref_rejected = zip(*rows, strict=True)
    if paired:
        above = sorted(a - b for a, b in zip(chosen, rejected, strict=True))
        below = sorted(a - b for a, b in zip(ref_chosen, ref_rejected, strict=True))
    else:
        above = sorted(a - b for a, b in zip(chosen, ref_chosen, strict=True))
        below = sorted(a - b for a, b in zip(rejected, ref_rejected, strict=True))
    return sum(noisy(preferred(beta * (u - v)), eps) for u, v in zip(above, below, strict=True))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("seed", range(3))
def test_dominance_over_the_step(name: str, seed: int) -> None:
    """Value and gradient (by difference quotients) of a whole step; the ranked inputs are made here by sorting."""
    rng = random.Random(seed)
    rows = [[-9 * rng.random() for _ in range(4)] for _ in range(7)]
    beta, eps = rng.uniform(0.05, 1), rng.uniform(0, 0.49)
    chosen, rejected, ref_chosen, ref_rejected = tensor(rows).unbind(1)

    def of_same_rank(values: list[float], by: list[float]) -> torch.Tensor:
        return tensor([sorted(values)[sorted(by).index(value)] for value in by])

    def minus(a: torch.Tensor, b: torch.Tensor) -> list[float]:
        return [float(x) for x in (a - b)]

    inputs = {
        "chosen": chosen.clone().requires_grad_(),
        "rejected": rejected.clone().requires_grad_(),
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
        "ref_ranked": of_same_rank(minus(ref_chosen, ref_rejected), minus(chosen, rejected)),
        "rejected_ranked": of_same_rank(minus(rejected, ref_rejected), minus(chosen, ref_chosen)),
        "chosen_ranked": of_same_rank(minus(chosen, ref_chosen), minus(rejected, ref_rejected)),
    }
    loss = losses.bind(name, {"beta": beta, "label_smoothing": eps})
    total = loss(*[inputs[key] for key in losses.PAIR_LOSSES[name].inputs]).sum()
    assert total.item() == pytest.approx(slow_aot(rows, beta, eps, name == "aot"), rel=1e-9)
    total.backward()
    for place, side in enumerate(("chosen", "rejected")):
        for number in range(len(rows)):
            moved = []
            for step in (1e-6, -1e-6):
                changed = [list(row) for row in rows]
                changed[number][place] += step
                moved.append(slow_aot(changed, beta, eps, name == "aot"))
            assert inputs[side].grad is not None
            assert inputs[side].grad[number].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-7)


def slow_bradley_terry(rewards: list[float], ranks: list[int]) -> float:
    """All pairs of one ranking; exp(r) are the strengths."""
    total = 0.0
    for i in range(len(rewards)):
        for j in range(i + 1, len(rewards)):
            i_wins = math.exp(rewards[i]) / (math.exp(rewards[i]) + math.exp(rewards[j]))
            if ranks[i] < ranks[j]:
                total -= math.log(i_wins)
            elif ranks[i] > ranks[j]:
                total -= math.log(1 - i_wins)
            else:
                total -= (math.log(i_wins) + math.log(1 - i_wins)) / 2
    return total


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as the sum over all later errors, for one response."""
    n = len(rewards)
    later = [*values, 0.0]
    errors = [rewards[t] + gamma * later[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]


def slow_ppo(logprob: float, old: float, advantage: float, clip: float) -> float:
    """Schulman et al. 2017, eq. 7, by cases."""
    ratio = math.exp(logprob) / math.exp(old)
    if advantage > 0 and ratio > 1 + clip:
        return -(1 + clip) * advantage
    if advantage < 0 and ratio < 1 - clip:
        return -(1 - clip) * advantage
    return -ratio * advantage


def slow_value(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


@pytest.mark.parametrize("seed", range(4))
def test_bradley_terry(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5) for _ in range(6)]
    rewards = [[rng.gauss(0, 2) for _ in range(k)] for k in sizes]
    ranks = [[rng.randrange(k) for _ in range(k)] for k in sizes]
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    got = losses.bradley_terry(tensor(joined(rewards)), torch.tensor(group), tensor(joined(ranks)))
    assert len(got) == sum(math.comb(k, 2) for k in sizes)
    assert got.sum().item() == pytest.approx(sum(map(slow_bradley_terry, rewards, ranks)), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_gae(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [1, 2, 7, 33, rng.randint(1, 70)]
    rewards = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    values = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    gamma, lam = rng.uniform(0.9, 1), rng.uniform(0.8, 1)
    leaf = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    got, returns = ops.gae(tensor(joined(rewards)), tensor(joined(values)), leaf, gamma=gamma, gae_lambda=lam)
    slow = [a for r, v in zip(rewards, values, strict=True) for a in slow_gae(r, v, gamma, lam)]
    assert got.tolist() == pytest.approx(slow, abs=1e-10)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(slow, joined(values), strict=True)], abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_ppo(seed: int) -> None:
    rng = random.Random(seed)
    old = [-5 * rng.random() - 1 for _ in range(40)]
    new = [x + rng.gauss(0, 0.4) for x in old]
    advantages = [rng.gauss(0, 1) for _ in old]
    targets = [rng.gauss(0, 1) for _ in old]
    clip = rng.uniform(0.1, 0.4)
    got = losses.ppo_clip(tensor(new), tensor(old), tensor(advantages), clip_range=clip)
    assert got.tolist() == pytest.approx(
        [slow_ppo(*row, clip) for row in zip(new, old, advantages, strict=True)], rel=1e-9
    )
    got = losses.value_clip(tensor(new), tensor(old), tensor(targets), clip_range=clip)
    assert got.tolist() == pytest.approx([slow_value(*row, clip) for row in zip(new, old, targets, strict=True)])


def test_kl_estimators_over_a_whole_distribution() -> None:
    rng = random.Random(0)
    p, q = ([x / sum(row) for x in row] for row in ([rng.random() for _ in range(30)] for _ in range(2)))
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    chi = sum(a * math.log(a / b) ** 2 for a, b in zip(p, q, strict=True)) / 2
    logp, logq = (tensor(list(map(math.log, row))) for row in (p, q))
    weights = tensor(p)
    assert (weights * ops.kl_k1(logp, logq)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (weights * ops.kl_k2(logp, logq)).sum().item() == pytest.approx(chi, rel=1e-9)
    assert (weights * ops.kl_k3(logp, logq)).sum().item() == pytest.approx(exact, rel=1e-9)


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """E_p[d k2] = d KL(p || q), summed exactly over four outcomes; k1's expected gradient is 0 instead."""
    logits = tensor([0.3, -0.7, 0.1, 0.9]).requires_grad_()
    logq = tensor([-1.0, -2.0, -1.5, math.log(1 - math.exp(-1) - math.exp(-2) - math.exp(-1.5))])
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)
    p = logp.exp().detach()
    (k2,) = torch.autograd.grad((p * ops.kl_k2(logp, logq)).sum(), logits, retain_graph=True)
    (k1,) = torch.autograd.grad((p * ops.kl_k1(logp, logq)).sum(), logits)
    assert torch.allclose(k2, exact, atol=1e-12)
    assert torch.allclose(k1, torch.zeros(4, dtype=torch.float64), atol=1e-12)


def slow_advantages(rewards: list[float], scale: str, everything: list[float]) -> list[float]:
    """Shao et al. 2024, section 4.1.2, one prompt at a time; the spread is of these rewards, of all, or not there."""
    mean = math.fsum(rewards) / len(rewards)
    if scale == "none":
        return [reward - mean for reward in rewards]
    others = rewards if scale == "group" else everything
    middle = math.fsum(others) / len(others)
    spread = math.sqrt(math.fsum((x - middle) ** 2 for x in others) / (len(others) - 1)) if len(others) > 1 else 0.0
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def slow_rloo(rewards: list[float]) -> list[float]:
    """Ahmadian et al. 2024: each against the average of the others."""
    found = []
    for place, reward in enumerate(rewards):
        others = rewards[:place] + rewards[place + 1 :]
        found.append(reward - sum(others) / len(others) if others else 0.0)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_advantages_of_groups(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 6) for _ in range(5)]
    rewards = [[rng.gauss(3, 2) for _ in range(k)] for k in sizes]
    order = rng.sample(range(sum(sizes)), sum(sizes))  # the responses of a prompt need not stand side by side
    group = [[g for g, k in enumerate(sizes) for _ in range(k)][place] for place in order]

    def shuffled(rows: list[list[float]]) -> list[float]:
        return [joined(rows)[place] for place in order]

    scores, index = tensor(shuffled(rewards)), torch.tensor(group)
    for scale in ("group", "batch", "none"):
        slow = shuffled([slow_advantages(row, scale, joined(rewards)) for row in rewards])
        assert ops.group_advantages(scores, index, scale=scale).tolist() == pytest.approx(slow, rel=1e-9, abs=1e-12)
    slow = shuffled([slow_rloo(row) for row in rewards])
    assert ops.leave_one_out(scores, index).tolist() == pytest.approx(slow, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_reinforce_plus_plus(seed: int) -> None:
    rng = random.Random(seed)
    rewards = [[rng.gauss(0, 1) for _ in range(n)] for n in (1, 4, 2, rng.randint(1, 30))]
    to_go = [sum(row[t:]) for row in rewards for t in range(len(row))]
    mean = sum(to_go) / len(to_go)
    spread = math.sqrt(sum((x - mean) ** 2 for x in to_go) / len(to_go))
    leaf = torch.repeat_interleave(torch.arange(4), torch.tensor([len(row) for row in rewards]))
    got = ops.reinforce_plus_plus(tensor(joined(rewards)), leaf).tolist()
    assert got == pytest.approx([(x - mean) / spread for x in to_go], rel=1e-6, abs=1e-7)


def slow_response(new: list[float], old: list[float], advantage: float, low: float, high: float, mean: bool) -> float:
    """Zheng et al. 2025, eq. 5-7 (`mean`), and the same of the whole response's probability: one response, by cases."""
    ratio = math.prod(math.exp(a) / math.exp(b) for a, b in zip(new, old, strict=True))
    ratio = ratio ** (1 / len(new)) if mean else ratio
    if advantage > 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * max(ratio, 1 - low)


@pytest.mark.parametrize("name", ["gspo", "response_clip"])
@pytest.mark.parametrize("seed", range(4))
def test_losses_of_responses(seed: int, name: str) -> None:
    """Values, and the gradient of the mean over tokens against the slow loss moved a little at each token."""
    rng = random.Random(seed)
    lengths = [1, 2, 5, rng.randint(1, 9)]
    old = [[-3 * rng.random() - 0.5 for _ in range(n)] for n in lengths]
    new = [[x + rng.gauss(0, 0.3) for x in row] for row in old]
    advantages = [rng.gauss(0, 1) for _ in lengths]
    low, high = rng.uniform(0.05, 0.2), rng.uniform(0.1, 0.3)
    leaf = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logprobs = tensor(joined(new)).requires_grad_()
    spread = tensor(advantages)[leaf]
    got = getattr(losses, name)(logprobs, tensor(joined(old)), spread, leaf, 4, clip_range=low, clip_range_high=high)

    def slow(rows: list[list[float]]) -> list[float]:
        return [
            slow_response(row, before, a, low, high, name == "gspo")
            for row, before, a in zip(rows, old, advantages, strict=True)
        ]

    assert got.tolist() == pytest.approx(
        [x for x, n in zip(slow(new), lengths, strict=True) for _ in range(n)], rel=1e-9
    )
    ops.mean_by(got, leaf, 4).sum().backward()
    assert logprobs.grad is not None
    gradient = iter(logprobs.grad.tolist())
    for number, row in enumerate(new):
        for place in range(len(row)):
            moved = []
            for step in (1e-6, -1e-6):
                changed = [list(other) for other in new]
                changed[number][place] += step
                moved.append(sum(slow(changed)))
            assert next(gradient) == pytest.approx((moved[0] - moved[1]) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_token_losses_with_two_ranges(seed: int) -> None:
    rng = random.Random(seed)
    old = [-3 * rng.random() - 1 for _ in range(40)]
    new = [x + rng.gauss(0, 0.5) for x in old]
    advantages = [rng.gauss(0, 1) for _ in old]
    low, high = rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.6)
    ratios = [math.exp(a) / math.exp(b) for a, b in zip(new, old, strict=True)]
    rows = list(zip(ratios, advantages, new, strict=True))
    columns = tensor(new), tensor(old), tensor(advantages)
    got = losses.ppo_clip(*columns, clip_range=low, clip_range_high=high)
    slow = [-a * (min(ratio, 1 + high) if a > 0 else max(ratio, 1 - low)) for ratio, a, _ in rows]
    assert got.tolist() == pytest.approx(slow, rel=1e-9)
    got = losses.cispo(*columns, clip_range=low, clip_range_high=high)
    assert got.tolist() == pytest.approx(
        [-min(max(ratio, 1 - low), 1 + high) * a * logp for ratio, a, logp in rows], rel=1e-9
    )
    assert losses.reinforce(columns[0], columns[2]).tolist() == pytest.approx([-a * logp for _, a, logp in rows])
    weights, cut = losses.importance_weights(columns[0], columns[1], cap=1.1)
    assert weights.tolist() == pytest.approx([min(ratio, 1.1) for ratio in ratios], rel=1e-9)
    assert cut.item() == pytest.approx(sum(ratio > 1.1 for ratio in ratios) / 40)


def test_which_divergence_each_penalty_lowers() -> None:
    """Expected gradients, summed exactly over four outcomes: k1 none, k2 of KL(p || q), k3 of KL(q || p)."""
    logits = tensor([0.3, -0.7, 0.1, 0.9]).requires_grad_()
    logq = tensor([math.log(x) for x in (0.7, 0.1, 0.15, 0.05)])
    logp = logits.log_softmax(0)
    p, q = logp.exp().detach(), logq.exp()
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((q * (logq - logp)).sum(), logits, retain_graph=True)
    assert (reverse - forward).norm() > 0.1
    for estimator, expected in (("k1", torch.zeros_like(logits)), ("k2", reverse), ("k3", forward)):
        loss = (p * losses.kl_penalty(logp, logq, estimator)).sum()
        (got,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(got, expected, atol=1e-12)
    old = tensor([0.3, 0.3, 0.2, 0.2])  # drew the samples: with the correction value and gradient are of KL(p || q)
    for corrected in (losses.kl_penalty(logp, logq, name, old_logprobs=old.log()) for name in ("k1", "k3")):
        (got,) = torch.autograd.grad((old * corrected).sum(), logits, retain_graph=True)
        assert (old * corrected).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)
        assert torch.allclose(got, reverse, atol=1e-12)
