"""One HTML file that needs nothing else: figures of a data set, and rows with each token coloured by its weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ossia.config.data import DataCommand
from ossia.data.report import Report, histogram
from ossia.data.tokens import pieces
from ossia.template.messages import Conversation, Rendered
from ossia.web import render

_MOST_TOKENS = 4000
_BINS = 40
_MOST_BARS = 12
_OPENER = re.compile(r"<\|?\w*start\w*\|?>")

Check = tuple[str, int, str]


class Piece(NamedTuple):
    """Text that stands alone: one token, or several that share a character."""

    text: str
    ids: str
    special: bool


class Run(NamedTuple):
    """Pieces of one loss weight; `tone` is the class of their colour."""

    tone: str
    weight: str
    pieces: list[Piece]


@dataclass
class Block:
    """Part of a row that is shown together: a message, or what one channel holds."""

    label: str
    runs: list[Run] = field(default_factory=list)


class Shown(NamedTuple):
    """One row of the page."""

    source: str
    tokens: int
    trained: int
    blocks: list[Block]
    hidden: int


def write_page(
    path: Path,
    tokenizer: Any,
    rows: Sequence[tuple[Conversation, Rendered]],
    config: DataCommand,
    report: Report | None = None,
    checks: Sequence[Check] = (),
) -> None:
    """Write rows, and with a report its figures. Text of rows is escaped; the page may run its own script only."""
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    page = render(
        "ossia.data",
        "page.html.jinja",
        "page.js.jinja",
        model=config.model,
        options=config,
        report=report,
        checks=checks,
        bins=histogram(report.lengths, _BINS) if report else [],
        **(_bars(report) if report else {}),
        shown=[_shown(tokenizer, special, *row) for row in rows],
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _bars(report: Report) -> dict[str, list[tuple[str, int, str]]]:
    """The page's bar charts: (name, rows, note) of each bar."""
    letters = max(report.letters.total(), 1)
    scripts = report.scripts.most_common(8)
    return {
        "formats": [(name, rows, "") for name, rows in report.formats.most_common()],
        "turns": [(str(turns), rows, "") for turns, rows in sorted(report.turns.items())[:_MOST_BARS]],
        "scripts": [(name, rows, f"{report.letters[name] / letters:.1%}") for name, rows in scripts],
        "languages": [(name, rows, "") for name, rows in report.reasoning_languages.most_common(_MOST_BARS)],
    }


def _shown(tokenizer: Any, special: set[str], conversation: Conversation, rendered: Rendered) -> Shown:
    ids = rendered.input_ids[:_MOST_TOKENS]
    texts = pieces(tokenizer, ids)
    blocks: list[Block] = []
    tokens = list(zip(ids, texts, rendered.loss_weights, rendered.channels, strict=False))
    for channel, of_channel in groupby(tokens, key=lambda token: token[3]):
        for message in _messages(list(of_channel)):
            block = Block(channel or _role([text for _, text, _, _ in message]))
            for weight, run in groupby(message, key=lambda token: token[2]):
                tone = "none" if weight == 0 else "full" if weight >= 1 else "part"
                block.runs.append(Run(tone, f"{weight:g}", _join([(i, text) for i, text, _, _ in run], special)))
            blocks.append(block)
    trained = sum(weight > 0 for weight in rendered.loss_weights)
    length = len(rendered.input_ids)
    return Shown(conversation.source, length, trained, blocks, length - len(ids))


def _messages(tokens: list[Any]) -> list[list[Any]]:
    """Tokens of one channel, a new list at each token that starts a message."""
    found: list[list[Any]] = [[]]
    for token in tokens:
        if _OPENER.fullmatch(token[1]) and found[-1]:
            found.append([])
        found[-1].append(token)
    return found


def _role(texts: list[str]) -> str:
    """What follows the token that starts a message, where it is a word."""
    word = texts[1].strip() if len(texts) > 1 and _OPENER.fullmatch(texts[0]) else ""
    word = {"functions": "tool"}.get(word, word)
    return word if word.isalpha() else "prompt"


def _join(tokens: list[tuple[int, str]], special: set[str]) -> list[Piece]:
    found: list[Piece] = []
    held: list[int] = []
    for number, (token, text) in enumerate(tokens, start=1):
        held.append(token)
        if text or number == len(tokens):
            found.append(Piece(text, " ".join(map(str, held)), text in special))
            held = []
    return found
