"""Tokenizers, without loading torch's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ossia.errors import OssiaError


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer; OssiaError where it has none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise OssiaError(f"{folder}: no tokenizer.json; copy the tokenizer's files into the model folder")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise OssiaError(f"{folder}: the tokenizer does not load ({' '.join(str(error).split())})") from error
