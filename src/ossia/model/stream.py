"""Reads safetensors files tensor by tensor, straight to a device, with a bounded amount on the host.

A mapped file (`safe_open`) counts as resident memory, and a copy out of it is pageable and on one thread. Here threads
read pieces: for a GPU into page-locked buffers that a side stream empties, else into the tensor's own memory.

N bytes of a tensor or of a piece of one.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ossia.errors import OssiaError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # Of MXFP4 scales, which are bytes everywhere here.
    "F8_E8M0": torch.uint8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
THREADS = 4
BUFFERS = 6
PIECE = 32 << 20
AHEAD = 512 << 20
"""Bytes of tensors begun before the first of them is taken; a tensor larger than this is read alone."""
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_PAGE = 4096


class Stored(NamedTuple):
    """A tensor in a file: the bytes from `start` up to `end`, counted from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, in the order of its bytes; the tensors themselves are not read.

    Raises:
        OssiaError: the file is not readable, not safetensors, or longer or shorter than its header says.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            begins = 8 + int.from_bytes(opened.read(8), "little")
            if size < 8 or begins > size or begins > 8 + _LONGEST_HEADER:
                raise _damaged(file, f"a header of {begins - 8} bytes in a file of {size}")
            header = json.loads(opened.read(begins - 8))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not a JSON object")
    tensors = [(name, _stored(file, name, entry, begins)) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda item: item[1][-2:])
    position = begins
    for name, stored in tensors:
        if stored.start != position:
            raise _damaged(file, f"{name} overlaps another tensor or leaves a gap")
        position = stored.end
    if position != size:
        raise _damaged(file, f"{size} bytes, its header says {position}")
    return dict(tensors)


def _stored(file: Path, name: str, entry: object, begins: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
            type(length) is int and length >= 0 for length in shape
        ):
            if dtype not in DTYPES:
                raise OssiaError(f"{file}: {name} is {dtype}, which is not read here; known are {', '.join(DTYPES)}")
            if start < 0 or end - start != prod(shape) * DTYPES[dtype].itemsize:
                raise _damaged(file, f"{name} is {dtype} {shape}, but has bytes {start} to {end}")
            return Stored(file, DTYPES[dtype], tuple(shape), begins + start, begins + end)
    raise _damaged(file, f"{name} has no dtype, shape and offsets in the header")


def find_tensors(files: Mapping[Path, Sequence[str]]) -> dict[str, Stored]:
    """Where the named tensors lie, in the order of the files and of the bytes in each. Reads headers alone.

    Raises:
        OssiaError: a file is damaged, or lacks a tensor.
    """
    found = {}
    for file, names in files.items():
        header, chosen = read_header(file), set(names)
        if absent := sorted(chosen - header.keys()):
            raise _damaged(file, f"no {absent[0]} in it")
        found.update({name: stored for name, stored in header.items() if name in chosen})
    return found


def row_count(shape: tuple[int, ...]) -> int:
    """Length of the first axis; a scalar is one row."""
    return shape[0] if shape else 1


def read_rows(stored: Stored, first: int, last: int) -> Tensor:
    """Rows `first` to `last` (exclusive) of a tensor on disk, in its dtype; only their bytes are read.

    Raises:
        OssiaError: the file is not readable or has become shorter.
    """
    row = stored.nbytes // max(1, row_count(stored.shape))
    rows = torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
    left = rows.view(-1).view(torch.uint8).numpy().data
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start + first * row)
            while left:
                if not (count := file.readinto(left)):
                    raise OssiaError(f"{stored.file}: cut short while it was read; copy it again")
                left = left[count:]
    except OSError as error:
        raise OssiaError(f"{stored.file}: not readable ({error.strerror or error})") from error
    return rows if stored.shape else rows.view(())


