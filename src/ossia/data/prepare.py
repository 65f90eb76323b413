"""From files to tokenised rows on disk, on several processes, with a count of everything that was dropped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from ossia.cache import cache_dir
from ossia.config.parts import DataOptions
from ossia.console import progress, say
from ossia.data import near, store
from ossia.data.readers import Record
from ossia.data.render import Counts, Renderer, refuse
from ossia.data.sources import Dataset, find_datasets, read_datasets
from ossia.data.store import Batch, TokenRows
from ossia.errors import OssiaError, UsageError
from ossia.template.base import Template
from ossia.threads import allowed_cores

_CHUNK = 128
_WORTH_PROCESSES = 2000
_KEPT_DAYS = 30
_ROWS, _COUNTS = "rows.arrow", "counts.json"


def prepare(
    words: list[str],
    template: Template,
    options: DataOptions | None = None,
    label: str = "data",
    flag: str = "--dataset",
    *,
    for_split: bool = False,
    cache: bool = True,
    processes: int | None = None,
) -> TokenRows:
    """Read, render and check every row that `words` name (see `find_datasets`); say what was found.

    Args:
        words: files, folders, globs, hub data sets.
        template: what renders them.
        options: limits and policies.
        label: begins each line that is said.
        flag: the flag that error messages name.
        for_split: also note what `split` needs to keep near duplicates together.
        cache: keep the tokenised rows under `cache_dir()`, and reuse them while data, template and code are the same.
        processes: processes that tokenise; None: every core for 2,000 rows or more, else this process alone.

    Raises:
        UsageError: a file that is not there, rows that no fine-tuning can train (preference, KTO).
        OssiaError: a row that cannot be used (unless `on_bad_row` is skip), or no row left.
    """
    job = _Job(find_datasets(words, flag), template, options or DataOptions(), label, flag, for_split, processes)
    if cache and (folder := _writable(cache_dir() / "data")):
        counts, rows = _cached(job, folder)
    else:
        counts = Counts()
        rows = TokenRows.temporary(job.batches(counts))
    for line in counts.lines(label, job.options):
        say(line)
    return rows


def split(rows: TokenRows, ratio: float, seed: int) -> tuple[TokenRows, TokenRows, int]:
    """(train, held out, groups of several near duplicates); a group, and the samples of one row, stay on one side.

    Takes groups in a seeded order as long as they fit into the share; one that is larger than it is trained on.
    """
    target = max(1, round(len(rows) * ratio))
    group = near.groups(rows.signatures())
    sizes = Counter(group.tolist())
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    taken = 0
    for name in order:
        if taken + sizes[name] <= target:
            held.add(name)
            taken += sizes[name]
    if not held and len(order) > 1:
        held.add(min(order, key=lambda name: sizes[name]))
    if not held or len(held) == len(order):
        raise UsageError(
            f"--split_dataset_ratio {ratio}: {len(rows):,} rows in {len(order):,} groups of near duplicates cannot be "
            "split; give held-out rows by --val_dataset"
        )
    apart = np.isin(group, np.fromiter(held, np.int64))
    several = sum(size > 1 for size in sizes.values())
    return rows.select(np.flatnonzero(~apart)), rows.select(np.flatnonzero(apart)), several


@dataclass
class _Job:
    datasets: list[Dataset]
    template: Template
    options: DataOptions
    label: str
    flag: str
    for_split: bool
    processes: int | None

    def batches(self, counts: Counts) -> Iterator[pa.RecordBatch]:
        """The tokenised rows in order; `counts` is filled."""
        for dataset in self.datasets:
            if not dataset.total:
                raise UsageError(f"{self.flag} {dataset.word}: no rows in it")
        size = sum(dataset.size for dataset in self.datasets)
        records = read_datasets(self.datasets, self.options.seed)
        worker = _Worker(Renderer(self.template, self.options), self.for_split)
        with progress(self.label, size, "rows") as advance:
            for batch, found in _run(worker, _chunks(records), self._processes(size)):
                counts.merge(found)
                advance(found.rows)
                yield batch
        if not counts.samples:
            raise OssiaError(self._nothing_left(counts))

    def _processes(self, rows: int) -> int:
        if self.processes is not None:
            return self.processes
        return min(allowed_cores(), 16) if rows >= _WORTH_PROCESSES else 1

    def key(self) -> str:
        """A hash of everything that the rows depend on."""
        options = {name: getattr(self.options, name) for name in vars(DataOptions())}
        if all(dataset.whole for dataset in self.datasets):
            del options["seed"]
        parts = {
            "data": [[d.word, d.rows, d.weight, [[p.name, p.digest()] for p in d.parts]] for d in self.datasets],
            "options": options,
            "template": self.template.fingerprint(),
            "code": _code(),
            "split": self.for_split,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    def _nothing_left(self, counts: Counts) -> str:
        where = f"{self.flag} {' '.join(dataset.word for dataset in self.datasets)}"
        if counts.too_long:
            return (
                f"{where}: --max_length {self.options.max_length} is shorter than every row; "
                f"the shortest has {counts.shortest} tokens"
            )
        bad = f"{counts.bad} bad{f', first: {counts.first_bad}' if counts.bad else ''}"
        return f"{where}: no usable row ({bad}; {counts.untrained} without loss)"


class _Worker:
    """Records to rows of a store."""

    def __init__(self, renderer: Renderer, for_split: bool) -> None:
        self.renderer = renderer
        self.for_split = for_split

    def __call__(self, records: list[Record]) -> tuple[pa.RecordBatch, Counts]:
        counts, batch = Counts(), Batch()
        for record in records:
            outcome = self.renderer(record)
            refuse(outcome, self.renderer.options)
            row = outcome.conversation
            if row is not None and (row.rejected is not None or row.label is not None):
                raise UsageError(
                    f"{outcome.source}: a {outcome.format} row; sft trains answers, not the choice between them. "
                    "Leave such rows out, or name the column to train on, as in --columns "
                    """'{"chosen": "output", "rejected": "unused"}'"""
                )
            counts.add(outcome)
            signature = near.signature(row) if self.for_split and row is not None else None
            for sample in outcome.samples:
                if sample.fate == "used":
                    batch.add(outcome.source, sample.rendered, signature)
        return batch.arrow(), counts


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


_worker: _Worker


def _start(worker: _Worker) -> None:
    global _worker
    _worker = worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def _work(records: list[Record]) -> tuple[pa.RecordBatch, Counts]:
    return _worker(records)


def _run(worker: _Worker, chunks: Iterable[list[Record]], processes: int) -> Iterator[tuple[pa.RecordBatch, Counts]]:
    """Each chunk's rows, in order; at most a few chunks are under way, so memory stays flat."""
    if processes == 1:
        yield from map(worker, chunks)
        return
    method = "fork" if "fork" in get_all_start_methods() else "spawn"
    under_way: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(processes, get_context(method), _start, (worker,)) as pool:
        try:
            for chunk in chunks:
                under_way.append(pool.submit(_work, chunk))
                if len(under_way) >= 4 * processes:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise OssiaError(
                "a process that tokenises was ended from outside (out of memory?); try --dataset_num_proc 1"
            ) from error
        finally:
            for future in under_way:
                future.cancel()


