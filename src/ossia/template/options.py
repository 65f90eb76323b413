"""A template from a command's options."""

from __future__ import annotations

from typing import Any

from ossia.config.parts import TemplateOptions
from ossia.template import load_template, parse_loss_scale
from ossia.template.base import Template


def template_from(tokenizer: Any, options: TemplateOptions) -> Template:
    """The template that `--template`, `--system`, `--loss_scale` … ask for."""
    return load_template(
        tokenizer,
        options.template,
        system=options.system,
        reasoning_effort=options.reasoning_effort,
        model_identity=options.model_identity,
        current_date=options.current_date,
        loss=parse_loss_scale(options.loss_scale),
    )
