"""`<think>` tags at the start of an answer, read the same way wherever an answer is text."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def split_think(text: str) -> tuple[str | None, str]:
    """(reasoning, answer): what stands in `<think>…</think>` at the start of `text`, and what follows it.

    Where `text` has only the closing tag, what stands before it is the reasoning: the prompt opened it. Reasoning is
    None where there is neither, as in a text that opens `<think>` later or never closes it, and `""` where it is blank.
    """
    before, closed, after = text.partition(CLOSE)
    if not closed:
        return None, text
    if (found := _THINK.match(text)) is not None:
        return found[1].strip(), text[found.end() :]
    return (None, text) if OPEN in before else (before.strip(), after.lstrip())
