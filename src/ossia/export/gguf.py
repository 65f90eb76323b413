"""Base + adapter → one GGUF file for llama.cpp and Ollama, its experts in MXFP4.

Names, types and metadata are those of llama.cpp's own converter (`conversion/gpt_oss.py` there). llama.cpp has the
constants of the released gpt-oss built in, so a base with others is refused.

E experts, O outputs, G blocks of a row, B the 17 bytes of a block: its scale, then its codes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ossia.console import progress, say
from ossia.errors import OssiaError, UsageError
from ossia.export.calibrate import Calibration
from ossia.export.folder import check_output
from ossia.export.merge import CALIBRATION, check_space, key_of, merged_units, write_report
from ossia.export.shards import Done, Part, Rounding, Unit
from ossia.export.tensors import RowWriter
from ossia.kernels.mxfp4 import BLOCK
from ossia.model.folder import by_file, read_json, weight_files

FILE, MODELFILE = "model-mxfp4.gguf", "Modelfile"

_MODEL: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("token_embd.weight",),
    "model.norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
}
_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("attn_norm.weight",),
    "post_attention_layernorm.weight": ("post_attention_norm.weight",),
    "self_attn.sinks": ("attn_sinks.weight",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}
for _half in ("weight", "bias"):
    _LAYER[f"mlp.router.{_half}"] = (f"ffn_gate_inp.{_half}",)
    for _theirs, _ours in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"), ("o_proj", "attn_output")):
        _LAYER[f"self_attn.{_theirs}.{_half}"] = (f"{_ours}.{_half}",)
"""llama.cpp's names by the base's; where there are two, outputs go to them by turns."""

_BLOCK_BYTES = 1 + BLOCK // 2

# How o200k splits text; llama.cpp calls it gpt-4o.
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ollama takes no chat template out of a GGUF, and reads answers as harmony only where it finds harmony in TEMPLATE.
_MODELFILE = f'''FROM ./{FILE}
TEMPLATE """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06

Reasoning: {{{{ or .ThinkLevel "medium" }}}}

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>
{{{{- range .Messages }}}}
{{{{- if eq .Role "system" }}}}<|start|>developer<|message|># Instructions

