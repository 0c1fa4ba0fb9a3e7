"""The both-ways check: healthy families pass, planted faults are refused by name, and only packing faults fall back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from families import CONFIGS, PACKED, some_groups, untouched_model

from kilter.errors import CheckError
from kilter.models import check as check_module
from kilter.models import heads, segments
from kilter.models import trunk as trunk_module
from kilter.models.attention import AttentionKinds
from kilter.models.build import policy_trunk, ppo_trunk, reward_trunk
from kilter.models.check import both_ways
from kilter.models.load import load_model
from kilter.models.roles import Lora
from kilter.models.trunk import Trunk
from kilter.tree import TokenTree, make_tree, size


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family as a folder; windows long, as published models have them, so that the check must shorten them."""
    root = tmp_path_factory.mktemp("families")
    for family, (_, options) in CONFIGS.items():
        changes = {"sliding_window": 4096} if "sliding_window" in options else {}
        untouched_model(family, **changes).save_pretrained(root / family)
    return {family: root / family for family in CONFIGS}


@pytest.mark.parametrize("family", CONFIGS)
def test_healthy_families_pass(family: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    trunk = policy_trunk(load_model(folders[family]))
    with caplog.at_level(logging.WARNING, logger="kilter"):
        report = both_ways(trunk, some_groups(5), "policy")
    assert report.layout == trunk.layout == ("packed" if family in PACKED else "unrolled")
    assert report.fault is None and report.found.gap < 2e-5 and report.found.gradient_gap < 1e-5
    assert not [record for record in caplog.records if record.name.startswith("kilter")]
    assert all(p.grad is None for p in trunk.parameters())


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_every_role_passes(family: str, folders: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    adapted = ppo_trunk(load_model(folders[family]), None, lora=Lora(3), generator=generator)
    for role in ("policy", "reference", "value"):
        report = both_ways(adapted, some_groups(4), role)
        assert report.found.gap < 2e-5 and (report.found.gradient_gap is None) == (role == "reference")
    assert not adapted.heads["value"].weight.any()  # made random for the check only
    trunk = reward_trunk(load_model(folders[family]), generator=generator)
    assert both_ways(trunk, some_groups(4), "reward").found.gap < 2e-5


def leak(monkeypatch: pytest.MonkeyPatch, *, beyond: int = 0) -> None:
    """Lets every token see what stands before it in the row, in rows longer than `beyond`."""
    right = trunk_module.tree_masks

    def leaked(tree: TokenTree, kinds, dtype):
        if tree.tokens.shape[1] <= beyond:
            return right(tree, kinds, dtype)
        fields = {name: getattr(tree, name) for name in TokenTree.__slots__}
        return right(TokenTree(**fields | {"ancestors": torch.ones_like(tree.ancestors)}), kinds, dtype)

    monkeypatch.setattr(trunk_module, "tree_masks", leaked)


def test_leaked_mask_falls_back_by_name(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leak(monkeypatch)
    trunk = policy_trunk(load_model(folders["llama"]))
    with caplog.at_level(logging.WARNING, logger="kilter"):
        report = both_ways(trunk, some_groups(5), "policy")
    assert report.layout == trunk.layout == "unrolled" and "leaked mask" in str(report.fault)
    assert [record.getMessage() for record in caplog.records] == [report.line]
    assert "one padded row per response" in report.line and report.found.gap < 2e-5
    trunk = policy_trunk(load_model(folders["llama"]))
    with pytest.raises(CheckError, match="leaked mask"):
        both_ways(trunk, some_groups(5), "policy", strict=True)
    assert trunk.layout == "packed"


def test_wrong_gradient_behind_right_numbers_is_refused(folders: dict[str, Path]) -> None:
    trunk = policy_trunk(load_model(folders["llama"]))

    def doubled(_module, _args, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + (hidden - hidden.detach())
        return output

    trunk.models["policy"].model.register_forward_hook(doubled)
    with pytest.raises(CheckError, match=r"gradient by [0-9.]+e[+-]0[0-9] "):
        both_ways(trunk, some_groups(5), "policy")


def test_the_real_batch_is_looked_at(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that the made-up groups, of 69 tokens a row, do not show."""
    leak(monkeypatch, beyond=69)
    trunk = policy_trunk(load_model(folders["llama"]))
    assert both_ways(trunk, [], "policy").layout == "packed"
    assert both_ways(trunk, some_groups(12), "policy").layout == "unrolled"


def test_few_of_many_groups_are_looked_at(folders: dict[str, Path]) -> None:
    """The longest and the first, as far as the tokens go."""
    groups = some_groups(40)
    longest = max(groups, key=size)
    assert check_module._some(groups, 60)[0] == longest
    assert 1 < len(check_module._some(groups, 60)) < 10
    assert len(check_module._some(groups, 10**6)) == 40 and check_module._some(groups, 1) == [longest]


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3_moe"])
def test_lost_window_is_named(family: str, folders: dict[str, Path]) -> None:
    """The window was there when the model was loaded and is gone when it trains."""
    trunk = policy_trunk(load_model(folders[family]))
    trunk.models["policy"].config.sliding_window = None
    with pytest.raises(CheckError, match="lost window"):
        both_ways(trunk, some_groups(5), "policy", strict=True)


def test_window_lost_by_the_mask_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = trunk_module.tree_masks

    def windowless(tree, kinds, dtype):
        return right(tree, AttentionKinds(dict.fromkeys(kinds.windows), kinds.additive), dtype)

    monkeypatch.setattr(trunk_module, "tree_masks", windowless)
    report = both_ways(policy_trunk(load_model(folders["gemma2"])), some_groups(5), "policy")
    assert "lost window" in str(report.fault) and report.layout == "unrolled"


def test_wrong_segments_leave_the_dense_mask(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs that lose their window, or a keyword nobody knows: packing goes on, more slowly, and says so."""
    right = segments.Runs.mask
    monkeypatch.setattr(segments.Runs, "mask", lambda self, run, _, like: right(self, run, None, like))
    trunk = policy_trunk(load_model(folders["mistral"]))
    wide = make_tree([some_groups(40)])
    assert trunk.structure("policy", wide)
    with caplog.at_level(logging.WARNING, logger="kilter"):
        report = both_ways(trunk, some_groups(5), "policy")
    assert report.layout == trunk.layout == "packed" and report.fault is None and report.found.gap < 2e-5
    assert not trunk.structure("policy", wide)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "attention by runs or blocks refused (numbers differ by" in line and "dense masks" in line
    monkeypatch.undo()
    trunk = policy_trunk(load_model(folders["llama"]))
    monkeypatch.setattr(segments, "NO_EFFECT", segments.NO_EFFECT - {"use_cache"})
    with caplog.at_level(logging.WARNING, logger="kilter"):
        assert both_ways(trunk, some_groups(5), "policy").layout == "packed"
    assert "does not know what to do with use_cache" in caplog.records[-1].getMessage()
    assert not trunk.structure("policy", wide)


def test_segments_are_looked_at(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    right = segments.runs_of
    monkeypatch.setattr(segments, "runs_of", lambda tree: (calls.append(tree.tokens.shape), right(tree))[1])
    trunk = policy_trunk(load_model(folders["llama"]))
    both_ways(trunk, some_groups(5), "policy")
    assert len(calls) == 2 and trunk.structure("policy", make_tree([some_groups(40)]))
    assert trunk.dense_up_to == trunk_module.DENSE_UP_TO


def test_dropout_is_named(folders: dict[str, Path]) -> None:
    trunk = policy_trunk(load_model(folders["gpt2"]))
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
            break
    with pytest.raises(CheckError, match=r"dropout on: .*drop\.p is 0\.1"):
        both_ways(trunk, some_groups(5), "policy")
    trunk = policy_trunk(load_model(folders["llama"]))
    next(m for m in trunk.modules() if hasattr(m, "attention_dropout")).attention_dropout = 0.1
    with pytest.raises(CheckError, match=r"dropout on: .*attention_dropout is 0\.1"):
        both_ways(trunk, some_groups(5), "policy")


@pytest.mark.parametrize(
    ("family", "field", "neutral"),
    [("gemma2", "final_logit_softcapping", None), ("granite", "logits_scaling", 1.0), ("cohere", "logit_scale", 1.0)],
)
def test_head_without_its_scale_is_named(
    family: str, field: str, neutral: float | None, folders: dict[str, Path]
) -> None:
    trunk = policy_trunk(load_model(folders[family]))
    setattr(trunk.models["policy"].config, field, neutral)
    with pytest.raises(CheckError, match="softcap or a scale"):
        both_ways(trunk, some_groups(5), "policy")


def test_unknown_head_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def bare(model, hidden):
        return model.get_output_embeddings()(hidden).float()

    monkeypatch.setattr(heads, "logits_of", bare)
    with pytest.raises(CheckError, match="not the model's own"):
        both_ways(policy_trunk(load_model(folders["gemma3"])), some_groups(5), "policy")


def test_attention_softcap_lost_under_sdpa_is_refused(folders: dict[str, Path]) -> None:
    """Seen: Gemma 2 under sdpa loses its cap without a word; neither packed nor unpacked rows are then the model's."""
    trunk = policy_trunk(load_model(folders["gemma2"], attention="sdpa"))
    with pytest.raises(CheckError, match="drops the cap"):
        both_ways(trunk, some_groups(5), "policy")


def test_model_that_refuses_the_mask_falls_back(folders: dict[str, Path]) -> None:
    trunk = policy_trunk(load_model(folders["bloom"]))
    trunk.layout = "packed"  # as if nobody had known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk_module, "inputs_of", lambda _: frozenset({"input_ids", "attention_mask"}))
        patch.setattr(trunk_module, "attention_kinds", lambda _: AttentionKinds({"full_attention": None}, False))
        report = both_ways(trunk, some_groups(5), "policy")
    assert report.layout == "unrolled" and "does not take a tree" in str(report.fault)


def test_a_model_in_bfloat16_is_checked_in_float32(folders: dict[str, Path]) -> None:
    trunk = policy_trunk(load_model(folders["llama"], dtype="bfloat16"))
    report = both_ways(trunk, some_groups(5), "policy")
    assert report.layout == "packed" and report.found.gap < 2e-5
    assert trunk.compute_dtype is None and trunk.models["policy"].dtype == torch.bfloat16


def test_bfloat16_compute_is_checked_in_float32_and_kept(folders: dict[str, Path]) -> None:
    trunk = policy_trunk(load_model(folders["llama"]), compute_dtype=torch.bfloat16)
    assert both_ways(trunk, some_groups(5), "policy").found.gap < 2e-5
    assert trunk.compute_dtype == torch.bfloat16


def test_no_groups_is_no_error(folders: dict[str, Path]) -> None:
    trunk: Trunk = policy_trunk(load_model(folders["llama"]))
    assert both_ways(trunk, [], "policy").layout == "packed"
