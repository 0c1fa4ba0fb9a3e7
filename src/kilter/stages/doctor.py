"""The checks of a run's start, and a few more, on a user's own model and data; none of them trains anything."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from kilter import data
from kilter.data.chat import ChatEncoder
from kilter.errors import KilterError
from kilter.models.build import policy_trunk
from kilter.models.check import both_ways
from kilter.models.generation import NativeSampler
from kilter.models.load import load_model, load_tokenizer, remove_dropout
from kilter.models.sampling import Sampling, Stops, draw_seeds
from kilter.models.save import sequence_classifier
from kilter.models.trunk import Trunk
from kilter.records import Message, Prompt
from kilter.report.needs import memory
from kilter.rollout.reward import paid_rewards
from kilter.stages.plan import shape_of
from kilter.train.checks import (
    Verdict,
    check_bos,
    check_end_scored,
    check_policy_is_reference,
    check_scored,
    check_signs,
)
from kilter.train.reference import with_reference
from kilter.train.sources import groups_of
from kilter.tree import Group, Response, make_batches

EXAMINED = 64  # records: enough to see a template at work, quick on any model
PROBE = (Message("user", "What is two plus two?"), Message("assistant", "It is four."))


def examine(model: str, path: str | None = None) -> list[Verdict]:
    """Every check, in the order in which a run would meet them.

    Raises:
        ModelError: the model cannot be loaded at all. DataError: the file cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(model)
    loaded = load_model(model)
    vocabulary = _vocabulary(loaded, tokenizer)
    if not vocabulary.passed:
        return [_machine(), vocabulary]  # the first forward would fail
    encoder = ChatEncoder(tokenizer)
    groups = _groups(encoder, tokenizer, path)
    batches = make_batches(groups, row_tokens=1024, batch_tokens=8192, pad_id=encoder.pad_id)
    trunk = policy_trunk(loaded, reference=True)
    return [
        _machine(),
        vocabulary,
        *_tokenizer(encoder),
        check_scored(batches),
        check_end_scored(batches, encoder.stop_ids),
        check_bos(batches, tokenizer.bos_token_id, encoder.stop_ids),
        _dropout(loaded),
        _both_ways(trunk, groups),
        *_reference(trunk, groups, encoder.pad_id),
        *check_signs(partial(paid_rewards, kl_coef=0.1)),
        _end_reachable(trunk, encoder, path),
        _attempt("reward model", lambda: sequence_classifier(loaded.config).__name__, "can be saved as a classifier"),
        _memory(loaded),
    ]


def _groups(encoder: ChatEncoder, tokenizer: Any, path: str | None) -> list[Group]:
    if path is None:
        ids, answer = encoder.prompt(PROBE[:1]), encoder.response(PROBE[:1], PROBE[1].content)
        return [Group(ids, (Response(answer), Response(answer[-2:])))]
    records = [one for one in data.read(path, limit=EXAMINED).records if not isinstance(one, Prompt)]
    return groups_of(encoder, records, max_tokens=1024, bos_id=tokenizer.bos_token_id).groups


def _attempt(name: str, act: Callable[[], str], rule: str) -> Verdict:
    """A check that is made by trying."""
    try:
        return Verdict(name, True, act(), rule)
    except KilterError as err:
        return Verdict(name, False, str(err).split(";")[0], rule, str(err).rpartition(";")[2].strip())


def _machine() -> Verdict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: everything runs on the CPU"
    cores = os.cpu_count() or 1
    value = f"torch {torch.__version__}, transformers {transformers.__version__}, {cores} cores, {device}"
    return Verdict("machine", True, value, "what the figures of a run depend on is saved with it")


def _vocabulary(model: Any, tokenizer: Any) -> Verdict:
    rows = model.get_input_embeddings().weight.shape[0]
    return Verdict(
        "vocabulary",
        len(tokenizer) <= rows,
        f"{len(tokenizer)} tokens, {rows} embeddings",
        "every token of the tokenizer has an embedding",
        "use the tokenizer that belongs to the model, or resize the model's embeddings",
    )


def _tokenizer(encoder: ChatEncoder) -> list[Verdict]:
    notes = "; ".join(encoder.notes) or "nothing special"
    return [
        Verdict("chat template", True, f"{encoder.template_name}: {notes}", "answers are cut at span borders"),
        Verdict(
            "end of turn",
            bool(encoder.stop_ids),
            f"tokens {list(encoder.stop_ids)}, padding {encoder.pad_id}",
            "an answer can end, and padding is never inferred from token values",
            "set `eos_token` in the tokenizer, or give a template that ends turns with a special token",
        ),
        Verdict(
            "prefix-stable template",
            True,
            "yes" if encoder.prefix_stable else "no: each turn is scored in a row of its own",
            "earlier turns look the same in a longer conversation",
        ),
    ]


def _dropout(model: Any) -> Verdict:
    found = remove_dropout(copy.deepcopy(model.kilter_origin))  # what it was published with
    value = ", ".join(f"{name} {rate:g}" for name, rate in found.items()) or "none published"
    active = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    return Verdict(
        "dropout",
        not active,
        f"{value}; active now: {', '.join(active) or 'none'}",
        "set to 0 when loading, so that two forwards of one policy agree",
        "load the model with kilter.models.load.load_model",
    )


def _both_ways(trunk: Trunk, groups: Sequence[Group]) -> Verdict:
    return _attempt(
        "both ways",
        lambda: both_ways(trunk, groups, "policy").line,
        "log-probs and gradients equal those of the untouched model, unpacked",
    )


def _reference(trunk: Trunk, groups: Sequence[Group], pad_id: int) -> list[Verdict]:
    held = with_reference(trunk, groups, pad_id=pad_id)
    batches = make_batches(held, row_tokens=1024, batch_tokens=8192, pad_id=pad_id)
    return check_policy_is_reference(trunk, batches)


def _end_reachable(trunk: Trunk, encoder: ChatEncoder, path: str | None) -> Verdict:
    """Does the model ever end its answer by itself? PPO on one that does not pays for cut answers."""
    prompts = [encoder.prompt(PROBE[:1])]
    if path is not None:
        records = data.read(path, record="prompt", limit=8).records
        prompts = [encoder.prompt(one.prompt) for one in records if isinstance(one, Prompt)]
    drawn = NativeSampler(trunk, "policy").sample(
        prompts,
        draw_seeds(torch.Generator().manual_seed(0), len(prompts), 4),
        sampling=Sampling(max_new_tokens=128),
        stops=Stops(encoder.stop_ids),
    )
    answers = [one for row in drawn for one in row]
    ended = sum(one.finished for one in answers)
    value = f"{ended} of {len(answers)} sampled answers end within 128 tokens"
    if not ended:
        value += " (a base model often does not; SFT teaches it)"
    return Verdict("end reachable", True, value, "stated, not required: read it before PPO")


def _memory(model: Any) -> Verdict:
    four, two, one = memory(shape_of(model.config))
    value = f"{four:.2f} GiB as four full models, {two:.2f} as two, {one:.2f} as roles on one trunk"
    return Verdict("memory", True, value, "weights, gradients and optimizer of PPO; activations come on top")
