"""What a run that goes wrong shows: each symptom is one function of the figures so far, with its likely causes.

A symptom's statistic is a function of the rows of a run's rollouts (`rows.py`), the last being the newest: the higher,
the worse; None where the figures that it needs are not there. It is shown once the statistic has been above the
threshold for `lasting` rollouts in a row. Where the thresholds come from: docs/guard.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

Row = Mapping[str, float]
Rows = Sequence[Row]
Statistic = Callable[[Rows], float | None]


@dataclass(frozen=True, slots=True)
class Symptom:
    """One thing to watch for."""

    name: str
    statistic: Statistic
    threshold: float
    says: str
    """In words, with {value} and {threshold}, and {phrase} of a symptom of phrases or of names."""
    causes: tuple[str, ...]
    remedies: tuple[str, ...]
    lasting: int
    """Rollouts in a row."""
    start: bool
    """Of the first rollout alone, before anything was learned."""
    refused: bool
    """A run that shows it at the start is refused."""


SYMPTOMS: dict[str, Symptom] = {}
LEAST_ENTROPY = 1e-6
"""Nats a token: log-probs of tokens that are sure round to 0."""


def symptom(
    name: str,
    says: str,
    *,
    threshold: float,
    causes: Sequence[str],
    remedies: Sequence[str],
    lasting: int = 2,
    start: bool = False,
    refused: bool = False,
) -> Callable[[Statistic], Statistic]:
    """Registers a statistic."""

    def register(statistic: Statistic) -> Statistic:
        assert name not in SYMPTOMS, f"symptom {name!r} is registered twice"
        about = (tuple(causes), tuple(remedies), lasting, start, refused)
        SYMPTOMS[name] = Symptom(name, statistic, threshold, says, *about)
        return statistic

    return register


def _now(rows: Rows, name: str) -> float | None:
    return rows[-1].get(name)


def _risen(rows: Rows, name: str) -> float | None:
    """By how much a figure is above that of the first rollout."""
    now, first = rows[-1].get(name), rows[0].get(name)
    return None if now is None or first is None else now - first


def _score(rows: Rows) -> tuple[float, float, float] | None:
    """By how much the mean score is above that of the first rollout, and the standard errors of both."""
    rise, error = _risen(rows, "rollout/score"), "rollout/score_sem"
    if rise is None or error not in rows[0] or error not in rows[-1]:
        return None
    return rise, rows[0][error], rows[-1][error]


def _ratio(now: float | None, first: float | None) -> float | None:
    """log2; None where it says nothing."""
    return None if not now or not first or now < 0 or first < 0 else math.log2(now / first)


# Before the first update ---------------------------------------------------------------------------------------------


@symptom(
    "no_signal",
    "all answers of the first rollout are paid alike ({value:.0%} of the prompts have nothing to compare)",
    threshold=0.98,
    causes=["the reward gives one number to everything, or scores the prompt and not the answer"],
    remedies=["print the reward of a good and of a bad answer", "draw more answers to a prompt, or harder prompts"],
    lasting=1,
    start=True,
    refused=True,
)
def no_signal(rows: Rows) -> float | None:
    """Share of prompts whose answers are paid alike; of methods with one answer a prompt, whether all are."""
    spread, tied = _now(rows, "rollout/score_std"), _now(rows, "rollout/tied")
    return 1.0 if spread == 0.0 else tied


@symptom(
    "scale",
    "what the first answers are paid differs by {value:.1f} powers of ten more, or less, than the usual 1",
    threshold=1.0,
    causes=["the reward has a scale of its own, which the price of KL and the critic do not fit"],
    remedies=["set policy.normalize_reward", "scale the reward, or policy.kl_coef as much"],
    lasting=1,
    start=True,
)
def scale(rows: Rows) -> float | None:
    """Powers of ten, up or down, from 1 to the standard deviation of what the answers are paid."""
    spread = paid_spread(rows[-1])
    return abs(math.log10(spread)) if spread else None


def paid_spread(row: Row) -> float | None:
    """Standard deviation, over its answers, of what a rollout is paid before the price of KL."""
    sem, count = row.get("rollout/paid_score_sem"), row.get("rollout/samples")
    return None if sem is None or not count else sem * math.sqrt(count)


@symptom(
    "never_ends",
    "{value:.0%} of the first answers met the length limit: the model does not end them",
    threshold=0.95,
    causes=["no end token was learned in SFT", "sampling.max_new_tokens is far too low", "a wrong chat template"],
    remedies=["look at the end tokens with `kilter doctor`", "raise sampling.max_new_tokens", "train SFT first"],
    lasting=1,
    start=True,
)
def never_ends(rows: Rows) -> float | None:
    """Share of answers that were cut."""
    return _now(rows, "rollout/truncated")


@symptom(
    "against_probe",
    "reward and probe disagree about the first answers: their correlation is {value:.2f} below 0, in standard errors",
    threshold=3.0,
    causes=["the reward's sign is turned", "the reward model was trained on exchanged labels"],
    remedies=["turn the reward's sign", "audit the reward model: `kilter reward audit`"],
    lasting=1,
    start=True,
    refused=True,
)
def against_probe(rows: Rows) -> float | None:
    """-r sqrt(n - 3) of Fisher's z, where the probe scored enough answers."""
    r, n = _now(rows, "rollout/probe_correlation"), _now(rows, "rollout/probe_samples")
    if r is None or n is None or n < 10:
        return None
    return -math.atanh(max(min(r, 0.999999), -0.999999)) * math.sqrt(n - 3)


