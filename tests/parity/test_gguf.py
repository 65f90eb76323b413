"""GGUF exports: the values of the MXFP4 export under llama.cpp's names, read back, and computed by llama.cpp itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.parity.test_export import dense_experts, make_adapter, tensors
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedTokenizerFast

from ossia.config import ExportConfig
from ossia.errors import OssiaError, UsageError
from ossia.export import gguf as module
from ossia.export import tensors as tensors_module
from ossia.export.gguf import FILE, MODELFILE, check_file, merge_gguf, pack_blocks
from ossia.export.merge import merge
from ossia.export.run import run
from ossia.kernels.mxfp4 import dequantize
from ossia.template.harmony import HarmonyTemplate
from ossia.template.messages import Message

LAYERS = 2
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": True,
}


def save_tokenizer(folder: Path, size: int) -> None:
    """256 bytes, one merge and harmony's tokens, text split as o200k does it; the last ids stay without a token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "in"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("i", "n")]))
    split = pre_tokenizers.Split(Regex(module._SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(tiny.HARMONY))
    tokenizer.add_tokens([AddedToken("mine", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|return|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    assert tokenizer.get_vocab_size() < size


def make_base(folder: Path, hidden: int = 64, intermediate: int = 96, **values: object) -> Path:
    tiny.gpt_oss(folder, hidden=hidden, intermediate=intermediate, layers=LAYERS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 288, "rope_scaling": YARN, "pad_token_id": 258, "eos_token_id": 259, **values}
    tiny.dump(folder / "config.json", config)
    generator = torch.Generator().manual_seed(3)
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name in held.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
            held[name] = torch.randn(288, hidden, generator=generator).bfloat16()
        save_file(held, file)
    save_tokenizer(folder, 288)
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("gguf") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """Of the attention and of the experts in layer 1."""
    return make_adapter(base, tmp_path_factory.mktemp("gguf") / "adapter", target_experts="1")


@pytest.fixture(scope="module")
def exported(base, adapter, tmp_path_factory) -> tuple[Path, Path]:
    """The model as GGUF and in safetensors with MXFP4, both written in many pieces."""
    root = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_module, "PIECE_VALUES", {"cpu": 5000})
        return merge_gguf(base, adapter, root / "gguf"), merge(base, adapter, root / "mxfp4", None, 10**9)


@pytest.fixture(scope="module")
def reader(exported) -> gguf.GGUFReader:
    return gguf.GGUFReader(exported[0] / FILE)


def values(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Tensors of a file in float32, as the gguf package expands them."""
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_repacked_blocks_are_the_same_values_to_ggml(experts, outputs, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=generator)
    # 2^-127 is subnormal and 2^127 times 6 is infinite; gguf 0.19 halves its scales, and loses the first.
    scales = torch.randint(2, 253, (experts, outputs, groups), dtype=torch.uint8, generator=generator)
    packed = pack_blocks(blocks, scales)
    assert packed.shape == (experts, outputs, groups * 17)
    theirs = torch.tensor(gguf.quants.dequantize(packed.numpy(), Type.MXFP4))
    torch.testing.assert_close(theirs, dequantize(blocks, scales, torch.float32), rtol=0, atol=0)


def test_names_and_types_are_llama_cpps(reader):
    arch = gguf.MODEL_ARCH.GPT_OSS
    named = {
        name.format(bid=n) for t in gguf.MODEL_TENSORS[arch] for name in [gguf.TENSOR_NAMES[t]] for n in range(LAYERS)
    }
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {name.rpartition(".")[0] for name in found} <= named
    theirs = gguf.get_tensor_name_map(arch, LAYERS)
    for name, ours in module._names(LAYERS).items():
        if len(ours) == 1 and "experts" not in name:
            dotted = name if name.endswith(("weight", "bias")) else f"{name}.weight"
            assert theirs.get_name(dotted, try_suffixes=(".weight", ".bias")) == ours[0]
    assert len(found) == 3 + LAYERS * 19
    for name, tensor in found.items():
        if name.endswith("_exps.weight"):
            assert tensor.tensor_type == Type.MXFP4
        elif name.endswith(".bias") or "norm" in name or "sinks" in name or "gate_inp" in name:
            assert tensor.tensor_type == Type.F32
        else:
            assert tensor.tensor_type == Type.BF16
    assert found["blk.0.ffn_gate_exps.weight"].shape.tolist() == [64, 96, 4]
    assert found["blk.0.ffn_down_exps.weight"].shape.tolist() == [96, 64, 4]
    assert found["blk.0.attn_k.weight"].shape.tolist() == [64, 32]


def test_values_are_those_of_the_mxfp4_export(exported, reader):
    merged, found = dense_experts(exported[1]), values(reader)
    for name, ours in module._names(LAYERS).items():
        want = merged[name].float()
        if name.endswith("_proj") and "experts" in name:
            want = want.transpose(1, 2)
        parts = [want] if len(ours) == 1 else [want[:, 0::2], want[:, 1::2]]
        for target, part in zip(ours, parts, strict=True):
            torch.testing.assert_close(found[target], part, rtol=0, atol=0)
    reports = [json.loads((folder / "export_report.json").read_text()) for folder in exported]
    assert reports[0] == reports[1]


def test_experts_that_the_adapter_leaves_alone_are_the_bases_bytes(base, reader):
    held, found = tensors(base), {tensor.name: tensor for tensor in reader.tensors}
    packed = pack_blocks(*(held[f"model.layers.0.mlp.experts.gate_up_proj_{half}"] for half in ("blocks", "scales")))
    assert np.array_equal(found["blk.0.ffn_gate_exps.weight"].data, packed[:, 0::2])
    assert np.array_equal(found["blk.0.ffn_up_exps.weight"].data, packed[:, 1::2])
    touched = pack_blocks(*(held[f"model.layers.1.mlp.experts.down_proj_{half}"] for half in ("blocks", "scales")))
    assert not np.array_equal(found["blk.1.ffn_down_exps.weight"].data, touched)


def test_metadata(reader):
    found = {name: field.contents() for name, field in reader.fields.items()}
    want = {
        "general.architecture": "gpt-oss",
        "general.type": "model",
        "general.name": "gguf",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
        "general.quantization_version": 2,
        "gpt-oss.block_count": 2,
        "gpt-oss.context_length": 131072,
        "gpt-oss.embedding_length": 64,
        "gpt-oss.feed_forward_length": 96,
        "gpt-oss.expert_feed_forward_length": 96,
        "gpt-oss.attention.head_count": 4,
        "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 16,
        "gpt-oss.attention.value_length": 16,
        "gpt-oss.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "gpt-oss.attention.sliding_window": 8,
        "gpt-oss.expert_count": 4,
        "gpt-oss.expert_used_count": 2,
        "gpt-oss.rope.freq_base": 150000.0,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 32.0,
        "gpt-oss.rope.scaling.original_context_length": 4096,
        "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.merges": ["i n"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {name: found[name] for name in want} == want
    kinds = gguf.TokenType
    tokens = list(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert len(tokens) == 288
    assert tokens[256] == ("in", kinds.NORMAL)
    assert tokens[257:266] == [(token, kinds.CONTROL) for token in tiny.HARMONY]
    assert tokens[266:268] == [("mine", kinds.USER_DEFINED), ("[PAD267]", kinds.UNUSED)]


def test_the_folder_and_its_modelfile(exported, base):
    folder = exported[0]
    assert {file.name for file in folder.iterdir()} == {FILE, MODELFILE, "LICENSE", "export_report.json"}
    assert (folder / FILE).stat().st_size % gguf.GGUF_DEFAULT_ALIGNMENT == 0
    text = (folder / MODELFILE).read_text()
    assert text.startswith(f"FROM ./{FILE}\n")
    # The template with its variables put in is what training and `ossia infer` write.
    fast = PreTrainedTokenizerFast.from_pretrained(base)
    template = HarmonyTemplate(fast)
    want = fast.decode(template.prompt([Message("system", "Be brief."), Message("user", "Hi")]))
    shown = text.partition('TEMPLATE """')[2].partition('"""')[0]
    system, developer, user = shown.split("\n{{- if eq")[0], shown.split('"system" }}')[1], shown.split('"user" }}')[1]
    got = system.replace('{{ or .ThinkLevel "medium" }}', "medium").partition("\n{{- range")[0]
    got += developer.partition("\n{{- else")[0].replace("{{ .Content }}", "Be brief.")
    got += user.partition("\n{{- else")[0].replace("{{ .Content }}", "Hi")
    assert got + shown.rpartition("}}")[2] == want


def test_the_command_writes_a_card_and_no_path(ossia, base, adapter, tmp_path):
    said = ossia.ok("export", "--adapters", adapter, "--merge_lora", "true", "--format", "gguf", "--output_dir", "here")
    assert "every tensor reads back as meant" in said
    assert "ollama create here -f" in said
    card = (tmp_path / "here" / "README.md").read_text()
    assert f"llama-server -m {FILE}" in card
    assert "transformers" not in card
    for file in (tmp_path / "here").iterdir():
        for private in (tmp_path, adapter, base, Path.home()):
            assert str(private).encode() not in file.read_bytes(), file.name


def test_without_the_package_nothing_begins(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("ossia.export.run.check_adapter", lambda name: pytest.fail("work began"))
    with pytest.raises(OssiaError, match=r"--format gguf needs the package gguf: pip install 'ossia\[gguf\]'"):
        run(ExportConfig(adapters=[str(adapter)], merge_lora=True, format="gguf"))


def test_bad_input_is_named_before_a_tensor_is_read(base, adapter, tiny_gpt_oss, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("ossia.export.merge.read_rows", lambda *args: pytest.fail("a tensor was read"))
    out = tmp_path / "out"

    def refused(base: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            merge_gguf(base, adapter, out)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))

    def changed(name: str, **values: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tiny.dump(folder / "config.json", json.loads((base / "config.json").read_text()) | values)
        return folder

    refused(tiny_llama, UsageError, "--format gguf: .* is no gpt-oss")
    refused(
        changed("alpha", swiglu_alpha=1.0), UsageError, "swiglu_alpha 1.0, and llama.cpp computes .* with 1.702 alone"
    )
    refused(changed("limit", swiglu_limit=9.0), UsageError, "swiglu_limit 9.0")
    refused(changed("full", layer_types=["full_attention"] * 2), UsageError, "layer_types")
    linear = {"rope_type": "linear", "factor": 2.0}
    refused(changed("linear", rope_scaling=linear), UsageError, "has rope_type linear")
    refused(
        changed("few", num_hidden_layers=1, layer_types=["sliding_attention"]), OssiaError, r"there is model\.layers\.1"
    )
    refused(changed("size", vocab_size=200), OssiaError, "has token 266, and .* a vocab_size of 200")
    other = changed("split")
    tiny.save_tokenizer(other, tiny.HARMONY, "<|endoftext|>", "<|return|>", None)
    refused(other, OssiaError, "splits text otherwise than o200k")
    (other / "tokenizer.json").unlink()
    refused(other, OssiaError, r"no tokenizer\.json")

    class Full:
        free = 1000

    monkeypatch.setattr("ossia.export.merge.shutil.disk_usage", lambda path: Full)
    refused(base, OssiaError, "--output_dir .*: needs 0.0 GB")
    monkeypatch.undo()
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="already there and not empty"):
        merge_gguf(base, adapter, out)
    assert os.listdir(out) == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_a_stop_keeps_what_is_finished(base, adapter, whole, tmp_path, monkeypatch, capsys, error):
    def stop(*args: object) -> None:
        raise error

    monkeypatch.setattr(tensors_module, "PIECE_VALUES", {"cpu": 5000})
    monkeypatch.setattr(module, "check_file", stop)
    with pytest.raises(OssiaError if error is OSError else error) as raised:
        merge_gguf(base, adapter, tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.part"]
    assert "finished tensors stay in" in str(raised.value) + capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(tensors_module.RowWriter, "write", lambda *args: pytest.fail("written again"))
    assert content(merge_gguf(base, adapter, tmp_path / "out")) == content(whole)
    assert os.listdir(tmp_path) == ["out"]


def test_a_stop_before_anything_is_finished_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module.RowWriter, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_gguf(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from ossia.export import gguf, tensors
from ossia.export.gguf import merge_gguf

base, adapter, out = map(Path, sys.argv[1:])
tensors.PIECE_VALUES = {"cpu": 5000}
pwrite, replace, check_file = os.pwrite, Path.replace, gguf.check_file

def child(work):
    process = os.fork()
    if not process:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def export(in_write=0, in_record=0, in_check=False):
    # Killed in the middle of the n-th write or just before the n-th record takes its name, or when all is written.
    count = {"write": 0, "record": 0}

    def write(handle, data, start):
        count["write"] += 1
        if count["write"] == in_write:
            pwrite(handle, data[: len(data) // 2], start)
            die()
        return pwrite(handle, data, start)

    def named(path, target):
        count["record"] += path.suffix == ".new"
        if count["record"] == in_record and path.suffix == ".new":
            die()
        return replace(path, target)

    tensors.os.pwrite, Path.replace = write, named
    gguf.check_file = die if in_check else check_file
    merge_gguf(base, adapter, out)

gguf._checked_config(base)  # imports once what every child needs
for number, moment in enumerate([
    dict(in_write=1), dict(in_write=2), dict(in_write=5), dict(in_record=1), dict(in_write=9), dict(in_record=3),
    dict(in_write=12), dict(in_write=10), dict(in_record=4), dict(in_check=True),
]):
    print("killed" if child(lambda: export(**moment)) == -signal.SIGKILL else "ended", number, flush=True)
    assert not out.exists()
print("finished", child(export), flush=True)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(base, adapter, tmp_path_factory) -> Path:
    """An export that nothing stopped, in many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors_module, "PIECE_VALUES", {"cpu": 5000})
        return merge_gguf(base, adapter, tmp_path_factory.mktemp("whole") / "out")


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(base, adapter, whole, tmp_path):
    command = [sys.executable, "-u", "-c", KILLED, base, adapter, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("killed", "ended"))] == [f"killed {n}" for n in range(10)]
    resumed = [int(line.split()[6]) for line in lines if line.startswith("going on with a stopped export")]
    assert len(resumed) >= 6
    assert resumed == sorted(resumed)
    assert lines[-1] == "finished 0"
    assert os.listdir(tmp_path) == ["out"]
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize("changed", ["adapter", "template"])
def test_what_another_export_left_is_not_used(base, adapter, tmp_path, monkeypatch, changed):
    own = tmp_path / "base"
    own.mkdir()
    for file in base.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
        os.utime(own / file.name, (0, 0))
    monkeypatch.setattr(module, "check_file", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_gguf(own, adapter, tmp_path / "out")
    monkeypatch.undo()
    if changed == "adapter":
        adapter = make_adapter(base, tmp_path / "adapter", seed=7)
    else:
        (own / "chat_template.jinja").write_text("{{ other }}")
    whole = merge_gguf(own, adapter, tmp_path / "whole" / "out")
    assert content(merge_gguf(own, adapter, tmp_path / "out")) == content(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_reads_back_otherwise_is_refused(base, adapter, tmp_path, monkeypatch):
    write = tensors_module.RowWriter.write

    def flipped(writer: tensors_module.RowWriter, name: str, rows: torch.Tensor) -> None:
        if name == "blk.1.attn_q.weight":
            rows = rows.clone()
            rows[-1, -1] += 1
        write(writer, name, rows)

    monkeypatch.setattr(tensors_module.RowWriter, "write", flipped)
    with pytest.raises(OssiaError, match=r"model-mxfp4\.gguf: blk\.1\.attn_q\.weight reads back otherwise"):
        merge_gguf(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_file_cut_short_is_refused(exported, tmp_path):
    data = (exported[0] / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-100])
    with pytest.raises(OssiaError, match="reads back damaged"):
        check_file(tmp_path / FILE, {}, {})


def expanded(reader: gguf.GGUFReader, path: Path) -> Path:
    """The same file with every tensor in float32."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp_computes_what_transformers_does(exported, reader, tmp_path):
    """In float32 to rounding (3e-6); of the file itself llama.cpp rounds activations to 8 bits first (0.029)."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    text = "The capital of Japan is Tokyo. 日本の首都は東京です。 3333.14 don't WE'll\n\n  x\t🚀<|end|><|start|>"
    ids = PreTrainedTokenizerFast.from_pretrained(exported[1])(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        exported[1], dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]

    def away(file: Path) -> float:
        # Keys and values in float32 too.
        llama = llama_cpp.Llama(
            str(file), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0, n_gpu_layers=0
        )
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
        llama.eval(ids)
        got = torch.tensor(np.array(llama.scores[: len(ids)]))
        llama.close()
        return float((got - want).norm() / want.norm())

    assert away(expanded(reader, tmp_path / "float32.gguf")) < 1e-5
    assert away(exported[0] / FILE) < 0.05
