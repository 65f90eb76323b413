"""One row on its way to tokens: what becomes of it, decided in one place for training, preview and reports."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ossia.config.parts import DataOptions, RowOptions
from ossia.console import counted, plain
from ossia.data.formats import NOTES, check_columns, likely, read_row
from ossia.data.readers import BadRow, Record, decode
from ossia.data.sources import find_datasets, read_datasets
from ossia.errors import OssiaError, UsageError
from ossia.template.base import Template
from ossia.template.messages import Conversation, Rendered
from ossia.template.turns import split_turns

_CJK = re.compile(r"[\u3400-\u9fff]")
_PLACEHOLDER = re.compile(r"\{\{\s*(name|author)\s*\}\}", re.IGNORECASE)

Fate = Literal["used", "too_long", "untrained"]
Cut = Literal["", "turns", "end", "answer", "pieces"]


@dataclass(slots=True)
class Sample:
    """A training sample of a row. `length` is that before truncation, `cut` what truncation took off:

    old `turns`, the `end` behind everything trained, the end of an `answer`; a long text becomes several `pieces`.
    """

    conversation: Conversation
    rendered: Rendered
    length: int
    fate: Fate = "used"
    cut: Cut = ""


class Outcome(NamedTuple):
    """What became of a record: its samples, or why it is `bad`, or that it has nothing to train (`untrained`).

    `row` is the record's value, None where it could not be read. `unused` and `notes` are those of `Read`, `renamed`
    the columns of the row that `--columns` names.
    """

    source: str
    row: Any = None
    format: str = ""
    unused: Iterable[str] = ()
    filled: bool = False
    conversation: Conversation | None = None
    samples: list[Sample] = []  # noqa: RUF012
    bad: str = ""
    untrained: str = ""
    notes: Iterable[str] = ()
    renamed: Iterable[str] = ()


@dataclass
class Counts:
    """What became of the rows. Lengths are of samples before truncation."""

    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    renamed: Counter[str] = field(default_factory=Counter)
    bad: int = 0
    first_bad: str = ""
    untrained: int = 0
    first_untrained: str = ""
    too_long: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    filled: int = 0
    samples: int = 0
    split: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    shortest: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one record."""
        self.rows += 1
        self.renamed.update(outcome.renamed)
        if outcome.bad:
            self.bad += 1
            self.first_bad = self.first_bad or outcome.bad
            return
        self.formats[outcome.format] += 1
        self.unused.update(outcome.unused)
        self.notes.update(outcome.notes)
        self.filled += outcome.filled
        if outcome.untrained:
            self.untrained += 1
            self.first_untrained = self.first_untrained or outcome.untrained
        self.split += len(outcome.samples) > 1 and outcome.samples[0].cut != "pieces"
        for sample in outcome.samples:
            self.shortest = min(self.shortest or sample.length, sample.length)
            self.too_long += sample.fate == "too_long"
            if sample.fate == "used":
                if sample.cut:
                    self.cut[sample.cut] += 1
                self.samples += 1
                self.tokens += len(sample.rendered.input_ids)
                weights = sample.rendered.loss_weights
                self.trained += len(weights) - weights.count(0.0)
                self.longest = max(self.longest, len(sample.rendered.input_ids))

    def merge(self, other: Counts) -> None:
        """Add the counts of later records."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Counter):
                mine.update(value)
            elif isinstance(value, str):
                setattr(self, name, mine or value)
            elif name == "longest":
                self.longest = max(mine, value)
            elif name == "shortest":
                self.shortest = min(filter(None, (mine, value)), default=0)
            else:
                setattr(self, name, mine + value)

    def to_json(self) -> str:
        """As `from_json` reads it back."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """What `to_json` wrote."""
        counts = cls()
        for name, value in json.loads(text).items():
            setattr(counts, name, Counter(value) if isinstance(value, dict) else value)
        return counts

    def unused_names(self) -> str:
        """Keys of rows, messages, parts, tools and calls that nobody reads; those near to one that is read first."""
        hints = {name: likely(name) for name in self.unused}
        ordered = sorted(self.unused.items(), key=lambda item: (not hints[item[0]], -item[1]))
        named = ", ".join(f"{name} ({count:,}{hints[name] and '; ' + hints[name]})" for name, count in ordered[:8])
        more = f" and {len(ordered) - 8} more (ossia data check --format json)" if len(ordered) > 8 else ""
        return plain(named) + more

    def remarks(self, options: RowOptions) -> list[str]:
        """What rows have that is not read or is read otherwise than it stands, and how many are bad."""
        lines = [f"keys not used: {unused}"] if (unused := self.unused_names()) else []
        lines += [f"{counted(count, 'row')} with {NOTES[name]}" for name, count in self.notes.most_common()]
        if missing := self.missing_columns(options.columns):
            lines.append(missing)
        if self.bad:
            lines.append(f"{counted(self.bad, 'bad row')} skipped, first: {self.first_bad}")
        return lines

    def missing_columns(self, columns: dict[str, str]) -> str:
        """The columns that `--columns` names and no row has."""
        missing = [name for name in columns if not self.renamed[name]]
        return f"--columns: no row has {', '.join(map(repr, missing))}" if missing and self.rows else ""

    def lines(self, label: str, options: DataOptions) -> list[str]:
        """What is said to the user."""
        kinds = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        share = self.trained / max(self.tokens, 1)
        limit = f"--max_length {options.max_length:,}"
        lines = [
            f"{counted(self.samples, 'sample')} from {kinds} rows, {counted(self.tokens, 'token')}, "
            f"{self.trained:,} carry loss ({share:.0%}), longest {self.longest:,}"
        ]
        lines += self.remarks(options)
        if self.split:
            lines.append(f"{counted(self.split, 'row')} with reasoning in earlier turns split into one sample a turn")
        if self.too_long:
            which = "whose last turn alone is longer" if options.truncation == "left" else "longer"
            lines.append(f"{counted(self.too_long, 'row')} dropped, {which} than {limit}")
        said = {
            "turns": f"{counted(self.cut['turns'], 'row')} cut to {limit} by the oldest turns",
            "end": f"{counted(self.cut['end'], 'row')} cut to {limit} behind the last trained token",
            "answer": f"{counted(self.cut['answer'], 'row')} cut to {limit} within what is trained: "
            "no end token is trained there",
            "pieces": f"texts longer than {limit} cut into {counted(self.cut['pieces'], 'piece')}, nothing dropped",
        }
        lines += [text for cut, text in said.items() if self.cut[cut]]
        if self.untrained:
            lines.append(f"{counted(self.untrained, 'row')} skipped without loss, first: {self.first_untrained}")
        if (options.model_name or options.model_author) and not self.filled:
            lines.append("no row has {{NAME}} or {{AUTHOR}}; --model_name and --model_author change nothing")
        return [f"{label}: {line}" for line in lines]


class Renderer:
    """Records to outcomes; the options' policies on bad and long rows are left to `refuse`."""

    def __init__(self, template: Template, options: DataOptions) -> None:
        check_columns(options.columns)
        self.template = template
        self.options = options

    def __call__(self, record: Record) -> Outcome:
        """What becomes of a record."""
        outcome = _read(record, self.options)
        conversation = outcome.conversation
        if conversation is None:
            return outcome
        if conversation.text is None and not any(message.role == "assistant" for message in conversation.messages):
            return outcome._replace(untrained=f"{record.source}: no answer in this row ({_NO_ANSWER})")
        try:
            samples = self._samples(conversation)
        except UsageError:
            raise
        except (OssiaError, RecursionError) as error:
            return spoiled(record.source, error, outcome.row)
        if all(sample.fate == "untrained" for sample in samples):
            return outcome._replace(samples=samples, untrained=f"{record.source}: no token of this row carries loss")
        return outcome._replace(samples=samples)

    def _samples(self, conversation: Conversation) -> list[Sample]:
        parts = split_turns(conversation) if self.options.multi_turn == "split" else [conversation]
        return [sample for part in parts for sample in self._fit(part)]

    def _fit(self, conversation: Conversation) -> list[Sample]:
        rendered = self.template.render(conversation)
        length, limit = len(rendered.input_ids), self.options.max_length
        sample = Sample(conversation, rendered, length)
        if not any(rendered.loss_weights):
            sample.fate = "untrained"
        elif length > limit and conversation.text is not None:
            starts = range(0, length, limit)
            return [Sample(conversation, _slice(rendered, i, i + limit), length, cut="pieces") for i in starts]
        elif length > limit and self.options.truncation == "left":
            return [self._without_old_turns(sample)]
        elif length > limit and self.options.truncation == "right":
            sample.rendered = _slice(rendered, 0, limit)
            sample.cut = "answer" if any(rendered.loss_weights[limit:]) else "end"
            if not any(sample.rendered.loss_weights):
                sample.fate = "too_long"
        elif length > limit:
            sample.fate = "too_long"
        return [sample]

    def _without_old_turns(self, sample: Sample) -> Sample:
        """The sample with as few of its oldest turns gone as make it fit; instructions stay."""
        messages = sample.conversation.messages
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        head = messages[: asked[0]] if asked else []
        starts = asked[1:]

        def render(start: int) -> Rendered:
            return self.template.render(replace(sample.conversation, messages=[*head, *messages[start:]]))

        fitting = bisect_left(starts, 1, key=lambda start: len(render(start).input_ids) <= self.options.max_length)
        if fitting == len(starts):
            sample.fate = "too_long"
            return sample
        sample.rendered, sample.cut = render(starts[fitting]), "turns"
        if not any(sample.rendered.loss_weights):
            sample.fate = "untrained"
        return sample