{{{{ .Content }}}}<|end|>
{{{{- else if eq .Role "user" }}}}<|start|>user<|message|>{{{{ .Content }}}}<|end|>
{{{{- else if eq .Role "assistant" }}}}<|start|>assistant<|channel|>final<|message|>{{{{ .Content }}}}<|end|>
{{{{- end }}}}
{{{{- end }}}}<|start|>assistant"""
PARAMETER temperature 1
PARAMETER stop "<|return|>"
PARAMETER stop "<|call|>"
'''


class Planned(NamedTuple):
    """A tensor of the file: its type, its shape in values, slowest axis first, and its size."""

    type: Type
    shape: tuple[int, ...]
    nbytes: int


def merge_gguf(
    base: Path,
    adapter: Path,
    output: Path,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
) -> Path:
    """Write the merged model to `output`, with licence and Ollama's Modelfile, complete or not at all.

    Weights are those of `merge` with its `dtype` None, and so is `export_report.json`. The file is read back before the
    folder gets its name. What a stopped export has finished stays in `.NAME.part` beside `output`, also when it is
    killed in the middle of a tensor, and the same call goes on from there.

    Args:
        base: folder of a gpt-oss, experts in MXFP4 or floating point.
        adapter: folder in PEFT's layout.
        output: must not exist, or be empty.
        calibration, device: as in `merge`.

    Raises:
        UsageError: `output` is not empty, or a base that llama.cpp would compute otherwise.
        OssiaError: as `merge`; a tokenizer that llama.cpp does not have; a file that reads back otherwise.
    """
    check_output(output)
    config = _checked_config(base)
    names = _names(config.num_hidden_layers)
    files = by_file(weight_files(base))
    units = merged_units(base, files, adapter, None, calibration, device)
    planned = _plan(base, units, names)
    part = Part(output, key_of(files, adapter, calibration, format="gguf"), "tensors")
    to_do = [unit for unit in units if _label(unit) not in part.done]
    left = sum(planned[name].nbytes for unit in to_do for name in _targets(unit, names))
    check_space(left + (calibration.nbytes if calibration and left else 0), output)
    with part.kept_over_stops():
        part.folder.mkdir(parents=True, exist_ok=True)
        file = part.folder / FILE
        head, spans = _head(part.folder / "head", base, output.name, config, planned)
        writer = RowWriter(file, head, spans, resumes=True)
        if not writer.resumed:
            part.forget()
        elif part.done:
            say(f"going on with a stopped export: {len(part.done)} of {len(units)} tensors are finished")
        if calibration and len(part.done) < len(units):
            calibration.collect(part.folder / CALIBRATION)
        _write(writer, part, units, names, planned)
        os.truncate(file, gguf.GGUFWriter.ggml_pad(file.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT))
        check_file(
            file, planned, {name: found for done in part.done.values() for name, found in done["digests"].items()}
        )
        for licence in base.glob("LICENSE*"):
            shutil.copyfile(licence, part.folder / licence.name)
        (part.folder / MODELFILE).write_text(_MODELFILE, encoding="utf-8")
        if roundings := part.roundings():
            write_report(part.folder, roundings)
        shutil.rmtree(part.folder / CALIBRATION, ignore_errors=True)
        part.finish(output)
    return output


def _checked_config(base: Path) -> Any:
    """The base's configuration with transformers' defaults; UsageError where llama.cpp computes something else."""
    if read_json(base / "config.json").get("model_type") != "gpt_oss":
        raise UsageError(f"--format gguf: {base} is no gpt-oss; take --format bf16 and llama.cpp's own converter")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    alternating = [("sliding_attention", "full_attention")[n % 2] for n in range(config.num_hidden_layers)]
    for key, there, wanted in (
        ("swiglu_alpha", config.swiglu_alpha, 1.702),
        ("swiglu_limit", config.swiglu_limit, 7.0),
        ("layer_types", config.layer_types, alternating),
    ):
        if there != wanted:
            raise UsageError(
                f"--format gguf: {base / 'config.json'} has {key} {there}, and llama.cpp computes gpt-oss with "
                f"{wanted} alone; take --format bf16 or mxfp4"
            )
    if config.rope_parameters["rope_type"] not in ("default", "yarn"):
        raise UsageError(
            f"--format gguf: {base / 'config.json'} has rope_type {config.rope_parameters['rope_type']}; written are "
            "default and yarn; take --format bf16 or mxfp4"
        )
    return config


def _names(layers: int) -> dict[str, tuple[str, ...]]:
    """llama.cpp's names of a whole model by the base's, experts without `_blocks` and `_scales`."""
    names = dict(_MODEL)
    for layer in range(layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{layer}.{theirs}"] = tuple(f"blk.{layer}.{name}" for name in ours)
    return names


def _plan(base: Path, units: list[Unit], names: dict[str, tuple[str, ...]]) -> dict[str, Planned]:
    """What the file will hold, by llama.cpp's names; OssiaError where the base has more or less than these."""
    found = {}
    for unit in units:
        for name, spec in unit.outputs.items():
            if not name.endswith("_scales"):
                found[name.removesuffix("_blocks")] = spec.shape, name.endswith("_blocks")
    if odd := found.keys() ^ names.keys():
        name = min(odd)
        raise OssiaError(f"{base}: {'no' if name in names else 'there is'} {name}, unlike in llama.cpp's gpt-oss")
    planned = {}
    for name, (shape, packed) in found.items():
        for ours in names[name]:
            parts = shape
            if len(names[name]) == 2:
                parts = shape[0], shape[1] // 2, *shape[2:]
            if packed:
                experts, outputs, groups, _ = parts
                size = experts * outputs * groups * _BLOCK_BYTES
                planned[ours] = Planned(Type.MXFP4, (experts, outputs, groups * BLOCK), size)
            else:
                kind = Type.BF16 if _is_matrix(ours) else Type.F32
                planned[ours] = Planned(kind, parts, torch.Size(parts).numel() * (2 if kind == Type.BF16 else 4))
    return planned


def _is_matrix(name: str) -> bool:
    """False of norms, biases, sinks and routers, which llama.cpp wants in float32."""
    return name.endswith(".weight") and not name.endswith(("norm.weight", "attn_sinks.weight", "ffn_gate_inp.weight"))


def _label(unit: Unit) -> str:
    return next(iter(unit.outputs))


def _targets(unit: Unit, names: dict[str, tuple[str, ...]]) -> list[str]:
    """A unit's tensors by llama.cpp's names."""
    found = [name.removesuffix("_blocks") for name in unit.outputs if not name.endswith("_scales")]
    return [ours for name in found for ours in names[name]]


def _write(
    writer: RowWriter, part: Part, units: list[Unit], names: dict[str, tuple[str, ...]], planned: dict[str, Planned]
) -> None:
    """Write the tensors that are not there yet; each is recorded, with its sha256, when it is on the disk."""
    with writer, progress("merging", len(units), "tensors") as advance:
        for unit in units:
            targets = _targets(unit, names)
            if _label(unit) in part.done:
                for target in targets:
                    writer.pass_over(target)
                advance(1)
                continue
            roundings: dict[str, Rounding] = {}
            hashes = {target: hashlib.sha256() for target in targets}
            for name, rows in _rows(unit, roundings):
                ours = names[name]
                for turn, target in enumerate(ours):
                    own = rows if len(ours) == 1 else rows[:, turn :: len(ours)]
                    kind = planned[target].type
                    own = (own if kind == Type.MXFP4 else own.to(_DTYPES[kind])).contiguous()
                    hashes[target].update(own.view(-1).view(torch.uint8).numpy().data)
                    writer.write(target, own)
            digests = {name: found.hexdigest() for name, found in hashes.items()}
            writer.once_written(partial(part.record, _label(unit), Done(roundings=roundings, digests=digests)))
            advance(1)


