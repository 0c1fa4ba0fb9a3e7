"""The trunk: the one module that holds all models, adapters and heads of a run, with the one forward that all use.

DDP and FSDP2 wrap it, and nothing calls what is inside from outside.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kilter.errors import ModelError
from kilter.models.attention import (
    AttentionKinds,
    attention_kinds,
    inputs_of,
    text_config,
    tree_masks,
    unread_masks,
    use_segments,
)
from kilter.models.flex import Blocks
from kilter.models.fused import fuse
from kilter.models.heads import Other, ScalarHead, target_logprobs, token_stats, whole_stats
from kilter.models.last_layer import LastLayer, read_of
from kilter.models.quantized import computing_in_float32, low_precision_layers
from kilter.models.roles import AdapterSwitch, Role, adapter_parameters, base_parameters
from kilter.models.segments import Runs
from kilter.models.tables import LARGE, adding_in_place
from kilter.tree import TokenTree, unroll

DENSE_UP_TO = 256
"""Rows up to this wide take a dense mask even where segments are possible: less overhead than area."""

Attention = Literal["auto", "flex", "dense"]
"""How trees are attended to: `auto` run by run on a CPU and by FlexAttention on a GPU, in rows wider than
`dense_up_to`; `flex` by FlexAttention; `dense` by the reference, a mask of every pair."""
Want = Literal["logprobs", "token_stats", "values", "rewards"]
WHOLE = re.compile(r"entropy|(?:entropy\+)?kl:(?P<role>.+)")
"""A want that reads whole distributions, maybe against those of another role: "entropy+kl:reference"."""


class Trunk(nn.Module):
    """Models, heads and the roles that name them.

    Args:
        models: Hugging Face decoders by name, with or without a language head.
        roles: role -> where its numbers come from.
        heads: scalar heads by name.
        compute_dtype: run the decoders in this type, on copies of the weights (`lowered`); parameters, gradients,
            log-softmax and scalar heads stay float32. None: in the type of the weights.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        roles: Mapping[str, Role],
        heads: Mapping[str, ScalarHead] | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleDict()
        self.heads = nn.ModuleDict(heads or {})
        self.roles: dict[str, Role] = {}
        self.compute_dtype = compute_dtype
        self.layout: Literal["packed", "unrolled"] = "packed"
        self.attention: Attention = "auto"
        self.dense_up_to = DENSE_UP_TO
        self._low = False
        self._as_held: set[int] = set()
        self._switches: dict[str, AdapterSwitch] = {}
        self._last_layers: dict[str, LastLayer] = {}
        for name, model in models.items():
            self.add_model(name, model)
        for name, role in roles.items():
            self.add_role(name, role)

    def add_model(self, name: str, model: nn.Module) -> None:
        """Holds another model, for roles to be named on."""
        self.models[name] = model
        fuse(model)
        use_segments(model)
        self._switches[name] = AdapterSwitch()
        self._switches[name].attach(model)
        self._last_layers[name] = LastLayer(decoder(model))
        if isinstance(attention_kinds(decoder(model)), str):
            self.layout = "unrolled"

    def add_role(self, name: str, role: Role, head: ScalarHead | None = None) -> None:
        """Names another role, with the head that it brings; its adapter must be on the model already."""
        if head is not None and role.head is not None:
            self.heads[role.head] = head
        if role.model not in self.models or (role.head is not None and role.head not in self.heads):
            raise ModelError(f"role {name!r} asks for {role}, which this trunk does not hold")
        if role.adapter is not None and not adapter_parameters(self.models[role.model], role.adapter):
            raise ModelError(f"role {name!r} asks for adapter {role.adapter!r}, which is not on model {role.model!r}")
        self._switches[role.model].attach(self.models[role.model])
        self.roles[name] = role

    def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        """Runs every (model, adapter) that is asked for once over the tree.

        Args:
            ask: role -> what is wanted of it: "logprobs" (of the targets), "token_stats" (those and, without gradient,
                entropy and log collision probability, `heads.token_stats`), "values" (its head at `source`) or
                "rewards" (its head at `last`). With their gradients: "kl:ROLE" (log-probs of both roles and the
                exact KL to the other, which need not be asked for itself: without gradient, a forward and a head more),
                "entropy" (log-probs and the entropy), "entropy+kl:ROLE" (all of it).
        Returns:
            By role, float32: logprobs [N] in nats, token_stats [N, 3], values [N], rewards [R], all others
            [N, C] (`heads.whole_stats`).
        """
        with self.lowered():
            return self._answers(tree, ask)

    def _answers(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        runs: dict[tuple[str, str | None], list[str]] = {}
        for name, want in ask.items():
            role = self._role(name, want)
            runs.setdefault((role.model, role.adapter), []).append(name)
        if self.layout == "unrolled":
            tree = unroll(tree)
        answers: dict[str, Tensor] = {}
        masks: dict[Any, Any] = {}  # models of one kind share the masks of the tree
        others = self._others(tree, ask, masks)
        for (model, adapter), names in runs.items():
            held: Any = self.models[model]
            wants = {ask[name] for name in names}
            hidden = self._hidden(model, adapter, tree, masks, wants).flatten(0, 1)  # [B T, H]
            at_source = None
            for name in names:
                if ask[name] == "rewards":
                    answers[name] = self.heads[str(self.roles[name].head)](hidden[tree.last])
                    continue
                if at_source is None:
                    at_source = hidden[tree.source]  # [N, H]
                if ask[name] == "values":
                    answers[name] = self.heads[str(self.roles[name].head)](at_source)
                    continue
                with self.autocast(at_source.device):
                    if whole := WHOLE.fullmatch(ask[name]):
                        to, entropy = others.get(whole["role"]), ask[name].startswith("entropy")
                        answers[name] = whole_stats(held, at_source, tree.target, to=to, entropy=entropy)
                    else:
                        through_head = target_logprobs if ask[name] == "logprobs" else token_stats
                        answers[name] = through_head(held, at_source, tree.target)
        return {name: answers[name] for name in ask}

    @torch.no_grad()
    def _others(self, tree: TokenTree, ask: Mapping[str, str], masks: dict[Any, Any]) -> dict[str, Other]:
        """Each role that a KL is asked to."""
        found: dict[str, Other] = {}
        for want in ask.values():
            whole = WHOLE.fullmatch(want)
            if whole and (name := whole["role"]) and name not in found:
                role = self.roles[name]
                hidden = self._hidden(role.model, role.adapter, tree, masks, {"logprobs"})
                found[name] = Other(self.models[role.model], hidden.flatten(0, 1)[tree.source])
        return found

    def _role(self, name: str, want: str) -> Role:
        if name not in self.roles:
            raise ModelError(f"this trunk has no role {name!r}; it has {', '.join(sorted(self.roles))}")
        role = self.roles[name]
        model: Any = self.models[role.model]
        whole = WHOLE.fullmatch(want)
        if whole and whole["role"]:
            other: Any = self.models[self._role(whole["role"], "logprobs").model]
            sizes = [text_config(held.config).vocab_size for held in (model, other)]
            if sizes[0] != sizes[1]:
                raise ModelError(
                    f"role {name!r} is asked for {want!r}; they have vocabularies of {sizes[0]} and {sizes[1]} tokens: "
                    "a KL needs two models of one"
                )
        elif not whole and want not in get_args(Want):
            choice = ", ".join((*get_args(Want), "entropy", "kl:ROLE", "entropy+kl:ROLE"))
            raise ModelError(f"role {name!r} is asked for {want!r}; choose one of {choice}")
        through_language_head = want not in ("values", "rewards")
        if not through_language_head and role.head is None:
            raise ModelError(f"role {name!r} is asked for {want} and has no scalar head; build it with one")
        if through_language_head and model.get_output_embeddings() is None:
            raise ModelError(f"role {name!r} is asked for {want} and its model has no language head")
        return role

    def _hidden(
        self, name: str, adapter: str | None, tree: TokenTree, masks: dict[Any, Any], wants: set[str]
    ) -> Tensor:
        """Final hidden states [B, T, H] of one model with one adapter (None: off), right where `wants` reads."""
        model = decoder(self.models[name])
        inputs: dict[str, Any] = {"input_ids": tree.tokens, "position_ids": tree.positions, "use_cache": False}
        runs = None
        if self.layout == "packed" and (structure := self.structure(name, tree)) is not None:
            if structure not in masks:
                masks[structure] = structure(tree)
            runs = masks[structure]
            inputs |= {"runs": runs, "attention_mask": unread_masks(model)}
        elif self.layout == "packed":
            kinds = attention_kinds(model)
            assert isinstance(kinds, AttentionKinds), kinds
            dtype = self.compute_dtype or model.dtype
            key = (tuple(kinds.windows.items()), kinds.additive, dtype)
            if key not in masks:
                masks[key] = tree_masks(tree, kinds, dtype)
            inputs["attention_mask"] = masks[key]
        else:
            inputs["attention_mask"] = (tree.segment >= 0).long()
            inputs = {key: value for key, value in inputs.items() if key in inputs_of(model.__class__)}
        read = read_of(tree, wants, runs) if self.layout == "packed" else None
        last_layer = self._last_layers[name]
        with self._switches[name].use(adapter), last_layer.only(read), self.autocast(tree.tokens.device):
            hidden: Tensor = model(**inputs).last_hidden_state
        return hidden

    def structure(self, name: str, tree: TokenTree) -> type[Runs | Blocks] | None:
        """What a model's attention is told of this tree, or None: the dense mask.

        The dense mask also serves where the other way cannot: FlexAttention takes heads of 16 to 256 numbers, and runs
        no cap on the scores.
        """
        kinds = attention_kinds(decoder(self.models[name]))
        wide = self.attention == "flex" or (self.attention == "auto" and tree.tokens.shape[1] > self.dense_up_to)
        if not wide or isinstance(kinds, str):
            return None
        if self.attention == "flex" or tree.tokens.device.type == "cuda":
            return Blocks if kinds.blocks else None
        return Runs if kinds.segments and tree.tokens.device.type == "cpu" else None

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """Around a step's forwards and their backwards: the models hold copies of their weights in `compute_dtype`.

        A copy is made once and is a function of its float32 weight, which gets its gradient through it, in float32.
        Faster than autocast, which casts activations back and forth. Sharded weights are left to autocast.

        A forward of its own does this by itself; with checkpointing the backward has to stand inside too.
        """
        if self.compute_dtype is None or self._low or any(isinstance(p, DTensor) for p in self.models.parameters()):
            yield
            return
        lowered = [p for p in self.models.parameters() if p.is_floating_point() and id(p) not in self._as_held]
        copies = {id(p): p.to(self.compute_dtype) for p in lowered}
        held = [(module, dict(module._parameters)) for module in self.models.modules() if module._parameters]
        try:
            self._low = True
            for module, own in held:
                for name, parameter in own.items():
                    if id(parameter) in copies:
                        del module._parameters[name]
                        module.__dict__[name] = copies[id(parameter)]
            yield
        finally:
            self._low = False
            for module, own in held:
                for name in own:
                    module.__dict__.pop(name, None)
                module._parameters = own

    @contextmanager
    def in_float32(self, name: str) -> Iterator[None]:
        """Forwards and backwards of one model in float32, whatever its weights are held in; no other may run.

        Frozen linear layers in fewer bits make their weights whole one after another, as each multiplies; of all other
        weights that are not in float32 `lowered` makes copies.
        """
        before, model = self.compute_dtype, self.models[name]
        low = [p for layer in low_precision_layers(model).values() for p in layer.parameters(recurse=False)]
        others = [p for other in self.models.values() if other is not model for p in other.parameters()]
        wide = all(p.is_floating_point() and p.itemsize >= 4 for p in model.parameters())
        with computing_in_float32(model):
            try:
                self._as_held = {id(parameter) for parameter in (*low, *others)}
                self.compute_dtype = None if wide else torch.float32
                yield
            finally:
                self._as_held, self.compute_dtype = set(), before

    def adding_in_place(self, *, large: int = LARGE) -> AbstractContextManager[None]:
        """Around a step's forwards and backwards: gradients of large embeddings and heads are made where they are kept.

        Only where nobody waits for them, as a wrapper for several processes would. See `kilter.models.tables`.
        """
        models: list[Any] = list(self.models.values())
        tables = [table for model in models for table in (model.get_input_embeddings(), model.get_output_embeddings())]
        return adding_in_place(tables, large=large)

    def autocast(self, device: torch.device) -> Any:
        """Around forwards of models that are not `lowered`, in `compute_dtype`."""
        needed = self.compute_dtype is not None and not self._low
        return torch.autocast(device.type, self.compute_dtype) if needed else nullcontext()

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Any]:
        """The Hugging Face model of a role with the role's adapter on, for sampling with a key-value cache."""
        held = self.roles[role]
        with self._switches[held.model].use(held.adapter):
            yield self.models[held.model]

    def set_checkpointing(self, on: bool) -> None:
        """Gradient checkpointing of every layer: it is computed again in the backward, under the same role.

        Raises:
            ModelError: a model does not support it.
        """
        model: Any
        for name, model in self.models.items():
            if on and not model.supports_gradient_checkpointing:
                raise ModelError(f"{type(model).__name__} has no gradient checkpointing; switch it off")
            if model.supports_gradient_checkpointing:
                model._set_gradient_checkpointing(on, functools.partial(self._checkpointed, name))

    def _checkpointed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """The checkpoint function of a model: computes again as the first time, with its adapter and what is read.

        Nothing random is recomputed (dropout is off), so the random state is not kept.
        """
        adapter, read = self._switches[name].active, self._last_layers[name].read

        def again(*args: Any) -> Any:
            with self._switches[name].use(adapter), self._last_layers[name].only(read):
                return function(*args)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What trains when that role trains: its adapter, or else its whole model; and its head."""
        held = self.roles[role]
        model = self.models[held.model]
        if held.adapter is not None:
            found = adapter_parameters(model, held.adapter)
        else:
            found = base_parameters(model if held.head is None else decoder(model))
        return found + (list(self.heads[held.head].parameters()) if held.head is not None else [])

    def train_only(self, *roles: str) -> list[nn.Parameter]:
        """Lets the parameters of these roles have gradients and no others; returns them, each once."""
        found = list({id(p): p for role in roles for p in self.parameters_of(role)}.values())
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in found:
            parameter.requires_grad_(True)
        return found


def decoder(model: Any) -> Any:
    """The part of a model that ends with its final hidden states: without the language head, when it has one."""
    if model.get_output_embeddings() is None:
        return model
    if model.base_model is model:
        raise ModelError(
            f"{type(model).__name__} does not name its decoder (base_model_prefix); use another kind of model"
        )
    return model.base_model


def hidden_size(model: Any) -> int:
    """Width of the final hidden states."""
    config = text_config(model.config)
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)
