"""Records from any file that people keep preferences and demonstrations in, and back into JSONL."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kilter.data import benchmarks, formats
from kilter.data.convert import can_convert, convert
from kilter.data.fields import LAYOUTS, BadRow, Layout, Row, check_record, shown
from kilter.data.jsonl import RawRow, read_hub, read_rows
from kilter.errors import DataError
from kilter.records import RECORDS, Record
from kilter.rundir import explained, write_text

assert benchmarks and formats  # they fill LAYOUTS

LOOKED_AT = 100
"""Rows at the head of a file by which its layout is recognised."""

REMEDY = "drop the row, or read with --skip-bad, which sets bad rows aside"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was set aside: its line, the field at fault (or ""), and the reason."""

    line: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a file gave. `rows` counts those in the file: `rows - len(skipped)` of them became `records`."""

    records: list[Record]
    skipped: list[Skipped]
    format: str
    rows: int = 0
    skipped_path: Path | None = None
    lines: Sequence[int] = ()
    """The line of the file that each record came from."""


def reasons(skipped: Iterable[Skipped]) -> Counter[str]:
    """How many rows were set aside for which reason; what differs from row to row is left out."""
    plain = (re.sub(r" is (?!missing|empty).*?;", " is unfit;", skip.reason) for skip in skipped)
    return Counter(re.sub(r"\b\d+\b", "n", reason) for reason in plain)


def read(
    path: str | Path,
    *,
    record: str | None = None,
    format: str = "auto",
    skip_bad: bool = False,
    skipped_to: str | Path | None = None,
    limit: int = 0,
) -> ReadResult:
    """Read a file (JSONL, JSON, CSV, Parquet, text; gzipped or not) or a hub data set.

    Args:
        path: the file, or `owner/name[:config][:split]` on the hub.
        record: the kind of record wanted, a key of `records.RECORDS`; None: the kind that the layout holds. A pair is
            also found in a ranking, a demonstration in the better response of a pair, a prompt in everything.
        format: name of a layout; "auto" recognises it by the fields of the first rows.
        skip_bad: set bad rows aside and count them, instead of raising at the first one.
        skipped_to: folder for `<name>.skipped.jsonl`, which holds the rows set aside; nothing is ever overwritten.
        limit: stop after so many records; 0: never.
    Raises:
        DataError: names file, line, field, value, rule and remedy.
    """
    if record is not None and record not in RECORDS:
        raise DataError(f"record is {record!r}; choose one of {', '.join(RECORDS)}")
    place, rows = _rows(path)
    with closing(rows):
        head = list(islice(rows, LOOKED_AT))
        if not head:
            raise DataError(f"{place}: the file holds no rows; give a file with at least one")
        chosen = _named(format) if format != "auto" else _recognised(place, head, record, skip_bad)
        if not can_convert(chosen.record, record):
            raise DataError(
                f"{place}: its layout {chosen.name!r} holds {chosen.record} records, and no {record} can be made of "
                "them; give another file or another --format"
            )
        made = _Made([], [], [], [])
        for row in chain(head, rows):
            made.take(row, place, chosen, record, skip_bad)
            if limit and len(made.records) >= limit:
                del made.records[limit:], made.lines[limit:]
                break
    if not made.records:
        why = "; ".join(f"{number} rows: {reason}" for reason, number in reasons(made.skipped).most_common(3))
        raise DataError(f"{place}: none of its {made.count} rows could be read ({why})")
    kept_at = _set_aside(place, made.aside, Path(skipped_to)) if made.aside and skipped_to is not None else None
    return ReadResult(made.records, made.skipped, chosen.name, made.count, kept_at, made.lines)


@dataclass(slots=True)
class _Made:
    """What a file has given so far."""

    records: list[Record]
    lines: list[int]
    skipped: list[Skipped]
    aside: list[dict[str, Any]]
    count: int = 0
    beside: Mapping[str, Row] | None = None

    def take(self, row: RawRow, place: Path, layout: Layout, want: str | None, skip_bad: bool) -> None:
        if self.beside is None:
            self.beside = _beside(place, layout)
        self.count += 1
        try:
            found = _records(row, layout, want, self.beside)
        except BadRow as err:
            if not skip_bad:
                raise DataError(f"{place}:{row.line}: {err.reason} ({REMEDY})") from err
            self.skipped.append(Skipped(row.line, err.field, err.reason))
            self.aside.append({"line": row.line, "field": err.field, "reason": err.reason, "row": row.value})
            return
        self.records += [replace(item, source=item.source or f"{place.name}:{row.line}") for item in found]
        self.lines += [row.line] * len(found)


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL, whole or not at all."""
    rows = (json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) for record in records)
    write_text(Path(path), "".join(f"{row}\n" for row in rows))


