"""Rows out of files, each with its line number: JSONL, a JSON array, CSV, Parquet, plain text, any of them gzipped.

Nothing here knows what the rows mean. A line that cannot be taken apart comes out as a row with a problem, so that the
caller decides between an error and setting it aside.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from kilter.errors import DataError


class RawRow(NamedTuple):
    """One row of a file. Line numbers count from 1; in Parquet and on the hub they are row numbers."""

    line: int
    value: Any
    problem: str = ""
    """Why the row could not be taken apart; `value` then holds its text."""


def read_rows(path: Path) -> Generator[RawRow]:
    """The rows of a file, by its suffix (`.gz` aside), else by its first character.

    Raises:
        DataError: the file is missing, unreadable, or damaged as a whole.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file{_nearest(path)}")
    if path.is_dir():
        raise DataError(f"{path}: it is a folder; name one of its files")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
            yield from (reader or _by_content)(file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise DataError(f"{path}: the gzip file is damaged ({err}); fetch or compress it again") from err
    except PermissionError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror}); change its permissions") from err


def _nearest(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f", and no folder {str(path.parent)!r}; check the path (it is taken from {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; check the path (it is taken from {Path.cwd()})"


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:  # once: what a pipe has given it does not give again
        if file.peek(2)[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield unzipped  # type: ignore[misc]  # it reads bytes
        else:
            yield file


def _decoded(raw: bytes, line: int) -> RawRow:
    try:
        return RawRow(line, raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as err:
        problem = f"byte {err.start + 1} ({raw[err.start : err.start + 1]!r}) is not UTF-8; save the file as UTF-8"
        return RawRow(line, raw.decode("utf-8", "replace"), problem)


def _lines(file: IO[bytes]) -> Iterator[RawRow]:
    for number, raw in enumerate(file, 1):
        row = _decoded(raw, number)
        if row.problem or row.value.strip():
            yield row


def _jsonl(file: IO[bytes]) -> Iterator[RawRow]:
    for row in _lines(file):
        if row.problem:
            yield row
            continue
        text = row.value.rstrip("\r\n")
        try:
            yield RawRow(row.line, json.loads(text))
        except (ValueError, RecursionError) as err:
            yield RawRow(row.line, text, _problem(err))


def _json(file: IO[bytes]) -> Iterator[RawRow]:
    """The elements of a JSON array one by one, each with the line it begins on; an object is one row."""
    whole = _decoded(file.read(), 1)
    if whole.problem:
        raise DataError(f"{whole.problem}")
    text: str = whole.value
    decoder = json.JSONDecoder()
    place = _skip(text, 0)
    if text[place : place + 1] != "[":
        yield from _jsonl(io.BytesIO(text.encode())) if _many(text) else _one(text, decoder)
        return
    line, counted = 1, 0
    place = _skip(text, place + 1)
    while text[place : place + 1] not in ("]", ""):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as err:
            where = f" of line {err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
            yield RawRow(line, text[place : place + 200], f"{_problem(err)}{where}; nothing after it was read")
            return
        yield RawRow(line, value)
        place = _skip(text, place)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            line += text.count("\n", counted, place)
            yield RawRow(line, text[place : place + 200], "not JSON: ',' or ']' is missing; nothing after it was read")
            return


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _many(text: str) -> bool:
    """More than one JSON value, one a line: JSONL under another name."""
    first = text.lstrip().split("\n", 1)
    try:
        json.loads(first[0])
    except (ValueError, RecursionError):
        return False
    return len(first) > 1 and bool(first[1].strip())


def _one(text: str, decoder: json.JSONDecoder) -> Iterator[RawRow]:
    try:
        yield RawRow(1, decoder.decode(text))
    except (ValueError, RecursionError) as err:
        yield RawRow(getattr(err, "lineno", 1), text[:200], _problem(err))


def _problem(err: Exception) -> str:
    """What is wrong with a JSON text; json raises plain ValueError for a number that is too long."""
    if isinstance(err, json.JSONDecodeError):
        return f"not JSON: {err.msg} at column {err.colno}"
    return "not readable: brackets are nested too deep" if isinstance(err, RecursionError) else f"not readable: {err}"


def _csv(file: IO[bytes], delimiter: str = ",") -> Iterator[RawRow]:
    csv.field_size_limit(1 << 26)  # the module's own limit of 128 KiB is less than a long answer
    lines = enumerate(file)
    text = (raw.decode("utf-8" if place else "utf-8-sig", "surrogateescape") for place, raw in lines)
    rows = csv.DictReader(text, delimiter=delimiter, strict=True)
    line = 1
    while True:
        line = rows.line_num + 1 if rows.line_num else 2
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as err:
            yield RawRow(line, "", f"not CSV: {err}; nothing after it was read")
            return
        if None in row or None in row.values():
            count = len(rows.fieldnames or ())
            yield RawRow(line, {str(k): v for k, v in row.items()}, f"not {count} fields, as the header has")
        elif not all(value.isascii() or _encodable(value) for value in row.values()):
            yield RawRow(line, row, "a value holds bytes that are not UTF-8; save the file as UTF-8")
        else:
            yield RawRow(line, row)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tsv(file: IO[bytes]) -> Iterator[RawRow]:
    return _csv(file, "\t")


def _text(file: IO[bytes]) -> Iterator[RawRow]:
    for row in _lines(file):
        yield row if row.problem else RawRow(row.line, row.value.rstrip("\r\n"))


def _by_content(file: IO[bytes]) -> Iterator[RawRow]:
    whole = file.read()
    head = whole.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return _json(io.BytesIO(whole)) if head in (b"[", b"{") else _text(io.BytesIO(whole))


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _text}


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(number, value)
    except pyarrow.ArrowException as err:
        raise DataError(f"{path}: not a Parquet file ({err}); write it again") from err


def read_hub(name: str) -> Generator[RawRow]:
    """The rows of a data set on the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`."""
    import datasets

    repository, *parts = name.split(":")
    split, config = (parts[-1] if parts else "train"), (parts[0] if len(parts) > 1 else None)
    try:
        rows = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, RuntimeError) as err:
        raise DataError(
            f"{name}: no such file, and as a hub data set it could not be loaded "
            f"({type(err).__name__}: {' '.join(str(err).split())[:200]}); check the name, the split (it is {split!r}) "
            "and the connection, or download a file and name it"
        ) from err
    for number, value in enumerate(rows, 1):
        yield RawRow(number, value)
