"""What is saved is an ordinary folder: the same tokens and the same scores in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CONFIGS, VOCAB, some_groups, untouched_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from kilter.errors import ModelError, RunError
from kilter.models.build import load_reward_model, policy_trunk, ppo_trunk, reward_trunk
from kilter.models.load import load_model, load_tokenizer, weights_hash
from kilter.models.roles import Lora
from kilter.models.save import save_causal_lm, save_reward_model
from kilter.models.trunk import Trunk
from kilter.tree import Group, Response, make_tree

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
REWARDED = [family for family in CONFIGS if family not in ("granite", "cohere", "mamba")]


def tokenizer_with(**special: str) -> Any:
    """Words `t0` to `t60`; the named special tokens are words of it."""
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def stirred(trunk: Trunk) -> Trunk:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if ".lora_" in name or name.startswith("heads."):
                parameter.normal_(std=0.3, generator=generator)
    return trunk


@pytest.mark.parametrize("lora", [None, Lora(3)], ids=["whole", "adapter"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_policy_gives_the_same_tokens(family: str, lora: Lora | None, tmp_path: Path) -> None:
    source = untouched_model(family)
    source.generation_config.eos_token_id = [2, 5]
    source.save_pretrained(tmp_path / "base")
    trunk = stirred(policy_trunk(tmp_path / "base", lora=lora, generator=torch.Generator().manual_seed(0)))
    save_causal_lm(trunk, "policy", tmp_path / "result", tokenizer_with(eos_token="t2", pad_token="t0"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result").eval()
    prompt = torch.tensor([[7, 8, 9, 10]])
    trunk.eval()
    with torch.no_grad(), trunk.acting_as("policy") as model:
        ours = model.generate(prompt, max_new_tokens=24, do_sample=False)
        theirs = plain.generate(prompt, max_new_tokens=24, do_sample=False)
        # In float64, so that what is left is the merged weights' rounding: in float32 a router amplifies that of the
        # sums, differently on each processor. Of the ways to run experts only the plain one takes float64.
        for each in (plain.double(), model.double()):
            each.set_experts_implementation("eager")
        torch.testing.assert_close(plain(ours).logits, model(ours).logits, rtol=1e-4, atol=2e-4)
    assert ours.tolist() == theirs.tolist()
    assert plain.generation_config.eos_token_id == [2, 5]
    tokenizer = load_tokenizer(tmp_path / "result")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 2
    published = json.loads((tmp_path / "base/config.json").read_text())
    saved = json.loads((tmp_path / "result/config.json").read_text())
    if family == "gemma2":
        assert saved.pop("attn_implementation") == "eager"  # the default there drops the cap on attention scores
    assert saved == published  # dropout, window and all as they were
    about = json.loads((tmp_path / "result/kilter.json").read_text())
    assert about["role"] == "policy"
    if lora is not None:
        assert about["trunk"] == weights_hash(tmp_path / "base")
        assert (tmp_path / "result/adapter/adapter_model.safetensors").is_file()


def test_saved_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    untouched_model("llama").save_pretrained(tmp_path / "base")
    trunk = stirred(policy_trunk(tmp_path / "base", lora=Lora(3), generator=torch.Generator().manual_seed(0)))
    save_causal_lm(trunk, "policy", tmp_path / "result", tokenizer_with(eos_token="t2"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "result/adapter").eval()
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad(), trunk.acting_as("policy") as model:
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def scores_in_transformers(folder: Path, groups: list[Group], side: str) -> torch.Tensor:
    """As a user of the folder reads them: the tokenizer pads, the classifier finds the last token."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    paths = [list(group.prompt + response.ids) for group in groups for response in group.responses]
    inputs = tokenizer.pad({"input_ids": paths}, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(-1)


def ending_with(end: int) -> list[Group]:
    return [
        Group(group.prompt, tuple(Response((*response.ids, end)) for response in group.responses))
        for group in some_groups(6)
    ]


@pytest.mark.parametrize(
    "special",
    [
        {"eos_token": "t2", "pad_token": "t0"},
        {"eos_token": "t2", "pad_token": "t2"},
        {"eos_token": "t2", "pad_token": "t2", "unk_token": "t0"},
        {"eos_token": "t2", "pad_token": "t2", "unk_token": "t2", "bos_token": "t2"},
        {"eos_token": "t2"},
    ],
    ids=["own pad", "pad is end", "unknown is free", "all one token", "no pad"],
)
def test_scores_are_the_same_in_transformers(special: dict[str, str], tmp_path: Path) -> None:
    """Whatever the tokenizer pads with: transformers reads the score where the tree says the response ends."""
    untouched_model("llama").save_pretrained(tmp_path / "base")
    trunk = reward_trunk(tmp_path / "base", generator=torch.Generator().manual_seed(0))
    groups = ending_with(2)
    with torch.no_grad():
        ours = trunk(make_tree([groups]), {"reward": "rewards"})["reward"]
    tokenizer = tokenizer_with(**special)
    before = dict(tokenizer.special_tokens_map)
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer)
    assert dict(tokenizer.special_tokens_map) == before  # the caller's tokenizer is left alone
    theirs = scores_in_transformers(tmp_path / "result", groups, "right")
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    again = load_reward_model(tmp_path / "result")
    with torch.no_grad():
        loaded = again(make_tree([groups]), {"reward": "rewards"})["reward"]
    torch.testing.assert_close(loaded, ours, rtol=1e-6, atol=1e-6)


