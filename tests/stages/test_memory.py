"""What a dry run says of memory: an 8B model on a 24 GB card, the figures from its shape by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kilter import align
from kilter.cli.main import main
from kilter.config import parse
from kilter.errors import ConfigError, ModelError
from kilter.models import quantized
from kilter.report.needs import NF4_BYTES
from kilter.stages import plan
from kilter.stages.training import check_machine

GIB = 2**30
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
EMBEDDINGS = 2 * 128_256 * 4096
ADAPTER = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
GPU = {"compute": "bfloat16", "device": "cuda"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration, without weights or tokenizer."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    (tmp_path / "rules.yaml").write_text("rules: [{rule: number, key: value}]")
    return tmp_path / "llama"


def said(folder: Path, memory: float = 24, **change: Any) -> str:
    rules = str(folder.parent / "rules.yaml")
    stage = {"stage": "rl", "model": str(folder), "reward": rules, "prompts": "prompts.jsonl", **change}
    return plan(parse({"stages": {"rl": stage}}, ""), memory)


def gib_of(text: str, name: str) -> float:
    (line,) = [line for line in text.splitlines() if name in line and " GiB  " in line]
    return float(line.split(" GiB")[0])


def test_an_8b_policy_in_4_bits_by_hand(folder: Path) -> None:
    assert pytest.approx(4.127, abs=5e-4) == NF4_BYTES * 8
    more = {"algorithm": "grpo", "lora": {"rank": 16}, "precision": {**GPU, "base": "nf4"}}
    text = said(folder, **more, optim={"batch_tokens": 2048}, sampling={"batch_size": 16})
    in_4_bits = LINEAR / 2 + LINEAR / 64 + LINEAR / (64 * 256) * 4 + 2 * EMBEDDINGS
    assert gib_of(text, "policy, frozen in 4 bits") == pytest.approx(in_4_bits / GIB, abs=6e-4)
    assert gib_of(text, "policy: adapter") == pytest.approx(16 * ADAPTER / GIB, abs=6e-4)
    assert gib_of(text, "copies in bfloat16") == pytest.approx(2 * ADAPTER / GIB, abs=6e-4)
    step = 2048 * 2 * 32 * (2 * 4096 + 3 * 14_336 + 2 * 4096)
    assert gib_of(text, "activations of 2048") == pytest.approx(step / GIB, abs=6e-4)
    whole = in_4_bits + 18 * ADAPTER + step
    assert gib_of(text, "in all") == pytest.approx(whole / GIB, abs=2e-3)
    assert "it fits into 24.0 GiB" in text and "no first batch: " in text
    in_bfloat16 = said(folder, **more | {"precision": {**GPU, "base": "bfloat16"}}, sampling={"batch_size": 16})
    assert gib_of(in_bfloat16, "policy, frozen in bfloat16") == pytest.approx(2 * (LINEAR + EMBEDDINGS) / GIB, abs=6e-4)
    assert gib_of(in_bfloat16, "copies in bfloat16") == pytest.approx(2 * ADAPTER / GIB, abs=6e-4)


def test_what_to_change_in_order_and_what_each_saves(folder: Path) -> None:
    """PPO of every weight, rewarded by a model of the same shape: float32, four of them."""
    text = said(folder, reward=str(folder), precision=GPU)
    parameters = LINEAR + EMBEDDINGS
    assert "resident in this stage: four models: policy, reference, value, reward: " in text
    assert gib_of(text, "policy: weights, gradient, AdamW") == pytest.approx(16 * parameters / GIB, abs=6e-4)
    assert gib_of(text, "reference, frozen") == pytest.approx(4 * parameters / GIB, abs=6e-4)
    found = text.split("it does not fit into 24.0 GiB")[1].splitlines()[1:]
    steps = [line for line in found if "GiB less" in line]
    names = ["lora.rank 16", "precision.base bfloat16", "precision.base nf4", "policy.value_from policy"]
    for line, name in zip(steps, names, strict=False):
        assert line.strip().startswith(name)
    left = [float(line.split("less, ")[1].split(" in all")[0]) for line in steps]
    assert left == sorted(left, reverse=True) and len(steps) == 6
    # Two trained whole, a reference, copies of all three -> two frozen, an adapter on each, copies of these.
    lora = (2 * 16 + 4 + 3 * 2) * parameters - 2 * (4 * parameters + 16 * ADAPTER) - 2 * 2 * (parameters + ADAPTER)
    lora -= 8 * LINEAR - 32 * GIB  # what the check at the start makes takes the place of keys and values
    assert float(steps[0].split(": ")[-1].split(" GiB")[0]) == pytest.approx(lora / GIB, abs=0.006)
    assert "even so it does not fit: take a smaller model and reward model" in text  # 30 GiB of frozen reward model
    assert "it fits into 640.0 GiB" in said(folder, 640, reward=str(folder), precision=GPU)


def test_no_remedy_is_told_that_would_be_refused(folder: Path) -> None:
    heads = {"kind": "ensemble", "own_adapters": True, "bootstrap": False}
    stage = {"stage": "reward", "model": str(folder), "data": "p.jsonl", "lora": {"rank": 16}, "precision": GPU}
    text = plan(parse({"stages": {"reward": {**stage, "heads": heads}}}, ""), 24)
    assert "it does not fit into 24.0 GiB" in text and "precision.base" not in text.split("it does not fit")[1]
    assert "precision.base bfloat16" in plan(parse({"stages": {"reward": stage}}, ""), 24)


def test_a_rule_in_place_of_the_reward_model_and_an_adapter_fit_a_24_gb_card(folder: Path) -> None:
    text = said(folder, precision=GPU)
    steps = [line for line in text.splitlines() if "GiB less" in line]
    assert "lora.rank 16" in steps[0] and "precision.base bfloat16" in steps[1] and "precision.base nf4" in steps[2]
    assert float(steps[-1].split("less, ")[1].split(" in all")[0]) <= 24 and "even so" not in text


def test_what_a_guard_a_sheet_and_an_engine_hold_is_counted(folder: Path) -> None:
    """Reward models wherever they are named; the copy that is put back; vLLM's share of a GPU."""
    parameters, lora = LINEAR + EMBEDDINGS, {"rank": 16}
    plain = said(folder, precision=GPU)
    assert "three models: policy, reference, value: " in plain and "further" not in plain and "guard keeps" not in plain
    sheet = folder.parent / "with_model.yaml"
    sheet.write_text(f"rules: [{{model: '{folder}'}}, {{rule: number, key: value}}]")
    canary = {"prompts": "p.jsonl", "reward": str(folder)}
    watched = {"action": "warn", "actions": {"longer": "roll_back"}, "probe": str(folder), "canaries": [canary]}
    text = said(folder, reward=str(sheet), guard=watched, lora=lora, precision=GPU)
    assert gib_of(text, "further reward models, 3, frozen") == pytest.approx(3 * 4 * parameters / GIB, abs=2e-3)
    assert gib_of(text, "copy of the policy that the guard keeps") == pytest.approx(4 * ADAPTER / GIB, abs=6e-4)
    assert "one model: policy, reference and value on one; 3 further reward models" in text
    whole = said(folder, guard={"action": "stop"}, precision=GPU)
    assert gib_of(whole, "copy of the policy that the guard keeps") == pytest.approx(4 * parameters / GIB, abs=6e-4)
    engine = said(folder, sampler={"engine": "vllm", "memory": 0.25}, algorithm="grpo", lora=lora, precision=GPU)
    assert gib_of(engine, "vLLM, sampler.memory 0.25 of the GPU") == 6.0 and "keys and values of" not in engine
    beside = said(folder, sampler={"engine": "vllm", "url": "http://127.0.0.1:1"}, algorithm="grpo", precision=GPU)
    assert "vLLM" not in beside.split("stage rl")[1]


