"""Streaming of safetensors: against safetensors' own reader, damaged files, bytes read, memory held."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ossia.errors import OssiaError
from ossia.model import stream
from ossia.model.load import load_model
from ossia.model.stream import Staging, find_tensors, page_locked, read_header, read_tensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)
SHAPES = ((), (0,), (1,), (3, 0, 2), (7, 5), (3, 1, 11), (129,))


@pytest.fixture
def file(tmp_path) -> Path:
    """Every dtype in every shape."""
    tensors = {}
    for dtype in (*FLOATS, *WHOLE, torch.bool, torch.complex64, torch.float8_e8m0fnu):
        for shape in SHAPES:
            count = torch.Size(shape).numel() * dtype.itemsize
            values = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
            tensors[f"{dtype}{shape}".removeprefix("torch.")] = values.view(dtype).view(shape)
    save_file(tensors, tmp_path / "all.safetensors", {"format": "pt"})
    return tmp_path / "all.safetensors"


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to the byte, NaNs too; E8M0 arrives as bytes."""
    assert got.dtype == (torch.uint8 if want.dtype == torch.float8_e8m0fnu else want.dtype)
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert torch.equal(got.cpu().reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """The (start, bytes) of each read of tensors; no call gets more than 17 bytes, as the system may have it."""
    done: list[tuple[int, int]] = []
    preadv = os.preadv

    def short(descriptor, buffers, start):
        count = preadv(descriptor, [buffers[0][:17]], start)
        done.append((start, count))
        return count

    monkeypatch.setattr(os, "preadv", short)
    return done


@pytest.mark.parametrize("way", ["whole", "pieces", "staged", "one buffer"])
def test_reads_what_safetensors_reads(file, device, way, monkeypatch):
    where = torch.device(device)
    if way == "pieces":
        monkeypatch.setattr(stream, "PIECE", 64)
    staging = {"staged": lambda: Staging(where, 3, 64), "one buffer": lambda: Staging(where, 1, 64)}.get(way)
    want = load_file(file)
    got = dict(read_tensors({file: list(want)}, where, staging=staging() if staging else None))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.device.type == where.type
        assert_same(tensor, want[name])


def test_order_is_the_files_and_only_wanted_bytes_are_read(file, reads, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.arange(40.0), "y": torch.arange(9)}, other)
    want = load_file(file)
    names = ["int64(7, 5)", "bfloat16(129,)", "float32()", "uint8(0,)"]
    got = list(read_tensors({other: ["y"], file: names}, torch.device("cpu")))
    header = read_header(file)
    assert [name for name, _ in got] == ["y", *sorted(names, key=lambda name: header[name].start)]
    for name, tensor in got[1:]:
        assert_same(tensor, want[name])
    asked = [*(header[name] for name in names), read_header(other)["y"]]
    assert sum(count for _, count in reads) == sum(stored.nbytes for stored in asked)
    for start, count in reads:
        assert any(stored.start <= start and start + count <= stored.end for stored in asked)


def test_host_tensors_arrive_on_the_host(file, device):
    want = load_file(file)
    kept = ["bfloat16(129,)", "float32()", "int8(3, 0, 2)"]
    for name, tensor in read_tensors({file: list(want)}, torch.device(device), kept):
        assert tensor.device.type == ("cpu" if name in kept else device)
        # CUDA knows no address of an empty tensor.
        assert tensor.is_pinned() == (device == "cuda" and name in kept and tensor.numel() > 0)
        assert_same(tensor, want[name])


def test_few_tensors_are_begun_ahead_and_none_is_kept(tmp_path, reads, monkeypatch):
    path = tmp_path / "ten.safetensors"
    save_file({str(n): torch.full((1000,), n, dtype=torch.uint8) for n in range(10)}, path)
    monkeypatch.setattr(stream, "AHEAD", 2500)
    tensors = read_tensors({path: [str(n) for n in range(10)]}, torch.device("cpu"))
    for taken in range(1, 8):
        name, tensor = next(tensors)
        assert (tensor == int(name)).all()
        assert sum(count for _, count in reads) <= 1000 * taken + 2500
        held = weakref.ref(tensor)
        del tensor
        assert held() is None
    tensors.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ossia-read")]
    assert sum(count for _, count in reads) < 10_000


def test_a_larger_tensor_than_read_ahead_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(5), "b": torch.arange(1000), "c": torch.arange(7)}, path)
    monkeypatch.setattr(stream, "AHEAD", 100)
    got = dict(read_tensors({path: ["a", "b", "c"]}, torch.device("cpu")))
    assert {name: len(tensor) for name, tensor in got.items()} == {"a": 5, "b": 1000, "c": 7}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, dtype: str = "U8", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


