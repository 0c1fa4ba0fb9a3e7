"""Reward models of real preferences, audited on real data: HH-RLHF, RM-Bench and LLMBar.

    python tools/real_audit.py --out runs/real                measure what is not measured yet; resumable
    python tools/real_audit.py --out runs/real --draw docs    real_audit.json and the section of audit.md

HH-RLHF's pairs are split by their first turn into those to learn from and those to audit on. Every design learns from
demonstrations (the chosen answers), then from pairs; both stages set the same prompts aside, by which the reward model
is stopped and the designs are compared. The best is audited.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from annotated import put
from kilter import data
from kilter.config import AUDIT_PROMPTS, parse
from kilter.data.chat import ChatEncoder
from kilter.data.split import split_by_prompt, split_key
from kilter.models.load import load_tokenizer
from kilter.records import PreferencePair, Record, Sample
from kilter.rundir import RunDir, read_jsonl, write_folder, write_json
from kilter.scorers import load_reward_scorer
from kilter.stages import run_recipe
from kilter.stages.audit import audit_file, write_audit
from kilter.stages.context import HELD_OUT
from kilter.stats import clustered_share
from kilter.world import model as parts

TRANCHES = ("harmless-base", "helpful-base", "helpful-rejection-sampled")
LLMBAR = {
    "llmbar": ("natural", "adversarial_gptinst", "adversarial_gptout", "adversarial_manual", "adversarial_neighbor"),
    "llmbar-processed": ("processed_faireval", "processed_llmeval2", "processed_mt_bench"),
}
RM_BENCH = ("chat", "code", "safety-refuse", "safety-response")
AUDITED, ASIDE = 0.25, 0.15
"""Share of the conversations that are audited on, and of the others that both stages set aside."""
VOCABULARY, POSITIONS = 4096, 1024
STAGE = "learned"
"""What the stage of every recipe is called: what a stage sets aside follows from its seed, its name and the prompt, so
that demonstrations and pairs of one conversation are set aside together."""


class Design(NamedTuple):
    """What a reward model starts from, and how it learns."""

    about: str
    start: str
    """A model's folder below `--models`, or `fresh`."""
    demonstrations: dict[str, Any]
    pairs: dict[str, Any]


def optim(max_tokens: int, learning_rate: float, **more: Any) -> dict[str, Any]:
    """Of both stages."""
    return {"learning_rate": learning_rate, "max_tokens": max_tokens, "batch_size": 32, "row_tokens": 256, **more}


STORIES, FRESH = "stories260K/hf", "fresh"
STOPPED = {"evaluate_every": 25, "early_stop": 3}
SELDOM = {"evaluate_every": 36, "early_stop": 3}
TOLD = {"epochs": 1, "optim": optim(512, 1e-3)}
READ = {"epochs": 1, "optim": optim(POSITIONS, 3e-3, weight_decay=0.1)}
DESIGNS = {
    "stories": Design("stories260K, every weight", STORIES, TOLD, {"epochs": 3, "optim": optim(512, 5e-4, **STOPPED)}),
    "fresh": Design("fresh decoder", FRESH, READ, {"epochs": 1, "optim": optim(POSITIONS, 1e-3, **SELDOM)}),
}


# Data ----------------------------------------------------------------------------------------------------------------


def pairs_of(folder: Path) -> tuple[list[PreferencePair], dict[str, dict[str, int]]]:
    """HH-RLHF's readable pairs of two texts, their kind the tranche, and what each file held."""
    pairs: list[PreferencePair] = []
    told = {}
    for name in TRANCHES:
        path = folder / "hh_rlhf" / f"{name}.test.jsonl.gz"
        read = data.read(path, record="pair", skip_bad=True)
        kept = [one for one in read.records if isinstance(one, PreferencePair) and one.chosen != one.rejected]
        pairs += [replace(one, kind=name) for one in kept]
        equal = len(read.records) - len(kept)
        told[name] = longer_in(path) | {"unreadable": len(read.skipped), "equal texts": equal, "pairs": len(kept)}
    return pairs, told