def test_the_check_at_the_start_holds_the_linear_layers_with_the_adapter_merged(folder: Path) -> None:
    """Of a float32 base, else embeddings and head; where a step's activations are more, those are told."""
    few = {"optim": {"batch_tokens": 512}, "sampling": {"batch_size": 4}, "precision": GPU, "lora": {"rank": 16}}
    assert gib_of(said(folder, **few), "for the check at the start") == pytest.approx(8 * LINEAR / GIB, abs=6e-4)
    for base in ("bfloat16", "nf4"):
        low = said(folder, **few | {"precision": {**GPU, "base": base}})
        assert gib_of(low, "for the check at the start") == pytest.approx(4 * EMBEDDINGS / GIB, abs=6e-4)
    more = few | {"optim": {"batch_tokens": 32768}}
    for change in (more, few | {"lora": {"rank": 0}}):
        assert "for the check at the start" not in said(folder, **change)


def test_a_cpu_holds_keys_and_values_in_float32_whatever_it_computes_in(folder: Path) -> None:
    """A token of this shape is 2 x 32 layers x 8 heads x 128 numbers."""
    sampling = {"batch_size": 16, "max_new_tokens": 64}
    sizes = []
    for device in ("cpu", "cuda"):
        precision = {"compute": "bfloat16", "device": device}
        optim = {"batch_tokens": 16, "max_tokens": 1024}
        text = said(folder, algorithm="rloo", num_samples=4, sampling=sampling, optim=optim, precision=precision)
        sizes.append(gib_of(text, "keys and values of 16 answers"))
    tokens = 16 * 64 + 4 * (1024 - 64)
    assert sizes == pytest.approx([tokens * 2 * 32 * 8 * 128 * number / GIB for number in (4, 2)], abs=6e-4)


