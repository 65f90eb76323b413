"""Chunked linear cross-entropy against plain float64: the reference, and the Triton kernel interpreted or compiled."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ossia.kernels import linear_cross_entropy as public
from ossia.kernels.linear_cross_entropy import reference

KERNEL = "linear_cross_entropy"
pytestmark = pytest.mark.usefixtures("poison")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Of the gradient of logits given in the dtype: half a unit of its last place.
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8}
# One block partly filled, and several of which the last is.
VOCABULARIES = [37, 5000]


def oracle(hidden, head, labels, weights, smoothing):
    """Weighted loss, its gradient and the right guesses, float64, of positions with a weight."""
    kept = weights > 0
    exact = hidden.detach().double().requires_grad_()
    logits = exact[kept] @ head.double().T
    losses = F.cross_entropy(logits, labels[kept], reduction="none", label_smoothing=smoothing)
    loss = (losses * weights[kept].double()).sum()
    loss.backward()
    return loss, exact.grad, (logits.argmax(-1) == labels[kept]).sum()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_against_float64(kernel, device, dtype, chunk, vocabulary, smoothing):
    torch.manual_seed(0)
    hidden = torch.randn(13, 24).to(device, dtype).requires_grad_()
    head = torch.randn(vocabulary, 24).to(device, dtype)
    labels, weights = torch.randint(0, vocabulary, (13,)).to(device), torch.rand(13).to(device)
    labels[::2] = (hidden @ head.T).argmax(-1)[::2]
    weights[[0, 4, 12]] = 0
    labels[4] = -100

    loss, correct = kernel.linear_cross_entropy(hidden, head, labels, weights, chunk, smoothing)
    (loss * 3).backward()
    expected, grad, right = oracle(hidden, head, labels, weights, smoothing)
    assert loss.dtype == correct.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=TOLERANCE[dtype])
    assert correct == right >= 4
    assert hidden.grad.dtype == dtype
    assert (hidden.grad.double() - 3 * grad).norm() < TOLERANCE[dtype] * 3 * grad.norm()
    assert (hidden.grad[weights == 0] == 0).all()
    with torch.no_grad():
        again, _ = kernel.linear_cross_entropy(hidden, head, labels, weights, chunk, smoothing)
    assert torch.allclose(again, loss, rtol=1e-6)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("vocabulary", [1, 37, 20011])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "triton"], indirect=True)
def test_step_on_given_logits(kernel, device, dtype, vocabulary, smoothing, gradient):
    torch.manual_seed(vocabulary)
    scale = torch.tensor([0.0, 0.1, 1, 5, 30, 300, 6e4])
    logits = (torch.randn(7, vocabulary) * scale[:, None]).to(device, dtype)
    labels = torch.randint(0, vocabulary, (7,)).to(device)
    weights = (torch.rand(7) + 0.1).to(device)
    labels[4] = logits[4].argmax()

    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing) * weights.double()
    losses.sum().backward()
    given = logits.clone()
    loss, right = kernel.step(given, labels, weights, smoothing, gradient)
    assert torch.allclose(loss.double(), losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(right, (logits.argmax(-1) == labels).float())
    if gradient:
        # The interpreter cuts float32 to bfloat16 where a GPU rounds.
        cut = 2 if kernel is not reference and device == "cpu" else 1
        assert torch.allclose(given.double(), exact.grad, rtol=cut * ROUNDING[dtype] + 1e-5, atol=1e-6)
    elif kernel is not reference:
        assert torch.equal(given, logits)


def column(values: torch.Tensor, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden [1, 16] and head [V, 16] whose logits are `values` exactly."""
    hidden = torch.eye(1, 16).to(device, dtype).requires_grad_()
    head = torch.zeros(len(values), 16)
    head[:, 0] = values
    return hidden, head.to(device, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("first", "second"), [(3, 7), (3, 4999), (4095, 4096), (0, 4998)])
