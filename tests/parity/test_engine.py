"""The engine against transformers' generate: the same greedy tokens, alone and in company, with and without adapter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tests.parity.test_adapters import randomise
from tests.parity.test_demo_base import needs_source
from tests.stock import stock_base

from ossia.adapters.inject import add_lora
from ossia.adapters.io import load_adapter, save_adapter
from ossia.demo.base import ensure_base
from ossia.errors import UsageError
from ossia.infer import gpt_oss
from ossia.infer.engine import Engine, Sampling
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template
from ossia.template.messages import Message

NEW = 24  # three times the tiny model's window
LENGTHS = (1, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40, 5, 12, 64)


@pytest.fixture(scope="module")
def template(tiny_gpt_oss):
    return load_template(load_tokenizer(tiny_gpt_oss), "harmony")


@pytest.fixture(scope="module")
def adapter(tiny_gpt_oss, tmp_path_factory):
    """Random LoRA of attention and experts that changes what is said."""
    model = add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=3)
    randomise(model, 0.15)
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-1"
    save_adapter(model, folder, str(tiny_gpt_oss))
    return folder


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=draw).tolist() for length in LENGTHS]


def expected(model, template, prompts, new=NEW):
    """What transformers generates, prompt by prompt."""
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": template.pad_id}
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=template.stop_ids, **options)
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def base_says(tiny_gpt_oss, template, prompts):
    return expected(stock_base(tiny_gpt_oss), template, prompts)


@pytest.fixture(scope="module")
def adapter_says(tiny_gpt_oss, adapter, template, prompts):
    return expected(PeftModel.from_pretrained(stock_base(tiny_gpt_oss), adapter), template, prompts)


@pytest.mark.parametrize("experts", ["mxfp4", "dequantized"])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_greedy_tokens_are_those_of_transformers(tiny_gpt_oss, template, prompts, base_says, experts, size):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu", experts=experts), template, max_batch_size=size)
    assert engine.generate(prompts, Sampling(max_new_tokens=NEW)) == base_says


def test_adapter_and_base_side_by_side(tiny_gpt_oss, template, prompts, adapter, base_says, adapter_says):
    assert sum(one != other for one, other in zip(base_says, adapter_says, strict=True)) > 8
    model = load_adapter(load_model(tiny_gpt_oss, device="cpu"), adapter)
    engine = Engine(model, template, adapters={"mine": "default"}, max_batch_size=16)
    assert engine.adapters == ["mine"]
    sampling = Sampling(max_new_tokens=NEW)
    assert engine.generate(prompts, sampling) == adapter_says
    with engine.without_adapter():
        assert engine.generate(prompts, sampling) == base_says
    requests = [engine.submit(prompt, sampling, (None, "mine")[n % 2]) for n, prompt in enumerate(prompts)]
    while engine.busy:
        engine.step()
    both = [(base_says, adapter_says)[n % 2][n] for n in range(len(prompts))]
    assert [request.ids for request in requests] == both
    with pytest.raises(UsageError, match="no adapter 'other'; there is mine"):
        engine.submit(prompts[0], sampling, "other")


def test_experts_from_blocks_in_batches_filled_up(tiny_gpt_oss, template, prompts, adapter, monkeypatch):
    """What a GPU runs, its graphs apart: Triton's kernel, and rows that stand for no request."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled for the GPU, not interpreted")
    monkeypatch.setattr(gpt_oss, "_Graph", lambda function, inputs, other: function)
    engine = Engine(load_adapter(load_model(tiny_gpt_oss, device="cpu", experts="mxfp4"), adapter), template)
    some, sampling = prompts[1:6], Sampling(max_new_tokens=6)
    for name in (None, "default"):
        said = []
        for blocks in (False, True):
            engine._runner._from_blocks = blocks
            requests = [engine.submit(prompt, sampling, name) for prompt in some]
            while engine.busy:
                engine.step()
            said.append([request.ids for request in requests])
        assert said[0] == said[1]


