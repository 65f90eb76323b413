"""Messages to tokens and back: harmony for gpt-oss, and any chat template of Hugging Face."""

from __future__ import annotations

from typing import Any

from ossia.errors import OssiaError, UsageError, nearest
from ossia.template.base import LossWeights, Template, parse_loss_scale
from ossia.template.generic import GenericTemplate
from ossia.template.harmony import HarmonyTemplate, missing_tokens
from ossia.template.harmony_tools import KNOWLEDGE_CUTOFF
from ossia.template.messages import EFFORTS

__all__ = ["LossWeights", "Template", "load_template", "parse_loss_scale"]

NAMES = ("auto", "harmony", "generic")


def load_template(
    tokenizer: Any,
    name: str = "auto",
    *,
    system: str | None = None,
    reasoning_effort: str = "medium",
    model_identity: str | None = None,
    knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    current_date: str | None = None,
    loss: LossWeights = LossWeights(),  # noqa: B008  (frozen)
) -> Template:
    """The template for a fast tokenizer of transformers.

    Args:
        tokenizer: a PreTrainedTokenizerFast.
        name: `auto` takes harmony where the tokenizer has its special tokens, else the tokenizer's chat template.
        system: instructions for conversations that have none.
        reasoning_effort: low, medium or high, where the conversation says nothing.
        model_identity: first line of harmony's system block.
        knowledge_cutoff: second line of it.
        current_date: third line of it; left out where None.
        loss: which tokens carry loss.

    Raises:
        UsageError: an unknown `name` or `reasoning_effort`.
        OssiaError: the tokenizer lacks harmony's special tokens or a chat template.
    """
    if name not in NAMES:
        raise UsageError(f"--template {name}: unknown{nearest(name, NAMES) or ';'} it takes {', '.join(NAMES)}")
    if reasoning_effort not in EFFORTS:
        hint = nearest(reasoning_effort, EFFORTS)
        raise UsageError(f"--reasoning_effort {reasoning_effort}: unknown{hint or ';'} it takes {', '.join(EFFORTS)}")
    missing = missing_tokens(tokenizer)
    if name == "harmony" and missing:
        raise OssiaError(
            f"--template harmony: the tokenizer in {tokenizer.name_or_path or 'memory'} has no {' '.join(missing)}; "
            "use --template generic, or the tokenizer of gpt-oss"
        )
    if name == "harmony" or (name == "auto" and not missing):
        return HarmonyTemplate(
            tokenizer,
            system=system,
            reasoning_effort=reasoning_effort,
            model_identity=model_identity,
            knowledge_cutoff=knowledge_cutoff,
            current_date=current_date,
            loss=loss,
        )
    return GenericTemplate(
        tokenizer, system=system, reasoning_effort=reasoning_effort, model_identity=model_identity, loss=loss
    )
