"""Values out of rows, with errors that name the key."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ossia.data.readers import BadRow


def has(row: dict[str, Any], *keys: str) -> bool:
    """Whether the row has one of these keys; null is absent, as Parquet writes it."""
    return any(row.get(key) is not None for key in keys)


def first(row: dict[str, Any], keys: Iterable[str]) -> str | None:
    """The first of these keys that the row has."""
    return next((key for key in keys if row.get(key) is not None), None)


def text(row: dict[str, Any], key: str | None, source: str) -> str:
    """A text; empty where the key is absent."""
    value = None if key is None else row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{source}: {key} is {shown(value)}; a text is needed")
    return value


def listed(value: Any, where: str) -> list[Any]:
    """A list that is not empty; one written as JSON text, as in CSV and Parquet, is read."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, where)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{where} is {'empty' if value == [] else shown(value)}; a list is needed")
    return value


def parsed(value: str, where: str) -> Any:
    """JSON that stands in a text."""
    try:
        return json.loads(value)
    except RecursionError:
        raise BadRow(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise BadRow(f"{where} is a text that is not JSON ({error})") from None


def shown(value: Any) -> str:
    """What to call a value of a wrong type."""
    return "NaN" if isinstance(value, float) and value != value else type(value).__name__
