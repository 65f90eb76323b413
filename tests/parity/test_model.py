"""Our gpt-oss against transformers' in float32: logits, loss, gradients, generation."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from tests import tiny
from tests.stock import stock_base
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Mxfp4Config

from ossia.errors import OssiaError
from ossia.model.folder import resolve_model
from ossia.model.load import load_model


@pytest.fixture(scope="module")
def reference(tiny_gpt_oss):
    model = stock_base(tiny_gpt_oss)
    model.config.output_router_logits = False
    return model


@pytest.mark.parametrize("experts", ["mxfp4", "dequantized"])
def test_logits_equal_transformers(tiny_gpt_oss, reference, experts):
    ids = torch.randint(0, 256, (2, 41))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ours = load_model(tiny_gpt_oss, experts=experts)
    with torch.no_grad():
        got, want = ours(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits
    assert (got - want)[mask.bool()].abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_embedding_gradient_equal_transformers(tiny_gpt_oss, reference, smoothing):
    ids, weights = torch.randint(0, 256, (2, 19)), torch.rand(2, 19)
    weights[:, :5] = 0
    ours = load_model(tiny_gpt_oss, experts="mxfp4")
    grads = []
    for model in (ours, reference):
        table = model.get_input_embeddings().weight
        table.requires_grad_(True)
        if model is ours:
            mask = torch.ones_like(ids)
            loss = model(ids, labels=ids, loss_weights=weights, label_smoothing=smoothing, attention_mask=mask).loss
        else:
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
            options = {"reduction": "none", "label_smoothing": smoothing}
            loss = (F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], **options) * weights[:, 1:]).sum()
        grads.append((loss.detach(), torch.autograd.grad(loss, table)[0]))
        table.requires_grad_(False)
    (loss, grad), (expected, expected_grad) = grads
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert (grad - expected_grad).norm() < 1e-4 * expected_grad.norm()


def test_greedy_text_equals_transformers(tiny_gpt_oss, reference):
    ids = torch.randint(0, 256, (1, 23))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(load_model(tiny_gpt_oss).generate(ids, **options), reference.generate(ids, **options))


def test_dense_checkpoint_loads_the_same(tiny_gpt_oss, reference, tmp_path):
    reference.save_pretrained(tmp_path, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_gpt_oss / name).read_bytes())
    ids = torch.randint(0, 256, (1, 11))
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path)(ids).logits, load_model(tiny_gpt_oss)(ids).logits, atol=1e-5)


def test_floats_under_blocks_names_are_refused(tiny_gpt_oss, tmp_path):
    """What transformers up to 5.23 writes by default after dequantizing: bf16 under `*_blocks`, read back as noise."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in tiny_gpt_oss.glob("*.safetensors"):
        tensors |= load_file(file)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    tensors[name] = torch.zeros(4, 32, 64, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_gpt_oss / "config.json").read_bytes())
    with pytest.raises(OssiaError, match=f"{name} holds torch.bfloat16, not MXFP4.*save_original_format=False"):
        load_model(tmp_path)


def test_what_transformers_saves_after_dequantizing_is_refused_or_right(tiny_gpt_oss, tmp_path):
    """By default, which up to 5.23 loses the experts."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_gpt_oss, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    if Version(transformers.__version__) >= Version("5.24"):
        ids = torch.randint(0, 256, (1, 11))
        assert torch.allclose(load_model(tmp_path)(ids).logits, load_model(tiny_gpt_oss)(ids).logits, atol=1e-5)
        return
    with pytest.raises(OssiaError, match=r"experts\..*save_original_format=False"):
        load_model(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tiny_gpt_oss, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in tiny_gpt_oss.glob("*.safetensors"):
        tensors |= load_file(file)
    config = (tiny_gpt_oss / "config.json").read_bytes()

    def broken(name: str, change) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        copy = dict(tensors)
        change(copy)
        save_file(copy, folder / "model.safetensors")
        with pytest.raises(OssiaError) as caught:
            load_model(folder)
        return str(caught.value)

    assert "missing, first model.norm.weight" in broken("a", lambda t: t.pop("model.norm.weight"))
    assert "1 tensor of no use in this architecture, first model.extra" in broken(
        "b", lambda t: t.update({"model.extra": torch.ones(1)})
    )
    assert "model.norm.weight is (3,)" in broken("c", lambda t: t.update({"model.norm.weight": torch.ones(3)}))


def test_folder_without_weights_and_cut_file(tiny_gpt_oss, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_gpt_oss / "config.json").read_bytes())
    with pytest.raises(OssiaError, match="no weights"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(next(tiny_gpt_oss.glob("*.safetensors")).read_bytes()[:1000])
    with pytest.raises(OssiaError, match="damaged or cut short"):
        resolve_model(str(tmp_path))


def test_router_loss_of_the_config_stays_off(tiny_gpt_oss):
    assert load_model(tiny_gpt_oss).config.output_router_logits is False


def test_only_padding_on_the_left_takes_the_quadratic_path(tmp_path, monkeypatch):
    from ossia.kernels import attention as kernels
    from ossia.model import attention

    model = load_model(tiny.gpt_oss(tmp_path / "model", spread=0.1))
    ids, full = torch.randint(0, 256, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    right, left = full.clone(), full.clone()
    right[0, 13:] = 0
    left[0, :7] = 0
    calls = []

    def fastest(q, k, v, sinks, scale, window, bounds, longest, whole_by_cudnn):
        calls.append(window)
        return kernels.reference(q, k, v, sinks, scale, window, bounds).float()

    monkeypatch.setattr(attention.attention, "fastest", fastest)
    for mask, ours in ((None, True), (full, True), (right, True), (left, False)):
        real = (full if mask is None else mask).bool()
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            want = model(ids, attention_mask=mask).logits[real]
            model.config._attn_implementation = attention.NAME
            calls.clear()
            got = model(ids, attention_mask=mask).logits[real]
        assert calls == ([8, None] if ours else [])
        assert (got - want).norm() < (1e-2 if ours else 1e-6) * want.norm()
    calls.clear()  # and now a prompt, then one token at a time
    model.config._attn_implementation = "eager"
    want = model.generate(
        ids, attention_mask=full, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    model.config._attn_implementation = attention.NAME
    got = model.generate(
        ids, attention_mask=full, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert (got.logits[0] - want.logits[0]).norm() < 1e-2 * want.logits[0].norm()
    assert calls == [8, None]