def test_any_other_model(tiny_llama):
    from transformers import AutoModelForCausalLM

    template = load_template(load_tokenizer(tiny_llama), "generic")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    prompts = [torch.randint(0, 200, (length,)).tolist() for length in (1, 9, 30)]
    engine = Engine(load_model(tiny_llama, device="cpu"), template, max_batch_size=2)
    assert engine.generate(prompts, Sampling(max_new_tokens=9)) == expected(model, template, prompts, 9)


def test_draws_do_not_depend_on_company(tiny_gpt_oss, template, prompts):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template, max_batch_size=16)
    for top_p in (1.0, 0.8):
        sampling = Sampling(temperature=1.0, top_p=top_p, max_new_tokens=12, seed=7)
        alone = engine.generate(prompts[4:5], sampling)[0]
        together = [engine.submit(prompt, Sampling(0.9, 0.95, 12, seed=n)) for n, prompt in enumerate(prompts[:9])]
        mine = engine.submit(prompts[4], sampling)
        while engine.busy:
            engine.step()
        assert mine.ids == alone
        other = engine.generate(prompts[4:5], Sampling(temperature=1.0, top_p=top_p, max_new_tokens=12, seed=8))[0]
        assert other != alone
        assert len({tuple(request.ids) for request in together}) == 9


def test_draws_follow_the_distribution(tiny_gpt_oss, template):
    """4,000 first tokens against the model's own shares: all of them, and the nucleus alone."""
    from ossia.infer.sampling import Draw, choose

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 12, generator=draw).double() * 2
    numbers = torch.rand(4000, generator=draw).tolist()
    for top_p in (1.0, 0.7):
        tokens = choose(
            logits.float().expand(4000, -1),
            [Draw(Sampling(temperature=0.7, top_p=top_p), number) for number in numbers],
        )
        share = (logits[0] / 0.7).softmax(-1)
        if top_p < 1:
            ordered = share.sort(descending=True)
            kept = ordered.values.cumsum(-1) - ordered.values < top_p
            share = torch.zeros_like(share).index_put((ordered.indices[kept],), ordered.values[kept])
            share /= share.sum()
            assert (share == 0).sum() >= 6
        counted = torch.bincount(torch.tensor([token.id for token in tokens]), minlength=12) / 4000
        assert (counted[share == 0] == 0).all()
        assert (counted - share).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_a_cancelled_request_frees_its_place(tiny_gpt_oss, template, prompts, base_says):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template, max_batch_size=2)
    sampling = Sampling(max_new_tokens=NEW)
    first, second, third = (engine.submit(prompt, sampling) for prompt in prompts[:3])
    came = [request for request, _ in engine.step()]
    assert set(came) == {first, second}
    assert not third.tokens
    engine.cancel(first)
    said = list(first.ids)
    assert {request for request, _ in engine.step()} == {second, third}
    fourth = engine.submit(prompts[3], sampling)
    engine.cancel(fourth)
    while engine.busy:
        engine.step()
    assert [r.finish_reason for r in (first, fourth)] == ["cancelled", "cancelled"]
    assert (first.ids, second.ids, third.ids, fourth.ids) == (said, base_says[1], base_says[2], [])
    engine.cancel(second)
    assert second.finish_reason in ("stop", "length")


def test_log_probabilities_are_those_of_one_forward(tiny_gpt_oss, template, prompts):
    model = load_model(tiny_gpt_oss, device="cpu")
    engine = Engine(model, template, max_batch_size=4)
    drawn = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 14, "seed": 3}
    asked = [None, 0, 3, None, 5]
    requests = [
        engine.submit(prompt, Sampling(top_logprobs=n, **drawn)) for n, prompt in zip(asked, prompts[3:], strict=False)
    ]
    while engine.busy:
        engine.step()
    for request, count in zip(requests, asked, strict=True):
        ids = torch.tensor([request.prompt + request.ids])
        want = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        for row, token in zip(want, request.tokens, strict=True):
            if count is None:
                assert token.logprob is None
                continue
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
            values, places = row.topk(count)
            assert [place for place, _ in token.top] == places.tolist()
            assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_mask_says_what_may_come(tiny_gpt_oss, template, prompts, base_says):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template, max_batch_size=4)
    size = engine.model.config.vocab_size

    def digits(ids):
        if len(ids) >= 4:
            return torch.arange(size) == template.stop_ids[0]
        return torch.isin(torch.arange(size), torch.arange(15, 25))

    free = engine.submit(prompts[2], Sampling(max_new_tokens=NEW))
    bound = [engine.submit(prompts[2], Sampling(t, max_new_tokens=NEW, seed=1), allowed=digits) for t in (0, 1.0)]
    while engine.busy:
        engine.step()
    assert free.ids == base_says[2]
    for request in bound:
        assert all(15 <= id < 25 for id in request.ids[:-1])
        assert (len(request.ids), request.ids[-1], request.finish_reason) == (5, template.stop_ids[0], "stop")


