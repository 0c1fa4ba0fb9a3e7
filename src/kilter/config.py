"""Recipes: frozen pydantic models, one YAML file a run. Unknown keys are errors that name the nearest known one.

A recipe is a mapping of named stages. A stage names its inputs: an earlier stage, a file or folder, a hub name, or
`package.module:function`. So the whole loop, a part of it, or one stage alone are the same thing.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from kilter.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
"""Name of a stage or of an evaluated model: it becomes a file's name and an option's."""


class Model(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused, documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Field -> the range people use; a value outside is allowed and warned of."""

    def unusual(self, place: str = "") -> list[str]:
        """One line for each value outside its usual range, in this part and all below it."""
        lines = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            where = f"{place}.{name}" if place else name
            if isinstance(value, Model):
                lines += value.unusual(where)
            elif name in self.usual and isinstance(value, int | float) and value:
                low, high = self.usual[name]
                if not low <= value <= high:
                    lines.append(f"{where} is {value:g}; {low:g} to {high:g} is usual")
        return lines


class DataRef(Model):
    """Where records come from."""

    path: str = ""
    """A file, an earlier stage, `package.module:function`, or a hub name; empty: none."""
    format: str = "auto"
    """Layout of the file's rows; `auto` recognises it by content. `kilter data formats` lists them."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments when `path` is a function."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Use the first records only; 0: all."""
    skip_bad: bool = False
    """Set bad rows aside in a file of the run and count them, instead of refusing the file."""


NOTHING = DataRef()


class Optim(Model):
    """AdamW, its schedule, and how a step is made of micro-batches. None of the latter changes what is learned."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {
        "learning_rate": (1e-7, 5e-3),
        "weight_decay": (0, 0.2),
        "max_grad_norm": (0.1, 10),
    }

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate. 1e-6 to 1e-5 is usual for billions of parameters, 1e-4 to 3e-3 for a few million."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, per unit of learning rate; norms and biases are spared."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the squared gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay after the warm-up, down to zero at the last step."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip the gradient's norm at this value."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Prompts in one optimizer step."""
    row_tokens: Annotated[int, Field(gt=0)] = 512
    """Token budget of a packed row."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """Token budget of a micro-batch: what must fit in memory at once."""
    max_tokens: Annotated[int, Field(gt=1)] = 1024
    """Longest prompt with one response, tokens; longer rows follow `over_long`."""
    over_long: Literal["drop", "cut_prompt", "error"] = "drop"
    """What to do with an over-long row. A response's end is never cut."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 50
    """Steps between checkpoints: what a kill can cost."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on the held-out rows; 0: only at the end."""
    early_stop: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without improvement; 0: never."""


class Lora(Model):
    """Low-rank adapters (Hu et al. 2021). Rank 0 trains every weight."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the update; 8 to 64 is usual; 0: full training."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    targets: Literal["all-linear", "attention"] = "all-linear"
    """Which matrices get an adapter."""


