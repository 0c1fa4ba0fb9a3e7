"""The reference's log-probs as data: computed once by the frozen model, kept on disk by weights and tokens.

A file holds those of up to `SHARD` groups under the hash of what they follow from: the weights of the reference, the
tokens and scored spans of the groups, how they were packed and in which number format. Another run over the same pairs
from the same reference reads them, whatever it trains; one that is stopped goes on behind the last file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kilter.models.load import weights_hash
from kilter.train import distributed
from kilter.train.checks import LOW_PRECISION_TOLERANCE, TOLERANCE
from kilter.tree import Group, make_batches, numbered, scored, size, split_by_response

log = logging.getLogger(__name__)

SHARD = 4096
"""Groups in one file."""
VERIFIED = 2
"""Groups of each file that are computed again when it is read."""
NUMBER = "number"


def default_folder() -> Path:
    """Where the cache lies when nothing else is said: KILTER_CACHE, or kilter/ in the user's cache folder."""
    if chosen := os.environ.get("KILTER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilter"


@dataclass(frozen=True)
class Cache:
    """A folder of log-probs, as seen from one reference."""

    folder: Path
    weights: str
    """Hash of the reference's weights."""

    @classmethod
    def of(cls, folder: Path, trunk: nn.Module, role: str = "reference") -> Cache:
        """Reads all weights of the role once, for its hash."""
        plain: Any = distributed.unwrap(trunk)
        held = plain.roles[role]
        whole = hashlib.sha256(weights_hash(plain.models[held.model]).encode())
        if held.adapter is not None:  # an adapter's own belong to them
            for parameter in plain.parameters_of(role):
                whole.update(parameter.detach().float().contiguous().cpu().numpy().data)
        return cls(folder, whole.hexdigest())


@torch.no_grad()
def with_reference(
    trunk: nn.Module,
    groups: Sequence[Group],
    *,
    role: str = "reference",
    row_tokens: int = 192,
    batch_tokens: int = 8192,
    pad_id: int = 0,
    name: str = "ref_logprobs",
    cache: Cache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Group]:
    """The same groups with the log-probs of their scored tokens under `role`, as `per_token[name]`.

    Computed once, packed, in eval mode: for the loop the reference is data. The packing depends on the groups alone, so
    a resumed run gets the same bits.

    Args:
        cache: of `role`, to read from and to write to; None: neither. What is read is compared with a few groups
            computed again; a file that differs or is damaged is made anew, with a warning.
        progress: called with (groups done, groups in all).
    """
    budget = {"row_tokens": row_tokens, "batch_tokens": batch_tokens, "pad_id": pad_id}
    found: list[Group] = []
    for at in range(0, len(groups), SHARD):
        shard = groups[at : at + SHARD]
        file = None if cache is None else cache.folder / f"reference-{_key(trunk, cache, shard, budget)}.safetensors"
        values = None if file is None else _read(file, shard)
        if values is not None and not _agrees(trunk, role, shard, values, budget):
            log.warning("%s: its log-probs are not those of this reference; they are computed anew", file)
            values = None
        tell = partial(_tell, progress, at, len(groups))
        if values is None:
            values = _computed(trunk, shard, role, budget, tell)
            if file is not None and distributed.rank() == 0:
                _write(file, values)
        tell(len(shard))
        found += _filled(shard, values, name)
    return found


def _tell(progress: Callable[[int, int], None] | None, before: int, whole: int, done: int) -> None:
    if progress is not None:
        progress(before + done, whole)


def _key(trunk: nn.Module, cache: Cache, groups: Sequence[Group], budget: dict[str, int]) -> str:
    plain: Any = distributed.unwrap(trunk)
    settings = {"model": cache.weights, "compute": str(plain.compute_dtype), "layout": plain.layout, **budget}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for group in groups:
        rows = [group.prompt, *(response.ids for response in group.responses)]
        spans = [response.spans for response in group.responses]
        whole.update(f"{[len(row) for row in rows]} {spans}".encode())
        whole.update(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]).tobytes())
    return whole.hexdigest()[:32]


def _computed(
    trunk: nn.Module,
    groups: Sequence[Group],
    role: str,
    budget: dict[str, int],
    tell: Callable[[int], None] = lambda _: None,
) -> list[Tensor]:
    """float32[scored tokens] of every response of every group, in order."""
    held: dict[int, Tensor] = {}
    training, device = trunk.training, distributed.device_of(trunk)
    trunk.eval()
    done = 0
    with distributed.lowered(trunk):
        for batch in make_batches(numbered(groups, NUMBER), **budget):
            numbers = batch.extras[NUMBER].long().tolist()
            on_device = batch.to(device)
            logprobs = trunk(on_device.tree, {role: "logprobs"})[role].float().cpu()
            held |= dict(zip(numbers, split_by_response(logprobs, batch.tree.leaf, len(numbers)), strict=True))
            done += int(batch.units["prompts"])
            tell(done)
    trunk.train(training)
    return [held[number] for number in range(len(held))]


def _agrees(
    trunk: nn.Module, role: str, groups: Sequence[Group], values: Sequence[Tensor], budget: dict[str, int]
) -> bool:
    """Whether the shortest groups, computed again, have the log-probs that were read."""
    starts = np.cumsum([0, *(len(group.responses) for group in groups)])
    places = sorted(sorted(range(len(groups)), key=lambda place: size(groups[place]))[:VERIFIED])
    again = _computed(trunk, [groups[place] for place in places], role, budget)
    read = [value for place in places for value in values[starts[place] : starts[place + 1]]]
    low = distributed.unwrap(trunk).compute_dtype is not None
    gap = max(float((a - b).abs().max()) for a, b in zip(again, read, strict=True) if len(a))
    return gap <= (LOW_PRECISION_TOLERANCE if low else TOLERANCE)


def _read(file: Path, groups: Sequence[Group]) -> list[Tensor] | None:
    """What a file holds, or None: it is not there, or damaged."""
    lengths = [scored(response) for group in groups for response in group.responses]
    try:
        whole = safetensors.torch.load_file(file)["logprobs"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, KeyError, safetensors.SafetensorError) as err:
        log.warning("%s: cannot be read (%s); its log-probs are computed anew", file, err)
        return None
    if whole.shape != (sum(lengths),) or not whole.isfinite().all():
        log.warning("%s: holds %d log-probs, %d are needed; they are computed anew", file, len(whole), sum(lengths))
        return None
    return list(torch.split(whole, lengths))


def _write(file: Path, values: Sequence[Tensor]) -> None:
    """A file of the cache, whole or not at all. A cache that cannot be written costs time and nothing else."""
    beside = file.with_suffix(f".{os.getpid()}.part")  # stages side by side may be writing the same file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(safetensors.torch.save({"logprobs": torch.cat(list(values))}))
        beside.replace(file)
    except OSError as err:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        log.warning("%s: the reference's log-probs could not be kept (%s); the next run computes them again", file, err)


def _filled(groups: Sequence[Group], values: Sequence[Tensor], name: str) -> list[Group]:
    rest = iter(values)
    return [
        replace(
            group,
            responses=tuple(
                replace(response, per_token={**response.per_token, name: next(rest)}) for response in group.responses
            ),
        )
        for group in groups
    ]
