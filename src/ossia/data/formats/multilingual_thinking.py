"""The columns of HuggingFaceH4/Multilingual-Thinking; `messages` is read where it is there, as it says the same."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import messages
from ossia.data.formats.fields import has, text
from ossia.data.readers import BadRow
from ossia.template.messages import Conversation, Message

NEEDS = (("user",), ("analysis",), ("final",))
ALSO = ("reasoning_language", "developer", "messages")


def read(row: dict[str, Any], source: str) -> Conversation:
    """Instructions (the language of the reasoning before the developer's), question, reasoning and answer."""
    question, answer = text(row, "user", source), text(row, "final", source)
    if has(row, "messages"):
        found = messages.read(row, source)
        if found.messages[-1].content.strip() != answer.strip():
            raise BadRow(f"{source}: final is not what the last of messages says; keep one of the two columns")
        return found
    if not question.strip():
        raise BadRow(f"{source}: user is empty")
    language = text(row, "reasoning_language", source)
    parts = [f"reasoning language: {language}" if language.strip() else "", text(row, "developer", source)]
    conversation = Conversation([Message("user", question)], source=source)
    if system := "\n\n".join(part for part in parts if part.strip()):
        conversation.messages.insert(0, Message("system", system))
    if answer.strip():
        conversation.messages.append(Message("assistant", answer, text(row, "analysis", source)))
    return conversation
