"""Routing against float64: the reference, and the Triton kernels interpreted or compiled."""

from __future__ import annotations

import pytest
import torch

KERNEL = "route"
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16]
# Of the gradient in hidden's dtype; weights are float32 in both.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}


@pytest.fixture
def route(kernel):
    """Experts and weights by each module."""
    return lambda *inputs: kernel.route(*inputs)[:2]


def oracle(hidden, weight, bias, top_k, probe):
    """Experts, weights and the gradient of `(weights * probe).sum()`, float64."""
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().T + bias.double()
    index = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    share = logits.gather(1, index).softmax(-1)
    (share * probe.double()).sum().backward()
    return index, share, exact.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "size"), [(1, 181), (33, 181), (71, 48)])
@pytest.mark.parametrize("experts", [4, 5, 32])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_weights_and_gradient_against_float64(route, device, dtype, length, size, experts, top_k):
    torch.manual_seed(length)
    hidden = torch.randn(length, size).to(device, dtype).requires_grad_()
    weight, bias = (torch.randn(experts, size) / size**0.5).to(device), torch.randn(experts).to(device)
    probe = torch.randn(length, top_k).to(device)
    index, share = route(hidden, weight, bias, top_k)
    (share * probe).sum().backward()

    expected_index, expected, grad = oracle(hidden, weight, bias, top_k, probe)
    assert (index.dtype, share.dtype, hidden.grad.dtype) == (torch.int64, torch.float32, dtype)
    assert torch.equal(index, expected_index)
    assert torch.allclose(share.double(), expected, rtol=5e-6)
    if top_k == 1:
        assert (hidden.grad == 0).all()
    else:
        assert (hidden.grad.double() - grad).norm() <= TOLERANCE[dtype] * grad.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 70])  # few tokens have a kernel of their own
@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (128, 4), (9, 7)])
def test_hidden_size_of_gpt_oss_and_a_router_of_any_float(route, device, dtype, length, experts, top_k):
    torch.manual_seed(experts)
    hidden = torch.randn(length, 2880).to(device, dtype).requires_grad_()
    weight, bias = (torch.randn(experts, 2880) / 50).to(device, dtype), torch.randn(experts).to(device, dtype)
    probe = torch.randn(length, top_k).to(device)
    index, share = route(hidden, weight, bias, top_k)
    (share * probe).sum().backward()
    expected_index, expected, grad = oracle(hidden, weight, bias, top_k, probe)
    assert torch.equal(index, expected_index)
    # Tensor cores cut what they add off at the last place of the sum instead of rounding it.
    rtol = 4e-5 if device == "cuda" and dtype == torch.bfloat16 and length > 64 else 1e-5
    assert torch.allclose(share.double(), expected, rtol=rtol)
    assert (hidden.grad.double() - grad).norm() <= 2 * TOLERANCE[dtype] * grad.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [33, 97])
@pytest.mark.parametrize("experts", [5, 32])
def test_of_equal_logits_the_lowest_number_comes_first(route, device, dtype, length, experts):
    torch.manual_seed(0)
    # Small whole numbers: sums are exact, so ties are ties in every order of adding.
    hidden = torch.randint(-1, 2, (length, 20)).to(device, dtype)
    weight, bias = torch.randint(-1, 2, (experts, 20)).float().to(device), torch.zeros(experts, device=device)
    logits = hidden.double() @ weight.double().T
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert (expected.values[:, :4].diff() == 0).sum() > 10
    assert torch.equal(route(hidden, weight, bias, 4)[0], expected.indices[:, :4])
    index, share = route(hidden * 0, weight, bias, 4)
    assert torch.equal(index, torch.arange(4, device=device).expand(length, 4))
    assert torch.equal(share, torch.full_like(share, 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value)")  # numpy's, under the interpreter
@pytest.mark.parametrize("length", [4, 68])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_values_show_and_choose_different_experts(route, device, dtype, bad, length):
    hidden = torch.ones(length, 20).to(device, dtype)
    hidden[1] = bad
    weight = torch.tensor([1.0, -1, 1, -1, 1])[:, None].expand(5, 20).to(device)
    index, share = route(hidden, weight, torch.zeros(5, device=device), 4)
    assert ((index >= 0) & (index < 5)).all()
    assert all(len(set(row)) == 4 for row in index.tolist())
    assert share[1].isnan().any()
    assert share[[0, 2, 3]].isfinite().all()


def test_only_hidden_gets_a_gradient_and_weights_stay_float32_under_autocast(route, device):
    torch.manual_seed(0)
    hidden = torch.randn(7, 48, device=device, requires_grad=True)
    weight = torch.randn(8, 48, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    index, share = route(hidden, weight, bias, 2)
    assert share.requires_grad
    assert not index.requires_grad
    share[:, 0].sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(route(hidden, weight, bias, 2), (index, share), strict=True))
    with torch.no_grad():
        assert not route(hidden, weight, bias, 2)[1].requires_grad


@pytest.mark.parametrize("used", ["both", "hidden", "weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_reads_hidden_next_adds_to_its_gradient(kernel, device, dtype, used):
    torch.manual_seed(0)
    hidden = torch.randn(7, 181).to(device, dtype).requires_grad_()
    weight, bias = torch.randn(5, 181).to(device) / 13, torch.randn(5).to(device)
    _, share, same = kernel.route(hidden, weight, bias, 2)
    assert torch.equal(same, hidden)
    probe, beside = torch.randn_like(share), torch.randn_like(hidden)
    _, _, grad = oracle(hidden, weight, bias, 2, probe)
    parts = {"hidden": (same, beside, beside.double()), "weights": (share, probe, grad)}
    chosen = list(parts.values()) if used == "both" else [parts[used]]
    torch.autograd.backward([part[0] for part in chosen], [part[1] for part in chosen])
    want = sum(part[2] for part in chosen)
    assert (hidden.grad.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_views_and_no_tokens(route, device):
    torch.manual_seed(0)
    hidden = torch.randn(48, 9).to(device).T
    weight, bias = torch.randn(48, 6).to(device).T, torch.randn(12).to(device)[::2]
    got, expected = route(hidden, weight, bias, 3), route(hidden.contiguous(), weight.contiguous(), bias.clone(), 3)
    assert torch.equal(got[0], expected[0])
    assert torch.allclose(got[1], expected[1], rtol=1e-5)
    empty = torch.zeros(0, 48, device=device, requires_grad=True)
    index, share = route(empty, weight, bias, 3)
    share.sum().backward()
    assert index.shape == share.shape == (0, 3)
    assert empty.grad.shape == (0, 48)


def test_triton_keeps_nothing_of_hiddens_size(device):
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("triton compiles for the GPU")
    from ossia.kernels.route import triton

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        hidden = torch.randn(33, 48, device=device, requires_grad=True)
        triton.route(hidden, torch.randn(8, 48, device=device), torch.randn(8, device=device), 2)
    assert sorted(saved) == [(8, 48), (33, 2), (33, 2)]
