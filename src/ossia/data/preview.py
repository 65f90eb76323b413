"""`ossia data preview`: a row as a person reads it, and as the model is trained on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ossia.config import PreviewConfig
from ossia.console import plain
from ossia.data.page import write_page
from ossia.data.render import Counts, Renderer, refuse
from ossia.data.sources import Dataset, find_datasets, read_datasets
from ossia.data.tokens import open_template, pieces
from ossia.errors import OssiaError
from ossia.template.messages import Conversation, Rendered


def run(config: PreviewConfig) -> None:
    """Print `config.rows` rows, or write them to a page."""
    datasets = find_datasets(config.dataset)
    tokenizer, template = open_template(config)
    counts = Counts()
    found = islice(_rows(datasets, config, Renderer(template, config), counts), config.rows or None)
    if config.html:
        if rows := list(found):
            write_page(Path(config.html).expanduser(), tokenizer, rows, config)
            print(f"wrote {config.html}", file=sys.stderr)
    else:
        for number, (conversation, rendered) in enumerate(found, start=1):
            if config.format == "json":
                sys.stdout.write(json.dumps(_as_json(tokenizer, rendered), ensure_ascii=False) + "\n")
            else:
                _print(number, conversation, rendered, tokenizer)
    if not counts.tokens:
        raise OssiaError(
            f"no row to show: {counts.bad} bad, {counts.too_long} over --max_length {config.max_length}, "
            f"{counts.untrained} without loss"
        )


def _rows(
    datasets: list[Dataset], config: PreviewConfig, renderer: Renderer, counts: Counts
) -> Iterator[tuple[Conversation, Rendered]]:
    for record in read_datasets(datasets, config.seed):
        outcome = renderer(record)
        refuse(outcome, config)
        counts.add(outcome)
        yield from ((s.conversation, s.rendered) for s in outcome.samples if s.fate == "used")


def _as_json(tokenizer: Any, rendered: Rendered) -> dict[str, Any]:
    return {
        "text": pieces(tokenizer, rendered.input_ids),
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "loss_weights": rendered.loss_weights,
    }


def _print(number: int, conversation: Conversation, rendered: Rendered, tokenizer: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    trained = sum(weight > 0 for weight in rendered.loss_weights)
    console.rule(f"row {number}: {conversation.source}", align="left")
    for message in conversation.messages:
        label = f"{message.role} {message.name}" if message.name else message.role
        if message.thinking:
            console.print(Text(_shown(f"{label}, reasoning: {message.thinking}"), style="dim"))
        if message.content:
            console.print(Text.assemble((_shown(f"{label}: "), "bold"), _shown(message.content)))
        for call in message.tool_calls:
            console.print(Text.assemble((f"{label} calls ", "bold"), _shown(f"{call.name}({call.arguments})")))
    for message in conversation.rejected or ():
        console.print(Text.assemble(("rejected: ", "bold red"), _shown(message.content)))
    if conversation.label is not None:
        console.print(Text(f"the last answer is {'good' if conversation.label else 'bad'}", style="bold"))
    console.print()
    text = Text()
    shown = zip(pieces(tokenizer, rendered.input_ids), rendered.loss_weights, strict=True)
    for weight, run in groupby(shown, key=lambda pair: pair[1]):
        part = _shown("".join(piece for piece, _ in run))
        text.append(part, style="dim" if weight == 0 else "bold green" if weight >= 1 else "yellow")
    console.print(text)
    legend = Text(f"{len(rendered.input_ids)} tokens, {trained} carry loss: ", style="italic")
    legend.append("green", style="bold green")
    legend.append(" weight 1, ")
    legend.append("yellow", style="yellow")
    legend.append(" less, grey none")
    console.print(legend)
    console.print()


def _shown(text: str) -> str:
    return plain(text, keep="\n\t")
