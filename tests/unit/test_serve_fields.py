"""The table of fields that requests go by, and its print in docs/serve.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_core import PydanticCustomError

from ossia.serve import schema
from ossia.serve.fields import Body, Other, tables

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serve.md"
BODIES = [
    found
    for found in vars(schema).values()
    if isinstance(found, type) and issubclass(found, Body) and not issubclass(found, Other) and found is not Body
]


def test_the_docs_have_the_table():
    printed = DOCS.read_text(encoding="utf-8")
    assert tables(schema.PLACES) in printed


def test_every_body_is_in_the_table():
    assert {body for _, body in schema.PLACES} == set(BODIES)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_no_field_is_passed_over(body):
    body.check(dict.fromkeys((*body.taken(), *body.harmless), "x"))
    with pytest.raises(PydanticCustomError, match="not known here"):
        body.check({"nobody_knows_it": 1})
    for name, no in body.refused.items():
        assert name not in body.taken()
        assert name not in body.harmless
        body.check(dict.fromkeys([name], no.neutral[0]) if no.neutral else {})
        with pytest.raises(PydanticCustomError, match="is not supported here"):
            body.check({name: "something else"})
