"""OpenAI messages: `role` and `content`, `thinking` or `reasoning_content`, `tool_calls`; `system` beside them."""

from __future__ import annotations

import json
from typing import Any

from ossia.data.formats.fields import listed, parsed, shown, text
from ossia.data.readers import BadRow
from ossia.errors import nearest
from ossia.template.messages import ROLES, Conversation, Message, ToolCall

NEEDS = (("messages",),)
ALSO = ("system",)
_THINKING = ("thinking", "reasoning_content")


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row."""
    return Conversation(with_system(read_messages(row["messages"], f"{source}: messages"), row, source), source=source)


def with_system(messages: list[Message], row: dict[str, Any], source: str) -> list[Message]:
    """With the row's `system` before them; BadRow where they begin with another."""
    if not (system := text(row, "system", source)).strip():
        return messages
    if messages[0].role in ("system", "developer"):
        if messages[0].content.strip() != system.strip():
            raise BadRow(f"{source}: system and the first message are two different instructions; keep one")
        return messages
    return [Message("system", system), *messages]


def read_messages(value: Any, where: str) -> list[Message]:
    """The messages of a list of objects with role and content."""
    entries = listed(value, where)
    messages = [_message(entry, f"{where}[{index}]") for index, entry in enumerate(entries)]
    _name_tool_results(messages, entries)
    return messages


def read_tools(value: Any, source: str) -> list[dict[str, Any]]:
    """The tools of a row: a list of objects, or JSON text of one."""
    if isinstance(value, str):
        value = parsed(value, f"{source}: tools") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{source}: tools is not a list of objects")
    return value


def read_call(value: Any, where: str) -> ToolCall:
    """A call: an object with `name` and `arguments`, or one that has such an object as `function`."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow(f"{where}: a call needs function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise BadRow(f"{where}.arguments holds NaN or Infinity, which JSON has not") from None
    return ToolCall(function["name"], arguments)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRow(f"{where} is {shown(entry)}; an object with role and content is needed")
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise BadRow(f"{where}.role is {role!r:.60}; it takes {', '.join(ROLES)}{hint}")
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRow(f"{where}.tool_calls is {shown(calls)}; a list is needed")
    if calls and role != "assistant":
        raise BadRow(f"{where}: tool_calls in a message of the {role}; only the assistant calls tools")
    tool_calls = tuple(read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    if "content" not in entry and not tool_calls:
        raise BadRow(f"{where}: no content (keys: {', '.join(map(repr, entry)):.200})")
    key = next((key for key in _THINKING if entry.get(key)), None)
    thinking = None if key is None else entry[key]
    if thinking is not None and not isinstance(thinking, str):
        raise BadRow(f"{where}.{key} is {shown(thinking)}; a text is needed")
    if thinking and thinking.strip() and role != "assistant":
        raise BadRow(f"{where}: {key} in a message of the {role}; only the assistant reasons")
    name = entry.get("name")
    if name is not None and not isinstance(name, str):
        raise BadRow(f"{where}.name is {shown(name)}; a text is needed")
    content = _content(entry.get("content"), where)
    if role == "assistant" and not (content.strip() or thinking or tool_calls):
        raise BadRow(f"{where}: the assistant says nothing; content, thinking or tool_calls is needed")
    return Message(role, content, thinking, tool_calls, name or None, _loss(entry, where))


def _content(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise BadRow(f"{where}.content[{index}] is {kind!r:.60}; gpt-oss takes text parts only")
            parts.append(part["text"])
        return "".join(parts)
    raise BadRow(f"{where}.content is {shown(value)}; a text is needed")


def _loss(entry: dict[str, Any], where: str) -> float | None:
    key = next((key for key in ("loss", "loss_scale") if entry.get(key) is not None), None)
    if key is None:
        return None
    value = entry[key]
    if not isinstance(value, bool | int | float) or not 0 <= value < 1e6:
        raise BadRow(f"{where}.{key} is {value!r:.60}; true, false or a weight of at least 0 is needed")
    return float(value)


def _name_tool_results(messages: list[Message], entries: list[dict[str, Any]]) -> None:
    """Give each tool result the name of the function it answers, by its call's id or the call before it."""
    names: dict[str, str] = {}
    pending: list[str] = []
    for message, entry in zip(messages, entries, strict=True):
        if message.tool_calls:
            for call, raw in zip(message.tool_calls, entry["tool_calls"], strict=True):
                names[str(raw.get("id"))] = call.name
            pending = [call.name for call in message.tool_calls]
        elif message.role == "tool" and message.name is None:
            first = pending.pop(0) if pending else None
            message.name = names.get(str(entry.get("tool_call_id")), first)