def test_the_first_of_equal_guesses_counts(kernel, device, dtype, first, second):
    values = torch.full((5000,), -1.0)
    values[[first, second]] = 5.0
    hidden, head = column(values, device, dtype)
    for label, right in ((first, 1), (second, 0), (50, 0)):
        weights = torch.ones(1, device=device)
        assert kernel.linear_cross_entropy(hidden, head, torch.tensor([label], device=device), weights)[1] == right


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("values", [[60000.0, -60000.0], [-60000.0], [60000.0], [60000.0, 59000.0, 0.0]])
@pytest.mark.parametrize("label", [1, 4999])
def test_extreme_logits(kernel, device, dtype, smoothing, values, label):
    hidden, head = column(torch.tensor(values).repeat(5000)[:5000], device, dtype)
    labels, weights = torch.tensor([label], device=device), torch.tensor([0.5], device=device)
    loss, correct = kernel.linear_cross_entropy(hidden, head, labels, weights, 1024, smoothing)
    loss.backward()
    expected, grad, right = oracle(hidden, head, labels, weights, smoothing)
    # float32 holds 60000 to 0.004.
    assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=5e-3)
    assert correct == right
    # The product adds 5000 terms to sums of up to 30000 = weight · 60000, which cancel: 1e-4 of those in float32.
    assert (hidden.grad.double() - grad).norm() <= max(1e-4, TOLERANCE[dtype]) * 30000


def test_nothing_to_train_is_zero_with_a_gradient(kernel, device):
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    labels, weights = torch.zeros(3, dtype=torch.long, device=device), torch.zeros(3, device=device)
    loss, correct = kernel.linear_cross_entropy(hidden, torch.randn(5, 8, device=device), labels, weights)
    loss.backward()
    assert loss == 0
    assert correct == 0
    assert (hidden.grad == 0).all()


def test_positions_of_weight_zero_are_never_read(kernel, device):
    hidden, head = torch.randn(2, 8, device=device), torch.randn(5, 8, device=device)
    hidden[0] = float("nan")
    hidden.requires_grad_()
    labels, weights = torch.tensor([-100, 3], device=device), torch.tensor([0.0, 1.0], device=device)
    loss, _ = kernel.linear_cross_entropy(hidden, head, labels, weights)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("place", [0, 2, 4999])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nan_shows(kernel, device, dtype, place):
    hidden, head = column(torch.zeros(5000), device, dtype)
    head[place] = float("nan")
    loss, _ = kernel.linear_cross_entropy(hidden, head, torch.tensor([2], device=device), torch.ones(1, device=device))
    assert loss.isnan()


def test_no_gradient_is_made_that_nobody_asked_for():
    asked = []

    def step(*inputs):
        asked.append(inputs[-1])
        return reference.step(*inputs)

    hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    labels, weights = torch.tensor([0, 1, 2]), torch.ones(3)
    reference.linear_cross_entropy(hidden, head, labels, weights, step=step)
    reference.linear_cross_entropy(hidden.detach(), head, labels, weights, step=step)
    with torch.no_grad():
        reference.linear_cross_entropy(hidden, head, labels, weights, step=step)
    assert asked == [True, False, False]


def test_autocast_changes_nothing(kernel, device):
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)
    labels, weights = torch.tensor([0, 1, 2], device=device), torch.ones(3, device=device)
    plain, _ = kernel.linear_cross_entropy(hidden, head, labels, weights)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(kernel.linear_cross_entropy(hidden, head, labels, weights)[0], plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_one_chunk_exist_at_a_time(gradient):
    hidden = torch.randn(1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=gradient)
    head = torch.randn(50_000, 64, device="cuda", dtype=torch.bfloat16)
    labels, weights = torch.zeros(1024, dtype=torch.long, device="cuda"), torch.ones(1024, device="cuda")
    public.linear_cross_entropy(hidden, head, labels, weights, 128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    public.linear_cross_entropy(hidden, head, labels, weights, 128)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 128 * 50_000 * 2
