"""vLLM itself as the sampler, in this process and as a server: it has the policy's weights, and draws from its
distribution. Skips without vLLM."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from kilter.errors import ModelError
from kilter.models.build import policy_trunk
from kilter.models.generation import Completion, NativeSampler
from kilter.models.roles import Lora
from kilter.models.sampling import Sampling, Stops, draw_seeds
from kilter.models.trunk import Trunk
from kilter.models.vllm_sampler import Engine, InProcess, VllmSampler
from kilter.models.vllm_server import KEY, Served
from kilter.tree import Group, Response, make_batches

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
PROMPTS = [(1, 5, 9, 13), (1, 7, 7), (1, 20, 21, 22, 23, 24, 25, 26), (1, *(3 + at % 90 for at in range(150)))]
"""The last is longer than a block of keys and values that is kept for the next prompt that begins so."""
STOPS = Stops((2,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads as wide as vLLM's kernels for processors take, and distributions that differ by token."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "max_position_embeddings": 256}
    families.untouched_model("llama", vocab_size=96, **sizes).save_pretrained(path)
    return path


def move(trunk: Trunk, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trunk.parameters_of("policy"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def both(trunk: Trunk, sampler: VllmSampler, **sampling: Any) -> tuple[list[Completion], list[Completion]]:
    seeds = draw_seeds(torch.Generator().manual_seed(1), len(PROMPTS), 2)
    how = Sampling(max_new_tokens=12, **sampling)
    native = NativeSampler(trunk, "policy").sample(PROMPTS, seeds, sampling=how, stops=STOPS)
    theirs = sampler.sample(PROMPTS, seeds, sampling=how, stops=STOPS)
    return [one for row in native for one in row], [one for row in theirs for one in row]


def trained_gap(trunk: Trunk, drawn: list[Completion]) -> float:
    """Largest difference of a token's log-prob from the trunk's own, nats."""
    gaps = []
    for one in drawn:
        (batch,) = make_batches([Group(one.prompt, (Response(one.ids),))], row_tokens=256, batch_tokens=256)
        with torch.no_grad():
            own = trunk(batch.tree, {"policy": "logprobs"})["policy"]
        gaps.append(float((own - torch.tensor(one.logprobs)).abs().max()))
    return max(gaps)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where one listens that was started as the documentation says, with a key."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--model", folder, "--host", "127.0.0.1", "--port", port, "--tokens-only", "--skip-tokenizer-init"]
    options += ["--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", 8, "--dtype", "float32"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)]
    told = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", KEY: "sesame"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | told) as process:
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setenv(KEY, "sesame")
                _wait_for(f"http://127.0.0.1:{port}", process, log)
                yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            Served(url)
        except ModelError:
            time.sleep(1)
        else:
            return
    pytest.fail(log.read_text()[-3000:])


def engine(kind: str, rank: int, folder: Path, request: pytest.FixtureRequest) -> Engine:
    if kind == "server":
        return Served(request.getfixturevalue("server"))
    return InProcess(folder, rank=rank, dtype="float32", memory=0.1, max_tokens=256)


@pytest.fixture(
    scope="module", params=[(kind, rank) for kind in ("process", "server") for rank in (4, 0)], ids=lambda it: str(it)
)
def held(request: pytest.FixtureRequest, folder: Path) -> tuple[Trunk, VllmSampler]:
    """By an adapter first: a server keeps the whole weights that it was given last."""
    kind, rank = request.param
    trunk = policy_trunk(
        folder, reference=True, lora=Lora(rank) if rank else None, generator=torch.Generator().manual_seed(0)
    )
    return trunk, VllmSampler(trunk, "policy", engine(kind, rank, folder, request))


def test_it_draws_from_the_policy_as_it_is_now(held: tuple[Trunk, VllmSampler]) -> None:
    trunk, sampler = held
    for seed in range(3):
        native, theirs = both(trunk, sampler, temperature=0.0)
        assert [one.ids for one in theirs] == [one.ids for one in native], f"after {seed} updates"
        _, drawn = both(trunk, sampler)
        assert trained_gap(trunk, drawn) < 1e-3
        move(trunk, seed)
    _, stale = native, theirs
    assert [one.ids for one in both(trunk, sampler, temperature=0.0)[1]] != [one.ids for one in stale]


def test_a_sample_is_its_seeds_and_ends_where_kilter_ends_it(held: tuple[Trunk, VllmSampler]) -> None:
    trunk, sampler = held
    _, first = both(trunk, sampler)
    _, again = both(trunk, sampler)
    assert [one.ids for one in first] == [one.ids for one in again]
    assert len({one.ids for one in first}) > 3, "samples of one prompt differ"
    assert all(one.finished == (one.ids[-1] == 2) and 2 not in one.ids[:-1] for one in first)
    assert all(len(one.ids) == 12 or one.finished for one in first)


def test_log_probs_are_those_of_what_was_drawn_from(held: tuple[Trunk, VllmSampler]) -> None:
    """With the temperature, and with what top-p leaves."""
    trunk, sampler = held
    native, theirs = both(trunk, sampler, temperature=0.5, top_k=1)
    assert [one.ids for one in native] == [one.ids for one in theirs]
    assert all(abs(number) < 1e-5 for one in theirs for number in one.logprobs), "one token is all that is left"


def test_a_server_without_its_key_says_so(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY)
    with pytest.raises(ModelError, match=rf"{server}/v1/models says 401: it asks for a key; .* {KEY}"):
        Served(server)