def longer_in(path: Path) -> dict[str, int]:
    """Of all rows of an HH-RLHF file, readable or not, in how many the chosen transcript has more words than the
    rejected one, in how many as many. Both begin alike, so it is the last answers that differ."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    gaps = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    return {"rows": len(rows), "longer": sum(gap > 0 for gap in gaps), "as long": sum(gap == 0 for gap in gaps)}


def prepare(folder: Path, out: Path, seed: int) -> dict[str, Any]:
    """OUT/train.jsonl, audit.jsonl and the files of LLMBar, and what they hold; made once."""
    file = out / "data.json"
    if not file.exists():
        pairs, told = pairs_of(folder)
        train, audited = split_by_prompt(pairs, held_out=AUDITED, seed=seed)
        sets: dict[str, list[Record]] = {"train": [*train], "audit": [*audited]}
        for name, files in LLMBAR.items():
            sets[name] = []
            for one in files:
                read = data.read(folder / "llmbar" / f"{one}.jsonl", record="pair", skip_bad=True)
                sets[name] += [replace(pair, kind=one) for pair in read.records if isinstance(pair, PreferencePair)]
                told[one] = {"rows": read.rows, "unreadable": len(read.skipped), "pairs": len(read.records)}
        for name, records in sets.items():
            data.write(out / f"{name}.jsonl", records)
        write_json(file, {"files": told, "train": len(train), "audited": len(audited)})
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


# Training ------------------------------------------------------------------------------------------------------------


def run(out: Path, name: str, seed: int, stage: dict[str, Any]) -> RunDir:
    """A run directory of one stage, made or gone on with."""
    recipe = {"name": name, "seed": seed, "threads": 1, "stages": {STAGE: stage}}
    return run_recipe(parse(recipe, name), out / name)


def fresh(out: Path, seed: int) -> Path:
    """A decoder without any training, whose tokens are those of the pairs to learn from."""
    folder = out / FRESH
    if not folder.exists():
        pairs = [one for one in data.read(out / "train.jsonl").records if isinstance(one, PreferencePair)]
        texts = [text for one in pairs for text in (*(turn.content for turn in one.prompt), one.chosen, one.rejected)]
        tokenizer = parts.wrap(parts.train_tokenizer(texts, size=VOCABULARY), positions=POSITIONS)
        config = parts.make_config(tokenizer)
        with write_folder(folder) as beside:
            parts.make_model(config, torch.Generator().manual_seed(seed)).save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    return folder


def learn(out: Path, models: Path, name: str, seed: int) -> RunDir:
    """The reward model of a design."""
    design = DESIGNS[name]
    start = fresh(out, seed) if design.start == FRESH else models / design.start
    told = {"path": str((out / "train.jsonl").resolve()), "score": "all"}
    sft = {"stage": "sft", "model": str(start.resolve()), "data": told, "held_out": ASIDE, **design.demonstrations}
    told_by = run(out, f"sft-{design.start.partition('/')[0]}", seed, sft).stage(1, STAGE).result
    reward = {"stage": "reward", "model": str(told_by.resolve()), "data": told["path"], "held_out": ASIDE}
    reward["audit"] = {"prompts": 0}  # it is audited on pairs of its own below
    return run(out, f"reward-{name}", seed, reward | design.pairs)


# Measures ------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[PreferencePair]:
    """A file of pairs that a stage or `prepare` wrote."""
    return [one for one in data.read(path).records if isinstance(one, PreferencePair)]


def compared(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """How the designs order the pairs that both stages set aside: those they can read, those that all can, and all,
    where one that a design cannot read counts one half, as a coin would."""
    folders = {name: RunDir(out / f"reward-{name}").stage(1, STAGE) for name in names}
    aside = [read_pairs(folder.path / HELD_OUT) for folder in folders.values()]
    assert all(pairs == aside[0] for pairs in aside), "the designs set different pairs aside"
    pairs, clusters = aside[0], [split_key(one) for one in aside[0]]
    train = read_pairs(out / "train.jsonl")
    right = {}
    for name, folder in folders.items():
        scorer = load_reward_scorer(folder.result)
        scores = scorer.score([Sample(one.prompt, text) for one in pairs for text in (one.chosen, one.rejected)])
        values = [(one.value, other.value) for one, other in zip(scores[::2], scores[1::2], strict=True)]
        right[name] = [None if None in row else _won(*row) for row in values]
    shared = [at for at in range(len(pairs)) if all(row[at] is not None for row in right.values())]
    found = {}
    for name, row in right.items():
        read = [at for at, one in enumerate(row) if one is not None]
        steps = read_jsonl(folders[name].path / "metrics.jsonl")
        columns = {"read": read, "shared": shared, "all": range(len(pairs))}
        found[name] = {
            "about": DESIGNS[name].about,
            "steps": len(steps),
            "best_step": min((row["eval/loss"], row["step"]) for row in steps if "eval/loss" in row)[1],
            "parameters": _parameters(folders[name].result),
            **fitting(folders[name].result, train),
            **{
                key: clustered_share(
                    [0.5 if (won := row[at]) is None else won for at in places], [clusters[at] for at in places]
                ).to_dict()
                for key, places in columns.items()
            },
        }
    return found


def fitting(model: Path, pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """How many tokens a model reads, and how many pairs fit."""
    encoder = ChatEncoder(load_tokenizer(str(model)))
    positions = int(json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])
    sizes = [
        len(encoder.prompt(one.prompt))
        + max(len(encoder.response(one.prompt, text)) for text in (one.chosen, one.rejected))
        for one in pairs
    ]
    return {"positions": positions, "fits": sum(size <= positions for size in sizes)}


def _won(better: float | None, worse: float | None) -> float:
    assert better is not None and worse is not None
    return 0.5 if better == worse else float(better > worse)


def _parameters(folder: Path) -> int:
    return sum(
        math.prod(about["shape"])
        for name, about in json.loads(_header(folder / "model.safetensors")).items()
        if name != "__metadata__"
    )


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def by_words(out: Path) -> dict[str, Any]:
    """A yardstick: logistic regression on which words the two answers hold, from all pairs to learn from; its accuracy
    on those to audit on, by tranche and of all."""
    learned, judged = read_pairs(out / "train.jsonl"), read_pairs(out / "audit.jsonl")
    words = CountVectorizer(min_df=5, binary=True, dtype=np.float64)
    words.fit([text for one in learned for text in (one.chosen, one.rejected)])
    gaps = [
        words.transform([one.chosen for one in pairs]) - words.transform([one.rejected for one in pairs])
        for pairs in (learned, judged)
    ]
    turned = np.arange(len(learned)) % 2 == 1  # every second pair the other way round: two classes
    signs = np.where(turned, -1.0, 1.0)
    fitted = LogisticRegression(C=0.01, fit_intercept=False).fit(gaps[0].multiply(signs[:, None]).tocsr(), ~turned)
    right = [_won(gap, 0.0) for gap in fitted.decision_function(gaps[1]).tolist()]
    found = {}
    for name in (*TRANCHES, "all"):
        rows = [(won, split_key(one)) for won, one in zip(right, judged, strict=True) if name in (one.kind, "all")]
        found[name] = clustered_share([won for won, _ in rows], [key for _, key in rows]).to_dict()
    return found


def audited(out: Path, folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The audits of a design, each made once: OUT/audits/NAME/FILE.json. That of HH-RLHF stands in the model's folder
    too, with its page."""
    model = RunDir(out / f"reward-{name}").stage(1, STAGE).result
    files = {"HH-RLHF": out / "audit.jsonl"}
    files |= {f"RM-Bench {one}": folder / "rm_bench" / f"{one}.jsonl.gz" for one in RM_BENCH}
    files |= {f"LLMBar {one.partition('-')[2]}".strip(): out / f"{one}.jsonl" for one in LLMBAR}
    found = {}
    for title, path in files.items():
        file = out / "audits" / name / f"{title.replace(' ', '-')}.json"
        if not file.exists():
            begun = time.process_time()
            told = audit_file(str(model), str(path), prompts=AUDIT_PROMPTS)
            if title == "HH-RLHF":
                write_audit(told, model)
            write_json(file, told | {"seconds": time.process_time() - begun})
            print(f"{name}, {title}: failed {told['failed']}", flush=True)
        found[title] = json.loads(file.read_text(encoding="utf-8"))
    return found


