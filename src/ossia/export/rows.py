"""Rows that exports are held against or rounded for: those that the user names, or the adapter's run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ossia.config.parts import DataOptions, RowOptions
from ossia.console import say
from ossia.data.render import Counts, read_rows, refuse_bad
from ossia.data.sources import find_datasets
from ossia.errors import UsageError
from ossia.template.messages import Conversation
from ossia.train.folder import options_of, run_of


def conversations_of(
    adapter: Path, named: list[str], part: Literal["dataset", "val_dataset"], options: RowOptions
) -> Iterator[Conversation] | None:
    """Conversations of `--dataset`, else of a part of the adapter's run, read as it did; None where neither is there.

    Raises:
        UsageError: `named` has a name of nothing.
        OssiaError: a row that can't be read, unless the options skip it.
    """
    parent, seed = run_of(adapter), DataOptions().seed
    if named:
        find_datasets(named, "--dataset")
    elif parent is not None:
        trained = options_of(parent)
        named, seed = getattr(trained, part), trained.seed
        if options.on_bad_row == "skip":
            trained.on_bad_row = "skip"
        options = trained
        try:
            find_datasets(named, f"--{part}")
        except UsageError:
            return None
    if not named:
        return None
    return _read(named, options, seed, f"--{part}")


def _read(named: list[str], options: RowOptions, seed: int, flag: str) -> Iterator[Conversation]:
    counts = Counts()
    for outcome in read_rows(named, options, seed):
        refuse_bad(outcome, options)
        counts.add(outcome)
        if outcome.conversation is not None and outcome.conversation.text is None:
            yield outcome.conversation
    for line in counts.remarks(options):
        say(f"{flag}: {line}")


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
