"""Lengths of a planned run's rows: tokenised as a run tokenises them, or estimated where no tokenizer is here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ossia.config import PlanConfig
from ossia.data.hub import HubSet
from ossia.data.sources import find_datasets
from ossia.data.store import TokenRows
from ossia.errors import UsageError
from ossia.model.tokenizer import load_tokenizer
from ossia.plan.base import Base
from ossia.template.harmony import REQUIRED_TOKENS
from ossia.template.options import template_from
from ossia.train.run import read_rows

_PIECES = (
    r" ?\p{Latin}{1,14}|\p{N}{1,3}|\p{Han}{2}(?=\p{Han}{2})|\p{Han}|\s*\n+|\s+(?=\S)|\s+"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\p{L}{1,3}"
)
"""Cuts a text into about as many pieces as gpt-oss's tokenizer makes tokens: 0.91 to 1.06 times as many for English,
dialogues, arithmetic and modern Chinese, 1.14 for code, 0.74 for classical Chinese."""


MARGIN = 1.3
"""How many times as long as its estimate a row may be: the longest ones were up to 1.27 times."""


def planned_rows(config: PlanConfig, base: Base) -> tuple[TokenRows, TokenRows | None]:
    """Rows to train on and rows held out; estimated ones up to `MARGIN` times --max_length, as some of them fit.

    Raises:
        UsageError: a data set on a hub, or a chat template without its tokenizer.
    """
    for flag in ("dataset", "val_dataset"):
        for dataset in find_datasets(getattr(config, flag), f"--{flag}"):
            if any(isinstance(part, HubSet) for part in dataset.parts):
                raise UsageError(
                    f"--{flag} {dataset.word}: on a hub, and ossia plan downloads nothing. Give a file, or leave "
                    "--dataset out to plan for rows of --max_length"
                )
    if base.tokenizer:
        assert base.folder is not None
        return read_rows(config, template_from(load_tokenizer(base.folder), config))
    if config.template == "generic":
        raise UsageError(
            f"--template generic: the tokenizer of {base.name} is not on this machine; give --model FOLDER with it"
        )
    longer = replace(config, max_length=math.ceil(MARGIN * config.max_length), packing_length=None)
    return read_rows(longer, template_from(_Estimate(), config))


class _Estimate:
    """Stands in for gpt-oss's tokenizer, as far as a template needs one to count."""

    name_or_path = "estimated by characters"

    def __init__(self) -> None:
        self.backend_tokenizer = Tokenizer(models.WordLevel({"piece": 0}, unk_token="piece"))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
        self.backend_tokenizer.add_special_tokens([*REQUIRED_TOKENS, "<|endoftext|>"])
        self.pad_token_id = self.eos_token_id = self.backend_tokenizer.token_to_id("<|endoftext|>")

    def convert_tokens_to_ids(self, token: str) -> Any:
        return self.backend_tokenizer.token_to_id(token)
