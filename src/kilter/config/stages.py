"""The stages of a recipe, each with its inputs, its method and its numbers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kilter.config.fields import (
    NOTHING,
    AlsoReward,
    AuditConfig,
    Combine,
    GuardConfig,
    Heads,
    Lora,
    LossConfig,
    Model,
    Name,
    Optim,
    PolicyConfig,
    Possible,
    Precision,
    Probe,
    PtxConfig,
    Required,
    RequiredSource,
    RewardLossConfig,
    SamplerConfig,
    SamplingConfig,
)

NO_REFERENCE = "none"
"""What a `prefer` stage names as its reference when it wants none."""


class Stage(Model):
    """Base of all stages."""

    seed_offset: int = 0
    """Added to the recipe's seed for this stage."""

    @model_validator(mode="after")
    def _adapters_on_a_low_base(self) -> Self:
        precision, lora = getattr(self, "precision", None), getattr(self, "lora", None)
        if precision is not None and precision.base != "float32" and not (lora and lora.rank):
            raise ValueError(
                f"precision.base is {precision.base} and lora.rank 0; weights are trained in float32, in fewer bits "
                "only adapters on them are: set lora.rank (16 is usual), or precision.base to float32"
            )
        return self


class SftStage(Stage):
    """Supervised fine-tuning on demonstrations."""

    stage: Literal["sft"] = "sft"
    model: str
    """Model to start from: a folder, a hub name, or an earlier stage."""
    data: RequiredSource
    """Demonstrations; `{path: text.jsonl, kind: document}` for plain text."""
    mix: tuple[RequiredSource, ...] = ()
    """More sources, drawn beside `data` by weight: `[{path: text.jsonl, kind: document, weight: 0.3}]`."""
    loss: Literal["nll", "dft"] = "nll"
    """Cross-entropy, or dynamic fine-tuning: each token weighted by its own probability (Wu et al. 2025)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over `data`."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of prompts (of `data`; of documents, whole ones) kept for evaluation."""
    optim: Optim = Optim()
    lora: Lora = Lora()
    precision: Precision = Precision()


class CollectStage(Stage):
    """Sample k responses to each prompt and have an annotator rank them, or give each a thumb or a mark."""

    stage: Literal["collect"] = "collect"
    model: str
    """Model that answers."""
    prompts: Required
    """Prompts to answer."""
    annotator: Required
    """`package.module:function` that makes an annotator, with its options."""
    ask: Literal["ranking", "thumbs", "ratings"] = "ranking"
    """What of: to rank a prompt's responses, for a thumb up or down for each by itself, or for a number for each."""
    num_samples: Annotated[int, Field(gt=0)] = 4
    """Responses a prompt; at least two are needed for a ranking."""
    label: Annotated[int, Field(ge=0)] = 0
    """Ask about so many of the prompts: those on whose answers the heads of `reward` disagree most; 0: about all."""
    reward: str = ""
    """A reward model of several heads (an ensemble) that chooses what to label: an earlier stage or a folder."""
    again: Annotated[int, Field(ge=0)] = 0
    """Prompts whose responses are ranked once more, by annotators drawn with another seed: how far they agree stands in
    agreement.json, and nothing learns from the second rankings."""
    sampling: SamplingConfig = SamplingConfig()
    truth: Possible = NOTHING
    """Scorer of the true reward, used only to state how often the labels order pairs as truth does."""

    @model_validator(mode="after")
    def _enough_to_rank(self) -> Self:
        if self.again and self.ask != "ranking":
            raise ValueError(
                f"again is {self.again} and ask {self.ask}; agreement is taken of rankings: set again to 0"
            )
        if bool(self.label) != bool(self.reward):
            raise ValueError(f"label is {self.label} and reward {self.reward!r}; give both, or neither")
        if self.ask == "ranking" and self.num_samples < 2:
            raise ValueError(f"num_samples is {self.num_samples}; a ranking takes at least 2 responses to a prompt")
        return self


