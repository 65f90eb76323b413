"""The batch of a step that was held back, as rows to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ossia.console import is_main_process
from ossia.data.packing import PackedRows
from ossia.data.store import TokenRows
from ossia.train.guard import Step


def keep_batches(path: Path, step: Step, dataset: Any, tokenizer: Any) -> list[str]:
    """Write each row of a step, of all processes, as a JSON line; returns where the rows came from.

    A line has `step`, `row` (its place in the training data), `source`, `loss_weights`, `input_ids` and `text`.

    Args:
        path: file to write.
        step: the bad one.
        dataset: what the batches were drawn from.
        tokenizer: makes text of ids.
    """
    rows = dataset.rows if isinstance(dataset, PackedRows) else dataset
    lines = []
    for row in step.rows:
        ids, weights = row.input_ids, row.loss_weights
        place = _place(rows, ids) if isinstance(rows, TokenRows) else None
        source = rows.source(place) if place is not None else "unknown"
        line = {"step": step.number, "row": place, "source": source, "loss_weights": weights.tolist()}
        lines.append({**line, "input_ids": ids.tolist(), "text": tokenizer.decode(ids.tolist())})
    lines = gather_object(lines)
    if is_main_process():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    return [line["source"] for line in lines]


def _place(rows: TokenRows, ids: np.ndarray) -> int | None:
    """The row that has these ids; the first of equal ones."""
    same_length = np.flatnonzero(rows.lengths == len(ids))
    return next((int(place) for place in same_length if np.array_equal(rows[int(place)].input_ids, ids)), None)
