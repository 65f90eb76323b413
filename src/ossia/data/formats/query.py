"""A question and an answer: `query`/`response` with `history` and `system`, `question`/`answer`, `prompt`/`completion`.

As in TRL's conversational data, prompt and completion may be lists of messages.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats.fields import first, parsed, shown, text
from ossia.data.formats.messages import read_messages, with_system
from ossia.data.readers import BadRow
from ossia.errors import nearest
from ossia.template.messages import Conversation, Message

QUESTIONS = ("query", "prompt", "problem", "input")
ANSWERS = ("output", "response", "completion", "answer", "solution")
QUESTION_NEEDS = (("question",),)
NEEDS = (QUESTIONS,)
ALSO = ("system", "history", *ANSWERS)


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row; without an answer it ends with the question."""
    asked = first(row, ("question", *QUESTIONS))
    answered = find_answer(row, source)
    if asked is None:
        raise BadRow(f"{source}: no question in this row")
    messages = read_history(row, source)
    if isinstance(row[asked], list):
        messages += read_messages(row[asked], f"{source}: {asked}")
    elif (question := text(row, asked, source)).strip():
        messages.append(Message("user", question))
    else:
        raise BadRow(f"{source}: {asked} is empty")
    if answered is not None and isinstance(row[answered], list):
        messages += read_messages(row[answered], f"{source}: {answered}")
    elif (answer := text(row, answered, source)).strip():
        messages.append(Message("assistant", answer))
    return Conversation(with_system(messages, row, source), source=source)


def find_answer(row: dict[str, Any], source: str) -> str | None:
    """The key of the answer; BadRow where none is there but one is misspelt."""
    key = first(row, ANSWERS)
    if key is None and not any(answer in row for answer in ANSWERS):
        unknown = [name for name in row if name not in ("instruction", "question", "context", *QUESTIONS, *ALSO)]
        for answer in ANSWERS:
            if hint := nearest(answer, unknown):
                raise BadRow(f"{source}: no key {answer!r}{hint}")
    return key


def read_history(row: dict[str, Any], source: str) -> list[Message]:
    """`history`: pairs of question and answer."""
    value = row.get("history")
    if isinstance(value, str):
        value = parsed(value, f"{source}: history") if value.strip() else []
    if value and not isinstance(value, list):
        raise BadRow(f"{source}: history is {shown(value)}; a list of pairs is needed")
    messages: list[Message] = []
    for number, pair in enumerate(value or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadRow(f"{source}: history entry {number} is not a pair [question, answer]")
        if not pair[1].strip():
            raise BadRow(f"{source}: history entry {number} has no answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages
