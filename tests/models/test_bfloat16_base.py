"""A base in bfloat16 below adapters: half the memory, the numbers and the result of one in float32 that computes so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import some_groups, trained_model, untouched_model
from torch import Tensor

from kilter.errors import CheckError, ModelError
from kilter.models.build import policy_trunk, ppo_trunk, reward_trunk
from kilter.models.check import both_ways
from kilter.models.load import load_model, load_tokenizer, weights_hash
from kilter.models.quantized import Base, base_of, low_precision_layers
from kilter.models.roles import Lora, adapter_parameters
from kilter.models.save import save_causal_lm, save_reward_model
from kilter.models.trunk import Trunk
from kilter.train.loop import TrainState, train_step
from kilter.train.objectives import sft
from kilter.train.optimizer import make_optimizer
from kilter.tree import make_batches, make_tree
from kilter.world import MODEL_PATH

COMPUTE: dict[str, Any] = {"compute_dtype": torch.bfloat16}
FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "qwen3_moe", "mamba")


def trunk_in(base: Base, family: str = "llama") -> Trunk:
    with tempfile.TemporaryDirectory() as folder:  # loaded in bfloat16, not rounded afterwards
        trained_model(family).save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        return policy_trunk(folder, lora=Lora(4), generator=generator, compute_dtype=torch.bfloat16, base=base)


def trained(trunk: Trunk, steps: int = 3) -> list[Tensor]:
    """The adapter after some steps."""
    objective = sft()
    trunk.train_only(*objective.roles)
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=0.02))
    for _ in range(steps):
        train_step(state, objective, make_batches(some_groups(6), row_tokens=64, batch_tokens=256))
    return [parameter.detach().clone() for parameter in adapter_parameters(trunk.models["policy"], "policy")]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_the_bits_that_they_learn_on_a_float32_base(family: str) -> None:
    low, whole = trunk_in("bfloat16", family), trunk_in("float32", family)
    base = weights_hash(low.models["policy"])
    ours, theirs = trained(low), trained(whole)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(value.any() for value in ours[1::2]), "it learns"
    assert {p.dtype for name, p in low.models.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {value.dtype for value in ours} == {torch.float32} and weights_hash(low.models["policy"]) == base


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_the_check_at_the_start_is_in_float32_and_leaves_no_trace(family: str, checkpointing: bool) -> None:
    trunk = trunk_in("bfloat16", family)
    trunk.set_checkpointing(checkpointing)
    trained(trunk)
    tree = make_tree([some_groups(4)])
    with torch.no_grad():
        before = trunk(tree, {"policy": "logprobs"})["policy"]
    for role in ("policy", "reference"):
        found = both_ways(trunk, some_groups(5), role).found
        assert found.gap <= 1e-4 and (found.gradient_gap or 0.0) <= 1e-3, "far below what bfloat16 would differ by"
    with torch.no_grad():
        assert torch.equal(trunk(tree, {"policy": "logprobs"})["policy"], before)
        with trunk.in_float32("policy"):
            exact = trunk(tree, {"policy": "logprobs"})["policy"]
    assert float((exact - before).abs().max()) > 1e-3, "which is not what is trained in"
    assert trunk.compute_dtype == torch.bfloat16


def test_the_check_reads_a_vocabulary_in_chunks() -> None:
    """Of 150,000 tokens the head is computed for some hundred positions at once, and again in the backward."""
    with tempfile.TemporaryDirectory() as folder:
        untouched_model("llama", vocab_size=150_000).save_pretrained(folder)
        trunk = policy_trunk(folder, lora=Lora(2), generator=torch.Generator(), base="bfloat16", **COMPUTE)
    found = both_ways(trunk, some_groups(12), "policy").found
    assert found.gap <= 1e-4 and found.gradient_gap is not None


def test_the_check_makes_one_layer_whole_at_a_time() -> None:
    """No linear layer's weight is kept in float32 for the backward, and there are no copies of them."""
    trunk = trunk_in("bfloat16")
    trunk.train_only("policy")
    layers = low_precision_layers(trunk.models["policy"])
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    shapes = {tuple(layer.weight.shape) for layer in layers.values()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        trunk.in_float32("policy"),
        trunk.lowered(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        assert {layer.weight.dtype for layer in layers.values()} == {torch.bfloat16}
        trunk(make_tree([some_groups(4)]), {"policy": "logprobs"})["policy"].sum().backward()
    weights = [tensor for tensor in kept if tuple(tensor.shape) in shapes and tensor.dtype == torch.bfloat16]
    whole = [t for t in kept if t.dtype == torch.float32 and tuple(t.shape) in shapes and not t.requires_grad]
    assert len(weights) == len(layers) - 3 and not whole, "of the first query, key and value no gradient goes on"


def test_the_check_sees_a_fault_above_such_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = trunk_in("bfloat16")
    norm: Any = trunk.models["policy"].get_submodule("model.layers.1.input_layernorm")
    norm.register_forward_hook(lambda _module, _args, out: out * 1.01)
    with pytest.raises(CheckError, match="even one padded row per response differs"):
        both_ways(trunk, some_groups(5), "policy")


def test_a_model_that_reads_its_layers_weights_is_refused() -> None:
    """Mamba multiplies by one of them itself, past any adapter on it."""
    with pytest.raises(ModelError, match=r"reads the weights of a linear layer itself.*set precision\.base to float32"):
        both_ways(trunk_in("bfloat16", "mamba"), some_groups(5), "policy")


def test_memory_that_runs_out_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = trunk_in("bfloat16")

    def full(*_args: Any, **_more: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trunk, "_answers", full)
    with pytest.raises(torch.OutOfMemoryError):
        both_ways(trunk, some_groups(5), "policy")
    assert trunk.layout == "packed"


def test_layers_of_a_linear_layers_kind_are_known_too() -> None:
    """Falcon's are a class of its own, which has the adapters of any."""
    config = transformers.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as folder:
        transformers.FalconForCausalLM(config).save_pretrained(folder)
        trunk = policy_trunk(folder, lora=Lora(2), generator=torch.Generator(), base="bfloat16", **COMPUTE)
    model = trunk.models["policy"]
    assert base_of(model) == "bfloat16" and len(low_precision_layers(model)) == 2 * 4
    assert both_ways(trunk, some_groups(5), "policy").found.gap <= 1e-4


def test_whole_weights_are_not_trained_in_it() -> None:
    with pytest.raises(ModelError, match="base is bfloat16 and there is no lora"):
        policy_trunk(MODEL_PATH, base="bfloat16")


@pytest.fixture(scope="module")
def finer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's model with weights that bfloat16 rounds."""
    folder = tmp_path_factory.mktemp("finer")
    model = load_model(MODEL_PATH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(folder)
    load_tokenizer(MODEL_PATH).save_pretrained(folder)
    return folder


def test_saved_it_is_the_model_that_was_trained(finer: Path, tmp_path: Path) -> None:
    trunk = policy_trunk(
        finer, lora=Lora(4), generator=torch.Generator().manual_seed(0), compute_dtype=torch.bfloat16,
        base="bfloat16",
    )  # fmt: skip
    trained(trunk)
    base, tree = weights_hash(trunk.models["policy"]), make_tree([some_groups(5)])
    for role in ("policy", "reference"):
        save_causal_lm(trunk, role, tmp_path / role, load_tokenizer(finer))
        assert json.loads((tmp_path / role / "kilter.json").read_text())["base"] == "bfloat16"
        saved = policy_trunk(load_model(tmp_path / role, dtype="bfloat16"))
        assert saved.models["policy"].dtype == torch.bfloat16
        with torch.no_grad():
            ours, theirs = trunk(tree, {role: "logprobs"})[role], saved(tree, {"policy": "logprobs"})["policy"]
        assert float((ours - theirs).abs().mean()) < 0.05
        assert (weights_hash(saved.models["policy"]) == base) == (role == "reference")
        frozen = [p for name, p in trunk.models["policy"].named_parameters() if ".lora_" not in name]
        assert not any(p.requires_grad for p in frozen), "saving wakes nothing"


def test_all_of_ppos_models_stand_on_it(finer: Path, tmp_path: Path) -> None:
    """The value on the policy's model where the reward model was an adapter on the same, else on the reward model's; it
    says what it says on a float32 base that computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    reward = reward_trunk(finer, generator=generator, lora=Lora(2), base="bfloat16", **COMPUTE)
    save_reward_model(reward, "reward", tmp_path / "adapter", load_tokenizer(finer))
    whole = reward_trunk(finer, generator=generator)
    save_reward_model(whole, "reward", tmp_path / "whole", load_tokenizer(finer))
    tree = make_tree([some_groups(5)])
    for folder, models in (("adapter", {"policy"}), ("whole", {"policy", "value"})):
        trunk = ppo_trunk(finer, tmp_path / folder, lora=Lora(2), generator=generator, base="bfloat16", **COMPUTE)
        assert set(trunk.models) == models
        for model in trunk.models.values():
            frozen = [p for name, p in model.named_parameters() if ".lora_" not in name]
            assert {p.dtype for p in frozen} == {torch.bfloat16} and not any(p.requires_grad for p in frozen)
        assert both_ways(trunk, some_groups(5), "value").found.gap <= 1e-4
        (head,) = trunk.heads.values()
        given = reward if folder == "adapter" else whole
        assert torch.equal(head.weight, given.heads["reward"].weight), "nor is its head rounded"
    held = ppo_trunk(finer, tmp_path / "whole", lora=Lora(2), generator=generator, **COMPUTE)
    with torch.no_grad():
        ours, theirs = (one(tree, {"value": "values"})["value"] for one in (trunk, held))
    assert torch.equal(ours, theirs)