_DTYPES = {Type.F32: torch.float32, Type.BF16: torch.bfloat16}


def _rows(unit: Unit, roundings: dict[str, Rounding]) -> Iterator[tuple[str, Tensor]]:
    """A unit's rows by the base's names; blocks and scales together, as `pack_blocks` has them."""
    made = unit.make(roundings)
    for name, rows in made:
        if name.endswith("_blocks"):
            yield name.removesuffix("_blocks"), pack_blocks(rows, next(made)[1]).cpu()
        else:
            yield name, rows.cpu()


def pack_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, O, G, 16] and [E, O, G] in OpenAI's layout → ggml's blocks uint8 [E, O, G * B].

    A byte of OpenAI's has values 2i and 2i + 1 of its block, the lower half first; one of ggml's i and i + 16.
    """
    values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    low, high = values.chunk(2, dim=-1)
    return torch.cat((scales.unsqueeze(-1), low | (high << 4)), dim=-1).flatten(-2)


def _head(
    file: Path, base: Path, name: str, config: Any, planned: dict[str, Planned]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's bytes before the tensors', and the place of each tensor."""
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT_OSS])
    for tensor, (kind, shape, nbytes) in planned.items():
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    _add_model(writer, name, config)
    _add_tokenizer(writer, base, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    head = file.read_bytes()
    file.unlink()
    end = writer.ggml_pad(len(head), writer.data_alignment)
    head += bytes(end - len(head))
    spans = {}
    for tensor, plan in planned.items():
        spans[tensor] = end, end + plan.nbytes
        end += writer.ggml_pad(plan.nbytes, writer.data_alignment)
    return head, spans


def _add_model(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        optional: tuple[tuple[str, Callable[[float], None]], ...] = (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        )
        for key, add in optional:
            if rope.get(key) is not None:
                add(rope[key])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path, size: int) -> None:
    """Tokens, merges, special ids and chat template; OssiaError for a tokenizer that does not split as o200k does."""
    file = base / "tokenizer.json"
    if not file.is_file():
        raise OssiaError(f"{base}: no tokenizer.json, which a GGUF file holds; put it there")
    tokenizer = read_json(file)
    if tokenizer["model"].get("type") != "BPE" or _SPLIT not in _patterns(tokenizer["pre_tokenizer"]):
        raise OssiaError(f"{file}: splits text otherwise than o200k, gpt-oss's tokenizer; take --format bf16 or mxfp4")
    vocabulary, added_tokens = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    if (last := max(*vocabulary.values(), *(added["id"] for added in added_tokens))) >= size:
        raise OssiaError(f"{file}: has token {last}, and {base / 'config.json'} a vocab_size of {size}")
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in added_tokens:
        token, index = added["content"], added["id"]
        control = added["special"] or (token.startswith("<|") and token.endswith("|>"))
        tokens[index] = token
        types[index] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(base, load_merges=True, n_vocab=size)
    special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
    special.add_to_gguf(writer, quiet=True)


def _patterns(pre_tokenizer: Any) -> list[str]:
    """Expressions that a tokenizer splits text by."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    return [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]


def check_file(file: Path, planned: dict[str, Planned], digests: dict[str, str]) -> None:
    """Read a GGUF file by its own directory. OssiaError where a tensor is missing or is not what was meant."""
    say(f"reading {file.name} back")
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise OssiaError(f"{file.name}: reads back damaged ({error}); check the disk, and export again") from error
    wrong = [*(tensors.keys() ^ planned.keys())]
    with file.open("rb", buffering=0) as opened:
        for name in planned.keys() & tensors.keys():
            tensor = tensors[name]
            there = Planned(tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.n_bytes)
            opened.seek(tensor.data_offset)
            if there != planned[name] or _digest(opened, tensor.n_bytes) != digests[name]:
                wrong.append(name)
    if wrong:
        raise OssiaError(f"{file.name}: {min(wrong)} reads back otherwise; check the disk and memory, and export again")


def _digest(opened: Any, size: int) -> str:
    found = hashlib.sha256()
    while size and (piece := opened.read(min(size, 8 << 20))):
        found.update(piece)
        size -= len(piece)
    return found.hexdigest()