KEPT = ("passed", "failed", "prompts", "left_out", "unscored", "spread", "by_kind", "detectors", "length", "longer")
KEPT += ("longer_by_kind", "paraphrase", "style", "seconds")


def figures(told: Mapping[str, Any]) -> dict[str, Any]:
    """What an audit found, without the texts and folders it found it in."""
    calibrated = {key: value for key, value in told["calibration"].items() if key != "reliability"}
    return {"calibration": calibrated, **{key: told[key] for key in KEPT}}


# The page ------------------------------------------------------------------------------------------------------------


SECTION = """## On real data

`python tools/real_audit.py`, then `--draw docs`; the files are public and no part of Kilter. Pairs of HH-RLHF's three
test tranches ({kinds}), split by the first turn of
their conversation: {train:,} to learn from, {audited:,} to audit on, no first turn on both sides. {left}
are left out. Every design learns from the chosen dialogues (SFT), then from the pairs; both stages set the same
{aside:.0%} of the conversations aside, by which the reward model is stopped and the designs are compared. One seed: the
intervals are those of the pairs, not of another training.
"""
COMPARED = """Of the pairs set aside. In the last column an unread pair counts one half, as a coin would; by it the
design is chosen that is audited: **{best}**. Chance is 0.5.
"""
HH = """### HH-RLHF, {prompts} prompts with edited copies

{rows}

The longer answer has more words (runs without blanks); equal lengths count one half. "Longer is chosen" is what a judge
who always prefers the longer would score; one who prefers the shorter scores 1 less it. Of all {rows_all:,} rows of
harmless-base, the unreadable ones too, the longer one is the chosen one in {harmless:.1%} ({equal:.1%} are as long).
{unscored} of the {comparisons:,} comparisons could not be scored.

A yardstick: logistic regression on which words the two answers hold (scikit-learn, C = 0.01), from the same pairs,
is right about {yardstick}.

{calibration}
"""


