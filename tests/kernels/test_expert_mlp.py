"""The experts' MLP: the fused path against the reference in float64, outputs and every gradient.

Interpreted on a CPU in float32, compiled on a GPU in bfloat16 (where the reference's own bfloat16 error is the measure).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ossia.kernels import expert_mlp
from ossia.kernels.expert_mlp import Adapter, Frozen, Memory, recomputing
from ossia.kernels.mxfp4 import dequantize, quantize

pytest.importorskip("triton")
from ossia.kernels.expert_mlp.fused import expert_mlp as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ALPHA, LIMIT, SCALE = 1.702, 3.0, 1.5


class Case:
    """Tokens, experts and adapters, drawn anew for each shape; every second expert is never chosen."""

    def __init__(self, tokens, top_k, experts, hidden, inner, rank, *, quantized=True, sparse=False):
        g = torch.Generator().manual_seed(tokens * 100 + rank)
        randn = partial(torch.randn, generator=g)
        self.hidden = randn(tokens, hidden).to(DEVICE, DTYPE)
        choices = torch.arange(0, experts, 2) if sparse else torch.arange(experts)
        pick = torch.stack([choices[torch.randperm(len(choices), generator=g)[:top_k]] for _ in range(tokens)])
        self.index = pick.to(DEVICE)
        self.weight = randn(tokens, top_k).softmax(-1).to(DEVICE)
        self.rank, sizes = rank, ((hidden, 2 * inner), (inner, hidden))
        self.frozen, self.pairs = [], []
        for inputs, outputs in sizes:
            blocks, scales = (x.to(DEVICE) for x in quantize(randn(experts, outputs, inputs) * inputs**-0.5))
            bias = randn(experts, outputs).to(DEVICE, DTYPE)
            dense = dequantize(blocks, scales, DTYPE).transpose(1, 2)
            self.frozen.append(
                Frozen(bias, inputs, blocks, scales)
                if quantized
                else Frozen(bias, inputs, dense_EIO=dense.contiguous())
            )
            self.pairs.append(
                (
                    (randn(experts, inputs, rank) * inputs**-0.5).to(DEVICE),
                    (randn(experts, rank, outputs) * max(rank, 1) ** -0.5).to(DEVICE),
                )
            )
        self.residual, self.probe = randn(tokens, hidden).to(DEVICE, DTYPE), randn(tokens, hidden).to(DEVICE)

    def run(self, kind):
        """Output and gradients to hidden, weights, residual, A1, B1, A2, B2, in float64."""
        dtype = {"fused": DTYPE, "reference": DTYPE, "exact": torch.float64}[kind.partition(" ")[0]]
        hidden = self.hidden.to(dtype, copy=True).requires_grad_()
        weight = self.weight.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        pairs = [
            [x.to(dtype if kind == "exact" else torch.float32, copy=True).requires_grad_() for x in p]
            for p in self.pairs
        ]
        frozen = [self._frozen(f, dtype) for f in self.frozen]
        if "held" in kind:
            with torch.no_grad():
                frozen = [
                    f._replace(wide=f.expand(dtype, *(x.detach() for x in p)), blocks=None, scales=None, dense_EIO=None)
                    for f, p in zip(frozen, pairs, strict=True)
                ]
        residual = self.residual.to(dtype, copy=True).requires_grad_()
        common = (self.index, weight, *frozen, ALPHA, LIMIT)
        if kind.startswith("fused"):
            adapters = [Adapter(*p) if self.rank else None for p in pairs]
            memory = Memory("again" not in kind, 2 if "part" in kind else 0, "reuse" in kind)
            out = fused(hidden, *common, *adapters, SCALE, memory, residual)
            values = out.detach().double()
            if "twin" in kind:
                with recomputing():
                    out = fused(hidden, *common, *adapters, SCALE, memory, residual)
        else:
            out = residual + self._slow(hidden, *common, pairs)
            values = out.detach().double()
        (out.double() * self.probe.double()).sum().backward()
        wanted = [hidden, weight, residual, *(x for p in pairs for x in p if self.rank)]
        return [values, *(x.grad.double() for x in wanted)]

    def _frozen(self, frozen, dtype):
        return (
            frozen
            if dtype == DTYPE
            else Frozen(*(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype != torch.uint8 else x for x in frozen))
        )

    def _slow(self, hidden, index, weight, up, down, alpha, limit, pairs):
        """One token and one expert at a time: no code shared with either path."""
        out = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            total = 0
            for k in range(index.shape[1]):
                e, x = index[t, k], hidden[t]
                y = self._linear(x, up, pairs[0], e)
                gate, value = y[0::2].clamp(max=limit), y[1::2].clamp(-limit, limit)
                total = total + weight[t, k].to(hidden.dtype) * self._linear(
                    (value + 1) * gate * torch.sigmoid(alpha * gate), down, pairs[1], e
                )
            out = out.index_put((torch.tensor(t, device=out.device),), total)
        return out

    def _linear(self, x, frozen, pair, e):
        if frozen.dense_EIO is None:
            dense = dequantize(frozen.blocks[e], frozen.scales[e], torch.float32).to(x.dtype).T
        else:
            dense = frozen.dense_EIO[e].to(x.dtype)
        y = x @ dense + frozen.bias_EO[e].to(x.dtype)
        return y + SCALE * (x @ pair[0][e].to(x.dtype)) @ pair[1][e].to(x.dtype) if self.rank else y


CASES = {
    "odd": Case(7, 2, 4, 64, 32, 3),
    "rank 8": Case(33, 4, 5, 96, 64, 8),
    "one token": Case(1, 1, 3, 32, 96, 1),
    "no adapter": Case(9, 2, 4, 64, 32, 0),
    "experts without tokens": Case(70, 1, 6, 64, 32, 16, sparse=True),
    "floating point": Case(11, 2, 4, 64, 32, 4, quantized=False),
    "wide rank": Case(5, 2, 3, 64, 32, 40),
    "rows in parts": Case(520, 2, 2, 32, 96, 3),
}


def test_adapters_are_written_into_expanded_weights():
    from ossia.kernels.expert_mlp import frozen, triton

    for name in ("odd", "rank 8", "wide rank"):
        case = CASES[name]
        for weight, (a, b) in zip(case.frozen, case.pairs, strict=True):
            tail = frozen.padded(case.rank)
            shape = (len(a), b.shape[2] + tail, a.shape[1] + tail)
            got, want = (torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE) for _ in range(2))
            triton.write_adapter(got, a, b)
            want[:, :, a.shape[1] :] = 0
            want[:, b.shape[2] :, : a.shape[1]] = 0
            want[:, : b.shape[2], a.shape[1] : a.shape[1] + case.rank] = b.transpose(1, 2).to(DTYPE)
            want[:, b.shape[2] : b.shape[2] + case.rank, : a.shape[1]] = a.transpose(1, 2).to(DTYPE)
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
            assert weight.expand(DTYPE, a, b).isfinite().all()


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (7, 4, 5), (3000, 2, 33), (9000, 4, 5)])
def test_rows_are_sorted_as_the_reference_sorts(tokens, top_k, experts):
    from ossia.kernels.expert_mlp import triton
    from ossia.kernels.expert_mlp.reference import sort_by_expert

    index = torch.rand(tokens, experts).topk(top_k, -1).indices.to(DEVICE)
    for got, want in zip(triton.sort_by_expert(index, experts), sort_by_expert(index, experts), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def error(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-9)).item()


@pytest.mark.parametrize(
    "kind",
    [
        "fused",
        "fused again",
        "fused part",
        "fused again part",
        "fused twin",
        "fused twin reuse",
        "fused again reuse",
        "fused held",
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_against_float64(name, kind):
    case = CASES[name]
    exact, got, plain = case.run("exact"), case.run(kind), case.run("reference")
    for number, (ours, want, common) in enumerate(zip(got, exact, plain, strict=True)):
        allowed = 2e-5 if DEVICE == "cpu" else max(2e-2, error(common, want))
        assert error(ours, want) <= allowed, f"result {number}"


@pytest.mark.parametrize("name", ["odd", "no adapter"])
def test_reference_against_float64(name):
    case = CASES[name]
    if case.rank:

        def delta(pair):
            return lambda rows, offsets: (
                SCALE
                * torch.stack(
                    [
                        r @ pair[0][e].to(r.dtype) @ pair[1][e].to(r.dtype)
                        for r, e in zip(rows, case.index.flatten().sort(stable=True)[0], strict=True)
                    ]
                )
            )

    out = expert_mlp.reference(
        case.hidden,
        case.index,
        case.weight,
        *case.frozen,
        ALPHA,
        LIMIT,
        *([delta(p) for p in case.pairs] if case.rank else []),
    )
    assert error(out.double(), case.run("exact")[0] - case.residual.double()) < (2e-5 if DEVICE == "cpu" else 2e-2)


def test_reference_takes_expanded_weights():
    case = CASES["odd"]
    held = [f.held(DTYPE, None, None)._replace(blocks=None, scales=None) for f in case.frozen]
    inputs = (case.hidden, case.index, case.weight)
    got, want = (expert_mlp.reference(*inputs, *frozen, ALPHA, LIMIT) for frozen in (held, case.frozen))
    assert torch.equal(got, want)


def test_backward_runs_once():
    case = CASES["odd"]
    hidden = case.hidden.clone().requires_grad_()
    out = fused(hidden, case.index, case.weight, *case.frozen, ALPHA, LIMIT)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        out.sum().backward()


@pytest.mark.parametrize("trained", [(0, 1), (2, 3), (3,)])
def test_some_of_the_adapters_train_alone(trained):
    """An adapter of one projection is filled up with zeros that do not train."""
    case = CASES["rank 8"]

    def gradients(trained):
        sides = [side.clone().requires_grad_(i in trained) for i, side in enumerate(x for p in case.pairs for x in p)]
        pairs = (Adapter(*sides[:2]), Adapter(*sides[2:]))
        inputs = (case.hidden.clone().requires_grad_(), case.index, case.weight)
        fused(*inputs, *case.frozen, ALPHA, LIMIT, *pairs, SCALE).float().square().sum().backward()
        return [side.grad for side in sides]

    everything = gradients(range(4))
    for i, (got, want) in enumerate(zip(gradients(trained), everything, strict=True)):
        assert torch.equal(got, want) if i in trained else got is None


def test_nothing_expanded_is_saved():
    case = CASES["rank 8"]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused(
            case.hidden.clone().requires_grad_(),
            case.index,
            case.weight,
            *case.frozen,
            ALPHA,
            LIMIT,
            *(Adapter(*p) for p in case.pairs),
        )
    assert max(saved) < min(5 * 96 * 128, 5 * 64 * 96)


@pytest.mark.parametrize("rows", [100, 1101])
def test_outer_products_of_few_and_of_many_rows(rows):
    """Of many, each expert's are summed in parts."""
    from ossia.kernels.expert_mlp.triton import outer

    g = torch.Generator().manual_seed(rows)
    thin, wide = (torch.randn(rows, width, generator=g).to(DEVICE, DTYPE) for width in (16, 40))
    ends = [rows // 3, rows]
    out = torch.full((2, 6, 40), float("nan"), device=DEVICE).transpose(1, 2)
    assert outer(thin, wide, torch.tensor(ends, dtype=torch.int32, device=DEVICE), out) is out
    for got, rows_of in zip(out, (slice(0, ends[0]), slice(ends[0], ends[1])), strict=True):
        want = wide[rows_of].double().T @ thin[rows_of, :6].double()
        assert (got.double() - want).norm() <= 2e-6 * want.norm()
