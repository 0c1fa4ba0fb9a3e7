"""Loads models and tokenizers: from a local folder or a hub name, safetensors only, never with code from the folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from kilter.errors import ModelError
from kilter.models.attention import has_attention_softcap
from kilter.models.quantized import dequantized, quantized_layers

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path, *, dtype: str = "float32", attention: str | None = None, revision: str | None = None
) -> Any:
    """A causal language model, in training mode, with every dropout at 0.

    The configuration it was published with, dropout included, is kept in `model.kilter_origin` and saved with it.

    Args:
        path: a local folder, or a name on the hub.
        dtype: of the parameters: float32, bfloat16 or float16.
        attention: transformers' name; None: `sdpa` where the model has it, `eager` for one that caps attention scores.
        revision: of a hub name.
    Raises:
        ModelError: no such folder, no weights in safetensors, an unknown kind, or weights that do not fill the model.
    """
    return _load(transformers.AutoModelForCausalLM, path, dtype=dtype, attention=attention, revision=revision)


def with_random_weights(model: Any, generator: torch.Generator) -> Any:
    """The same model with weights as its family draws them before any training, in place.

    Args:
        generator: gives the seed; the global random state is left as it was.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)._from_config(model.config, dtype=model.dtype)
    model.load_state_dict(fresh.state_dict())
    return model


def load_classifier(path: str | Path, *, dtype: str = "float32", attention: str | None = None) -> Any:
    """An `AutoModelForSequenceClassification`, otherwise as `load_model`."""
    return _load(transformers.AutoModelForSequenceClassification, path, dtype=dtype, attention=attention, revision=None)


