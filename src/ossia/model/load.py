"""Loads a model tensor by tensor, straight to its device; gpt-oss's experts stay as they are on disk."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from ossia.compat import untested_libraries
from ossia.console import counted, progress, say
from ossia.errors import OssiaError, UsageError, nearest
from ossia.kernels.available import HAS_TRITON
from ossia.kernels.mxfp4 import dequantize
from ossia.model import attention
from ossia.model.folder import by_file, holds_mxfp4, read_json, resolve_model, weight_files
from ossia.model.gpt_oss import OssiaGptOssForCausalLM
from ossia.model.stream import Stored, find_tensors, page_locked, read_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(
    name: str | Path,
    *,
    torch_dtype: str = "auto",
    device: str = "auto",
    experts: str = "auto",
    attn_impl: str = "auto",
    offload: Collection[str] = (),
) -> PreTrainedModel:
    """A causal language model, frozen, in evaluation mode.

    gpt-oss becomes an `OssiaGptOssForCausalLM`; any other architecture is transformers' own.

    Args:
        name: folder or hub id.
        torch_dtype: `auto`, `bfloat16` or `float32`; auto is bfloat16 on a GPU, float32 on a CPU.
        device: `auto`, `cuda` or `cpu`.
        experts: `auto`, `mxfp4` or `dequantized` (gpt-oss with MXFP4 on disk).
        attn_impl: `auto`, `flash`, `eager` or `flex_attention`; for gpt-oss.
        offload: names of parameters that stay in page-locked host memory when the device is a GPU.

    Raises:
        OssiaError: missing, extra or misshapen tensors, each named.
    """
    _say_untested()
    folder = resolve_model(str(name))
    where = pick_device(device)
    dtype = pick_dtype(torch_dtype, where)
    if read_json(folder / "config.json").get("model_type") == "gpt_oss":
        model: PreTrainedModel = _load_gpt_oss(folder, dtype, where, experts, attn_impl, offload)
    else:
        model = _load_other(folder, dtype, where, offload)
    model.requires_grad_(False)
    return model.eval()


@functools.cache
def _say_untested() -> None:
    """Once a process."""
    for line in untested_libraries():
        say(line)


def pick_device(device: str) -> torch.device:
    """The device that a `--device` value means here; in a run of several processes, this process's GPU."""
    import os

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine shows no CUDA GPU to PyTorch")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def path_lines(device: torch.device, dropout: bool) -> list[str]:
    """Which kernels a gpt-oss run on a GPU from Ampere on takes, and what is slow about them."""
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    whole = "cuDNN" if hopper else "FlashAttention 2"
    lines = [f"kernels: attention by {'Triton in windows, ' if HAS_TRITON else ''}{whole} elsewhere"]
    if not HAS_TRITON:
        lines.append("kernels: Triton is not installed, so experts, norms and loss take PyTorch's operations (slow)")
    elif dropout:
        lines.append("kernels: --lora_dropout is above 0, so adapters are not fused into their products (slow)")
    if not hopper:
        lines.append("kernels: torch multiplies experts one by one below compute capability 9.0 (slow)")
    return lines


