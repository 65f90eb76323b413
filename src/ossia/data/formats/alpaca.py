"""Alpaca rows: `instruction`, `output`, optional `input`, `system` and `history` [[question, answer], …]."""

from __future__ import annotations

from typing import Any

from ossia.data.sources import BadRow
from ossia.errors import nearest
from ossia.template.messages import Conversation, Message


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row: history, then instruction and input joined by a line break, then output."""
    messages: list[Message] = []
    if system := _text(row, "system", source):
        messages.append(Message("system", system))
    for number, pair in enumerate(row.get("history") or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"{source}: history entry {number} is not a pair [question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    question = "\n".join(text for key in ("instruction", "input") if (text := _text(row, key, source)))
    if not question.strip():
        raise BadRow(f"{source}: instruction and input are both empty")
    messages.append(Message("user", question))
    if "output" not in row and (hint := nearest("output", row)):
        raise BadRow(f"{source}: no key 'output'{hint}")
    if (answer := _text(row, "output", source)).strip():
        messages.append(Message("assistant", answer))
    return Conversation(messages, source=source)


def _text(row: dict[str, Any], key: str, source: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{source}: {key} is {type(value).__name__}; a text is needed")
    return value