def test_with_ignore_eos_no_token_ends_an_answer(tiny_gpt_oss, template, prompts):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template)
    end = template.stop_ids[0]

    def only_the_end(ids):
        return torch.arange(engine.model.config.vocab_size) == end

    requests = [
        engine.submit(prompts[0], Sampling(max_new_tokens=4, ignore_eos=ignore), allowed=only_the_end)
        for ignore in (False, True)
    ]
    while engine.busy:
        engine.step()
    assert [(request.ids, request.finish_reason) for request in requests] == [([end], "stop"), ([end] * 4, "length")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_meanwhile_is_called_once_a_step_and_on_a_gpu_behind_what_it_is_given(tiny_gpt_oss, template, prompts, device):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template, max_batch_size=2)
    run, done = engine._runner.step, []
    engine._runner.step = lambda *given: done.append("forward") or run(*given)
    engine.model = SimpleNamespace(device=torch.device(device))
    for prompt in prompts[:2]:
        engine.submit(prompt, Sampling(max_new_tokens=3, ignore_eos=True))
    while engine.busy:
        engine.step(lambda: done.append("meanwhile"))
    # The first step starts prompts as well.
    order = ["meanwhile", "forward"] if device == "cpu" else ["forward", "meanwhile"]
    assert done == ["meanwhile", "forward", *order]


def test_lengths_are_bounded(tiny_gpt_oss, template, prompts):
    engine = Engine(load_model(tiny_gpt_oss, device="cpu"), template, max_batch_size=2, max_length=40)
    assert engine.max_length == 40
    request = engine.submit(prompts[10], Sampling(max_new_tokens=2048))
    while engine.busy:
        engine.step()
    assert (request.finish_reason, len(request.ids)) == ("length", 8) or request.finish_reason == "stop"
    for prompt in ([], prompts[12]):
        with pytest.raises(UsageError, match="it may have 1 to 39"):
            engine.submit(prompt, Sampling())


@needs_source
@pytest.mark.slow
def test_demo_base_says_what_transformers_says(tmp_path):
    """Real text: answers of the demo's base, with and without an adapter, to questions of different lengths, all at once
    and one by one."""
    folder = ensure_base()
    template = load_template(load_tokenizer(folder), "harmony")
    questions = ["Hi", "What is the largest planet?", "你好,请介绍一下北京。", "Count: one two three one two three"]
    prompts = [template.prompt([Message("user", question + " please" * n)]) for n in range(4) for question in questions]
    model = add_lora(load_model(folder, device="cpu"), rank=4)
    randomise(model, 0.05)
    save_adapter(model, tmp_path / "checkpoint-1", str(folder))
    stock = stock_base(folder)
    want = expected(stock, template, prompts, 6)
    merged = PeftModel.from_pretrained(stock, tmp_path / "checkpoint-1").merge_and_unload()
    tuned = expected(merged, template, prompts, 6)
    assert sum(one != other for one, other in zip(want, tuned, strict=True)) > 8
    sampling = Sampling(max_new_tokens=6)
    together, alone = (Engine(model, template, max_batch_size=size) for size in (16, 1))
    assert together.generate(prompts, sampling) == tuned
    assert alone.generate(prompts[:4], sampling) == tuned[:4]
    with together.without_adapter(), alone.without_adapter():
        assert together.generate(prompts, sampling) == want
        assert alone.generate(prompts[:4], sampling) == want[:4]
