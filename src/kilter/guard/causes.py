"""Which number of a recipe is the likely cause: one function of a stage's figures for each number and direction.

A cause is told by how far its figure is beyond what is usual, as a ratio; the one that is furthest is named first. The
limits were set by looking at runs of the embedded world with one number that was wrong (`tools/failure_map.py`);
docs/guard.md has what they find on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

from kilter.guard.symptoms import Rows, paid_spread
from kilter.guard.symptoms import price as price_of_kl

LEAST = 1e-9
"""Of a figure that is to be divided by."""
USUAL_SCALE = (0.1, 10.0)
"""Standard deviation of what answers are paid."""
USUAL_STEP = 0.3
"""KL(old policy, policy), nats a token, that the steps on one rollout may make."""


class Course(NamedTuple):
    """How a stage went."""

    stage: Mapping[str, Any]
    """Its options, as the recipe has them; {}: not known."""
    rows: Rows
    """A row for each rollout (`rows_of`); none where nothing was sampled."""
    steps: Sequence[Mapping[str, Any]]
    """metrics.jsonl."""
    ended: bool = True

    def of_steps(self, name: str) -> list[float]:
        """A figure of the steps that have it."""
        return [float(step[name]) for step in self.steps if isinstance(step.get(name), int | float)]

    def of_rows(self, name: str) -> list[float]:
        """A figure of the rollouts that have it."""
        return [row[name] for row in self.rows if name in row]


Figure = Callable[[Course], float | None]


@dataclass(frozen=True, slots=True)
class Cause:
    """One number that may be wrong, in one direction, told by one figure."""

    name: str
    figure: Figure
    limit: float
    side: Literal["above", "below"]
    says: str
    """In words, with {figure}."""
    remedy: str

    def times(self, figure: float) -> float:
        """How far the figure is beyond the limit; above 1 it is."""
        pair = (figure, self.limit) if self.side == "above" else (self.limit, figure)
        return max(pair[0], 0.0) / max(pair[1], LEAST)


@dataclass(frozen=True, slots=True)
class Named:
    """A cause that a stage's figures tell."""

    cause: str
    figure: float
    limit: float
    times: float
    says: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


CAUSES: list[Cause] = []


def cause(
    name: str, says: str, remedy: str, *, above: float | None = None, below: float | None = None
) -> Callable[[Figure], Figure]:
    """Registers a figure and the limit above or below which it tells of a cause."""

    def register(figure: Figure) -> Figure:
        if above is not None:
            CAUSES.append(Cause(name, figure, above, "above", says, remedy))
        if below is not None:
            CAUSES.append(Cause(name, figure, below, "below", says, remedy))
        return figure

    return register


def causes(course: Course) -> list[Named]:
    """The causes that its figures tell, that which is furthest beyond its limit first."""
    found = []
    for one in CAUSES:
        figure = one.figure(course)
        if figure is None or (times := one.times(figure)) <= 1:
            continue
        found.append(Named(one.name, figure, one.limit, times, one.says.format(figure=figure), one.remedy))
    return sorted(found, key=lambda named: -named.times)


# Of rollouts ---------------------------------------------------------------------------------------------------------


def _paid(course: Course) -> float | None:
    """Standard deviation of what the answers of the first rollout are paid."""
    return paid_spread(course.rows[0]) if course.rows else None


