"""What stages are configured with: frozen pydantic models that refuse unknown keys and name what is unusual."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

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
            elif isinstance(value, dict):
                lines += [one for key, part in value.items() for one in _unusual(part, f"{where}.{key}")]
            elif isinstance(value, tuple):
                lines += [one for at, part in enumerate(value) for one in _unusual(part, f"{where}[{at}]")]
            elif name in self.usual and isinstance(value, int | float) and value:
                low, high = self.usual[name]
                if not low <= value <= high:
                    lines.append(f"{where} is {value:g}; {low:g} to {high:g} is usual")
        return lines


def _unusual(value: Any, where: str) -> list[str]:
    return value.unusual(where) if isinstance(value, Model) else []


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


class Source(DataRef):
    """What to imitate: conversations, or plain text."""

    kind: Literal["demonstration", "document"] = "demonstration"
    """`document`: plain text, without roles or template, cut into pieces of `max_tokens`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of each step's groups drawn from here, relative to the other sources' weights."""
    score: Literal["responses", "all"] = "responses"
    """Scored tokens: those of the assistant's turns, or all. A document is scored whole."""


Ref = TypeVar("Ref", bound=DataRef)


def _as_ref(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _given(value: Ref) -> Ref:
    if not value.path:
        raise ValueError("path is empty; name a file, an earlier stage, a function or a hub data set")
    return value


Required = Annotated[DataRef, BeforeValidator(_as_ref), AfterValidator(_given)]
RequiredSource = Annotated[Source, BeforeValidator(_as_ref), AfterValidator(_given)]
Possible = Annotated[DataRef, BeforeValidator(_as_ref)]


class Optim(Model):
    """AdamW, its schedule, and how a step is made of micro-batches. None of the latter changes what is learned."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {
        "learning_rate": (1e-7, 5e-3),
        "weight_decay": (0, 0.2),
        "max_grad_norm": (0.1, 10),
        "spike": (3, 20),
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
    spike: Annotated[float, Field(ge=0)] = 5.0
    """Write the rows behind a step whose gradient is this many times longer than the median of the 32 steps before it
    into spikes.jsonl, for `kilter report why`; it costs a backward for each prompt of such a step; 0: never."""
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
    """Format of the forward pass, on copies of the weights; weights, gradients and losses stay float32. `bfloat16` is
    float32 on a processor that has no instructions for it."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models of the stage are trained."""
    base: Literal["float32", "bfloat16", "nf4"] = "float32"
    """How the frozen weights below an adapter are held: `bfloat16`, or `nf4` in 4 bits (Dettmers et al. 2023) on a GPU;
    both with `compute: bfloat16`. The result is those weights, made whole, with the adapter merged, in bfloat16."""
    attention: Literal["auto", "flex", "dense"] = "auto"
    """How packed rows are attended to. `auto`: run by run on a CPU, by FlexAttention on a GPU, by a dense mask in short
    rows and where neither can; `flex`: in all rows (GPU); `dense`: the reference, a mask of every pair of positions."""

    @model_validator(mode="after")
    def _on_a_gpu(self) -> Self:
        if self.base != "float32" and self.compute != "bfloat16":
            raise ValueError(f"base is {self.base} and compute {self.compute}; on such a base set compute to bfloat16")
        for name, value in (("base", "nf4"), ("attention", "flex")):
            if getattr(self, name) == value and self.device != "cuda":
                raise ValueError(f"{name} is {value} and device {self.device}; {value} needs a GPU: set device to cuda")
        return self


AUDIT_PROMPTS, LEAST_PROMPTS = 300, 20
"""Prompts of which an audit scores edited copies, unless told otherwise; and below which it says nothing."""


def _enough(prompts: int) -> int:
    if 0 < prompts < LEAST_PROMPTS:
        raise ValueError(f"an audit needs {LEAST_PROMPTS} prompts or more, and 0 leaves it out; it is {prompts}")
    return prompts


class AuditConfig(Model):
    """The audit of a reward model by the stage that trains it, on what it holds out."""

    prompts: Annotated[int, Field(ge=0), AfterValidator(_enough)] = AUDIT_PROMPTS
    """Prompts of which edited copies are scored, at most: about 30 texts each; 0: no audit."""
    words: str = ""
    """The words that are put into copies, where English ones say little: a JSON file, or `package.module:name`."""


class DecodingConfig(Model):
    """How a response is drawn."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep the smallest set of tokens of at least this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Keep tokens at least this share as likely as the likeliest; 0: all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Makes tokens that prompt or response hold already less likely; 1: no."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    """Length limit, tokens."""


class SamplingConfig(DecodingConfig):
    """How responses are drawn, many at once."""

    batch_size: Annotated[int, Field(gt=0)] = 256
    """Responses drawn at once. Fixed by the recipe, so that a resumed run draws the same bits."""


class SamplerConfig(Model):
    """Who draws the answers that a policy learns from."""

    engine: Literal["native", "vllm"] = "native"
    """Kilter's own sampler, or vLLM (`pip install vllm`), which is given the policy's weights before each rollout."""
    url: Annotated[str, Field(pattern=r"^(https?://.+)?$")] = ""
    """Of a vLLM server that sees this machine's files, `http://127.0.0.1:8000`; empty: vLLM in this process."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What vLLM computes in, in this process."""
    memory: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the GPU's memory that vLLM takes in this process, for weights, keys and values."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """Each token's part of the policy loss is multiplied by how much likelier the trainer finds it than vLLM did, by at
    most this (truncated importance sampling, Yao et al. 2025)."""
    max_gap: Annotated[float, Field(gt=0)] = 0.05
    """A rollout on which the two differ by more than this, nats a token in the mean, is refused."""

    def changed(self, *names: str) -> list[str]:
        """Those of these options that are not as they are by default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="after")
    def _of_use(self) -> Self:
        if self.engine == "native" and (given := self.changed("url", "dtype", "memory", "cap", "max_gap")):
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])}, but Kilter's own sampler has no use for it; leave it out, "
                "or set engine to vllm"
            )
        if self.url and (given := self.changed("dtype", "memory")):
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])}, but a server computes as it was started; leave it out, or "
                "leave out url"
            )
        return self


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