_NO_ANSWER = "messages: no assistant; alpaca: no output; query: no response"


def spoiled(source: str, error: OssiaError | RecursionError, row: Any = None) -> Outcome:
    """What becomes of a row that the template cannot take."""
    reason = "nested too deeply" if isinstance(error, RecursionError) else error
    return Outcome(source, row, bad=f"{source}: {reason}")


def refuse_bad(outcome: Outcome, options: RowOptions) -> None:
    """Raise where the options ask to stop at a bad row, or one without anything to train."""
    if options.on_bad_row == "error":
        if outcome.bad:
            raise BadRow(f"{outcome.bad} (skip bad rows with --on_bad_row skip)")
        if outcome.untrained:
            raise BadRow(f"{outcome.untrained}; mend it, or skip such rows with --on_bad_row skip")


def refuse(outcome: Outcome, options: DataOptions) -> None:
    """Raise where the options ask to stop at such a row."""
    refuse_bad(outcome, options)
    if options.truncation == "error":
        for sample in outcome.samples:
            if sample.fate == "too_long":
                raise OssiaError(
                    f"{outcome.source}: {sample.length} tokens, over --max_length {options.max_length}; raise it, "
                    "drop such rows with --truncation delete, or cut them with left or right"
                )


def read_rows(words: list[str], options: RowOptions, seed: int, flag: str = "--dataset") -> Iterator[Outcome]:
    """Each row as a conversation, placeholders filled, or as a bad one; nothing is rendered."""
    check_columns(options.columns)
    for record in read_datasets(find_datasets(words, flag), seed):
        yield _read(record, options)


