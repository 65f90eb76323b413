"""What there is to say of a data set, collected in one pass: hashes and lengths are kept, rows are not."""

from __future__ import annotations

import re
import time
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple

from ossia.config.parts import DataOptions
from ossia.console import plain
from ossia.data.formats import NOTES
from ossia.data.formats.calls import check_arguments
from ossia.data.packing import Fill, fill
from ossia.data.render import Counts, Outcome, Renderer
from ossia.data.sources import Dataset, read_datasets
from ossia.template.base import Template
from ossia.template.messages import Conversation, Rendered

SHOWN_BAD = 20
PERCENTILES = (50, 90, 95, 99)

_FEW = 3
_KINDS = 200
_OTHER = "(others)"
_PLACE = re.compile(r"^(?P<source>.*?(?::\d+| row \d+)?): (?P<reason>.*)$", re.DOTALL)
_KEY = re.compile(
    r"^(?:no key '(?P<missing>[^']+)'|(?P<path>[a-z_]+(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*)(?=:| is ))", re.ASCII
)
_LEFT = re.compile(r"\{\{\s*([^{}\n]{1,60}?)\s*\}\}")


class Bad(NamedTuple):
    """A bad row: its place, the key where the message names one, and why."""

    source: str
    key: str | None
    reason: str


class Bin(NamedTuple):
    """Rows of `start` to `end` - 1 tokens; the last bin of a histogram takes longer rows too."""

    start: int
    end: int
    rows: int


@dataclass
class Found:
    """How many rows have something, and where the first few are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, source: str) -> None:
        """Count one row."""
        self.count += 1
        if len(self.first) < _FEW:
            self.first.append(source)


@dataclass
class Share:
    """Tokens, and how many of them carry loss."""

    tokens: int = 0
    trained: int = 0

    @property
    def share(self) -> float:
        """Trained tokens of all tokens."""
        return self.trained / max(self.tokens, 1)


@dataclass
class Report:
    """The figures. `lengths` are of every sample before truncation; tokens and turns of what a run would use."""

    files: list[str]
    max_length: int
    columns: dict[str, str] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    bad_rows: list[Bad] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    too_long: Found = field(default_factory=Found)
    cut: Found = field(default_factory=Found)
    untrained: Found = field(default_factory=Found)
    duplicates: Found = field(default_factory=Found)
    repeated_questions: Found = field(default_factory=Found)
    placeholders: Found = field(default_factory=Found)
    placeholder_names: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Found] = field(default_factory=dict)
    usable: int = 0
    lengths: array[int] = field(default_factory=lambda: array("i"))
    packed_lengths: array[int] = field(default_factory=lambda: array("i"))
    channels: dict[str, Share] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    reasoning_languages: Counter[str] = field(default_factory=Counter)
    render_seconds: float = 0.0
    kept: list[tuple[Conversation, Rendered]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows read, bad ones too."""
        return self.counts.rows

    @property
    def bad(self) -> int:
        """Rows that cannot be read."""
        return self.counts.bad

    @property
    def formats(self) -> Counter[str]:
        """Rows of each format."""
        return self.counts.formats

    def untrainable(self) -> str:
        """The rows that supervised fine-tuning refuses."""
        kinds = [f"{self.formats[name]:,} {name} rows" for name in ("preference", "kto") if self.formats[name]]
        return " and ".join(kinds)

    @property
    def total(self) -> Share:
        """All tokens of usable rows."""
        shares = self.channels.values()
        return Share(sum(s.tokens for s in shares), sum(s.trained for s in shares))

    @property
    def rows_per_second(self) -> float:
        """Reading and rendering, in one process."""
        return self.rows / self.render_seconds if self.render_seconds else 0.0

    def percentiles(self) -> dict[str, int]:
        """Length of the shortest row, of rows at some shares, and of the longest, in tokens."""
        ordered = sorted(self.lengths)
        if not ordered:
            return {}
        middle = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}
        return {"min": ordered[0], **middle, "max": ordered[-1]}

    def packing(self) -> Fill:
        """What packing usable samples into sequences of `max_length` would give."""
        return fill(self.packed_lengths, self.max_length)

    def check_values(self) -> dict[str, Any]:
        """The object of `check --format json`."""
        return {
            "files": self.files,
            "rows": self.rows,
            "usable": self.usable,
            "formats": dict(self.formats),
            "bad": {
                "count": self.bad,
                "first": [bad._asdict() for bad in self.bad_rows],
                "reasons": dict(self.reasons.most_common()),
            },
            "max_length": self.max_length,
            "unused_keys": dict(self.counts.unused.most_common()),
            "notes": {name: {"what": NOTES[name], **vars(found)} for name, found in self.notes.items()},
            "too_long": vars(self.too_long),
            "cut": {**vars(self.cut), "how": dict(self.counts.cut)},
            "untrained": vars(self.untrained),
            "duplicates": vars(self.duplicates),
            "repeated_questions": vars(self.repeated_questions),
            "placeholders": {**vars(self.placeholders), "names": dict(self.placeholder_names.most_common())},
        }

    def stats_values(self) -> dict[str, Any]:
        """The object of `stats --format json`."""
        total = self.total
        return {
            "files": self.files,
            "rows": self.rows,
            "usable": self.usable,
            "samples": self.counts.samples,
            "bad": self.bad,
            "too_long": self.too_long.count,
            "cut": self.cut.count,
            "untrained": self.untrained.count,
            "tokens": total.tokens,
            "trained_tokens": total.trained,
            "trained_share": round(total.share, 4),
            "channels": {name or "prompt": vars(share) for name, share in self.channels.items()},
            "max_length": self.max_length,
            "lengths": self.percentiles(),
            "histogram": [part._asdict() for part in histogram(self.lengths, 20)],
            "turns": {str(turns): rows for turns, rows in sorted(self.turns.items())},
            "letters": dict(self.letters.most_common()),
            "scripts": dict(self.scripts.most_common()),
            "reasoning_languages": dict(self.reasoning_languages.most_common()),
            "packing": self.packing()._asdict(),
            "render_rows_per_second": round(self.rows_per_second, 1),
        }