def test_reward_model_is_published_with_its_dropout(tmp_path: Path) -> None:
    untouched_model("gpt2").save_pretrained(tmp_path / "base")
    trunk = reward_trunk(tmp_path / "base", generator=torch.Generator().manual_seed(0))
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer_with(eos_token="t2", pad_token="t0"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "result").attn_pdrop == 0.1
    again = load_reward_model(tmp_path / "result")
    save_reward_model(again, "reward", tmp_path / "again", tokenizer_with(eos_token="t2", pad_token="t0"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").attn_pdrop == 0.1


@pytest.mark.parametrize("family", REWARDED)
def test_every_family_saves_a_reward_model(family: str, tmp_path: Path) -> None:
    untouched_model(family).save_pretrained(tmp_path / "base")
    trunk = reward_trunk(tmp_path / "base", generator=torch.Generator().manual_seed(0))
    groups = ending_with(2)
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer_with(eos_token="t2", pad_token="t2"))
    with torch.no_grad():
        ours = trunk(make_tree([groups]), {"reward": "rewards"})["reward"]
    theirs = scores_in_transformers(tmp_path / "result", groups, "right")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_pad_never_is_an_end_that_the_caller_names(tmp_path: Path) -> None:
    untouched_model("llama").save_pretrained(tmp_path / "base")
    trunk = reward_trunk(tmp_path / "base", generator=torch.Generator().manual_seed(0))
    groups = ending_with(4)
    tokenizer = tokenizer_with(eos_token="t2", pad_token="t4")
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer, end_ids={4})
    with torch.no_grad():
        ours = trunk(make_tree([groups]), {"reward": "rewards"})["reward"]
    for side in ("right", "left"):
        theirs = scores_in_transformers(tmp_path / "result", groups, side)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_adapter_reward_model_is_merged_and_kept(tmp_path: Path) -> None:
    untouched_model("qwen3").save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    trunk = stirred(reward_trunk(tmp_path / "base", lora=Lora(3), generator=generator))
    groups = ending_with(2)
    save_reward_model(trunk, "reward", tmp_path / "result", tokenizer_with(eos_token="t2", pad_token="t0"))
    with torch.no_grad():
        ours = trunk(make_tree([groups]), {"reward": "rewards"})["reward"]
    torch.testing.assert_close(scores_in_transformers(tmp_path / "result", groups, "right"), ours, rtol=1e-4, atol=1e-4)
    shared = ppo_trunk(tmp_path / "base", tmp_path / "result", lora=Lora(2), generator=generator)
    apart = ppo_trunk(tmp_path / "base", tmp_path / "result", generator=generator)
    untouched_model("qwen3", seed=1).save_pretrained(tmp_path / "other")
    two = ppo_trunk(tmp_path / "other", tmp_path / "result", lora=Lora(2), generator=generator)
    assert list(shared.models) == ["policy"] and list(apart.models) == ["policy", "reference", "value"]
    assert list(two.models) == ["policy", "value"]  # trained on another trunk: an adapter on the reward model itself
    with torch.no_grad():
        for other in (shared, apart, two):
            values = other(make_tree([groups]), {"value": "rewards"})["value"]
            torch.testing.assert_close(values, ours, rtol=1e-4, atol=1e-4)


def test_wrong_roles_are_refused(tmp_path: Path) -> None:
    policy = policy_trunk(untouched_model("llama"))
    with pytest.raises(ModelError, match="no scalar head"):
        save_reward_model(policy, "policy", tmp_path / "x", tokenizer_with(eos_token="t2"))
    reward = reward_trunk(untouched_model("llama"), generator=torch.Generator())
    with pytest.raises(ModelError, match="no language head"):
        save_causal_lm(reward, "reward", tmp_path / "x", tokenizer_with(eos_token="t2"))
    assert not (tmp_path / "x").exists()


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = policy_trunk(untouched_model("llama"))
    tokenizer = tokenizer_with(eos_token="t2")
    save_causal_lm(trunk, "policy", tmp_path / "result", tokenizer)
    before = weights_hash(tmp_path / "result")
    with torch.no_grad():
        trunk.models["policy"].model.norm.weight.add_(1)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(RunError, match="disk is full"):
        save_causal_lm(trunk, "policy", tmp_path / "result", tokenizer)
    assert weights_hash(tmp_path / "result") == before


def test_real_model_with_two_end_tokens(shared_models: Path, tmp_path: Path) -> None:
    """The 260K-parameter story model: tied embeddings, `<unk>` as pad, two end tokens in its generation config."""
    source = shared_models / "stories260K" / "hf"
    tokenizer = load_tokenizer(source)
    trunk = policy_trunk(load_model(source))
    save_causal_lm(trunk, "policy", tmp_path / "result", tokenizer)
    assert weights_hash(tmp_path / "result") == weights_hash(source)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    assert plain.generation_config.eos_token_id == [1, 2]
    ids = torch.tensor([[1]])
    with torch.no_grad():
        text = tokenizer.decode(plain.generate(ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was")
    rewarder = reward_trunk(load_model(source), generator=torch.Generator().manual_seed(0))
    save_reward_model(rewarder, "reward", tmp_path / "reward", tokenizer)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "reward").pad_token_id == 0
    groups = ending_with(1)
    with torch.no_grad():
        ours = rewarder(make_tree([groups]), {"reward": "rewards"})["reward"]
    theirs = scores_in_transformers(tmp_path / "reward", groups, "right")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