def _read(record: Record, options: RowOptions) -> Outcome:
    """A record as a conversation, or as a bad row."""
    row = None
    renamed: list[str] = []
    try:
        row = decode(record)
        renamed = [name for name in options.columns if isinstance(row, dict) and name in row]
        found = read_row(row, record.source, options.columns)
    except BadRow as error:
        return Outcome(record.source, row, bad=str(error), renamed=renamed)
    except RecursionError as error:
        return spoiled(record.source, error, row)
    filled = _fill(found.conversation, options)
    return Outcome(
        record.source,
        row,
        found.format,
        found.unused,
        filled,
        found.conversation,
        notes=found.notes,
        renamed=renamed,
    )


def _slice(rendered: Rendered, start: int, end: int) -> Rendered:
    return Rendered(
        rendered.input_ids[start:end],
        rendered.labels[start:end],
        rendered.loss_weights[start:end],
        rendered.channels[start:end],
    )


def _fill(conversation: Conversation, options: RowOptions) -> bool:
    """Replace {{NAME}} and {{AUTHOR}}; of two values the first is for Chinese rows, the second for others."""
    values = {"name": options.model_name, "author": options.model_author}
    if not any(values.values()):
        return False
    chinese = any(_CJK.search(message.content) for message in conversation.messages)

    def replaced(match: re.Match[str]) -> str:
        given = values[match[1].lower()]
        return match[0] if not given else given[0 if chinese else -1]

    filled = False
    for message in conversation.messages:
        for key in ("content", "thinking"):
            text = getattr(message, key)
            if text and "{{" in text:
                new = _PLACEHOLDER.sub(replaced, text)
                filled |= new != text
                setattr(message, key, new)
    return filled
