"""Adapters as stock PEFT writes them: each loads equal to PEFT everywhere, or is refused by name everywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from tests.parity.test_adapters import logits, stock_base
from transformers import AutoModelForCausalLM

from ossia.adapters.combine import combine
from ossia.adapters.deltas import AdapterDeltas
from ossia.adapters.experts import ExpertsLora
from ossia.adapters.fields import FIELDS, STARTS, check_fields
from ossia.adapters.files import CONFIG, WEIGHTS, base_model_of, check_adapter
from ossia.adapters.io import load_adapter, load_adapters, save_adapter
from ossia.adapters.origin import check_origin
from ossia.cli import main
from ossia.errors import OssiaError, UsageError
from ossia.export.merge import merge
from ossia.model.load import load_model
from ossia.model.names import PROJECTIONS
from ossia.track.files import note

ROOT = Path(__file__).parents[2]
QV = ["q_proj", "v_proj"]
EXPERTS = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
LOADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "init False": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "layer 0": {"layers_to_transform": 0},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude expression": {"exclude_modules": r".*layers\.1.*v_proj"},
    "expression": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}, "rank_pattern": {"v_proj": 2}},
}
ON_EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": EXPERTS},
    "experts alone": {"target_modules": [], "target_parameters": EXPERTS},
    "gate_up": {"target_parameters": EXPERTS[:1]},
    "down": {"target_parameters": EXPERTS[1:]},
    "down, bare": {"target_parameters": ["down_proj"]},
    "here both, there one": {"target_parameters": [f"layers.{n}" for n in (f"0.{EXPERTS[1]}", f"1.{EXPERTS[0]}", f"1.{EXPERTS[1]}")]},
    "experts with patterns": {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\..*gate_up_proj": 5}},
    "layers beside experts": {"target_parameters": EXPERTS, "layers_to_transform": [0], "use_rslora": True},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, r'init_lora_weights is "pissa".*another base; save it again'),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_2"}, r'init_lora_weights is "pissa_niter_2".*at random'),
    "olora": ({"init_lora_weights": "olora"}, 'init_lora_weights is "olora"'),
    "mica": ({"init_lora_weights": "mica"}, r'init_lora_weights is "mica".*set it to true'),
    "bias": ({"bias": "lora_only"}, r'bias is "lora_only": biases of the base.*; merge it with PEFT'),
    "all biases": ({"bias": "all"}, 'bias is "all"'),
    "dora": ({"use_dora": True}, "use_dora is true: DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is true"),
    "saved head": ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]'),
    "tokens": ({"trainable_token_indices": [3, 4]}, r"trainable_token_indices is \[3, 4\]"),
    "head": ({"target_modules": [*QV, "lm_head"]}, "lm_head.*a change of the head"),
    "embeddings": ({"target_modules": [*QV, "embed_tokens"]}, "embed_tokens.*a change of the embeddings"),
    "router": ({"target_parameters": ["router.weight"]}, "target_parameters has router.weight, which is no projection"),
}
SET: dict[str, Any] = {
    "fan_in_fan_out": True, "bias": "all", "modules_to_save": ["lm_head"], "megatron_config": {"x": 1},
    "trainable_token_indices": {"embed_tokens": [1]}, "use_dora": True, "velora_config": {"scale": 1.0},
    "alora_invocation_tokens": [], "use_qalora": True, "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 2], [1, 2]], "lora_bias": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4}, "peft_type": "IA3", "init_lora_weights": "something_new",
}  # fmt: skip
"""A value of each field that is refused where it is set."""


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def raw(tiny_gpt_oss):
    return stock_base(tiny_gpt_oss)


def options(**given):
    return {"r": 4, "lora_alpha": 9, "target_modules": QV, "task_type": "CAUSAL_LM", **given}


def trained(raw, std=0.05, **given):
    """A stock PEFT model, each trainable weight moved from its start."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(raw), LoraConfig(**options(**given)))
    if given.get("init_lora_weights") == "eva":
        batches = [{"input_ids": torch.randint(0, 256, (4, 16))} for _ in range(8)]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=chance) * std)
    return model.eval()


