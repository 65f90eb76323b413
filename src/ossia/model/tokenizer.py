"""Tokenizers, without loading torch where that is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ossia.errors import OssiaError
from ossia.model.folder import read_json

_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer; OssiaError where it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise OssiaError(f"{folder}: no tokenizer.json; copy the tokenizer's files into the model folder")
    import transformers

    config = folder / "tokenizer_config.json"
    # AutoTokenizer finds the class by importing torch, two seconds that gpt-oss's tokenizer has no need of.
    if config.is_file() and read_json(config).get("tokenizer_class") in _PLAIN:
        name = "PreTrainedTokenizerFast"
    else:
        name = "AutoTokenizer"
    try:
        return getattr(transformers, name).from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise OssiaError(f"{folder}: the tokenizer does not load ({' '.join(str(error).split())})") from error
