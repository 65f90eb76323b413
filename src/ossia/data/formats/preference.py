"""Two answers to one prompt, the better and the worse: read and checked, not trained by `ossia sft`.

The prompt stands as in any other format. The answers are `chosen` and `rejected` (texts, messages, ShareGPT turns, or
lists of messages that may repeat the prompt), or the row's own answer and `rejected_response`.
"""

from __future__ import annotations

from typing import Any

from ossia.data.formats import alpaca, messages, query, sharegpt
from ossia.data.formats.fields import has, shown
from ossia.data.readers import BadRow
from ossia.template.messages import Conversation, Message

_WORSE = ("rejected", "rejected_response")
NEEDS = (_WORSE,)
ALSO = ("chosen", "messages", "conversations", "instruction", "question", "context", *query.QUESTIONS, *query.ALSO)


def read(row: dict[str, Any], source: str) -> Conversation:
    """The conversation with the better answer at its end, the worse one in `rejected`."""
    rest = {key: value for key, value in row.items() if key not in ("chosen", *_WORSE)}
    if not has(row, "chosen"):
        if has(row, "rejected"):
            raise BadRow(f"{source}: rejected without chosen")
        conversation = read_prompt(rest, source)
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise BadRow(f"{source}: rejected_response, but no answer that is better")
        conversation.rejected = _answer(row["rejected_response"], f"{source}: rejected_response")
        better = [conversation.messages[-1]]
    else:
        better = _answer(row["chosen"], f"{source}: chosen")
        worse = _answer(row["rejected"] if has(row, "rejected") else row["rejected_response"], f"{source}: rejected")
        shared = 0
        if better[0].role != "assistant":
            while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
                shared += 1
            if better[shared].role != "assistant" or worse[shared].role != "assistant":
                raise BadRow(f"{source}: chosen and rejected answer different prompts")
            conversation = Conversation(better[:shared], source=source)
        else:
            conversation = read_prompt(rest, source)
            if conversation.messages[-1].role == "assistant":
                raise BadRow(f"{source}: the prompt ends with an answer, and chosen is another")
        conversation.messages = messages.with_system(conversation.messages + better[shared:], row, source)
        conversation.rejected = worse[shared:]
        better = better[shared:]
    if [(m.content, m.thinking, m.tool_calls) for m in better] == [
        (m.content, m.thinking, m.tool_calls) for m in conversation.rejected
    ]:
        raise BadRow(f"{source}: chosen and rejected are the same")
    return conversation


def read_prompt(row: dict[str, Any], source: str) -> Conversation:
    """The conversation of a row in whichever other format it has."""
    if has(row, "messages"):
        return messages.read(row, source)
    if has(row, "conversations"):
        return sharegpt.read(row, source)
    if has(row, "instruction"):
        return alpaca.read(row, source)
    return query.read(row, source)


def _answer(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{where} is empty")
        return [Message("assistant", value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{where} is {shown(value)}; a text, a message or a list of messages is needed")
    found = sharegpt.read_turns(value, where)
    if found[-1].role != "assistant":
        raise BadRow(f"{where}: the last message is not the assistant's")
    return found
