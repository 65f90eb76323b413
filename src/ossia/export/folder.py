"""The exported folder, apart from its weights; looked at and written without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ossia.errors import UsageError
from ossia.model.folder import read_json

INDEX = "model.safetensors.index.json"
REPORT = "export_report.json"

_CONFIG = "config.json"
BESIDE_WEIGHTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)
"""Files of a model besides its weights and configuration."""
_PATH_KEYS = ("_name_or_path", "name_or_path")
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What openai/gpt-oss-20b's config.json says of its quantization."""


def check_output(output: Path) -> None:
    """UsageError where there is something already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output_dir {output}: already there and not empty; remove it or name another folder")


def write_rest(base: Path, folder: Path, dtype: str | None) -> None:
    """Configuration, tokenizer, chat template, generation configuration and licence of the base, free of paths.

    Args:
        base: model folder.
        folder: to write into.
        dtype: of the weights; None leaves the base's, with experts in MXFP4.
    """
    for pattern in BESIDE_WEIGHTS:
        for file in base.glob(pattern):
            if file.is_file() and file.suffix == ".json":
                write_json_of(file, folder, read_json(file))
            elif file.is_file():
                shutil.copyfile(file, folder / file.name)
    config = read_json(base / _CONFIG)
    if dtype is None:
        config.setdefault("quantization_config", MXFP4)
    else:
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_json_of(base / _CONFIG, folder, config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, as transformers writes it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_of(file: Path, folder: Path, value: dict[str, Any]) -> None:
    """The file byte for byte if it says just that, else the value; a path of this machine is left out."""
    kept = {key: item for key, item in value.items() if key not in _PATH_KEYS or not Path(str(item)).is_absolute()}
    if kept == read_json(file):
        shutil.copyfile(file, folder / file.name)
    else:
        write_json(folder / file.name, kept)
