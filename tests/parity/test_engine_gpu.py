"""The engine's GPU path: pages, blocks and CUDA graphs against full forwards, in bfloat16 and float32."""

from __future__ import annotations

import pytest
import torch
from tests.parity.test_engine import LENGTHS, NEW

from ossia.adapters.inject import add_lora
from ossia.infer import gpt_oss
from ossia.infer.engine import Engine, Sampling
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(scope="module")
def template(tiny_gpt_oss):
    return load_template(load_tokenizer(tiny_gpt_oss), "harmony")


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=draw).tolist() for length in LENGTHS]


def adapted(folder, **options):
    """The model with random LoRA of attention and experts."""
    model = add_lora(load_model(folder, **options), rank=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def run(engine, prompts, sampling, adapter):
    requests = [engine.submit(prompt, sampling, adapter) for prompt in prompts]
    while engine.busy:
        engine.step()
    return requests


@pytest.mark.parametrize("adapter", [None, "default"])
def test_log_probabilities_are_as_near_to_float32_as_a_full_forward(tiny_gpt_oss, template, prompts, adapter):
    model, exact = adapted(tiny_gpt_oss), adapted(tiny_gpt_oss, device="cpu")
    engine = Engine(model, template, max_batch_size=16)
    assert engine._runner._from_blocks
    sampling = Sampling(1.0, max_new_tokens=NEW, seed=1, top_logprobs=0)
    errors = {"engine": 0.0, "forward": 0.0}
    with torch.inference_mode():
        for request in run(engine, prompts, sampling, adapter):
            ids, start = torch.tensor([request.prompt + request.ids]), len(request.prompt)
            found = []
            for one in (exact, model):
                with gpt_oss.with_adapter(one, adapter):
                    logits = one(input_ids=ids.to(one.device), use_cache=False).logits[0, start - 1 : -1]
                log = logits.float().log_softmax(-1).cpu()
                found.append(log.gather(1, ids[0, start:, None])[:, 0])
            said = torch.tensor([token.logprob for token in request.tokens])
            errors["engine"] += (said - found[0]).abs().sum().item()
            errors["forward"] += (found[1] - found[0]).abs().sum().item()
    assert errors["forward"] > 0
    assert errors["engine"] < 1.5 * errors["forward"], errors


@pytest.mark.parametrize("adapter", [None, "default"])
def test_graphs_compute_what_plain_launches_compute(tiny_gpt_oss, template, prompts, adapter, monkeypatch):
    errors = []

    class Both(gpt_oss._Graph):
        def __init__(self, function, inputs, other):
            super().__init__(function, inputs, other)
            self.function = function

        def __call__(self, inputs):
            result = super().__call__(inputs)
            plain = self.function(inputs.to(result.device))
            real = inputs[2] < places
            errors.append(((plain - result)[real].norm() / plain[real].norm()).item())
            return result

    monkeypatch.setattr(gpt_oss, "_Graph", Both)
    # Requests end one by one, so that every batch size from 11 down is met.
    engine, places = Engine(adapted(tiny_gpt_oss), template, max_batch_size=11), 11
    requests = run(engine, prompts, Sampling(max_new_tokens=NEW), adapter)
    assert len(errors) > NEW
    # cuBLAS may choose another product in a capture, with sums in another order.
    assert max(errors) < 1.5e-2, errors
    assert len({tuple(request.ids) for request in requests}) > 8


def test_float32_says_what_the_cpu_says(tiny_gpt_oss, template, prompts):
    sampling, said = Sampling(max_new_tokens=NEW), []
    for device in ("cpu", "cuda"):
        model = adapted(tiny_gpt_oss, device=device, torch_dtype="float32", attn_impl="eager")
        engine = Engine(model, template, max_batch_size=5)
        said.append([[r.ids for r in run(engine, prompts, sampling, adapter)] for adapter in (None, "default")])
    assert said[0] == said[1]


def test_draws_repeat_themselves_and_places_are_used_again(tiny_gpt_oss, template, prompts):
    engine = Engine(load_model(tiny_gpt_oss), template, max_batch_size=4)
    sampling = Sampling(0.8, 0.9, max_new_tokens=NEW, seed=11)
    first = [request.ids for request in run(engine, prompts, sampling, None)]
    gone = engine.submit(prompts[0], sampling)
    engine.step()
    engine.cancel(gone)
    assert [request.ids for request in run(engine, prompts, sampling, None)] == first
