"""Our gpt-oss, generating with and without a cache and through our engine, against the stock model of the transformers
that is installed: greedy tokens and float32 logits. `make test-versions` runs this on each release that we support."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from peft import PeftModel
from tests.stock import stock_base
from transformers import DynamicCache, StaticCache

from ossia import compat
from ossia.adapters.inject import add_lora
from ossia.adapters.io import load_adapter, save_adapter
from ossia.infer.engine import Engine, Sampling
from ossia.infer.runner import CachedRunner
from ossia.model.load import load_model
from ossia.model.tokenizer import load_tokenizer
from ossia.template import load_template

NEW = 24
"""Tokens to generate: three of the tiny model's windows."""
LENGTHS = (3, 7, 8, 9, 17, 33)


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(0, 256, (length,), generator=draw) for length in LENGTHS]


@pytest.fixture(scope="module")
def adapter(tiny_gpt_oss, tmp_path_factory):
    model = add_lora(load_model(tiny_gpt_oss, device="cpu"), rank=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-1"
    save_adapter(model, folder, str(tiny_gpt_oss))
    return folder


@pytest.fixture(scope="module", params=["base", "adapter"])
def pair(request, tiny_gpt_oss, adapter):
    """The stock model and ours; adapted by stock PEFT and by us."""
    stock, ours = stock_base(tiny_gpt_oss), load_model(tiny_gpt_oss, device="cpu")
    if request.param == "adapter":
        stock, ours = PeftModel.from_pretrained(stock, adapter).eval(), load_adapter(ours, adapter)
    return stock, ours


def generated(model, ids, mask=None, **options):
    """New tokens [B, NEW] and the logits [B, NEW, V] that they were taken from."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=-1,  # no token ends the answer
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def check(got, want):
    assert torch.equal(got[0], want[0])
    assert (got[1] - want[1]).abs().max() < 1e-4 * want[1].abs().max()


@pytest.mark.parametrize("length", LENGTHS)
def test_generate_with_and_without_cache_equals_the_stock_model(pair, prompts, length):
    stock, ours = pair
    ids = prompts[LENGTHS.index(length)][None]
    want = generated(stock, ids, use_cache=False)
    check(generated(stock, ids, use_cache=True), want)
    check(generated(ours, ids, use_cache=False), want)
    check(generated(ours, ids, use_cache=True), want)


def test_a_batch_padded_on_the_left(pair, prompts):
    stock, ours = pair
    longest = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(prompt)).long() for prompt in prompts])
    want = generated(stock, ids, mask, use_cache=False)
    for use_cache in (True, False):
        check(generated(ours, ids, mask, use_cache=use_cache), want)


def test_our_engine_equals_the_stock_model(pair, tiny_gpt_oss, prompts):
    stock, ours = pair
    template = load_template(load_tokenizer(tiny_gpt_oss), "harmony")
    want = [generated(stock, prompt[None], use_cache=False)[0][0].tolist() for prompt in prompts]
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    for size in (1, len(prompts)):
        engine = Engine(ours, template, max_batch_size=size)
        assert engine.generate([prompt.tolist() for prompt in prompts], sampling) == want


def test_one_cache_filled_in_parts_whatever_it_is_called(pair, prompts):
    stock, ours = pair
    ids = prompts[-1][None]
    want = stock(input_ids=ids, use_cache=False).logits
    for name in compat.CACHE_NAMES:
        cache = DynamicCache(config=ours.config)
        parts = [
            ours(input_ids=part, use_cache=True, **{name: cache}).logits for part in ids.split([10, 1, 7, 1, 14], 1)
        ]
        assert (torch.cat(parts, 1) - want).abs().max() < 1e-4 * want.abs().max()


def test_a_static_cache(tiny_gpt_oss, prompts):
    stock, ours = stock_base(tiny_gpt_oss), load_model(tiny_gpt_oss, device="cpu")
    ids = prompts[4][None]
    cache = StaticCache(config=ours.config, max_cache_len=len(ids[0]) + NEW)
    name = compat.cache_name(type(stock).forward)
    check(generated(ours, ids, disable_compile=True, **{name: cache}), generated(stock, ids, use_cache=False))


def test_another_architecture_through_the_runner(tiny_llama, prompts):
    model = load_model(tiny_llama, device="cpu")
    runner = CachedRunner(model, 64)
    for place, prompt in enumerate(prompts):
        want = generated(model, prompt[None] % model.config.vocab_size, use_cache=False)[0][0].tolist()
        runner.reserve(place, len(prompt) + NEW)
        with torch.no_grad():
            token = int(runner.start([place], [(prompt % model.config.vocab_size).tolist()], None).argmax())
            said = [token]
            while len(said) < NEW:
                said.append(int(runner.step([place], [said[-1]], None).argmax()))
        assert said == want


def test_a_cache_under_a_name_that_is_not_known_is_an_error(tiny_gpt_oss):
    model, ids = load_model(tiny_gpt_oss, device="cpu"), torch.arange(5)[None]
    cache = DynamicCache(config=model.config)
    for name, value in (("kv", cache), ("kv_cache", object()), ("past_states", object())):
        with pytest.raises(TypeError, match=f"{name}: not a cache argument that is known"):
            model(ids, **{name: value})
        with pytest.raises(TypeError, match=f"{name}: not a cache argument that is known"):
            model.model.layers[0].self_attn(torch.zeros(1, 5, 64), (torch.ones(1, 5, 8),) * 2, **{name: value})
    with pytest.raises(TypeError, match="the same argument"):
        model(ids, cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match=r"a transformers\.Cache here, not tuple"):
        model(ids, cache=((torch.zeros(1), torch.zeros(1)),))


def test_pyproject_stops_where_the_tests_do():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    asked = {r.name: r for r in map(Requirement, tomllib.loads(text)["project"]["dependencies"])}
    for name, first in compat.UNTESTED_FROM.items():
        assert f"<{first}" in {str(part) for part in asked[name].specifier}


def test_a_newer_library_than_tested_is_named(monkeypatch):
    assert compat.untested_libraries() == []
    monkeypatch.setattr(compat, "UNTESTED_FROM", {"transformers": "5.2", "peft": "99"})
    (line,) = compat.untested_libraries()
    assert line.startswith("transformers 5.")
    assert "pip install 'transformers<5.2'" in line