def saved(model, folder, base):
    model.save_pretrained(folder)
    return edited(folder, base_model_name_or_path=str(base))


def edited(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.fixture(scope="module")
def plain(raw, tiny_gpt_oss, tmp_path_factory):
    return saved(trained(raw), tmp_path_factory.mktemp("adapters") / "plain", tiny_gpt_oss)


@pytest.fixture
def own(plain, tmp_path):
    """A copy of the plain adapter, to spoil."""
    return Path(shutil.copytree(plain, tmp_path / "own"))


def apart(a, b):
    return float((a - b).norm() / b.norm())


def test_every_field_of_peft_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == FIELDS.keys(), "a field of PEFT that nobody has decided on, or one that is gone"
    assert {name for name, rule in FIELDS.items() if rule.allowed is not None} == SET.keys()
    check_fields(LoraConfig(**options()).to_dict() | {"peft_type": "LORA"}, Path(CONFIG))


def test_the_docs_have_the_table():
    rows = [line for line in (ROOT / "docs" / "adapters.md").read_text().splitlines() if line.startswith("| `")]
    wanted = []
    for name, rule in FIELDS.items():
        is_taken = rule.allowed is None
        fine = "any value" if is_taken else ", ".join(json.dumps(each) for each in rule.allowed)
        wanted.append(f"| `{name}` | {fine} | {rule.says}{'' if is_taken else f'; else: {rule.instead}'} |")
        if name == "init_lora_weights":
            wanted += [
                f"| `{name}: {start}` | refused | {each.says}; {each.instead} |" for start, each in STARTS.items()
            ]
    assert [row for row in wanted if row not in rows] == []


@pytest.mark.parametrize("kind", [*LOADS, *ON_EXPERTS])
def test_stock_adapter_is_what_peft_makes_of_it(raw, tiny_gpt_oss, plain, ids, tmp_path, kind):
    given = (LOADS | ON_EXPERTS)[kind]
    stock = trained(raw, **given)
    want, base = logits(stock, ids), logits(raw, ids)
    assert apart(want, base) > 1e-3
    folder = saved(stock, tmp_path / "stock", tiny_gpt_oss)
    check_origin(check_adapter(str(folder)), tiny_gpt_oss)

    loaded = load_adapter(load_model(tiny_gpt_oss), folder, trainable=True).eval()
    assert apart(logits(loaded, ids), want) < 1e-5
    with loaded.disable_adapter():
        assert apart(logits(loaded, ids), base) < 1e-5

    # What goes on training is the adapter, all of it and nothing else, and is saved as what it was.
    file = load_file(folder / WEIGHTS)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == sum(t.numel() for t in file.values())
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.mul_(1.5 if weight.requires_grad else 1)
    save_adapter(loaded, tmp_path / "on", str(tiny_gpt_oss))
    before, after = (json.loads((each / CONFIG).read_text()) for each in (folder, tmp_path / "on"))
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {"inference_mode"}
    again = PeftModel.from_pretrained(copy.deepcopy(raw), tmp_path / "on").eval()
    assert apart(logits(again, ids), logits(loaded, ids)) < 1e-5
    assert load_file(tmp_path / "on" / WEIGHTS).keys() == file.keys()

    merged = merge(tiny_gpt_oss, folder, tmp_path / "merged", torch.float32, 10**9)
    assert apart(logits(load_model(merged), ids), want) < 1e-5

    summed = combine([plain, folder], [-0.5, 2.0], tmp_path / "sum")
    both = copy.deepcopy(raw)
    for each, weight in ((plain, -0.5), (folder, 2.0)):
        adapted = PeftModel.from_pretrained(both, each)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                parameter.mul_(weight if "lora_B" in name else 1)
        both = adapted.merge_and_unload()
    check_origin(summed, tiny_gpt_oss)
    for theirs in (
        load_adapter(load_model(tiny_gpt_oss), summed),
        PeftModel.from_pretrained(copy.deepcopy(raw), summed),
    ):
        assert apart(logits(theirs, ids), logits(both, ids)) < 1e-5


@pytest.mark.parametrize("kind", REFUSED)
def test_stock_adapter_that_is_more_than_lora_is_refused(raw, tiny_gpt_oss, plain, tmp_path, kind):
    given, message = REFUSED[kind]
    folder = saved(trained(raw, **given), tmp_path / "stock", tiny_gpt_oss)
    ways = [
        lambda: check_origin(check_adapter(str(folder)), tiny_gpt_oss),
        lambda: load_adapter(load_model(tiny_gpt_oss), folder),
        lambda: load_adapters(load_model(tiny_gpt_oss), {"plain": plain, "other": folder}),
        lambda: combine([plain, folder], [1, 1], tmp_path / "sum"),
        lambda: merge(tiny_gpt_oss, folder, tmp_path / "merged", None, 10**9),
    ]
    for way in ways:
        with pytest.raises(OssiaError, match=message):
            way()
    assert not (tmp_path / "sum").exists()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_the_refusal_of_a_moved_base_advises_works(raw, tiny_gpt_oss, ids, tmp_path, start):
    torch.manual_seed(0)
    fresh = get_peft_model(copy.deepcopy(raw), LoraConfig(**options(init_lora_weights=start)))
    fresh.peft_config["default"].init_lora_weights = True
    fresh.save_pretrained(tmp_path / "began")
    fresh.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.add_(0.05 if weight.requires_grad else 0)
    want = logits(fresh.eval(), ids)
    saved(fresh, tmp_path / "moved", tiny_gpt_oss)
    fresh.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "began"))
    loaded = load_adapter(load_model(tiny_gpt_oss), tmp_path / "plain")
    assert apart(logits(loaded, ids), want) < 1e-5
    with loaded.disable_adapter():
        assert apart(logits(loaded, ids), logits(raw, ids)) < 1e-5
    merged = PeftModel.from_pretrained(copy.deepcopy(raw), tmp_path / "moved").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=False)
    assert apart(logits(load_model(tmp_path / "merged"), ids), want) < 1e-5