# Reward hacking ------------------------------------------------------------------------------------------------------


@symptom(
    "probe_falls",
    "the probe has fallen from its best by {value:.1f} standard errors while the reward rose",
    threshold=4.0,
    causes=["the reward pays for something that the probe does not value: it is being hacked"],
    remedies=["go back to the best policy by the probe", "raise the price of KL", "mend the reward: look at samples"],
)
def probe_falls(rows: Rows) -> float | None:
    """Fall of the probe's mean over two rollouts from the best such mean, in errors; 0 where the reward fell too."""
    told = [row for row in rows if row.keys() >= {"rollout/probe", "rollout/score"}]
    if len(told) < 4:
        return None
    means = [(one["rollout/probe"] + two["rollout/probe"]) / 2 for one, two in pairwise(told)]
    best = max(range(len(means)), key=means.__getitem__)
    spread = math.hypot(*(row.get("rollout/probe_sem", 0.0) / math.sqrt(2) for row in (told[best], told[-1])))
    if not spread or told[-1]["rollout/score"] < told[best]["rollout/score"]:
        return 0.0
    return (means[best] - means[-1]) / spread


@symptom(
    "phrase",
    'one phrase has spread to at least {value:.0%} more of the answers than at the start: "{phrase}"',
    threshold=0.14,
    causes=["the reward pays for words and not for what is said: apologies, flattery, certainty, headers, letters"],
    remedies=["read the samples that hold the phrase", "`kilter reward audit` with it", "raise the price of KL"],
)
def phrase(rows: Rows) -> float | None:
    """Largest rise of a phrase's share of the answers, less sqrt(2 / answers): two standard errors at most."""
    rise, answers = _now(rows, "rollout/phrase"), _now(rows, "rollout/samples")
    return None if rise is None else rise - math.sqrt(2 / answers) if answers else rise


@symptom(
    "longer",
    "answers have grown: their length has doubled {value:.2f} times since the start",
    threshold=0.6,
    causes=["the reward pays for length", "nothing is paid for the end of an answer"],
    remedies=["audit the reward for padding", "raise policy.truncation_penalty", "raise the price of KL"],
)
def longer(rows: Rows) -> float | None:
    """log2 of the mean length over that at the start."""
    return _ratio(_now(rows, "rollout/length"), rows[0].get("rollout/length"))


@symptom(
    "length_pays",
    "reward follows length: their correlation is {value:.2f}, and answers grow",
    threshold=0.6,
    causes=["the reward pays for length"],
    remedies=["audit the reward for padding", "train the reward model with answers of all lengths on both sides"],
)
def length_pays(rows: Rows) -> float | None:
    """Correlation of reward and words, where answers are longer than at the start."""
    grown = longer(rows)
    pays = _now(rows, "rollout/length_pays")
    return None if pays is None or grown is None else pays if grown > 0.2 else 0.0


@symptom(
    "cut",
    "{value:.0%} more of the answers meet the length limit than at the start",
    threshold=0.2,
    causes=["the reward pays for length", "the policy has lost its end token"],
    remedies=["raise policy.truncation_penalty", "raise sampling.max_new_tokens", "raise the price of KL"],
)
def cut(rows: Rows) -> float | None:
    """Rise of the share of answers that were cut."""
    return _risen(rows, "rollout/truncated")


@symptom(
    "repeats",
    "answers repeat themselves: {value:.0%} more of their words stood in them before than at the start",
    threshold=0.15,
    causes=["the reward pays for length or for words", "the policy has broken"],
    remedies=["raise the price of KL", "lower optim.learning_rate", "audit the reward for repetition"],
)
def repeats(rows: Rows) -> float | None:
    """Rise of the share of repeated runs of words."""
    return _risen(rows, "rollout/repeats")


