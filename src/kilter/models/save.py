"""Saves roles as ordinary Hugging Face folders that plain `transformers` reads with the same result.

A folder is written beside and renamed into place. `kilter.json` in it says what it is, and of an adapter which trunk it
was trained on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import kilter
from kilter.errors import ModelError
from kilter.models.adapters import gather_adapter, is_writer
from kilter.models.attention import has_attention_softcap, text_config
from kilter.models.load import origin_config, plain_model, quiet, whole
from kilter.models.quantized import base_of
from kilter.models.reward_heads import MEMBERS, REWARD, RewardHeads
from kilter.models.roles import plain_tensors
from kilter.models.trunk import Trunk, decoder
from kilter.rundir import write_folder, write_json

PAD_TOKEN = "<|pad|>"


def save_causal_lm(trunk: Trunk, role: str, folder: str | Path, tokenizer: Any) -> None:
    """Writes a role as an `AutoModelForCausalLM` with tokenizer, template, end tokens and generation config.

    An adapter is merged into the weights, and stands once more by itself in `adapter/`. Of a base in bfloat16 or in 4
    bits the weights are those bits made whole, in bfloat16: the model that was trained, and not the adapter on the
    published weights, from which it differs by what was rounded away (`base` in `kilter.json`).
    """
    _write(trunk, (role,), Path(folder), _language_model(trunk, role), tokenizer)


def save_weights(trunk: Trunk, role: str, folder: str | Path) -> None:
    """Writes a role's weights and configuration alone, an adapter merged in: for another program to load."""
    plain = _language_model(trunk, role)
    if is_writer():
        with write_folder(Path(folder)) as beside, quiet():
            plain.save_pretrained(beside)


def _language_model(trunk: Trunk, role: str) -> Any:
    held = trunk.roles[role]
    model: Any = trunk.models[held.model]
    if model.get_output_embeddings() is None:
        raise ModelError(f"role {role!r} has no language head and cannot be saved as a language model")
    with torch.no_grad():
        return plain_model(model, plain_tensors(model, held.adapter))


def save_reward_model(
    trunk: Trunk,
    roles: str | Sequence[str],
    folder: str | Path,
    tokenizer: Any,
    *,
    end_ids: Collection[int] = (),
    heads: RewardHeads | None = None,
) -> None:
    """Writes roles with scalar heads as an `AutoModelForSequenceClassification` with one label for each.

    Where each role has an adapter of its own, one label: the average of the weights of all; see `reward_heads`.

    transformers reads the score at the last token that is not the pad token, Kilter at the response's last token
    (`tree.last`). The pad token that is saved is therefore one that never ends a response; where the tokenizer has
    none, a new one is added, with a zero row in the embeddings if they have no free row.

    Args:
        roles: one, or several on one model: all with one adapter (or none), or each with its own.
        end_ids: tokens that may end a response, besides the end tokens of the tokenizer and the generation config.
        heads: what `kilter.json` is to say of several.
    Raises:
        ModelError: a role has no head, or transformers has no sequence classifier for this kind of model.
    """
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    for role in roles:
        if trunk.roles[role].head is None:
            raise ModelError(f"role {role!r} has no scalar head and cannot be saved as a reward model")
    held = trunk.roles[roles[0]]
    model: Any = trunk.models[held.model]
    classifier = sequence_classifier(model.config)
    config = origin_config(model)
    tokenizer = copy.deepcopy(tokenizer)
    pad_id = pick_pad(tokenizer, {*end_ids, *end_tokens(tokenizer, model)})
    adapters = tuple(dict.fromkeys(trunk.roles[role].adapter for role in roles))
    labels = heads.labels if heads is not None and len(adapters) == 1 else (REWARD,)
    config.num_labels = len(labels)
    if len(labels) > 1:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: place for place, label in enumerate(labels)}
    text_config(config).pad_token_id = config.pad_token_id = pad_id
    with torch.no_grad():
        tensors = _with_row(decoder(model), _averaged(decoder(model), adapters), pad_id)
        text_config(config).vocab_size = max(text_config(config).vocab_size, pad_id + 1)
        tensors = {f"{classifier.base_model_prefix}.{name}": value for name, value in tensors.items()}
        weights: list[Any] = [trunk.heads[str(trunk.roles[role].head)].weight for role in roles]
        rows = torch.cat([whole(weight) for weight in weights])
        tensors["score.weight"] = rows if len(labels) == len(rows) else rows.mean(0, keepdim=True)
        plain = plain_model(model, tensors, kind=classifier, config=config)
    _write(trunk, roles, Path(folder), plain, tokenizer, heads)


