"""`kilter world failures`: the package's museum is whole, runs are made once, the page holds what they showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kilter.cli import world
from kilter.config import Claim, Exhibit
from kilter.errors import ConfigError, RunError
from kilter.report.failures import failures_page, rows_of
from kilter.report.overoptimization import figure
from kilter.rundir import read_jsonl
from kilter.stages.exhibited import LAST, _of_detectors
from kilter.stages.failures import Building, read_museum, small
from kilter.stages.summary import held

OWN = read_museum()
NAMES = [
    *("sign", "style_guide", "no_kl", "verbosity", "sycophancy", "collapse", "opinions"),
    *("specification", "sparse", "misgeneralisation"),
]
PROMPTS = {"path": "kilter.world:prompts", "options": {"split": "train", "per_kind": 6, "kinds": ["fact", "harmful"]}}
RL = {
    "stage": "rl",
    "algorithm": "rloo",
    "model": "shared.sft",
    "prompts": PROMPTS,
    "rollouts": 2,
    "prompts_per_rollout": 4,
    "num_samples": 2,
    "sampling": {"max_new_tokens": 12},
    "policy": {"kl_coef": 0.1, "kl_controller": "fixed"},
    "guard": {"probe": "kilter.world:true_reward", "actions": {"against_probe": "warn", "no_signal": "warn"}},
    "optim": {"learning_rate": 1e-4, "row_tokens": 128},
}
MUSEUM: dict[str, Any] = {
    "shared": {
        "sft": {
            "stage": "sft",
            "model": "kilter.world:MODEL_PATH",
            "data": {"path": "kilter.world:demonstrations", "options": {"per_kind": 2}},
            "optim": {"learning_rate": 1e-4, "batch_size": 8, "row_tokens": 128},
        },
        "sound": {**RL, "model": "sft", "reward": "kilter.world:true_reward"},
    },
    "start": "sft",
    "exhibits": {
        "letters": {
            "title": "Paid by the <letter>",
            "about": "It is paid for length.",
            "fix": "It is paid by truth.",
            "sheets": {"long": {"rules": [{"rule": "length", "unit": "characters", "shortest": 900, "ramp": 900}]}},
            "stages": {
                "long": {**RL, "reward": "sheets.long", "policy": {**RL["policy"], "kl_coef": -0.1}, "signs": "ignore"},
                "measured": {
                    "stage": "eval",
                    "prompts": {**PROMPTS, "options": {**PROMPTS["options"], "split": "held_out", "per_kind": 3}},
                    "truth": "kilter.world:true_reward",
                    "measure": "kilter.world:measure",
                    "reward": "sheets.long",
                    "sampling": {"max_new_tokens": 12},
                    "curve_prompts": 0,
                    "claims": [
                        {"text": "it says <something>", "left": "long.tokens", "above": 0.5},
                        {"text": "it says a thousand words", "left": "long.tokens", "above": 1000},
                    ],
                },
            },
            "broken": ["long"],
            "mended": "shared.sound",
            "measured": {"metric": "tokens", "name": "tokens left", "of": 12},
            "detectors": ["signs"],
            "rollouts": [{"text": "the probe is a number", "left": "long.probe", "right": "sound.probe", "above": -50}],
            "kinds": ["harmful", "fact"],
        }
    },
}


LETTERS = MUSEUM["exhibits"]["letters"]


# The package's own ---------------------------------------------------------------------------------------------------


def test_every_exhibit_is_a_recipe_with_a_fix_and_claims(tmp_path: Path) -> None:
    assert list(OWN.exhibits) == NAMES
    for museum in (OWN, small(OWN)):
        building = Building(museum, tmp_path, seed=3, threads=1, jobs=2)
        for name, one in building.exhibits.items():
            recipe = building.recipes[name]
            evaluation = next(stage for stage in recipe.stages.values() if stage.stage == "eval")
            runs = {run.removeprefix("shared.") for run in one.runs}
            assert set(evaluation.models) == {"start"} | runs and one.mended not in one.broken
            assert len(evaluation.claims) + len(one.rollouts) >= 3 and one.detectors
            assert recipe.seed == 3 and recipe.jobs == 2 and recipe.world == "embedded world"
            for stage in recipe.stages.values():
                if stage.stage == "rl":
                    assert (stage.guard.probe and stage.rollouts >= 20) or museum is not OWN
    assert not list(tmp_path.iterdir())  # nothing is written before the work


def test_shared_stages_are_named_by_their_folders_and_sheets_by_their_files(tmp_path: Path) -> None:
    building = Building(OWN, tmp_path, seed=0, threads=1, jobs=1, only=["sign"])
    assert list(building.recipes) == ["sign"]
    stages = building.recipes["sign"].stages
    negated, measured = stages["negated"].model_dump(), stages["measured"].model_dump()
    assert negated["model"] == measured["reference"] == str(tmp_path / "shared/stages/01-sft/result")
    assert negated["reward"] == str(tmp_path / "sheets/sign-negated.yaml")
    assert measured["models"]["clean"] == str(tmp_path / "shared/stages/04-clean/result")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"broken": ["nothing"]}, "'nothing' is among the runs of 'Paid by the <letter>' and is no stage"),
        ({"broken": []}, "broken"),
        ({"stages": {"long": LETTERS["stages"]["long"]}}, "needs one stage of kind eval"),
    ],
)
def test_an_exhibit_that_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Exhibit.model_validate(LETTERS | change)


@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        (["--only", "letter"], {}, "--only letter: did you mean 'letters'"),
        ([], {"mended": "shared.gone"}, r"shared\.gone; the shared stages are sft, sound"),
        ([], {"sheets": {}}, r"exhibits\.letters: sheets\.long"),
        ([], {"abuot": "?"}, "abuot"),
        ([], {"detectors": ["signs", "frase"]}, r"exhibits\.letters\.detectors: 'frase'; did you mean 'phrase'"),
        ([], {"stages": {**LETTERS["stages"], "long": {"reward": "x"}}}, "'long' is among the runs"),
    ],
)
def test_wrong_use_is_refused_before_any_work(
    tmp_path: Path, words: list[str], change: dict[str, Any], says: str
) -> None:
    file = tmp_path / "museum.yaml"
    file.write_text(yaml.safe_dump(MUSEUM | {"exhibits": {"letters": LETTERS | change}}))
    with pytest.raises(ConfigError, match=says):
        world.run("world", ["failures", "--museum", str(file), *words, "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_a_dry_run_says_the_runs_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.run("world", ["failures", "--dry-run", "--only", "sign", "--out", str(tmp_path / "no")]) == 0
    shown = capsys.readouterr().out
    assert "no/shared: sft, preferences, reward, clean" in shown
    assert "no/sign: negated, bonus, both, measured" in shown and "sparse" not in shown
    assert not (tmp_path / "no").exists()


def test_a_claim_holds_when_its_interval_does() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0}  # mean 2, from -0.484 to 4.484
    claim = Claim(text="so", left="x.y", above=-0.5)
    assert held(claim, values, {})["held"] and not held(claim.model_copy(update={"above": -0.4}), values, {})["held"]
    paired = Claim(text="so", left="x.y", right="z.y", below=1.0)
    found = held(paired, values, {"c": 2.0, "a": 0.0, "d": 9.0})  # 1 and 1: by key, of those that both have
    assert found["held"] and found["figure"]["mean"] == 1.0 and found["figure"]["n"] == 2
    assert held(paired, values, {})["held"] is None


def test_a_figure_in_words() -> None:
    assert figure({"mean": -0.004, "low": -0.021, "high": None}) == "0.00 [−0.02, ?]"
    assert figure({"mean": None, "low": -1.0, "high": 0.25}, 1, sign=True) == "none [−1.0, +0.2]"


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A museum of one very small exhibit."""
    folder = tmp_path_factory.mktemp("museum")
    (folder / "museum.yaml").write_text(yaml.safe_dump(MUSEUM))
    assert world.run("world", words_of(folder)) == 0
    return folder / "out"


