"""A model's tokenizer and template for the data commands, and the text of single tokens."""

from __future__ import annotations

from typing import Any

from ossia.config.data import DataCommand
from ossia.model.folder import resolve_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template.base import Template
from ossia.template.options import template_from


def open_template(config: DataCommand) -> tuple[Any, Template]:
    """(tokenizer, template) of `--model`; reads no weights."""
    assert config.model is not None
    tokenizer = load_tokenizer(resolve_model(config.model, weights=False))
    return tokenizer, template_from(tokenizer, config)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """One text per token; together they are the whole text. Where tokens share a character, the last has it."""
    texts: list[str] = []
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(held) < 8:
            texts.append("")
            continue
        texts.append(text)
        held = []
    if held:
        texts[-1] = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts
