"""Model folders: where one is, what is in it, and what is wrong with it, before anything loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ossia.console import counted
from ossia.errors import OssiaError, UsageError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """The absolute folder of a local model, or of a hub model after its download.

    Args:
        name: a folder, or `org/name` on the Hugging Face hub.
        weights: False needs configuration and tokenizer only.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
    elif HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        folder = _download(name, weights)
    else:
        raise UsageError(f"--model {name}: no such folder, and not a hub id such as openai/gpt-oss-20b")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {name}: no config.json in this folder; is it a model folder?")
    if weights:
        weight_files(folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model or adapter; OssiaError naming the file where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OssiaError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise OssiaError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → safetensors file. OssiaError names a missing or damaged file."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise OssiaError(f"{index}: no weight_map in it; download the file again")
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise OssiaError(
                f"{folder}: {counted(len(missing), 'weight file')} of the index missing, first {missing[0]}"
            )
        return {name: folder / file for name, file in names.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (found {others[0]}, which is not read)" if others else ""
        raise OssiaError(f"{folder}: no weights (*.safetensors){found}; download the model's weights into this folder")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update(dict.fromkeys(opened.keys(), file))
        except SafetensorError as error:
            raise OssiaError(f"{file}: damaged or cut short ({error}); copy it again") from error
    return tensors


def holds_mxfp4(tensors: Iterable[str]) -> bool:
    """Whether a model's experts are stored in MXFP4, by its tensors' names."""
    return any(name.endswith("_proj_blocks") for name in tensors)


def by_file(files: dict[str, Path]) -> dict[Path, list[str]]:
    """The tensors of each file, from what `weight_files` says."""
    found: dict[Path, list[str]] = {}
    for name, file in files.items():
        found.setdefault(file, []).append(name)
    return found


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "tokenizer*", "LICENSE*", *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["original/*", "metal/*"], etag_timeout=5
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OssiaError(f"--model {name}: no such folder here, and the hub did not give it ({reason})") from error
    return Path(folder)
