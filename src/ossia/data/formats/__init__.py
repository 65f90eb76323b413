"""Formats of rows, one module each, recognised by their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ossia.data.formats import alpaca, kto, messages, multilingual_thinking, preference, query, sharegpt, text
from ossia.data.readers import BadRow
from ossia.errors import nearest
from ossia.template.messages import EFFORTS, Conversation

_COMMON = ("reasoning_effort", "tools")


class Format(NamedTuple):
    """A format: `needs` one key of each group (and `accepts` the row, where that is given), may use `also`."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    also: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Conversation]
    accepts: Callable[[dict[str, Any]], bool] = lambda row: True

    @property
    def keys(self) -> set[str]:
        """Every key that means something."""
        return {key for group in self.needs for key in group} | set(self.also) | set(_COMMON)


FORMATS = (
    Format("kto", kto.NEEDS, kto.ALSO, kto.read, kto.accepts),
    Format("preference", preference.NEEDS, preference.ALSO, preference.read),
    Format(
        "multilingual-thinking", multilingual_thinking.NEEDS, multilingual_thinking.ALSO, multilingual_thinking.read
    ),
    Format("messages", messages.NEEDS, messages.ALSO, messages.read),
    Format("sharegpt", sharegpt.NEEDS, sharegpt.ALSO, sharegpt.read),
    Format("alpaca", alpaca.NEEDS, alpaca.ALSO, alpaca.read),
    Format("question/answer", query.QUESTION_NEEDS, query.ALSO, query.read),
    Format("query/response", query.NEEDS, query.ALSO, query.read),
    Format("text", text.NEEDS, text.ALSO, text.read),
)
_KEYS = {form.name: form.keys for form in FORMATS}
_WANTED = (
    "messages, conversations, instruction + output, query + response, question + answer, chosen + rejected or text"
)


class Read(NamedTuple):
    """A row that could be read, its format, and the columns that mean nothing to it."""

    format: str
    conversation: Conversation
    unused: list[str]


def read_row(value: Any, source: str, columns: dict[str, str] | None = None) -> Read:
    """A row as a conversation; `columns` gives columns of the file the names that formats know.

    Raises BadRow, naming the key that is wrong or missing.
    """
    if not isinstance(value, dict):
        raise BadRow(f'{source}: expected an object such as {{"messages": […]}}, got {type(value).__name__}')
    if columns:
        value = _renamed(value, source, columns)
    present = {key for key, held in value.items() if held is not None}
    for form in FORMATS:
        if not any(present.isdisjoint(group) for group in form.needs) and form.accepts(value):
            conversation = form.read(value, source)
            _common(conversation, value, source)
            known = _KEYS[form.name]
            return Read(form.name, conversation, [key for key in value if key not in known])
    known = {key for keys in _KEYS.values() for key in keys}
    hint = next((nearest(key, known) for key in value if key not in known and nearest(key, known)), "")
    keys = ", ".join(map(repr, value))
    raise BadRow(
        f"{source}: keys {keys:.300}{hint or '; a row needs ' + _WANTED}; "
        """name other columns with --columns '{"your key": "one of these"}'"""
        if value
        else f"{source}: an empty row; a row needs {_WANTED}"
    )


def _renamed(row: dict[str, Any], source: str, columns: dict[str, str]) -> dict[str, Any]:
    for old, new in columns.items():
        if old in row and new in row and new not in columns:
            raise BadRow(f"{source}: --columns reads {old!r} as {new!r}, but the row has a column {new!r} too")
    return {columns.get(key, key): value for key, value in row.items()}


def _common(conversation: Conversation, row: dict[str, Any], source: str) -> None:
    effort = row.get("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        raise BadRow(f"{source}: reasoning_effort is {effort!r:.60}; it takes {', '.join(EFFORTS)}")
    conversation.reasoning_effort = effort
    conversation.tools = messages.read_tools(row.get("tools"), source)