def _cached(job: _Job, folder: Path) -> tuple[Counts, TokenRows]:
    entry = folder / job.key()
    while os.environ.get("LOCAL_RANK", "0") != "0" and not (entry / _COUNTS).is_file():
        time.sleep(0.2)  # the first process of a machine makes it; the launcher ends the others if that fails
    with FileLock(f"{entry}.lock"):
        if (entry / _COUNTS).is_file():
            counts = Counts.from_json((entry / _COUNTS).read_text(encoding="utf-8"))
            os.utime(entry)
            say(f"{job.label}: tokenised before, taken from {entry} (--load_from_cache_file false reads anew)")
        else:
            _forget_old(folder)
            counts = Counts()
            entry.mkdir(exist_ok=True)
            try:
                store.write(entry / _ROWS, job.batches(counts))
                (entry / _COUNTS).write_text(counts.to_json(), encoding="utf-8")
            except BaseException:
                shutil.rmtree(entry, ignore_errors=True)
                raise
        return counts, TokenRows(entry / _ROWS)


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    say(f"{folder}: cannot be written, so tokenised rows are not kept for the next run (OSSIA_CACHE names another)")
    return None


def _forget_old(folder: Path) -> None:
    """Remove entries not used for a month."""
    for entry in folder.iterdir():
        with suppress(OSError):
            if entry.is_dir() and time.time() - entry.stat().st_mtime > _KEPT_DAYS * 86400:
                shutil.rmtree(entry)
                entry.with_name(f"{entry.name}.lock").unlink()


def _code() -> str:
    """A hash of the code that makes rows, and of the library that makes tokens."""
    import tokenizers

    found = hashlib.sha256(tokenizers.__version__.encode())
    root = Path(__file__).parent
    for file in sorted([*root.rglob("*.py"), *(root.parent / "template").rglob("*.py")]):
        found.update(file.read_bytes())
    return found.hexdigest()
