"""Reading files: line numbers, errors a new user can act on, rows set aside, and every kind of file."""

from __future__ import annotations

import csv
import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kilter.data import read, write
from kilter.data.jsonl import read_rows
from kilter.data.reader import reasons
from kilter.errors import DataError, RunError
from kilter.records import (
    RECORDS,
    Demonstration,
    Document,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Rating,
    StepLabels,
    UnpairedFeedback,
)

ASKED = (Message("user", "Hi"),)
PAIRS = [{"prompt": f"Question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(5)]
OWN = [
    Demonstration(messages=(*ASKED, Message("assistant", "Hello")), source="a"),
    Document(text="Once upon a time."),
    Prompt(prompt=ASKED, kind="greeting", truth={"colour": "red"}),
    PreferencePair(prompt=ASKED, chosen="Hello", rejected="No", margin=0.5, kind="greeting"),
    PreferencePair(prompt=ASKED, chosen="Hello", rejected="No", tie=True),
    Ranking(prompt=ASKED, responses=("a", "b", "c"), ranks=(0, 1, 1)),
    UnpairedFeedback(prompt=(Message("system", "Be nice"), *ASKED), response="Hello", desirable=True),
    StepLabels(prompt=ASKED, steps=("one", "two"), labels=(1.0, 0.0)),
    Judgement(prompt=ASKED, responses=("a", "b"), ranks=(1, 0), annotator="w1", shown=(1, 0), at="now", seconds=2.5),
    Judgement(prompt=ASKED, responses=("a", "b"), ranks=(1, 0), annotator="w1", weight=0.5, group="farmer"),
    Rating(prompt=ASKED, responses=("a", "b"), values=(4, 1.5), errors=(0.5, 0.25), annotator="w1", seconds=3.0),
]


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("record", OWN, ids=lambda record: type(record).__name__)
def test_own_records_come_back(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "own.jsonl"
    write(path, [record])
    result = read(path)
    assert [found.to_dict() | {"source": ""} for found in result.records] == [record.to_dict() | {"source": ""}]
    assert result.records[0].id == record.id
    assert result.records[0].source == (record.source or "own.jsonl:1")


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write(path, OWN)

    def failing() -> Any:
        yield OWN[0]
        raise ValueError("disk on fire")

    with pytest.raises(ValueError, match="on fire"):
        write(path, failing())
    assert len(path.read_text().splitlines()) == len(OWN)
    assert [other.name for other in tmp_path.iterdir()] == ["pairs.jsonl"]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


WRITERS = {
    "rows.jsonl": lambda path, rows: save(path, rows),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2)),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "lines.json": lambda path, rows: save(path, rows),
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "rows": lambda path, rows: save(path, rows),
    "rows.data": lambda path, rows: path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path, PAIRS)
    result = read(path, record="pair")
    assert result.format == "trl-pair" and result.rows == 5 and not result.skipped
    assert [(r.prompt[0].content, r.chosen, r.rejected) for r in result.records] == [  # type: ignore[attr-defined]
        (row["prompt"], row["chosen"], row["rejected"]) for row in PAIRS
    ]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system has no /dev/fd")
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pipe_gives_every_row(zipped: bool) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "yes " * 20, "rejected": "no"} for n in range(400)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    source, sink = os.pipe()

    def fill() -> None:
        with open(sink, "wb") as file:
            file.write(gzip.compress(raw) if zipped else raw)

    threading.Thread(target=fill, daemon=True).start()
    try:
        assert len(read(Path(f"/dev/fd/{source}")).records) == 400
    finally:
        os.close(source)


def test_a_number_without_end_is_a_bad_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"prompt": %s}\n'), ("a.json", '[{"prompt": %s}]')):
        (tmp_path / name).write_text(text % ("9" * 5000))
        with pytest.raises(DataError, match=r"not readable: .*digits"):
            read(tmp_path / name)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deep"):
        read(tmp_path / "deep.json")