@pytest.mark.parametrize("name", SET)
def test_fields_that_are_set_are_refused(own, name):
    edited(own, **{name: SET[name]})
    message = rf"adapter_config\.json: {name} is {re.escape(json.dumps(SET[name]))}: .*; ."
    with pytest.raises(OssiaError, match=message):
        check_adapter(str(own))


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_are_refused_are_told_apart(own, start):
    with pytest.raises(OssiaError, match=re.escape(STARTS[start].says)):
        check_adapter(str(edited(own, init_lora_weights=f"{start.upper()}{'_4' if start.endswith('niter') else ''}")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_field": 3}, r"new_field is 3, and that field of LoRA is not known here.*PEFT 0\.21"),
        ({"use_rslorra": True}, "use_rslorra is true.*did you mean 'use_rslora'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is NaN, not a number above 0"),
        ({"lora_alpha": "16"}, 'lora_alpha is "16"'),
        ({"r": True}, "r is true"),
        ({"r": 4.0}, r"r is 4\.0"),
        ({"use_rslora": "false"}, 'use_rslora is "false", not true or false'),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
        ({"rank_pattern": {"(q_proj": 2}}, "rank_pattern is"),
        ({"target_modules": "(q_proj"}, r'target_modules is "\(q_proj", not a list of names or an expression'),
        ({"target_modules": None}, "neither target_modules nor target_parameters"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters is"),
        ({"peft_type": "PROMPT_TUNING"}, 'peft_type is "PROMPT_TUNING": only LoRA'),
    ],
)
def test_damaged_and_unknown_fields_are_named(own, values, message):
    with pytest.raises(OssiaError, match=rf"adapter_config\.json: .*{message}"):
        check_adapter(str(edited(own, **values)))


def test_new_fields_that_are_off_and_notes_of_other_tools_are_passed_over(own):
    note = {"base_model_class": "GptOssForCausalLM", "unsloth_fixed": True}
    check_adapter(str(edited(own, auto_mapping=note, new_switch=False, new_list=[], revision=None)))


def test_files_and_folders_that_are_no_adapter_say_what_to_do(own, plain, tmp_path):
    (own / WEIGHTS).rename(own / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"adapter_model\.bin is a pickle.*load it with PEFT and save it again"):
        check_adapter(str(own))
    shutil.copytree(plain, tmp_path / "several" / "mine")
    with pytest.raises(UsageError, match=r"no adapter_config\.json in this folder.*its adapters are mine"):
        check_adapter(str(tmp_path / "several"))


def test_a_version_of_a_hub_base_is_not_passed_over(own, tiny_gpt_oss):
    with pytest.raises(UsageError, match="names revision v2 of org/model; download that and give it with --model"):
        base_model_of(edited(own, base_model_name_or_path="org/model", revision="v2"))
    assert base_model_of(edited(own, base_model_name_or_path=str(tiny_gpt_oss))) == str(tiny_gpt_oss)


def respelled(tensors, old, new):
    return {name.replace(old, new): tensor.clone() for name, tensor in tensors.items()}


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS = {
    "extra factor": (lambda t: t | respelled({k: v for k, v in t.items() if "q_proj" in k}, "q_proj", "o_proj"),
                     r"o_proj\.lora_A\.weight, which adapter_config\.json does not target"),
    "magnitudes": (lambda t: t | {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}, "DoRA"),
    "biases": (lambda t: t | {FIRST.replace("lora_A.weight", "base_layer.bias"): torch.ones(64)}, "biases of the base"),
    "embeddings": (lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.ones(9, 64)}, "the embeddings"),
    "something": (lambda t: t | {"extra": torch.ones(2)}, "has extra, which is no factor of LoRA"),
    "missing": (lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj" not in k},
                r"no tensors for model\.layers\.1\.self_attn\.q_proj\.weight, which adapter_config\.json targets"),
    "half": (lambda t: {k: v for k, v in t.items() if k != FIRST}, "is alone, without its other half"),
    "layers": (lambda t: t | respelled(t, "layers.1", "layers.7"), r"weights it changes are not in .*layers\.7"),
    "transposed": (lambda t: {k: v.T.contiguous() for k, v in t.items()}, "another base model"),
    "whole numbers": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, r"is int8 \[4, 64\], not a matrix of floating-point numbers"),
    "none": (lambda t: {}, "no tensors in it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_the_configuration_does_not_explain_are_named(own, plain, tiny_gpt_oss, tmp_path, kind):
    spoil, message = TENSORS[kind]
    save_file(spoil(load_file(own / WEIGHTS)), own / WEIGHTS)
    with pytest.raises(OssiaError, match=message):
        check_origin(own, tiny_gpt_oss)
    with pytest.raises(OssiaError, match=message.replace("another base model", ".*")):
        load_adapter(load_model(tiny_gpt_oss), own)


def test_missing_tensors_are_not_hidden_by_a_sum(own, plain, tmp_path):
    save_file(TENSORS["missing"][0](load_file(own / WEIGHTS)), own / WEIGHTS)
    with pytest.raises(OssiaError, match=r"no tensors for model\.layers\.1\.self_attn\.q_proj\.weight"):
        combine([plain, own], [1, 1], tmp_path / "sum")


def test_weights_that_are_not_finite_are_named(own, plain, tiny_gpt_oss, tmp_path):
    tensors = load_file(own / WEIGHTS)
    tensors[FIRST][0, 0] = float("nan")
    save_file(tensors, own / WEIGHTS)
    for way in (
        lambda: load_adapter(load_model(tiny_gpt_oss), own),
        lambda: combine([plain, own], [1, 1], tmp_path / "s"),
    ):
        with pytest.raises(OssiaError, match=r"q_proj\.lora_A\.weight holds NaN or infinity"):
            way()


def test_half_precision_is_read_as_peft_reads_it(raw, own, tiny_gpt_oss, ids):
    save_file({name: tensor.half() for name, tensor in load_file(own / WEIGHTS).items()}, own / WEIGHTS)
    stock = PeftModel.from_pretrained(copy.deepcopy(raw), own).eval()
    assert apart(logits(load_adapter(load_model(tiny_gpt_oss), own), ids), logits(stock, ids)) < 1e-5


@pytest.mark.parametrize(
    "given", [{"target_modules": "all-linear"}, {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}}]
)
def test_other_models_too(tiny_llama, ids, tmp_path, given):
    llama = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    stock = trained(llama, **given)
    folder = saved(stock, tmp_path / "stock", tiny_llama)
    check_origin(folder, tiny_llama)
    loaded = load_adapter(load_model(tiny_llama), folder)
    assert apart(logits(loaded, ids), logits(stock, ids)) < 1e-5
    merged = merge(tiny_llama, folder, tmp_path / "merged", torch.float32, 10**9)
    assert apart(logits(load_model(merged), ids), logits(stock, ids)) < 1e-5


