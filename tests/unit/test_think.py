"""Think tags at the start of an answer."""

from __future__ import annotations

import time

import pytest

from ossia.template.think import split_think


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", (None, "a")),
        ("", (None, "")),
        ("<think>\nt\n</think>\n\na", ("t", "a")),
        (" <think></think> a ", ("", "a ")),
        ("t\n</think>\n\na", ("t", "a")),
        ("\n</think>a", ("", "a")),
        ("<think>t", (None, "<think>t")),
        ("a <think>t</think>", (None, "a <think>t</think>")),
        ("<think>t</think>a</think>b", ("t", "a</think>b")),
        ("<think>a <think> b</think>c", ("a <think> b", "c")),
        ("<thinking>t</thinking>a", (None, "<thinking>t</thinking>a")),
    ],
)
def test_reasoning_and_answer(text, parts):
    assert split_think(text) == parts


def test_long_answers_cost_little():
    began = time.perf_counter()
    assert split_think("word " * 1_000_000)[0] is None
    assert time.perf_counter() - began < 0.5
