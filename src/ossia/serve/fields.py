"""Request fields: each is taken, is ignored since it changes no answer, or is a 400 that names it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, model_validator
from pydantic_core import PydanticCustomError

from ossia.errors import nearest
from ossia.serve.errors import bad

WRONG_FIELD = "wrong_field"
"""Type of the errors that are made here; `ossia.serve.app` turns them into a client's 400."""
LEAVE = "leave it out"


class No(NamedTuple):
    """An unsupported field. `neutral`: values that equal its default and are accepted; `instead`: advice in the 400."""

    neutral: tuple[Any, ...] = ()
    instead: str = LEAVE


class Body(BaseModel):
    """Base of all bodies: no conversions between types, no infinities, null is absence.

    Its own fields are taken, those of `harmless` change no answer, those of `refused` and all others are errors.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, No]] = {}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        cls.check(given)
        return given

    @classmethod
    def check(cls, given: dict[str, Any]) -> None:
        """Raise for a field that would be passed over."""
        taken = cls.taken()
        for name, value in given.items():
            if name in taken or name in cls.harmless:
                continue
            if (no := cls.refused.get(name)) is None:
                raise wrong(name, f"is not known here{nearest(name, taken) or f'; {LEAVE}'}", "unknown_parameter")
            if value not in no.neutral:
                raise wrong(name, f"is not supported here; {no.instead}")

    @classmethod
    def taken(cls) -> list[str]:
        """Names of the fields that are read, as clients write them."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class Other(Body):
    """Fallback of a tagged union: refuses every kind that is not read.

    `by` is the field that tells kinds apart, `takes` says which are read, `instead` what to write for some others.
    """

    by: ClassVar[str] = "type"
    takes: ClassVar[str]
    instead: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def check(cls, given: dict[str, Any]) -> None:
        """Raise in any case."""
        if cls.by not in given:
            raise wrong(cls.by, f"is missing; {cls.takes}", "missing_required_parameter")
        kind = given[cls.by]
        raise wrong(cls.by, f"is {kind!r:.60}; {cls.instead.get(str(kind), cls.takes)}")


def wrong(field: str, message: str, code: str = "unsupported_parameter") -> PydanticCustomError:
    """An error about a field of the body that is validated; `message` goes on after the field's path."""
    return PydanticCustomError(WRONG_FIELD, "{message}", {"field": field[:80], "message": message, "code": code})


def kinds(by: str, tags: Mapping[str, str], absent: str | None = None) -> Discriminator:
    """Tells the bodies of a union apart.

    Args:
        by: the field that does.
        tags: its values to the union's tags. All else goes to the tag `<other>`.
        absent: the value that stands where the field does not.
    """

    def tag(value: Any) -> str:
        kind = value.get(by) if isinstance(value, dict) else getattr(value, by, None)
        kind = absent if kind is None else kind
        return tags.get(kind, "<other>") if isinstance(kind, str) else "<other>"

    return Discriminator(tag)


def one_value(given: Mapping[str, Any]) -> Any:
    """The value of fields that mean one thing, None where none is given; ApiError where two of them differ."""
    found = [(name, value) for name, value in given.items() if value is not None]
    for name, value in found[1:]:
        if value != found[0][1]:
            raise bad(f"{found[0][0]} and {name} mean the same and differ; send one of them", name)
    return found[0][1] if found else None


def tables(places: Iterable[tuple[str, type[Body]]]) -> str:
    """Two tables of docs/serve.md, as Markdown: what is read in each place, and what is refused.

    Args:
        places: each with a name for people.
    """
    read = ["| in | taken | changes no answer |", "|---|---|---|"]
    places = list(places)
    refused: dict[str, tuple[str, No, list[str]]] = {}
    for place, body in places:
        read.append(f"| {place} | {_code(body.taken())} | {_code(sorted(body.harmless))} |")
        for name, no in body.refused.items():
            refused.setdefault(f"{name} {no}", (name, no, []))[2].append(place)
    lines = ["| field | in | taken as absent | else 400: |", "|---|---|---|---|"]
    for _, (name, no, where) in sorted(refused.items()):
        neutral = _code([json.dumps(value) for value in no.neutral])
        lines.append(f"| `{name}` | {', '.join(where)} | {neutral} | {no.instead} |")
    return "\n".join([*read, "", *lines])


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
