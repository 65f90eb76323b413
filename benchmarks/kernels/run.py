"""Each kernel at gpt-oss-20b's shapes beside what it replaces: milliseconds, TFLOP/s, TB/s.

python benchmarks/kernels/run.py --out FILE.json [--tokens 16384] [--groups NAME …] [--tiny]

What it replaces is its own reference in PyTorch, or the library's kernel that would serve. Medians of Triton's
do_bench. TRITON_INTERPRET=1 with --tiny runs toy shapes on a CPU, to check this script.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.bench.run import measured_on

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)


class Shape(NamedTuple):
    tokens: int
    hidden: int = 2880
    inner: int = 2880
    experts: int = 32
    top_k: int = 4
    heads: int = 64
    kv_heads: int = 8
    size: int = 64
    vocabulary: int = 201088
    rank: int = 8
    length: int = 4096


TINY = Shape(12, 64, 64, 4, 2, 4, 2, 16, 300, 3, 6)


class Job(NamedTuple):
    """One kernel: what runs, what it replaces, and the work it cannot avoid."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None = None
    beside: str = "reference"
    flops: float = 0
    bytes: float = 0
    graph: bool = False  # too short to be timed with its launches


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def both_ways(function: Callable[..., Tensor], *inputs: Any) -> Callable[[], None]:
    """Forward and backward to every tensor that takes a gradient."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    probe: list[Tensor] = []

    def run() -> None:
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        if not probe:
            probe.append(torch.randn_like(out))
        torch.autograd.grad(out, leaves, probe[0])

    return run


def mxfp4(s: Shape) -> Iterator[Job]:
    from ossia.kernels.mxfp4 import reference, triton

    blocks = torch.randint(0, 256, (s.experts, 2 * s.inner, s.hidden // 32, 16), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(119, 121, blocks.shape[:3], dtype=torch.uint8, device=DEVICE)
    wide = torch.empty(s.experts, 2 * s.inner + 16, s.hidden + 16, dtype=torch.bfloat16, device=DEVICE)
    moved = blocks.numel() * 17 / 16 + 2 * s.experts * 2 * s.inner * s.hidden
    out = wide[:, : 2 * s.inner, : s.hidden]
    theirs = functools.partial(reference.dequantize, blocks, scales, torch.bfloat16)
    yield Job("mxfp4 gate_up", lambda: triton.dequantize(blocks, scales), theirs, bytes=moved)
    yield Job("mxfp4 gate_up, into wider rows", lambda: triton.dequantize(blocks, scales, out), bytes=moved)


def expert_mlp(s: Shape) -> Iterator[Job]:
    from ossia.kernels.expert_mlp import Frozen, reference
    from ossia.kernels.expert_mlp.fused import Adapter
    from ossia.kernels.expert_mlp.fused import expert_mlp as fused
    from ossia.kernels.grouped_linear import grouped_linear

    frozen, adapters = [], []
    for inputs, outputs in ((s.hidden, 2 * s.inner), (s.inner, s.hidden)):
        blocks = torch.randint(0, 256, (s.experts, outputs, inputs // 32, 16), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(119, 121, blocks.shape[:3], dtype=torch.uint8, device=DEVICE)
        frozen.append(Frozen(randn(s.experts, outputs), inputs, blocks, scales))
        a = (randn(s.experts, inputs, s.rank).float() * 0.02).requires_grad_()
        b = (randn(s.experts, s.rank, outputs).float() * 0.02).requires_grad_()
        adapters.append(Adapter(a, b))
    hidden = randn(s.tokens, s.hidden).requires_grad_()
    index = torch.rand(s.tokens, s.experts, device=DEVICE).topk(s.top_k, -1).indices
    weight = torch.rand(s.tokens, s.top_k, device=DEVICE).softmax(-1).requires_grad_()

    def delta(adapter: Adapter) -> Callable[[Tensor, Tensor], Tensor]:
        def add(rows: Tensor, offsets: Tensor) -> Tensor:
            pad = -s.rank % 8
            a, b = (x.to(rows.dtype) for x in adapter)
            return grouped_linear(grouped_linear(rows, F.pad(a, (0, pad)), offsets), F.pad(b, (0, 0, 0, pad)), offsets)

        return add

    def plain(hidden: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        deltas = (delta(adapters[0]), delta(adapters[1]))
        return reference(hidden, index, weight, frozen[0], frozen[1], 1.702, 7.0, *deltas)

    def ours(hidden: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        return fused(hidden, index, weight, frozen[0], frozen[1], 1.702, 7.0, adapters[0], adapters[1])

    leaves = (hidden, weight, *adapters[0], *adapters[1])
    work = 2 * s.tokens * s.top_k * 3 * s.hidden * s.inner
    jobs = both_ways(ours, *leaves), both_ways(plain, *leaves)
    yield Job("expert MLP with LoRA, both ways", *jobs, flops=2 * work)
    yield swiglu_backward(s, index, weight.detach(), frozen[0].bias_EO)


def swiglu_backward(s: Shape, index: Tensor, weight: Tensor, bias: Tensor) -> Job:
    """By columns, beside rows and the two outer products that rows leave to others."""
    from ossia.kernels.expert_mlp import triton

    order = triton.sort_by_expert(index, s.experts)
    tail = triton.padded(s.rank)
    rows, back = randn(s.tokens * s.top_k, 2 * s.inner + tail), randn(s.tokens * s.top_k, s.inner)
    thin, biased = randn(len(rows), tail), torch.randn(len(rows), device=DEVICE)
    a, b = (torch.randn(s.experts, *shape, device=DEVICE) for shape in ((s.inner, s.rank), (s.rank, 2 * s.inner)))
    to = triton.Outer(thin, thin, torch.empty_like(b).transpose(1, 2), torch.empty_like(a))
    inputs = (rows, bias, order.order_S, order.offsets_E, back, weight, biased, 1.702, 7.0, a, b, 1.0, to)

    def by_rows() -> None:
        highest, triton._COLUMNS_RANK = triton._COLUMNS_RANK, -1
        triton.swiglu_backward_(*inputs)
        triton._COLUMNS_RANK = highest

    moved = 2 * rows.nbytes + back.nbytes
    return Job("SwiGLU's backward", lambda: triton.swiglu_backward_(*inputs), by_rows, "by rows", bytes=moved)


def qkv(s: Shape) -> Iterator[Job]:
    from ossia.kernels.qkv import Adapter, reference
    from ossia.kernels.qkv.fused import qkv as fused

    outputs = [heads * s.size for heads in (s.heads, s.kv_heads, s.kv_heads)]
    x = randn(1, s.tokens, s.hidden).requires_grad_()
    frozen, angles = (randn(sum(outputs), s.hidden), randn(sum(outputs))), randn(1, s.tokens, s.size // 2).float()
    adapters = [
        Adapter(randn(s.rank, s.hidden).float().requires_grad_(), randn(o, s.rank).float().requires_grad_(), 2.0)
        for o in outputs
    ]
    leaves = (x, *(tensor for adapter in adapters for tensor in (adapter.a, adapter.b)))

    def joined(function: Callable[..., Any]) -> Callable[[], None]:
        return both_ways(lambda x, *_: torch.cat(function(x, *frozen, adapters, angles, angles), 2), *leaves)

    work = 4 * s.tokens * s.hidden * sum(outputs)
    yield Job("q, k, v with LoRA and RoPE, both ways", joined(fused), joined(reference), flops=work)


def attention(s: Shape) -> Iterator[Job]:
    from ossia.kernels import attention as kernels
    from ossia.kernels.attention.window import attention as windowed

    batch = max(1, s.tokens // s.length)
    q, k, v = (randn(batch, s.length, n, s.size).requires_grad_() for n in (s.heads, s.kv_heads, s.kv_heads))
    sinks, scale = randn(s.heads).float(), s.size**-0.5
    window = min(128, s.length // 2)
    inputs, work = (q, k, v, sinks, scale), 14 * batch * s.heads * s.size * s.length
    theirs = kernels.flash if CUDA else kernels.reference
    beside = "FlashAttention 2" if CUDA else "reference"
    yield Job(
        "attention in windows, both ways",
        both_ways(windowed, *inputs, window),
        both_ways(theirs, *inputs, window),
        beside,
        flops=work * window,
    )
    if CUDA and torch.cuda.get_device_capability() >= (9, 0):
        jobs = both_ways(kernels.cudnn, *inputs), both_ways(theirs, *inputs)
        yield Job("whole attention by cuDNN, both ways", *jobs, beside, flops=work * s.length / 2)


def rows(s: Shape) -> Iterator[Job]:
    from ossia.kernels.rms_norm import reference as norm_reference
    from ossia.kernels.rms_norm import triton as norm
    from ossia.kernels.rope import reference as rope_reference
    from ossia.kernels.rope import triton as rope
    from ossia.kernels.route import reference as route_reference
    from ossia.kernels.route import triton as route

    x, weight = randn(s.tokens, s.hidden).requires_grad_(), randn(s.hidden)
    moved = x.element_size() * x.numel()
    jobs = both_ways(norm.rms_norm, x, weight, 1e-5), both_ways(norm_reference.rms_norm, x, weight, 1e-5)
    yield Job("RMSNorm, both ways", *jobs, bytes=5 * moved)
    q = randn(1, s.tokens, s.heads, s.size).requires_grad_()
    angles = randn(1, s.tokens, s.size // 2).float()
    jobs = both_ways(rope.rope, q, angles, angles), both_ways(rope_reference.rope, q, angles, angles)
    yield Job("RoPE of queries, both ways", *jobs, bytes=4 * q.element_size() * q.numel())
    router, bias = randn(s.experts, s.hidden).float(), randn(s.experts).float()

    def weights(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: module.route(x, router, bias, s.top_k)[1]

    yield Job(
        "routing, both ways", both_ways(weights(route), x), both_ways(weights(route_reference), x), bytes=2 * moved
    )


def loss(s: Shape) -> Iterator[Job]:
    from ossia.kernels.linear_cross_entropy import linear_cross_entropy, reference

    hidden, head = randn(s.tokens, s.hidden).requires_grad_(), randn(s.vocabulary, s.hidden)
    labels = torch.randint(0, s.vocabulary, (s.tokens,), device=DEVICE)
    ones = torch.ones(s.tokens, device=DEVICE)

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], None]:
        return both_ways(lambda x: function(x, head, labels, ones), hidden)

    work = 4 * s.tokens * s.hidden * s.vocabulary
    yield Job("loss, both ways", run(linear_cross_entropy), run(reference.linear_cross_entropy), flops=work)


def decode_inputs(s: Shape, tokens: int) -> tuple[tuple[Any, ...], tuple[Any, Any], float]:
    """Experts' inputs for few tokens, their adapters, and the bytes of the blocks that these tokens need."""
    from ossia.kernels.expert_mlp import Adapter, Frozen

    frozen, adapters = [], []
    for inputs, outputs in ((s.hidden, 2 * s.inner), (s.inner, s.hidden)):
        blocks = torch.randint(0, 256, (s.experts, outputs, inputs // 32, 16), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(119, 121, blocks.shape[:3], dtype=torch.uint8, device=DEVICE)
        frozen.append(Frozen(randn(s.experts, outputs), inputs, blocks, scales))
        adapters.append(Adapter(randn(s.experts, inputs, s.rank), randn(s.experts, s.rank, outputs)))
    index = torch.rand(tokens, s.experts, device=DEVICE).topk(s.top_k, -1).indices
    weight = torch.rand(tokens, s.top_k, device=DEVICE).softmax(-1)
    hidden, residual = randn(tokens, s.hidden), randn(tokens, s.hidden)
    size = len(index.unique()) * 3 * s.hidden * s.inner * (0.5 + 1 / 32)
    return (hidden, index, weight, *frozen, 1.702, 7.0, residual), (adapters[0], adapters[1]), size


def decode(s: Shape) -> Iterator[Job]:
    """What a step of generation takes of a layer."""
    from ossia.kernels.expert_decode import expert_decode
    from ossia.kernels.paged_attention import Pages, attend
    from ossia.kernels.route import route

    for tokens in (1, 8, 64):
        inputs, adapters, size = decode_inputs(s, tokens)
        for name, pair in (("", None), (" with LoRA", adapters)):
            ours = functools.partial(expert_decode, *inputs, pair, blocks=True)
            theirs = functools.partial(expert_decode, *inputs, pair)
            yield Job(f"experts of {tokens} tokens{name}", ours, theirs, bytes=size, graph=True)
        router, bias = randn(s.experts, s.hidden, dtype=torch.float32), randn(s.experts, dtype=torch.float32)
        yield Job(f"routing of {tokens} tokens", functools.partial(route, inputs[0], router, bias, s.top_k),
                  graph=True)  # fmt: skip
        for length in (128, 1024, 8192):
            count = -(-length // 128)
            k, v = (randn(tokens * count, s.kv_heads, 128, s.size) for _ in range(2))
            table = torch.arange(tokens * count, dtype=torch.int32, device=DEVICE).view(tokens, count)
            pages = Pages(k, v, table, 128 if length == 128 else None)
            place, position = torch.arange(tokens, device=DEVICE), torch.full((tokens,), length - 1, device=DEVICE)
            some = (randn(tokens, s.heads, s.size), pages, place, position, randn(s.heads), 0.125)
            yield Job(f"attention of {tokens} tokens to {length:,} before", functools.partial(attend, *some),
                      bytes=2 * k.nbytes, graph=True)  # fmt: skip


def tiles(s: Shape) -> Iterator[Job]:
    """Tiles of the experts' product for few tokens."""
    from ossia.kernels.expert_decode import triton

    for tokens in (1, 8, 64):
        inputs, _, size = decode_inputs(s, tokens)
        for columns, run, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 4), (4,)):
            tile = {"COLS": columns, "RUN": run, "num_warps": warps, "num_stages": stages}

            def ours(tile: dict[str, int] = tile, inputs: tuple[Any, ...] = inputs) -> Any:
                triton._FEW = triton._MANY = tile
                return triton.expert_decode(*inputs)

            yield Job(f"experts of {tokens} tokens by {tile}", ours, bytes=size, graph=True)


GROUPS = {group.__name__: group for group in (mxfp4, expert_mlp, qkv, attention, rows, loss, decode, tiles)}


def milliseconds(function: Callable[[], Any], graph: bool = False) -> float:
    if CUDA:
        from triton.testing import do_bench, do_bench_cudagraph

        if graph:
            return do_bench_cudagraph(function, rep=20, return_mode="median")
        return do_bench(function, warmup=25, rep=100, return_mode="median")
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=[name for name in GROUPS if name != "tiles"])
    args = parser.parse_args()
    shape = TINY if args.tiny else Shape(args.tokens)
    results: list[dict[str, Any]] = []
    for group in args.groups:
        for job in GROUPS[group](shape):
            result: dict[str, Any] = {"kernel": job.name, "milliseconds": round(milliseconds(job.ours, job.graph), 4)}
            if job.theirs is not None:
                result["beside"] = job.beside
                with contextlib.suppress(torch.OutOfMemoryError):
                    result["beside_milliseconds"] = round(milliseconds(job.theirs), 4)
            if job.flops:
                result["tflops"] = round(job.flops / result["milliseconds"] / 1e9, 1)
            if job.bytes:
                result["terabytes_per_second"] = round(job.bytes / result["milliseconds"] / 1e9, 3)
            results.append(result)
            print(result, flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    made = {"environment": measured_on(torch.device(DEVICE)), "tokens": shape.tokens}
    if args.out:
        args.out.write_text(json.dumps({**made, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