def words_of(folder: Path) -> list[str]:
    return ["failures", "--museum", str(folder / "museum.yaml"), "--jobs", "1", "--out", str(folder / "out")]


def test_what_the_command_measures(done: Path) -> None:
    told = json.loads((done / "failures.json").read_text())
    [one] = told["exhibits"].values()
    answers = {model: read_jsonl(done / f"letters/evaluation/{model}.jsonl") for model in ("start", "long", "sound")}
    for model, rows in answers.items():
        tokens = [row["tokens"] for row in rows]
        assert one["measured"]["figures"][model]["mean"] == pytest.approx(12 - sum(tokens) / len(tokens))
    assert [claim["held"] for claim in one["claims"]] == [True, False, True, True] and one["shown"] is False
    assert one["claims"][3] == {"claim": "seen by signs, and not where it is mended", "figure": None, "held": True}
    metrics = {run: read_jsonl(next(done.glob(f"*/stages/*-{run}/metrics.jsonl"))) for run in ("long", "sound")}
    rows = {run: [row for row in own if "rollout/probe" in row] for run, own in metrics.items()}
    probes = {run: [row["rollout/probe"] for row in own] for run, own in rows.items()}
    assert len(probes["long"]) == 2 < LAST
    gaps = [long - sound for long, sound in zip(probes["long"], probes["sound"], strict=True)]
    assert one["claims"][2]["figure"]["mean"] == pytest.approx(sum(gaps) / 2)
    for run, course in one["courses"].items():
        first, second = rows[run]
        assert course["truth"] == probes[run] and course["paid"][0] == 0
        rise = (second["rollout/score"] - first["rollout/score"]) / first["rollout/score_std"]
        assert course["paid"][1] == pytest.approx(rise)
    assert [verdict.split(":")[0] for verdict in one["signs"]["long"]] == ["sign of the KL"]
    assert one["signs"]["sound"] == []
    assert [sample["kind"] for sample in one["samples"]] == ["harmful", "fact", "harmful", "fact"]
    assert (
        one["samples"][1]["answers"]["long"]["text"]
        == next(row for row in answers["long"] if row["kind"] == "fact")["text"]
    )
    assert set(told["seconds"]) == {"shared", "letters"} and told["seconds"]["letters"] > 0