def section(
    about: Mapping[str, Any],
    designs: Mapping[str, Mapping[str, Any]],
    yardstick: Mapping[str, Mapping[str, Any]],
    best: str,
    audits: Mapping[str, Mapping[str, Any]],
) -> str:
    """Markdown: the data, the designs, HH-RLHF by tranche, and the other files."""
    files = about["files"]
    left = sum(files[name]["unreadable"] for name in TRANCHES), sum(files[name]["equal texts"] for name in TRANCHES)
    opening = SECTION.format(
        kinds=", ".join(TRANCHES),
        train=about["train"],
        audited=about["audited"],
        left=f"{left[0]} rows that do not hold two answers to one prompt and {left[1]} of two equal answers",
        aside=ASIDE,
    )
    lines = [
        opening,
        "| design | parameters | tokens it reads | pairs to learn from that fit | weights of step "
        "| accuracy, pairs it reads | pairs that all read | all pairs set aside |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in designs.values():
        cells = [said_of(row[key]) for key in ("read", "shared", "all")]
        fits = f"{row['fits']:,} of {about['train']:,}"
        cells = [f"{row['parameters']:,}", row["positions"], fits, f"{row['best_step']} of {row['steps']}", *cells]
        lines.append(f"| {row['about']} | {' | '.join(map(str, cells))} |")
    lines += ["", COMPARED.format(best=designs[best]["about"])]
    own = audits["HH-RLHF"]
    harmless = files[TRANCHES[0]]
    comparisons = own["calibration"]["pairs"] + own["unscored"]
    lines.append(
        HH.format(
            prompts=own["prompts"],
            rows=_by_kind(own, "tranche"),
            rows_all=harmless["rows"],
            harmless=harmless["longer"] / harmless["rows"],
            equal=harmless["as long"] / harmless["rows"],
            unscored=own["unscored"],
            yardstick=", ".join(f"{said_of(found)} of {name}" for name, found in yardstick.items()),
            comparisons=comparisons,
            calibration=_calibrated(own["calibration"]),
        )
    )
    lines += ["| detector | effect, 95% | verdict | copies not scored |", "|---|---|---|---|"]
    for one in own["detectors"]:
        effect = "" if one["effect"] is None else said_of(one["effect"], "+.2f")
        lines.append(f"| `{one['name']}` | {effect} | {one['verdict']} | {one['unscored']} |")
    lines += ["", "### RM-Bench", "", *_rm_bench(audits), "", "### LLMBar", ""]
    llmbar = [told for title, told in audits.items() if title.startswith("LLMBar")]
    lines.append(_by_kind(*_merged(llmbar)))
    lines += ["", f"{sum(told['unscored'] for told in llmbar)} comparisons could not be scored."]
    lines += ["", "### What failed", "", "| audited | failed | not measured | processor seconds |", "|---|---|---|---|"]
    for title, told in audits.items():
        failed = ", ".join(f"`{name}`{_effect(told, name)}" for name in told["failed"]) or "nothing"
        missing = ", ".join(f"`{one['name']}`" for one in told["detectors"] if one["effect"] is None) or "-"
        lines.append(f"| {title} | {failed} | {missing} | {told['seconds']:.0f} |")
    return _filled("\n".join(lines))


def _filled(text: str) -> str:
    """Paragraphs filled to 120 columns; headings and tables as they are."""
    parts = text.split("\n\n")
    kept = [part.lstrip().startswith(("#", "|")) for part in parts]
    return "\n\n".join(
        part if keep else textwrap.fill(part, 120, break_on_hyphens=False)
        for part, keep in zip(parts, kept, strict=True)
    )


LENGTHS = ("better", "preferred", "right_if_longer", "right_if_shorter")


def _by_kind(told: Mapping[str, Any], name: str) -> str:
    """A table of accuracy and length by kind, and of all."""
    rows = [
        f"| {name} | comparisons | accuracy | longer is chosen | reward prefers the longer "
        "| accuracy where the longer is chosen | where the shorter is |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = [(kind, told["by_kind"][kind], told["longer_by_kind"][kind]) for kind in told["by_kind"]]
    if "calibration" in told:
        kinds.append(("all", told["calibration"]["accuracy"], told["longer"]))
    for kind, accuracy, lengths in kinds:
        cells = [said_of(accuracy), *(said_of(lengths.get(key)) for key in LENGTHS)]
        rows.append(f"| {kind} | {accuracy['n']:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _merged(several: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """The kinds of several audits as of one, without what is over all of them."""
    parts = ("by_kind", "longer_by_kind")
    return {part: {kind: row for told in several for kind, row in told[part].items()} for part in parts}, "file"


def _rm_bench(audits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "| file | comparisons | not scored | accuracy | easy | normal | hard | longer is chosen "
        "| reward prefers the longer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, told in audits.items():
        if title.startswith("RM-Bench"):
            style = told["style"] or {}
            cells = [told["calibration"]["accuracy"], *(style.get(key) for key in ("easy", "normal", "hard"))]
            cells += [told["longer"]["better"], told["longer"]["preferred"]]
            scored = told["calibration"]["pairs"]
            row = " | ".join(map(said_of, cells))
            lines.append(
                f"| {title.partition(' ')[2]} | {scored + told['unscored']:,} | {told['unscored']:,} | {row} |"
            )
    return lines


def _calibrated(told: Mapping[str, Any]) -> str:
    found = told["temperature"]
    fitted = "there is none: the gaps say nothing, or the opposite" if found is None else said_of(found, ".2f")
    return (
        f"Calibration error {told['ece']:.3f}; {told['ece_expected']:.3f} if it were calibrated. Brier's score "
        f"{said_of(told['brier'])}; 0.25 is that of a reward without gaps. Temperature {fitted}."
    )


def _effect(told: Mapping[str, Any], name: str) -> str:
    found = next((one["effect"] for one in told["detectors"] if one["name"] == name), None)
    return "" if found is None else f" {said_of(found, '+.2f')}"


def said_of(found: Mapping[str, Any] | None, digits: str = ".3f") -> str:
    """A figure with its interval as JSON holds it; a bound that is not known is a question mark."""
    if found is None:
        return "not measured"
    low, high = ("?" if found[end] is None else f"{found[end]:{digits}}" for end in ("low", "high"))
    return f"{found['mean']:{digits}} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), default=list(DESIGNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", type=Path, help="write real_audit.json and the section of audit.md here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    about = prepare(options.data, options.out, options.seed)
    for name in options.designs:
        learn(options.out, options.models, name, options.seed)
    file = options.out / "compared.json"
    if not file.exists():
        found = {"designs": compared(options.out, options.designs), "by_words": by_words(options.out)}
        write_json(file, found)
    designs, yardstick = json.loads(file.read_text(encoding="utf-8")).values()
    best = max(designs, key=lambda name: designs[name]["all"]["mean"])
    audits = {title: figures(told) for title, told in audited(options.out, options.data, best).items()}
    if options.draw is not None:
        write_json(
            options.draw / "real_audit.json",
            {"data": about, "designs": designs, "by_words": yardstick, "best": best, "audits": audits},
        )
        put(options.draw / "audit.md", "real_audit", section(about, designs, yardstick, best, audits))


if __name__ == "__main__":
    main()
