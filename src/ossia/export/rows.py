"""Rows that exports are held against or rounded for: those that the user names, or the adapter's run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ossia.config.parts import DataOptions
from ossia.data.render import Counts, conversations
from ossia.data.sources import find_datasets
from ossia.errors import UsageError
from ossia.template.messages import Conversation
from ossia.train.folder import options_of, run_of


def conversations_of(
    adapter: Path, named: list[str], part: Literal["dataset", "val_dataset"]
) -> Iterator[Conversation] | None:
    """Conversations of `--dataset`, else of a part of the adapter's run; None where neither is there.

    Raises:
        UsageError: `named` has a name of nothing.
        OssiaError: a row that can't be read.
    """
    parent, options = run_of(adapter), DataOptions()
    if named:
        find_datasets(named, "--dataset")
    elif parent is not None:
        options = options_of(parent)
        named = getattr(options, part)
        try:
            find_datasets(named, f"--{part}")
        except UsageError:
            return None
    if not named:
        return None
    return (row for row in conversations(named, options, Counts()) if row.text is None)


def drawn(rows: Iterator[Conversation], count: int) -> list[Conversation]:
    """So many rows, each as likely as any other, the same at every call."""
    draw = random.Random(0)
    kept: list[Conversation] = []
    for number, row in enumerate(rows):
        if number < count:
            kept.append(row)
        elif (place := draw.randint(0, number)) < count:
            kept[place] = row
    return kept
