"""The columns of HuggingFaceH4/Multilingual-Thinking; `messages` is read where it is there, as it says the same."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import messages, names
from ossia.data.formats.fields import has, text
from ossia.data.formats.notes import Place
from ossia.template.messages import Conversation, Message

NEEDS = (("user",), ("analysis",), ("final",))
ALSO = ("reasoning_language", "developer", "messages", *names.SYSTEM)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """Instructions (the language of the reasoning before the developer's), question, reasoning and answer."""
    question, answer = text(row, "user", place), text(row, "final", place)
    if has(row, "messages"):
        found = messages.read(row, place)
        if found.messages[-1].content.strip() != answer.strip():
            raise place.bad("final is not what the last of messages says; keep one of the two columns")
        return found
    if not question.strip():
        raise place.bad("user is empty")
    language = text(row, "reasoning_language", place)
    parts = [f"reasoning language: {language}" if language.strip() else "", text(row, "developer", place)]
    conversation = Conversation([Message("user", question)])
    if system := "\n\n".join(part for part in parts if part.strip()):
        conversation.messages.insert(0, Message("system", system))
    conversation.messages = messages.with_system(conversation.messages, row, place)
    if answer.strip():
        conversation.messages += messages.answer(answer, text(row, "analysis", place) or None, place.key("final"))
    return conversation
