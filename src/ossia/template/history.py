"""Messages put together from what an assistant said, part by part, in its order."""

from __future__ import annotations

from collections.abc import Sequence
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
