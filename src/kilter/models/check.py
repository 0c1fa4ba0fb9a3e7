"""The both-ways check: the trunk's numbers against the untouched model's, before anything is trained.

The packed path is compared with the model as transformers runs it: one response at a time, no packing, no sharing, its
own default attention, log-softmax of its own `.logits`, float32; log-probs and gradient, on made-up groups longer than
any attention window (which is made short for the check) and on the first real batch. Families that cap attention scores
are compared with `eager`: their default, `sdpa`, drops the cap without a word, so it is the one that is wrong.

Packing is looked at with the dense mask and, where the model can be asked run by run, that way too. A difference that
only the runs make leaves the dense mask; one that only packing makes falls back to one padded row per response; each
with one line that names the fault. Any other difference refuses to train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilter.errors import CheckError, ModelError
from kilter.models.attention import has_attention_softcap, layer_windows, leave_segments, text_config
from kilter.models.heads import target_logprobs
from kilter.models.load import origin_config, plain_model
from kilter.models.quantized import stand_ins
from kilter.models.roles import plain_tensors
from kilter.models.segments import CAPPED
from kilter.models.trunk import Trunk, decoder
from kilter.tree import Group, Response, make_tree, size

log = logging.getLogger(__name__)

LOGPROB_FLOOR = 1e-4
"""Nats by which a log-prob may differ in float32 whatever the model's own spread."""
GRADIENT_FLOOR = 1e-3
"""|delta| / |g| by which the whole gradient may differ in float32."""
SPREAD_FACTOR = 3.0
"""A difference may be this many times what padding alone makes of the untouched model's numbers."""
SHORT_WINDOW = 8
"""What an attention window is made for the check, so that a small tree is longer than it."""


@dataclass(frozen=True, slots=True)
class Found:
    """How far the trunk's numbers are from the model's own."""

    gap: float
    """Largest |difference| of a log-prob, nats, or of a scalar head's number."""
    gradient_gap: float | None
    """|delta| / |g| over all parameters of the role; None: none of them trains."""
    gap_allowed: float
    gradient_gap_allowed: float

    @property
    def line(self) -> str:
        """The gaps and what is allowed."""
        numbers = f"numbers differ by {self.gap:.1e} (allowed {self.gap_allowed:.1e})"
        if self.gradient_gap is None:
            return numbers
        return f"{numbers}, gradient by {self.gradient_gap:.1e} (allowed {self.gradient_gap_allowed:.1e})"

    @property
    def within(self) -> bool:
        """Whether both are allowed; a NaN is not."""
        gradient_fits = self.gradient_gap is None or self.gradient_gap <= self.gradient_gap_allowed
        return self.gap <= self.gap_allowed and gradient_fits


@dataclass(frozen=True, slots=True)
class BothWays:
    """What the check says of one role."""

    role: str
    layout: str
    """"packed", or "unrolled" where packing was refused or never possible."""
    found: Found
    """The gaps in that layout."""
    fault: str | None
    """What made packing wrong, by name."""

    @property
    def line(self) -> str:
        """The finding in one line."""
        text = f"role {self.role!r}, {self.layout}, against the untouched model: {self.found.line}"
        return text if self.fault is None else f"{text}; packing refused ({self.fault}): one padded row per response"


def both_ways(
    trunk: Trunk, groups: Sequence[Group], role: str, *, strict: bool = False, max_tokens: int = 1024
) -> BothWays:
    """Compares a role with the untouched model and sets `trunk.layout` to what gives its numbers.

    Args:
        groups: of the first real batch; the longest and the first ones are looked at, `max_tokens` in all.
        strict: refuse where packing is wrong instead of falling back.
    Raises:
        CheckError: dropout is on, the head is not the model's, or even unpacked rows differ; with `strict`, any fault.
    """
    with _as_checked(trunk, role):
        refuse_dropout(trunk, role)
        refuse_lost_attention_softcap(trunk, role)
        pair = Pair(trunk, role)
        pair.refuse_head()
        probes = [made_up_groups(pair.vocab_size), _some(groups, max_tokens)]
        fault = None
        if trunk.layout == "packed":
            try:
                with _attending(trunk, dense=True):
                    found = pair.measure(probes)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as err:
                fault = f"the model does not take a tree: {err}"
            else:
                if found.within:
                    return BothWays(role, "packed", _with_segments(pair, probes, found), fault=None)
                fault = pair.fault_of_packing()
            if strict:
                raise CheckError(
                    f"role {role!r}: packing gives other numbers than the model ({fault}); use another model"
                )
            trunk.layout = "unrolled"
        report = BothWays(role, "unrolled", pair.measure(probes), fault=fault)
        if not report.found.within:
            raise CheckError(
                f"role {role!r}: even one padded row per response differs from the model's own: {report.found.line}; "
                f"Kilter does not know {type(pair.model).__name__} well enough to train it; use another model"
            )
        if fault is not None:
            log.warning("%s", report.line)
        return report


