"""Loads a model tensor by tensor, straight to its device; gpt-oss's experts stay as they are on disk."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from ossia.console import progress, say
from ossia.errors import OssiaError, UsageError
from ossia.kernels.mxfp4 import dequantize
from ossia.model import attention
from ossia.model.folder import read_json, resolve_model, weight_files
from ossia.model.gpt_oss import OssiaGptOssForCausalLM

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(
    name: str | Path,
    *,
    torch_dtype: str = "auto",
    device: str = "auto",
    experts: str = "auto",
    attn_impl: str = "auto",
) -> PreTrainedModel:
    """A causal language model, frozen, in evaluation mode.

    gpt-oss becomes an `OssiaGptOssForCausalLM`; any other architecture is transformers' own.

    Args:
        name: folder or hub id.
        torch_dtype: `auto`, `bfloat16` or `float32`; auto is bfloat16 on a GPU, float32 on a CPU.
        device: `auto`, `cuda` or `cpu`.
        experts: `auto`, `mxfp4` or `dequantized` (gpt-oss with MXFP4 on disk).
        attn_impl: `auto`, `flash`, `eager` or `flex_attention`; for gpt-oss.

    Raises:
        OssiaError: missing, extra or misshapen tensors, each named.
    """
    folder = resolve_model(str(name))
    where = pick_device(device)
    dtype = pick_dtype(torch_dtype, where)
    if read_json(folder / "config.json").get("model_type") == "gpt_oss":
        model: PreTrainedModel = _load_gpt_oss(folder, dtype, where, experts, attn_impl)
    else:
        model = _load_other(folder, dtype, where)
    model.requires_grad_(False)
    return model.eval()


def pick_device(device: str) -> torch.device:
    """The device that a `--device` value means here; in a run of several processes, this process's GPU."""
    import os

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine shows no CUDA GPU to PyTorch")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def pick_dtype(torch_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a `--torch_dtype` value means on a device."""
    if torch_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[torch_dtype]


def _load_other(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise OssiaError(f"{folder}: does not load ({' '.join(str(error).split())[:300]})") from error
    model, info = loaded
    _check_names(folder, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model.to(device)


def _load_gpt_oss(
    folder: Path, dtype: torch.dtype, device: torch.device, experts: str, attn_impl: str
) -> OssiaGptOssForCausalLM:
    files = weight_files(folder)
    on_disk_mxfp4 = any(name.endswith("_proj_blocks") for name in files)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = _attention(attn_impl, dtype, device)
    # Left on, the auxiliary loss of the released config (0.9) would outweigh the language-model loss.
    config.output_router_logits = False
    config.dtype = dtype
    quantized = on_disk_mxfp4 and _keep_mxfp4(config, dtype, device, experts)
    with torch.device("meta"):
        model = OssiaGptOssForCausalLM(config, quantized=quantized)
    _fill(model, folder, files, dtype, device)
    model.model.rotary_emb = GptOssRotaryEmbedding(config).to(device)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _attention(attn_impl: str, dtype: torch.dtype, device: torch.device) -> str:
    if attn_impl == "flash" and not attention.supports_flash(device, dtype):
        raise UsageError(f"--attn_impl flash needs bfloat16 on an NVIDIA GPU from Ampere on, not {dtype} on {device}")
    if attn_impl == "auto":
        attn_impl = "flash" if attention.supports_flash(device, dtype) else "eager"
    return attention.NAME if attn_impl == "flash" else attn_impl


def _keep_mxfp4(config: Any, dtype: torch.dtype, device: torch.device, experts: str) -> bool:
    if experts != "auto" or device.type == "cuda":
        return experts != "dequantized"
    values = config.num_hidden_layers * config.num_local_experts * 3 * config.hidden_size * config.intermediate_size
    need, free = values * dtype.itemsize, psutil.virtual_memory().available
    if need > free // 2:
        say(f"experts stay in MXFP4: dequantized they would take {need / 1e9:.1f} of {free / 1e9:.1f} GB free (slower)")
    return need > free // 2


def _fill(model: nn.Module, folder: Path, files: dict[str, Path], dtype: torch.dtype, device: torch.device) -> None:
    wanted = {
        **dict(model.named_parameters()),
        **{k: v for k, v in model.named_buffers() if not k.startswith("model.rotary")},
    }
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, file in files.items():
        by_file[file].append(name)
    filled: set[str] = set()
    extra: set[str] = set()
    halves: dict[str, Tensor] = {}
    size = sum(file.stat().st_size for file in by_file) / 1e9
    with progress(f"loading {folder.name}", round(size, 2), "GB") as advance:
        for file, names in by_file.items():
            try:
                with safe_open(file, framework="pt", device=str(device)) as opened:
                    for name in names:
                        for key, tensor in _placed(name, opened.get_tensor(name), wanted, halves, dtype, folder):
                            if key not in wanted:
                                extra.add(key)
                                continue
                            _put(model, key, tensor, wanted[key], folder)
                            filled.add(key)
            except SafetensorError as error:
                raise OssiaError(f"{file}: damaged or cut short ({error}); copy it again") from error
            advance(round(file.stat().st_size / 1e9, 2))
    missing = set(wanted) - filled
    if missing == {"lm_head.weight"} and model.config.tie_word_embeddings:  # type: ignore[union-attr]
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
        missing = set()
    _check_names(folder, missing, extra)


def _placed(
    name: str, tensor: Tensor, wanted: dict[str, Any], halves: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> list[tuple[str, Tensor]]:
    """What a tensor on disk becomes in the model: itself, or with its other half a dequantized weight."""
    stem, _, half = name.rpartition("_")
    if half in ("blocks", "scales"):
        if tensor.dtype != torch.uint8:
            raise OssiaError(
                f"{folder}: {name} holds {tensor.dtype}, not MXFP4; transformers wrote it so after dequantizing and "
                "its experts cannot be read back. Save the model again with save_original_format=False."
            )
        if name in wanted or stem not in wanted:
            return [(name, tensor)]
        halves[name] = tensor
        if f"{stem}_blocks" not in halves or f"{stem}_scales" not in halves:
            return []
        dense = dequantize(halves.pop(f"{stem}_blocks"), halves.pop(f"{stem}_scales"), dtype)
        return [(stem, dense.transpose(1, 2))]
    return [(name, tensor if ".router." in name else tensor.to(dtype))]


def _put(model: nn.Module, name: str, tensor: Tensor, wanted: Tensor, folder: Path) -> None:
    if tensor.shape != wanted.shape:
        raise OssiaError(f"{folder}: {name} is {tuple(tensor.shape)}, config.json says {tuple(wanted.shape)}")
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(wanted, nn.Parameter):
        setattr(module, leaf, nn.Parameter(tensor.float() if ".router." in name else tensor, requires_grad=False))
    else:
        setattr(module, leaf, tensor)


def _check_names(folder: Path, missing: set[str], extra: set[str]) -> None:
    if missing:
        raise OssiaError(f"{folder}: {len(missing)} tensors are missing, first {sorted(missing)[0]}")
    if extra:
        raise OssiaError(f"{folder}: {len(extra)} tensors fit nowhere in this architecture, first {sorted(extra)[0]}")
