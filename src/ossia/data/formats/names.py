"""Names that rows have for one thing: the table that readers go by and that docs/data.md prints."""

from __future__ import annotations

from typing import NamedTuple

from ossia.template.messages import BUILTIN_CALLS, Role


class Known(NamedTuple):
    """Accepted names of one thing, and where they are read."""

    what: str
    where: str
    names: tuple[str, ...]


ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_call_output": "tool",
    "ipython": "tool",
}
CALLERS = ("tool_call", "function_call", "tool_use")
"""Roles whose content is a call, which joins the assistant's message before it."""

ROLE = ("role", "from")
CONTENT = ("content", "value")
RESULT = (*CONTENT, "output")
REASONING = ("thinking", "reasoning_content", "reasoning", "thought", "reasoning_details")
LOSS = ("loss", "loss_scale", "loss_weight", "weight", "train", "training")
CALLS = ("tool_calls", "function_call")
CALL_ID = ("tool_call_id", "call_id", "tool_use_id")
RESULT_NAME = ("name", "tool_name")
CHANNEL = ("channel", "recipient", "content_type")

ARGUMENTS = ("arguments", "parameters", "args", "input", "code")
PARAMETERS = ("parameters", "input_schema")

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning", "reasoning_text", "summary_text", "reasoning.text", "reasoning.summary")
CALL_PARTS = ("tool_call", "function_call", "tool_use")
RESULT_PARTS = ("tool_result", "tool_response", "function_call_output")
PART_TEXT = ("text", "value", "content")
PART_REASONING = ("thinking", "reasoning", "summary", *PART_TEXT)

SYSTEM = ("system", "system_prompt", "instructions")
TOOLS = ("tools", "functions")
BUILTIN = ("builtin_tools",)
EFFORT = ("reasoning_effort",)
REASONING_COLUMNS = (
    "thinking",
    "reasoning_content",
    "reasoning",
    "think",
    "thought",
    "thoughts",
    "cot",
    "chain_of_thought",
    "analysis",
)
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

COMMON = (*TOOLS, *BUILTIN, *EFFORT)
"""Keys that count in a row of any format."""

HARMLESS = frozenset({"id", "idx", "index", "uid", "uuid", "annotations", "object", "created", "__index_level_0__"})
"""Keys that change nothing, at any level; not counted. Nor are empty values, and those of `HARMLESS_VALUES`."""
HARMLESS_VALUES: dict[str, tuple[object, ...]] = {"status": ("completed",), "is_error": (False,)}

_SAID = frozenset({*ROLE, *CONTENT, *LOSS, *HARMLESS, "type", "name"})
MESSAGE_KEYS: dict[str, frozenset[str]] = {
    "assistant": _SAID | {*REASONING, *CALLS, *CHANNEL, "refusal"},
    "reasoning": _SAID | {*REASONING, "summary"},
    "tool": _SAID | {*RESULT, *RESULT_NAME, *CALL_ID, *CHANNEL},
    "call": _SAID | {*CALL_ID, *CHANNEL},
    "other": _SAID | {*REASONING, *CALLS},
}
"""Keys of a message, by who speaks: `reasoning` is an item of OpenAI's responses, `other` a user or an instruction."""
CALL_KEYS = frozenset({*CALL_ID, *ARGUMENTS, *HARMLESS, "type", "function", "name"})
TOOL_KEYS = frozenset({*PARAMETERS, *HARMLESS, "type", "function", "name", "description", "strict"})

TABLE = (
    Known("who speaks", "message", ROLE),
    Known("what is said", "message", CONTENT),
    Known("reasoning", "message", REASONING),
    Known("reasoning", "part of a content, by its `type`", REASONING_PARTS),
    Known("reasoning", "row with a question and an answer", REASONING_COLUMNS),
    Known("text", "part of a content, by its `type`, or with none", TEXT_PARTS),
    Known("text of a part", "part of a content", PART_TEXT),
    Known("loss weight (true, false or a number)", "message", LOSS),
    Known("calls", "message", CALLS),
    Known("a call", "part of a content, by its `type`", CALL_PARTS),
    Known("a call's arguments", "call", ARGUMENTS),
    Known("a tool's result", "part of a content, by its `type`", RESULT_PARTS),
    Known("the call that a result answers", "message, part", CALL_ID),
    Known("the function that a result is of", "message", RESULT_NAME),
    Known("harmony's channel, recipient and content type", "message", CHANNEL),
    Known("instructions", "row", SYSTEM),
    Known("functions that may be called", "row", TOOLS),
    Known("gpt-oss's built-in tools: " + ", ".join(f"`{name}`" for name in BUILTIN_CALLS), "row", BUILTIN),
    Known("a function's JSON schema", "tool", PARAMETERS),
    Known("reasoning effort", "row", EFFORT),
    Known("nothing; not counted either", "anywhere", tuple(sorted(HARMLESS))),
)


def table() -> str:
    """The table of docs/data.md, as Markdown."""
    lines = ["| what | where | names |", "|---|---|---|"]
    lines += [f"| {known.what} | {known.where} | {_code(known.names)} |" for known in TABLE]
    roles: dict[str, list[str]] = {}
    for name, role in ROLES.items():
        roles.setdefault(role, []).append(name)
    lines += [f"| role: {role} | message | {_code(tuple(names))} |" for role, names in roles.items()]
    lines.append(f"| role: a call of the assistant before it | message | {_code(CALLERS)} |")
    return "\n".join(lines)


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
