"""Rows out of files, one reader for each kind of file; each row with its place (`file:line`) for messages to people.

The layout (a JSON list, JSON lines, the delimiter of CSV) and UTF-16 are detected from the first 64 KiB. A file that
could be read in two ways is one error that names the cause.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ossia.errors import OssiaError

_PACKED = (".gz", ".zst")
_CHUNK = 1 << 20
_HEAD = 1 << 16
_DELIMITERS = ",;\t|"
_ENCODINGS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


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
        return json.loads(value.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadRow(f"{source}: not UTF-8 (byte {error.start} of the line){_instead(value)}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"{source}: broken JSON at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise BadRow(f"{source}: nested too deeply to be read") from None
    except ValueError as error:
        raise BadRow(f"{source}: not readable as JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands in it twice, of which Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands in one object twice")
    return found


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
        with _decoded(_open(file)) as handle:
            if reason := _not_utf8(handle.peek(_HEAD)[:_HEAD]):
                yield Record(BadRow(f"{source}: {reason}"), source)
                return
            yield from _READERS[suffix_of(file)](handle, source)
    except UnicodeDecodeError as error:
        yield Record(BadRow(f"{source}: not UTF-8 ({error.reason}){_instead(error.object)}"), source)
    except BadRow as error:
        yield Record(error, source)
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


def _open(file: Path) -> io.BufferedReader:
    if file.suffix.lower() == ".gz":
        return io.BufferedReader(cast("io.RawIOBase", gzip.open(file, "rb")), _CHUNK)
    if file.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), _CHUNK)
    return cast("io.BufferedReader", file.open("rb", _CHUNK))


def _decoded(handle: io.BufferedReader) -> io.BufferedReader:
    """The file in UTF-8; one in UTF-16, which its first bytes tell, is decoded on the way."""
    head = handle.peek(4)[:4]
    encoding = _ENCODINGS.get(head[:2], "")
    if not encoding and len(head) == 4 and 0 not in head[::2] and head[1::2] == b"\0\0":
        encoding = "utf-16-le"
    elif not encoding and len(head) == 4 and head[::2] == b"\0\0" and 0 not in head[1::2]:
        encoding = "utf-16-be"
    return io.BufferedReader(_Recoded(handle, encoding), _CHUNK) if encoding else handle


class _Recoded(io.RawIOBase):
    """A file of another encoding, read as UTF-8."""

    def __init__(self, handle: io.BufferedReader, encoding: str) -> None:
        self._handle = handle
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            chunk = self._handle.read(_CHUNK)
            self._held = self._decoder.decode(chunk, final=not chunk).encode("utf-8", "surrogatepass")
            if not chunk:
                break
        taken, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._handle.close()
        super().close()


def _not_utf8(head: bytes) -> str:
    """The cause where a file is no UTF-8; nothing where it is, or has only a damaged line."""
    lines = head.split(b"\n")
    if len(head) == _HEAD:
        lines.pop()
    odd = [number for number, line in enumerate(lines) if not line.isascii()]
    if len(odd) < 2 or any(_encoding(lines[number]) == "utf-8" for number in odd):
        return ""
    return f"not UTF-8 from line {odd[0] + 1} on{_instead(head)}"


def _instead(text: bytes) -> str:
    """The encoding that bytes may be in, with the command that writes them as UTF-8; a guess, so it is not read."""
    encoding = _encoding(text)
    if not encoding:
        return "; save the file as UTF-8"
    return f"; it may be {encoding}: iconv -f {encoding} -t utf-8 FILE > NEW writes it as UTF-8"


def _encoding(text: bytes) -> str:
    """Whichever encoding the bytes can be in; Western text read as gb18030 has few, Chinese as cp1252 many accents."""
    for encoding in ("utf-8", "cp1252", "gb18030"):
        try:
            found = text.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding != "cp1252" or not _ACCENTS.search(found):
            return encoding
    return ""


_ACCENTS = re.compile("[\u00a1-\u00ff]{4}")


def _read_json(handle: io.BufferedReader, source: str) -> Iterator[Record]:
    """A list of rows, a row a line, or rows one after another over several lines; the beginning tells."""
    head = handle.peek(_HEAD)[:_HEAD].decode("utf-8-sig", errors="replace")
    first, *more = [line for line in head.splitlines() if line.strip()][:3] or [""]
    # A damaged first line of a file that has a row a line begins no list and no object.
    by_line = bool(more) and all(map(_ends, more))
    if first.lstrip().startswith("[") and not by_line:
        return _read_list(handle, source)
    if first.lstrip().startswith("{") and more and not by_line and _goes_on(first):
        return _read_values(handle, source)
    return _read_lines(handle, source)


def _ends(line: str) -> bool:
    """Whether a line is a whole JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON value, and nothing in it is wrong."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def _read_lines(handle: IO[bytes], source: str) -> Iterator[Record]:
    for number, raw in enumerate(handle, start=1):
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw and not raw.isspace():
            yield Record(raw, f"{source}:{number}")