def pick_dtype(torch_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a `--torch_dtype` value means on a device.

    Raises:
        UsageError: bfloat16 on a GPU before Ampere, which has none.
    """
    if torch_dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = DTYPES[torch_dtype]
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise UsageError(
            f"--torch_dtype {torch_dtype}: {name} (compute capability {major}.{minor}) has no bfloat16, and gpt-oss "
            "overflows in float16. Use a GPU from Ampere (8.0) on, --torch_dtype float32 or --device cpu"
        )
    return dtype


def _load_other(folder: Path, dtype: torch.dtype, device: torch.device, offload: Collection[str]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise OssiaError(f"{folder}: does not load ({' '.join(str(error).split())[:300]})") from error
    model, info = loaded
    _check_names(folder, set(info["missing_keys"]), set(info["unexpected_keys"]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_offload(offload, parameters)
    model = model.to(device)
    for name in offload:
        parameters[name].data = on_host(parameters[name].data)
    return model


def _load_gpt_oss(
    folder: Path, dtype: torch.dtype, device: torch.device, experts: str, attn_impl: str, offload: Collection[str]
) -> OssiaGptOssForCausalLM:
    files = weight_files(folder)
    on_disk_mxfp4 = holds_mxfp4(files)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    quantized = on_disk_mxfp4 and _keep_mxfp4(config, dtype, device, experts)
    model = unfilled(config, dtype, device, quantized, attn_impl)
    _fill(model, folder, files, dtype, device, offload)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def unfilled(
    config: GptOssConfig, dtype: torch.dtype, device: torch.device, quantized: bool, attn_impl: str = "auto"
) -> OssiaGptOssForCausalLM:
    """gpt-oss whose weights are on no device yet; `put` gives them. What it computes by is set in `config`."""
    config._attn_implementation = _attention(attn_impl, dtype, device)
    # Left on, the auxiliary loss of the released config (0.9) would outweigh the language-model loss; TRL turns it on
    # where the coefficient is not 0.
    config.output_router_logits, config.router_aux_loss_coef = False, 0.0
    config.dtype = dtype
    with torch.device("meta"):
        model = OssiaGptOssForCausalLM(config, quantized=quantized)
    model.model.rotary_emb = attention.RotaryEmbedding(config).to(device)
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


def _fill(
    model: nn.Module,
    folder: Path,
    files: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    offload: Collection[str],
) -> None:
    wanted = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **{k: v for k, v in model.named_buffers() if not k.startswith("model.rotary")},
    }
    _check_offload(offload, wanted)
    if device.type == "cpu":
        offload = ()
    tied = model.config.tie_word_embeddings and "lm_head.weight" not in files  # type: ignore[union-attr]
    if tied:
        del wanted["lm_head.weight"]
    grouped = by_file(files)
    stored = find_tensors(grouped)
    _check_stored(folder, stored, wanted)
    host = [name for name in offload if name in stored and stored[name].dtype == _dtype(name, dtype)]
    halves: dict[str, Tensor] = {}
    size = sum(entry.nbytes for entry in stored.values()) / 1e9
    started = time.monotonic()
    with progress(f"loading {folder.name}", round(size, 2), "GB") as advance:
        for name, tensor in read_tensors(grouped, device, host):
            for key, value in _placed(name, tensor, wanted, halves, dtype):
                put(model, key, on_host(value) if key in offload else value)
            advance(stored[name].nbytes / 1e9)
    seconds = time.monotonic() - started
    if size >= 1:
        say(f"loaded {size:.1f} GB in {seconds:.1f} s")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]


def _check_offload(offload: Collection[str], known: Collection[str]) -> None:
    for name in offload:
        if name not in known:
            raise OssiaError(f"offload: the model has no {name}{nearest(name, known)}")


def _check_stored(folder: Path, stored: dict[str, Stored], wanted: dict[str, Tensor]) -> None:
    """Hold what the files' headers say against the model: dtypes, shapes, then names."""
    expected: dict[str, tuple[int, ...]] = {}
    for key, value in wanted.items():
        if value.ndim == 3 and (f"{key}_blocks" in stored or f"{key}_scales" in stored):
            experts, inputs, outputs = value.shape
            expected[f"{key}_blocks"] = (experts, outputs, inputs // 32, 16)
            expected[f"{key}_scales"] = (experts, outputs, inputs // 32)
        else:
            expected[key] = tuple(value.shape)
    for name, entry in stored.items():
        if name.endswith(("_blocks", "_scales")):
            if entry.dtype != torch.uint8:
                raise OssiaError(
                    f"{folder}: {name} holds {entry.dtype}, not MXFP4; transformers wrote it so after dequantizing and "
                    "its experts cannot be read back. Save the model again with save_original_format=False."
                )
        elif name in expected and not entry.dtype.is_floating_point:
            raise OssiaError(f"{folder}: {name} holds {entry.dtype}, gpt-oss has floating point there")
        if name in expected and entry.shape != expected[name]:
            raise OssiaError(f"{folder}: {name} is {entry.shape}, config.json says {expected[name]}")
    _check_names(folder, expected.keys() - stored.keys(), stored.keys() - expected.keys())


def _placed(
    name: str, tensor: Tensor, wanted: dict[str, Any], halves: dict[str, Tensor], dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    """What a tensor on disk becomes in the model: itself, or with its other half a dequantized weight."""
    stem, _, half = name.rpartition("_")
    if half in ("blocks", "scales"):
        if name in wanted:
            return [(name, tensor)]
        halves[name] = tensor
        if f"{stem}_blocks" not in halves or f"{stem}_scales" not in halves:
            return []
        dense = dequantize(halves.pop(f"{stem}_blocks"), halves.pop(f"{stem}_scales"), dtype)
        return [(stem, dense.transpose(1, 2))]
    return [(name, tensor.to(_dtype(name, dtype)))]


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if ".router." in name else dtype


def on_host(tensor: Tensor) -> Tensor:
    """A GPU's tensor in page-locked host memory; a CPU's as it is."""
    if tensor.device.type == "cpu":
        return tensor
    return page_locked(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the model's parameter or buffer of that name, frozen."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
    setattr(module, leaf, held)


def _check_names(folder: Path, missing: set[str], extra: set[str]) -> None:
    if missing:
        first = sorted(missing)[0]
        # transformers 5.17 leaves experts out where 5.23 writes floats under the blocks' names.
        experts = ".experts." in first and all(".experts." in name for name in missing)
        hint = ": if it was dequantized and saved, save it again with save_original_format=False" if experts else ""
        raise OssiaError(f"{folder}: {counted(len(missing), 'tensor')} missing, first {first}{hint}")
    if extra:
        raise OssiaError(
            f"{folder}: {counted(len(extra), 'tensor')} of no use in this architecture, first {sorted(extra)[0]}"
        )
