"""Plain text for continued pre-training: `text`; every token of it is trained."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import fields
from ossia.data.readers import BadRow
from ossia.template.messages import Conversation

NEEDS = (("text",),)
ALSO = ()


def read(row: dict[str, Any], source: str) -> Conversation:
    """A conversation that is one text."""
    text = fields.text(row, "text", source)
    if not text.strip():
        raise BadRow(f"{source}: text is empty")
    return Conversation([], source=source, text=text)
