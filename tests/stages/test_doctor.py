"""`kilter doctor` on healthy set-ups of ten families, and on set-ups with one fault each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kilter import data, world
from kilter.cli import main
from kilter.models.load import load_tokenizer
from kilter.stages.doctor import examine

SIZES: dict[str, Any] = {
    "vocab_size": len(load_tokenizer(world.MODEL_PATH)) + 4,  # some families' tokenizers add tokens of their own
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
HEALTHY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "gemma2": ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **MIXED}),
    "phi3": ("Phi3", {"resid_pdrop": 0.1}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", {"n_positions": 256}),
    "gpt_neox": ("GPTNeoX", {"hidden_dropout": 0.1}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
}


def folder_of(path: Path, family: str) -> Path:
    """A tiny random model of a family with the world's tokenizer."""
    name, more = HEALTHY[family]
    config = getattr(transformers, f"{name}Config")(**(SIZES | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
    model.save_pretrained(path / family)
    load_tokenizer(world.MODEL_PATH).save_pretrained(path / family)
    return path / family


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "demos.jsonl"
    data.write(path, world.demonstrations(per_kind=2))
    return path


@pytest.mark.parametrize("family", HEALTHY)
def test_a_healthy_set_up_passes(family: str, tmp_path: Path, demos: Path) -> None:
    # OLMo-2 and Granite have no sequence classifier in transformers: said, because it is true, and nothing else is.
    verdicts = examine(str(folder_of(tmp_path, family)), str(demos))
    failed = [verdict.name for verdict in verdicts if not verdict.passed]
    known = type(transformers.AutoConfig.from_pretrained(tmp_path / family))
    expected = [] if known in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING else ["reward model"]
    assert failed == expected, [verdict.line for verdict in verdicts if not verdict.passed]


def test_it_prints_verdicts_and_a_template_without_end_is_no_reason_to_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path, "llama")
    assert main(["doctor", str(folder)]) == 0
    printed = capsys.readouterr().out
    for word in ("both ways", "sign of the reward", "sign of the KL", "EOS unscored", "doubled BOS", "empty mask"):
        assert f"ok    {word}" in printed
    assert "0 failed" in printed


def test_a_tokenizer_that_is_too_large_for_the_model_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<more-{number}>" for number in range(9)])
    tokenizer.save_pretrained(folder)
    failed = [verdict for verdict in examine(str(folder)) if not verdict.passed]
    assert [verdict.name for verdict in failed] == ["vocabulary"]


def test_a_doubled_bos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|system|>"}))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ bos_token }}" + template)
    assert main(["doctor", str(folder)]) == 2
    assert "BOS" in capsys.readouterr().err
