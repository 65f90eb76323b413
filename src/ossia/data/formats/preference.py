"""Two answers to one prompt, the better and the worse: read and checked, not trained by `ossia sft`.

The prompt stands as in any other format. The answers are `chosen` and `rejected` (texts, messages, ShareGPT turns, or
lists of messages that may repeat the prompt), or the row's own answer and `rejected_response`.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats import alpaca, messages, query, sharegpt
from ossia.data.formats.fields import has, only, shown
from ossia.data.formats.notes import Place
from ossia.template.messages import Conversation, Message

_WORSE = ("rejected", "rejected_response")
NEEDS = (_WORSE,)
ALSO = ("chosen", "messages", *sharegpt.TURNS, "instruction", "question", "context", *query.QUESTIONS, *query.ALSO)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation with the better answer at its end, the worse one in `rejected`."""
    rest = {key: value for key, value in row.items() if key not in ("chosen", *_WORSE)}
    if not has(row, "chosen"):
        if has(row, "rejected"):
            raise place.bad("rejected without chosen")
        conversation = read_prompt(rest, place)
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise place.bad("rejected_response, but no answer that is better")
        conversation.rejected = _answer(row["rejected_response"], place.key("rejected_response"))
        better = [conversation.messages[-1]]
    else:
        better = _answer(row["chosen"], place.key("chosen"))
        key = str(only(row, _WORSE, place))
        worse = _answer(row[key], place.key(key))
        shared = 0
        if better[0].role != "assistant":
            while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
                shared += 1
            if better[shared].role != "assistant" or worse[shared].role != "assistant":
                raise place.bad("chosen and rejected answer different prompts")
            conversation = Conversation(better[:shared])
        else:
            conversation = read_prompt(rest, place)
            if conversation.messages[-1].role == "assistant":
                raise place.bad("the prompt ends with an answer, and chosen is another")
        conversation.messages = messages.with_system(conversation.messages + better[shared:], row, place)
        conversation.rejected = worse[shared:]
        better = better[shared:]
    if [(m.content, m.thinking, m.tool_calls) for m in better] == [
        (m.content, m.thinking, m.tool_calls) for m in conversation.rejected
    ]:
        raise place.bad("chosen and rejected are the same")
    return conversation


def read_prompt(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation of a row in whichever other format it has."""
    if has(row, "messages"):
        return messages.read(row, place)
    if has(row, *sharegpt.TURNS):
        return sharegpt.read(row, place)
    if has(row, "instruction"):
        return alpaca.read(row, place)
    return query.read(row, place)


def _answer(value: Any, place: Place) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise place.bad(" is empty")
        return messages.answer(value, None, place)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise place.bad(f" is {shown(value)}; a text, a message or a list of messages is needed")
    found = messages.read_messages(value, place)
    if found[-1].role != "assistant":
        raise place.bad(": the last message is not the assistant's")
    return found
