"""`ossia data check` and `ossia data stats`: what is wrong with a data set, and what it is made of."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ossia.config import CheckConfig, StatsConfig
from ossia.console import Advance, counted, grid, progress, text_console
from ossia.data.formats import NOTES
from ossia.data.page import write_page
from ossia.data.report import Found, Report, collect, histogram
from ossia.data.sources import find_datasets
from ossia.data.tokens import open_template
from ossia.errors import OssiaError

if TYPE_CHECKING:
    from rich.console import Console

_BINS = 14
_BAR = 32


def check(config: CheckConfig) -> None:
    """Report what is wrong; OssiaError (exit code 1) where a row cannot be read."""
    report = _run(config)
    if config.format == "json":
        _write_json(report.check_values())
    else:
        _print_check(report)
    if report.bad:
        raise OssiaError(
            f"{counted(report.bad, 'row')} cannot be read; mend them, or leave them out with --on_bad_row skip"
        )


def stats(config: StatsConfig) -> None:
    """Report what the rows are made of; OssiaError where none can be used."""
    report = _run(config)
    if not report.lengths:
        raise OssiaError(
            f"no row to measure: {report.bad:,} bad, {report.untrained.count:,} without loss; see ossia data check"
        )
    if config.format == "json":
        _write_json(report.stats_values())
    else:
        _print_stats(report)


def checks(report: Report) -> list[tuple[str, int, str]]:
    """(what, rows, where the first are) of everything that is looked for."""
    names = ", ".join(f"{{{{{name}}}}}" for name, _ in report.placeholder_names.most_common(3))
    listed: list[tuple[str, Found, str]] = [
        (f"longer than --max_length {report.max_length}, not trained", report.too_long, ""),
        (f"cut to --max_length {report.max_length}", report.cut, ""),
        ("no token carries loss", report.untrained, ""),
        ("same as an earlier row", report.duplicates, ""),
        ("same first question, other row", report.repeated_questions, ""),
        ("placeholder left", report.placeholders, f"{names} in " if names else ""),
        *((NOTES[name], found, "") for name, found in report.notes.items()),
    ]
    bad = [row.source for row in report.bad_rows[:3]]
    return [
        ("cannot be read", report.bad, _places(bad, report.bad)),
        *((what, found.count, note + _places(found.first, found.count)) for what, found, note in listed),
    ]


def _places(first: list[str], count: int) -> str:
    """`a.jsonl:1, :7 …`: without folders, each file named once in a row."""
    places: list[str] = []
    before = ""
    for source in first:
        found = re.fullmatch(r"(?:.*/)?(.*?)(:\d+| row \d+)", source)
        file, place = (found[1], found[2]) if found else (source, "")
        places.append(place.strip() if file == before else file + place)
        before = file
    return ", ".join(places) + (" …" if count > len(first) else "")


def _run(config: CheckConfig) -> Report:
    from rich.console import Console

    datasets = find_datasets(config.dataset)
    tokenizer, template = open_template(config)
    with Console(stderr=True).status("reading files"):
        size = sum(dataset.size for dataset in datasets)
    # Without a terminal, progress is lines on standard output, which belongs to the JSON object.
    shown: AbstractContextManager[Advance] = nullcontext(lambda rows: None)
    if config.format == "text" or sys.stderr.isatty():
        shown = progress("rendering", size, "rows")
    with shown as advance:
        report = collect(datasets, config, template, keep=config.rows if config.html else 0, advance=advance)
    if config.html:
        write_page(Path(config.html).expanduser(), tokenizer, report.kept, config, report, checks(report))
        print(f"wrote {config.html}", file=sys.stderr)
    return report


def _write_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, ensure_ascii=False) + "\n")


def _title(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _head(console: Console, report: Report) -> None:
    files = f"{len(report.files)} files" if len(report.files) > 1 else report.files[0]
    kinds = ", ".join(f"{count:,} {name}" for name, count in report.formats.most_common()) or "none readable"
    console.print(
        f"{files}: {counted(report.rows, 'row')}, {report.usable:,} can be trained on", style="bold", soft_wrap=True
    )
    console.print(f"formats: {kinds}", soft_wrap=True)
    if unused := report.counts.unused_names():
        console.print(f"keys not used: {unused}", soft_wrap=True)
    if missing := report.counts.missing_columns(report.columns):
        console.print(missing, style="yellow", soft_wrap=True)
    if untrainable := report.untrainable():
        console.print(f"ossia sft does not train {untrainable}", style="yellow", soft_wrap=True)


def _print_check(report: Report) -> None:
    from rich.text import Text

    console = text_console()
    _head(console, report)
    console.print()
    table = grid("left", "left", "right", "left")
    for what, count, where in checks(report):
        style = "" if not count else "red" if what == "cannot be read" else "yellow"
        mark = "ok" if not count else "bad" if style == "red" else "note"
        table.add_row(
            Text(mark, style=style or "green"), what, Text(f"{count:,}", style=style), Text(where, style="dim")
        )
    console.print(table)
    if report.bad_rows:
        _title(console, "Bad rows" + (f" (first {len(report.bad_rows)})" if report.bad > len(report.bad_rows) else ""))
        for bad in report.bad_rows:
            console.print(Text.assemble((f"{bad.source}: " if bad.source else "", "bold"), bad.reason), soft_wrap=True)
    if report.bad > len(report.bad_rows):
        _title(console, f"All {report.bad:,} by reason (N: any number)")
        for reason, count in report.reasons.most_common(20):
            console.print(f"{count:>7,}  {reason}", soft_wrap=True)


def _print_stats(report: Report) -> None:
    console = text_console()
    _head(console, report)
    total, lengths, packing = report.total, report.percentiles(), report.packing()

    _title(console, "Length in tokens")
    console.print("  ".join(f"{name} {length:,}" for name, length in lengths.items()))
    _bars(console, [(f"{part.start:,}+", part.rows, "") for part in histogram(report.lengths, _BINS)])
    cut = f", {report.cut.count:,} cut to it" if report.cut.count else ""
    console.print(
        f"--max_length {report.max_length:,}: {counted(report.too_long.count, 'row')} longer and not trained{cut}"
    )

    _title(console, f"Tokens: {total.tokens:,}, {total.trained:,} carry loss ({total.share:.1%})")
    table = grid("left", "right", "right", "right")
    table.add_row("", "tokens", "carry loss", "share", style="dim")
    for channel, share in sorted(report.channels.items()):
        table.add_row(channel or "prompt", f"{share.tokens:,}", f"{share.trained:,}", f"{share.share:.1%}")
    console.print(table)
    console.print(
        f"packed to {report.max_length:,}: {counted(report.counts.samples, 'sample')} in "
        f"{counted(packing.packs, 'sequence')}, {packing.fill:.1%} full"
    )

    _title(console, "Turns per row")
    _bars(console, [(str(turns), rows, "") for turns, rows in sorted(report.turns.items())[:_BINS]])
    _title(console, "Rows by main script, and its share of all letters")
    letters = report.letters.total()
    shares = {name: f"{report.letters[name] / letters:.1%}" for name in report.scripts if letters}
    _bars(console, [(name, rows, shares.get(name, "")) for name, rows in report.scripts.most_common(8)])
    if report.reasoning_languages:
        _title(console, "reasoning_language")
        _bars(console, [(name, rows, "") for name, rows in report.reasoning_languages.most_common(8)])
    console.print()
    console.print(f"rendered at {report.rows_per_second:,.0f} rows/s", style="dim")


def _bars(console: Console, entries: Iterable[tuple[str, int, str]]) -> None:
    from rich.text import Text

    entries = list(entries)
    top = max((rows for _, rows, _ in entries), default=1) or 1
    table = grid("right", "right", "left", "left")
    for name, rows, note in entries:
        size = round(8 * _BAR * rows / top) or (1 if rows else 0)
        bar = "█" * (size // 8) + " ▏▎▍▌▋▊▉"[size % 8].strip()
        table.add_row(name, f"{rows:,}", Text(bar, style="cyan"), Text(note, style="dim"))
    console.print(table)
