"""Conversations that rows hold as harmony text, as a chat template or openai-harmony wrote it."""

from __future__ import annotations

from ossia.data.formats.notes import Place
from ossia.errors import OssiaError
from ossia.template.harmony_text import NO_SYSTEM, parse_conversation
from ossia.template.messages import Conversation


def read_harmony(text: str, place: Place) -> Conversation:
    """The conversation in a text; BadRow where it cannot be read back."""
    try:
        found = parse_conversation(text)
    except OssiaError as error:
        raise place.bad(f" is harmony that cannot be read ({error}); give its messages as role and content") from None
    if any(what != NO_SYSTEM for what in found.dropped):
        place.note("harmony_settings")
    return Conversation(found.messages, list(found.tools), found.reasoning_effort)