class RewardLossConfig(LossConfig):
    """A loss of reward models by name, with its options beside: `{name: davidson, nu: 0.3}`."""

    name: str = "bradley_terry"
    """Name of a loss over rewards; `kilter losses` lists them."""

    @model_validator(mode="after")
    def _stands_alone(self) -> Self:
        if self.weight != 1:
            raise ValueError(f"weight is {self.weight:g}, and a reward model has one loss; leave it out")
        return self


class Combine(Model):
    """How the numbers of several heads make one reward."""

    how: Literal["mean", "min", "mean_minus_variance", "vote"] = "mean"
    """`mean` and `min` (the worst case) over heads; `mean_minus_variance`: mean - variance_coef x variance; `vote`: the
    mean over heads of the chance that the answer is preferred to a usual one, sigmoid(reward - the head's mean)."""
    variance_coef: Annotated[float, Field(ge=0)] = 1.0
    """Of `mean_minus_variance`: reward paid away per unit of variance between heads."""
    weights: dict[str, float] = Field(default_factory=dict)
    """By group, what its head counts in `mean` and `vote`; a group left out counts 1."""

    @model_validator(mode="after")
    def _weights_weigh(self) -> Self:
        if bad := [name for name, weight in self.weights.items() if not 0 <= weight < math.inf]:
            raise ValueError(f"weights.{bad[0]} is {self.weights[bad[0]]:g}; a weight is a number, 0 or more")
        if self.weights and self.how not in ("mean", "vote"):
            raise ValueError(f"weights are for how mean and vote, and how is {self.how}; leave them out")
        return self