def test_the_command_plans_for_another_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rl", "--model", str(folder), "--reward", "kilter.world:truth", "--prompts", "p.jsonl", "--dry-run"]
    words += ["--precision.device", "cuda", "--precision.compute", "bfloat16", "--memory", "24"]
    assert main(words) == 0
    assert "it does not fit into 24.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": {"base": "nf4"}}, "base is nf4 and compute float32"),
        ({"precision": {"base": "bfloat16"}}, "base is bfloat16 and compute float32"),
        ({"precision": {"base": "bfloat16", "compute": "bfloat16"}}, "precision.base is bfloat16 and lora.rank 0"),
        ({"precision": {"base": "nf4", "compute": "bfloat16"}}, "base is nf4 and device cpu"),
        ({"precision": {"attention": "flex"}}, "attention is flex and device cpu"),
        ({"precision": {**GPU, "base": "nf4"}}, "precision.base is nf4 and lora.rank 0"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({"stages": {"a": {"stage": "sft", "model": "m", "data": "d.jsonl", **change}}}, "")


def test_what_this_machine_lacks_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"stage": "sft", "model": "m", "data": "d.jsonl", "lora": {"rank": 2}, "precision": {**GPU, "base": "nf4"}}
    values = {"stages": {"a": stage}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"stages\.a\.precision\.device is cuda, and torch sees no CUDA device"):
        align(values, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def absent(_name: str) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(quantized.importlib, "import_module", absent)
    with pytest.raises(ModelError, match=r"stages\.a: a base in 4 bits needs bitsandbytes .*kilter\[gpu\]"):
        check_machine(parse(values, ""))


def test_a_dry_run_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demos = tmp_path / "demos.jsonl"
    demos.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    stage = {"stage": "sft", "model": "kilter.world:MODEL_PATH", "data": {"path": "demos.jsonl", "skip_bad": True}}
    assert "# stage sft (sft)" in plan(parse({"stages": {"sft": stage}}, "r"))
    assert list(tmp_path.iterdir()) == [demos]
