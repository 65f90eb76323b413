"""Exports as others read them: equal to base + adapter, in a process without this package; stopped and taken up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from ossia.adapters.inject import add_lora
from ossia.adapters.io import load_adapter, save_adapter
from ossia.errors import OssiaError, UsageError
from ossia.export import shards
from ossia.export.merge import merge
from ossia.kernels.mxfp4 import dequantize, quantize
from ossia.model.load import load_model

SHARD = 60_000
EXPERTS = tuple(
    f"experts.{projection}_{half}" for projection in ("gate_up_proj", "down_proj") for half in ("blocks", "scales")
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def make_adapter(base: Path, folder: Path, std: float = 0.1, seed: int = 1, **options) -> Path:
    model = add_lora(load_model(base), rank=4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    save_adapter(model, folder, str(base))
    return folder


def changes(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """float32 [out, in] or [E, in, out], by the names of base tensors in transformers' layout."""
    model = load_adapter(load_model(base), adapter)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A_down_proj"):
            for projection in ("gate_up_proj", "down_proj"):
                found[f"{name}.{projection}"] = module.get_delta(projection, "default").detach()
        elif hasattr(module, "lora_A"):
            found[f"{name}.weight"] = module.get_delta_weight("default").detach()
    return found


def dense_experts(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with its experts in float32 [E, in, out]."""
    found = tensors(folder)
    for name in [name for name in found if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        found[stem] = dequantize(found.pop(name), found.pop(f"{stem}_scales"), torch.float32).transpose(1, 2)
    return found


@pytest.fixture(scope="module")
def adapter(tiny_gpt_oss, tmp_path_factory) -> Path:
    return make_adapter(tiny_gpt_oss, tmp_path_factory.mktemp("adapter") / "all")


@pytest.fixture(scope="module")
def dense_base(tiny_gpt_oss, tmp_path_factory) -> Path:
    """The tiny base with experts in bfloat16."""
    folder = tmp_path_factory.mktemp("base") / "dense"
    folder.mkdir()
    save_file(
        {n: t.bfloat16().contiguous() for n, t in dense_experts(tiny_gpt_oss).items()}, folder / "model.safetensors"
    )
    config = json.loads((tiny_gpt_oss / "config.json").read_text())
    del config["quantization_config"]
    tiny.dump(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_gpt_oss, adapter, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    kinds = {"bf16": torch.bfloat16, "float32": torch.float32, "mxfp4": None}
    return {kind: merge(tiny_gpt_oss, adapter, root / kind, dtype, SHARD) for kind, dtype in kinds.items()}


def test_transformers_alone_reads_them_whole(exported, tiny_gpt_oss, adapter, tmp_path):
    torch.save(torch.randint(0, 256, (2, 29), generator=torch.Generator().manual_seed(2)), tmp_path / "ids.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, Mxfp4Config as C\n"
        "ids = torch.load(sys.argv[1] + '/ids.pt')\n"
        "for folder in sys.argv[2:]:\n"
        "    more = {'quantization_config': C(dequantize=True)} if folder.endswith('mxfp4') else {}\n"
        "    model, info = A.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)\n"
        "    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "    torch.save(model.eval()(ids).logits.detach(), sys.argv[1] + '/' + folder.rpartition('/')[2])\n"
        "assert 'ossia' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path, *exported.values()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids, theirs = torch.load(tmp_path / "ids.pt"), {kind: torch.load(tmp_path / kind) for kind in exported}
    base = load_model(tiny_gpt_oss)
    with torch.no_grad():
        before = base(ids).logits
        want = load_adapter(base, adapter)(ids).logits
        ours = {kind: load_model(folder)(ids).logits for kind, folder in exported.items()}
        rounded = load_model(exported["float32"])
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        in_bf16 = rounded(ids).logits

    def away(logits: torch.Tensor) -> float:
        return float((logits - want).norm() / want.norm())

    torch.testing.assert_close(theirs["float32"], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs["bf16"], in_bf16, rtol=1e-4, atol=1e-4)
    assert away(theirs["mxfp4"]) < 0.7 * away(before)
    for kind, logits in ours.items():
        torch.testing.assert_close(logits, theirs[kind], rtol=1e-4, atol=1e-4)


def test_bf16_is_the_rounded_sum_and_without_the_change_the_base(exported, tiny_gpt_oss, adapter):
    base, change = dense_experts(tiny_gpt_oss), changes(tiny_gpt_oss, adapter)
    merged, exact = tensors(exported["bf16"]), tensors(exported["float32"])
    assert merged.keys() == exact.keys() == base.keys()
    assert len(change) == 2 * (4 + 2)
    for name, tensor in merged.items():
        want = base[name].float() + change.get(name, torch.zeros(()))
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), want, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(
            exact[name] - change.get(name, torch.zeros(())), base[name].float(), rtol=0, atol=1e-6
        )
    assert "quantization_config" not in json.loads((exported["bf16"] / "config.json").read_text())


def test_mxfp4_has_the_bases_files_and_bytes(exported, tiny_gpt_oss, adapter):
    base, merged = tensors(tiny_gpt_oss), tensors(exported["mxfp4"])
    assert {n: (t.dtype, t.shape) for n, t in merged.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    touched = [
        name
        for name in base
        if name.endswith((*EXPERTS, "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
    ]
    assert len(touched) == 2 * (4 + 4)
    for name, tensor in merged.items():
        assert torch.equal(tensor.view(torch.uint8), base[name].view(torch.uint8)) == (name not in touched), name
    assert (exported["mxfp4"] / "config.json").read_bytes() == (tiny_gpt_oss / "config.json").read_bytes()
    index = json.loads((exported["mxfp4"] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in base.values())


def test_mxfp4_is_nearer_than_the_plain_rule_and_says_by_how_much(exported, tiny_gpt_oss, adapter):
    merged, change, base = dense_experts(exported["mxfp4"]), changes(tiny_gpt_oss, adapter), dense_experts(tiny_gpt_oss)
    report = json.loads((exported["mxfp4"] / "export_report.json").read_text())
    experts = {name for name in change if ".experts." in name}
    assert report["tensors"].keys() == experts
    for name in experts:
        want = base[name] + change[name]
        plain = dequantize(*quantize(want.transpose(1, 2)), torch.float32).transpose(1, 2)
        row, size = report["tensors"][name], want.norm()
        assert row["error"] == pytest.approx(float((merged[name] - want).norm() / size), rel=1e-4)
        assert row["plain_error"] == pytest.approx(float((plain - want).norm() / size), rel=1e-4)
        assert row["change"] == pytest.approx(float(change[name].norm() / size), rel=1e-4)
        kept = ((merged[name] - base[name]) * change[name]).sum() / change[name].square().sum()
        assert row["kept"] == pytest.approx(float(kept), rel=1e-4)
        assert row["error"] < row["plain_error"]
    for key in ("error", "plain_error"):
        values = [row[key] for row in report["tensors"].values()]
        assert report["worst"][key] == max(values)
        assert report["mean"][key] == pytest.approx(sum(values) / len(values))
    # Rounding to 4 bits leaves about a tenth.
    assert report["worst"]["error"] < 0.15


def test_blocks_that_the_merge_leaves_alone_stay_the_bases(tmp_path):
    """Also those whose scale no rule would choose: bases are quantized by others."""
    base = tiny.gpt_oss(tmp_path / "base")
    name = "model.layers.0.mlp.experts.down_proj"
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        if f"{name}_blocks" in held:
            # Half the codes' range, a negative zero, twice the scale.
            held[f"{name}_blocks"] = held[f"{name}_blocks"] & 0xBB | 0x08
            held[f"{name}_scales"] += 1
            save_file(held, file)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["none"], target_experts="0")
    weights = load_file(adapter / "adapter_model.safetensors")
    for key in weights:
        if "experts.lora_B" in key:  # [out, r * E] of down_proj, experts fastest: all but the last expert's to zero
            weights[key].view(-1, 4, 4)[:, :, :3] = 0
    save_file(weights, adapter / "adapter_model.safetensors")
    before, after = tensors(base), tensors(merge(base, adapter, tmp_path / "out", None, SHARD))
    for half in ("blocks", "scales"):
        assert torch.equal(after[f"{name}_{half}"][:3], before[f"{name}_{half}"][:3])
        assert not torch.equal(after[f"{name}_{half}"][3], before[f"{name}_{half}"][3])


def test_a_change_too_small_for_four_bits_is_said_to_be_lost(tiny_gpt_oss, tmp_path, capsys):
    small = make_adapter(tiny_gpt_oss, tmp_path / "adapter", std=0.01)
    out = merge(tiny_gpt_oss, small, tmp_path / "out", None, SHARD)
    report = json.loads((out / "export_report.json").read_text())
    assert report["mean"]["kept"] < 0.5
    assert report["worst"]["kept"] == min(row["kept"] for row in report["tensors"].values())
    assert "--format bf16 keeps all of it" in capsys.readouterr().out


def test_a_change_of_nothing_gives_the_base(tiny_gpt_oss, tmp_path):
    zero = make_adapter(tiny_gpt_oss, tmp_path / "adapter", std=0.0)
    before, after = tensors(tiny_gpt_oss), tensors(merge(tiny_gpt_oss, zero, tmp_path / "out", None, SHARD))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in before.items())


def test_dense_base_to_both_formats(dense_base, tiny_gpt_oss, adapter, exported, tmp_path):
    for kind, dtype in (("bf16", torch.bfloat16), ("mxfp4", None)):
        want, got = tensors(exported[kind]), tensors(merge(dense_base, adapter, tmp_path / kind, dtype, SHARD))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "mxfp4", tiny_gpt_oss)]
    assert configs[0] == configs[1]


@pytest.fixture
def stopped(monkeypatch):
    """`stopped(n, error)`: exports end with `error` in the n-th weight file that they write; the files written."""
    written: list[str] = []
    write = shards.Part.write

    def stop(after: int | None, error: type[BaseException] = KeyboardInterrupt) -> list[str]:
        written.clear()

        def counted(part, shard, advance):
            written.append(shard.file)
            if len(written) == after:
                broken = shards.Unit(shard.units[-1].outputs, lambda roundings: (_ for _ in ()).throw(error()))
                shard = shards.Shard(shard.file, [*shard.units[:-1], broken])
            write(part, shard, advance)

        monkeypatch.setattr(shards.Part, "write", counted)
        return written

    return stop


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_a_stopped_export_is_taken_up(tiny_gpt_oss, adapter, exported, tmp_path, stopped, capsys, kind):
    def export() -> Path:
        dtype = torch.bfloat16 if kind == "bf16" else None
        return merge(tiny_gpt_oss, adapter, tmp_path / "out", dtype, SHARD)

    part = tmp_path / ".out.part"
    stopped(3)
    with pytest.raises(KeyboardInterrupt):
        export()
    assert os.listdir(tmp_path) == [part.name]
    assert "2 finished weight files stay in" in capsys.readouterr().out
    assert len(list(part.glob("model-*"))) == 2
    # One file damaged since is written again.
    victim = next(part.glob("model-00002-*"))
    os.truncate(victim, victim.stat().st_size - 1)
    written = stopped(None)
    out = export()
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert written == files[1:]
    assert f"1 of {len(files)} weight files are finished" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in exported[kind].iterdir()
    }


def test_what_another_export_left_is_not_used(tiny_gpt_oss, adapter, tmp_path, stopped):
    stopped(3)
    with pytest.raises(KeyboardInterrupt):
        merge(tiny_gpt_oss, adapter, tmp_path / "out", torch.bfloat16, SHARD)
    other = make_adapter(tiny_gpt_oss, tmp_path / "other", seed=7)
    written = stopped(None)
    out = merge(tiny_gpt_oss, other, tmp_path / "out", torch.bfloat16, SHARD)
    assert len(written) == len(list(out.glob("*.safetensors")))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_a_stop_in_the_first_file_leaves_nothing(tiny_gpt_oss, adapter, tmp_path, stopped, error):
    stopped(1, error)
    with pytest.raises(OssiaError if error is OSError else error):
        merge(tiny_gpt_oss, adapter, tmp_path / "out", None, SHARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_weights_that_are_not_finite_are_an_error(tiny_gpt_oss, adapter, tmp_path, dtype):
    bad = tmp_path / "bad"
    bad.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.experts.lora_B" in name)
    weights[name][3, 3] = float("nan")
    save_file(weights, bad / "adapter_model.safetensors")
    (bad / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(OssiaError, match=r"layers\.1\.mlp\.experts\.down_proj: merged weights hold NaN or infinity"):
        merge(tiny_gpt_oss, bad, tmp_path / "out", dtype, SHARD)
    assert os.listdir(tmp_path) == ["bad"]


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_bad_input_is_named_before_a_tensor_is_read(tiny_gpt_oss, tiny_llama, adapter, tmp_path, monkeypatch):
    from ossia.adapters import deltas
    from ossia.export import merge as module

    for where in (module, deltas):
        monkeypatch.setattr(where, "read_rows", lambda *args: pytest.fail("a tensor was read"))
    out = tmp_path / "out"

    def refused(base, lora, error, message, dtype=None):
        with pytest.raises(error, match=message):
            merge(base, lora, out, dtype, SHARD)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    cut = copy_of(adapter, tmp_path / "cut-adapter") / "adapter_model.safetensors"
    os.truncate(cut, cut.stat().st_size - 10)
    refused(tiny_gpt_oss, cut.parent, OssiaError, r"adapter_model\.safetensors: damaged or cut short")
    base = copy_of(tiny_gpt_oss, tmp_path / "base")
    cut = next(base.glob("model-00001-*"))
    os.truncate(cut, cut.stat().st_size - 10)
    refused(base, adapter, OssiaError, r"model-00001-of-00001\.safetensors: damaged or cut short")
    cut.unlink()
    refused(base, adapter, OssiaError, "weight file of the index missing, first model-00001")
    refused(tiny.gpt_oss(tmp_path / "wide", hidden=96), adapter, OssiaError, "adapter of another base model")
    refused(tiny.gpt_oss(tmp_path / "short", layers=1), adapter, OssiaError, "of the weights it changes are not in")
    refused(tiny_llama, adapter, UsageError, "--format mxfp4: .* is no gpt-oss")

    config = json.loads((tiny_llama / "config.json").read_text())
    gptq = copy_of(tiny_llama, tmp_path / "gptq")
    tiny.dump(gptq / "config.json", config | {"quantization_config": {"quant_method": "gptq"}})
    refused(gptq, adapter, OssiaError, "quantized by gptq", torch.bfloat16)

    saved_wrong = copy_of(tiny_gpt_oss, tmp_path / "wrong")
    for file in saved_wrong.glob("*.safetensors"):
        save_file({n: t.bfloat16() if n.endswith("_blocks") else t for n, t in load_file(file).items()}, file)
    refused(saved_wrong, adapter, OssiaError, "is not MXFP4.*save_original_format=False")

    class Full:
        free = 1000

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Full)
    refused(tiny_gpt_oss, adapter, OssiaError, r"--output_dir .*: needs 0\.0 GB, .* has 0\.0 GB free; free some space")
    monkeypatch.undo()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="already there and not empty"):
        merge(tiny_gpt_oss, adapter, out, None, SHARD)
    assert os.listdir(out) == ["mine"]


def test_the_command_leaves_no_path_of_this_machine(ossia, tiny_gpt_oss, adapter, tmp_path):
    flags = ("--adapters", adapter, "--merge_lora", "true", "--output_dir", "here")
    said = ossia.ok("export", *flags, "--format", "mxfp4", "--verify", "false")
    assert "experts rounded to MXFP4: relative error" in said
    assert "experts in MXFP4; loads with transformers alone" in said
    here = tmp_path / "here"
    assert {"config.json", "README.md", "tokenizer.json", "tokenizer_config.json", "export_report.json"} <= set(
        os.listdir(here)
    )
    for file in here.iterdir():
        content = file.read_bytes()
        for private in (tmp_path, adapter, tiny_gpt_oss, Path.home()):
            assert str(private).encode() not in content, file.name
    done = ossia("export", *flags)
    assert (done.returncode, "already there and not empty" in done.stderr) == (2, True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark of memory to reset")
def test_memory_does_not_grow_with_the_model(tmp_path):
    for name, layers in (("few", 2), ("many", 12)):
        base = tiny.gpt_oss(tmp_path / name, hidden=512, intermediate=512, layers=layers)
        make_adapter(base, tmp_path / f"{name}-adapter", std=0.01)
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from ossia.export import tensors; from ossia.export.merge import merge\n"
        "tensors.PIECE_VALUES = {'cpu': 1 << 16}; torch.set_num_threads(1); root = Path(sys.argv[1])\n"
        "for run, base in enumerate(('few', 'few', 'many')):\n"
        "    for dtype in (torch.bfloat16, None):\n"
        "        open('/proc/self/clear_refs', 'w').write('5')\n"
        "        merge(root / base, root / f'{base}-adapter', root / f'{run}-{dtype}', dtype, 10**9)\n"
        "        lines = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "        print('peak', int(lines['VmHWM'].split()[0]) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    sizes = [next((tmp_path / f"{run}-torch.bfloat16").glob("*.safetensors")).stat().st_size for run in (1, 2)]
    # The first run warms up. The ten more layers are 65 MB in bfloat16; the allocator's own ups and downs are 10 MB.
    assert max(peaks[4:]) - max(peaks[2:4]) < (sizes[1] - sizes[0]) / 3