@pytest.mark.parametrize("kind", ON_EXPERTS)
def test_the_fused_pair_of_experts_is_the_same_change(raw, tiny_gpt_oss, tmp_path, kind):
    folder = saved(trained(raw, **ON_EXPERTS[kind]), tmp_path / "stock", tiny_gpt_oss)
    found, places = 0, AdapterDeltas(folder).places
    for name, module in load_adapter(load_model(tiny_gpt_oss), folder).get_base_model().named_modules():
        if isinstance(module, ExpertsLora):
            *sides, scale = module.pair("default")
            assert len({side.a_EIr.shape[2] for side in sides} | {side.b_ErO.shape[1] for side in sides}) == 1
            for projection, side in zip(PROJECTIONS, sides, strict=True):
                change = side.a_EIr @ side.b_ErO * scale
                if f"{name}.{projection}" in places:
                    found += 1
                    torch.testing.assert_close(change, module.get_delta(projection, "default"))
                else:
                    assert not change.any()
    assert found == sum(place.on_experts for place in places.values()) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ON_EXPERTS)
def test_fused_experts_compute_and_train_the_same(tiny_gpt_oss, tmp_path, monkeypatch, kind):
    folder = saved(trained(stock_base(tiny_gpt_oss).cpu(), **ON_EXPERTS[kind]), tmp_path / "stock", tiny_gpt_oss)
    model = load_adapter(load_model(tiny_gpt_oss, torch_dtype="bfloat16", device="cuda"), folder, trainable=True)
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 64, generator=chance).bfloat16().cuda()
    index = torch.stack([torch.randperm(4, generator=chance)[:2] for _ in hidden]).cuda()
    weight = torch.rand(37, 2, generator=chance).cuda()
    for _, module in model.named_modules():
        if not isinstance(module, ExpertsLora):
            continue
        found = []
        for fuses in (True, False):
            with monkeypatch.context() as patched:
                for where in () if fuses else ("ossia.adapters.experts", "ossia.model.experts"):
                    patched.setattr(f"{where}.fuses", lambda rows: False)
                module.zero_grad()
                out = module(hidden, index, weight)
                out.float().square().sum().backward()
            found.append([out.detach(), *(p.grad for p in module.parameters() if p.requires_grad)])
        assert len(found[0]) > 2
        for got, want in zip(*found, strict=True):
            assert apart(got.float(), want.float()) < 2e-2