@symptom(
    "unlikely",
    "the reference would hardly write what is written now: {value:.2f} nats a token more than at the start",
    threshold=0.7,
    causes=["the reward pays for text without sense", "steps are too large and have broken the policy"],
    remedies=["raise the price of KL", "lower optim.learning_rate", "read samples.jsonl"],
)
def unlikely(rows: Rows) -> float | None:
    """Rise of the reference's surprise, nats a token: that of the policy and its KL."""
    now, first = _surprise(rows[-1]), _surprise(rows[0])
    return None if now is None or first is None else now - first


def _surprise(row: Row) -> float | None:
    entropy, kl = row.get("rollout/entropy"), _kl(row)
    return None if entropy is None or kl is None else entropy + kl


def _kl(row: Row) -> float | None:
    """From the reference, nats a token."""
    kl, length = row.get("rollout/kl_k1"), row.get("rollout/length")
    return None if kl is None or not length else kl / length


@symptom(
    "spread",
    "the heads of the reward disagree {value:.2f} doublings more than at the start",
    threshold=1.0,
    causes=["the policy writes what the reward model was not taught about"],
    remedies=["combine the heads by mean_minus_variance", "label some of these answers (`collect` with `label`)"],
)
def spread(rows: Rows) -> float | None:
    """log2 of the ensemble's spread over that at the start."""
    return _ratio(_now(rows, "rollout/spread"), rows[0].get("rollout/spread"))


CANARY = "rollout/canary/"
"""Beginning of the names of the figures of canaries."""


def canary_falls(rows: Rows) -> dict[str, float]:
    """By canary: the fall of its score from its first asking to its last, in standard errors."""
    found = {}
    for name in {name for row in rows for name in row if name.startswith(CANARY) and not name.endswith("_sem")}:
        told = [(row[name], row.get(f"{name}_sem", 0.0)) for row in rows if name in row]
        (first, error), (last, later) = told[0], told[-1]
        if len(told) > 1 and (errors := math.hypot(error, later)):
            found[name.removeprefix(CANARY)] = (first - last) / errors
    return found


@symptom(
    "canary",
    "the answers to what is asked beside have become worse by {value:.1f} standard errors: {phrase}",
    threshold=4.0,
    causes=["what is asked there is not paid for, and is being unlearned", "the reward pays for its opposite"],
    remedies=[
        "pay for it beside the reward (`also`)",
        "put its prompts among those of training",
        "raise the price of KL",
    ],
    lasting=1,
)
def canary(rows: Rows) -> float | None:
    """Largest fall of a canary's score since its first asking, in standard errors."""
    return max(canary_falls(rows).values(), default=None)


# Optimisation --------------------------------------------------------------------------------------------------------


@symptom(
    "kl_explodes",
    "the policy is {value:.2f} nats a token from the reference",
    threshold=1.0,
    causes=["nothing is paid for KL", "optim.learning_rate is too high", "the reward's scale dwarfs the price of KL"],
    remedies=[
        "set policy.kl_controller to adaptive with a kl_target",
        "raise policy.kl_coef",
        "lower optim.learning_rate",
    ],
)
def kl_explodes(rows: Rows) -> float | None:
    """KL from the reference, nats a token."""
    return _kl(rows[-1])


@symptom(
    "frozen",
    "after {value:.0f} rollouts the policy is where it began",
    threshold=7.5,
    causes=["policy.kl_coef is too high", "optim.learning_rate is too low", "the reward hardly tells answers apart"],
    remedies=["lower policy.kl_coef or set a kl_target", "raise optim.learning_rate", "look at rollout/score_std"],
    lasting=1,
)
def frozen(rows: Rows) -> float | None:
    """Rollouts that were learned from, where neither KL (a hundredth of a nat a token) nor reward (3 errors) moved."""
    kl, score = _kl(rows[-1]), _score(rows)
    if kl is None or score is None:
        return None
    rise, *errors = score
    return 0.0 if abs(rise) > 3 * math.hypot(*errors) or kl > 0.01 else float(len(rows) - 1)


@symptom(
    "price",
    "the price of KL varies {value:.0f} times as much from answer to answer as what is paid for them",
    threshold=10.0,
    causes=["policy.kl_coef is too high for this reward's scale", "the reward hardly tells answers apart"],
    remedies=["lower policy.kl_coef or set a kl_target", "look at rollout/score_std"],
)
def price(rows: Rows) -> float | None:
    """kl_coef SD(KL) / SD(what is paid), over answers: above 1 the price teaches more than the reward does."""
    coef, kl, paid = (_now(rows, f"rollout/{name}") for name in ("kl_coef", "kl_k1_sem", "paid_score_sem"))
    return None if coef is None or kl is None or not paid else coef * kl / paid


