"""Loads models and tokenizers: from a local folder or a hub name, safetensors only, never with code from the folder."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kilter.errors import ModelError
from kilter.models.attention import has_attention_softcap

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path, *, dtype: str = "float32", attention: str | None = None, revision: str | None = None
) -> Any:
    """A causal language model, in training mode, with every dropout at 0.

    What dropout the model was published with is kept in `model.kilter_dropout` (name -> probability) and written back
    when the model is saved.

    Args:
        path: a local folder, or a name on the hub.
        dtype: of the parameters: float32, bfloat16 or float16.
        attention: transformers' name; None: `sdpa` where the model has it, `eager` for one that caps attention scores.
        revision: of a hub name.
    Raises:
        ModelError: no such folder, no weights in safetensors, an unknown kind, or weights that do not fill the model.
    """
    return _load(transformers.AutoModelForCausalLM, path, dtype=dtype, attention=attention, revision=revision)


def load_classifier(path: str | Path, *, dtype: str = "float32", attention: str | None = None) -> Any:
    """An `AutoModelForSequenceClassification`, otherwise as `load_model`."""
    return _load(transformers.AutoModelForSequenceClassification, path, dtype=dtype, attention=attention, revision=None)


def _load(kind: Any, path: str | Path, *, dtype: str, attention: str | None, revision: str | None) -> Any:
    if dtype not in DTYPES:
        raise ModelError(f"{path}: dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    config = load_config(path, revision=revision)
    dropout = remove_dropout(config)
    if attention is None and has_attention_softcap(config):
        attention = "eager"  # sdpa loses the cap without a word
    try:
        model, loading = kind.from_pretrained(
            str(path),
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            revision=revision or "main",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise ModelError(f"{path}: cannot load the model: {_first_line(err)}") from err
    lacking = sorted(loading["missing_keys"]) + sorted(str(row[0]) for row in loading["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{path}: the weights do not fill {type(model).__name__}: {lacking[0]} and {len(lacking) - 1} more are "
            "missing or of another shape, and would be random; use a folder whose weights belong to its config.json"
        )
    model.kilter_dropout = dropout
    return model.train()


def load_config(path: str | Path, *, revision: str | None = None) -> Any:
    """The configuration of a model folder or hub name."""
    if not str(path).strip():
        raise ModelError("the model's path is empty; give a folder or a name on the hub")
    folder = Path(path)
    looks_local = folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
    if looks_local and not folder.exists():
        raise ModelError(f"{path}: no such folder; give the folder of a model (with config.json) or a name on the hub")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in it; give the folder of a Hugging Face model")
    try:
        return transformers.AutoConfig.from_pretrained(str(path), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as err:
        raise ModelError(f"{path}: cannot read the model's configuration: {_first_line(err)}") from err


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a model folder or hub name, as it is: no token is added and no template invented."""
    load_config(path, revision=revision)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(path), revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise ModelError(f"{path}: cannot load the tokenizer: {_first_line(err)}") from err


def _first_line(err: Exception) -> str:
    return next(iter(str(err).strip().splitlines()), type(err).__name__)


RANDOM_FIELDS = ("drop", "router_jitter_noise")


def remove_dropout(config: Any) -> dict[str, float]:
    """Sets every dropout (and router jitter) of a configuration to 0, in place, and returns what was there."""
    found: dict[str, float] = {}
    for prefix, part in _parts(config):
        for name, value in vars(part).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value > 0 and any(word in name for word in RANDOM_FIELDS):
                found[f"{prefix}{name}"] = float(value)
                setattr(part, name, 0.0)
    return found


def restore_dropout(config: Any, dropout: dict[str, float]) -> None:
    """The inverse of `remove_dropout`, for a configuration that is about to be saved."""
    for prefix, part in _parts(config):
        for name in vars(part).keys() & {key.removeprefix(prefix) for key in dropout if key.startswith(prefix)}:
            setattr(part, name, dropout[f"{prefix}{name}"])


def _parts(config: Any) -> list[tuple[str, Any]]:
    nested = [
        (f"{name}.", part) for name, part in vars(config).items() if isinstance(part, transformers.PreTrainedConfig)
    ]
    return [("", config), *nested]


def weights_hash(model: Any) -> str:
    """SHA-256 of a trunk: names, shapes and values (in float32) of its parameters, adapters left out, in any order.

    A model in memory, the same with adapters on it, the folder it came from and a copy of that folder have one hash.
    A tensor that is stored under two names (tied embeddings) counts once.

    Args:
        model: a model, or a folder or hub name of one.
    """
    if isinstance(model, str | Path):
        model = load_model(model)
    seen: set[int] = set()
    rows: list[bytes] = []
    for name, value in sorted(trunk_tensors(model).items()):
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        digest = hashlib.sha256(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.float().contiguous().cpu().numpy().data)
        rows.append(digest.digest())
    return hashlib.sha256(b"".join(rows)).hexdigest()


def trunk_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model under the names they have without adapters, detached."""
    named = {name.replace(".base_layer.", "."): value.detach() for name, value in model.named_parameters()}
    return {name: value for name, value in named.items() if ".lora_" not in name}
