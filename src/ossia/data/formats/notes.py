"""What is noticed in rows that can be read: counted for each data set, and said once."""

from __future__ import annotations

import re

from ossia.data.formats.names import HARMLESS_VALUES
from ossia.data.readers import BadRow

_EMPTY: tuple[object, ...] = (None, "", [], {})

NOTES = {
    "null_arguments": "null members of calls' arguments or tools' results, taken as absent",
    "double_arguments": "arguments of calls encoded twice, decoded once more",
    "empty_arguments": "calls without arguments, written as {}",
    "bad_arguments": "arguments of calls that are no JSON object (of python: no source code)",
    "undeclared": "calls of functions that the row's tools do not declare",
    "no_tools": "calls in rows without tools",
    "orphan_result": "results of tools that no call before them asked for, or asked another function for",
    "unanswered": "calls that no result answers before the conversation goes on",
    "schema": "arguments that the function's schema refuses",
    "bad_schema": "schemas of tools that are no valid JSON schema",
    "odd_parameters": "parameters of a tool that are no JSON schema of an object: the model sees `any`",
    "empty_reasoning": "empty reasoning",
    "think_tags": "reasoning tags left in what is trained (not closed, doubled, in mid-text, or other than <think>)",
    "call_tags": "calls written as text in answers (<tool_call>, <function_call>, JSON …), which are trained as text",
    "flat_harmony": "harmony without its control tokens (analysis…assistantfinal…), which is trained as text",
    "control_text": "control tokens of a chat format inside answers, reasoning, arguments or texts, trained as letters",
    "harmony_settings": "harmony texts whose system block has another date, identity or cutoff than the template's",
    "effort_text": "instructions that say `Reasoning: …`; the system block says it by itself, from reasoning_effort",
    "names": "names of users or of the assistant, which gpt-oss's format does not have",
    "nothing": "texts that are only nan, None or null",
    "json_parts": "contents that are JSON text of parts, read as text",
    "encrypted": "encrypted reasoning, which cannot be read",
    "media": "columns of images, videos or audio, which are not read",
}
"""What each note says of the rows that have it; `schema` and `bad_schema` are looked for by `ossia data check` only."""


class Notes:
    """What was noticed in one row: keys of `NOTES` in `seen`, keys that nobody reads, with their paths, in `unused`."""

    __slots__ = ("seen", "source", "unused")

    def __init__(self, source: str) -> None:
        self.source = source
        self.seen: set[str] = set()
        self.unused: dict[str, None] = {}


class Place:
    """A place in a row. As a text it is `file:line: messages[0]`, for messages to people."""

    __slots__ = ("notes", "path")

    def __init__(self, notes: Notes, path: str = "") -> None:
        self.notes = notes
        self.path = path

    def __str__(self) -> str:
        return f"{self.notes.source}: {self.path}"

    def key(self, name: str) -> Place:
        """The value of a key here."""
        return Place(self.notes, f"{self.path}.{name}" if self.path else name)

    def at(self, index: int) -> Place:
        """An item of the list here."""
        return Place(self.notes, f"{self.path}[{index}]")

    def bad(self, text: str) -> BadRow:
        """An error at this place; `text` begins with what joins it to the place: a colon, ` is`, `.key`."""
        return BadRow(f"{self}{text}")

    def note(self, name: str) -> None:
        """Something of `NOTES` holds for this row."""
        self.notes.seen.add(name)

    def check_keys(self, entry: dict[str, object], known: frozenset[str]) -> None:
        """Note the keys of an object that nobody reads, unless their values are empty or harmless."""
        if not known.issuperset(entry):
            level = re.sub(r"\[\d+\]", "[]", self.path)
            for key, value in entry.items():
                if key not in known and value not in _EMPTY and value not in HARMLESS_VALUES.get(key, ()):
                    self.notes.unused[f"{level}.{key}" if level else str(key)] = None