def _read_values(handle: IO[bytes], source: str) -> Iterator[Record]:
    """JSON values one after another, each over as many lines as it takes."""
    text = _Text(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
    try:
        while text.peek():
            place = f"{source}:{text.line}"
            yield Record(text.value(), place)
    except (RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"broken JSON: {error}"
        yield Record(BadRow(f"{source}:{text.line}: {reason}; the file is not read on from here"), source)


def _read_list(handle: IO[bytes], source: str) -> Iterator[Record]:
    """The values of a JSON list, one at a time: the whole is never in memory."""
    text = _Text(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
    try:
        first = text.peek()
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
        self._decoder = json.JSONDecoder(object_pairs_hook=_object)

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


def _read_csv(handle: io.BufferedReader, source: str) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = _delimiter(handle, source)
    reader = csv.reader(io.TextIOWrapper(handle, "utf-8-sig", newline=""), strict=True, delimiter=delimiter)
    line = 1
    try:
        names = next(reader, [])
        if re.fullmatch("sep=.", delimiter.join(names)):
            names = next(reader, [])
        if len(names) > 1 and not names[0]:
            # An index without a name, as pandas writes it.
            names[0] = "__index_level_0__"
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
                what = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "|"}.get(delimiter, delimiter)
                fix = f"quote cells with {what}" if len(cells) > len(names) else "write every cell, empty ones too"
                yield Record(BadRow(f"{place}: {len(cells)} cells under {len(names)} columns; {fix}"), place)
    except csv.Error as error:
        reason = str(error).replace("\t", "\\t")
        yield Record(BadRow(f"{source}:{line}: not CSV ({reason}); the file is not read on from here"), source)


def _delimiter(handle: io.BufferedReader, source: str) -> str:
    """The delimiter by which the first line names several columns, as many as the next lines have cells.

    Raises BadRow where two of them do.
    """
    head = handle.peek(_HEAD)[:_HEAD]
    text = head.decode("utf-8-sig", errors="ignore")
    if told := re.match("sep=(.)\r?\n", text):
        # Excel reads and writes such a line.
        return told[1]
    # The last line may be cut, and a cell that is cut has no closing quote.
    lines = text.splitlines(keepends=True)[: -1 if len(head) == _HEAD else None]
    counts: dict[str, list[int]] = {}
    for delimiter in _DELIMITERS:
        with suppress(csv.Error):
            counts[delimiter] = [len(cells) for cells in islice(csv.reader(lines, delimiter=delimiter), 20) if cells]
    several = [delimiter for delimiter, cells in counts.items() if cells and cells[0] > 1]
    if len(several) > 1:
        several = [d for d in several if counts[d].count(counts[d][0]) * 2 > len(counts[d])] or several
    if len(several) > 1 and "," not in several and suffix_of(Path(source)) != ".tsv":
        raise BadRow(f"{source}: cells may be divided by {' or '.join(map(repr, several))}; write them with commas")
    usual = "\t" if suffix_of(Path(source)) == ".tsv" else ","
    return usual if usual in several or not several else "," if "," in several else several[0]


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


_READERS: dict[str, Callable[[io.BufferedReader, str], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
SUFFIXES = (*_READERS, ".parquet")
