"""The model of a planned run: its configuration, and what of it lies on this machine. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossia.adapters.targets import linear_layers
from ossia.errors import OssiaError, UsageError
from ossia.model.folder import HUB_ID, holds_mxfp4, read_json, resolve_model, weight_files
from ossia.model.sizes import SIZES

KNOWN = {f"{owner}gpt-oss-{size}": size for size in ("20b", "120b") for owner in ("openai/", "")}


@dataclass(frozen=True)
class Base:
    """A gpt-oss model.

    Args:
        name: as it was given.
        config: its config.json.
        quantized: whether its experts are stored in MXFP4.
        linear: names of its linear layers.
        folder: where its files are; None: nowhere here.
        weights: whether its weights are there too.
    """

    name: str
    config: dict[str, Any]
    quantized: bool
    linear: list[str]
    folder: Path | None = None
    weights: bool = False

    @property
    def tokenizer(self) -> bool:
        """Whether its tokenizer lies here."""
        return self.folder is not None and (self.folder / "tokenizer.json").is_file()


def find_base(name: str) -> Base:
    """What `--model` names.

    Raises:
        UsageError: a hub id that is neither known nor in the hub's cache here.
        OssiaError: a model that is no gpt-oss.
    """
    folder = resolve_model(name, weights=False) if Path(name).expanduser().is_dir() else _in_cache(name)
    if folder is None:
        if name in KNOWN:
            config = SIZES[KNOWN[name]]
            return Base(name, config, True, linear_layers(config))
        known = ", ".join(list(KNOWN)[::2])
        raise UsageError(
            f"--model {name}: not on this machine, and ossia plan downloads nothing. Give a folder (its config.json is "
            f"enough), or {known}"
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != "gpt_oss":
        raise OssiaError(
            f"--model {name}: a {kind} model. Plans are made for gpt-oss; others train on transformers' own path, "
            "whose memory is not known beforehand"
        )
    missing = [key for key in SIZES["20b"] if key not in config]
    if missing:
        raise OssiaError(f"{folder / 'config.json'}: no {missing[0]} in it; is it gpt-oss's own?")
    try:
        stored = weight_files(folder)
    except OssiaError:
        quantized = config.get("quantization_config", {}).get("quant_method") == "mxfp4"
        return Base(name, config, quantized, linear_layers(config), folder)
    return Base(name, config, holds_mxfp4(stored), linear_layers(config), folder, True)


def _in_cache(name: str) -> Path | None:
    """The hub's own cache of a model."""
    if not HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None
