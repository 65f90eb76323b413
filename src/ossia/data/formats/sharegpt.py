"""ShareGPT: `conversations` of `from` (human, gpt, function_call, observation …) and `value`; `system`, `tools`."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import names
from ossia.data.formats.fields import first
from ossia.data.formats.messages import read_messages, with_system
from ossia.data.formats.notes import Place
from ossia.template.messages import Conversation

TURNS = ("conversations", "conversation")
NEEDS = (TURNS,)
ALSO = names.SYSTEM


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation of a row; a text and the calls behind it, or several calls in a row, are one message."""
    key = str(first(row, TURNS))
    return Conversation(with_system(read_messages(row[key], place.key(key)), row, place))
