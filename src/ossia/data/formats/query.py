"""A question and an answer: `query`/`response` with `history` and `system`, `question`/`answer`, `prompt`/`completion`.

As in TRL's conversational data, prompt and completion may be lists of messages; then what the prompt's assistant says
carries no loss. A prompt and completion that are one text in harmony, cut in two, become its conversation.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats import names
from ossia.data.formats.fields import blank, messages_of, only, parsed, shown, text
from ossia.data.formats.harmony import read_harmony
from ossia.data.formats.messages import (
    answer,
    mark_preambles,
    note_nothing,
    read_messages,
    reasoning_of,
    with_system,
)
from ossia.data.formats.notes import Place
from ossia.errors import nearest
from ossia.template.harmony_text import looks_like_harmony
from ossia.template.messages import Conversation, Message

QUESTIONS = ("query", "prompt", "problem", "input")
ANSWERS = ("output", "response", "completion", "answer", "solution")
QUESTION_NEEDS = (("question",),)
NEEDS = (QUESTIONS,)
ALSO = ("history", *names.SYSTEM, *names.REASONING_COLUMNS, *ANSWERS)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation of a row; without an answer it ends with the question."""
    asked = only(row, ("question", *QUESTIONS), place)
    answered = find_answer(row, place)
    if asked is None:
        raise place.bad("no question in this row")
    prompt = row[asked]
    if asked == "prompt" and isinstance(prompt, str) and looks_like_harmony(prompt):
        if beside := [key for key in ALSO if key not in ANSWERS and not blank(row.get(key))]:
            raise place.bad(
                f"prompt is a whole conversation in harmony; {beside[0]} beside it has no place, leave it out"
            )
        return read_harmony(prompt + text(row, answered, place), place.key("prompt"))
    messages = read_history(row, place)
    if (listed := messages_of(prompt)) is not None:
        asking = read_messages(listed, place.key(asked))
        if asking[-1].role == "assistant" and answered is not None:
            raise place.key(asked).bad(" ends with an answer, and the row has another; join the two or leave one out")
        for message in asking:
            if message.role == "assistant" and message.loss is None:
                message.loss = 0.0
        messages += asking
    elif isinstance(prompt, list):
        raise place.key(asked).bad(" is a list, but not of messages; a row has one question")
    elif (question := text(row, asked, place)).strip():
        note_nothing(question, place)
        messages.append(Message("user", question))
    else:
        raise place.key(asked).bad(" is empty")
    if answered is not None and (listed := messages_of(row[answered])) is not None:
        messages += read_messages(listed, place.key(answered))
        mark_preambles(messages)
    else:
        messages += read_answer(row, answered, place)
    return Conversation(with_system(messages, row, place))


def read_answer(row: dict[str, Any], key: str | None, place: Place) -> list[Message]:
    """The answer in a column, with the reasoning in another; nothing where the answer is blank."""
    thinking = reasoning_of(row, place)
    if key is not None and isinstance(row[key], list):
        raise place.key(key).bad(" is a list, but not of messages; a text is needed")
    said = text(row, key, place)
    if not said.strip():
        if thinking and thinking.strip():
            raise place.bad("reasoning, but no answer in this row")
        return []
    return answer(said, thinking, place.key(str(key)))


def find_answer(row: dict[str, Any], place: Place) -> str | None:
    """The key of the answer; BadRow where none is there but one is misspelt."""
    key = only(row, ANSWERS, place)
    if key is None and not any(answer in row for answer in ANSWERS):
        unknown = [name for name in row if name not in ("instruction", "question", "context", *QUESTIONS, *ALSO)]
        for answer in ANSWERS:
            if hint := nearest(answer, unknown):
                raise place.bad(f"no key {answer!r}{hint}")
    return key


def read_history(row: dict[str, Any], place: Place) -> list[Message]:
    """`history`: pairs of question and answer."""
    value, place = row.get("history"), place.key("history")
    if isinstance(value, str):
        value = parsed(value, place) if value.strip() else []
    if value and not isinstance(value, list):
        raise place.bad(f" is {shown(value)}; a list of pairs is needed")
    messages: list[Message] = []
    for number, pair in enumerate(value or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise place.bad(f" entry {number} is not a pair [question, answer]")
        if not pair[1].strip():
            raise place.bad(f" entry {number} has no answer")
        messages += [Message("user", pair[0]), *answer(pair[1], None, place.at(number - 1))]
    return messages
