"""Weight files of an export: which tensor goes where, written one after another, and taken up again after a stop."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from ossia.console import say
from ossia.errors import OssiaError
from ossia.export.tensors import Spec, Writer
from ossia.model.folder import read_json
from ossia.model.stream import read_header

Rounding = dict[str, float]
"""How a tensor fared in MXFP4; see `merge`."""


class Done(TypedDict):
    """What is known of something finished: how its tensors were rounded, and sha256 by tensor where it is kept."""

    roundings: dict[str, Rounding]
    digests: dict[str, str]


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together.

    `make` yields their names and next rows. It puts what rounding did to them into the dictionary that it is given,
    by name.
    """

    outputs: dict[str, Spec]
    make: Callable[[dict[str, Rounding]], Iterator[tuple[str, Tensor]]]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True)
class Shard:
    """A weight file."""

    file: str
    units: list[Unit]

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: spec for unit in self.units for name, spec in unit.outputs.items()}

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)


def pack(units: Sequence[Unit], shard_bytes: int) -> list[Shard]:
    """Units dealt in order to files of `shard_bytes` at most; a larger unit has a file to itself."""
    groups: list[list[Unit]] = []
    size = shard_bytes
    for unit in units:
        if not groups or size + unit.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.nbytes
    count = len(groups)
    return [Shard(f"model-{n:05d}-of-{count:05d}.safetensors", group) for n, group in enumerate(groups, start=1)]


class Part:
    """The unfinished export beside its final place: `.NAME.part`, with a record of what made it and what is done.

    Args:
        output: the folder's final place.
        key: what the weights depend on. An unfinished export with another key is removed.
        kind: what is finished one after another, in words.
    """

    def __init__(self, output: Path, key: dict[str, object], kind: str) -> None:
        self.folder = output.parent / f".{output.name}.part"
        self._key, self._record, self._kind = key, self.folder / "export.part.json", kind
        self.done: dict[str, Done] = {}
        self.waited = 0.0
        """Seconds for which the disk held up the merge."""
        if self.folder.exists():
            self._recover()

    def has(self, shard: Shard) -> bool:
        """True where the file was finished, by this record, and is as planned."""
        if shard.file not in self.done:
            return False
        try:
            header = read_header(self.folder / shard.file)
        except OssiaError:
            return False
        return {name: Spec(stored.dtype, stored.shape) for name, stored in header.items()} == shard.specs

    def write(self, shard: Shard, advance: Callable[[float], None]) -> None:
        """Write a weight file and record it; `advance` is called for each unit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        roundings: dict[str, Rounding] = {}
        with Writer(self.folder / shard.file, shard.specs) as writer:
            for unit in shard.units:
                for name, rows in unit.make(roundings):
                    writer.write(name, rows)
                advance(1)
        self.waited += writer.waited
        self.record(shard.file, Done(roundings=roundings, digests={}))

    def record(self, name: str, done: Done) -> None:
        """Keep in mind, through any stop, that this much is finished; its bytes are on the disk."""
        self.done[name] = done
        new = self._record.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"key": self._key, "done": self.done}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._record)

    @contextmanager
    def kept_over_stops(self) -> Iterator[None]:
        """Around the work: what is finished stays when it stops, unless it is found to be wrong."""
        try:
            yield
        except OssiaError:
            self.remove()
            raise
        except OSError as error:
            raise OssiaError(f"{self.folder}: not written ({error.strerror or error}); {self._left()}") from error
        except BaseException:
            say(self._left())
            raise

    def roundings(self) -> dict[str, Rounding]:
        """Of everything that is done, in its order."""
        return {name: rounding for done in self.done.values() for name, rounding in done["roundings"].items()}

    def forget(self) -> None:
        """Start again, with an empty folder."""
        self.remove()
        self.done = {}
        self.folder.mkdir(parents=True)

    def finish(self, output: Path) -> None:
        """Give the folder its name."""
        if output.is_dir():
            output.rmdir()
        self._record.unlink(missing_ok=True)
        self.folder.rename(output)

    def remove(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _recover(self) -> None:
        try:
            record = read_json(self._record)
        except OssiaError:
            record = {}
        if record.get("key") == self._key:
            self.done = record["done"]
        else:
            self.remove()

    def _left(self) -> str:
        """Tidy up after a stop, and say what is left."""
        if not self.done:
            self.remove()
            return "nothing is left behind"
        return f"{len(self.done)} finished {self._kind} stay in {self.folder}; the same command goes on from there"
