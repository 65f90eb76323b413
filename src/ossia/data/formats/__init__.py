"""Formats of rows, one module each, recognised by their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ossia.data.formats import (
    alpaca,
    calls,
    kto,
    messages,
    multilingual_thinking,
    names,
    preference,
    query,
    sharegpt,
    text,
)
from ossia.data.formats.fields import without_nulls
from ossia.data.formats.notes import NOTES, Notes, Place
from ossia.data.readers import BadRow
from ossia.errors import UsageError, nearest
from ossia.template.messages import EFFORTS, Conversation

__all__ = ["FORMATS", "NOTES", "UNUSED", "Read", "check_columns", "likely", "read_row"]

UNUSED = "unused"
"""Name that `--columns` gives a column that shall not be read."""


class Format(NamedTuple):
    """A format: `needs` one key of each group (and `accepts` the row, where that is given), may use `also`."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    also: tuple[str, ...]
    read: Callable[[dict[str, Any], Place], Conversation]
    accepts: Callable[[dict[str, Any]], bool] = lambda row: True

    @property
    def keys(self) -> frozenset[str]:
        """Every key that means something."""
        return frozenset({key for group in self.needs for key in group}.union(self.also, names.COMMON))


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
_ROW_KEYS = frozenset().union(*_KEYS.values())
_NEEDED = frozenset(key for form in FORMATS for group in form.needs for key in group)
_INNER_KEYS = (
    frozenset().union(*names.MESSAGE_KEYS.values()) | names.CALL_KEYS | names.TOOL_KEYS | set(names.PART_REASONING)
)
_WANTED = (
    "messages, conversations, instruction + output, query + response, question + answer, chosen + rejected or text"
)


class Read(NamedTuple):
    """A row that could be read, its format, the keys that nobody reads (with their paths), and keys of `NOTES`."""

    format: str
    conversation: Conversation
    unused: list[str]
    notes: set[str]


def read_row(value: Any, source: str, columns: dict[str, str] | None = None) -> Read:
    """A row as a conversation; `columns` gives columns of the file the names that formats know.

    Raises BadRow, naming the key that is wrong or missing.
    """
    if not isinstance(value, dict):
        raise BadRow(f'{source}: expected an object such as {{"messages": […]}}, got {type(value).__name__}')
    if columns:
        value = _renamed(value, source, columns)
    notes = Notes(source)
    place = Place(notes)
    row = {key: without_nulls(held, notes) if isinstance(held, dict | list) else held for key, held in value.items()}
    present = {key for key, held in row.items() if held is not None}
    for form in FORMATS:
        if not any(present.isdisjoint(group) for group in form.needs) and form.accepts(row):
            conversation = form.read(row, place)
            conversation.source = source
            _common(conversation, row, place)
            known = _KEYS[form.name]
            place.check_keys(row, known | names.HARMLESS)
            return Read(form.name, conversation, list(notes.unused), notes.seen)
    hint = next((found for key in row if key not in _NEEDED and (found := nearest(key, _NEEDED, 0.8))), "")
    if nulls := [key for key in row if key in _NEEDED and key not in present]:
        raise BadRow(f"{source}: {nulls[0]} is null; a row needs {_WANTED}")
    keys = ", ".join(map(repr, row))
    inside = next(
        (key for key, held in row.items() if isinstance(held, list) and held and isinstance(held[0], dict)), ""
    )
    if inside and not hint:
        raise BadRow(
            f"{source}: a list of objects under {inside!r}; if they are the rows, make that list the whole file"
        )
    raise BadRow(
        f"{source}: keys {keys:.300}{hint or '; a row needs ' + _WANTED}; "
        """name other columns with --columns '{"your key": "one of these"}'"""
        if row
        else f"{source}: an empty row; a row needs {_WANTED}"
    )


def check_columns(columns: dict[str, str]) -> None:
    """UsageError where `--columns` gives a column a name that no format knows."""
    given = [new for new in columns.values() if new != UNUSED]
    if twice := [new for new in given if given.count(new) > 1]:
        raise UsageError(f"--columns reads two columns as {twice[0]!r}; leave one out")
    for old, new in columns.items():
        if new not in _ROW_KEYS and new != UNUSED:
            raise UsageError(
                f"--columns reads {old!r} as {new!r}, which no format knows{nearest(new, _ROW_KEYS)}; "
                f"a column that shall not be read is named {UNUSED!r}"
            )


def likely(path: str) -> str:
    """The nearest key that is read, for one that is not: `did you mean 'thinking'?`, or nothing."""
    level, _, key = path.rpartition(".")
    known = _INNER_KEYS if level else _ROW_KEYS
    if key in known:
        return "read elsewhere" if level else "read in rows of another format"
    return nearest(key, sorted(known - names.HARMLESS), 0.8).removeprefix("; ")


def _renamed(row: dict[str, Any], source: str, columns: dict[str, str]) -> dict[str, Any]:
    for old, new in columns.items():
        if old in row and new in row and new not in columns and new != UNUSED:
            raise BadRow(f"{source}: --columns reads {old!r} as {new!r}, but the row has a column {new!r} too")
    return {columns.get(key, key): value for key, value in row.items() if columns.get(key) != UNUSED}


def _common(conversation: Conversation, row: dict[str, Any], place: Place) -> None:
    """Read what any format may have: effort, tools, and columns with more than text."""
    effort = row.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            raise place.bad(f"reasoning_effort is {effort!r:.60}; it takes {', '.join(EFFORTS)}")
        conversation.reasoning_effort = effort
    if tools := calls.read_tools(row, place):
        if conversation.tools and conversation.tools != tools:
            raise place.bad("tools stand in the harmony text and beside it, and differ; keep one")
        conversation.tools = tools
    calls.settle(conversation, place.notes)
    for key in names.MEDIA:
        if row.get(key) not in (None, "", [], {}):
            kind = key.rstrip("s")
            if any(f"<{kind}>" in message.content for message in conversation.messages):
                raise place.bad(f"{key}, and <{kind}> in a text; gpt-oss reads text only, so leave such rows out")
            place.note("media")
