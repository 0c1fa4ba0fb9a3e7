"""vLLM's server as an engine: requests in JSON over HTTP, weights through files that both sides see.

It is spoken to by tokens alone (`/inference/v1/generate`), so it needs no tokenizer. New weights are taken in by
`/collective_rpc`, adapters by `/v1/load_lora_adapter`; a server offers these only where it is told to, see `COMMAND`.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kilter.errors import ModelError, one_line
from kilter.models.sampling import Sampling
from kilter.models.vllm_sampler import Answer, Request, numbers

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --host 127.0.0.1 --tokens-only "
    "--skip-tokenizer-init --logprobs-mode processed_logprobs [--enable-lora --max-lora-rank RANK]"
)
"""How a server is started that can be used; MODEL is the folder of the model that the policy starts from."""
KEY = "VLLM_API_KEY"
"""Variable of the environment that holds the server's key, for the server as for who asks it."""
AT_ONCE = 256
"""Requests that are under way together; the server batches them as it can."""
LONGEST, LOOK = 3600.0, 30.0
"""Seconds after which an answer is no longer waited for; and whether anyone is there at all."""


class _Staying(urllib.request.HTTPRedirectHandler):
    """Follows nobody to another address: the key is for this one, and what was posted would be asked there by GET."""

    def redirect_request(self, *_: object) -> None:
        return None


class Served:
    """vLLM's server for one model.

    Args:
        url: where it listens, "http://127.0.0.1:8000".
    Raises:
        ModelError: nothing answers there, something that is no vLLM does, or it asks for a key that it is not given.
    """

    def __init__(self, url: str) -> None:
        self._url, self._adapter = url.rstrip("/"), ""
        self._own = f"kilter-{secrets.token_hex(4)}"  # a process that was killed may have left adapters there
        # A proxy of the environment is for the web, not for a server of one's own.
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Staying)
        told = self._call("/v1/models")
        if not (isinstance(told, dict) and told.get("data")):
            raise ModelError(f"what answers at {self._url} lists no model, so it is no vLLM; start one by {COMMAND}")

    def load(self, folder: Path) -> None:
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._call("/reset_prefix_cache", {})

    def adapt(self, folder: Path, number: int) -> None:
        """By a name of its own, or the server would take keys and values of the last adapter for this one's."""
        before, self._adapter = self._adapter, f"{self._own}-{number}"
        if before:
            self._call("/v1/unload_lora_adapter", {"lora_name": before})
        self._call("/v1/load_lora_adapter", {"lora_name": self._adapter, "lora_path": str(folder)})

    def draw(self, requests: Sequence[Request], sampling: Sampling, stop_ids: Sequence[int]) -> list[Answer]:
        def ask(request: Request) -> Answer:
            asked = {
                "token_ids": list(request.prompt),
                "sampling_params": numbers(sampling, stop_ids, request.seed),
                **({"model": self._adapter} if self._adapter else {}),
            }
            told = self._call("/inference/v1/generate", asked)
            try:
                (choice,) = told["choices"]
                return Answer(choice["token_ids"], [one["logprob"] for one in choice["logprobs"]["content"]])
            except (KeyError, TypeError, ValueError) as err:
                raise ModelError(f"{self._url} draws no answer that can be read; vLLM 0.32's can") from err

        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(requests)))) as threads:
            return list(threads.map(ask, requests))

    def _call(self, path: str, body: Any = None) -> Any:
        """What the server says; None: nothing in JSON.

        Args:
            body: sent by POST; None: asked by GET, and soon answered.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body).encode()
        try:
            asked = urllib.request.Request(self._url + path, sent, headers)
            with self._http.open(asked, timeout=LOOK if body is None else LONGEST) as answer:
                told = answer.read()
        except urllib.error.HTTPError as err:
            raise ModelError(f"{self._url}{path} says {err.code}: {_remedy(err)}") from err
        except (OSError, http.client.HTTPException, ValueError) as err:  # nobody, no HTTP, or no address
            raise ModelError(
                f"no vLLM answers at {self._url} ({one_line(str(err))}); start it there by {COMMAND}"
            ) from err
        try:
            return json.loads(told)
        except ValueError:  # some answers are a sentence
            return None


def _remedy(err: urllib.error.HTTPError) -> str:
    """What it means that a server refuses."""
    if err.code == 401:
        return f"it asks for a key; put it into the environment as {KEY}"
    if err.code == 404:
        return f"it does not offer this; start it by {COMMAND}"
    if 300 <= err.code < 400:
        return f"it sends on to {one_line(str(err.headers.get('Location')))}; give that address as sampler.url"
    return one_line(err.read(2000).decode(errors="replace"))
