"""What harmony says before the messages: the system block, and functions as TypeScript types.

Text is the same as openai-harmony 0.0.8 writes (tests/parity/test_harmony.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ossia.errors import OssiaError

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
_CHANNELS = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_CALLS = "Calls to these tools must go to the commentary channel: 'functions'."

BUILTIN_SECTIONS: dict[str, str] = {
    "browser": """\
## browser

// Tool for browsing.
// The `cursor` appears in brackets before each browsing display: `[{cursor}]`.
// Cite information from the tool using the following format:
// `【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.
// Do not quote more than 10 words directly from the tool output.
// sources=web (default: web)
namespace browser {

// Searches for information related to `query` and displays `topn` results.
type search = (_: {
query: string,
topn?: number, // default: 10
source?: string,
}) => any;

// Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.
// Valid link ids are displayed with the formatting: `【{id}†.*】`.
// If `cursor` is not provided, the most recent page is implied.
// If `id` is a string, it is treated as a fully qualified URL associated with `source`.
// If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the most \
relevant passage, if available.
// Use this function without `id` to scroll to a new location of an opened page.
type open = (_: {
id?: number | string, // default: -1
cursor?: number, // default: -1
loc?: number, // default: -1
num_lines?: number, // default: -1
view_source?: boolean, // default: false
source?: string,
}) => any;

// Finds exact matches of `pattern` in the current page, or the page given by `cursor`.
type find = (_: {
pattern: string,
cursor?: number, // default: -1
}) => any;

} // namespace browser""",
    "python": """\
## python

Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool \
should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when \
creating plots, tables, or files).

When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook \
environment. python will respond with the output of the execution or time out after 120.0 seconds. The drive at \
'/mnt/data' can be used to save and persist user files. Internet access for this session is UNKNOWN. Depends on the \
cluster.""",
}
"""The section that declares each built-in tool in the system block, in the order in which they stand there."""


def system_text(about: str, effort: str, builtins: Sequence[dict[str, Any]], *, functions: bool) -> str:
    """The text of the system block.

    Args:
        about: identity, knowledge cutoff and date, a line each.
        effort: low, medium or high.
        builtins: built-in tools to declare; they stand in the library's order, each once.
        functions: whether the developer block declares functions.
    """
    names = {tool["type"] for tool in builtins}
    tools = [section for name, section in BUILTIN_SECTIONS.items() if name in names]
    sections = [about, f"Reasoning: {effort}", *(["# Tools", *tools] if tools else [])]
    return "\n\n".join([*sections, _CHANNELS + (f"\n{_CALLS}" if functions else "")])


def tools_section(tools: Sequence[dict[str, Any]]) -> str:
    """`# Tools` with every function as a TypeScript type. Takes OpenAI's form or the bare function objects.

    Raises OssiaError for a tool without a name.
    """
    lines = ["# Tools\n", "## functions\n", "namespace functions {\n"]
    for tool in tools:
        spec = tool.get("function", tool)
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise OssiaError(f"a tool has no name: {json.dumps(tool, ensure_ascii=False, default=str):.120}")
        parameters = spec.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise OssiaError(f"tool {spec['name']}: parameters is {type(parameters).__name__}; an object is needed")
        lines += [f"// {line}" for line in _lines(_text(spec, "description") or "")]
        argument = "" if parameters is None else f"_: {_typescript(parameters, '')}"
        lines.append(f"type {spec['name']} = ({argument}) => any;\n")
    lines.append("} // namespace functions")
    return "\n".join(lines)


def _typescript(schema: Any, indent: str) -> str:
    """A JSON schema as a type; a keyword that openai-harmony does not know (anyOf, $ref, …) gives `any`."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(variant, indent, quoted=True)}" for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{_typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        values = schema.get("enum")
        names = [f'"{value}"' for value in values if isinstance(value, str)] if isinstance(values, list) else []
        return " | ".join(names) or "string"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _object(schema: dict[str, Any], indent: str) -> str:
    note = _text(schema, "description")
    out = ["{\n"] if note is None else [f"{indent}// {note}\n", "{\n"]
    properties = schema.get("properties")
    required = schema.get("required")
    needed = set(filter(_is_text, required)) if isinstance(required, list) else set()
    for key, value in properties.items() if isinstance(properties, dict) else ():
        out.append(_property(f"{key}{'' if key in needed else '?'}", value if isinstance(value, dict) else {}, indent))
    return "".join([*out, indent, "}"])


def _property(key: str, schema: dict[str, Any], indent: str) -> str:
    """A property with its comments above and its default behind it, or above it where it has variants."""
    variants = schema.get("oneOf")
    note = _text(schema, "description")
    out = []
    if (title := _text(schema, "title")) is not None:
        out.append(f"{indent}// {title}\n{indent}//\n")
    if note is not None and not isinstance(variants, list):
        out.append(f"{indent}// {note}\n")
    if isinstance(examples := schema.get("examples"), list) and examples:
        out.append(f"{indent}// Examples:\n")
        out += [f'{indent}// - "{example}"\n' for example in examples if _is_text(example)]
    if not isinstance(variants, list):
        default = f" // {_default(schema)}" if "default" in schema else ""
        out.append(f"{indent}{key}: {_nullable(schema, f'{indent}    ')},{default}\n")
        return "".join(out)
    note_above = note is not None and not (variants and note == _text(variants[0], "description"))
    if note_above:
        out.append(f"{indent}// {note}\n")
    if "default" in schema:
        out.append(f"{indent}// {_default(schema)}\n")
    out.append(f"{indent}{key}:\n")
    for index, variant in enumerate(variants):
        silent = (note_above and index == 0) or _text(variant, "description") == note
        out.append(f"{indent} | {_variant(variant, indent, silent=silent)}\n")
    return "".join([*out, indent, ",\n"])


def _variant(schema: Any, indent: str, *, silent: bool = False, quoted: bool = False) -> str:
    """One type of a `oneOf`, with description (unless `silent`) and default behind it."""
    note = None if silent else _text(schema, "description")
    notes = [] if note is None else [note]
    if isinstance(schema, dict) and "default" in schema:
        notes.append(_default(schema, quoted=quoted))
    type_ = _nullable(schema, f"{indent}   ")
    return f"{type_} // {' '.join(notes)}" if notes else type_


def _nullable(schema: Any, indent: str) -> str:
    type_ = _typescript(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True and "null" not in type_
    return f"{type_} | null" if nullable else type_


def _default(schema: dict[str, Any], *, quoted: bool = False) -> str:
    """The comment with a default; that of an enum stands bare unless `quoted`."""
    value = schema["default"]
    if isinstance(value, str) and not schema.get("enum"):
        return f'default: "{value}"'
    if isinstance(value, str) and not quoted:
        return f"default: {value}"
    return f"default: {_compact(value)}"


def _compact(value: Any) -> str:
    """JSON without spaces, numbers as Rust's serde_json prints them."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_compact(str(key))}:{_compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_compact, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text:
        digits, exponent = text.split("e")
        if exponent == "-05":
            sign = "-" * digits.startswith("-")
            return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
        return f"{digits}e{int(exponent)}"
    return text


def _text(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, str) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _lines(text: str) -> list[str]:
    lines = re.split(r"\r?\n", text)
    return lines[:-1] if lines[-1] == "" else lines