def _step(course: Course) -> float | None:
    """KL, nats a token, that the steps on one rollout made, mean of the first third of the rollouts, where the learning
    rate is highest; None where a rollout has but one step."""
    moved = course.of_rows("policy/approx_kl")
    return fmean(moved[: max(len(moved) // 3, 1)]) if any(moved) else None


def _away(course: Course) -> list[float]:
    """KL from the reference of each rollout, nats a token."""
    told = [row for row in course.rows if row.get("rollout/length") and "rollout/kl_k1" in row]
    return [row["rollout/kl_k1"] / row["rollout/length"] for row in told]


@cause(
    "reward scale low",
    "answers differ by {figure:.2g} in what they are paid, so any price of KL outweighs it",
    "scale the reward up, set policy.normalize_reward, or lower policy.kl_coef as much",
    below=USUAL_SCALE[0],
)
def reward_scale_low(course: Course) -> float | None:
    """Standard deviation of what the first answers are paid, after normalisation; 0 is a reward that says nothing."""
    return _paid(course)


@cause(
    "reward scale high",
    "answers differ by {figure:.3g} in what they are paid, so the price of KL counts for nothing",
    "scale the reward down, set policy.normalize_reward, or raise policy.kl_coef as much",
    above=USUAL_SCALE[1],
)
def reward_scale_high(course: Course) -> float | None:
    """The same figure."""
    return _paid(course)


@cause(
    "KL coefficient high",
    "the price of KL varies {figure:.1f} times as much from answer to answer as a reward of usual scale",
    "lower policy.kl_coef, or set a kl_target",
    above=4.0,
)
def kl_coefficient_high(course: Course) -> float | None:
    """Median over rollouts of the symptom `price`, but for what an unusual scale of the reward has done to it."""
    told = [price_of_kl(course.rows[: at + 1]) for at in range(1, len(course.rows))]
    known = [one for one in told if one is not None]
    paid = _paid(course)
    if not known or not paid:
        return None
    return median(known) * paid / min(max(paid, USUAL_SCALE[0]), USUAL_SCALE[1])


@cause(
    "KL coefficient low",
    "the policy has gone {figure:.2f} nats a token from the reference by steps of usual size: nothing holds it",
    "raise policy.kl_coef, or set policy.kl_controller to adaptive with a kl_target",
    above=0.6,
)
def kl_coefficient_low(course: Course) -> float | None:
    """KL of the last third of the rollouts, where steps were of usual size and the price of KL under a tenth of what
    is learned from."""
    away, step = _away(course), _step(course)
    told = [price_of_kl(course.rows[: at + 1]) for at in range(1, len(course.rows))]
    cheap = all(one is None or one < 0.1 for one in told)
    if not away or not cheap or (step is not None and step > USUAL_STEP):
        return None
    return fmean(away[-max(len(away) // 3, 1) :])


@cause(
    "learning rate high",
    "the steps on one rollout moved the policy by {figure:.2g} nats a token",
    "lower optim.learning_rate, or set policy.target_kl",
    above=USUAL_STEP,
)
def learning_rate_high(course: Course) -> float | None:
    """Mean KL between the policy that sampled and the one that learned, of the first third of the rollouts."""
    return _step(course)


@cause(
    "learning rate low",
    "the policy never was more than {figure:.2g} nats a token from the reference",
    "raise optim.learning_rate",
    below=0.01,
)
def learning_rate_low(course: Course) -> float | None:
    """The largest KL from the reference of five rollouts and more."""
    away = _away(course)
    return max(map(abs, away)) if len(away) >= 5 else None


@cause(
    "clip range low",
    "{figure:.0%} of the tokens were clipped though the steps were of usual size",
    "raise policy.clip_range",
    above=0.15,
)
def clip_range_low(course: Course) -> float | None:
    """Mean clip fraction of the rollout that was clipped most."""
    clipped, step = course.of_rows("policy/clip_fraction"), _step(course)
    return None if not clipped or step is None or step > USUAL_STEP else max(clipped)


@cause(
    "clip range high",
    "no token was clipped though steps moved the policy by {figure:.2g} nats a token",
    "lower policy.clip_range",
    above=0.04,
)
def clip_range_high(course: Course) -> float | None:
    """The same figure, where none of the tokens was clipped."""
    clipped = course.of_rows("policy/clip_fraction")
    return _step(course) if clipped and not any(clipped) else None


@cause(
    "batch low",
    "a rollout holds {figure:.0f} answers: what is learned from them is mostly chance",
    "raise prompts_per_rollout or num_samples",
    below=32,
)
def rollout_low(course: Course) -> float | None:
    """Answers of the first rollout."""
    return course.rows[0].get("rollout/samples") if course.rows else None


@cause(
    "batch high",
    "only {figure:.0f} steps were taken: the answers were spent on few of them",
    "lower prompts_per_rollout, or raise rollouts",
    below=16,
)
def rollout_high(course: Course) -> float | None:
    """Steps of a stage that sampled and ended."""
    taken = len(course.of_steps("policy/approx_kl"))
    return float(taken) if course.rows and taken and course.ended else None


# Of preferences ------------------------------------------------------------------------------------------------------


class _Preferences(NamedTuple):
    """The last third of the steps of a stage that learned from pairs."""

    accuracy: float
    margin: float
    """beta times the gap, or what else the loss makes of it."""
    gap: float
    """Nats by which chosen rose above rejected."""
    moved: float
    """The larger of the two movements, nats an answer."""


def _preferences(course: Course) -> _Preferences | None:
    names = ("rewards/accuracy", "rewards/margin", "displacement/chosen", "displacement/rejected")
    columns = [course.of_steps(name) for name in names]
    if course.rows or not all(columns):
        return None
    accuracy, margin, chosen, rejected = (fmean(column[-max(len(column) // 3, 1) :]) for column in columns)
    return _Preferences(accuracy, margin, chosen - rejected, max(abs(chosen), abs(rejected)))


@cause(
    "reward scale low",
    "the policy orders {figure:.0%} more of the pairs as they are labelled than chance would: the labels say little",
    "look at the agreement of those who compared (`kilter data agreement`), and at heaviest.jsonl",
    below=0.05,
)
def labels_say_little(course: Course) -> float | None:
    """Accuracy above a half."""
    told = _preferences(course)
    return None if told is None else max(told.accuracy - 0.5, 0.005)


@cause(
    "KL coefficient high",
    "pairs have a margin of {figure:.1f} though they have hardly been moved apart: nothing is left to learn from",
    "lower loss.beta",
    above=6.0,
)
def beta_high(course: Course) -> float | None:
    """Margin, where the gap in nats is below 3."""
    told = _preferences(course)
    return None if told is None or told.gap > 3 else told.margin


@cause(
    "KL coefficient low",
    "pairs are {figure:.1f} nats apart and the loss still asks for more",
    "raise loss.beta",
    above=3.0,
)
def beta_low(course: Course) -> float | None:
    """The gap, where the margin that the loss sees is below a tenth."""
    told = _preferences(course)
    return None if told is None or told.margin > 0.1 else told.gap


@cause(
    "learning rate high",
    "answers that were learned from have moved by {figure:.0f} nats",
    "lower optim.learning_rate",
    above=15.0,
)
def steps_large(course: Course) -> float | None:
    """The larger of the two displacements, where the loss sees it."""
    told = _preferences(course)
    return None if told is None or 0 <= told.margin < 0.1 else told.moved


@cause(
    "learning rate low",
    "answers that were learned from have moved by {figure:.2g} nats",
    "raise optim.learning_rate",
    below=0.1,
)
def steps_small(course: Course) -> float | None:
    """The larger of the two displacements, where the loss is not satisfied."""
    told = _preferences(course)
    return None if told is None or told.margin > 6 else told.moved


@cause(
    "clip range low",
    "the gradient's norm is {figure:.0f} times what it is cut to",
    "raise optim.max_grad_norm",
    above=1000.0,
)
def gradient_cut(course: Course) -> float | None:
    """Median norm over `optim.max_grad_norm`. AdamW hardly feels a constant factor, so it takes much to matter."""
    limit, norms = course.stage.get("optim", {}).get("max_grad_norm"), course.of_steps("grad_norm")
    return None if course.rows or not limit or not norms else median(norms) / limit


@cause(
    "batch low",
    "a step learns from {figure:.0f} prompts: what it learns is mostly chance",
    "raise optim.batch_size",
    below=16,
)
def batch_low(course: Course) -> float | None:
    """`optim.batch_size`."""
    size = course.stage.get("optim", {}).get("batch_size")
    return None if _preferences(course) is None or size is None else float(size)


@cause("batch high", "only {figure:.0f} steps were taken", "lower optim.batch_size, or raise epochs", below=10)
def batch_high(course: Course) -> float | None:
    """Steps of a stage that ended."""
    ended = _preferences(course) is not None and course.ended
    return float(len(course.of_steps("rewards/accuracy"))) if ended else None
