"""Reward models of several heads as folders: labels of one classifier, or adapters beside the average of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import untouched_model
from test_saving import ending_with, scores_in_transformers, tokenizer_with
from torch import Tensor

from kilter.errors import ModelError
from kilter.models.build import load_reward_model, ppo_trunk, reward_trunk
from kilter.models.reward_heads import RewardHeads, heads_of, load_members
from kilter.models.roles import Lora
from kilter.models.save import save_reward_model
from kilter.models.trunk import Trunk
from kilter.tree import make_tree

HEADS = RewardHeads(("b.c", "a"), "groups", (0.5, -1.0), {"how": "min"})


def base(folder: Path) -> Path:
    untouched_model("llama").save_pretrained(folder / "base")
    return folder / "base"


def said(trunk: Trunk, roles: tuple[str, ...]) -> Tensor:
    """float[R, K]."""
    with torch.no_grad():
        answers = trunk(make_tree([ending_with(2)]), dict.fromkeys(roles, "rewards"))
    return torch.stack([answers[role] for role in roles], dim=1)


def trained(folder: Path, *, lora: Lora | None, own: bool) -> Trunk:
    """Heads (and adapters) that differ from each other, as they do after training."""
    generator = torch.Generator().manual_seed(0)
    trunk = reward_trunk(folder, generator=generator, lora=lora, heads=HEADS.roles, own_adapters=own)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return trunk


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["whole", "one adapter"])
def test_heads_on_one_model_are_labels_of_one_classifier(tmp_path: Path, lora: Lora | None) -> None:
    trunk = trained(base(tmp_path), lora=lora, own=False)
    ours = said(trunk, HEADS.roles)
    assert (ours[:, 0] - ours[:, 1]).abs().max() > 0.1
    save_reward_model(trunk, HEADS.roles, tmp_path / "result", tokenizer_with(eos_token="t2"), heads=HEADS)
    theirs = scores_in_transformers(tmp_path / "result", ending_with(2), "right")
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "result" / "config.json").read_text())["id2label"] == {"0": "b.c", "1": "a"}
    assert heads_of(tmp_path / "result") == HEADS
    torch.testing.assert_close(said(load_reward_model(tmp_path / "result"), HEADS.roles), ours, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "result" / "adapter").exists()
    value = ppo_trunk(tmp_path / "base", tmp_path / "result")
    torch.testing.assert_close(said(value, ("value",))[:, 0], ours.mean(1), rtol=1e-5, atol=1e-5)


def test_adapters_of_their_own_stand_beside_the_average_of_them(tmp_path: Path) -> None:
    trunk = trained(base(tmp_path), lora=Lora(rank=2), own=True)
    ours = said(trunk, HEADS.roles)
    heads = RewardHeads(HEADS.labels, "ensemble", HEADS.usual, HEADS.combine, str(tmp_path / "base"))
    save_reward_model(trunk, HEADS.roles, tmp_path / "result", tokenizer_with(eos_token="t2"), heads=heads)
    torch.testing.assert_close(said(load_members(tmp_path / "result"), heads.roles), ours, rtol=1e-6, atol=1e-6)
    plain = scores_in_transformers(tmp_path / "result", ending_with(2), "right")
    averaged = said(load_reward_model(tmp_path / "result"), ("reward",))
    torch.testing.assert_close(plain.reshape(-1, 1), averaged, rtol=1e-5, atol=1e-5)
    # By hand: mean weights of mean adapters; no mean of what they say.
    classifier = load_reward_model(tmp_path / "result").models["reward"]
    whole = dict(trunk.models["reward"].named_modules())["model.layers.0.mlp.up_proj"]
    deltas = [whole.get_delta_weight(role) for role in HEADS.roles]  # type: ignore[operator]
    expected = whole.base_layer.weight + sum(deltas) / 2  # type: ignore[union-attr, operator]
    got = dict(classifier.named_parameters())["layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (averaged[:, 0] - ours.mean(1)).abs().max() > 1e-3
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"adapters were trained on .*/base, which is not there; put it back"):
        load_members(tmp_path / "result")
    untouched_model("llama", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="this adapter was trained on the trunk"):
        load_members(tmp_path / "result")


def test_a_folder_of_one_head_says_so_and_labels_that_nobody_named_are_refused(tmp_path: Path) -> None:
    trunk = reward_trunk(base(tmp_path), generator=torch.Generator().manual_seed(0))
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer_with(eos_token="t2"), heads=RewardHeads())
    assert heads_of(tmp_path / "result") == RewardHeads() == heads_of("somebody/on-a-hub")
    assert "heads" not in json.loads((tmp_path / "result" / "kilter.json").read_text())
    two = trained(tmp_path / "base", lora=None, own=False)
    save_reward_model(two, HEADS.roles, tmp_path / "two", tokenizer_with(eos_token="t2"), heads=HEADS)
    (tmp_path / "two" / "kilter.json").unlink()
    with pytest.raises(ModelError, match="has 2 labels; a reward model has one"):
        load_reward_model(tmp_path / "two")