def read_tensors(
    files: Mapping[Path, Sequence[str]],
    device: torch.device,
    host: Collection[str] = (),
    *,
    staging: Staging | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of `find_tensors`; no other bytes of the files are read than theirs.

    A tensor on a GPU may be used on the stream that is current when it is taken, which is to be the same throughout.
    While one is used the next are read, `AHEAD` bytes at most. On the host there are the buffers of `staging`, and on
    a CPU the tensors.

    Args:
        files: the tensors wanted of each file; a name occurs once.
        device: where the tensors go.
        host: names of those that go to page-locked host memory instead (to plain memory where `device` is a CPU).
        staging: buffers to read through; None makes them where `device` is a GPU, and reads without them elsewhere.

    Raises:
        OssiaError: as `find_tensors`, or a file got shorter or unreadable meanwhile.
    """
    plan = find_tensors(files)
    if staging is None and device.type == "cuda":
        staging = Staging(device)
    pending: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
    begun = 0
    with ExitStack() as stack:  # unwound backwards: threads end, then copies, then files close
        opened = {path: stack.enter_context(_open(path)) for path in {stored.file for stored in plan.values()}}
        if staging is not None:
            stack.callback(staging.drain)
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ossia-read")
        stack.callback(pool.shutdown, cancel_futures=True)
        for name, stored in plan.items():
            while pending and begun + stored.nbytes > AHEAD:
                begun -= pending[0][1].nbytes
                yield _taken(*pending.popleft(), staging)
            if name in host:
                tensor, through = page_locked(stored.shape, stored.dtype, device), None
            else:
                tensor, through = torch.empty(stored.shape, dtype=stored.dtype, device=device), staging
            pending.append((name, tensor, _begin(pool, opened[stored.file], stored.start, tensor, through)))
            begun += stored.nbytes
            del tensor  # it is the caller's to free
        while pending:
            yield _taken(*pending.popleft(), staging)


def _begin(
    pool: ThreadPoolExecutor, file: FileIO, start: int, tensor: Tensor, staging: Staging | None
) -> list[Future[None]]:
    """Have the pool read a contiguous tensor, piece by piece."""
    if staging is not None:
        staging.wait_for_current()
    size, read = (PIECE, _read) if staging is None else (staging.size, staging.read)
    pieces_N = tensor.reshape(-1).view(torch.uint8).split(size) if tensor.numel() else ()
    return [pool.submit(read, file, start + index * size, piece_N) for index, piece_N in enumerate(pieces_N)]


def _taken(name: str, tensor: Tensor, reads: list[Future[None]], staging: Staging | None) -> tuple[str, Tensor]:
    for read in reads:
        read.result()
    if staging is not None and tensor.is_cuda:
        staging.make_current_wait()
    return name, tensor


class Staging:
    """Buffers between files and a device, used by several threads; one is free again when its copy is through.

    For a GPU they are page-locked and emptied on a stream of their own; for a CPU they only take a longer way.

    Args:
        device: what the buffers are copied to.
        count: buffers, at least one.
        size: bytes of each, and of the pieces that go through one at a time. A power of two: torch rounds up to it.
    """

    def __init__(self, device: torch.device, count: int = BUFFERS, size: int = PIECE) -> None:
        self.size = size
        self.stream: torch.cuda.Stream | None = None
        self._free: SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = SimpleQueue()
        with ExitStack() as stack:
            if device.type == "cuda":
                # Page-locking takes place on the current GPU, which need not be this process's.
                stack.enter_context(torch.cuda.device(device))
                self.stream = torch.cuda.Stream(device)
            for _ in range(count):
                self._free.put((torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None), None))

    def read(self, file: FileIO, start: int, into_N: Tensor) -> None:
        """Read a file from byte `start` into uint8 [N] on the device, N at most `size`; a GPU's copy is queued only."""
        buffer_N, copied = self._free.get()
        try:
            if copied is not None:
                copied.synchronize()
            part_N = buffer_N[: len(into_N)]
            _read(file, start, part_N)
            if self.stream is None:
                into_N.copy_(part_N)
            else:
                with torch.cuda.stream(self.stream):
                    into_N.copy_(part_N, non_blocking=True)
                copied = self.stream.record_event()
        finally:
            self._free.put((buffer_N, copied))

    def wait_for_current(self) -> None:
        """Copies queued from here on wait for the current stream: what they overwrite may be in use there, freed."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def make_current_wait(self) -> None:
        """The current stream waits for the copies queued so far."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def drain(self) -> None:
        """Wait until the copies queued so far are through."""
        if self.stream is not None:
            self.stream.synchronize()


def page_locked(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized host memory that the GPU `device` copies from at full speed; plain memory for a CPU.

    `torch.empty(pin_memory=True)` rounds up to a power of two, 2.1 GB for the 1.2 GB of gpt-oss-20b's embeddings, and
    keeps what is freed. This takes whole pages, and gives them back with the tensor.
    """
    if device.type == "cpu":
        return torch.empty(shape, dtype=dtype)
    size = prod(shape) * dtype.itemsize
    span = -(-max(size, 1) // _PAGE) * _PAGE
    memory = np.empty(span + _PAGE, np.uint8)
    skipped = -memory.ctypes.data % _PAGE
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):
        torch.cuda.check_error(runtime.cudaHostRegister(memory.ctypes.data + skipped, span, 0))
    # The array lives as long as the tensor made from it; when the process ends there may be no CUDA left to tell.
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data + skipped).atexit = False
    return torch.from_numpy(memory[skipped : skipped + size]).view(dtype).view(torch.Size(shape))


def _open(file: Path) -> FileIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(file, error) from error


def _read(file: FileIO, start: int, into_N: Tensor) -> None:
    """Fill uint8 [N] on the host from byte `start` on."""
    left = into_N.numpy().data
    while left:
        try:
            count = os.preadv(file.fileno(), [left], start)
        except OSError as error:
            raise _unreadable(file.name, error) from error
        if not count:
            raise _damaged(file.name, f"ends at byte {start}")
        left, start = left[count:], start + count


def _damaged(file: Path | str, why: str) -> OssiaError:
    return OssiaError(f"{file}: damaged or cut short ({why}); copy it again")


def _unreadable(file: Path | str, error: OSError) -> OssiaError:
    return OssiaError(f"{file}: not readable ({error.strerror or error})")
