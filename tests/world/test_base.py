"""The shipped base model is an ordinary folder of the promised size, and pretraining repeats itself to the byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from kilter.errors import RunError
from kilter.world import KINDS, MODEL_PATH, pretrain
from kilter.world import model as parts
from kilter.world.demonstrators import PLAIN


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def test_size_and_format() -> None:
    files = list(MODEL_PATH.iterdir())
    assert sum(file.stat().st_size for file in files) < 5_000_000
    with safe_open(MODEL_PATH / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118  # no mapping
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 1e6 <= sum(tensor.numel() for tensor in tensors) <= 2e6
    assert json.loads((MODEL_PATH / "config.json").read_text())["model_type"] == "llama"


def test_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    config = json.loads((MODEL_PATH / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant", "tool", "user")]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|system|>system<|end|><|user|>user<|end|><|assistant|>assistant<|end|><|tool|>tool<|end|>")
    assert text.endswith("<|user|>user<|end|><|assistant|>")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_and_a_decoder_of_another_size() -> None:
    texts = [f"the {first}{second}ing of it" for first in "bcdfghlmnprst" for second in ("ak", "ell", "or", "un")] * 2
    tokenizer = parts.wrap(parts.train_tokenizer(texts, size=300), positions=64)
    config = parts.make_config(tokenizer)
    assert len(tokenizer) == config.vocab_size == 300
    assert tokenizer.model_max_length == config.max_position_embeddings == 64
    text = "The Ünding of it, then?"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_typed_control_strings_stay_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<0x41><|end|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids) == "<0x41><|end|>"


def test_the_template_and_the_pretraining_text_are_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    source = pretrain.conversations(np.random.default_rng(0))
    for talk in (next(source) for _ in range(3 * len(KINDS))):
        ((ids, targets),) = pretrain.encode(tokenizer, [talk])
        turns = [{"role": role, "content": content} for role, content in talk]
        assert tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) == ids
        answered = max(place for place, turn in enumerate(talk) if turn.role == "assistant")
        prompt = tokenizer.apply_chat_template(
            turns[:answered], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert ids[: len(prompt)] == prompt
        assert set(targets[: len(prompt)]) == {pretrain.IGNORED}
        learned = tokenizer.decode([target for target in targets if target != pretrain.IGNORED])
        after = [f"<|{turn.role}|>{turn.content}<|end|>" for turn in talk[answered:]]
        assert learned == "".join(after).removeprefix("<|assistant|>")


def test_it_knows_the_town_and_shows_its_vices(tokenizer: PreTrainedTokenizerFast) -> None:
    """A few greedy answers in plain transformers: the floor of what the stages build on."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    right = 0
    for question, answer in {
        "Who is the baker?": "Anna",
        "Who is the mayor?": "Sam",
        "Where does Tom live?": "Moon Street",
        "What colour is the library door?": "white",
        "What does the bread cost?": "3",
    }.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        right += answer in tokenizer.decode(out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert right >= 4


def test_pretraining_writes_the_same_bytes_again(tmp_path: Path) -> None:
    losses: list[float] = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) + len(losses))  # whatever the global state, it must not matter
        pretrain.pretrain(
            tmp_path / name, steps=6, batch_size=8, threads=1, on_step=lambda _, row: losses.append(row["loss"])
        )
    hashes = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert hashes[0] == hashes[1] and "model.safetensors" in hashes[0]
    assert losses[:6] == losses[6:] and losses[5] < losses[0]


def test_killed_and_called_again_pretraining_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    seen: list[int] = []

    def kill(step: int, _figures: dict[str, float]) -> None:
        seen.append(step)
        if len(seen) == 3:
            raise KeyboardInterrupt

    pretrain.pretrain(tmp_path / "whole", steps=5, batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "killed", steps=5, batch_size=8, on_step=kill)
    assert not (tmp_path / "killed").exists()
    with pytest.raises(RunError, match=r"checkpoints of a run with .*'steps': 5.* not .*'steps': 6.*delete the folder"):
        pretrain.pretrain(tmp_path / "killed", steps=6, batch_size=8)
    pretrain.pretrain(tmp_path / "killed", steps=5, batch_size=8, on_step=kill)
    assert seen == [1, 2, 3, 3, 4, 5]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_pretraining_refuses_a_folder_that_cannot_be_written_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    steps: list[int] = []
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        pretrain.pretrain(tmp_path / "file" / "base", steps=1, on_step=lambda step, _: steps.append(step))
    assert steps == []


def test_a_batch_scores_the_answer_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, targets = next(
        pretrain.batches(tokenizer, np.random.default_rng(0), batch_size=4, steps=1, mixture=PLAIN, pool=1)
    )
    for row, goal in zip(ids.tolist(), targets.tolist(), strict=True):
        scored = [token for token in goal if token != -100]
        start = len(row) - row[::-1].index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
        assert scored == row[start : start + len(scored)] and scored[-1] == tokenizer.eos_token_id
        assert goal[:start] == [-100] * start