def collect(
    datasets: list[Dataset],
    options: DataOptions,
    template: Template,
    *,
    keep: int = 0,
    advance: Callable[[float], None] = lambda rows: None,
) -> Report:
    """Read and render every row; the first `keep` samples are kept as they are."""
    files = [part.name for dataset in datasets for part in dataset.parts]
    report = Report(files, options.max_length, options.columns)
    collector = _Collector(report, keep)
    renderer = Renderer(template, options)
    for record in read_datasets(datasets, options.seed):
        started = time.perf_counter()
        outcome = renderer(record)
        report.render_seconds += time.perf_counter() - started
        collector.add(outcome)
        advance(1)
    return report


class _Collector:
    def __init__(self, report: Report, keep: int) -> None:
        self.report, self.keep = report, keep
        self.seen: set[bytes] = set()
        self.asked: set[bytes] = set()

    def add(self, outcome: Outcome) -> None:
        """Count one record and all that is to be said of it."""
        report, source, conversation = self.report, outcome.source, outcome.conversation
        report.counts.add(outcome)
        self._raw(outcome)
        if outcome.bad or conversation is None:
            self._bad(outcome.bad)
            return
        for note in sorted({*outcome.notes, *check_arguments(conversation)}):
            report.notes.setdefault(note, Found()).add(source)
        self._repeats(conversation)
        self._placeholders(conversation)
        if outcome.untrained:
            report.untrained.add(source)
            return
        report.lengths.extend(sample.length for sample in outcome.samples)
        if any(sample.fate == "too_long" for sample in outcome.samples):
            report.too_long.add(source)
        if any(sample.cut for sample in outcome.samples):
            report.cut.add(source)
        used = [sample for sample in outcome.samples if sample.fate == "used"]
        if used:
            report.usable += conversation.rejected is None and conversation.label is None
            self._text(conversation)
        for sample in used:
            self._tokens(sample.rendered)
            if len(report.kept) < self.keep:
                report.kept.append((sample.conversation, sample.rendered))

    def _bad(self, error: str) -> None:
        bad = _bad(error)
        _count(self.report.reasons, re.sub(r"\d+", "N", bad.reason))
        if len(self.report.bad_rows) < SHOWN_BAD:
            self.report.bad_rows.append(bad)

    def _raw(self, outcome: Outcome) -> None:
        if isinstance(outcome.row, dict) and isinstance(language := outcome.row.get("reasoning_language"), str):
            _count(self.report.reasoning_languages, language)

    def _tokens(self, rendered: Rendered) -> None:
        report = self.report
        report.packed_lengths.append(len(rendered.input_ids))
        for channel, tokens in Counter(rendered.channels).items():
            report.channels.setdefault(channel, Share()).tokens += tokens
        trained = Counter(c for c, weight in zip(rendered.channels, rendered.loss_weights, strict=True) if weight > 0)
        for channel, tokens in trained.items():
            report.channels[channel].trained += tokens

    def _text(self, conversation: Conversation) -> None:
        report = self.report
        report.turns[sum(message.role == "user" for message in conversation.messages)] += 1
        letters: Counter[str] = Counter()
        for char, count in Counter("".join(_texts(conversation))).items():
            if char.isalpha():
                letters[_script(char)] += count
        report.letters.update(letters)
        if letters:
            _count(report.scripts, letters.most_common(1)[0][0])

    def _repeats(self, conversation: Conversation) -> None:
        report = self.report
        row = _hash(repr(replace(conversation, source="")))
        question = next((m.content.strip() for m in conversation.messages if m.role == "user"), None)
        asked = None if question is None else _hash(question)
        if row in self.seen:
            report.duplicates.add(conversation.source)
        elif asked is not None and asked in self.asked:
            report.repeated_questions.add(conversation.source)
        self.seen.add(row)
        if asked is not None:
            self.asked.add(asked)

    def _placeholders(self, conversation: Conversation) -> None:
        texts = _texts(conversation, tools=True)
        names = {name for text in texts if "{{" in text for name in _LEFT.findall(text)}
        if names:
            self.report.placeholders.add(conversation.source)
            for name in names:
                _count(self.report.placeholder_names, name)


