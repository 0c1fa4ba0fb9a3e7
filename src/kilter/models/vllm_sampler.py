"""Sampling by vLLM: the policy's weights go over before each rollout, its answers come back with their log-probs.

vLLM computes the model by kernels of its own, so its log-probs are not the trainer's to the last digit: who learns from
them weighs by `losses.importance_weights`, and refuses a rollout on which the two are too far apart. A sample has its
own seed here too, but what is batched beside it can change more than its last digit.

Weights go through files in safetensors, which an engine in any process reads: an adapter as a folder in peft's layout
that takes the last one's place, whole weights as a model's folder that is loaded in place.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kilter.errors import ModelError
from kilter.models.adapters import save_adapter
from kilter.models.generation import Completion
from kilter.models.sampling import Sampling, Stops
from kilter.models.save import save_weights
from kilter.models.trunk import Trunk

NO_VLLM = (
    "sampler.engine is vllm, and vLLM is not installed here: pip install vllm, name a server of it with sampler.url, "
    "or set the engine to native"
)


def has_vllm() -> bool:
    """Whether it is installed; it is not loaded."""
    return importlib.util.find_spec("vllm") is not None


class Request(NamedTuple):
    """One answer that is asked for."""

    prompt: tuple[int, ...]
    seed: int


class Answer(NamedTuple):
    """What an engine drew."""

    ids: list[int]
    logprobs: list[float]

    def up_to(self, place: int) -> list[int]:
        """Its tokens up to the one at a place."""
        return self.ids[: place + 1]


class Engine(Protocol):
    """What serves a model, in this process or elsewhere."""

    def load(self, folder: Path) -> None:
        """Takes the weights in a model's folder in place of its own."""
        ...

    def adapt(self, folder: Path, number: int) -> None:
        """Answers with this adapter on from now on, the `number`-th that it is given, from 1. Its folder stays until
        the next one is given."""
        ...

    def draw(self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]) -> list[Answer]:
        """An answer to each, as drawn up to a stop token or the limit."""
        ...


class VllmSampler:
    """Samples from a role of a trunk through an engine that holds the model it started as."""

    def __init__(self, trunk: Trunk, role: str, engine: Engine) -> None:
        self._trunk, self._role, self._engine = trunk, role, engine
        self._times = 0
        self._place = Path(tempfile.mkdtemp(prefix="kilter-vllm-"))
        weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Tensor, *, sampling: Sampling, stops: Stops
    ) -> list[list[Completion]]:
        """See `Sampler`; the engine has the role's weights as they are now."""
        self._send()
        requests = [
            Request(tuple(prompt), seed) for prompt, row in zip(prompts, seeds.tolist(), strict=True) for seed in row
        ]
        drawn = iter(zip(requests, self._engine.draw(requests, sampling, stops.ids), strict=True))
        return [[_completion(*next(drawn), sampling, stops) for _ in range(seeds.shape[1])] for _ in prompts]

    def _send(self) -> None:
        """Gives the engine the role's weights, every time: fused optimizers change them without a trace to go by."""
        self._times += 1
        before, folder = (self._place / f"{self._role}-{number}" for number in (self._times - 1, self._times))
        if self._trunk.roles[self._role].adapter is not None:
            save_adapter(self._trunk, self._role, folder)
            self._engine.adapt(folder, self._times)
        else:
            save_weights(self._trunk, self._role, folder)
            self._engine.load(folder)
        shutil.rmtree(before, ignore_errors=True)


def _completion(request: Request, answer: Answer, sampling: Sampling, stops: Stops) -> Completion:
    """An answer up to where it ends by Kilter's own rule: engines look for stop texts in other ways."""
    ended = stops.ended(torch.tensor(answer.ids), torch.ones(len(answer.ids), dtype=torch.bool), answer.up_to)
    finished = bool(ended.any())
    length = int(ended.int().argmax()) + 1 if finished else len(answer.ids)
    logprobs = [0.0] * length if sampling.temperature == 0 else answer.logprobs[:length]
    return Completion(request.prompt, tuple(answer.ids[:length]), tuple(logprobs), finished)


def numbers(sampling: Sampling, stop_ids: Sequence[int], seed: int) -> dict[str, Any]:
    """vLLM's `SamplingParams` for one answer."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "seed": seed,
        "logprobs": 0,
        "detokenize": False,
    }


class InProcess:
    """vLLM's engine for one model, made and held by this process.

    Args:
        folder: of the model that the policy starts from.
        rank: of the policy's adapter; 0: whole weights are sent.
        dtype: what it computes in, "float32" or "bfloat16".
        memory: share of the GPU's memory that it may take.
        max_tokens: longest prompt with its answer; None: what the model's configuration says.
    Raises:
        ModelError: vLLM is not installed.
    """

    def __init__(self, folder: str | Path, *, rank: int, dtype: str, memory: float, max_tokens: int | None) -> None:
        if not has_vllm():
            raise ModelError(NO_VLLM)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # ends with this process, and draws as seeded
        from vllm import LLM

        most = next((size for size in RANKS if size >= rank), rank)
        self._llm: Any = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            dtype=dtype,
            max_model_len=max_tokens,
            gpu_memory_utilization=memory,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            **({"enable_lora": True, "max_lora_rank": most, "max_loras": 1} if rank else {}),
        )
        self._adapter: Any = None

    def load(self, folder: Path) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()

    def adapt(self, folder: Path, number: int) -> None:
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest(f"policy-{number}", number, str(folder))

    def draw(self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]) -> list[Answer]:
        from vllm import SamplingParams

        asked = [SamplingParams(**numbers(sampling, stop_ids, request.seed)) for request in requests]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        told = self._llm.generate(prompts, asked, use_tqdm=False, lora_request=self._adapter)
        return [_read(one.outputs[0]) for one in told]


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The greatest ranks that vLLM can be made for."""


def _read(output: Any) -> Answer:
    ids = list(output.token_ids)
    return Answer(ids, [held[token].logprob for held, token in zip(output.logprobs, ids, strict=True)])
