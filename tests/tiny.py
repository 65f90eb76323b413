"""Tiny random checkpoints in real layouts, made in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ossia.kernels.mxfp4 import quantize

HARMONY = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>")
HARMONY += ("<|message|>", "<|call|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, special: tuple[str, ...], pad: str, eos: str, chat_template: str | None) -> int:
    """A byte-level tokenizer of 256 bytes and the special tokens; returns the vocabulary's size."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def gpt_oss(
    folder: Path, *, hidden: int = 64, intermediate: int = 32, layers: int = 2, seed: int = 0, spread: float = 0.2
) -> Path:
    """A random gpt-oss, experts in MXFP4, in the layout of openai/gpt-oss-20b, two shards; weights of deviation
    `spread`."""
    folder.mkdir(parents=True)
    size = save_tokenizer(folder, HARMONY, "<|endoftext|>", "<|return|>", None)
    vocabulary, experts, heads, kv_heads, head_dim = size + size % 2, 4, 4, 2, 16
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = spread) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for layer in range(layers):
        prefix, shard = f"model.layers.{layer}.", shards[layer % 2]
        for name, outputs, inputs in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)):
            blocks, scales = quantize(normal(experts, outputs, inputs).float())
            shard[f"{prefix}mlp.experts.{name}_proj_blocks"] = blocks
            shard[f"{prefix}mlp.experts.{name}_proj_scales"] = scales
            shard[f"{prefix}mlp.experts.{name}_proj_bias"] = normal(experts, outputs)
        shard[f"{prefix}mlp.router.weight"], shard[f"{prefix}mlp.router.bias"] = (
            normal(experts, hidden),
            normal(experts),
        )
        shard[f"{prefix}input_layernorm.weight"] = 1 + normal(hidden)
        shard[f"{prefix}post_attention_layernorm.weight"] = 1 + normal(hidden)
        shard[f"{prefix}self_attn.sinks"] = normal(heads, std=1.0)
        for name, outputs, inputs in (
            ("q", heads * head_dim, hidden),
            ("k", kv_heads * head_dim, hidden),
            ("v", kv_heads * head_dim, hidden),
            ("o", hidden, heads * head_dim),
        ):
            shard[f"{prefix}self_attn.{name}_proj.weight"] = normal(outputs, inputs)
            shard[f"{prefix}self_attn.{name}_proj.bias"] = normal(outputs)
    shards[0]["model.embed_tokens.weight"] = normal(vocabulary, hidden, std=1.0)
    shards[1]["model.norm.weight"], shards[1]["lm_head.weight"] = 1 + normal(hidden), normal(vocabulary, hidden)
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index:05d}-of-{len(shards) - 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    dump(
        folder / "config.json",
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocabulary,
            "sliding_window": 8,
            "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
            "attention_bias": True,
            "swiglu_limit": 7.0,
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "output_router_logits": True,
            "eos_token_id": 258,
            "pad_token_id": 257,
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
        },
    )
    return folder


def llama(folder: Path) -> Path:
    """A random Llama with a ChatML template."""
    folder.mkdir(parents=True)
    size = save_tokenizer(folder, ("<|pad|>", "<|im_start|>", "<|im_end|>"), "<|pad|>", "<|im_end|>", CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=size - 1,
        pad_token_id=size - 3,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(path: Path, count: int = 12) -> Path:
    """A JSONL file of short rows with reasoning."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{n}+1?"},
                {"role": "assistant", "thinking": f"{n}+1={n + 1}", "content": f"是 {n + 1}."},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def dump(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