def histogram(lengths: Sequence[int], bins: int) -> list[Bin]:
    """At most `bins` bins of a round width; a few rows far longer than the others share the last one."""
    if not lengths:
        return []
    ordered = sorted(lengths)
    top = min(ordered[-1], 2 * ordered[(len(ordered) - 1) * 99 // 100]) + 1
    width = next(step * 10**power for power in range(9) for step in (1, 2, 5) if step * 10**power * bins >= top)
    starts = range(ordered[0] // width * width, top, width)
    edges = [bisect_left(ordered, start) for start in starts] + [len(ordered)]
    ends = [*starts[1:], max(starts[-1] + width, ordered[-1] + 1)]
    return [Bin(*part) for part in zip(starts, ends, (b - a for a, b in pairwise(edges)), strict=True)]


def _texts(conversation: Conversation, tools: bool = False) -> Iterator[str]:
    """What is said, with or without the results of tools."""
    yield conversation.text or ""
    for message in conversation.messages:
        if tools or message.role != "tool":
            yield from (message.content, message.thinking or "")


def _bad(error: str) -> Bad:
    found = _PLACE.match(error)
    if not found:
        return Bad("", None, plain(error))
    key = _KEY.match(found["reason"])
    return Bad(found["source"], (key["missing"] or key["path"]) if key else None, plain(found["reason"]))


@lru_cache(maxsize=65536)
def _script(char: str) -> str:
    """The writing system of a letter, from its Unicode name."""
    word = unicodedata.name(char, "other").split()[0]
    return {"CJK": "Chinese characters", "HIRAGANA": "Kana", "KATAKANA": "Kana"}.get(word, word.capitalize())


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _count(counter: Counter[str], key: str) -> None:
    """Count at most `_KINDS` different keys, the rest together."""
    key = plain(key)
    counter[key if key in counter or len(counter) < _KINDS else _OTHER] += 1
