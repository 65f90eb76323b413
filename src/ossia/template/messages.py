"""The one form that every data format becomes and every template renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
BUILTIN_CALLS: dict[str, tuple[str, ...]] = {
    "browser": ("browser.search", "browser.open", "browser.find"),
    "python": ("python",),
}
"""gpt-oss's built-in tools and the names that calls to them have. Declared as `{"type": "python"}` among the tools."""


@dataclass(slots=True)
class ToolCall:
    """One call.

    `arguments` is the text as the model writes it: a JSON object, or source code for the built-in `python`. `builtin`
    tells a call of a built-in tool (`python`, `browser.search` …) from one of a declared function.
    """

    name: str
    arguments: str
    builtin: bool = False


@dataclass(slots=True)
class Message:
    """One turn of a conversation.

    `thinking` is the reasoning before `content` (harmony's analysis channel), `tool_calls` the calls after it.
    `name` of a tool message is the function that answers, `builtin` whether that is a built-in tool. `loss` overrides
    the loss weight of the whole message. `channel` is that of `content` where it is not the usual one (`final`, or
    `commentary` before calls): a turn that goes reasoning, preamble, reasoning, call is two messages, of which the
    first has channel `commentary`.
    """

    role: Role
    content: str = ""
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    loss: float | None = None
    channel: Literal["commentary", "final"] | None = None
    builtin: bool = False


@dataclass(slots=True)
class Conversation:
    """A row: its messages, the tools declared to it, and where it came from (`file:line`) for messages to people.

    `tools` are functions in OpenAI's form, and `{"type": "python"}` or `{"type": "browser"}` for built-in tools.
    `text` is the whole of a plain-text row, which has no messages. `rejected` is the worse answer of a preference row,
    `label` the verdict on the last answer of a KTO row.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    reasoning_effort: str | None = None
    source: str = ""
    text: str | None = None
    rejected: list[Message] | None = None
    label: bool | None = None


@dataclass(slots=True)
class Rendered:
    """A conversation as tokens; the four lists have one length.

    `labels[i]` is what the model should say at position i (the usual shift by one happens in the loss). It is
    `input_ids[i]` except where history ends an answer with another token than generation does (see `harmony`).
    `loss_weights[i]` is the weight of that label in the loss, 0.0 where nothing is trained. `channels[i]` is
    `analysis`, `commentary` or `final` inside an assistant's message, `text` in plain text, else `""`.
    """

    input_ids: list[int]
    labels: list[int]
    loss_weights: list[float]
    channels: list[str]


@dataclass(slots=True)
class Reply:
    """What a model answered, taken apart. `finished` is False when generation stopped at the length limit."""

    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finished: bool = True


class Piece(NamedTuple):
    """What a generated token made certain: more of one part of the reply.

    `part` counts the parts of the reply, from 0. `call` is the function that the part calls; `text` is then more of its
    arguments, and the first piece of a call has no text. `ids` are the tokens that joined the part with this piece;
    their text may come later.
    """

    part: int
    channel: str
    text: str
    call: str | None = None
    ids: tuple[int, ...] = ()
    builtin: bool = False


def is_builtin(tool: dict[str, Any]) -> bool:
    """Whether a tool is declared as a built-in one: `{"type": "python"}`, not a function of that name."""
    kind = tool.get("type")
    return isinstance(kind, str) and kind in BUILTIN_CALLS and "function" not in tool and "name" not in tool


def calls_builtin(name: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a call of this name goes to a built-in tool.

    A function that `tools` declares by that name comes first. `browser.search` and the like are no function's name, so
    they need no declaration; `python` is the built-in tool only where it is declared.
    """
    functions = {tool.get("function", tool).get("name") for tool in tools if not is_builtin(tool)}
    if name in functions:
        return False
    declared = {tool["type"] for tool in tools if is_builtin(tool)}
    owner = next((tool for tool, names in BUILTIN_CALLS.items() if name in names), None)
    return owner is not None and ("." in name or owner in declared)