def test_the_page_holds_it_all_and_escapes_it(done: Path) -> None:
    page, svg = (done / "failures.html").read_text(), (done / "failures.svg").read_text()
    assert "<script" not in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "Paid by the &lt;letter&gt;" in page and "<letter>" not in page + svg and "it says &lt;something&gt;" in page
    for text in ("not all shown", "before the first update", "sign of the KL", "letters/recipe.yaml", "tokens left"):
        assert text in page
    assert svg.count("<path") > 8 and "Paid by the &lt;letter&gt;" in svg
    assert (done / "letters/recipe.yaml").exists() and (done / "sheets/letters-long.yaml").exists()
    assert "| letters | it says <something> |" in (done / "failures.md").read_text()


def test_an_exhibit_that_nothing_sees_says_so(done: Path) -> None:
    told = json.loads((done / "failures.json").read_text())
    [one] = told["exhibits"].values()
    one["signs"]["long"], one["alarms"] = [], {run: [] for run in one["alarms"]}
    assert "The guard saw nothing in what fails." in failures_page(told) and rows_of(told)[1][5:7] == ["nothing"] * 2
    one["audits"] = [{"reward": "thin", "failed": ["padding"]}]
    one["alarms"]["sound"] = [{"symptom": "phrase", "rollout": 3, "says": "a < b", "without_probe": True}]
    one["samples"][0]["answers"]["long"]["text"] = "**bold** <b>"
    page = failures_page(told)
    assert "<td>**bold** &lt;b&gt;</td>" in page
    assert "reward model thin failed: padding." in page and "a &lt; b" in page
    assert rows_of(told)[1][5:7] == ["audit", "phrase"]


@pytest.mark.parametrize(
    ("detectors", "signs", "alarms", "held"),
    [
        (("phrase",), {}, {"long": ["phrase"]}, True),
        (("phrase",), {}, {"long": ["longer"]}, False),
        (("phrase",), {}, {"long": ["phrase"], "sound": ["phrase"]}, False),
        (("phrase", "signs"), {"long": ["turned"]}, {"sound": ["longer"]}, True),
        (("signs",), {"long": ["turned"], "sound": ["turned"]}, {}, False),
    ],
)
def test_a_detector_sees_what_fails_and_not_what_is_mended(
    detectors: tuple[str, ...], signs: dict[str, list[str]], alarms: dict[str, list[str]], held: bool
) -> None:
    runs = ("long", "sound")
    shown = {run: [{"symptom": name} for name in alarms.get(run, [])] for run in runs}
    exhibit = Exhibit.model_validate(LETTERS | {"detectors": detectors})
    [claim] = _of_detectors(exhibit, shown, {run: signs.get(run, []) for run in runs})
    assert claim["held"] is held
    assert _of_detectors(Exhibit.model_validate(LETTERS | {"detectors": ()}), shown, {}) == []


def test_what_has_ended_is_not_done_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("done.json")}
    figures = (done / "failures.json").read_text()
    assert world.run("world", words_of(done.parent)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("done.json")} and len(before) == 4
    assert (done / "failures.json").read_text() == figures
    assert "letters" in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a run of another recipe"):
        world.run("world", [*words_of(done.parent), "--seed", "9"])
