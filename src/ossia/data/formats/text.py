"""Plain text for continued pre-training: `text`; every token of it is trained.

A text that is a whole conversation in harmony becomes that conversation.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats import fields
from ossia.data.formats.harmony import read_harmony
from ossia.data.formats.messages import note_control_text
from ossia.data.formats.notes import Place
from ossia.template.harmony_text import looks_like_harmony
from ossia.template.messages import Conversation

NEEDS = (("text",),)
ALSO = ()


def read(row: dict[str, Any], place: Place) -> Conversation:
    """A conversation that is one text, or the one that the text writes down."""
    text, where = fields.text(row, "text", place), place.key("text")
    if not text.strip():
        raise where.bad(" is empty")
    if looks_like_harmony(text):
        return read_harmony(text, where)
    note_control_text(text, where)
    return Conversation([], text=text)
