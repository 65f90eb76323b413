"""Packed rows are trained as if each stood alone: losses, gradients, attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import tiny
from transformers import AutoModelForCausalLM, Mxfp4Config

from ossia.adapters.inject import add_lora
from ossia.data.collate import Collator
from ossia.data.packing import pack
from ossia.data.store import TokenRow
from ossia.errors import UsageError
from ossia.kernels import attention
from ossia.model.gpt_oss import OssiaGptOssForCausalLM
from ossia.model.load import load_model
from ossia.train.trainer import check_packing, sums_of

COLLATE = Collator(pad_id=0)


def rows(count=9, longest=40, seed=0) -> list[TokenRow]:
    """Random rows whose first token, too, asks for loss, and whose labels are not all their ids."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(3, longest))
        ids, labels = (rng.integers(1, 250, length).astype(np.int32) for _ in range(2))
        found.append(TokenRow(ids, labels, rng.random(length).astype(np.float32)))
    return found


def test_layout():
    a, b, c = rows(3)
    batch = COLLATE([[a, b], [c]])
    length = max(len(a) + len(b), len(c))
    assert batch["input_ids"].shape == (2, length)
    assert batch["input_ids"][0, : len(a) + len(b)].tolist() == [*a.input_ids, *b.input_ids]
    assert batch["labels"][1, : len(c)].tolist() == c.labels.tolist()
    assert batch["position_ids"][0].tolist()[: len(a) + len(b)] == [*range(len(a)), *range(len(b))]
    rest = length - len(a) - len(b)
    sizes = [len(a), len(b), *([rest] if rest else []), len(c), *([length - len(c)] if length > len(c) else [])]
    assert batch["cu_seq_lens_q"].diff().tolist() == sizes
    assert batch["max_length_q"] == max(sizes)
    assert batch["loss_weights"][0, 0] == batch["loss_weights"][0, len(a)] == 0
    assert batch["loss_weights"][1, len(c) :].sum() == 0


@pytest.fixture(scope="module", params=["gpt-oss", "llama"])
def model(request, tiny_gpt_oss, tiny_llama):
    torch.manual_seed(0)
    base = load_model(tiny_gpt_oss if request.param == "gpt-oss" else tiny_llama, device="cpu")
    experts = "all" if request.param == "gpt-oss" else "none"
    model = add_lora(base, rank=4, alpha=16, target_modules=["all-linear"], target_experts=experts)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def loss_and_gradient(model, batch):
    model.zero_grad()
    sums = sums_of(model, batch)
    sums.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return sums.loss.detach(), sums.correct, gradient


def test_packed_and_padded_give_one_loss_and_one_gradient(model):
    found = rows()
    packs = pack([len(row) for row in found], 100)
    assert 1 < len(packs) < 5
    packed = COLLATE([[found[row] for row in one] for one in packs])
    padded = COLLATE(found)
    weight = [batch["loss_weights"][:, 1:].sum() for batch in (packed, padded)]
    assert torch.allclose(*weight)
    (loss, correct, gradient), (expected, right, exact) = (loss_and_gradient(model, b) for b in (packed, padded))
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert correct == right
    assert (gradient - exact).norm() < 1e-4 * exact.norm()


def test_a_row_sees_nothing_of_the_others(model):
    found = rows(4)
    batch = COLLATE([found])
    before = list(_logits(model, batch).split([len(row) for row in found]))
    found[1] = rows(2, seed=5)[1]
    found[1] = TokenRow(
        *(np.resize(part, len(rows(4)[1])) for part in (found[1].input_ids, found[1].labels, found[1].loss_weights))
    )
    after = _logits(model, COLLATE([found])).split([len(row) for row in found])
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.allclose(old, new, atol=1e-5) == (index != 1)


def _logits(model, batch):
    with torch.no_grad():
        base = model.get_base_model()
        return base(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]


def test_a_model_that_mixes_packed_rows_is_refused(model, tiny_gpt_oss):
    check_packing(model)
    leaky = AutoModelForCausalLM.from_pretrained(tiny_gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
    with pytest.raises(UsageError, match="GptOssForCausalLM of transformers lets packed rows see each other"):
        check_packing(leaky.float())


@pytest.mark.parametrize("window", [None, 5, 128])
def test_reference_attention_with_bounds_is_that_of_each_document(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 30, heads, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    bounds = torch.tensor([0, 7, 30, 31, 55, 60], dtype=torch.int32)
    got = attention.reference(q, k, v, sinks, 0.3, window, bounds).flatten(0, 1)
    for start, end in bounds.unfold(0, 2, 1).tolist():
        part = (x.flatten(0, 1)[None, start:end] for x in (q, k, v))
        assert torch.allclose(got[start:end], attention.reference(*part, sinks, 0.3, window)[0], atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA GPU")
def test_packed_and_padded_give_one_loss_on_the_flash_path(tmp_path):
    # Of small weights: with larger ones bfloat16 alone moves gradients by a tenth.
    base = load_model(
        tiny.gpt_oss(tmp_path / "model", spread=0.1), device="cuda", torch_dtype="bfloat16", attn_impl="flash"
    )
    assert isinstance(base, OssiaGptOssForCausalLM)
    model = add_lora(base, rank=4, alpha=16, target_modules=["all-linear"], target_experts="all")
    found = rows(40, 90)
    packs = pack([len(row) for row in found], 400)
    batches = [COLLATE([[found[row] for row in one] for one in packs]), COLLATE(found)]
    with torch.autocast("cuda", torch.bfloat16):
        results = [
            loss_and_gradient(model, {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in b.items()})
            for b in batches
        ]
    (loss, _, gradient), (expected, _, exact) = results
    assert torch.allclose(loss, expected, rtol=2e-3)
    assert (gradient - exact).norm() < 3e-2 * exact.norm()