class RewardStage(Stage):
    """Train a reward model on pairs, rankings, ratings or thumbs: all responses to a prompt in one pass."""

    stage: Literal["reward"] = "reward"
    model: str
    """Model to start from; its head is new."""
    start: Literal["model", "random"] = "model"
    """From the model's weights, or from random ones of its shape: what a language model under a reward is worth."""
    data: Required
    """Preference pairs, rankings, or an earlier `collect` stage; ratings for `regression`, feedback for `thumbs`."""
    standardize: Literal["no", "all", "annotator"] = "no"
    """Ratings' values less their mean, over their spread: of `all`, or of each `annotator` by himself, which takes away
    how kind he is and how much of the scale he uses; it assumes that all were given answers alike."""
    loss: RewardLossConfig = RewardLossConfig()
    """Bradley-Terry over all pairs of a prompt, or another loss over rewards (`kilter losses`)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts kept for evaluation."""
    centering: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared mean reward, which fixes the level that Bradley-Terry leaves free."""
    heads: Heads = Heads()
    truth: Possible = NOTHING
    """Scorer of the true reward: states how often the reward model orders held-out pairs as truth does."""
    audit: AuditConfig = AuditConfig()
    optim: Optim = Optim()
    lora: Lora = Lora()
    precision: Precision = Precision()

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        heads = self.heads
        if self.start == "random" and self.lora.rank:
            raise ValueError(
                f"start is random and lora.rank {self.lora.rank}; an adapter on random weights learns little"
            )
        if heads.own_adapters and (heads.kind not in ("ensemble", "groups") or not self.lora.rank):
            raise ValueError(
                f"heads.own_adapters with heads.kind {heads.kind} and lora.rank {self.lora.rank}; adapters of their "
                "own are for the heads of an ensemble or of groups, and need a lora.rank above 0"
            )
        if heads.own_adapters and self.precision.base != "float32":
            raise ValueError(
                f"heads.own_adapters and precision.base {self.precision.base}; such heads are loaded again on the "
                "model as it was published, in float32: leave one of them out"
            )
        if heads.combine.weights and heads.kind != "groups":
            raise ValueError(f"heads.combine.weights are by group, and heads.kind is {heads.kind}; leave them out")
        return self


class _WithLoss(Stage):
    """What stages of preference optimisation share."""

    loss: LossConfig = LossConfig()
    mix: tuple[LossConfig, ...] = ()
    """More losses over the same data, added with their weights: `[{name: nll, weight: 0.2}]`."""
    reference: str = ""
    """Frozen model to measure from: a folder, a hub name or an earlier stage; empty: the policy as it starts;
    `none`: its log-probs count as 0."""
    sync_every: Annotated[int, Field(ge=0)] = 0
    """Steps, online rounds, after which the reference follows the policy (TR-DPO, arXiv 2404.09656); 0: it stays."""
    sync_mix: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the policy in the reference that follows it. 1 with `sync_every` of hundreds, or 0.5 to 0.6 with 1."""
    probe: Probe = Probe()
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep so many policies along the way, evenly spaced, for the picture of reward against KL."""
    lora: Lora = Lora()
    precision: Precision = Precision()

    @model_validator(mode="after")
    def _reference_can_follow(self) -> Self:
        if self.sync_every and self.reference == NO_REFERENCE:
            raise ValueError(f"sync_every is {self.sync_every} and reference is none; leave one of them out")
        if self.sync_every and self.lora.rank and self.sync_mix < 1:
            raise ValueError(
                f"sync_mix is {self.sync_mix:g} and lora.rank {self.lora.rank}: mixed adapters are no mixture of what "
                "they add; set sync_mix to 1, or lora.rank to 0"
            )
        return self


class PreferStage(_WithLoss):
    """Preference optimisation: DPO and its family, from pairs, rankings or thumbs."""

    stage: Literal["prefer"] = "prefer"
    model: str
    """Policy to start from."""
    data: Required
    """Preference pairs, rankings, or an earlier `collect` stage; for a loss over thumbs, feedback."""
    heaviest: Annotated[int, Field(ge=0)] = 50
    """List so many of the training pairs that the trained policy still orders most wrongly, `heaviest.jsonl`: the first
    to look at for wrong labels; 0: none, and no pass over the data for it."""
    reference_cache: bool = True
    """Keep the reference's log-probs on disk for the next run, by weights and tokens, in KILTER_CACHE or the user's
    cache folder; what is read is verified."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of prompts kept for evaluation."""
    optim: Optim = Optim()


