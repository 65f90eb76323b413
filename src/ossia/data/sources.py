"""Rows out of files: JSON lists and JSON lines, each row with its place (`file:line`) for messages to people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ossia.errors import OssiaError, UsageError

SUFFIXES = (".json", ".jsonl")


class Row(NamedTuple):
    """A row as it stands in its file."""

    value: Any
    source: str


class BadRow(OssiaError):
    """A row that cannot be read; the message names file, row, key and fix."""


def find_files(names: list[str], flag: str = "--dataset") -> list[Path]:
    """The files that a flag names, folders opened; UsageError where one is missing or empty."""
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inner = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not inner:
                raise UsageError(f"{flag} {name}: no {' or '.join(SUFFIXES)} file in this folder")
            files += inner
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise UsageError(f"{flag} {name}: {path.suffix or 'no suffix'} is not read; give .json or .jsonl")
            files.append(path)
        else:
            raise UsageError(f"{flag} {name}: no such file{_similar(path)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UsageError(f"{flag} {file}: the file is empty")
    return files


def read_rows(file: Path) -> Iterator[Row | BadRow]:
    """The rows of a file in order; a line that is not JSON is yielded as the error it makes."""
    if file.suffix == ".jsonl":
        return _read_lines(file)
    return _read_list(file)


def _read_lines(file: Path) -> Iterator[Row | BadRow]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            source = f"{file}:{number}"
            if not raw.strip():
                continue
            try:
                yield Row(json.loads(raw.decode("utf-8-sig")), source)
            except UnicodeDecodeError as error:
                yield BadRow(f"{source}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8")
            except json.JSONDecodeError as error:
                yield BadRow(f"{source}: broken JSON at character {error.pos + 1}: {error.msg}")
            except (RecursionError, ValueError) as error:
                yield BadRow(f"{source}: not readable as JSON ({error})")


def _read_list(file: Path) -> Iterator[Row | BadRow]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise BadRow(
                f"{file}:{error.lineno}: a second JSON value; rename a file of JSON lines to .jsonl"
            ) from error
        raise BadRow(f"{file}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise BadRow(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(rows, list):
        raise BadRow(f"{file}: expected a list of rows, got {type(rows).__name__}; put the rows in [ … ]")
    for number, value in enumerate(rows, start=1):
        yield Row(value, f"{file} row {number}")


def _similar(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f" (and no folder {path.parent})"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
