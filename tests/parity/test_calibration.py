"""Exports rounded for the inputs that experts meet: these inputs are the right ones, and the outputs gain by it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.parity.test_export import SHARD, make_adapter, stopped, tensors

from ossia.adapters.io import load_adapter
from ossia.config import ExportConfig, InferConfig
from ossia.errors import UsageError
from ossia.export.calibrate import Calibration
from ossia.export.merge import merge
from ossia.export.run import _calibration_texts
from ossia.infer.reading import readings
from ossia.kernels.mxfp4.calibrated import Inputs
from ossia.model.load import load_model

__all__ = ["stopped"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.gpt_oss(tmp_path_factory.mktemp("calibrated") / "base", hidden=128, intermediate=128)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """On experts alone: what is rounded."""
    folder = tmp_path_factory.mktemp("calibrated") / "adapter"
    return make_adapter(base, folder, std=0.05, target_modules=["none"], target_experts="all")


def texts(seed: int = 0) -> list[list[int]]:
    """Of few tokens, so that some directions weigh more than others, as in real models."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 20, (32,), generator=draw).tolist() for _ in range(32)]


def calibration(base: Path, adapter: Path, seed: int = 0) -> Calibration:
    return Calibration(InferConfig(adapters=[str(adapter)], torch_dtype="float32", device="cpu"), base, texts(seed))


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_inputs_are_what_merged_experts_are_given(base, adapter, tmp_path, projection):
    merged = load_model(merge(base, adapter, tmp_path / "merged", torch.float32, 10**9))
    found = calibration(base, adapter)
    found.collect(tmp_path / "seen")
    name = "model.layers.1.mlp.experts"
    experts = merged.get_submodule(name)
    given = []
    experts.register_forward_pre_hook(lambda module, args: given.append(args[:3]))
    with torch.no_grad():
        for text in texts():
            merged(torch.tensor([text]), use_cache=False)
    first = experts.gate_up_proj.transpose(1, 2), experts.gate_up_proj_bias
    second = projection == "down_proj"
    seen = found.given(name, torch.device("cpu"), (lambda a, b: tuple(t[a:b] for t in first)) if second else None)
    for expert in range(experts.num_experts):
        rows = []
        for hidden, index, weight in given:
            for token, slot in (index == expert).nonzero().tolist():
                x = hidden[token]
                if second:
                    gate_up = first[0][expert] @ x + first[1][expert]
                    gate, up = gate_up[0::2].clamp(max=7.0), gate_up[1::2].clamp(-7.0, 7.0)
                    x = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                rows.append((x, weight[token, slot] ** 2))
        want = Inputs.of([torch.stack([x for x, _ in rows])], [torch.stack([w for _, w in rows])])
        for mine, theirs in zip(seen(expert, expert + 1), want, strict=True):
            # What experts are given is kept in bfloat16.
            assert (mine - theirs).norm() <= 2**-7 * theirs.norm()


def test_outputs_move_with_the_adapter_where_nearest_rounding_keeps_them(base, adapter, tmp_path, capsys):
    plain = merge(base, adapter, tmp_path / "plain", None, SHARD)
    rounded = merge(base, adapter, tmp_path / "rounded", None, SHARD, calibration(base, adapter))
    assert "calibrated on 1,024 tokens of 32 rows" in capsys.readouterr().out
    ids = torch.tensor(texts(seed=1))  # others of the same kind
    with torch.no_grad():
        before = load_model(base)(ids).logits
        want = load_adapter(load_model(base), adapter)(ids).logits
        got = {folder.name: load_model(folder)(ids).logits for folder in (plain, rounded)}
    missed = {name: float((logits - want).norm() / (before - want).norm()) for name, logits in got.items()}
    assert missed["rounded"] < 0.7 * missed["plain"]
    report = json.loads((rounded / "export_report.json").read_text())
    for row in report["tensors"].values():
        assert row["lost"] < row["nearest_lost"]
    assert report["worst"]["lost"] == max(row["lost"] for row in report["tensors"].values())
    before, after = tensors(base), tensors(rounded)
    same = {
        name for name, tensor in after.items() if torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    }
    moved = {name for name in before if ".experts." in name and not name.endswith("_scales")}
    assert {name for name in before if ".experts." not in name} <= same
    assert moved.isdisjoint(same)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert not (rounded / "calibration").exists()


