"""A template from a command's options."""

from __future__ import annotations

from typing import Any

from ossia.config.parts import TemplateOptions
from ossia.console import warn
from ossia.template import load_template, parse_loss_scale
from ossia.template.base import Template
from ossia.template.generic import GenericTemplate


def template_from(tokenizer: Any, options: TemplateOptions) -> Template:
    """The template that `--template`, `--system`, `--loss_scale` … ask for; says where it cannot keep text text."""
    template = load_template(
        tokenizer,
        options.template,
        system=options.system,
        reasoning_effort=options.reasoning_effort,
        model_identity=options.model_identity,
        current_date=options.current_date,
        loss=parse_loss_scale(options.loss_scale),
    )
    if isinstance(template, GenericTemplate) and template.unguarded is not None:
        warn(
            f"template generic of {tokenizer.name_or_path or 'memory'}: names of control tokens in messages become "
            f"control tokens, because {template.unguarded}; look through rows of strangers before training on them"
        )
    return template
