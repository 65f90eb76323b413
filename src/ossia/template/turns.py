"""One training sample per turn, where a row taken whole would lose the reasoning of its earlier turns."""

from __future__ import annotations

from dataclasses import replace

from ossia.template.messages import Conversation, Message
from ossia.template.think import split_think


def split_turns(conversation: Conversation) -> list[Conversation]:
    """The samples of a row: each ends with one turn, reasoning included, and trains that turn alone.

    A row whose earlier turns have no reasoning, and no calls of built-in tools, which go with it, stays one sample,
    which trains all its turns in the same contexts at a fraction of the tokens. A turn is everything from a user
    message (or the start) to the answer before the next.
    """
    messages = conversation.messages
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i and _says(messages[i - 1])]
    if not starts or not any(map(_reasons, messages[: starts[-1]])):
        return [conversation]
    turns = zip([0, *starts], [*starts, len(messages)], strict=True)
    return [_sample(conversation, start, end) for start, end in turns if any(map(_says, messages[start:end]))]


def _sample(conversation: Conversation, start: int, end: int) -> Conversation:
    earlier = [replace(m, loss=0.0) if _says(m) else m for m in conversation.messages[:start]]
    return replace(conversation, messages=[*earlier, *conversation.messages[start:end]])


def _says(message: Message) -> bool:
    return message.role == "assistant"


def _reasons(message: Message) -> bool:
    """Whether something of the message is left out once an answer follows: reasoning, calls of built-in tools."""
    if not _says(message):
        return False
    thinking = split_think(message.content)[0] if message.thinking is None else message.thinking
    return bool((thinking or "").strip()) or any(call.builtin for call in message.tool_calls)