class OnlineStage(_WithLoss):
    """Online preference optimisation: sample from the policy, score, pair, update with any loss over comparisons.

    One step a round is online DPO (Guo et al. 2024); rounds of many prompts and several epochs are iterative DPO.
    """

    stage: Literal["online"] = "online"
    model: str
    """Policy to start from."""
    reward: str
    """What scores: an earlier stage, a reward model's folder, a rule sheet (`rules.yaml`, see docs/rewards.md), or
    `package.module:function` of a scorer."""
    combine: Combine | None = None
    """How several heads of the reward model make one number; none: as the reward model says."""
    prompts: Required
    """Prompts to answer."""
    pairs: Possible = NOTHING
    """Held-out pairs on which the reward must prefer the better answer, or training is refused. Default: those that
    the reward stage kept aside; for a rule sheet or a function none, and nothing is checked."""
    audit: Literal["heed", "ignore"] = "heed"
    """What to do about a reward model's audit (`kilter reward audit`): training is refused when it failed or is of
    other weights, unless it is ignored. A model without one is warned of."""
    rounds: Annotated[int, Field(gt=0)] = 50
    """How many times the policy is sampled."""
    prompts_per_round: Annotated[int, Field(gt=0)] = 64
    """Prompts sampled each time; `optim.batch_size` of them make a step."""
    num_samples: Annotated[int, Field(gt=1)] = 2
    """Answers to each of them."""
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerConfig = SamplerConfig()
    pairing: Literal["best_worst", "all"] = "best_worst"
    """Compare the best and the worst answer to a prompt, or all of them, each pair weighing by its scores' gap."""
    min_margin: Annotated[float, Field(ge=0)] = 0.0
    """Leave out prompts whose best and worst answer are closer than this, in the reward's unit."""
    truncation_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the score of an answer that met the length limit, in the reward's unit."""
    epochs: Annotated[int, Field(gt=0)] = 1
    """Passes over a round's pairs."""
    optim: Optim = Optim(learning_rate=1e-6, batch_size=64)

    @property
    def minibatches(self) -> int:
        """Steps of one pass over a round."""
        return -(-self.prompts_per_round // self.optim.batch_size)

    @model_validator(mode="after")
    def _weighs_no_token(self) -> Self:
        if given := self.sampler.changed("cap", "max_gap"):
            raise ValueError(
                f"sampler.{given[0]} is {getattr(self.sampler, given[0])}, but pairs are compared as they are, whoever "
                "drew them; leave it out"
            )
        return self


class RlStage(Stage):
    """Reinforcement learning from a reward."""

    stage: Literal["rl"] = "rl"
    algorithm: Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "raft"] = "ppo"
    """Which algorithm. ppo has a critic; all others but reinforce++ compare the responses to one prompt."""
    model: str
    """Policy to start from; it is also the reference."""
    reward: str
    """What pays: an earlier stage, a reward model's folder, a rule sheet (`rules.yaml`, see docs/rewards.md), or
    `package.module:function` of a scorer."""
    combine: Combine | None = None
    """How several heads of the reward model make one number; none: as the reward model says."""
    also: tuple[AlsoReward, ...] = ()
    """Further scorers, by weight or as constraints: `[{reward: honest, weight: 0.5}, {reward: harm, at_most: 0.0}]`."""
    prompts: Required
    """Prompts to answer."""
    pairs: Possible = NOTHING
    """Held-out pairs on which the reward must prefer the better answer, or training is refused. Default: those that
    the reward stage kept aside; for a rule sheet or a function none, and nothing is checked."""
    audit: Literal["heed", "ignore"] = "heed"
    """What to do about a reward model's audit (`kilter reward audit`): training is refused when it failed or is of
    other weights, unless it is ignored. A model without one is warned of."""
    signs: Literal["heed", "ignore"] = "heed"
    """What to do about a KL that is paid for instead of priced (`policy.kl_coef` below 0): the run is refused, or, to
    see what becomes of it, goes on and keeps the verdict in its done.json."""
    rollouts: Annotated[int, Field(gt=0)] = 50
    """How many times the policy is sampled."""
    prompts_per_rollout: Annotated[int, Field(gt=0)] = 64
    """Prompts sampled each time."""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    """Responses to each of them; none given: 1 for ppo and reinforce++, else 8."""
    sampling: SamplingConfig = SamplingConfig()
    sampler: SamplerConfig = SamplerConfig()
    policy: PolicyConfig = PolicyConfig()
    ptx: PtxConfig = PtxConfig()
    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep so many policies along the way, evenly spaced, for the picture of reward against KL."""
    guard: GuardConfig = GuardConfig()
    optim: Optim = Optim(learning_rate=1e-6)
    lora: Lora = Lora()
    precision: Precision = Precision()

    @property
    def compares(self) -> bool:
        """The algorithm learns from the differences between responses to one prompt."""
        return self.algorithm not in ("ppo", "reinforce++")

    @property
    def samples(self) -> int:
        """Responses to each prompt."""
        return self.num_samples or (8 if self.compares else 1)

    @model_validator(mode="after")
    def _enough(self) -> Self:
        labels = [one.label for one in self.also]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"two of `also` are called {twice[0]!r}: give each a `name` of its own")
        if self.compares and self.samples < 2:
            raise ValueError(f"{self.algorithm} compares responses to one prompt: num_samples must be at least 2")
        if self.policy.kl_coef < 0 and self.signs == "heed":
            raise ValueError(
                f"policy.kl_coef is {self.policy.kl_coef:g}: a bonus for leaving the reference gives gibberish; set it "
                "to 0 or above, or signs to ignore to see it"
            )
        if self.policy.critic_warmup >= self.rollouts:
            raise ValueError(
                f"policy.critic_warmup is {self.policy.critic_warmup} and rollouts {self.rollouts}: the policy would "
                "never learn; set critic_warmup below rollouts"
            )
        return self


class BestOfNStage(Stage):
    """Draw n responses and keep the one that the reward model likes best: the yardstick that trains nothing."""

    stage: Literal["best_of_n"] = "best_of_n"
    model: str
    """Model that answers."""
    reward: str
    """What chooses: an earlier stage, a reward model's folder, a rule sheet (`rules.yaml`), or
    `package.module:function` of a scorer."""
    combine: Combine | None = None
    """How its heads, where it has several, make one number; none: as the reward model says."""
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
    """What the proxy reward is: an earlier stage, a reward model's folder, a rule sheet (`rules.yaml`), or
    `package.module:function` of a scorer."""
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
    SftStage | CollectStage | RewardStage | PreferStage | OnlineStage | RlStage | BestOfNStage | EvalStage,
    Field(discriminator="stage"),
]

STAGES: dict[str, type[Stage]] = {
    "sft": SftStage,
    "collect": CollectStage,
    "reward": RewardStage,
    "prefer": PreferStage,
    "online": OnlineStage,
    "rl": RlStage,
    "best_of_n": BestOfNStage,
    "eval": EvalStage,
}
