"""Options that several commands share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ossia.config.base import opt
from ossia.errors import UsageError

MODEL_TITLES = {"model": "model"}
DATA_TITLES = {"data": "data", "template": "template and loss weights"}


@dataclass
class ModelOptions:
    """Which model, and how it is held."""

    model: str | None = opt(None, "folder or hub id of the base model", group="model")
    torch_dtype: str = opt(
        "auto",
        "computing type; auto: bfloat16 on a GPU, float32 on a CPU",
        group="model",
        choices=["auto", "bfloat16", "float32"],
    )
    device: str = opt("auto", "auto takes a GPU where there is one", group="model", choices=["auto", "cuda", "cpu"])
    experts: str = opt(
        "auto",
        "how MXFP4 experts are held; auto: mxfp4 on a GPU, dequantized on a CPU with room for it",
        group="model",
        choices=["auto", "mxfp4", "dequantized"],
    )
    attn_impl: str = opt(
        "auto",
        "attention; auto: flash on a GPU in bfloat16, else eager (quadratic in memory)",
        group="model",
        choices=["auto", "flash", "eager", "flex_attention"],
    )


@dataclass
class AdapterOptions:
    """Which adapters, and how much of each."""

    adapters: list[str] = opt([], "checkpoint folders; of several the changes are added up", group="model")
    adapter_weights: list[float] = opt([], "factor of each one's change; default: 1 each", group="model")

    def validate_adapters(self) -> None:
        if self.adapter_weights and len(self.adapter_weights) != len(self.adapters):
            raise UsageError(
                f"--adapter_weights has {len(self.adapter_weights)} numbers for {len(self.adapters)} --adapters; "
                "give one for each"
            )
        if not all(map(math.isfinite, self.adapter_weights)):
            raise UsageError("--adapter_weights takes finite numbers")


@dataclass
class TemplateOptions:
    """How messages become tokens, and which tokens carry loss."""

    template: str = opt(
        "auto",
        "chat format; auto: harmony for gpt-oss, else the tokenizer's own",
        group="template",
        choices=["auto", "harmony", "generic"],
    )
    system: str | None = opt(None, "instructions for conversations that have none", group="template")
    reasoning_effort: str = opt(
        "medium",
        "effort written in harmony's system block",
        group="template",
        choices=["low", "medium", "high"],
    )
    model_identity: str | None = opt(None, "first line of harmony's system block", group="template")
    current_date: str | None = opt(None, "date in harmony's system block, YYYY-MM-DD; default: none", group="template")
    loss_scale: str = opt(
        "default",
        "default, last_round or all, with + ignore_empty_think, reasoning:0.3, final_only",
        group="template",
    )


@dataclass
class DatasetOptions:
    """Where rows come from."""

    dataset: list[str] = opt(
        [],
        "files, folders or globs (.json .jsonl .csv .parquet), hf::org/name[:split] or ms::org/name[:split]; "
        "#N behind one draws N rows, *0.3 takes 0.3 times its rows",
        group="data",
    )


@dataclass
class RowOptions:
    """How rows are read, and what is done with bad ones."""

    columns: dict = opt(
        {},
        'names of your columns for those that formats know, such as \'{"text1": "query"}\'; "unused" leaves one out',
        group="data",
    )
    on_bad_row: str = opt(
        "error",
        "a row that cannot be read: stop, or skip and count it",
        group="data",
        choices=["error", "skip"],
    )
    model_name: list[str] = opt([], "fills {{NAME}} in rows; two values: for Chinese rows, for others", group="data")
    model_author: list[str] = opt([], "fills {{AUTHOR}} in rows; likewise", group="data")

    def validate_rows(self) -> None:
        for old, new in self.columns.items():
            if not isinstance(new, str):
                raise UsageError(f"--columns: {old!r} has {new!r}; a name is needed")
        given = [name for name in self.columns.values() if name != "unused"]
        if len(set(given)) < len(given):
            raise UsageError("--columns gives one name to two columns")


@dataclass
class DataOptions(RowOptions, DatasetOptions):
    """Rows to train on, and what is done with long ones."""

    max_length: int = opt(4096, "tokens a row may have", group="data")
    truncation: str = opt(
        "delete",
        "rows over --max_length: drop, drop their oldest turns (left), cut their end (right), or stop; all but the "
        "last are counted",
        group="data",
        choices=["delete", "left", "right", "error"],
    )
    multi_turn: str = opt(
        "split",
        "rows with reasoning in earlier turns: split into one sample a turn, or keep whole and train the last turn",
        group="data",
        choices=["split", "whole"],
    )
    seed: int = opt(42, "seed of all that is drawn: rows, their order, held-out rows, adapters, dropout", group="data")

    def validate_data(self) -> None:
        if self.max_length < 1:
            raise UsageError(f"--max_length is {self.max_length}; it must be at least 1 token")
        self.validate_rows()
