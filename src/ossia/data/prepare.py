"""From files to tokenised rows, with a count of everything that was dropped."""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ossia.config.parts import DataOptions
from ossia.console import say
from ossia.data.formats import read_row
from ossia.data.sources import BadRow, find_files, read_rows
from ossia.errors import OssiaError, UsageError
from ossia.template.base import Template
from ossia.template.messages import Conversation, Rendered
from ossia.template.turns import split_turns

_CJK = re.compile(r"[\u3400-\u9fff]")
_PLACEHOLDER = re.compile(r"\{\{\s*(name|author)\s*\}\}", re.IGNORECASE)


@dataclass(slots=True)
class TokenRow:
    """One training row in compact arrays of one length (see `Rendered`)."""

    input_ids: array
    labels: array
    loss_weights: array

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Counts:
    """What became of the rows. `on_bad` is told of each bad row that is skipped."""

    formats: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_bad: str = ""
    too_long: int = 0
    untrained: int = 0
    filled: int = 0
    samples: int = 0
    split: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    shortest: int = 0
    on_bad: Callable[[BadRow], None] | None = None

    def lines(self, label: str, options: DataOptions) -> list[str]:
        """What is said to the user."""
        kinds = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        share = self.trained / max(self.tokens, 1)
        lines = [
            f"{label}: {self.samples:,} samples from {kinds} rows, {self.tokens:,} tokens, "
            f"{self.trained:,} carry loss ({share:.0%}), longest {self.longest:,}"
        ]
        if self.bad:
            lines.append(f"{label}: {self.bad:,} bad rows skipped, first: {self.first_bad}")
        if self.split:
            lines.append(f"{label}: {self.split:,} rows with reasoning in earlier turns split into one sample a turn")
        if self.too_long:
            lines.append(f"{label}: {self.too_long:,} rows longer than --max_length {options.max_length} dropped")
        if self.untrained:
            lines.append(f"{label}: {self.untrained:,} rows skipped: no token in them carries loss")
        if (options.model_name or options.model_author) and not self.filled:
            lines.append(
                f"{label}: no row has {{{{NAME}}}} or {{{{AUTHOR}}}}; --model_name and --model_author change nothing"
            )
        return lines


def prepare(
    names: list[str],
    template: Template,
    options: DataOptions | None = None,
    label: str = "data",
    flag: str = "--dataset",
) -> list[TokenRow]:
    """Read, render and check every row of `names`; say what was found.

    Raises:
        UsageError: a file that is not there.
        OssiaError: a row that cannot be used (unless `on_bad_row` is skip), or no row left.
    """
    options = options or DataOptions()
    counts = Counts()
    rows = [_pack(rendered) for _, rendered in render_rows(names, options, template, counts, flag)]
    if not rows:
        raise OssiaError(_nothing_left(counts, options, flag, names))
    for line in counts.lines(label, options):
        say(line)
    return rows


def render_rows(
    names: list[str], options: DataOptions, template: Template, counts: Counts, flag: str = "--dataset"
) -> Iterator[tuple[Conversation, Rendered]]:
    """Each usable row as conversation and tokens; `counts` tells of the rest."""
    for conversation in _samples(names, options, counts, flag):
        try:
            if not any(message.role == "assistant" for message in conversation.messages):
                raise _Untrained(
                    f"{conversation.source}: no answer in this row (messages: no assistant; alpaca: no output)"
                )
            rendered = template.render(conversation)
            if not any(rendered.loss_weights):
                raise _Untrained(f"{conversation.source}: no token of this row carries loss")
        except _Untrained as error:
            if options.on_bad_row == "error":
                raise BadRow(f"{error}; mend it, or skip such rows with --on_bad_row skip") from None
            counts.untrained += 1
            continue
        except UsageError:
            raise
        except OssiaError as error:
            _bad(BadRow(f"{conversation.source}: {error}"), options, counts)
            continue
        length = len(rendered.input_ids)
        counts.shortest = min(counts.shortest or length, length)
        if length > options.max_length:
            if options.truncation == "error":
                raise OssiaError(
                    f"{conversation.source}: {length} tokens, over --max_length {options.max_length}; "
                    "raise it, or drop such rows with --truncation delete"
                )
            counts.too_long += 1
            continue
        counts.samples += 1
        counts.tokens += length
        counts.trained += sum(weight > 0 for weight in rendered.loss_weights)
        counts.longest = max(counts.longest, length)
        yield conversation, rendered


def _samples(names: list[str], options: DataOptions, counts: Counts, flag: str) -> Iterator[Conversation]:
    for conversation in conversations(names, options, counts, flag):
        parts = split_turns(conversation) if options.multi_turn == "split" else [conversation]
        counts.split += len(parts) > 1
        yield from parts


def conversations(
    names: list[str], options: DataOptions, counts: Counts, flag: str = "--dataset"
) -> Iterator[Conversation]:
    """Each readable row as a conversation, placeholders filled."""
    for file in find_files(names, flag):
        before = sum(counts.formats.values()) + counts.bad
        for row in read_rows(file):
            try:
                if isinstance(row, BadRow):
                    raise row
                form, conversation = read_row(row)
            except BadRow as error:
                _bad(error, options, counts)
                continue
            counts.formats[form] += 1
            counts.filled += _fill(conversation, options)
            yield conversation
        if sum(counts.formats.values()) + counts.bad == before:
            raise UsageError(f"{flag} {file}: no rows in this file")


def split(rows: list[TokenRow], ratio: float, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """(train, held out), by a seeded shuffle; at least one row on each side."""
    if len(rows) < 2:
        raise UsageError(f"--split_dataset_ratio {ratio}: {len(rows)} row cannot be split")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = sorted(order[: min(max(1, round(len(rows) * ratio)), len(rows) - 1)])
    chosen = set(held)
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in held]


class _Untrained(Exception):
    """A row without loss."""


def _pack(rendered: Rendered) -> TokenRow:
    return TokenRow(array("i", rendered.input_ids), array("i", rendered.labels), array("f", rendered.loss_weights))


def _bad(error: BadRow, options: DataOptions, counts: Counts) -> None:
    if options.on_bad_row == "error":
        raise BadRow(f"{error} (skip bad rows with --on_bad_row skip)")
    counts.bad += 1
    counts.first_bad = counts.first_bad or str(error)
    if counts.on_bad:
        counts.on_bad(error)


def _fill(conversation: Conversation, options: DataOptions) -> bool:
    """Replace {{NAME}} and {{AUTHOR}}; of two values the first is for Chinese rows, the second for others."""
    values = {"name": options.model_name, "author": options.model_author}
    if not any(values.values()):
        return False
    chinese = any(_CJK.search(message.content) for message in conversation.messages)

    def replace(match: re.Match[str]) -> str:
        given = values[match[1].lower()]
        return match[0] if not given else given[0 if chinese else -1]

    filled = False
    for message in conversation.messages:
        for key in ("content", "thinking"):
            text = getattr(message, key)
            if text and "{{" in text:
                new = _PLACEHOLDER.sub(replace, text)
                filled |= new != text
                setattr(message, key, new)
    return filled


def _nothing_left(counts: Counts, options: DataOptions, flag: str, names: Iterable[str]) -> str:
    files = " ".join(str(Path(name)) for name in names)
    if counts.too_long:
        return (
            f"{flag} {files}: --max_length {options.max_length} is shorter than every row; "
            f"the shortest has {counts.shortest} tokens"
        )
    bad = f"{counts.bad} bad{f', first: {counts.first_bad}' if counts.bad else ''}"
    return f"{flag} {files}: no usable row ({bad}; {counts.untrained} without loss)"