DAMAGED = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": (1000).to_bytes(8, "little"),
    "header too long": ({"a": entry(0, 4)}, b"1234", 10**6),
    "header of exabytes": ({"a": entry(0, 4)}, b"1234", 2**64 - 1),
    "bad JSON": (b'{"a": ', b"1234"),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "deep JSON": (b"[" * 100_000, b""),
    "a list": ([], b""),
    "no entry": ({"a": 3}, b""),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, b"1234"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, b"1234"),
    "negative length": ({"a": entry(0, 4, shape=[-2, -2])}, b"1234"),
    "length not whole": ({"a": entry(0, 4, shape=[4.0])}, b"1234"),
    "length true": ({"a": entry(0, 4, shape=[4, True])}, b"1234"),
    "negative offset": ({"a": entry(-4, 0)}, b"1234"),
    "backwards": ({"a": entry(4, 0, shape=[4])}, b"1234"),
    "bytes against shape": ({"a": entry(0, 4, shape=[3])}, b"1234"),
    "bytes against dtype": ({"a": entry(0, 4, "BF16", [4])}, b"1234"),
    "outside": ({"a": entry(0, 8)}, b"1234"),
    "overlapping": ({"a": entry(0, 3), "b": entry(2, 5)}, b"12345"),
    "gap": ({"a": entry(0, 2), "b": entry(3, 5)}, b"12345"),
    "gap at the beginning": ({"a": entry(1, 5)}, b"12345"),
    "too long": ({"a": entry(0, 4)}, b"12345"),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_damaged_files_are_named(tmp_path, case):
    path, made = tmp_path / "bad.safetensors", DAMAGED[case]
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        write(path, *made)
    with pytest.raises(OssiaError, match=re.escape(f"{path}: damaged or cut short (") + ".*; copy it again$"):
        read_header(path)


def test_every_cut_of_a_file_is_found(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.arange(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    assert list(read_header(path)) == list(load_file(path))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(OssiaError, match="damaged or cut short"):
            read_header(path)


def test_unknown_dtype_lacking_tensor_and_lacking_file_are_named(tmp_path):
    odd = write(tmp_path / "odd.safetensors", {"a": entry(0, 4, "F4", [8])}, b"1234")
    with pytest.raises(OssiaError, match=r"odd.safetensors: a is F4, which is not read here"):
        read_header(odd)
    good = write(tmp_path / "good.safetensors", {"__metadata__": {"format": "pt"}, "a": entry(0, 4)}, b"1234")
    with pytest.raises(OssiaError, match=r"good.safetensors: damaged or cut short \(no b in it\)"):
        find_tensors({good: ["b", "a"]})
    with pytest.raises(OssiaError, match=r"gone.safetensors: not readable \(No such file"):
        read_header(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("staged", [False, True])
def test_a_file_cut_while_it_is_read_is_named(tmp_path, monkeypatch, staged):
    path = tmp_path / "a.safetensors"
    save_file({str(n): torch.arange(1000) for n in range(4)}, path)
    monkeypatch.setattr(stream, "AHEAD", 8000)
    cpu = torch.device("cpu")
    tensors = read_tensors({path: list("0123")}, cpu, staging=Staging(cpu, 2, 64) if staged else None)
    next(tensors)
    os.truncate(path, 20_000)
    with pytest.raises(OssiaError, match=r"a.safetensors: damaged or cut short \(ends at byte 20000\)"):
        list(tensors)


def test_an_error_of_the_system_is_named(file, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OssiaError, match=r"all.safetensors: not readable \(Input/output error\)"):
        list(read_tensors({file: ["int64(7, 5)"]}, torch.device("cpu")))


def test_page_locked_memory_is_whole_pages_and_given_back(monkeypatch):
    locked: dict[int, int] = {}
    runtime = types.SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: locked.update({address: size}),
        cudaHostUnregister=lambda address: locked.pop(address),
    )
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    gpu = torch.device("cuda", 0)
    tensor, scalar = page_locked((3, 5000), torch.bfloat16, gpu), page_locked((), torch.float32, gpu)
    assert (tensor.shape, tensor.dtype, scalar.shape) == ((3, 5000), torch.bfloat16, ())
    assert locked == {tensor.data_ptr(): 8 * 4096, scalar.data_ptr(): 4096}
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert parameter.data_ptr() % 4096 == 0
    del tensor, scalar
    gc.collect()
    assert locked == {parameter.data_ptr(): 8 * 4096}
    del parameter
    gc.collect()
    assert not locked


def test_page_locked_memory_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    for shape in ((), (0,), (3, 5000), (1 << 22,)):
        tensor = page_locked(shape, torch.bfloat16, torch.device("cuda")).fill_(3)
        assert tensor.is_pinned() == (tensor.numel() > 0)
        assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), torch.full(shape, 3, dtype=torch.bfloat16))
        del tensor