def test_places_have_their_own_ranks_and_scales(raw, tiny_gpt_oss, tmp_path):
    folder = saved(trained(raw, **ON_EXPERTS["experts with patterns"]), tmp_path / "stock", tiny_gpt_oss)
    places = AdapterDeltas(folder).places
    assert places["model.layers.0.self_attn.q_proj.weight"][2:] == (4, 9 / 4, False)
    assert places["model.layers.1.mlp.experts.gate_up_proj"][2:] == (4, 5 / 4, True)
    assert places["model.layers.1.mlp.experts.down_proj"][2:] == (2, 9 / 2, True)


COMMANDS = {
    "infer": ["infer", "--adapters"],
    "answers": ["infer", "--val_dataset", "ROWS", "--result_path", "OUT/answers.jsonl", "--adapters"],
    "sum": ["infer", "--adapters", "PLAIN"],
    "serve": ["serve", "--port", 0, "--adapters", "PLAIN"],
    "sft": ["sft", "--dataset", "ROWS", "--output_dir", "OUT/run", "--adapters"],
    "verify": ["verify", "ADAPTER", "BASE"],
    **{f"export {each}": ["export", "--merge_lora", "true", "--format", each, "--output_dir", "OUT/merged", "--adapters"]
       for each in ("bf16", "mxfp4", "gguf")},
}  # fmt: skip


