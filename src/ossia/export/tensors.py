"""Tensors in pieces, and files written row by row, their head first."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ossia.model.stream import DTYPES, row_count

PIECE_VALUES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Values handled at a time by kind of device, or one row of a tensor (one expert) if that is more."""
_WAITING = 2
"""Writes of rows that may wait for the disk while the next rows are made."""
_FLUSH = 256 << 20
"""Bytes after which a file is flushed, so that its end has little left to wait for."""
_NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}


class Spec(NamedTuple):
    """A tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def pieces(shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each piece of a tensor."""
    rows = row_count(shape)
    step = max(1, PIECE_VALUES[device.type] * rows // max(1, torch.Size(shape).numel()))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


class RowWriter:
    """Writes a file: its head at once, then rows of any tensor, each tensor's in order, on a thread of its own.

    Rows are not to be changed once they are given. The file carries its name only after a clean end of the `with`
    block, with every byte on the disk.

    Args:
        path: of the file.
        head: its first bytes.
        spans: first and last byte (exclusive) of each tensor, by name.
        resumes: what a stop leaves stays, and one with this head is gone on with; tensors that it has whole are to be
            passed over.
    """

    def __init__(self, path: Path, head: bytes, spans: Mapping[str, tuple[int, int]], *, resumes: bool = False) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self._resumes = resumes
        if resumes and path.exists():
            path.replace(self.part)
        self.resumed = resumes and _begins_with(self.part, head)
        """Whether there is a file to go on with."""
        self._head = head
        self._next = {name: start for name, (start, _) in spans.items()}
        self._ends = {name: end for name, (_, end) in spans.items()}
        self.waited = 0.0
        """Seconds for which the caller waited for the disk."""

    def __enter__(self) -> Self:
        self._file = self.part.open("r+b" if self.resumed else "wb", buffering=0)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ossia-write")
        self._waiting: deque[Future[None]] = deque()
        self._dirty = 0
        self._write(self._head, 0)
        return self

    def pass_over(self, name: str) -> None:
        """A tensor is there, whole."""
        self._next[name] = self._ends[name]

    def write(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor."""
        data = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        start = self._next[name]
        if start + len(data) > self._ends[name]:
            raise ValueError(f"{name}: more rows than its shape has")
        self._next[name] += len(data)
        self._wait(_WAITING - 1)
        self._waiting.append(self._thread.submit(self._write, data, start))

    def once_written(self, action: Callable[[], None]) -> None:
        """Call `action` when everything given so far is on the disk, on the thread that writes."""

        def act() -> None:
            os.fsync(self._file.fileno())
            self._dirty = 0
            action()

        self._wait(_WAITING - 1)
        self._waiting.append(self._thread.submit(act))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file, self._thread:
                if error is None:
                    self._wait(0)
                    if short := [name for name, end in self._ends.items() if self._next[name] != end]:
                        raise ValueError(f"{short[0]}: fewer rows than its shape has")
                    started = time.perf_counter()
                    os.fsync(self._file.fileno())
                    self.waited += time.perf_counter() - started
            if error is None:
                self.part.replace(self.path)
        finally:
            if not self._resumes:
                self.part.unlink(missing_ok=True)

    def _wait(self, left: int) -> None:
        """Until no more than `left` writes are waiting; OSError where one failed."""
        started = time.perf_counter()
        while len(self._waiting) > left:
            self._waiting.popleft().result()
        self.waited += time.perf_counter() - started

    def _write(self, data: bytes | memoryview, start: int) -> None:
        self._dirty += len(data)
        while data:
            count = os.pwrite(self._file.fileno(), data, start)
            data, start = data[count:], start + count
        if self._dirty >= _FLUSH:
            os.fsync(self._file.fileno())
            self._dirty = 0


def _begins_with(file: Path, head: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(head)) == head
    except FileNotFoundError:
        return False


class Writer(RowWriter):
    """Writes a safetensors file.

    Args:
        path: of the file.
        specs: all its tensors.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        # Widest first, as safetensors does it, so that each tensor is aligned.
        order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        spans: dict[str, tuple[int, int]] = {}
        for name in order:
            spec, start = specs[name], end
            end = start + spec.nbytes
            spans[name] = start, end
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        super().__init__(path, head, {name: (len(head) + a, len(head) + b) for name, (a, b) in spans.items()})
