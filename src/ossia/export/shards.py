"""Weight files of an export: which tensor goes where, written one after another, and taken up again after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ossia.errors import OssiaError
from ossia.export.tensors import Spec, Writer
from ossia.model.folder import read_json
from ossia.model.stream import read_header

Rounding = dict[str, float]
"""How a tensor fared in MXFP4; see `merge`."""


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
        key: what the weight files depend on. An unfinished export with another key is removed.
    """

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        self.folder = output.parent / f".{output.name}.part"
        self._key, self._record = key, self.folder / "export.part.json"
        self.done: dict[str, dict[str, Rounding]] = {}
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
        self.done[shard.file] = roundings
        self._save()

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
            self.done = record["shards"]
        else:
            self.remove()

    def _save(self) -> None:
        new = self._record.with_suffix(".new")
        new.write_text(json.dumps({"key": self._key, "shards": self.done}), encoding="utf-8")
        new.replace(self._record)
