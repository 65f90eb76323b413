"""`ossia infer`: loads a model and its adapter, then converses or answers a file."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ossia.adapters.files import base_model_of, check_adapter
from ossia.compat import quiet_libraries
from ossia.config import InferConfig
from ossia.config.parts import TemplateOptions
from ossia.console import say
from ossia.data.sources import find_datasets
from ossia.errors import UsageError
from ossia.model.folder import resolve_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template.base import Template
from ossia.template.options import template_from
from ossia.train.folder import options_of, run_of


def run(config: InferConfig) -> None:
    """Check, load, answer."""
    find_datasets(config.val_dataset, "--val_dataset")
    if config.val_dataset and not config.result_path:
        raise UsageError("--val_dataset needs --result_path FILE.jsonl for the answers")
    if config.val_dataset:
        answer_rows(config)
    else:
        # A conversation has its system text itself, so that it can do without.
        engine = load_engine(config, system=False)
        from ossia.infer.chat import chat

        chat(engine, config)


def answer_rows(config: InferConfig) -> None:
    """Answer the rows that `--val_dataset` names; everything wrong with them is said before weights load."""
    folder, template = template_of(config)
    from ossia.infer.batch import Answers

    answers = Answers.of(config, folder, template)
    if len(answers.done) < len(answers.rows):
        from ossia.infer.engine import Engine

        answers.answer(Engine(model_of(config, folder), template, max_batch_size=config.max_batch_size))
    answers.finish()


def load_engine(config: InferConfig, system: bool = True) -> Any:
    """An engine for one request at a time; everything wrong with names and files is said before weights load.

    Args:
        config: names, files and settings.
        system: see `template_of`.
    """
    folder, template = template_of(config, system)
    from ossia.infer.engine import Engine

    return Engine(model_of(config, folder), template, max_batch_size=1)


def model_of(config: InferConfig, folder: Path) -> Any:
    """The model in `folder`, with the adapters that the options name."""
    from ossia.adapters.io import load_adapter
    from ossia.adapters.origin import check_origin
    from ossia.model.load import load_model
    from ossia.train.adapters import one_adapter

    quiet_libraries()
    with one_adapter(config.adapters, config.adapter_weights) if config.adapters else nullcontext() as adapter:
        if adapter is not None:
            check_origin(adapter, folder)
        model: Any = load_model(
            folder,
            torch_dtype=config.torch_dtype,
            device=config.device,
            experts=config.experts,
            attn_impl=config.attn_impl,
        )
        if adapter is not None:
            model = load_adapter(model, adapter)
    named = " and ".join(str(check_adapter(name)) for name in config.adapters)
    say(f"model: {folder}" + (f" with {named}" if named else ""))
    return model


def template_of(config: InferConfig, system: bool = True) -> tuple[Path, Template]:
    """The base model's folder and the template; the first adapter's run settles in `config` what was left open.

    Args:
        config: names and settings.
        system: whether the template puts the options' system text where messages have none.
    """
    adapter = next(iter([check_adapter(name) for name in config.adapters]), None)
    if adapter:
        _settings_of_run(config, adapter)
    folder = resolve_model(config.model or base_model_of(adapter))  # type: ignore[arg-type]
    options = config if system else dataclasses.replace(config, system=None)
    return folder, template_from(load_tokenizer(folder), options)


def _settings_of_run(config: InferConfig, adapter: Path) -> None:
    """Take template options from the adapter's run where none was given here."""
    parent = run_of(adapter)
    if parent is None:
        return
    trained = options_of(parent)
    for field in dataclasses.fields(TemplateOptions):
        if getattr(config, field.name) == field.default:
            setattr(config, field.name, getattr(trained, field.name))