def test_text_file_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("First\n\nSecond\n")
    assert [record.prompt[-1].content for record in read(path).records] == ["First", "Second"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**PAIRS[0], "rejected": ""}, "'rejected' is empty; a preference pair needs two non-empty responses"),
        ({**PAIRS[0], "rejected": "  \n"}, "'rejected' is empty"),
        ({**PAIRS[0], "rejected": None}, "'rejected' is null; a preference pair needs"),
        ({**PAIRS[0], "rejected": 3}, "'rejected' is 3; a preference pair needs"),
        ({"prompt": "x", "chosen": "y"}, "'rejected' is missing"),
        ({**PAIRS[0], "prompt": ""}, "'prompt' is empty"),
        ({**PAIRS[0], "prompt": [{"role": "boss", "content": "x"}]}, 'the role is "boss"; it must be one of system'),
        ({**PAIRS[0], "prompt": [{"role": "assistant", "content": "x"}]}, "ends with a assistant turn"),
        ({**PAIRS[0], "prompt": []}, "'prompt' is []; it must hold at least one turn"),
        ({**PAIRS[0], "chosen": "\ud800"}, "half a surrogate pair"),
        ([1, 2], "the row is [1, 2]; it must be a JSON object"),
    ],
)
def test_an_error_names_file_line_field_value_rule_and_remedy(tmp_path: Path, bad: Any, message: str) -> None:
    path = save(tmp_path / "pairs.jsonl", [*PAIRS[:2], bad, *PAIRS[2:]])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "--skip-bad" in str(error.value)
    assert "\n" not in str(error.value)
    result = read(path, skip_bad=True)
    assert len(result.records) == 5 and [skip.line for skip in result.skipped] == [3] and result.rows == 6


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"prompt": "x", "chosen"\n', "not JSON: Expecting ':' delimiter at column 25"),
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n', "is not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", "not "),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, raw: bytes, message: str) -> None:
    path = save(tmp_path / "pairs.jsonl", PAIRS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], raw, *lines[3:]]))
    with pytest.raises(DataError, match=f"pairs.jsonl:4: .*{message}"):
        read(path)
    assert [skip.line for skip in read(path, skip_bad=True).skipped] == [4]
    path.write_bytes(raw + path.read_bytes())
    with pytest.raises(DataError, match=f"pairs.jsonl:1: .*{message}"):
        read(path)
    assert len(read(path, skip_bad=True).records) == 5


def test_json_array_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in PAIRS) + "\n]")
    assert [row.line for row in read_rows(path)] == [2, 3, 4, 5, 6]
    path.write_text(path.read_text().replace('"chosen": "good 3"', '"chosen": ""'))
    with pytest.raises(DataError, match=r"pairs\.json:5: 'chosen' is empty"):
        read(path)
    path.write_text(path.read_text().replace('{"prompt": "Question 4"', '{"prompt" "Question 4"'))
    assert [skip.line for skip in read(path, skip_bad=True).skipped] == [5, 6]
    path.write_text(path.read_text()[:-60])
    assert read(path, skip_bad=True).rows == 5


def test_csv_counts_lines_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes('prompt,chosen,rejected\n"a\nb",c,d\ne,f\ng,h,i\nj,,k\nl,\ufffd,n\n'.encode() + b"x,\xe9,y\n")
    result = read(path, skip_bad=True)
    assert [record.prompt[0].content for record in result.records] == ["a\nb", "g", "l"]  # type: ignore[attr-defined]
    assert [(skip.line, skip.reason[:12]) for skip in result.skipped] == [
        (4, "not 3 fields"),
        (6, "'chosen' is "),
        (8, "a value hold"),
    ]


def test_long_csv_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    as_csv(path, [{**PAIRS[0], "chosen": "word " * 50_000}])
    assert len(read(path).records[0].chosen) == 250_000  # type: ignore[attr-defined]


def test_skipped_rows_are_kept_in_a_file_beside(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": ""}])
    aside = tmp_path / "aside"
    first = read(path, skip_bad=True, skipped_to=aside)
    assert first.skipped_path == aside / "pairs.jsonl.skipped.jsonl"
    (row,) = [json.loads(line) for line in first.skipped_path.read_text().splitlines()]
    assert (row["line"], row["field"], row["row"]) == (2, "chosen", {**PAIRS[1], "chosen": ""})
    assert read(path, skip_bad=True, skipped_to=aside).skipped_path == first.skipped_path
    first.skipped_path.write_text("the user's own\n")
    second = read(path, skip_bad=True, skipped_to=aside)
    assert second.skipped_path == aside / "pairs.jsonl.skipped-2.jsonl"
    assert first.skipped_path.read_text() == "the user's own\n"
    assert read(save(tmp_path / "ok.jsonl", PAIRS), skip_bad=True, skipped_to=aside).skipped_path is None


def test_reasons_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "chosen": 1}, {**PAIRS[1], "chosen": 22}])
    assert list(reasons(read(path, skip_bad=True).skipped).values()) == [2]


