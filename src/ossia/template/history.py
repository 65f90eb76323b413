"""Messages put together from what an assistant said, part by part, in its order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal

from ossia.template.base import Template
from ossia.template.messages import Message, ToolCall


class History:
    """Messages as they are read from a request or a reply.

    A `Message` of the assistant has reasoning, then text, then calls. A turn in which they come otherwise (two
    reasonings, reasoning after a preamble, reasoning before each of two calls) becomes several messages in a row.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def add(self, message: Message) -> None:
        """A message of anybody but the assistant."""
        self._messages.append(message)

    def reasoned(self, text: str) -> None:
        """The assistant reasoned."""
        self._messages.append(Message("assistant", "", text))

    def said(self, text: str, channel: Literal["commentary", "final"] | None = None) -> None:
        """The assistant said something; `channel` where it is known."""
        last = self._last()
        if last is not None and last.thinking is not None and not last.content and not last.tool_calls:
            last.content, last.channel = text, channel
        else:
            self._messages.append(Message("assistant", text, channel=channel))

    def called(self, *calls: ToolCall) -> None:
        """The assistant called."""
        last = self._last()
        if last is not None and last.channel != "final":
            last.tool_calls += calls
        else:
            self._messages.append(Message("assistant", "", tool_calls=calls))

    def messages(self) -> list[Message]:
        """All of them. A text after which the assistant reasoned or called in the same turn is a preamble."""
        found: list[Message] = []
        goes_on = False
        for message in reversed(self._messages):
            if message.role == "assistant":
                usual = "commentary" if message.tool_calls else "final"
                channel = message.channel
                if channel is None and goes_on and message.content and not message.tool_calls:
                    channel = "commentary"
                found.append(replace(message, channel=None if channel == usual else channel))
                goes_on = goes_on or bool(message.tool_calls or message.thinking)
            else:
                found.append(message)
                goes_on = goes_on and message.role == "tool"
        return found[::-1]

    def _last(self) -> Message | None:
        """The message before, if it is the assistant's."""
        return self._messages[-1] if self._messages and self._messages[-1].role == "assistant" else None


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """(what is asked, the answer that ends a row): as much of the last turn as a model says at once.

    The answer is empty where the row ends otherwise, as with a tool's result.
    """
    start = len(messages)
    if messages and messages[-1].role == "assistant":
        start -= 1
        while start and _goes_on(messages[start - 1]):
            start -= 1
    return list(messages[:start]), list(messages[start:])


def _goes_on(message: Message) -> bool:
    """Whether the model goes on after this message by itself: it ended in reasoning or in a preamble."""
    ended = message.tool_calls or (message.content.strip() and message.channel != "commentary")
    return message.role == "assistant" and not ended


def readable(content: str, calls: Iterable[ToolCall]) -> str:
    """What was said, for people: the text, then each call as `name(arguments)` on a line of its own."""
    lines = [f"{call.name}({call.arguments})" for call in calls]
    return "\n".join([content, *lines] if content.strip() else lines) if lines else content


def reply_messages(template: Template, ids: Sequence[int]) -> list[Message]:
    """The messages of a reply, from the ids that were generated."""
    history, splitter = History(), template.stream()
    pieces = [*(piece for id in ids for piece in splitter.read(id)), *splitter.rest()]
    for _, part in groupby(pieces, lambda piece: piece.part):
        first, *more = part
        text = first.text + "".join(piece.text for piece in more)
        if first.call is not None:
            history.called(ToolCall(first.call, text, first.builtin))
        elif first.channel == "analysis" and text:
            history.reasoned(text)
        elif text:
            history.said(text, "commentary" if first.channel == "commentary" else "final")
    return history.messages() or [Message("assistant")]