def read_tensor(path: str | Path, name: str) -> Tensor:
    """One tensor of a folder or hub name, in float32, whatever its model is loaded in.

    Raises:
        ModelError: there is none of that name.
    """
    index = cached_file(str(path), SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    file = cached_file(str(path), shards.get(name, SAFE_WEIGHTS_NAME), _raise_exceptions_for_missing_entries=False)
    if file is not None:
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 it is no dict
                found: Tensor = tensors.get_tensor(name)
                return found.float()
    raise ModelError(f"{path}: holds no tensor {name!r} in safetensors; get the model again")


def _load(kind: Any, path: str | Path, *, dtype: str, attention: str | None, revision: str | None) -> Any:
    if dtype not in DTYPES:
        raise ModelError(f"{path}: dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    config = load_config(path, revision=revision)
    heads = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if heads and kind is transformers.AutoModelForCausalLM:
        raise ModelError(
            f"{path}: is a reward model ({heads[0]}) and cannot write; give the folder of a language model"
        )
    origin = copy.deepcopy(config)
    dropout = remove_dropout(config)
    if attention is None and has_attention_softcap(config):
        attention = "eager"  # sdpa loses the cap without a word
    try:
        with quiet():
            model, loading = kind.from_pretrained(
                str(path),
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                revision=revision or "main",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, instead of in a table on the terminal
            )
    except SafetensorError as err:
        raise ModelError(
            f"{path}: its weights cannot be read ({err}); the file is damaged or cut: get it again"
        ) from err
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as err:
        raise ModelError(f"{path}: cannot load the model: {_first_line(err)}") from err
    lacking = sorted(loading["missing_keys"]) + sorted(str(row[0]) for row in loading["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{path}: the weights do not fill {type(model).__name__}: {lacking[0]} and {len(lacking) - 1} more are "
            "missing or of another shape, and would be random; use a folder whose weights belong to its config.json"
        )
    for name, value in dropout.items():
        log.info("%s: %s was %g and is 0 for training", path, name, value)
    if getattr(origin.get_text_config(decoder=True), "router_aux_loss_coef", None):
        log.info("%s: the router's load-balancing loss is left out: losses here see log-probs alone", path)
    model.kilter_origin = origin
    return model.train()


def origin_config(model: Any) -> Any:
    """A copy of the configuration a model was published with: dropout as it was, whatever was changed since."""
    origin = copy.deepcopy(getattr(model, "kilter_origin", model.config))
    origin.get_text_config(decoder=True).vocab_size = model.config.get_text_config(decoder=True).vocab_size
    return origin


def plain_model(
    model: Any,
    tensors: Mapping[str, Tensor],
    *,
    kind: Any = None,
    config: Any = None,
    layers: Mapping[str, nn.Module] | None = None,
) -> Any:
    """An ordinary Hugging Face model, in eval mode, that holds these tensors themselves, not copies.

    It has its own default attention, but `eager` where scores are capped: the default there, `sdpa`, drops the cap.

    Args:
        model: the model whose kind and published configuration it has.
        tensors: every weight and persistent buffer of it, by name.
        kind, config: another class or configuration.
        layers: by name, modules that take the place of its own, and have no tensors here.
    """
    config = origin_config(model) if config is None else config
    attention = "eager" if has_attention_softcap(config) else None
    with no_init_weights():
        plain = (kind or model.__class__)._from_config(config, attn_implementation=attention, dtype=model.dtype)
    for name, layer in (layers or {}).items():
        plain.set_submodule(name, layer)
    # Detached: assigned themselves, frozen parameters would be told to learn, as those of a new model do.
    plain.load_state_dict({name: value.detach() for name, value in tensors.items()}, assign=True)
    plain.tie_weights()
    if model.can_generate() and plain.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and tables on the terminal, in the middle of ours: what they tell, we tell."""
    said = transformers.utils.logging
    bar_was_on, verbosity = said.is_progress_bar_enabled(), said.get_verbosity()
    said.disable_progress_bar()
    said.set_verbosity_error()
    try:
        yield
    finally:
        said.set_verbosity(verbosity)
        if bar_was_on:
            said.enable_progress_bar()


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
    except (OSError, ValueError, KeyError, StrictDataclassError) as err:
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


# What makes a forward random while training, by part of the name of the configuration's field.
RANDOM_FIELDS = ("drop", "router_jitter_noise")


def remove_dropout(config: Any) -> dict[str, float]:
    """Sets every dropout (and router jitter) of a configuration to 0, in place, and returns what was there."""
    found: dict[str, float] = {}
    nested = {f"{name}.": part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    for prefix, part in {"": config, **nested}.items():
        for name, value in list(vars(part).items()):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value > 0 and any(word in name for word in RANDOM_FIELDS):
                found[f"{prefix}{name}"] = float(value)
                setattr(part, name, 0.0)
    return found


def weights_hash(model: Any) -> str:
    """SHA-256 of a trunk: names, shapes and values (in float32) of its parameters, adapters left out, in any order.

    A model in memory, the same with adapters on it, the folder it came from and a copy of that folder have one hash,
    unless the model is held in fewer bits than the folder: then it has that of what is left.
    A tensor that is stored under two names (tied embeddings) counts once.

    Args:
        model: a model, or a folder or hub name of one.
    """
    if isinstance(model, str | Path):
        model = load_model(model)
    rows: list[bytes] = []
    for name, value in sorted(trunk_tensors(model).items()):
        digest = hashlib.sha256(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.float().contiguous().cpu().numpy().data)
        rows.append(digest.digest())
    return hashlib.sha256(b"".join(rows)).hexdigest()


def trunk_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model, each once, under the names they have without adapters, detached; 4 bits made whole."""
    named = {name: value for name, value in model.named_parameters() if ".lora_" not in name}
    small = {f"{name}.weight": layer for name, layer in quantized_layers(model).items()}
    found = {
        name: dequantized(small[name]).cpu() if name in small else whole(value.detach())
        for name, value in named.items()
    }
    return {name.replace(".base_layer.", "."): value for name, value in found.items()}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together again, on every process (all must ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