def _with_segments(pair: Pair, probes: Sequence[Sequence[Group]], found: Found) -> Found:
    """The worse of the gaps of the dense mask and of the faster way, which is switched off where it is wrong."""
    trunk, name = pair.trunk, pair.held.model
    with _attending(trunk, dense=False):
        if trunk.structure(name, make_tree([]).to(pair.device)) is None:
            return found
        try:
            by_segments = pair.measure(probes)
            fault = None if by_segments.within else by_segments.line
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, ModelError) as err:
            fault = str(err)
    if fault is None:
        return by_segments if by_segments.gap > found.gap else found
    leave_segments(trunk.models[name])
    log.warning(
        "role %r: attention by runs or blocks refused (%s); dense masks instead, slower on long rows", pair.role, fault
    )
    return found


@contextmanager
def _attending(trunk: Trunk, *, dense: bool) -> Iterator[None]:
    """Makes every tree be attended to by the dense mask, or else in the trunk's own way whatever its width."""
    kept = trunk.attention, trunk.dense_up_to
    trunk.attention, trunk.dense_up_to = "dense" if dense else trunk.attention, 0
    try:
        yield
    finally:
        trunk.attention, trunk.dense_up_to = kept


def made_up_groups(vocab_size: int, *, window: int = SHORT_WINDOW, longer: bool = True) -> list[Group]:
    """Random groups with one to three responses, of paths up to three windows long, or (not `longer`) within one."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())

    prompt, answer = (window + 3, window + 5) if longer else (window // 2, window // 2)
    return [Group(ids(prompt - i), tuple(Response(ids(answer - j)) for j in range(1 + i))) for i in range(3)]


def _some(groups: Sequence[Group], max_tokens: int) -> list[Group]:
    """The longest group and the first ones: enough to see a fault, few enough to cost little."""
    order = sorted(range(len(groups)), key=lambda i: (-size(groups[i]), i))[:1]
    order += [i for i in range(len(groups)) if i not in order]
    kept: list[Group] = []
    tokens = 0
    for i in order:
        tokens += size(groups[i])
        if kept and tokens > max_tokens:
            break
        kept.append(groups[i])
    return kept


@contextmanager
def _as_checked(trunk: Trunk, role: str) -> Iterator[None]:
    """Float32 without autocast; a scalar head of zeros is made random for the while, so that a difference shows."""
    held = trunk.roles[role]
    head: Any = trunk.heads[held.head] if held.head is not None else None
    kept = head.weight.detach().clone() if head is not None else None
    if head is not None and not head.weight.any():
        with torch.no_grad():
            head.weight.normal_(generator=torch.Generator(head.weight.device).manual_seed(0))
    try:
        with trunk.in_float32(held.model):
            yield
    finally:
        if kept is not None:
            with torch.no_grad():
                head.weight.copy_(kept)


def refuse_dropout(trunk: Trunk, role: str) -> None:
    """Refuses a role whose model still has a dropout above 0.

    Raises:
        CheckError: with the dropout's name and value.
    """
    model = trunk.models[trunk.roles[role].model]
    for name, module in model.named_modules():
        rates = {key: value for key, value in vars(module).items() if "drop" in key}
        if isinstance(module, nn.Dropout):
            rates["p"] = module.p
        for key, value in rates.items():
            if isinstance(value, int | float) and value > 0:
                raise CheckError(
                    f"role {role!r}: dropout on: {name}.{key} is {value:g}, so old and new log-probs would differ by "
                    "chance; load the model with kilter.models.load.load_model, which sets all dropout to 0"
                )


def refuse_lost_attention_softcap(trunk: Trunk, role: str) -> None:
    """Refuses a model that caps attention scores in any attention but `eager`.

    Raises:
        CheckError: the cap would be dropped without a word.
    """
    model: Any = trunk.models[trunk.roles[role].model]
    if has_attention_softcap(origin_config(model)) and model.config._attn_implementation not in ("eager", CAPPED):
        raise CheckError(
            f"role {role!r}: attention {model.config._attn_implementation!r} drops the cap that this model puts on "
            "attention scores (attn_logit_softcapping); load it with attention 'eager', the default for such models"
        )


class Pair:
    """A role of the trunk and the same weights in an untouched model, to be asked the same."""

    def __init__(self, trunk: Trunk, role: str) -> None:
        self.trunk, self.role, self.held = trunk, role, trunk.roles[role]
        whole: Any = trunk.models[self.held.model]
        self.head: Any = None if self.held.head is None else trunk.heads[self.held.head]
        self.model = whole if self.head is None else decoder(whole)
        self.config = origin_config(whole)
        with torch.no_grad():
            self.layers = stand_ins(self.model, self.held.adapter)
            # Only the shapes and names matter: `_tensors` takes their place in every question.
            shared = plain_tensors(self.model, None, low_precision=False)
            self.plain = plain_model(self.model, shared, config=self.config, layers=self.layers)
        self.vocab_size = int(text_config(self.config).vocab_size)
        self.device = next(trunk.parameters()).device
        self.plain.to(self.device)  # what is no weight: rotary frequencies and the like
        self.parameters = [p for p in trunk.parameters_of(role) if p.requires_grad]
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = plain_tensors(self.model, self.held.adapter, low_precision=False)
        low = (value for value in tensors.values() if value.is_floating_point() and value.itemsize < 4)
        whole = {id(value): value.float() for value in low}  # once each: what is tied stays so
        return {name: whole.get(id(value), value) for name, value in tensors.items()}

    def ours(self, rows: Rows) -> Tensor:
        """The trunk's numbers for rows of groups: log-probs [N], or the head's at `source` and `last` [N + R]."""
        tree = make_tree(rows).to(self.device)
        if self.head is None:
            logprobs: Tensor = self.trunk(tree, {self.role: "logprobs"})[self.role]
            return logprobs
        values = self.trunk(tree, {self.role: "values"})[self.role]
        return torch.cat([values, self.trunk(tree, {self.role: "rewards"})[self.role]])

    def theirs(self, rows: Rows, *, padding: int = 0) -> Tensor:
        """The same from the untouched model: one forward per response, `padding` unused positions after each."""
        tensors = self._tensors()
        at_source, at_last = [], []
        for group in (group for row in rows for group in row):
            for response in group.responses:
                path = torch.tensor(group.prompt + response.ids, device=self.device)
                inputs = {"input_ids": nn.functional.pad(path, (0, padding))[None]}
                if padding:
                    used = torch.arange(len(path) + padding, device=self.device) < len(path)
                    inputs["attention_mask"] = used.long()[None]
                output = torch.func.functional_call(self.plain, tensors, kwargs=inputs | {"use_cache": False})
                spans = response.spans or ((0, len(response.ids)),)
                depth = len(group.prompt)
                places = torch.cat([torch.arange(depth + start, depth + end) for start, end in spans])
                places = places.to(self.device)
                if self.head is None:
                    logprobs = output.logits[0].float().log_softmax(-1)
                    at_source.append(logprobs[places - 1, path[places]])
                else:
                    numbers = nn.functional.linear(output.last_hidden_state[0].float(), self.head.weight)[:, 0]
                    at_source.append(numbers[places - 1])
                    at_last.append(numbers[len(path) - 1, None])
        return torch.cat(at_source + at_last)

    def measure(self, probes: Sequence[Sequence[Group]]) -> Found:
        """The gaps over the made-up groups (first of `probes`; windows made short) and the real ones."""
        gap, gradient_gap = self._gap(self.ours, self.theirs, probes[0], shorten=True)
        spread, gradient_spread = self._gap(lambda rows: self.theirs(rows, padding=16), self.theirs, probes[0])
        for groups in probes[1:]:
            if groups:
                more, more_gradient = self._gap(self.ours, self.theirs, groups)
                gap = _worse(gap, more)
                gradient_gap = None if more_gradient is None else _worse(gradient_gap or 0.0, more_gradient)
        return Found(
            gap,
            gradient_gap,
            max(LOGPROB_FLOOR, SPREAD_FACTOR * spread),
            max(GRADIENT_FLOOR, SPREAD_FACTOR * (gradient_spread or 0.0)),
        )

    def _gap(
        self, one: Ask, other: Ask, groups: Sequence[Group], *, shorten: bool = False
    ) -> tuple[float, float | None]:
        key = (id(groups), shorten)  # the untouched model says the same every time
        with _short_windows(self.model, self.plain) if shorten else nullcontext():
            if key not in self._known:
                self._known[key] = self._answer(other, _rows(groups))
            numbers, gradient = self._answer(one, _rows(groups))
        others, other_gradient = self._known[key]
        gap = float((numbers - others).abs().max())
        if not self.parameters:
            return gap, None
        return gap, float((gradient - other_gradient).norm() / other_gradient.norm().clamp(min=1e-12))

    def _answer(self, ask: Ask, rows: Rows) -> tuple[Tensor, Tensor]:
        """Numbers, and the gradient of a random mix of them, all parameters in one vector."""
        with self.trunk.lowered() if ask == self.ours else nullcontext():  # the backward too: it may compute again
            return self._numbers_and_gradient(ask, rows)

    def _numbers_and_gradient(self, ask: Ask, rows: Rows) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(bool(self.parameters)):
            numbers = ask(rows)
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(len(numbers), generator=generator).to(numbers.device)
        if not self.parameters:
            return numbers, mix
        found = torch.autograd.grad((mix * numbers).sum(), self.parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        return numbers.detach(), torch.cat([g.flatten().float() for g in flat])

    def refuse_head(self) -> None:
        """Refuses a language head that is not the model's: the trunk's head on the model's own last hidden states.

        Raises:
            CheckError: the log-probs differ.
        """
        if self.head is not None:
            return
        seen: list[Tensor] = []
        hook = self.plain.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        path = torch.tensor(made_up_groups(self.vocab_size)[0].prompt, device=self.device)
        with torch.no_grad():
            inputs = {"input_ids": path[None], "use_cache": False}
            output = torch.func.functional_call(self.plain, self._tensors(), kwargs=inputs)
            own = output.logits[0, :-1].float().log_softmax(-1)
            hook.remove()
            with self.trunk.lowered():
                ours = target_logprobs(self.model, seen[0][0, :-1], path[1:])
        gap = float((ours - own.gather(1, path[1:, None])[:, 0]).abs().max())
        if not gap <= LOGPROB_FLOOR:
            raise CheckError(
                f"role {self.role!r}: the language head is not the model's own: from the same hidden states its "
                f"log-probs differ by {gap:.1e} nats; a softcap or a scale of the logits is lost (compare the model's "
                "configuration with its config.json)"
            )

    @torch.no_grad()
    def fault_of_packing(self) -> str:
        """Names what is wrong with the packed numbers, from probes that differ in one thing each."""
        generator = torch.Generator().manual_seed(2)

        def ids(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(self.vocab_size, (length,), generator=generator).tolist())

        prompt, kept = ids(4), ids(4)

        def kept_numbers() -> Tensor:
            """Of the four kept tokens, while another tree, a sibling and the token after them are drawn anew."""
            other, sibling, end = Group(ids(5), (Response(ids(3)),)), Response(ids(5)), ids(1)
            rows = [[other, Group(prompt, (sibling, Response(kept + end)))]]
            return self.ours(rows)[3 + 5 : 3 + 5 + len(kept)]

        if not float((kept_numbers() - kept_numbers()).abs().max()) <= LOGPROB_FLOOR:
            return "leaked mask: a token's log-prob depends on tokens outside its own path"
        windows = [window for window in layer_windows(self.config).values() if window is not None]
        if windows:
            within = made_up_groups(self.vocab_size, longer=False)
            with _short_windows(self.model, self.plain):
                gap = (self.ours(_rows(within)) - self.theirs(_rows(within))).abs().max()
            if float(gap) <= LOGPROB_FLOOR:
                return (
                    f"lost window: paths longer than the attention window of {windows[0]} differ, shorter ones do not"
                )
        return "the model does not read positions or mask as a tree needs (ALiBi or a state-space layer does not)"


Rows = Sequence[Sequence[Group]]
Ask = Callable[[Rows], Tensor]


def _worse(one: float, other: float) -> float:
    return one if one > other or one != one else other


def _rows(groups: Sequence[Group]) -> list[list[Group]]:
    """Two rows, so that one has an unused tail and both hold several trees; one row for one group."""
    return [row for row in (list(groups[::2]), list(groups[1::2])) if row]


@contextmanager
def _short_windows(*models: Any) -> Iterator[None]:
    """Makes every attention window of these models `SHORT_WINDOW` positions long for a while."""
    holders = [holder for model in models for holder in (text_config(model.config), *model.modules())]
    changed = []
    for holder in holders:
        window = vars(holder).get("sliding_window")
        if isinstance(window, int) and window > SHORT_WINDOW:
            changed.append((holder, window))
            holder.sliding_window = SHORT_WINDOW
    try:
        yield
    finally:
        for holder, window in changed:
            holder.sliding_window = window
