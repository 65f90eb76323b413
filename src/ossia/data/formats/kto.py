"""An answer and whether it is good (`label` or `kto_tag`): read and checked, not trained by `ossia sft`."""

from __future__ import annotations

from typing import Any

from ossia.data.formats import query, sharegpt
from ossia.data.formats.notes import Place
from ossia.data.formats.preference import read_prompt
from ossia.template.messages import Conversation

_LABELS = ("label", "kto_tag")
NEEDS = (_LABELS, ("messages", *sharegpt.TURNS, "instruction", *query.ANSWERS))
ALSO = ("input", "context", "question", *query.QUESTIONS, *query.ALSO)
_TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""pandas and Arrow write booleans with gaps as 1.0 and 0.0."""


def accepts(row: dict[str, Any]) -> bool:
    """Whether the label is a yes or no; any other column of that name means something else."""
    return _label(row) is not None


def read(row: dict[str, Any], place: Place) -> Conversation:
    """The conversation, its last answer judged by `label`."""
    conversation = read_prompt(row, place)
    if conversation.messages[-1].role != "assistant":
        raise place.bad("a label, but no answer at the end that it judges")
    conversation.label = _label(row)
    return conversation


def _label(row: dict[str, Any]) -> bool | None:
    return next((_TRUTH[word] for key in _LABELS if (word := str(row.get(key)).lower()) in _TRUTH), None)
