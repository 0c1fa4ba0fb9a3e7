"""Loading: dropout off and remembered, safetensors only, and errors that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import config_of, untouched_model

from kilter.errors import ModelError
from kilter.models.build import load_reward_model, policy_trunk, reward_trunk
from kilter.models.load import load_model, load_tokenizer, remove_dropout, weights_hash
from kilter.models.roles import Lora


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    untouched_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_dropout_is_off_and_remembered(tmp_path: Path) -> None:
    untouched_model("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.training and model.config.attn_pdrop == 0 and model.kilter_origin.attn_pdrop == 0.1
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_every_random_field_is_found() -> None:
    assert set(remove_dropout(config_of("gpt2"))) == {
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "summary_first_dropout",
    }
    assert set(remove_dropout(config_of("mixtral"))) == {"router_jitter_noise"}
    opt = config_of("opt")
    assert remove_dropout(opt) == {"dropout": 0.1, "layerdrop": 0.1}
    assert opt.dropout == opt.layerdrop == 0


def test_attention_is_the_right_one(tmp_path: Path) -> None:
    for family, attention in (("gemma2", "eager"), ("gemma3", "sdpa")):
        untouched_model(family).save_pretrained(tmp_path / family)
        assert load_model(tmp_path / family).config._attn_implementation == attention


def test_dtype(folder: Path) -> None:
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"dtype is 'fp8'; choose one of float32"):
        load_model(folder, dtype="fp8")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="empty"):
        load_model("")
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer("./nowhere")


def test_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{folder}: cannot load the model"):
        load_model(folder)


def test_damaged_weights_and_an_impossible_configuration_are_one_line(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", weights[: len(weights) // 2], b"x" * 100):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match=f"{folder}: its weights cannot be read"):
            load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ModelError, match=f"{folder}: cannot read the model's configuration"):
        load_model(folder)


def test_a_reward_model_is_no_language_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(ModelError, match=r"is a reward model.*cannot write"):
        load_model(folder)


def test_weights_that_do_not_fill_the_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"weights do not fill LlamaForCausalLM: model\.layers\.2"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 70}))
    with pytest.raises(ModelError, match=r"embed_tokens|lm_head"):
        load_model(folder)


def test_unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=str(folder)):
        load_model(folder)


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    (folder / "evil.py").write_text("raise SystemExit('code from the folder ran')\n")
    with pytest.raises(ModelError):
        load_model(folder)


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_hash_is_of_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    first = weights_hash(model)
    assert first == weights_hash(folder) == weights_hash(str(folder))
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    assert weights_hash(copied) == first
    trunk = policy_trunk(model, lora=Lora(2), generator=torch.Generator())
    assert weights_hash(trunk.models["policy"]) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert weights_hash(model) != first


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = untouched_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert weights_hash(model) == weights_hash(tmp_path)


def test_foreign_reward_model(tmp_path: Path) -> None:
    """Saved by transformers alone; the score is read at the last token, as there."""
    config = config_of("llama")
    config.num_labels = 1
    foreign = transformers.LlamaForSequenceClassification(config).eval()
    foreign.save_pretrained(tmp_path / "one")
    trunk = load_reward_model(tmp_path / "one")
    assert list(trunk.roles) == ["reward"]
    config.num_labels = 2
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="2 labels; a reward model has one"):
        load_reward_model(tmp_path / "two")
    encoder = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9, num_labels=1
    )
    transformers.BertForSequenceClassification(encoder).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="does not end with one linear layer `score`"):
        load_reward_model(tmp_path / "bert")


def test_a_reward_model_that_could_not_be_saved_is_refused_before_training() -> None:
    with pytest.raises(ModelError, match="granite"):
        reward_trunk(untouched_model("granite"), generator=torch.Generator())
