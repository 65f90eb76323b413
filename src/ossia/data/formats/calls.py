"""Tools and calls of a row: what is declared, what is called, and whether the two agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from ossia.data.formats import names
from ossia.data.formats.fields import as_json, first, has, only, parsed, shown
from ossia.data.formats.notes import Notes, Place
from ossia.template.messages import BUILTIN_CALLS, Conversation, ToolCall, calls_builtin, is_builtin

_INSTEAD = {"code_interpreter": "python", "web_search": "browser", "web_search_preview": "browser"}
_CALL_TYPES = ("function", *names.CALL_PARTS)
_PREFIX = "functions."


def read_tools(row: dict[str, Any], place: Place) -> list[dict[str, Any]]:
    """The tools of a row: functions in OpenAI's form, and built-in tools as `{"type": "python"}`."""
    found = {key: _tools(row.get(key), place.key(key)) for key in (*names.TOOLS, *names.BUILTIN)}
    key = only(found, names.TOOLS, place)
    tools = [] if key is None else found[key]
    return [*tools, *(tool for name in names.BUILTIN for tool in found[name] if tool not in tools)]


def _tools(value: Any, place: Place) -> list[dict[str, Any]]:
    if isinstance(value, str):
        if value.strip() and not value.lstrip().startswith(("[", "{", '"')):
            value = [name.strip() for name in value.split(",")]
        else:
            value = parsed(value, place) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise place.bad(" is not a list of objects")
    return [_tool(tool, place.at(index)) for index, tool in enumerate(value)]


def _tool(tool: Any, place: Place) -> dict[str, Any]:
    if isinstance(tool, str) and tool in BUILTIN_CALLS:
        tool = {"type": tool}
    elif isinstance(tool, str) and tool.lstrip().startswith("{"):
        tool = parsed(tool, place)
    if not isinstance(tool, dict):
        given = repr(tool) if isinstance(tool, str) else shown(tool)
        raise place.bad(
            f" is {given:.60}; it takes an object with name and parameters, or {' or '.join(BUILTIN_CALLS)}"
        )
    if isinstance(tool.get("function"), str):
        tool = {**tool, "function": parsed(tool["function"], place.key("function"))}
    place.check_keys(tool, names.TOOL_KEYS)
    if is_builtin(tool):
        return {"type": tool["type"]}
    spec = tool.get("function", tool)
    kind = tool.get("type", "function")
    if not isinstance(spec, dict):
        raise place.key("function").bad(f" is {shown(spec)}; an object is needed")
    if not isinstance(spec.get("name"), str) or not spec["name"].strip():
        if kind != "function":
            instead = f'; write {{"type": "{_INSTEAD[kind]}"}}' if isinstance(kind, str) and kind in _INSTEAD else ""
            raise place.bad(f".type is {kind!r:.60}; it takes function, {' or '.join(BUILTIN_CALLS)}{instead}")
        raise place.bad(": a tool needs a name")
    if spec is not tool:
        place.key("function").check_keys(spec, names.TOOL_KEYS)
    function: dict[str, Any] = {"name": spec["name"].removeprefix(_PREFIX)}
    if (description := spec.get("description")) is not None:
        if not isinstance(description, str):
            raise place.bad(f".description is {shown(description)}; a text is needed")
        function["description"] = description
    if (key := only(spec, names.PARAMETERS, place)) is not None:
        parameters = parsed(spec[key], place.key(key)) if isinstance(spec[key], str) else spec[key]
        if not isinstance(parameters, dict):
            raise place.bad(f".{key} is {shown(parameters)}; a JSON schema is needed")
        if parameters and parameters.get("type") != "object":
            place.note("odd_parameters")
        function["parameters"] = parameters
    if isinstance(spec.get("strict"), bool):
        function["strict"] = spec["strict"]
    return {"type": "function", "function": function}


class Called(NamedTuple):
    """A call and the id that results refer to; empty where it has none."""

    call: ToolCall
    id: str


def read_calls(value: Any, place: Place) -> tuple[Called, ...]:
    """One or several calls: objects, or JSON text of them."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        value = _texts_of_calls(value, place)
    if isinstance(value, list):
        return tuple(_call(call, place.at(index)) for index, call in enumerate(value))
    return (_call(value, place),)


def _texts_of_calls(text: str, place: Place) -> Any:
    """JSON of a call or of a list of calls, or JSON lines of calls."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
            return [parsed(line, place) for line in lines]
        return parsed(text, place)