class AlsoReward(Model):
    """A scorer that pays beside `reward`: by a `weight`, or as a constraint, a bound that its mean shall keep."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {"rate": (0.005, 0.5), "damping": (0.1, 5)}

    reward: str
    """What scores, of the kinds that `reward` takes."""
    combine: Combine | None = None
    """How several heads of the reward model make one number; none: as the reward model says."""
    name: str = ""
    """What figures call it. Default: the stage's name, the function's, the file's or folder's."""
    weight: float | None = None
    """Its score times this is paid too; below 0 it is a penalty."""
    at_least: float | None = None
    """A constraint: the mean score is to stay at this or above, in the scorer's own unit."""
    at_most: float | None = None
    """A constraint: the mean score is to stay at this or below, in the scorer's own unit."""
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    """Of a constraint: what breaking it costs at the start; from then on it follows how far the bound is broken. From 0
    a policy may learn to break it faster than the price rises, and forget what keeps it."""
    rate: Annotated[float, Field(gt=0)] = 0.1
    """Of a constraint: what the multiplier gains in a rollout for each standard deviation beyond the bound."""
    damping: Annotated[float, Field(ge=0)] = 1.0
    """Of a constraint: what the multiplier is more, at once, for each standard deviation beyond the bound; without it
    cost and multiplier swing round the bound (Stooke et al. 2020)."""

    @property
    def label(self) -> str:
        """What figures call it."""
        return self.name or re.split(r"[/:]", self.reward.rstrip("/"))[-1].rsplit(".", 1)[0]

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        ways = [name for name in ("weight", "at_least", "at_most") if getattr(self, name) is not None]
        if len(ways) != 1:
            said = " and ".join(ways) or "none of them"
            raise ValueError(f"a further reward has one of weight, at_least and at_most, and here is {said}")
        if self.weight == 0:
            raise ValueError("weight is 0, and a reward that counts for nothing is left out")
        own = type(self).model_fields
        steering = [name for name in ("multiplier", "rate", "damping") if getattr(self, name) != own[name].default]
        if self.weight is not None and steering:
            raise ValueError(f"{steering[0]} is for a constraint, and weight {self.weight:g} makes it none; drop one")
        if not self.label or "/" in self.label:
            raise ValueError(f"name is {self.label!r}; figures need a name without `/`")
        return self


class Heads(Model):
    """The heads of a reward model."""

    kind: Literal["one", "ensemble", "groups", "length"] = "one"
    """`ensemble`: several that learn from all comparisons; `groups`: one for each `group` that the records name (of
    annotators, or a criterion); `length`: a second one takes up what is length, and is thrown away (ODIN)."""
    members: Annotated[int, Field(ge=2)] = 4
    """Of an ensemble."""
    own_adapters: bool = False
    """An adapter of its own for each head, on the frozen model (`lora.rank`); otherwise all heads read one model."""
    bootstrap: bool = True
    """Each member of an ensemble weighs the prompts by weights of its own (Rubin 1981: exponential, of mean 1)."""
    length_coef: Annotated[float, Field(gt=0)] = 1.0
    """Of `length`: how strongly the reward is pushed away from length, and the other head towards it."""
    combine: Combine = Combine()
    """What the reward model answers with; its users may say otherwise."""


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


class Probe(Model):
    """What is measured when preference optimisation ends: the policy beside the model it started from."""

    prompts: Annotated[int, Field(ge=0)] = 64
    """Prompts that both answer, held-out ones where there are any: KL, length, entropy; 0: nothing is measured."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    """Length limit of these answers, tokens."""
    text: Possible = NOTHING
    """Plain text (`kind: document` rows) whose loss should not rise. Default: the words of those prompts."""


GuardAction = Literal["off", "warn", "raise_kl", "roll_back", "stop"]


class Canary(Model):
    """Prompts that are asked of the policy now and then while it learns something else, and pay nothing."""

    name: str = "canary"
    """What its figure is called: `rollout/canary/NAME`."""
    prompts: Required
    """What is asked: harmful requests and their harmless look-alikes, false beliefs to agree with, ..."""
    reward: str
    """What scores the answers, anything that a stage's `reward` may be: the higher, the better."""
    every: Annotated[int, Field(gt=0)] = 5
    """Rollouts between askings; the first is before anything was learned."""


class GuardConfig(Model):
    """The watch on a run, and what is done about what it sees (docs/guard.md)."""

    action: GuardAction = "warn"
    """About any symptom: nothing; say it; multiply the price of KL; go back to the best policy and on from there; stop
    with the best policy. A reward that says nothing, or contradicts the probe, is refused, unless this is `off`."""
    actions: dict[str, GuardAction] = Field(default_factory=dict)
    """By symptom, in place of `action`: `{longer: stop, phrase: "off"}`."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """By symptom, in place of those of docs/guard.md."""
    probe: str = ""
    """What judges the answers and pays nothing, anything that `reward` may be: a gold reward, a judge, truth."""
    canaries: tuple[Canary, ...] = ()
    """What is to be asked beside, and must not get worse: of a fall the symptom is `canary`."""
    passing: Possible = NOTHING
    """`package.module:function` of (prompt, text) that says whether an answer is still what answers should be."""
    least_passing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a rollout's answers that must pass `passing`; of fewer the symptom is `failing`."""
    patience: Annotated[int, Field(gt=0)] = 3
    """Stop after so many times back without a better policy."""
    kl_factor: Annotated[float, Field(gt=1)] = 1.5
    """What `raise_kl` multiplies the price by, once a rollout for as long as the symptom lasts."""