class Precision(Model):
    """Number formats."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Format of the forward pass; weights, gradients and losses stay float32."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


class SamplingConfig(Model):
    """How responses are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens of at least this probability."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    """Length limit, tokens."""
    batch_size: Annotated[int, Field(gt=0)] = 256
    """Responses drawn at once. Fixed by the recipe, so that a resumed run draws the same bits."""


class LossConfig(Model):
    """A preference loss by name, with its options beside: `{name: simpo, beta: 2, gamma: 1}`.

    Names, options and their ranges are those of the losses themselves (`kilter losses`); a stage checks them before
    any work starts.
    """

    name: str = "dpo"
    """Name of a preference loss; `kilter losses` lists them."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its weight in a mixture."""
    options: dict[str, float | str] = Field(default_factory=dict)
    """Options of the loss, on the command line `--loss.OPTION VALUE`; `kilter losses NAME` lists them."""

    @model_validator(mode="before")
    @classmethod
    def _takes_options_beside(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        own = {key: value for key, value in raw.items() if key in cls.model_fields}
        beside = {key: value for key, value in raw.items() if key not in cls.model_fields and value is not None}
        options = own.get("options") or {}
        if not isinstance(options, Mapping):
            return raw
        return own | {"options": {key: _number(value) for key, value in {**options, **beside}.items()}}


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


NO_REFERENCE = "none"
"""What a `prefer` stage names as its reference when it wants none."""


class Stage(Model):
    """Base of all stages."""

    seed_offset: int = 0
    """Added to the recipe's seed for this stage."""


def _as_ref(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _given(value: DataRef) -> DataRef:
    if not value.path:
        raise ValueError("path is empty; name a file, an earlier stage, a function or a hub data set")
    return value


Required = Annotated[DataRef, BeforeValidator(_as_ref), AfterValidator(_given)]
Possible = Annotated[DataRef, BeforeValidator(_as_ref)]


class SftStage(Stage):
    """Supervised fine-tuning on demonstrations."""

    stage: Literal["sft"] = "sft"
    model: str
    """Model to start from: a folder, a hub name, or an earlier stage."""
    data: Required
    """Demonstrations."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of prompts kept for evaluation."""
    optim: Optim = Optim()
    lora: Lora = Lora()
    precision: Precision = Precision()


class CollectStage(Stage):
    """Sample k responses to each prompt and have an annotator rank them."""

    stage: Literal["collect"] = "collect"
    model: str
    """Model that answers."""
    prompts: Required
    """Prompts to answer."""
    annotator: Required
    """`package.module:function` that makes an annotator, with its options."""
    num_samples: Annotated[int, Field(gt=1)] = 4
    """Responses a prompt, ranked together."""
    sampling: SamplingConfig = SamplingConfig()
    truth: Possible = NOTHING
    """Scorer of the true reward, used only to state how often the labels order pairs as truth does."""


class RewardStage(Stage):
    """Train a reward model on pairs or rankings: Bradley-Terry over all pairs of a prompt, in one pass."""

    stage: Literal["reward"] = "reward"
    model: str
    """Model to start from; its head is new."""
    data: Required
    """Preference pairs, rankings, or an earlier `collect` stage."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts kept for evaluation."""
    centering: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared mean reward, which fixes the level that Bradley-Terry leaves free."""
    truth: Possible = NOTHING
    """Scorer of the true reward: states how often the reward model orders held-out pairs as truth does."""
    optim: Optim = Optim()
    lora: Lora = Lora()
    precision: Precision = Precision()


class PreferStage(Stage):
    """Preference optimisation: DPO and its family."""

    stage: Literal["prefer"] = "prefer"
    model: str
    """Policy to start from."""
    data: Required
    """Preference pairs, rankings, or an earlier `collect` stage; for a loss over thumbs, feedback."""
    loss: LossConfig = LossConfig()
    mix: tuple[LossConfig, ...] = ()
    """More losses over the same data, added with their weights: `[{name: nll, weight: 0.2}]`."""
    reference: str = ""
    """Frozen model to measure from: a folder, a hub name or an earlier stage; empty: the policy as it starts;
    `none`: its log-probs count as 0."""
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep so many policies along the way, evenly spaced, for the picture of reward against KL."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of prompts kept for evaluation."""
    optim: Optim = Optim()
    lora: Lora = Lora()
    precision: Precision = Precision()


class PpoConfig(Model):
    """PPO's numbers (Schulman et al. 2017; Ziegler et al. 2019; Stiennon et al. 2020)."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {
        "kl_coef": (0.005, 0.5),
        "clip_range": (0.05, 0.4),
        "vf_coef": (0.05, 2.0),
        "gamma": (0.95, 1.0),
        "gae_lambda": (0.8, 1.0),
    }

    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Reward paid away per nat of log-ratio to the reference; 0 takes the brake off."""
    kl_controller: Literal["fixed", "adaptive"] = "adaptive"
    """`adaptive` steers `kl_coef` to keep the KL near `kl_target` (Ziegler et al. 2019)."""
    kl_target: Annotated[float, Field(gt=0)] = 6.0
    """KL from the reference to steer to, nats a response."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    """Clip the probability ratio to 1 +- this."""
    clip_range_value: Annotated[float, Field(ge=0)] = 0.2
    """Clip the value's move to this; 0: no clip."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the value loss."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a token."""
    gae_lambda: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Bias against variance of the advantages (Schulman et al. 2016)."""
    whiten_advantages: bool = True
    """Scale the advantages of a rollout to mean 0 and variance 1."""
    normalize_reward: bool = True
    """Divide scores by their running standard deviation and take their running mean away."""
    reward_clip: Annotated[float, Field(ge=0)] = 5.0
    """Clip normalised scores to +- this; 0: no clip."""
    truncation_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the score of a response that met the length limit."""
    epochs: Annotated[int, Field(gt=0)] = 2
    """Passes over one rollout."""
    minibatches: Annotated[int, Field(gt=0)] = 2
    """Optimizer steps in one pass."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the value function; none given: the policy's."""
    value_from_reward: bool = True
    """Start the value function from the reward model; otherwise from the policy."""


class RlStage(Stage):
    """Reinforcement learning from a reward."""

    stage: Literal["rl"] = "rl"
    algorithm: Literal["ppo"] = "ppo"
    """Which algorithm."""
    model: str
    """Policy to start from; it is also the reference."""
    reward: str
    """Reward model: an earlier stage, a folder, or `package.module:function` of a scorer."""
    prompts: Required
    """Prompts to answer."""
    pairs: Possible = NOTHING
    """Held-out pairs on which the reward must prefer the better answer, or training is refused. Default: those that
    the reward stage kept aside."""
    rollouts: Annotated[int, Field(gt=0)] = 50
    """How many times the policy is sampled."""
    prompts_per_rollout: Annotated[int, Field(gt=0)] = 64
    """Prompts sampled each time."""
    num_samples: Annotated[int, Field(gt=0)] = 1
    """Responses to each of them."""
    sampling: SamplingConfig = SamplingConfig()
    ppo: PpoConfig = PpoConfig()
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep so many policies along the way, evenly spaced, for the picture of reward against KL."""
    stop_below: Annotated[float, Field(ge=0, le=1)] = 0.0
    """When fewer than this share of a rollout's answers pass `stop_measure`, the last good policy takes its place."""
    stop_after: Annotated[int, Field(gt=0)] = 1
    """Stop after so many such rollouts in a row; before, training goes on from the last good policy."""
    stop_measure: Possible = NOTHING
    """`package.module:function` that says whether an answer is still a sentence."""
    optim: Optim = Optim(learning_rate=1e-6)
    lora: Lora = Lora()
    precision: Precision = Precision()


class BestOfNStage(Stage):
    """Draw n responses and keep the one that the reward model likes best: the yardstick that trains nothing."""

    stage: Literal["best_of_n"] = "best_of_n"
    model: str
    """Model that answers."""
    reward: str
    """Reward model that chooses."""
    num_samples: Annotated[int, Field(gt=1)] = 16
    """n."""


class Claim(Model):
    """Something a run should show, held against its figures: it holds when the whole 95% interval lies on its side."""

    text: str
    """The claim in words, for the report."""
    left: str
    """`model.metric`, for example `ppo.true_reward`."""
    right: str = ""
    """`model.metric` to compare with: the difference is taken prompt by prompt; empty: `left` stands alone."""
    above: float | None = None
    """The interval's lower end must be above this."""
    below: float | None = None
    """The interval's upper end must be below this, or equal to it."""
    paired: bool = True
    """False: the interval is that of `left` alone, less the mean of `right`."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.above is None and self.below is None:
            raise ValueError(f"the claim {self.text!r} has no bound; give `above`, `below` or both")
        return self


class EvalStage(Stage):
    """Sample every model on held-out prompts and measure it against truth, proxy and reference."""

    stage: Literal["eval"] = "eval"
    models: dict[Name, str]
    """Name in the report -> model folder or stage."""
    reference: str
    """The model from which KL and win rate are measured: usually the SFT stage."""
    reward: str | None = None
    """Reward model for the proxy reward."""
    prompts: Required
    """Held-out prompts, with their kinds."""
    truth: Possible = NOTHING
    """Scorer of the true reward, where there is one."""
    measure: Possible = NOTHING
    """`package.module:function` of (prompt, text) that gives the flags: attack success, over-refusal, ..."""
    demonstrations: Possible = NOTHING
    """The demonstrators' answers to prompts of the same kinds, measured beside the models."""
    oracle: Possible = NOTHING
    """`package.module:function` of a prompt that gives the best answer known."""
    sampling: SamplingConfig = SamplingConfig()
    curve_prompts: Annotated[int, Field(ge=0)] = 220
    """Prompts on which snapshots along a method's path are measured."""
    slider_prompts: Annotated[int, Field(ge=0)] = 3
    """Prompts whose answers the report's slider shows."""
    claims: tuple[Claim, ...] = ()
    """What the run should show."""

    @model_validator(mode="after")
    def _names_are_free_and_known(self) -> Self:
        taken = ("answers", "curve", "demonstrations")
        if clash := [name for name in taken if name in self.models]:
            raise ValueError(
                f"models.{clash[0]} has the name of a file of every evaluation; give the model another name"
            )
        for claim in self.claims:
            for address in filter(None, (claim.left, claim.right)):
                model, _, metric = address.partition(".")
                if not metric or model not in (*self.models, "demonstrations"):
                    raise ValueError(
                        f"the claim {claim.text!r} reads {address!r}; it must be model.metric, for example "
                        f"{next(iter(self.models), 'sft')}.true_reward"
                    )
        return self


AnyStage = Annotated[
    SftStage | CollectStage | RewardStage | PreferStage | RlStage | BestOfNStage | EvalStage,
    Field(discriminator="stage"),
]


class Recipe(Model):
    """A run: its name, its seed, and its stages in order."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random number of the run follows from it."""
    world: str | None = None
    """Said on every figure when the run does not concern the real world, for example `embedded world`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a process; 0: its share of the cores. In the recipe because sums depend on it in the last bit."""
    jobs: Annotated[int, Field(ge=1)] = 1
    """Processes. Stages that do not wait for each other run side by side, and so do the models of an evaluation."""
    stages: Annotated[dict[Name, AnyStage], Field(min_length=1)]
    """The stages, in order; an input that names a stage must come after it."""

    @model_validator(mode="after")
    def _inputs_come_before(self) -> Self:
        before: set[str] = set()
        names = set(self.stages)
        for name, stage in self.stages.items():
            for place, value in stage_inputs(stage):
                if value in names and value not in before:
                    raise ValueError(f"stages.{name}.{place} is {value!r}, which is not an earlier stage; move it up")
            before.add(name)
        return self


def stage_inputs(stage: Stage) -> list[tuple[str, str]]:
    """(field, value) of everything that a stage reads: models, reward models and data."""
    found: list[tuple[str, str]] = []
    for name in type(stage).model_fields:
        value = getattr(stage, name)
        if name in ("model", "reward", "reference") and isinstance(value, str) and value not in ("", NO_REFERENCE):
            found.append((name, value))
        elif isinstance(value, DataRef) and value.path:
            found.append((name, value.path))
        elif name == "models":
            found += [(f"models.{key}", item) for key, item in value.items()]
    return found


def parse(raw: Any, place: str) -> Recipe:
    """A recipe from plain YAML values. Raises ConfigError in one line: place, key, rule, remedy."""
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{place}: a recipe is a mapping with `stages:`, not {type(raw).__name__}; see recipes/ for examples"
        )
    try:
        return Recipe.model_validate(raw)
    except ValidationError as err:
        raise ConfigError(f"{place}: {explain(err, raw)}") from err


def load(path: Path) -> Recipe:
    """Read a recipe from a YAML file."""
    return parse(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file; give the path of a recipe (YAML)") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot be read ({err}); a recipe is a UTF-8 YAML file") from err
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as err:  # ValueError: a date that is none, a number too long
        mark = getattr(err, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(err, "problem", None) or f"not YAML ({type(err).__name__}: {str(err).splitlines()[0]})"
        raise ConfigError(f"{path}{line}: {problem}; mend the YAML (indentation, colons, quotes)") from err


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, complete, enough to run it again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def explain(err: ValidationError, raw: Any) -> str:
    """The first problem of a validation error in one line, with the nearest known key for an unknown one."""
    first = err.errors(include_url=False)[0]
    loc = first["loc"]
    path = [str(part) for at, part in enumerate(loc) if not _is_tag(at, loc)]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], raw)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "union_tag_invalid":
        return f"{where}.stage is {first['ctx']['tag']!r}; choose one of {', '.join(STAGES)}"
    if first["type"] == "union_tag_not_found":
        return f"{where}.stage is missing; choose one of {', '.join(STAGES)}"
    if first["type"] == "missing":
        return f"{where} is missing; it is required"
    if path[-1:] == ["[key]"]:
        rule = "a name is at most 64 letters, digits, `_` and `-`, and begins with a letter"
        return f"{'.'.join(path[:-2])} has the name {first['input']!r}; {rule}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) if not where else f"{where}: {first['ctx']['error']}"
    more = f" (and {err.error_count() - 1} more)" if err.error_count() > 1 else ""
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where} is {first['input']!r}; {message}{more}"


def _is_tag(at: int, loc: tuple[Any, ...]) -> bool:
    """Pydantic puts the discriminator's value into the location after a stage's name; people never wrote it there."""
    return at == 2 and loc[0] == "stages" and loc[at] in STAGES


def _fields_at(path: list[str], raw: Any) -> list[str]:
    model: type[Model] = Recipe
    value = raw
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
        if part == "stages" and model is Recipe:
            continue
        if model is Recipe and isinstance(value, Mapping):
            model = STAGES.get(value.get("stage", ""), Stage)
            continue
        field = model.model_fields.get(part)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Model):
            model = field.annotation
        elif part in ("data", "prompts", "annotator", "truth", "measure", "demonstrations", "oracle", "stop_measure"):
            model = DataRef
    return list(model.model_fields)


STAGES: dict[str, type[Stage]] = {
    "sft": SftStage,
    "collect": CollectStage,
    "reward": RewardStage,
    "prefer": PreferStage,
    "rl": RlStage,
    "best_of_n": BestOfNStage,
    "eval": EvalStage,
}
