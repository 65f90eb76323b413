"""OpenAI messages: `role` and `content`, `thinking` or `reasoning_content`, `tool_calls`, and `tools` of the row."""

from __future__ import annotations

import json
from typing import Any

from ossia.data.sources import BadRow
from ossia.errors import nearest
from ossia.template.messages import ROLES, Conversation, Message, ToolCall

EFFORTS = ("low", "medium", "high")


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row."""
    entries = row["messages"]
    if not isinstance(entries, list) or not entries:
        raise BadRow(f"{source}: messages is {'empty' if entries == [] else type(entries).__name__}; a list is needed")
    effort = row.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise BadRow(f"{source}: reasoning_effort is {effort!r}; it takes {', '.join(EFFORTS)}")
    messages = [_message(entry, f"{source}: messages[{index}]") for index, entry in enumerate(entries)]
    _name_tool_results(messages, entries)
    return Conversation(messages, _tools(row.get("tools"), source), effort, source)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise BadRow(f"{where} is {type(entry).__name__}; an object with role and content is needed")
    role = entry.get("role")
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise BadRow(f"{where}.role is {role!r}; it takes {', '.join(ROLES)}{hint}")
    calls = entry.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRow(f"{where}.tool_calls is {type(calls).__name__}; a list is needed")
    tool_calls = tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))
    if "content" not in entry and not tool_calls:
        raise BadRow(f"{where}: no content (keys: {', '.join(map(repr, entry))})")
    thinking = entry.get("thinking") or entry.get("reasoning_content")
    if thinking is not None and not isinstance(thinking, str):
        raise BadRow(f"{where}.thinking is {type(thinking).__name__}; a text is needed")
    content = _content(entry.get("content"), where)
    if role == "assistant" and not (content.strip() or thinking or tool_calls):
        raise BadRow(f"{where}: the assistant says nothing; content, thinking or tool_calls is needed")
    return Message(role, content, thinking, tool_calls, entry.get("name"), _loss(entry, where))


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
                raise BadRow(f"{where}.content[{index}] is {kind!r}; gpt-oss takes text parts only")
            parts.append(part["text"])
        return "".join(parts)
    raise BadRow(f"{where}.content is {type(value).__name__}; a text is needed")


def _call(value: Any, where: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where}: a call needs function.name")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments)


def _tools(value: Any, source: str) -> list[dict[str, Any]]:
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRow(f"{source}: tools is a text that is not JSON ({error.msg})") from error
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{source}: tools is not a list of objects")
    return value


def _loss(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("loss", entry.get("loss_scale"))
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not 0 <= value < float("inf"):
        raise BadRow(f"{where}.loss is {value!r}; true, false or a weight of at least 0 is needed")
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