def _call(value: Any, place: Place) -> Called:
    """An object with `name` and `arguments`, or one that has such an object as `function`."""
    if isinstance(value, str):
        value = parsed(value, place)
    if not isinstance(value, dict):
        raise place.bad(": a call needs function.name")
    place.check_keys(value, names.CALL_KEYS)
    kind = str(value.get("type", "function"))
    function = value.get("function", value)
    if isinstance(function, str) and function.lstrip().startswith("{"):
        function = parsed(function, place.key("function"))
    elif isinstance(function, str):
        function = {**value, "name": function}
    if isinstance(function, dict) and "function" in value:
        place.key("function").check_keys(function, names.CALL_KEYS)
    name = function.get("name", kind if kind in BUILTIN_CALLS else None) if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise place.bad(": a call needs function.name")
    if kind not in _CALL_TYPES and kind not in BUILTIN_CALLS:
        raise place.bad(f".type is {kind!r:.60}; it takes function")
    key = only(function, names.ARGUMENTS, place)
    arguments = {} if key is None else function[key]
    if key == "code":
        arguments = {"code": arguments}
    if not isinstance(arguments, str):
        arguments = as_json(arguments, place.key(str(key)))
    id = first(value, (*names.CALL_ID, "id"))
    call = ToolCall(name.strip().removeprefix(_PREFIX), arguments, kind in BUILTIN_CALLS)
    return Called(call, "" if id is None else str(value[id]))


def settle(conversation: Conversation, notes: Notes) -> None:
    """Mark calls of built-in tools, bring arguments into one form, and note what is wrong with calls."""
    turns = [*conversation.messages, *(conversation.rejected or ())]
    declared = {tool["function"]["name"] for tool in conversation.tools if not is_builtin(tool)}
    if any(message.role == "assistant" and _is_call(message.content, declared) for message in turns):
        notes.seen.add("call_tags")
    calling = [message for message in turns if message.tool_calls or message.role == "tool"]
    if not calling:
        return
    tools = conversation.tools
    declared |= {call for tool in tools if is_builtin(tool) for call in BUILTIN_CALLS[tool["type"]]}
    for message in calling:
        message.tool_calls = tuple(_settled(call, tools, notes) for call in message.tool_calls)
        if message.role == "tool" and message.name is not None:
            message.name = message.name.removeprefix(_PREFIX)
            message.builtin = calls_builtin(message.name, tools)
        if message.tool_calls and not declared:
            notes.seen.add("no_tools")
        elif not declared.issuperset(call.name for call in message.tool_calls):
            notes.seen.add("undeclared")


def _settled(call: ToolCall, tools: list[dict[str, Any]], notes: Notes) -> ToolCall:
    name, text = call.name, call.arguments
    builtin = call.builtin or calls_builtin(name, tools)
    value = _loaded(text)
    if builtin and name in BUILTIN_CALLS["python"]:
        # Source code, which some rows wrap into an object.
        if isinstance(value, dict) and isinstance(value.get("code"), str):
            text = value["code"]
            notes.unused |= {f"messages[].tool_calls[].arguments.{key}": None for key in value if key != "code"}
        elif isinstance(value, dict):
            notes.seen.add("bad_arguments")
        return ToolCall(name, text, True)
    if not text.strip():
        notes.seen.add("empty_arguments")
        return ToolCall(name, "{}", builtin)
    while isinstance(value, str) and isinstance(inner := _loaded(value), dict | str):
        text, value = value, inner
        if isinstance(value, dict):
            notes.seen.add("double_arguments")
    if not isinstance(value, dict):
        notes.seen.add("bad_arguments")
        text = call.arguments
    return ToolCall(name, text, builtin)


def _is_call(text: str, declared: set[str]) -> bool:
    """Whether a text is JSON of calls of declared functions."""
    if not declared or not text.lstrip().startswith(("{", "[")):
        return False
    value = _loaded(text)
    calls = value if isinstance(value, list) else [value]
    return bool(calls) and all(
        isinstance(c, dict) and c.get("name") in declared and has(c, *names.ARGUMENTS) for c in calls
    )


def _loaded(text: str) -> Any:
    """JSON of a text, or None where it is none; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def check_arguments(conversation: Conversation) -> set[str]:
    """Notes on the calls' arguments held against the schemas of the declared functions."""
    schemas = {
        tool["function"]["name"]: tool["function"].get("parameters")
        for tool in conversation.tools
        if not is_builtin(tool)
    }
    found: set[str] = set()
    for message in conversation.messages:
        for call in message.tool_calls:
            schema, value = schemas.get(call.name), _loaded(call.arguments)
            if schema and isinstance(value, dict):
                accepts = _validator(json.dumps(schema, sort_keys=True))
                if accepts is None:
                    found.add("bad_schema")
                elif not accepts(value):
                    found.add("schema")
    return found


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Callable[[Any], bool] | None:
    """Whether a value is what the schema asks for; None for a text that is no JSON schema, or refers to another."""
    import jsonschema_rs

    def refuse(uri: str) -> Any:
        raise ValueError(f"{uri}: nothing is fetched")

    try:
        return jsonschema_rs.validator_for(json.loads(schema), retriever=refuse).is_valid
    except ValueError:
        return None
