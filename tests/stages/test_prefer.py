"""A prefer stage with any loss: what data it reads, which reference it takes, what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small

import kilter
from kilter import data, world
from kilter.config import parse
from kilter.errors import ConfigError
from kilter.records import PreferencePair, Ranking
from kilter.rundir import read_jsonl
from kilter.stages import check_losses

BASE = "kilter.world:MODEL_PATH"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best answer known against one that fits no question of the town."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        PreferencePair(prompt=prompt.prompt, chosen=world.oracle(prompt), rejected="Yes, you are so right.")
        for prompt in world.prompts(split="train", per_kind=2)
    ]
    data.write(path, rows)
    return path


def stage(pairs: Path, **changes: Any) -> dict[str, Any]:
    optim = {**small.OPTIM, "batch_size": 4}
    values = {"stage": "prefer", "model": BASE, "data": str(pairs), "epochs": 0.5, "held_out": 0.2, "optim": optim}
    return values | changes


def run(out: Path, **stages: Any) -> Path:
    return kilter.align({"stages": stages}, out=out).path


def first_row(run: Path, name: str) -> dict[str, Any]:
    (folder,) = run.glob(f"stages/*-{name}")
    return dict(read_jsonl(folder / "metrics.jsonl")[0])


def test_losses_of_every_kind_train_from_one_file_of_pairs(pairs: Path, tmp_path: Path) -> None:
    losses = {
        "simpo": {"loss": {"name": "simpo", "beta": 2.5}},
        "kto": {"loss": {"name": "kto", "undesirable_weight": 1.2}},
        "ranked": {"loss": {"name": "dpo_pl"}, "lora": {"rank": 2}},
        "mixed": {"loss": {"name": "aot"}, "mix": [{"name": "nll", "weight": 0.5}, {"name": "wpo"}]},
    }
    out = run(tmp_path / "run", **{name: stage(pairs, **changes) for name, changes in losses.items()})
    assert first_row(out, "simpo")["loss/simpo"] > 0
    assert first_row(out, "kto")["loss/kto"] == pytest.approx(0.55, abs=0.06)  # near 0.5 and 0.6 at the start
    assert first_row(out, "kto")["kl/mismatched"] == pytest.approx(0, abs=1e-4)
    assert first_row(out, "ranked")["loss/dpo_pl"] == pytest.approx(0.6931, abs=1e-3)
    mixed = first_row(out, "mixed")
    assert mixed["loss/aot"] == pytest.approx(0.6931, abs=1e-3)
    assert mixed["loss"] == pytest.approx(mixed["loss/aot"] + mixed["loss/nll"] + mixed["loss/wpo"])
    for name in losses:
        (done,) = out.glob(f"stages/*-{name}/done.json")
        assert json.loads(done.read_text())["held_out/loss"] > 0


def test_the_reference_is_the_start_or_another_model_or_none(pairs: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(world.MODEL_PATH / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for file in world.MODEL_PATH.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    noisy = {name: (value * 1.1 if "mlp" in name else value) for name, value in weights.items()}
    safetensors.torch.save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    out = run(
        tmp_path / "run",
        own=stage(pairs),
        other=stage(pairs, reference=str(other)),
        adapted=stage(pairs, reference=str(other), lora={"rank": 2}),
        free=stage(pairs, reference="none"),
    )
    own, named, adapted, free = (first_row(out, name) for name in ("own", "other", "adapted", "free"))
    assert own["loss/dpo"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(named["rewards/margin"]) > 1e-3
    assert own["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert abs(adapted["rewards/chosen"]) > 1e-3
    assert free["rewards/chosen"] == pytest.approx(0.1 * free["logps/chosen"], rel=1e-4)
    assert str(other) in json.loads((out / "environment.json").read_text())["inputs"]


def test_a_reference_with_another_vocabulary_is_refused(pairs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in world.MODEL_PATH.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = [word for word in vocab if word.isalpha()][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"stages.dpo.reference: .*another vocabulary"):
        run(tmp_path / "run", dpo=stage(pairs, reference=str(other)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": {"name": "dpoo"}}, "stages.late: loss.name is 'dpoo'; did you mean 'dpo'"),
        (
            {"loss": {"name": "simpo", "betta": 1}},
            "stages.late: loss.betta: 'simpo' has no such option",
        ),
        ({"loss": {"name": "dpo", "beta": -1}}, "stages.late: loss.beta is -1.0; 'dpo' takes a number > 0"),
        ({"mix": [{"name": "kto"}]}, "stages.late: losses dpo, kto read comparisons and thumbs"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_before_the_first_stage(
    change: dict[str, Any], words: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", early=stage(pairs), late=stage(pairs, **change))
    assert not (tmp_path / "run").exists()


def test_rankings_hold_no_thumbs(tmp_path: Path) -> None:
    path = tmp_path / "rankings.jsonl"
    prompt = world.prompts(split="train", per_kind=1)[0].prompt
    data.write(path, [Ranking(prompt=prompt, responses=("a", "b", "c"), ranks=(0, 1, 2))])
    with pytest.raises(kilter.errors.KilterError, match="no feedback can be made of them"):
        run(tmp_path / "run", kto=stage(path, loss={"name": "kto"}))


def test_unusual_options_are_said(pairs: Path) -> None:
    values = stage(pairs, loss={"name": "dpo", "beta": 3}, mix=[{"name": "rpo", "nll_coef": 9}])
    recipe = parse({"stages": {"a": values}}, "")
    assert check_losses(recipe) == [
        "stages.a: loss.beta is 3; usual for 'dpo' is 0.03 to 0.5",
        "stages.a: loss.nll_coef is 9; usual for 'rpo' is 0 to 2",
    ]
