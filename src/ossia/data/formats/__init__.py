"""Formats of rows, one module each, recognised by their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ossia.data.formats import alpaca, messages
from ossia.data.sources import BadRow, Row
from ossia.errors import nearest
from ossia.template.messages import Conversation


class Format(NamedTuple):
    """`keys` that tell the format, and its reader."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Conversation]


FORMATS = (
    Format("messages", ("messages",), messages.read),
    Format("alpaca", ("instruction",), alpaca.read),
)


def read_row(row: Row) -> tuple[str, Conversation]:
    """(format, conversation) of a row; BadRow names the key that is wrong or missing."""
    value, source = row
    if not isinstance(value, dict):
        raise BadRow(f'{source}: expected an object such as {{"messages": […]}}, got {type(value).__name__}')
    for form in FORMATS:
        if all(key in value for key in form.keys):
            return form.name, form.read(value, source)
    wanted = " or ".join("+".join(form.keys) for form in FORMATS)
    known = [key for form in FORMATS for key in form.keys]
    hint = next((nearest(key, known) for key in value if nearest(key, known)), "")
    raise BadRow(f"{source}: keys {', '.join(map(repr, value)) or 'none'}; a row needs {wanted}{hint}")
