"""Reward models of several heads as stages: who teaches which head, what stands in the folder, who is paid by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file

import kilter
from kilter import data, world
from kilter.cli import main
from kilter.errors import ConfigError, DataError
from kilter.models.load import load_model, with_random_weights
from kilter.models.reward_heads import heads_of
from kilter.records import Judgement, Prompt, Rating, Sample, Score, UnpairedFeedback
from kilter.rundir import read_jsonl
from kilter.scorers import load_reward_scorer
from kilter.stages.collect import least_sure

BASE = str(world.MODEL_PATH)
GROUPS = ("farmer", "fisher", "trader")


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return world.prompts(split="train", per_kind=3)


@pytest.fixture(scope="module")
def judgements(tmp_path_factory: pytest.TempPathFactory, asked: list[Prompt]) -> Path:
    """Every prompt judged by people of each of three groups."""
    path = tmp_path_factory.mktemp("judged") / "judgements.jsonl"
    texts = [["Yes.", "I do not know that.", "The best is bread."] for _ in asked]
    data.write(path, world.society(noise=0.0).rank(asked, texts))
    return path


def stage(judged: Path, **changes: Any) -> dict[str, Any]:
    optim = {**small.OPTIM, "batch_size": 8}
    given = {"stage": "reward", "model": BASE, "data": str(judged), "held_out": 0.2, "optim": optim}
    return given | {"audit": {"prompts": 0}} | changes


def run(out: Path, **stages: Any) -> Path:
    return kilter.align({"name": "heads", "threads": 1, "stages": stages}, out=out).path


def done(out: Path, name: str) -> dict[str, Any]:
    (file,) = out.glob(f"stages/*-{name}/done.json")
    return dict(json.loads(file.read_text()))


def result(out: Path, name: str) -> Path:
    (folder,) = out.glob(f"stages/*-{name}/result")
    return folder


def test_a_society_has_people_of_every_group_who_err_each_in_their_own_way(asked: list[Prompt]) -> None:
    texts = [["Yes.", "No.", "I do not know that."] for _ in asked]
    judged = world.society(noise=2.0).rank(asked, texts)
    assert [one.group for one in judged[:3]] == list(GROUPS) and len(judged) == 3 * len(asked)
    assert {one.annotator.rsplit("-", 1)[0] for one in judged} == {f"simulated-{group}" for group in GROUPS}
    plain = [one for one in judged if one.kind != "opinion"]
    ranks = {group: [one.ranks for one in plain if one.group == group] for group in GROUPS}
    assert ranks["farmer"] != ranks["fisher"] != ranks["trader"]
    assert len(world.society().thumbs(asked, texts)) == 9 * len(asked)
    with pytest.raises(ConfigError, match="groups is empty"):
        world.society(groups=())


def test_every_kind_of_heads_trains_and_comes_back_as_it_was(tmp_path: Path, judgements: Path) -> None:
    lora = {"rank": 2}
    stages = {
        "groups": stage(judgements, heads={"kind": "groups", "combine": {"how": "vote", "weights": {"fisher": 2.0}}}),
        "ensemble": stage(judgements, heads={"kind": "ensemble", "members": 3}, loss={"name": "davidson"}),
        "adapters": stage(
            judgements, heads={"kind": "ensemble", "members": 2, "own_adapters": True, "bootstrap": False}, lora=lora
        ),
        "length": stage(judgements, heads={"kind": "length"}, loss={"name": "plackett_luce"}),
    }
    out = run(tmp_path / "run", **stages)
    labels = {
        "groups": GROUPS,
        "ensemble": ("member 0", "member 1", "member 2"),
        "adapters": ("member 0", "member 1"),
        "length": ("reward",),
    }
    samples = [Sample(prompt.prompt, text) for prompt in world.prompts(per_kind=1) for text in ("Yes.", "No.")]
    for name, expected in labels.items():
        heads = heads_of(result(out, name))
        assert heads.labels == expected and len(heads.usual) == (0 if name == "length" else len(expected))
        scores = load_reward_scorer(result(out, name)).score(samples)
        again = load_reward_scorer(result(out, name)).score(samples[::-1])[::-1]
        assert [score.value for score in scores] == pytest.approx([score.value for score in again], abs=1e-5)
        assert all(set(score.parts) == (set(expected) if len(expected) > 1 else set()) for score in scores)
        spreads = [score.spread for score in scores]
        assert all(spread is not None and spread > 0 for spread in spreads) or name == "length"
        loss = {"ensemble": "davidson", "length": "plackett_luce"}.get(name, "bradley_terry")
        assert done(out, name)[f"held_out/loss/{loss}"] > 0 and done(out, name)["accuracy_on_labels"]["n"] > 0
    found = done(out, "groups")
    assert {f"held_out/accuracy/{group}" for group in GROUPS} < set(found)
    assert not any(key.startswith("held_out/reward_") for key in found)
    assert (result(out, "adapters") / "members" / "1" / "adapter_model.safetensors").exists()
    assert "held_out/rewards/length_correlation" in done(out, "length")
    worst = load_reward_scorer(result(out, "ensemble"), combine={"how": "min"}).score(samples)
    assert [score.value for score in worst] == pytest.approx([min(score.parts.values()) for score in worst])


def test_who_is_paid_by_several_heads_may_say_how_they_are_combined(
    tmp_path: Path, judgements: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": 1}}
    rl = {**small.RL, "model": BASE, "rollouts": 1, "prompts": prompts, "policy": {"kl_coef": 0.1}}
    combine = {"how": "mean_minus_variance", "variance_coef": 5.0}
    out = run(
        tmp_path / "run",
        reward=stage(judgements, heads={"kind": "ensemble", "members": 2}, epochs=4),
        mean=rl,
        careful={**rl, "combine": combine},
    )
    mean, careful = (read_jsonl(result(out, name).parent / "metrics.jsonl")[-1] for name in ("mean", "careful"))
    # The same policy and, by name, other draws: what is taken away is the variance, which is above 0.
    assert careful["rollout/score"] < mean["rollout/score"]
    assert mean["rollout/spread"] > 0 and careful["rollout/spread"] > 0
    words = ["reward", "audit", str(result(out, "reward")), "--data", str(judgements)]
    told = []
    for more in ([], ["combine:combine", "--combine.how", "min"]):
        main([*words, *more])
        told.append(json.loads((result(out, "reward") / "audit.json").read_text()))
    assert told[0]["combine"] is None and told[1]["combine"]["how"] == "min"
    assert told[0]["spread"] != told[1]["spread"]
    assert main(["reward", "audit", "rules.yaml", *words[3:], "--out", str(tmp_path), *more]) == 2
    assert "rules.yaml is none; drop it" in capsys.readouterr().err


class Heads:
    """Two heads that part on some answers."""

    name = "two heads"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        said = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (5.0, 9.0), "d": (6.0, 10.0), "e": (0.0, 1.0), "f": (1.0, 0.0)}
        return [Score(0.0, dict(zip("xy", said[sample.text], strict=True))) for sample in samples]


def test_what_to_label_next_is_what_heads_order_otherwise_whatever_their_levels(asked: list[Prompt]) -> None:
    rows = [["a", "b"], ["c", "d"], ["e", "f"], ["a", "b", "e", "f"], ["a"], []]
    # [e, f]: heads less their means are -+1/2 and +-1/2; in the row of four they are diluted
    assert least_sure(Heads(), asked[:6], rows) == [2, 3, 0, 1, 4, 5]


def test_an_ensemble_chooses_what_to_label(tmp_path: Path, judgements: Path) -> None:
    prompts = {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": 2}}
    ask = {"stage": "collect", "model": BASE, "prompts": prompts, "annotator": "kilter.world:panel"}
    ask |= {"num_samples": 2, "sampling": {"max_new_tokens": 12}}
    one = stage(judgements, heads={"kind": "ensemble", "members": 2})
    out = run(tmp_path / "run", reward=one, next={**ask, "reward": "reward", "label": 5}, all=ask)
    assert done(out, "next")["prompts"] == 22 and done(out, "next")["chosen"] == 5
    assert done(out, "next")["ranked"] <= 5 < done(out, "all")["ranked"]
    with pytest.raises(ConfigError, match="has one head and cannot say of what it is not sure"):
        run(tmp_path / "one", reward=stage(judgements), next={**ask, "reward": "reward", "label": 5})
    with pytest.raises(ConfigError, match="label is 5 and reward ''; give both, or neither"):
        run(tmp_path / "none", next={**ask, "label": 5})


def test_ratings_are_regressed_on(tmp_path: Path, asked: list[Prompt]) -> None:
    path = tmp_path / "ratings.jsonl"
    rows = [
        Rating(prompt=one.prompt, responses=("Yes.", "No way."), values=(4.0, 1.0), errors=(0.1, 2.0)) for one in asked
    ]
    data.write(path, rows)
    out = run(tmp_path / "run", reward=stage(path, loss={"name": "regression"}, centering=0.0, epochs=6))
    first, *_, last = read_jsonl(result(out, "reward").parent / "metrics.jsonl")
    assert last["loss/regression"] < first["loss/regression"] / 4
    scores = load_reward_scorer(result(out, "reward")).score([Sample(asked[0].prompt, "Yes.")])
    assert scores[0].value == pytest.approx(4.0, abs=1.0)
    with pytest.raises(DataError, match="no rating can be made of them"):
        run(tmp_path / "pairs", reward=stage(_pairs(tmp_path, asked), loss={"name": "regression"}))


def test_a_reward_model_may_start_from_nothing(tmp_path: Path, judgements: Path) -> None:
    before = torch.random.get_rng_state()
    models = [with_random_weights(load_model(BASE), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    first, same, other, trained = (
        torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in (*models, load_model(BASE))
    )
    assert torch.equal(first, same) and not torch.equal(first, other) and not torch.equal(first, trained)
    assert torch.equal(torch.random.get_rng_state(), before)
    out = run(tmp_path / "run", model=stage(judgements, held_out=0.0), random=stage(judgements, start="random"))
    weights = [load_file(result(out, name) / "model.safetensors") for name in ("model", "random")]
    base = load_file(Path(BASE) / "model.safetensors")
    name = next(name for name in weights[0] if name.endswith("mlp.up_proj.weight"))
    near, far = (float((held[name] - base[name].float()).norm()) for held in weights)
    assert near < 0.2 * float(base[name].float().norm()) < far


def test_marks_of_annotators_with_scales_of_their_own_are_put_on_one(tmp_path: Path, asked: list[Prompt]) -> None:
    """One gives 5 and 4 where the other gives 2 and 1: over all, who was asked decides; by annotator, the answer."""
    rows = [
        Rating(prompt=one.prompt, responses=("Yes.", "No way."), values=(top, top - 1.0), annotator=who)
        for at, one in enumerate(asked)
        for top, who in [((5.0, "anna"), (2.0, "bert"))[at % 2]]
    ]
    data.write(tmp_path / "ratings.jsonl", rows)
    level = {"loss": {"name": "regression"}, "centering": 0.0, "epochs": 12, "held_out": 0.0}
    made = {by: stage(tmp_path / "ratings.jsonl", standardize=by, **level) for by in ("all", "annotator")}
    out = run(tmp_path / "run", **made)
    gaps = {}
    for by in made:
        samples = [Sample(one.prompt, text) for text in ("Yes.", "No way.") for one in asked]
        values = [score.value or 0.0 for score in load_reward_scorer(result(out, by)).score(samples)]
        good, bad = (sum(part) / len(asked) for part in (values[: len(asked)], values[len(asked) :]))
        gaps[by] = good - bad
        assert good + bad == pytest.approx(0.0, abs=0.5)  # marks have a mean of 3
    assert gaps["annotator"] == pytest.approx(2.0, abs=0.5)  # 1 and -1
    assert gaps["all"] == pytest.approx(1 / 2.5**0.5, abs=0.4)  # 1 mark of a spread of sqrt(1.5^2 + 0.5^2)


def test_thumbs_are_learned_from_and_measured_within_a_prompt(tmp_path: Path, asked: list[Prompt]) -> None:
    rows = [
        UnpairedFeedback(prompt=one.prompt, response=text, desirable=up)
        for one in asked
        for text, up in (("Yes.", True), ("No way.", False))
    ]
    data.write(tmp_path / "thumbs.jsonl", rows)
    out = run(
        tmp_path / "run",
        reward=stage(tmp_path / "thumbs.jsonl", loss={"name": "thumbs"}, centering=0.0, epochs=8),
        members=stage(tmp_path / "thumbs.jsonl", loss={"name": "thumbs"}, centering=0.0, heads={"kind": "ensemble"}),
    )
    found = done(out, "reward")
    assert found["held_out/rewards/accuracy"] == 1.0 and found["accuracy_on_labels"]["mean"] == 1.0
    good, bad = load_reward_scorer(result(out, "reward")).score(
        [Sample(asked[0].prompt, text) for text in ("Yes.", "No way.")]
    )
    assert good.value is not None and bad.value is not None and good.value > 0.5 and bad.value < -0.5
    pairs = read_jsonl(result(out, "reward").parent / "held_out.jsonl")
    assert pairs and {(row["chosen"], row["rejected"]) for row in pairs} == {("Yes.", "No way.")}


def test_marks_and_thumbs_are_collected_for_reward_models(tmp_path: Path) -> None:
    collect = small.recipe()["stages"]["preferences"] | {"model": BASE, "sampling": {"max_new_tokens": 8}, "again": 0}
    learned = {"stage": "reward", "model": BASE, "centering": 0.0, "optim": {**small.OPTIM, "batch_size": 16}}
    out = run(
        tmp_path / "run",
        marks=collect | {"ask": "ratings"},
        thumbs=collect | {"ask": "thumbs"},
        by_marks=learned | {"data": "marks", "loss": {"name": "regression"}, "standardize": "annotator"},
        by_order=learned | {"data": "marks"},
        by_thumbs=learned | {"data": "thumbs", "loss": {"name": "thumbs"}},
    )
    rows = read_jsonl(result(out, "marks") / "ratings.jsonl")
    assert {row["type"] for row in rows} == {"rating"} and all(row["seconds"] > 2 for row in rows)
    values = [value for row in rows for value in row["values"]]
    assert set(values) == {1.0, 2.0, 3.0, 4.0, 5.0}
    found = done(out, "marks")
    assert found["rated"] == len(rows) and found["value"]["mean"] == pytest.approx(sum(values) / len(values))
    assert found["label_accuracy"]["n"] > 100 and found["label_accuracy"]["mean"] > 0.7  # without noise
    assert all(row["seconds"] > 2 for row in read_jsonl(result(out, "thumbs") / "feedback.jsonl"))
    assert done(out, "by_marks")["held_out/loss/regression"] > 0
    assert done(out, "by_order")["held_out/loss/bradley_terry"] > 0
    assert done(out, "by_thumbs")["held_out/loss/thumbs"] > 0


@pytest.mark.parametrize(
    ("ask", "changes", "reason"),
    [
        ("thumbs", {}, r"collects thumbs, and 'bradley_terry' reads comparisons; set stages.asked.ask to ranking, or "),
        ("ranking", {"loss": {"name": "thumbs"}}, r"reads thumbs; set stages.asked.ask to thumbs, or .*comparisons"),
        ("thumbs", {"loss": {"name": "regression"}}, r"reads ratings; set stages.asked.ask to ratings, or .*thumbs"),
    ],
)
def test_what_is_collected_must_fit_the_reward_model(
    tmp_path: Path, ask: str, changes: dict[str, Any], reason: str
) -> None:
    collect = small.recipe()["stages"]["preferences"] | {"model": BASE, "ask": ask, "again": 0}
    with pytest.raises(ConfigError, match=f"stages.reward: data is 'asked', which .*{reason}"):
        run(tmp_path / "run", asked=collect, reward=stage(Path("asked"), **changes))
    assert not (tmp_path / "run" / "stages").exists()


def test_agreement_is_taken_of_rankings(tmp_path: Path) -> None:
    collect = small.recipe()["stages"]["preferences"] | {"model": BASE, "ask": "thumbs", "again": 3}
    with pytest.raises(ConfigError, match="again is 3 and ask thumbs; agreement is taken of rankings"):
        run(tmp_path / "run", asked=collect)


def _pairs(folder: Path, asked: list[Prompt]) -> Path:
    judged = [Judgement(prompt=one.prompt, responses=("a", "b"), ranks=(0, 1), annotator="w") for one in asked]
    data.write(folder / "pairs.jsonl", judged)
    return folder / "pairs.jsonl"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": {"name": "dpo"}}, r"stages.reward: loss.name is 'dpo'; choose one of bradley_terry"),
        ({"loss": {"name": "davidson", "nu": 0}}, "loss.nu is 0.0; 'davidson' takes a number > 0"),
        ({"heads": {"kind": "length"}, "loss": {"name": "regression"}}, "lengths are taken apart in comparisons alone"),
        ({"heads": {"kind": "groups"}, "loss": {"name": "thumbs"}}, "thumbs name no group: set it to one"),
        ({"standardize": "annotator"}, "standardize is annotator and loss.name 'bradley_terry', which reads no values"),
        ({"heads": {"kind": "ensemble", "own_adapters": True}}, "need a lora.rank above 0"),
        ({"start": "random", "lora": {"rank": 2}}, "start is random and lora.rank 2"),
        ({"heads": {"kind": "groups", "combine": {"how": "min", "weights": {"a": 2}}}}, "how is min; leave them out"),
        ({"loss": {"name": "davidson", "weight": 0.5}}, "weight is 0.5, and a reward model has one loss"),
        ({"heads": {"kind": "one", "combine": {"weights": {"a": 1}}}}, "weights are by group, and heads.kind is one"),
        ({"heads": {"kind": "groups", "combine": {"weights": {"a": -1}}}}, "weights.a is -1; a weight is a number"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    tmp_path: Path, judgements: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path / "run", reward=stage(judgements, **changes))
    assert not (tmp_path / "run" / "stages").exists()


def test_groups_that_the_data_do_not_name_are_refused(tmp_path: Path, asked: list[Prompt], judgements: Path) -> None:
    heads = {"kind": "groups"}
    with pytest.raises(DataError, match=r"names no 'group', and heads.kind is groups"):
        run(tmp_path / "none", reward=stage(_pairs(tmp_path, asked), heads=heads))
    one = tmp_path / "one.jsonl"
    data.write(one, world.panel(group="farmer").rank(asked, [["Yes.", "No."] for _ in asked]))
    with pytest.raises(DataError, match="all records are of the group 'farmer'"):
        run(tmp_path / "one", reward=stage(one, heads=heads))
    with pytest.raises(ConfigError, match=r"combine.weights names 'baker'; the reward model has farmer, "):
        run(tmp_path / "baker", reward=stage(judgements, heads=heads | {"combine": {"weights": {"baker": 2.0}}}))
