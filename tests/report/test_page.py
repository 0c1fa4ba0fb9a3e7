"""The page and the card: whole from whatever there is, escaped, offline, the same bytes from the same files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilter.errors import RunError
from kilter.report import write_report
from kilter.report.figures import METRICS
from kilter.report.files import RunFiles, read_run
from kilter.report.page import markdown_cell, render_both

VOID = {"meta", "link", "input", "br", "img"}
PARTS = [
    "picture", "answers", "claims", "trust", "needs", "judged", "safety", "before-after", "training", "timings",
    "numbers",
]  # fmt: skip
RUN_PARTS = [
    "summary.json", "curve.jsonl", "answers.jsonl", "metrics.jsonl", "sft.jsonl", "agreement.json", "audit.json",
    "models", "world", "model", "seed", "versions", "timings", "by_kind", "reward_model", "demonstrators", "checks",
    "claims", "not_measured", "work",
]  # fmt: skip


class Page(HTMLParser):
    """A strict reader of the page: every tag is closed in order; what it holds is kept by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]  # type: ignore[misc]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text("utf-8"))


def test_the_page_holds_every_part_once(make_run) -> None:
    page = page_of(make_run(seeds=2))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert [name for name in PARTS if name not in ids] == []
    assert "PPO gained 0.22 over SFT in true reward (0.41 → 0.63); without the KL penalty it raised" in page.text
    assert "lowest to highest of 2 seeds" in page.text
    assert "true peak" in page.text


def test_the_same_files_give_the_same_bytes(make_run) -> None:
    folder = make_run()
    first, card = write_report(folder).read_bytes(), (folder / "card.md").read_bytes()
    assert write_report(folder).read_bytes() == first
    assert (folder / "card.md").read_bytes() == card
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("part", RUN_PARTS)
def test_any_part_may_be_missing(make_run, part: str) -> None:
    folder = make_run(without=(part,))
    ids = page_of(folder).ids()
    assert [name for name in PARTS if name not in ids] == []
    assert (folder / "card.md").read_text().startswith("---\n")


