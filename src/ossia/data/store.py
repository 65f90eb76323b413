"""Tokenised rows on disk, as an Arrow file that is mapped into memory: a set may be larger than memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ossia.data.near import BANDS
from ossia.errors import OssiaError
from ossia.template.messages import Rendered

CHANNELS = ("prompt", "analysis", "commentary", "final", "text")
"""What a token may belong to; `prompt` is all that no channel holds."""

_CODES = {"": 0, **{name: code for code, name in enumerate(CHANNELS)}}
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),  # null where they are the input_ids
        ("loss_weights", pa.list_(pa.float32())),
        ("channels", pa.list_(pa.uint8())),  # places in CHANNELS
        ("near", pa.list_(pa.uint64(), BANDS)),  # null unless a split needs it
    ]
)


@dataclass(slots=True)
class TokenRow:
    """One training row: int32 ids and labels, float32 loss weights, of one length (see `Rendered`); uint8 places in
    CHANNELS, None where nobody knows."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    channels: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Batch:
    """Rows on their way into a store."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}

    def add(self, source: str, rendered: Rendered, near: NDArray[np.uint64] | None) -> None:
        """Take one row."""
        same = rendered.labels == rendered.input_ids
        channels = [_CODES[name] for name in rendered.channels]
        labels = None if same else rendered.labels
        values = (source, rendered.input_ids, labels, rendered.loss_weights, channels, near)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def arrow(self) -> pa.RecordBatch:
        """The rows as Arrow."""
        return pa.RecordBatch.from_pydict(self.columns, schema=_SCHEMA)


def write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a store; under a temporary name until it is whole."""
    aside = path.with_name(f".{path.name}.part")
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as out:
            for batch in batches:
                if batch.num_rows:
                    out.write_batch(batch)
        aside.replace(path)
    except OSError as error:
        raise OssiaError(
            f"{path}: cannot be written ({error}); make room, or name another folder by OSSIA_CACHE"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


class TokenRows(Sequence[TokenRow]):
    """Rows of a store, read where they lie."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            self._table = pa.ipc.open_file(file).read_all()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        ids = self._table.column("input_ids").chunks
        sizes = [np.diff(chunk.offsets.to_numpy()) for chunk in ids]
        self._starts = np.cumsum([0, *map(len, sizes)])
        self.lengths: NDArray[np.int32] = np.concatenate([*sizes, np.zeros(0, np.int32)])
        self._order: NDArray[np.int64] | None = None

    @classmethod
    def temporary(cls, batches: Iterable[pa.RecordBatch]) -> TokenRows:
        """A store that goes when the object does."""
        folder = tempfile.TemporaryDirectory(prefix="ossia-rows-")
        path = Path(folder.name) / "rows.arrow"
        write(path, batches)
        rows = cls(path)
        rows._folder = folder
        return rows

    def select(self, order: NDArray[np.int64]) -> TokenRows:
        """Only these rows, by their places here."""
        part = object.__new__(TokenRows)
        part._table, part._folder, part._starts = self._table, self._folder, self._starts
        part._order = order if self._order is None else self._order[order]
        part.lengths = self.lengths[order]
        return part

    def signatures(self) -> NDArray[np.uint64]:
        """Near-duplicate signatures [N, 8] of a store that was written with them."""
        column = self._table.column("near")
        flat = [chunk.flatten().to_numpy() for chunk in column.chunks]
        found = np.concatenate([*flat, np.zeros(0, np.uint64)]).reshape(-1, BANDS)
        return found if self._order is None else found[self._order]

    def source(self, index: int) -> str:
        """Where a row came from."""
        return str(self._table.column("source")[self._place(index)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]
        place = self._place(index)
        chunk = int(np.searchsorted(self._starts, place, "right")) - 1
        place -= int(self._starts[chunk])
        ids = self._values("input_ids", chunk, place)
        labels = self._values("labels", chunk, place)
        rest = (self._values(name, chunk, place) for name in ("loss_weights", "channels"))
        return TokenRow(ids, labels if len(labels) else ids, *rest)

    def by_channel(self) -> dict[str, tuple[int, int]]:
        """Tokens of each channel, and how many of them carry loss."""
        tokens, trained = np.zeros((2, len(CHANNELS)), np.int64)
        kept = None if self._order is None else np.bincount(self._order, minlength=int(self._starts[-1]))
        for number, chunk in enumerate(self._table.column("channels").chunks):
            codes = chunk.flatten().to_numpy()
            weights = self._table.column("loss_weights").chunk(number).flatten().to_numpy()
            if kept is not None:
                times = np.repeat(kept[self._starts[number] : self._starts[number + 1]], np.diff(chunk.offsets))
                codes, weights = np.repeat(codes, times), np.repeat(weights, times)
            tokens += np.bincount(codes, minlength=len(CHANNELS))
            trained += np.bincount(codes[weights > 0], minlength=len(CHANNELS))
        return {name: (int(tokens[i]), int(trained[i])) for i, name in enumerate(CHANNELS) if tokens[i]}

    def _place(self, index: int) -> int:
        index = range(len(self))[index]
        return index if self._order is None else int(self._order[index])

    def _values(self, name: str, chunk: int, place: int) -> Any:
        lists = self._table.column(name).chunk(chunk)
        start, end = lists.offsets[place].as_py(), lists.offsets[place + 1].as_py()
        return lists.values.slice(start, end - start).to_numpy()
