"""The reference's log-probs on disk: read where they are the right ones, made anew where they are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kilter.models.build import policy_trunk
from kilter.models.roles import Lora
from kilter.train import reference
from kilter.train.reference import Cache, default_folder, with_reference
from kilter.tree import Group, Response


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups each call computed."""
    calls: list[int] = []
    right = reference._computed
    monkeypatch.setattr(
        reference, "_computed", lambda trunk, groups, *rest: (calls.append(len(groups)), right(trunk, groups, *rest))[1]
    )
    return calls


def values(groups: list[Group]) -> list[list[float]]:
    return [response.per_token["ref_logprobs"].tolist() for group in groups for response in group.responses]


def test_the_second_time_they_are_read_to_the_bit(make: Any, tmp_path: Path, counted: list[int]) -> None:
    groups, trunk = make.groups(9, k=3), make.trunk()
    first = with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))
    assert values(first) == values(with_reference(trunk, groups))
    counted.clear()
    assert values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))) == values(first)
    assert counted == [reference.VERIFIED]
    assert trunk.training and len(list(tmp_path.iterdir())) == 1
    for name in ("rank", "margin"):
        assert first[0].responses[0].per_response[name] == groups[0].responses[0].per_response[name]


def test_another_policy_with_the_same_reference_reads_them(make: Any, tmp_path: Path, counted: list[int]) -> None:
    """The key follows from the reference alone; with LoRA that is the trunk with its adapter off."""
    groups = make.groups(6)
    trunk = policy_trunk(make.llama(1), lora=Lora(2), generator=torch.Generator().manual_seed(0))
    expected = values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk)))
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    counted.clear()
    assert values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))) == expected
    plain = policy_trunk(make.llama(1), reference=True)
    assert values(with_reference(plain, groups, cache=Cache.of(tmp_path, plain))) == expected
    assert counted == [reference.VERIFIED] * 2
    of_policy = values(with_reference(trunk, groups, role="policy", cache=Cache.of(tmp_path, trunk, "policy")))
    assert of_policy != expected and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("what", ["weights", "tokens", "spans", "order", "packing", "precision"])
def test_whatever_they_follow_from_makes_another_key(what: str, make: Any, tmp_path: Path, counted: list[int]) -> None:
    groups, trunk = make.groups(5), make.trunk()
    with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))
    budget = {}
    if what == "weights":
        with torch.no_grad():
            next(iter(trunk.models["reference"].parameters())).view(-1)[0] += 1e-3
    elif what in ("tokens", "spans"):
        prompt, (one, other) = groups[0].prompt, groups[0].responses
        ids = (4 if one.ids[0] == 3 else 3, *one.ids[1:]) if what == "tokens" else one.ids
        spans = ((1, len(one.ids)),) if what == "spans" else None
        groups[0] = Group(prompt, (Response(ids, spans, {}, one.per_response), other))
    elif what == "order":
        groups = groups[::-1]
    elif what == "packing":
        budget = {"row_tokens": 40}
    else:
        trunk.compute_dtype = torch.bfloat16
    counted.clear()
    with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk), **budget)
    assert counted == [5] and len(list(tmp_path.iterdir())) == 2


def test_shards_resume_and_report(
    make: Any, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SHARD", 4)
    groups, trunk = make.groups(10), make.trunk()
    told: list[tuple[int, int]] = []
    whole = with_reference(
        trunk, groups, cache=Cache.of(tmp_path, trunk), progress=lambda done, of: told.append((done, of))
    )
    assert counted == [4, 4, 2] and told[-1] == (10, 10) and told == sorted(told)
    (newest,) = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size)[:1]
    newest.unlink()  # as if the run had been stopped before its last shard
    counted.clear()
    assert values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))) == values(whole)
    assert counted == [reference.VERIFIED, reference.VERIFIED, 2]


@pytest.mark.parametrize("damage", ["wrong", "short", "cut", "nan", "other"])
def test_what_is_not_right_is_made_anew_with_a_warning(
    damage: str, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups, trunk = make.groups(5), make.trunk()
    expected = values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk)))
    (file,) = tmp_path.iterdir()
    held = safetensors.torch.load_file(file)["logprobs"]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        spoilt = {"wrong": held + 0.01, "short": held[:-1], "nan": held * torch.nan, "other": held}[damage]
        safetensors.torch.save_file({"logprobs" if damage != "other" else "x": spoilt}, file)
    with caplog.at_level(logging.WARNING, logger="kilter"):
        assert values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))) == expected
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(file) in line and "computed anew" in line
    caplog.clear()
    assert values(with_reference(trunk, groups, cache=Cache.of(tmp_path, trunk))) == expected and not caplog.records


def test_a_cache_that_cannot_be_written_is_said_and_no_more(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    with caplog.at_level(logging.WARNING, logger="kilter"):
        trunk = make.trunk()
        found = with_reference(trunk, make.groups(3), cache=Cache.of(tmp_path / "file" / "cache", trunk))
    assert len(values(found)) == 6 and "could not be kept" in caplog.records[0].getMessage()
    assert (tmp_path / "file").read_text() == "mine"


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KILTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder() == tmp_path / ".cache" / "kilter"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == Path("/x/kilter")
    monkeypatch.setenv("KILTER_CACHE", "/y")
    assert default_folder() == Path("/y")