def test_an_empty_run_is_a_page_that_says_not_measured(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    page = page_of(tmp_path)
    assert [name for name in PARTS if name not in page.ids()] == []
    assert page.text.count("not measured") >= 10
    assert "summary.json is missing" in page.text


def test_straight_lines_between_end_points_are_called_that(make_run) -> None:
    told = "the straight lines between are no measurement"
    assert told in page_of(make_run("ends", without=("curve.jsonl",))).text
    assert told not in page_of(make_run("whole")).text


def test_not_measured_is_never_a_zero(make_run) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    summary["models"]["ppo"]["sycophancy"] = None
    summary["models"]["ppo"]["length"] = {"mean": None, "n": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    table = write_report(folder).read_text().split('id="numbers"')[1]
    for label in ("Sycophancy", "Length"):
        cells = re.findall(r"<td.*?</td>", table.split(f'"row">{label}')[1].split("</tr>")[0])
        assert [bool(re.search("not measured", cell)) for cell in cells] == [
            False,
            False,
            False,
            False,
            False,
            True,
            False,
        ]
    card = next(line for line in (folder / "card.md").read_text().splitlines() if line.startswith("| Sycophancy"))
    assert card.split(" | ")[6] == "not measured"


def test_every_number_of_the_summary_stands_in_the_table_with_interval_and_n(make_run) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    table = Page(write_report(folder).read_text().split('<section id="numbers"')[1].split("</section>")[0]).text
    for model in summary["models"].values():
        for name, value in model.items():
            if value is None:
                continue
            scale, unit, digits = (100, "%", 1) if METRICS.get(name) and METRICS[name].style == "rate" else (1, "", 2)
            digits = 1 if name == "length" else digits
            mean, low, high = (f"{scale * value[key]:.{digits}f}{unit}" for key in ("mean", "low", "high"))
            wanted = f"{mean} [{low}, {high}] n {value['n']:,}".replace("-", "−").replace("−0.00", "0.00")
            assert wanted in " ".join(table.replace("]n", "] n").replace("[", " [").split()), (name, wanted)


def test_model_text_is_text_wherever_it_stands(make_run) -> None:
    folder = make_run(hostile=True)
    hostile = "<script>x</script><b>"
    summary = json.loads((folder / "summary.json").read_text())
    summary["model"]["name"] = summary["world"] = hostile
    summary["models"][hostile] = summary["models"]["dpo"]
    summary["timings"][hostile] = 1.0
    summary["claims"][0]["claim"] = summary["checks"][0]["name"] = summary["not_measured"][0] = hostile
    summary["versions"][hostile] = hostile
    summary["by_kind"]["dpo"][hostile] = {"true_reward": 0.5}
    summary["models"]["ppo"][hostile] = 0.25
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = (folder / "evaluation/curve.jsonl").read_text().replace('"dpo"', json.dumps(hostile))
    (folder / "evaluation/curve.jsonl").write_text(rows)
    stage = folder / "stages/09-x<b>"
    stage.mkdir()
    (stage / "metrics.jsonl").write_text(
        json.dumps({"step": 1, hostile: 1}) + "\n" + json.dumps({"step": 2, hostile: 2})
    )
    text = write_report(folder).read_text("utf-8")
    page = Page(text)
    counts = [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "style")]
    assert counts == ["style", "script"]
    assert hostile in page.text
    assert "</script><script>window.hacked=1</script>" in page.text
    assert "{{ 7*7 }}" in page.text  # nothing from the run is a template
    assert "\u202e" not in text and "⟨U+202E⟩" in text
    card = (folder / "card.md").read_text()
    assert "<script" not in card.replace("\\<script", "")


def test_the_page_asks_for_nothing_outside_itself(make_run) -> None:
    text = write_report(make_run()).read_text()
    page = Page(text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    assert not re.search(r"""(src|href|action|data|poster)\s*=\s*["']?(?!data:,)(https?:|//|file:)""", text)
    assert "url(" not in text and "@import" not in text
    assert not [attrs for _, attrs in page.tags if "style" in attrs or any(name.startswith("on") for name in attrs)]
    assert {attrs.get("href") for tag, attrs in page.tags if tag == "link"} == {"data:,"}


def test_every_figure_names_its_world(make_run) -> None:
    text = write_report(make_run()).read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    assert [c for c in captions if "mbedded world, 1,412,096 parameters" not in c and "<b>" not in c] == []
    for name in PARTS:
        if name not in ("needs", "trust"):
            part = text.split(f'id="{name}"')[1].split("</section>\n\n")[0].split('<section id="')[0]
            assert "mbedded world, 1,412,096 parameters" in part, name


def test_the_labels_and_the_reward_model_are_judged(make_run) -> None:
    folder = make_run(hostile=False)
    page = page_of(folder)
    assert "877 pairs of answers were judged by two annotators" in page.text
    assert "raw: InstructGPT's labellers 0.73 to 0.77" in page.text
    assert "The reward model’s audit: failed (flattery)" in page.text
    assert "flattery: 0.64 [0.58, 0.70]" in page.text and "Not measured: groups." in page.text
    assert "0.049; 0.031 if it were calibrated" in page.text
    assert {attrs.get("href") for tag, attrs in page.tags if tag == "a"} == {"stages/02-reward/result/audit.html"}
    states = [attrs["class"] for tag, attrs in page.tags if tag == "g" and str(attrs.get("class")).startswith("row")]
    assert states.count("row bad") == 2 * 1 and states.count("row good") == 2 * 3  # detectors, wide and narrow
    assert states.count("row open") == 2 * 3 + 6 + 5 + 2 * 6  # measures, kinds; bins, kinds
    (folder / "stages/01-collect/agreement.json").unlink()
    (folder / "stages/02-reward/result/audit.json").unlink()
    page = page_of(folder)
    assert "Agreement of the annotators: not measured" in page.text
    assert "The reward model’s audit: not measured" in page.text


def test_a_real_run_names_its_model_and_no_world(make_run) -> None:
    folder = make_run()
    summary = json.loads((folder / "summary.json").read_text())
    summary["world"], summary["model"] = None, {"name": "stories260K", "parameters": 260_000}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert "stories260K, 260,000 parameters" in page.text
    assert "embedded world" not in page.text.lower()
    assert "not for use with people" not in (folder / "card.md").read_text()


def test_claims_and_checks_are_told_without_colour(make_run) -> None:
    page = page_of(make_run())
    assert "Over-refusal does not rise did not hold 0.03 [0.01, 0.05], n = 220" in page.text
    assert "PPO needs less data than DPO not measured" in page.text
    assert "Truth audit by a stricter parser passed 0.011 [0.006, 0.020], n = 900 rule: rejects under 2%" in page.text


def test_the_card_is_markdown_with_the_same_figures(make_run) -> None:
    folder = make_run()
    write_report(folder)
    card = (folder / "card.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# demo" in card and "not for use with people" in card
    row = next(line for line in card.splitlines() if line.startswith("| True reward |"))
    assert row.split(" | ")[6] == "0.63 [0.59, 0.67], n = 1980"
    width = {line.count("|") for line in card.splitlines() if line.startswith("| ") and "n = 1980" in line}
    assert width == {9}
    assert not re.search(r"\n\n\n", card)


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b\nc", "a\\|b c"),
        ("<i>", "\\<i\\>"),
        ("[x](y)", "\\[x\\](y)"),
        ("ppo_without_kl", "ppo_without_kl"),
        (None, ""),
    ],
)
def test_markdown_cells_hold_their_text(text: str | None, cell: str) -> None:
    assert markdown_cell(text) == cell


JUNK: list[Any] = [
    None,
    True,
    "x",
    "",
    -1,
    0,
    1e308,
    float("nan"),
    float("-inf"),
    [],
    {},
    [None],
    {"mean": "x"},
    {"mean": 1e9, "low": 2e9, "high": 3e9},
    {"a": {"b": []}},
    "\ud800<b>",
]


def spoiled(value: Any, rng: np.random.Generator, share: float) -> Any:
    """`value` with about `share` of its parts replaced by junk or left out."""
    if rng.random() < share:
        return JUNK[rng.integers(len(JUNK))]
    if isinstance(value, dict):
        return {key: spoiled(item, rng, share) for key, item in value.items() if rng.random() > share / 2}
    if isinstance(value, list):
        return [spoiled(item, rng, share) for item in value]
    return value


def mappings(value: Any) -> dict[str, Any]:
    """What the reader of the files lets through."""
    return {key: row for key, row in value.items() if isinstance(row, dict)} if isinstance(value, dict) else {}


def test_no_content_of_the_files_can_make_it_fail(make_run) -> None:
    run = read_run(make_run(seeds=2))
    few = {name: rows[:12] for name, rows in run.evaluated.items()}
    metrics = {name: rows[:6] for name, rows in run.metrics.items()}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        share = (0.01, 0.05, 0.2)[seed % 3]

        def rows(value: Any, rng: np.random.Generator = rng, share: float = share) -> Any:
            return [item for item in (spoiled(row, rng, share) for row in value) if isinstance(item, dict)]

        summary = {key: spoiled(item, rng, share) for key, item in run.summary.items()}
        broken = RunFiles(
            run.folder, summary, rows(run.curve[::3]), rows(run.answers[::4]),
            {name: rows(value) for name, value in few.items()}, {name: rows(value) for name, value in metrics.items()},
            agreements=mappings(spoiled(run.agreements, rng, share)), audits=mappings(spoiled(run.audits, rng, share)),
        )  # fmt: skip
        text, _ = render_both(broken)
        Page(text)
        assert not re.search(r"[ ,\"(](nan|inf|-inf)[ ,\"<)]", text), seed


def test_a_place_that_cannot_be_written_is_one_clear_error(make_run) -> None:
    folder = make_run()
    (folder / "report.html").mkdir()
    (folder / "report.html" / "x").touch()
    with pytest.raises((RunError, IsADirectoryError)):
        write_report(folder)


def test_a_report_needs_no_torch() -> None:
    code = (
        "import sys, kilter.report; sys.exit(','.join({'torch', 'plotly', 'transformers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
