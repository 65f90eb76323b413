"""`ossia data preview`: a row as a person reads it, and as the model is trained on it."""

from __future__ import annotations

import json
import sys
from itertools import groupby, islice
from typing import Any

from ossia.config import PreviewConfig
from ossia.data.prepare import Counts, render_rows
from ossia.data.sources import find_files
from ossia.errors import OssiaError
from ossia.model.folder import resolve_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template.messages import Conversation, Rendered
from ossia.template.options import template_from


def run(config: PreviewConfig) -> None:
    """Print `config.rows` rows."""
    assert config.model is not None
    find_files(config.dataset)
    tokenizer = load_tokenizer(resolve_model(config.model, weights=False))
    template = template_from(tokenizer, config)
    counts = Counts()
    found = render_rows(config.dataset, config, template, counts)
    for number, (conversation, rendered) in enumerate(islice(found, config.rows or None), start=1):
        if config.format == "json":
            sys.stdout.write(json.dumps(_as_json(tokenizer, rendered), ensure_ascii=False) + "\n")
        else:
            _print(number, conversation, rendered, tokenizer)
    if not counts.tokens:
        raise OssiaError(
            f"no row to show: {counts.bad} bad, {counts.too_long} over --max_length {config.max_length}, "
            f"{counts.untrained} without loss"
        )


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """One text per token; together they are the whole text. Where tokens share a character, the last has it."""
    texts: list[str] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(held) < 8:
            texts.append("")
            continue
        texts.append(text)
        held = []
    if held:
        texts[-1] = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


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
            console.print(Text(f"{label}, reasoning: {message.thinking}", style="dim"))
        if message.content:
            console.print(Text.assemble((f"{label}: ", "bold"), message.content))
        for call in message.tool_calls:
            console.print(Text.assemble((f"{label} calls ", "bold"), f"{call.name}({call.arguments})"))
    console.print()
    text = Text()
    shown = zip(pieces(tokenizer, rendered.input_ids), rendered.loss_weights, strict=True)
    for weight, run in groupby(shown, key=lambda pair: pair[1]):
        part = "".join(piece for piece, _ in run)
        text.append(part, style="dim" if weight == 0 else "bold green" if weight >= 1 else "yellow")
    console.print(text)
    legend = Text(f"{len(rendered.input_ids)} tokens, {trained} carry loss: ", style="italic")
    legend.append("green", style="bold green")
    legend.append(" weight 1, ")
    legend.append("yellow", style="yellow")
    legend.append(" less, grey none")
    console.print(legend)
    console.print()
