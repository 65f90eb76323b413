"""Rows out of files, one reader for each kind of file; each row with its place (`file:line`) for messages to people."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ossia.errors import OssiaError

_PACKED = (".gz", ".zst")
_CHUNK = 1 << 20


class BadRow(OssiaError):
    """A row that cannot be read; the message names file, row, key and fix."""


class Record(NamedTuple):
    """A row on its way in: JSON text not parsed yet (bytes), a value, or the error in its place."""

    value: Any
    source: str


def decode(record: Record) -> Any:
    """The row's value; raises BadRow."""
    value, source = record
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, bytes):
        return value
    try:
        return json.loads(value.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{source}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"{source}: broken JSON at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise BadRow(f"{source}: nested too deeply to be read") from None
    except ValueError as error:
        raise BadRow(f"{source}: not readable as JSON ({error})") from None


def suffix_of(file: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`; empty where no reader knows the name."""
    name = file.name.lower()
    packed = name.endswith(_PACKED)
    suffix = Path(Path(name).stem if packed else name).suffix
    return suffix if suffix in SUFFIXES and not (packed and suffix == ".parquet") else ""


def read_records(file: Path) -> Iterator[Record]:
    """The rows of a file in order. Where it cannot be read on, the last record is the error."""
    source = str(file)
    try:
        if suffix_of(file) == ".parquet":
            yield from _read_parquet(file)
            return
        with _open(file) as handle:
            yield from _READERS[suffix_of(file)](handle, source)
    except UnicodeDecodeError as error:
        yield Record(BadRow(f"{source}: not UTF-8 ({error.reason}); save the file as UTF-8"), source)
    except (OSError, EOFError, zlib.error) as error:
        yield Record(BadRow(f"{source}: cannot be read on, the file is cut or damaged ({error})"), source)


def count_records(file: Path) -> int:
    """How many records `read_records` yields."""
    if suffix_of(file) == ".parquet":
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException

        try:
            return int(parquet.read_metadata(file).num_rows)
        except ArrowException:
            return 1
    return sum(1 for _ in read_records(file))


def _open(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), _CHUNK)
    return file.open("rb", _CHUNK)


def _read_lines(handle: IO[bytes], source: str) -> Iterator[Record]:
    for number, raw in enumerate(handle, start=1):
        if not raw.isspace():
            yield Record(raw, f"{source}:{number}")


def _read_list(handle: IO[bytes], source: str) -> Iterator[Record]:
    """The values of a JSON list, one at a time: the whole is never in memory."""
    text = _Text(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
    try:
        if (first := text.peek()) != "[":
            value = text.value()
            what = f"expected a list of rows, got {type(value).__name__}; put the rows in [ … ]"
            if text.peek():
                what = "a second JSON value; rename a file of JSON lines to .jsonl"
            yield Record(BadRow(f"{source}:{text.line}: {what}"), source)
            return
        while first != "]":
            text.skip()
            if text.peek() == "]" and first == "[":
                text.skip()
                break
            place = f"{source}:{text.line}"
            yield Record(text.value(), place)
            first = text.peek()
            if first not in (",", "]"):
                raise json.JSONDecodeError("',' or ']' expected", text.buffer, text.position)
        else:
            text.skip()
        if text.peek():
            yield Record(BadRow(f"{source}:{text.line}: text after the list; remove it"), source)
    except json.JSONDecodeError as error:
        line = text.line + error.doc.count("\n", text.position, error.pos)
        reason = f"broken JSON: {error.msg}; the file is not read on from here"
        yield Record(BadRow(f"{source}:{line}: {reason}"), source)
    except (RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        reason = "nested too deeply to be read" if isinstance(error, RecursionError) else f"not readable ({error})"
        yield Record(BadRow(f"{source}:{text.line}: {reason}; the file is not read on from here"), source)


class _Text:
    """A window on a long JSON text: `position` in `buffer`, and the `line` it is on."""

    def __init__(self, handle: io.TextIOBase) -> None:
        self.handle = handle
        self.buffer = ""
        self.position = 0
        self.line = 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            at = self.position
            while at < len(self.buffer) and self.buffer[at] in " \t\r\n":
                at += 1
            self._move(at)
            if at < len(self.buffer):
                return self.buffer[at]
            if not self._more(_CHUNK):
                return ""

    def skip(self) -> None:
        """Go past the character that `peek` gave."""
        self._move(self.position + 1)

    def value(self) -> Any:
        """The JSON value that begins here."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError:
                if not self._more(size):
                    raise
            else:
                # A number at the end of the window may go on: 12 in "12.5".
                number = isinstance(value, int | float)
                whole = end < len(self.buffer) and not (number and self.buffer[end] not in " \t\r\n,]")
                if whole or not self._more(size):
                    self._move(end)
                    return value
            size *= 2

    def _more(self, size: int) -> bool:
        chunk = self.handle.read(size)
        if chunk:
            self.buffer = self.buffer[self.position :] + chunk
            self.position = 0
        return bool(chunk)

    def _move(self, position: int) -> None:
        self.line += self.buffer.count("\n", self.position, position)
        self.position = position


def _read_csv(handle: IO[bytes], source: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.TextIOWrapper(handle, "utf-8-sig", newline=""), strict=True)
    line = 1
    try:
        names = next(reader, [])
        if not all(names) or len(set(names)) < len(names):
            yield Record(BadRow(f"{source}:1: the first line must name every column, each once"), source)
            return
        line = reader.line_num + 1
        for cells in reader:
            place = f"{source}:{line}"
            line = reader.line_num + 1
            if len(cells) == len(names):
                yield Record(dict(zip(names, cells, strict=True)), place)
            elif cells:
                yield Record(
                    BadRow(f"{place}: {len(cells)} cells under {len(names)} columns; quote cells with commas"), place
                )
    except csv.Error as error:
        yield Record(BadRow(f"{source}:{line}: not CSV ({error}); the file is not read on from here"), source)


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{file} row {number}")
    except ArrowException as error:
        reason = f"not a Parquet file that can be read on ({' '.join(str(error).split()):.200})"
        yield Record(BadRow(f"{file}: {reason}"), str(file))


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[Record]]] = {
    ".json": _read_list,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
}
SUFFIXES = (*_READERS, ".parquet")