@symptom(
    "collapse",
    "answers have become one: {value:.0%} of the prompts get the same text every time",
    threshold=0.8,
    causes=["no entropy is left: too many steps on one reward, no price of KL", "a few answers pay best everywhere"],
    remedies=["set policy.entropy_coef", "raise the price of KL", "lower optim.learning_rate"],
)
def collapse(rows: Rows) -> float | None:
    """Share of the prompts whose answers are one text."""
    return _now(rows, "rollout/same")


@symptom(
    "entropy",
    "the policy hardly chooses any more: its entropy has halved {value:.2f} times since the start",
    threshold=2.5,
    causes=["too many steps on one reward, no price of KL", "one way of answering pays best everywhere"],
    remedies=["set policy.entropy_coef", "raise the price of KL", "lower optim.learning_rate"],
)
def entropy(rows: Rows) -> float | None:
    """-log2 of the policy's entropy, nats a token, over that at the start."""
    now = _now(rows, "rollout/entropy")
    found = None if now is None else _ratio(max(now, LEAST_ENTROPY), rows[0].get("rollout/entropy"))
    return None if found is None else -found


@symptom(
    "narrow",
    "the rollout holds {value:.2f} halvings fewer different answers than at the start",
    threshold=2.5,
    causes=["one answer pays best for many prompts"],
    remedies=["read the commonest answers", "raise the price of KL", "set policy.entropy_coef"],
)
def narrow(rows: Rows) -> float | None:
    """-log2 of the share of different answers over that at the start."""
    found = _ratio(_now(rows, "rollout/distinct"), rows[0].get("rollout/distinct"))
    return None if found is None else -found


@symptom(
    "reward_falls",
    "the reward has fallen below that of the start by {value:.1f} standard errors",
    threshold=5.0,
    causes=["optim.learning_rate is too high", "the price of KL outweighs the reward", "a sign is turned"],
    remedies=["lower optim.learning_rate", "lower policy.kl_coef", "run with fewer epochs"],
)
def reward_falls(rows: Rows) -> float | None:
    """Fall of the mean score below that of the first rollout, in standard errors."""
    rise, *errors = _score(rows) or (0.0, 0.0)
    return -rise / math.hypot(*errors) if all(errors) else None


@symptom(
    "clipped",
    "{value:.0%} of the tokens are clipped: a step moves the policy further than clip_range allows",
    threshold=0.35,
    causes=["optim.learning_rate is too high", "too many epochs on one rollout"],
    remedies=["lower optim.learning_rate", "lower policy.epochs, or set policy.target_kl"],
)
def clipped(rows: Rows) -> float | None:
    """Mean clip fraction of the steps on the last rollout."""
    return _now(rows, "policy/clip_fraction")


@symptom(
    "extreme",
    "{value:.1%} of the tokens have become more than e times as likely or as unlikely on one rollout",
    threshold=0.03,
    causes=["optim.learning_rate is too high", "too many epochs on one rollout", "nothing is paid for KL"],
    remedies=["lower optim.learning_rate", "lower policy.epochs, or set policy.target_kl", "raise policy.kl_coef"],
)
def extreme(rows: Rows) -> float | None:
    """Mean share of tokens, over the steps on the last rollout, whose ratio is above e or below 1/e."""
    return _now(rows, "policy/extreme_fraction")


@symptom(
    "critic",
    "the critic explains {value:.2f} less than nothing of the returns",
    threshold=0.2,
    causes=["policy.value_learning_rate is too low or too high", "rewards are not on one scale"],
    remedies=["start the value function from the reward model", "set policy.critic_warmup", "normalize_reward: true"],
    lasting=5,
)
def critic(rows: Rows) -> float | None:
    """-(explained variance), the mean of five rollouts after the first five."""
    told = [row["rollout/value_explained"] for row in rows[5:] if "rollout/value_explained" in row]
    return -fmean(told[-5:]) if len(told) >= 5 else None


# What the user says must hold ----------------------------------------------------------------------------------------


@symptom(
    "failing",
    "{value:.0%} of the answers fail guard.passing",
    threshold=1.0,
    causes=["the policy has left what its answers should be"],
    remedies=["raise the price of KL", "lower optim.learning_rate"],
    lasting=1,
)
def failing(rows: Rows) -> float | None:
    """Share of the answers that fail; the threshold is 1 - guard.least_passing."""
    passing = _now(rows, "rollout/passing")
    return None if passing is None else 1 - passing
