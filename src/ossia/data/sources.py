"""What `--dataset` names: files, folders, globs and hub data sets, and how many of their rows are taken."""

from __future__ import annotations

import difflib
import glob
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ossia.data.hub import HubSet
from ossia.data.readers import SUFFIXES, Record, count_records, read_records, suffix_of
from ossia.errors import UsageError

_WORD = re.compile(r"(?P<base>.+?)(?:#(?P<rows>\d+))?(?:\*(?P<weight>\d+(?:\.\d+)?))?")
_KINDS = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


@dataclass(frozen=True)
class FileSet:
    """The rows of one file."""

    path: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    def count(self) -> int:
        """How many records `records` yields."""
        return count_records(self.path)

    def records(self) -> Iterator[Record]:
        """Its rows in order."""
        return read_records(self.path)

    def digest(self) -> str:
        """A hash of the bytes."""
        import hashlib

        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Dataset:
    """One word after `--dataset`: where its rows are, and how many are taken (`rows` of them, `weight` times)."""

    word: str
    parts: list[FileSet | HubSet]
    rows: int | None = None
    weight: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether every row is taken once."""
        return self.rows is None and self.weight == 1

    @cached_property
    def total(self) -> int:
        """How many rows its files have; reads them where only that tells."""
        return sum(part.count() for part in self.parts)

    @property
    def size(self) -> int:
        """How many rows are taken."""
        return round((self.total if self.rows is None else self.rows) * self.weight)

    def records(self, seed: int) -> Iterator[Record]:
        """Its rows in order, `size` of them: whole copies, and a seeded sample for what is left over."""
        records = (record for part in self.parts for record in part.records())
        if self.whole:
            yield from records
            return
        import numpy

        copies, rest = divmod(self.size, max(self.total, 1))
        drawn = numpy.zeros(self.total, bool)
        chance = numpy.random.default_rng([seed, zlib.crc32(self.word.encode())])
        drawn[chance.permutation(self.total)[:rest]] = True
        for record, more in zip(records, drawn, strict=False):
            for _ in range(copies + bool(more)):
                yield record


def find_datasets(words: list[str], flag: str = "--dataset") -> list[Dataset]:
    """What the words after a flag name; opens no file and nothing remote.

    A word is a file, a folder, a glob, `hf::org/name[:config][:split]` or `ms::org/name[:split]`; behind it `#N` takes
    N rows drawn by the seed, and `*W` takes W times the rows (0.3: a sample of 30 %; 2: each row twice).

    Raises UsageError where something is missing, empty or of an unknown kind.
    """
    return [_dataset(word, flag) for word in words]


def read_datasets(datasets: list[Dataset], seed: int) -> Iterator[Record]:
    """Their rows, one after another."""
    for dataset in datasets:
        yield from dataset.records(seed)


def _dataset(word: str, flag: str) -> Dataset:
    whole = Path(word).expanduser()
    if whole.exists():
        return Dataset(word, _local(word, flag))
    found = _WORD.fullmatch(word)
    assert found is not None, "any text matches"
    base = found["base"]
    rows = None if found["rows"] is None else int(found["rows"])
    weight = 1.0 if found["weight"] is None else float(found["weight"])
    if rows == 0 or weight == 0:
        raise UsageError(f"{flag} {word}: takes no rows; leave the word out")
    if base.startswith(("hf::", "ms::")):
        return Dataset(word, [HubSet.named(base, flag)], rows, weight)
    if base.endswith("/") or not (Path(base).expanduser().exists() or glob.has_magic(base)):
        # `folder/*2` is a glob; so is a name that only looks as if a number of copies followed it.
        base, rows, weight = (word, None, 1.0) if glob.has_magic(word) else (base, rows, weight)
    return Dataset(word, _local(base, flag), rows, weight)


def _local(name: str, flag: str) -> list[FileSet | HubSet]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file))
        if not files:
            raise UsageError(f"{flag} {name}: no {_KINDS} file in this folder")
    elif path.is_file():
        files = [path]
    elif glob.has_magic(name):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not files:
            raise UsageError(f"{flag} {name}: no file matches")
    else:
        raise UsageError(f"{flag} {name}: no such file{_similar(path)}")
    for file in files:
        if not suffix_of(file):
            raise UsageError(
                f"{flag} {file}: {file.suffix or 'a name without suffix'} is not read; give {_KINDS}, "
                "as they are or packed (.gz, .zst)"
            )
        if file.stat().st_size == 0:
            raise UsageError(f"{flag} {file}: the file is empty")
    return [FileSet(file) for file in files]


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            return f" (and no folder {path.parent}); a data set on the Hugging Face hub is written hf::{path}"
        return f" (and no folder {path.parent})"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
