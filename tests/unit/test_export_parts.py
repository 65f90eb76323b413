"""Parts of an export: files in pieces, dealing tensors to files, changes from a header, options, private paths."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ossia.adapters.deltas import AdapterDeltas
from ossia.config import ExportConfig, SftConfig, VerifyConfig
from ossia.errors import OssiaError, UsageError
from ossia.export import tensors as module
from ossia.export.folder import check_output, write_rest
from ossia.export.rows import conversations_of
from ossia.export.shards import Unit, pack
from ossia.export.tensors import Spec, Writer, pieces
from ossia.model.stream import read_header, read_rows

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.int64)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape).mul(3).to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5), st.integers(1, 20))
def test_a_file_in_pieces_is_what_safetensors_reads(tmp_path_factory, kinds, size):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    want = {f"t{index}": random(*kind) for index, kind in enumerate(kinds)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_VALUES", {"cpu": size})
        with Writer(path, {name: Spec(t.dtype, tuple(t.shape)) for name, t in want.items()}) as writer:
            for name, tensor in want.items():
                for first, last in pieces(tuple(tensor.shape), CPU):
                    writer.write(name, tensor[first:last] if tensor.ndim else tensor)
        got, stored = load_file(path), read_header(path)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor)
            rows = [read_rows(stored[name], first, last) for first, last in pieces(stored[name].shape, CPU)]
            if rows:
                assert torch.equal(torch.cat(rows) if tensor.ndim else rows[0], tensor)
    assert os.listdir(path.parent) == [path.name]


def test_a_file_stopped_half_way_or_short_of_rows_is_no_file(tmp_path):
    def write(rows: int, stop: bool = False) -> None:
        with Writer(tmp_path / "x.safetensors", {"a": Spec(torch.float32, (4, 2))}) as writer:
            writer.write("a", torch.zeros(rows, 2))
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(1, stop=True)
    with pytest.raises(ValueError, match="fewer rows"):
        write(3)
    with pytest.raises(ValueError, match="more rows"):
        write(5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 5])
def test_a_disk_that_fails_behind_the_merge_leaves_no_file(tmp_path, monkeypatch, count):
    def fails(*args):
        raise OSError(28, "No space left on device")

    def write():
        with Writer(tmp_path / "x.safetensors", {"a": Spec(torch.float32, (count, 2))}) as writer:
            monkeypatch.setattr(module.os, "pwrite", fails)
            for _ in range(count):
                writer.write("a", torch.zeros(1, 2))

    with pytest.raises(OSError, match="No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["a"]
    os.truncate(stored.file, stored.end - 4)
    assert len(read_rows(stored, 0, 99)) == 99
    with pytest.raises(OssiaError, match=r"x\.safetensors: cut short"):
        read_rows(stored, 0, 100)


def test_units_are_dealt_in_order_to_files_of_the_size():
    sizes = [30, 30, 30, 70, 250, 10]
    units = [Unit({str(n): Spec(torch.uint8, (size,))}, lambda roundings: iter(())) for n, size in enumerate(sizes)]
    shards = pack(units, 100)
    assert [[*shard.specs] for shard in shards] == [["0", "1", "2"], ["3"], ["4"], ["5"]]
    assert [shard.nbytes for shard in shards] == [90, 70, 250, 10]
    assert shards[1].file == "model-00002-of-00004.safetensors"


def adapter(folder, tensors=None, **values):
    """An adapter of rank 2 and alpha 6 on a linear layer [5, 3] and one expert projection [4, 3, 5]."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"], **values}
    config["target_parameters"] = ["mlp.experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model."
    shapes = {"q.lora_A": (2, 3), "q.lora_B": (5, 2), "mlp.experts.lora_A": (8, 3), "mlp.experts.lora_B": (5, 8)}
    generator = torch.Generator().manual_seed(0)
    made = {f"{prefix}{key}.weight": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(made if tensors is None else tensors, folder / "adapter_model.safetensors")
    return made


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_changes_are_those_of_peft_in_any_pieces(tmp_path, rslora, scaling):
    made = {name.removeprefix("base_model.model."): t for name, t in adapter(tmp_path, use_rslora=rslora).items()}
    deltas = AdapterDeltas(tmp_path)
    assert deltas.delta("k.weight", (5, 3)) is None
    assert deltas.delta("mlp.experts.gate_up_proj", (4, 3, 5)) is None
    linear = deltas.delta("q.weight", (5, 3)).read(CPU)
    want = made["q.lora_B.weight"] @ made["q.lora_A.weight"] * scaling
    torch.testing.assert_close(torch.cat([linear.rows(0, 2), linear.rows(2, 5)]), want)
    with pytest.raises(OssiaError, match="adapter of another base model"):
        deltas.check({"q.weight": (5, 3)}, "the base")
    experts = deltas.delta("mlp.experts.down_proj", (4, 3, 5)).read(CPU)
    # As `ParamWrapper.get_delta_weight` of peft 0.21 has it.
    a = made["mlp.experts.lora_A.weight"].reshape(4, -1, 3)
    b = made["mlp.experts.lora_B.weight"].reshape(5, -1, 4)
    want = torch.einsum("o r e, e r i -> e i o", b, a) * scaling
    torch.testing.assert_close(torch.cat([experts.rows(0, 1), experts.rows(1, 4)]), want)
    deltas.check({"q.weight": (5, 3), "mlp.experts.down_proj": (4, 3, 5)}, "the base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3": only LoRA is read'),
        ({"use_dora": True}, "use_dora is true: DoRA"),
        ({"r": 0}, "r is 0, not a whole number above 0"),
        ({"lora_alpha": None}, "lora_alpha is null, not a number above 0"),
    ],
)
def test_adapters_that_are_not_merged_are_named(tmp_path, values, message):
    adapter(tmp_path, **values)
    with pytest.raises(OssiaError, match=rf"adapter_config\.json: {re.escape(message)}"):
        AdapterDeltas(tmp_path)


def test_adapters_that_do_not_fit_are_named(tmp_path):
    made = adapter(tmp_path)
    with pytest.raises(OssiaError, match=r"another base model; q.weight is \[5, 4\] in the base"):
        AdapterDeltas(tmp_path).delta("q.weight", (5, 4))
    with pytest.raises(OssiaError, match="another base model"):
        AdapterDeltas(tmp_path).delta("mlp.experts.down_proj", (2, 3, 5))
    adapter(tmp_path, {name: tensor for name, tensor in made.items() if "q.lora_B" not in name})
    with pytest.raises(OssiaError, match=r"q\.lora_A\.weight is alone"):
        AdapterDeltas(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(OssiaError, match=r"adapter_model\.safetensors: damaged or cut short"):
        AdapterDeltas(tmp_path)


def test_options():
    assert ExportConfig(adapters="a", merge_lora=True).format is None
    assert ExportConfig(adapters="a", merge_lora=True, calibrate=True).calibrate == "true"
    with pytest.raises(UsageError, match="--format got 'fp8'"):
        ExportConfig(adapters="a", merge_lora=True, format="fp8")
    with pytest.raises(UsageError, match="--torch_dtype is for --format bf16"):
        ExportConfig(adapters="a", merge_lora=True, format="mxfp4", torch_dtype="float32")
    for more in ({"calibrate": "true"}, {"dataset": ["x.jsonl"]}):
        with pytest.raises(UsageError, match="is for --format mxfp4 and gguf"):
            ExportConfig(adapters="a", merge_lora=True, format="bf16", **more)
    with pytest.raises(UsageError, match="leave it or --calibrate false out"):
        ExportConfig(adapters="a", merge_lora=True, calibrate="false", dataset=["x.jsonl"])


def test_output_that_is_not_empty_is_refused(tmp_path):
    check_output(tmp_path)
    check_output(tmp_path / "new")
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="already there and not empty"):
            check_output(output)


def test_the_rest_of_the_folder_is_the_bases_without_paths(tmp_path):
    base, bf16, mxfp4 = (tmp_path / name for name in ("base", "bf16", "mxfp4"))
    for folder in (base, bf16, mxfp4):
        folder.mkdir()
    texts = {
        "config.json": '{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "x"}',
        "generation_config.json": '{"eos_token_id": [200002, 199999, 200012]}',
        "tokenizer_config.json": f'{{"name_or_path": "{tmp_path}", "padding_side": "left"}}',
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}\r\n",
        "LICENSE": "terms",
        "optimizer.pt": "no part of a model",
        "README.md": "of another model",
    }
    for name, text in texts.items():
        (base / name).write_bytes(text.encode())
    write_rest(base, mxfp4, None)
    write_rest(base, bf16, "bfloat16")
    for folder in (mxfp4, bf16):
        assert {file.name for file in folder.iterdir()} == set(texts) - {"optimizer.pt", "README.md"}
        for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "LICENSE"):
            assert (folder / name).read_bytes().decode() == texts[name]
        assert json.loads((folder / "tokenizer_config.json").read_text()) == {"padding_side": "left"}
        assert not any(str(tmp_path) in file.read_text() for file in folder.iterdir())
    assert (mxfp4 / "config.json").read_text() == texts["config.json"]
    assert json.loads((bf16 / "config.json").read_text()) == {"model_type": "gpt_oss", "dtype": "bfloat16"}


def test_a_bad_row_stops_what_reads_it_unless_it_is_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"ask": "q", "answer": "a"}\n{"x": 1}\n{"text": "t"}\n', encoding="utf-8")
    columns = {"ask": "question"}

    def questions(adapter, named, options):
        found = conversations_of(adapter, named, "val_dataset", options)
        assert found is not None
        return [row.messages[0].content for row in found]

    with pytest.raises(OssiaError, match=r"rows\.jsonl:2.*--on_bad_row skip"):
        questions(tmp_path, [str(file)], VerifyConfig(original="a", exported="b", columns=columns))
    skip = VerifyConfig(original="a", exported="b", on_bad_row="skip", columns=columns)
    assert questions(tmp_path, [str(file)], skip) == ["q"]
    # The rows of a run are read as it read them.
    run = SftConfig(model="m", dataset=["none"], val_dataset=[str(file)], columns=columns)
    run.save(tmp_path / "config.yaml")
    assert questions(tmp_path / "checkpoint-1", [], dataclasses.replace(skip, columns={})) == ["q"]
