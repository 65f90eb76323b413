"""ShareGPT: `conversations` of `from` (human, gpt, function_call, observation …) and `value`; `system`, `tools`."""

from __future__ import annotations

from typing import Any

from ossia.data.formats.fields import listed, parsed, shown
from ossia.data.formats.messages import read_call, read_messages, with_system
from ossia.data.readers import BadRow
from ossia.errors import nearest
from ossia.template.messages import Conversation, Message, Role

NEEDS = (("conversations", "conversation"),)
ALSO = ("system",)
_CALLS = ("function_call", "tool_call")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row; a text and the calls behind it, or several calls in a row, are one message."""
    key = "conversations" if row.get("conversations") is not None else "conversation"
    return Conversation(with_system(read_turns(row[key], f"{source}: {key}"), row, source), source=source)


def read_turns(value: Any, where: str) -> list[Message]:
    """The messages of a list of turns; turns with `role` are read as OpenAI messages."""
    turns = listed(value, where)
    if isinstance(turns[0], dict) and "from" not in turns[0] and "role" in turns[0]:
        return read_messages(turns, where)
    messages: list[Message] = []
    pending: list[str] = []
    for index, turn in enumerate(turns):
        message = _turn(turn, f"{where}[{index}]")
        if message.tool_calls and messages and messages[-1].role == "assistant":
            message.tool_calls = messages[-1].tool_calls + message.tool_calls
            message.content = messages.pop().content
        if message.tool_calls:
            pending = [call.name for call in message.tool_calls]
        elif message.role == "tool":
            if not pending:
                raise BadRow(f"{where}[{index}]: a result with no function_call before it")
            message.name = pending.pop(0)
        messages.append(message)
    return messages


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {shown(turn)}; an object with from and value is needed")
    sender, value = turn.get("from"), turn.get("value")
    known = (*_ROLES, *_CALLS)
    if not isinstance(sender, str) or sender not in known:
        hint = nearest(sender, known) if isinstance(sender, str) else ""
        raise BadRow(f"{where}.from is {sender!r:.60}; it takes human, gpt, system, function_call, observation{hint}")
    if sender in _CALLS:
        calls = parsed(value, f"{where}.value") if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        if not calls:
            raise BadRow(f"{where}.value: no call in it")
        return Message("assistant", tool_calls=tuple(read_call(call, f"{where}.value") for call in calls))
    if not isinstance(value, str):
        raise BadRow(f"{where}.value is {shown(value)}; a text is needed")
    if _ROLES[sender] == "assistant" and not value.strip():
        raise BadRow(f"{where}.value: the assistant says nothing")
    return Message(_ROLES[sender], value)