class PtxConfig(Model):
    """Text whose likelihood is kept up beside reinforcement learning, against what it forgets (PPO-ptx)."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {"coef": (0.01, 30)}

    data: tuple[RequiredSource, ...] = ()
    """Plain text or demonstrations, drawn by weight: `[{path: text.jsonl, kind: document}]`; none given: no mix."""
    coef: Annotated[float, Field(gt=0)] = 1.0
    """Weight of its mean negative log-likelihood, nats a token, in the loss of each step."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Conversations, or pieces of documents, in each step."""


class PolicyConfig(Model):
    """The numbers of reinforcement learning. None given: as the algorithm has it (`kilter.rollout.algorithms`)."""

    usual: ClassVar[Mapping[str, tuple[float, float]]] = {
        "kl_coef": (0.005, 0.5),
        "entropy_coef": (1e-4, 0.05),
        "target_kl": (0.003, 0.1),
        "clip_range": (0.05, 0.4),
        "vf_coef": (0.05, 2.0),
        "gamma": (0.95, 1.0),
        "gae_lambda": (0.8, 1.0),
    }

    kl_coef: float = 0.05
    """Price of a nat of log-ratio to the reference, in units of the score; 0 takes the brake off. Below 0 it is a
    bonus, which is refused unless the stage's `signs` is `ignore`."""
    kl_in: Literal["reward", "loss"] | None = None
    """Where it is paid: away from each token's reward, or as a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    """What estimates the KL in the loss (Schulman 2020); k1 there holds nothing. `exact` sums over the vocabulary at
    each position, for a forward of the reference in every step."""
    kl_controller: Literal["fixed", "adaptive", "budget"] | None = None
    """`adaptive` steers `kl_coef` to keep the KL near `kl_target` (Ziegler et al. 2019); of a price in the reward it is
    the default. `budget` raises it as the KL is ahead of the share of the rollouts, to end within `kl_target`,
    and never lowers it below what it is given as."""
    kl_target: Annotated[float, Field(gt=0)] = 6.0
    """KL from the reference to steer to, nats a response."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's entropy, nats a token, against the loss: it keeps the policy broad; 0: none."""
    loss: Literal["ppo_clip", "gspo", "response_clip", "cispo", "reinforce"] | None = None
    """How a token's worth moves the policy (`kilter.losses.policy`)."""
    aggregate: Literal["token", "sequence", "constant"] | None = None
    """Who counts alike: every token, every response, or every response whatever its length."""
    clip_range: Annotated[float, Field(gt=0)] | None = None
    """Clip the probability ratio to 1 +- this."""
    clip_range_high: Annotated[float, Field(gt=0)] | None = None
    """Clip it to 1 + this above; none given: as below."""
    clip_range_value: Annotated[float, Field(ge=0)] = 0.2
    """Clip the value's move to this; 0: no clip."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the value loss."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a token."""
    gae_lambda: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Bias against variance of the advantages (Schulman et al. 2016)."""
    whiten_advantages: bool | None = None
    """Scale the advantages of a rollout to mean 0 and variance 1; with a critic the default."""
    normalize_reward: bool = True
    """Divide scores by their running standard deviation and take their running mean away."""
    reward_clip: Annotated[float, Field(ge=0)] = 5.0
    """Clip normalised scores to +- this; 0: no clip."""
    truncation_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the score of a response that met the length limit."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Once a step finds the policy 1.5 times this far from the one that sampled, nats a token, the rest of the
    rollout's steps is left out; none given: no limit."""
    epochs: Annotated[int, Field(gt=0)] = 2
    """Passes over one rollout."""
    minibatches: Annotated[int, Field(gt=0)] = 2
    """Optimizer steps in one pass."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the value function; none given: the policy's."""
    value_from: Literal["reward", "policy", "shared"] = "reward"
    """What the value function starts as: the reward model, where that is one; or the policy with a head of zeros, as
    weights (an adapter) of its own; or `shared`: that head alone, on the policy's own states, which both then train:
    one pass in place of two, and the least memory."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First rollouts in which the value function alone learns; the policy stays what it is, to the bit."""

    @model_validator(mode="after")
    def _own_weights(self) -> Self:
        if self.critic_warmup and self.value_from == "shared":
            raise ValueError(
                f"critic_warmup is {self.critic_warmup} and value_from shared: the value would move the policy's "
                "weights; set critic_warmup to 0, or value_from to reward or policy"
            )
        return self