def layouts(record: str | None = None) -> list[Layout]:
    """All layouts in the order in which they are tried: our own, then those with the most fields first."""
    return sorted(
        LAYOUTS.values(),
        key=lambda known: (not known.name.startswith(formats.OWN), -len(known.has), known.record != record),
    )


def _rows(path: str | Path) -> tuple[Path, Generator[RawRow]]:
    place = Path(path)
    if not place.exists() and HUB_NAME.fullmatch(str(path)) and not place.parent.is_dir():
        return place, read_hub(str(path))
    return place, read_rows(place)


def _named(name: str) -> Layout:
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(LAYOUTS)}"
        raise DataError(f"format is {name!r}, which no layout is called; {hint}")
    return LAYOUTS[name]


def _recognised(place: Path, head: Sequence[RawRow], record: str | None, skip_bad: bool) -> Layout:
    """The layout of the first row that has one. Of two with equally many fields, the kind wanted goes first.

    More fields go before the kind wanted: a response with a label is feedback, even where demonstrations are wanted.
    """
    known = layouts(record)
    other = ""
    for row in head if skip_bad else head[:1]:
        if row.problem:
            continue
        value = _as_mapping(row.value)
        if value is None:
            continue
        fitting = [layout for layout in known if _fits(layout, value)]
        for layout in fitting:
            if can_convert(layout.record, record):
                return layout
        other = other or (fitting[0].record if fitting else "")
    first = head[0]
    if first.problem:
        raise DataError(f"{place}:{first.line}: {first.problem} ({REMEDY})")
    wanted = f"a {record}" if record else "any record"
    if other:
        raise DataError(f"{place}: it holds {other} records, and no {record} can be made of them; give another file")
    fields = ", ".join(first.value) if isinstance(first.value, Mapping) else shown(first.value)
    raise DataError(
        f"{place}:{first.line}: the fields ({fields}) are those of no known layout of {wanted}; rename them (a "
        "preference pair has prompt, chosen, rejected) or name the layout with --format (`kilter data formats` "
        "lists them)"
    )


def _as_mapping(value: Any) -> Row | None:
    """A row as an object; a bare text is a prompt."""
    if isinstance(value, str):
        return {"prompt": value}
    return value if isinstance(value, Mapping) else None


def _fits(layout: Layout, row: Row) -> bool:
    try:
        return all(field in row for field in layout.has) and layout.fits(row)
    except (BadRow, KeyError, TypeError, IndexError, AttributeError):
        return False


def _beside(place: Path, layout: Layout) -> dict[str, Row]:
    """The rows of the file beside that a layout is joined with, by the joining field; none without such a file."""
    if layout.beside is None:
        return {}
    pattern, key = layout.beside
    paths = [path for path in sorted(place.parent.glob(pattern)) if path != place]
    rows = [row.value for path in paths[:1] for row in read_rows(path) if isinstance(row.value, Mapping)]
    return {str(row[key]): row for row in rows if key in row}


def _records(row: RawRow, layout: Layout, want: str | None, more: Mapping[str, Row]) -> list[Record]:
    if row.problem:
        raise BadRow("", row.problem)
    value = _as_mapping(row.value)
    if value is None:
        raise BadRow("", f"the row is {shown(row.value)}; it must be a JSON object")
    if more and layout.beside:
        value = {**more.get(str(value.get(layout.beside[1])), {}), **value}
    missing = [field for field in layout.has if field not in value]
    if missing:
        raise BadRow(missing[0], f"{missing[0]!r} is missing; the layout {layout.name!r} has {', '.join(layout.has)}")
    if not layout.fits(value):
        raise BadRow("", f"the row is unlike the layout {layout.name!r} ({layout.shows}) that the file begins with")
    try:
        found = list(layout.convert(value))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as err:
        raise BadRow("", f"the row does not have the form of {layout.name!r} ({type(err).__name__}: {err})") from err
    for item in found:
        check_record(item)
    if not found:
        raise BadRow("", f"the row is empty; the layout {layout.name!r} holds {layout.record} records")
    if want is None:
        return found
    made = [other for item in found for other in _converted(item, want, layout.record)]
    if not made:
        raise BadRow("", f"no {want} can be made of the row's {layout.record}")
    return made


def _converted(item: Record, want: str, native: str) -> list[Record]:
    return list(convert(item, want, native))


def _set_aside(place: Path, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the rows set aside; a file with other content stays, and the next free name is taken."""
    text = "".join(json.dumps({"file": str(place), **row}, ensure_ascii=False, default=str) + "\n" for row in rows)
    for number in range(1, 1000):
        target = folder / f"{place.name}.skipped{'' if number == 1 else f'-{number}'}.jsonl"
        with explained(target):
            if not target.exists():
                write_text(target, text)
                return target
            if target.read_text(encoding="utf-8", errors="replace") == text:
                return target
    raise DataError(f"{folder}: it holds too many files of skipped rows of {place.name}; remove some")