def test_auto_calibrates_where_it_can_and_says_why_it_does_not(base, adapter, tmp_path, rows, monkeypatch, capsys):
    gpu, free = SimpleNamespace(type="cuda"), [80e9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80e9))

    def found(device: Any = gpu, adapter: Path = adapter, **more: Any) -> list[list[int]]:
        config = ExportConfig(adapters=[str(adapter)], merge_lora=True, format="mxfp4", **more)
        return _calibration_texts(config, adapter, base, InferConfig(adapters=[str(adapter)]), device)

    texts = found(dataset=[str(rows)], quant_n_samples=5, max_length=7)
    assert [len(text) for text in texts] == [7] * 5
    assert len(found(torch.device("cpu"), dataset=[str(rows)], quant_n_samples=5)) == 5
    monkeypatch.setattr("ossia.export.run._SMALL", 0)
    assert capsys.readouterr().out == ""
    attention = make_adapter(base, tmp_path / "attention", target_experts="none")
    for reason, options in {
        "the adapter leaves the experts alone": {"adapter": attention},
        "it is slow without a GPU; --calibrate true does it": {"device": torch.device("cpu"), "dataset": [str(rows)]},
        f"the rows that {adapter} was trained on are not there; give --dataset, or --format bf16": {},
    }.items():
        assert found(**options) == []
        assert f"not calibrated: {reason}" in capsys.readouterr().out
    free[0] = 3e9
    assert found(dataset=[str(rows)]) == []
    assert "not calibrated: it would take 4 GB of the GPU's memory, and 3 GB are free" in capsys.readouterr().out
    assert found(calibrate="false") == []
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match=r"--calibrate true: the rows that .* are not there; give --dataset"):
        found(calibrate="true")


def test_a_stopped_one_reads_the_rows_once_and_ends_the_same(base, adapter, tmp_path, stopped, monkeypatch, capsys):
    whole = merge(base, adapter, tmp_path / "whole", None, SHARD, calibration(base, adapter))
    stopped(3)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out", None, SHARD, calibration(base, adapter))
    stopped(None)
    monkeypatch.setattr(Calibration, "_read", lambda self: pytest.fail("read again"))
    out = merge(base, adapter, tmp_path / "out", None, SHARD, calibration(base, adapter))
    assert "2 of" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_rows_make_another_export(base, adapter, tmp_path, stopped):
    stopped(3)
    with pytest.raises(KeyboardInterrupt):
        merge(base, adapter, tmp_path / "out", None, SHARD, calibration(base, adapter))
    written = stopped(None)
    out = merge(base, adapter, tmp_path / "out", None, SHARD, calibration(base, adapter, seed=5))
    assert len(written) == len(list(out.glob("*.safetensors")))
    assert load_file(out / written[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a CUDA GPU")
def test_texts_are_read_together_on_the_flash_path(tmp_path):
    folder = tiny.gpt_oss(tmp_path / "model", spread=0.1)
    model = load_model(folder, device="cuda", torch_dtype="bfloat16", attn_impl="flash")
    rng = np.random.default_rng(0)
    some = [rng.integers(3, 200, int(length)).tolist() for length in rng.integers(2, 300, 12)]
    found = list(readings(model, some, 1000))
    assert 1 < len(found) < 4
    with torch.inference_mode():
        for reading in found:
            logits = model(**reading.inputs, use_cache=False).logits[0]
            for first, end in reading.places:
                alone = model(input_ids=reading.inputs["input_ids"][:, first:end], use_cache=False).logits[0]
                assert (logits[first:end] - alone).norm() < 0.02 * alone.norm()


def test_texts_are_read_several_at_a_time_and_see_only_themselves(base, tiny_llama):
    rng = np.random.default_rng(0)
    some = [rng.integers(3, 200, int(length)).tolist() for length in rng.integers(2, 300, 12)]
    for folder in (base, tiny_llama):
        model = load_model(folder, device="cpu")
        found = list(readings(model, some, 1000))
        assert sum(len(reading.places) for reading in found) == len(some) > len(found)
        assert max(reading.inputs["input_ids"].shape[1] for reading in found) <= 512
        read = [token for reading in found for token in reading.inputs["input_ids"][0].tolist()]
        assert read == list(chain(*some))
        with torch.no_grad():
            parts = []
            for reading in found:
                logits = model(**reading.inputs, use_cache=False).logits[0]
                parts += [logits[first:end] for first, end in reading.places]
            for text, part in zip(some, parts, strict=True):
                alone = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
                torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-4)
