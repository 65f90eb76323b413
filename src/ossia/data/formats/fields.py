"""Values out of rows, with errors that name the key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ossia.data.formats import names
from ossia.data.formats.notes import Notes, Place


def has(row: Mapping[str, Any], *keys: str) -> bool:
    """Whether the row has one of these keys; null is absent, as Parquet writes it."""
    return any(row.get(key) is not None for key in keys)


def first(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of these keys that the row has."""
    return next((key for key in keys if row.get(key) is not None), None)


def only(row: Mapping[str, Any], keys: Iterable[str], place: Place) -> str | None:
    """The key that the row has of several names for one thing; BadRow where two of them say different things."""
    found = [key for key in keys if row.get(key) is not None]
    if len(found) < 2:
        return found[0] if found else None
    said = [key for key in found if not blank(row[key])] or found[:1]
    values = [row[key].strip() if isinstance(row[key], str) else row[key] for key in said]
    for key, value in zip(said[1:], values[1:], strict=True):
        if value != values[0]:
            leave_out = "" if place.path else f""" (--columns '{{"{key}": "unused"}}' leaves {key} out)"""
            lead = ": " if place.path else ""
            raise place.bad(f"{lead}{said[0]} and {key} mean the same and differ; keep one{leave_out}")
    return said[0]


def text(row: Mapping[str, Any], key: str | None, place: Place) -> str:
    """A text; empty where the key is absent."""
    value = None if key is None else row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise place.key(str(key)).bad(f" is {shown(value)}; a text is needed")
    return value


def listed(value: Any, place: Place) -> list[Any]:
    """A list that is not empty.

    One written as JSON text, as in CSV and Parquet, is read; so is an object of equally long lists, which is how Arrow
    may give a list of objects.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, place)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            rows = zip(*columns, strict=True)
            value = [{k: v for k, v in zip(value, row, strict=True) if v is not None} for row in rows]
    if not isinstance(value, list) or not value:
        raise place.bad(f" is {'empty' if value == [] else shown(value)}; a list is needed")
    return value


def parsed(value: str, place: Place) -> Any:
    """JSON that stands in a text; nulls in its objects are absence."""
    try:
        return without_nulls(json.loads(value), place.notes)
    except RecursionError:
        raise place.bad(" is nested too deeply to be read") from None
    except ValueError as error:
        raise place.bad(f" is a text that is not JSON ({error})") from None


def messages_of(value: Any) -> list[Any] | None:
    """The list of messages that a value is, or that it is the JSON text of; else None."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return value if any(key in value[0] for key in (*names.ROLE, *names.CALLS)) else None
    return None


def as_json(value: Any, place: Place) -> str:
    """A value as JSON text, as a model writes it."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise place.bad(" holds NaN or Infinity, which JSON has not") from None


def without_nulls(value: Any, notes: Notes | None = None) -> Any:
    """The value without the null members of its objects.

    Arrow gives every object of a column the keys of all of them, with null where a row has none. An object that has
    nothing but such keys is absent itself.
    """
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if item is None:
                continue
            if isinstance(item, dict | list):
                inner = without_nulls(item, notes)
                said = key == "arguments" or (key in names.RESULT and names.ROLES.get(str(_speaker(value))) == "tool")
                if notes is not None and said and inner != item:
                    notes.seen.add("null_arguments")
                if item and not inner:
                    continue
                item = inner
            kept[key] = item
        return kept
    if isinstance(value, list):
        return [without_nulls(item, notes) if isinstance(item, dict | list) else item for item in value]
    return value


def _speaker(entry: dict[str, Any]) -> Any:
    return entry.get("role", entry.get("from", entry.get("type")))


def blank(value: Any) -> bool:
    """Whether a value says nothing: null, an empty or white text, an empty list or object."""
    return not value.strip() if isinstance(value, str) else value in (None, [], {})


def shown(value: Any) -> str:
    """Name of a value's type for error messages; NaN for NaN."""
    return "NaN" if isinstance(value, float) and value != value else type(value).__name__
