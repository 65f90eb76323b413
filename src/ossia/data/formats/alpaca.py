"""Alpaca rows: `instruction`, `output`, optional `input`, `system` and `history` [[question, answer], …].

Dolly's names, `context` for input and `response` for output, are read too.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats.fields import first, text
from ossia.data.formats.query import ANSWERS, find_answer, read_history
from ossia.data.readers import BadRow
from ossia.template.messages import Conversation, Message

NEEDS = (("instruction",),)
ALSO = ("input", "context", "system", "history", *ANSWERS)


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row: history, then instruction and input joined by a line break, then output."""
    messages: list[Message] = []
    if (system := text(row, "system", source)).strip():
        messages.append(Message("system", system))
    messages += read_history(row, source)
    parts = (text(row, "instruction", source), text(row, first(row, ("input", "context")), source))
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise BadRow(f"{source}: instruction and input are both empty")
    messages.append(Message("user", question))
    if (answer := text(row, find_answer(row, source), source)).strip():
        messages.append(Message("assistant", answer))
    return Conversation(messages, source=source)