def test_wrong_places_are_named(tmp_path: Path) -> None:
    save(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"no such file; did you mean 'pairs.jsonl'\?"):
        read(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match="no folder"):
        read(tmp_path / "nowhere" / "pairs.jsonl")
    with pytest.raises(DataError, match="it is a folder"):
        read(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-20])
    with pytest.raises(DataError, match="gzip file is damaged"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read(tmp_path / "bad.parquet")


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(DataError, match="did you mean 'trl-pair'"):
        read(path, format="trl-pairs")
    with pytest.raises(DataError, match="choose one of demonstration"):
        read(path, record="pairs")
    with pytest.raises(DataError, match=r"fields \(a, b\) are those of no known layout"):
        read(save(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}]))
    with pytest.raises(DataError, match="holds prompt records, and no pair can be made"):
        read(save(tmp_path / "prompts.jsonl", [{"prompt": "x"}]), record="pair")
    with pytest.raises(DataError, match="unlike the layout 'hh'"):
        read(path, format="hh")


def test_a_file_without_one_good_row_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", [{**row, "chosen": ""} for row in PAIRS])
    with pytest.raises(DataError, match=r"none of its 5 rows could be read \(5 rows: 'chosen' is empty"):
        read(path, skip_bad=True)


def test_limit_stops_early(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", [*PAIRS, {}])
    assert len(read(path, limit=3).records) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "pairs.jsonl", PAIRS)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        write(tmp_path / "file" / "pairs.jsonl", OWN)


def test_hub_names_without_a_connection_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **kwargs: Any) -> Any:
        assert (args, kwargs) == (("owner/name", None), {"split": "test"})
        raise ConnectionError("no route to the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"as a hub data set it could not be loaded .*no route to the hub at all"):
        read("owner/name:test")


def test_hub_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(PAIRS))
    assert len(read("owner/name", record="pair").records) == 5


CONVERSIONS = {
    ("pair", "demonstration"): ["Hello"],
    ("pair", "ranking"): [(("Hello", "No"), (0, 1))],
    ("pair", "feedback"): [("Hello", True), ("No", False)],
    ("ranking", "pair"): [("a", "b"), ("a", "c")],
    ("ranking", "demonstration"): ["a"],
    ("judgement", "pair"): [("b", "a")],
    ("judgement", "demonstration"): ["b"],
    ("judgement", "ranking"): [(("a", "b"), (1, 0))],
    ("feedback", "demonstration"): ["Hello"],
    ("steps", "prompt"): ["Hi"],
    ("demonstration", "prompt"): ["Hi"],
    ("pair", "prompt"): ["Hi"],
}


@pytest.mark.parametrize(("native", "want"), CONVERSIONS)
def test_one_kind_of_record_from_another(tmp_path: Path, native: str, want: str) -> None:
    path = tmp_path / "own.jsonl"
    write(path, [next(record for record in OWN if type(record) is RECORDS[native])])

    def seen(record: Any) -> Any:
        match record:
            case PreferencePair():
                return record.chosen, record.rejected
            case Demonstration():
                return record.messages[-1].content
            case Ranking():
                return record.responses, record.ranks
            case UnpairedFeedback():
                return record.response, record.desirable
            case Prompt():
                return record.prompt[-1].content

    assert [seen(record) for record in read(path, record=want).records] == CONVERSIONS[native, want]


def test_what_cannot_be_said_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    disliked = UnpairedFeedback(prompt=ASKED, response="No", desirable=False)
    write(path, [disliked, UnpairedFeedback(prompt=ASKED, response="Yes", desirable=True)])
    result = read(path, record="demonstration", skip_bad=True)
    assert len(result.records) == 1 and "undesirable" in result.skipped[0].reason
    write(path, [Ranking(prompt=ASKED, responses=("a", "b", "c"), ranks=(0, 0, 0))])
    with pytest.raises(DataError, match="all responses are tied"):
        read(path, record="pair")
    write(path, [Ranking(prompt=ASKED, responses=("a", "b"), ranks=(0, 0))])
    assert read(path, record="pair").records[0].tie  # type: ignore[attr-defined]