def _averaged(model: Any, adapters: Sequence[str | None]) -> dict[str, Tensor]:
    """The weights of a model with an adapter merged in; of several adapters, their mean."""
    tensors = plain_tensors(model, adapters[0])
    for adapter in adapters[1:]:
        more = plain_tensors(model, adapter)
        tensors = {name: value + more[name] if value.is_floating_point() else value for name, value in tensors.items()}
    count = len(adapters)
    if count == 1:
        return tensors
    return {name: value / count if value.is_floating_point() else value for name, value in tensors.items()}


def _with_row(model: Any, tensors: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """The tensors of `model` with the token embeddings long enough for `token`, filled with zeros."""
    embeddings = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is embeddings)
    lacking = token + 1 - len(tensors[name])
    if lacking <= 0:
        return tensors
    return tensors | {name: torch.nn.functional.pad(tensors[name], (0, 0, 0, lacking))}


def sequence_classifier(config: Any) -> Any:
    """transformers' classifier for this kind of model; asked for before a reward model is trained, too."""
    known = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in known:
        raise ModelError(
            f"a reward model of type {config.model_type!r} could not be saved: transformers has no "
            "AutoModelForSequenceClassification for it; train the reward model from another kind of model"
        )
    return known[type(config)]


def end_tokens(tokenizer: Any, model: Any) -> set[int]:
    """Every token that tokenizer, configuration or generation config name as an end."""
    found: set[int] = set()
    for holder in (tokenizer, text_config(model.config), getattr(model, "generation_config", None)):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found |= set(value) if isinstance(value, list | tuple) else {int(value)}
    return found


def pick_pad(tokenizer: Any, ends: Collection[int]) -> int:
    """A pad token that never ends a response, set in place: the tokenizer's own, its unknown token, or a new one."""
    for token in (tokenizer.pad_token, tokenizer.unk_token):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in ends:
            tokenizer.pad_token = token
            return int(tokenizer.pad_token_id)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return int(tokenizer.pad_token_id)


def _write(
    trunk: Trunk, roles: Sequence[str], folder: Path, plain: Any, tokenizer: Any, heads: RewardHeads | None = None
) -> None:
    """Of a sharded trunk every process comes here, and one writes."""
    about: dict[str, Any] = {"kilter": kilter.__version__, "role": roles[0]}
    # One adapter below several heads is merged and nothing else: an adapter's folder holds one head.
    apart = len({trunk.roles[role].adapter for role in roles}) == len(roles)
    adapters = [gather_adapter(trunk, role) for role in roles if trunk.roles[role].adapter is not None and apart]
    if adapters:
        about["trunk"] = adapters[0].about["trunk"]
    if (base := base_of(trunk.models[trunk.roles[roles[0]].model])) != "float32":
        about["base"] = base
    if heads is not None and len(heads.labels) > 1:
        about["heads"] = heads.to_dict()
    if not is_writer():
        return
    with write_folder(folder) as beside:
        with quiet():
            plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if has_attention_softcap(plain.config):
            # Read by transformers: its own default there, `sdpa`, would drop the cap and give other numbers.
            config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
            write_json(beside / "config.json", config | {"attn_implementation": "eager"})
        if len(adapters) == 1:
            adapters[0].write(beside / "adapter")
        elif adapters:
            (beside / MEMBERS).mkdir()
            for place, adapter in enumerate(adapters):
                adapter.write(beside / MEMBERS / str(place))
        write_json(beside / "kilter.json", about)
