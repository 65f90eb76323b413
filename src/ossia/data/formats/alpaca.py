"""Alpaca rows: `instruction`, `output`, optional `input`, `system` and `history` [[question, answer], …].

Dolly's names, `context` for input and `response` for output, are read too.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats.fields import only, text
from ossia.data.formats.messages import note_nothing, with_system
from ossia.data.formats.notes import Place
from ossia.data.formats.query import ALSO as _QUERY
from ossia.data.formats.query import find_answer, read_answer, read_history
from ossia.template.messages import Conversation, Message

NEEDS = (("instruction",),)
ALSO = ("input", "context", *_QUERY)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation of a row: history, then instruction and input joined by a line break, then output."""
    messages = read_history(row, place)
    parts = (text(row, "instruction", place), text(row, only(row, ("input", "context"), place), place))
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise place.bad("instruction and input are both empty")
    note_nothing(question, place)
    messages += [Message("user", question), *read_answer(row, find_answer(row, place), place)]
    return Conversation(with_system(messages, row, place))
