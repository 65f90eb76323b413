"""An answer and whether it is good (`label` or `kto_tag`): read and checked, not trained by `ossia sft`."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import query
from ossia.data.formats.fields import has
from ossia.data.formats.notes import Place
from ossia.data.formats.preference import read_prompt
from ossia.template.messages import Conversation

_LABELS = ("label", "kto_tag")
NEEDS = (_LABELS, ("messages", "conversations", "instruction", *query.ANSWERS))
ALSO = ("input", "context", "question", *query.QUESTIONS, *query.ALSO)
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def accepts(row: dict[str, Any]) -> bool:
    """Whether the label is a yes or no; any other column of that name means something else."""
    return any(str(row.get(key)).lower() in _TRUTH for key in _LABELS)


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation, its last answer judged by `label`."""
    conversation = read_prompt(row, place)
    if conversation.messages[-1].role != "assistant":
        raise place.bad("a label, but no answer at the end that it judges")
    conversation.label = next(_TRUTH[str(row[key]).lower()] for key in _LABELS if has(row, key))
    return conversation