# The loader on top.


@pytest.fixture
def broken(tiny_gpt_oss, tmp_path, monkeypatch):
    """Changes the tensors of a gpt-oss and says why it does not load, without a byte of a tensor read."""

    def message(change, config: dict | None = None, **options) -> str:
        tensors = {}
        for shard in tiny_gpt_oss.glob("*.safetensors"):
            tensors |= load_file(shard)
        change(tensors)
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        settings = json.loads((tiny_gpt_oss / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(tensors, folder / "model.safetensors")
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a tensor was read"))
        with pytest.raises(OssiaError) as caught:
            load_model(folder, device="cpu", **options)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    return message


UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("experts", ["mxfp4", "dequantized"])
def test_wrong_tensors_are_named_before_any_is_read(broken, experts):
    def says(change, *words, **options):
        text = broken(change, experts=experts, **options)
        assert all(word in text for word in words), text

    says(lambda t: t.pop("model.norm.weight"), "1 tensor missing, first model.norm.weight")
    says(lambda t: t.pop(f"{UP}_scales"), f"1 tensor missing, first {UP}_scales")
    says(
        lambda t: t.update({"model.extra": torch.ones(1)}), "1 tensor of no use in this architecture, first model.extra"
    )
    says(lambda t: t.update({"model.extra_blocks": torch.ones(1).byte()}), "first model.extra_blocks")
    says(lambda t: t.update({"lm_head.weight_blocks": torch.ones(1).byte()}), "first lm_head.weight_blocks")
    says(lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight is (3,)", "says (64,)")
    says(
        lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][:, :, :1].clone()}),
        f"{UP}_blocks is (4, 64, 1, 16), config.json says (4, 64, 2, 16)",
    )
    says(lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].bfloat16()}), f"{UP}_scales holds torch.bfloat16")
    says(lambda t: t.update({"model.norm.weight": torch.ones(64).int()}), "model.norm.weight holds torch.int32")
    says(lambda t: None, "gate_up_proj_bias is (4, 64), config.json says (4, 48)", config={"intermediate_size": 24})


def test_a_cut_shard_is_named_before_any_tensor_is_read(tiny_gpt_oss, tmp_path, monkeypatch):
    for source in tiny_gpt_oss.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    last = max(tmp_path.glob("*.safetensors"))
    os.truncate(last, last.stat().st_size - 1)
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(OssiaError, match=f"{last.name}: damaged or cut short"):
        load_model(tmp_path)


def test_loaded_tensors_are_those_on_disk(tiny_gpt_oss, device):
    model = load_model(tiny_gpt_oss, device=device, torch_dtype="bfloat16", experts="mxfp4", attn_impl="eager")
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for shard in tiny_gpt_oss.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            got = held.pop(name)
            assert got.device.type == device
            assert got.dtype == (torch.float32 if ".router." in name else tensor.dtype)
            assert torch.equal(got.cpu(), tensor.to(got.dtype)), name
    assert all(".rotary_emb." in name for name in held)


def test_tied_head_is_the_embedding(tiny_gpt_oss, tmp_path):
    tensors = {}
    for shard in tiny_gpt_oss.glob("*.safetensors"):
        tensors |= load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tiny_gpt_oss / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load_model(tmp_path, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("base", ["tiny_gpt_oss", "tiny_llama"])
def test_offloaded_parameters_stay_on_the_host(request, base, dtype, device):
    folder, name = request.getfixturevalue(base), "model.embed_tokens.weight"
    options = {"torch_dtype": dtype, "attn_impl": "eager", "experts": "dequantized"}
    want = dict(load_model(folder, device="cpu", **options).named_parameters())
    names = [name, "model.layers.0.mlp.experts.down_proj"] if base == "tiny_gpt_oss" else [name]
    for key, got in load_model(folder, device=device, offload=names, **options).named_parameters():
        assert got.device.type == ("cpu" if key in names else device)
        assert got.is_pinned() == (key in names and device == "cuda")
        assert not got.requires_grad
        assert torch.equal(got.cpu(), want[key]), key


@pytest.mark.parametrize("base", ["tiny_gpt_oss", "tiny_llama"])
def test_unknown_offload_is_named(request, base):
    with pytest.raises(OssiaError, match=r"no model.embed_token.weight; did you mean 'model.embed_tokens.weight'\?"):
        load_model(request.getfixturevalue(base), offload=["model.embed_token.weight"])