@pytest.fixture(scope="module")
def foreign(raw, tiny_gpt_oss, tmp_path_factory):
    """One that its configuration gives away, and one that its tensors do."""
    folder = tmp_path_factory.mktemp("foreign")
    return {
        'init_lora_weights is "pissa": this start moves': saved(
            trained(raw, init_lora_weights="pissa"), folder / "pissa", tiny_gpt_oss
        ),
        "a change of the head, which is not computed here; merge it with PEFT": saved(
            trained(raw, target_modules=["lm_head"]), folder / "head", tiny_gpt_oss
        ),
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_a_model_loads(
    foreign, plain, tiny_gpt_oss, rows, tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setattr("ossia.model.load.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    known = {"ROWS": str(rows), "OUT": str(tmp_path), "PLAIN": str(plain), "BASE": str(tiny_gpt_oss)}
    for message, adapter in foreign.items():
        known["ADAPTER"] = str(adapter)
        words = [re.sub("|".join(known), lambda found: known[found[0]], str(word)) for word in COMMANDS[command]]
        if "ADAPTER" not in COMMANDS[command]:
            words += [str(adapter), "--model", str(tiny_gpt_oss)]
        assert main(words) == 1
        assert re.search(rf"error: {adapter}/.*{message}", capsys.readouterr().err)
    assert not {"run", "merged", "answers.jsonl"} & {each.name for each in tmp_path.iterdir()}


@pytest.mark.parametrize("on_experts", [False, True])
def test_training_goes_on_from_what_flags_cannot_say(ossia, raw, tiny_gpt_oss, rows, tmp_path, on_experts):
    given = {"layers_to_transform": [1], "rank_pattern": {"q_proj": 6}, "exclude_modules": ["k_proj"]}
    given |= {"target_parameters": ["layers.0.mlp.experts.down_proj"]} if on_experts else {}
    start = saved(trained(raw, **given), tmp_path / "start", tiny_gpt_oss)
    run = tmp_path / "run"
    flags = ["--dataset", rows, "--add_version", "false", "--device", "cpu", "--learning_rate", 1e-12]
    assert "(rank 6, alpha 9)" in ossia.ok("sft", *flags, "--output_dir", run, "--adapters", start, "--max_steps", 1)
    more = ["--resume_from_checkpoint", run / "checkpoint-1", "--output_dir", tmp_path / "more", "--max_steps", 2]
    ossia.ok("sft", "--config", run / "config.yaml", *more)
    # A run that was stopped before its first checkpoint begins with the adapter again.
    shutil.copytree(run, tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-*", "last", "best"))
    note(tmp_path / "again", status="running")
    options_there = (run / "config.yaml").read_text().replace(str(run), str(tmp_path / "again"))
    (tmp_path / "again" / "config.yaml").write_text(options_there)
    ossia.ok("sft", "--config", tmp_path / "again" / "config.yaml", "--resume", tmp_path / "again")
    for saved_here in (run / "checkpoint-1", tmp_path / "again" / "checkpoint-1", tmp_path / "more" / "checkpoint-2"):
        before, after = (json.loads((each / CONFIG).read_text()) for each in (start, saved_here))
        assert {key for key in before | after if before.get(key) != after.get(key)} <= {"inference_mode"}
        was, now = (load_file(each / WEIGHTS) for each in (start, saved_here))
        assert was.keys() == now.keys()
        for name, tensor in was.items():
            torch.testing.assert_close(now[name], tensor, rtol=0, atol=1e-9)
        PeftModel.from_pretrained(copy.deepcopy(raw), saved_here)
