"""Chunked linear cross-entropy against plain float64."""

import pytest
import torch
from torch.nn import functional as F

from ossia.kernels.linear_cross_entropy import linear_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_loss_and_gradient_against_float64(device, dtype, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(13, 24).to(device, dtype).requires_grad_()
    head = torch.randn(37, 24).to(device, dtype)
    labels, weights = torch.randint(0, 37, (13,), device=device), torch.rand(13, device=device)
    weights[[0, 4, 12]] = 0

    loss, correct = linear_cross_entropy(hidden, head, labels, weights, chunk)
    (loss * 3).backward()

    exact = hidden.detach().double().requires_grad_()
    logits = exact @ head.double().T
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights.double()).sum()
    (expected * 3).backward()
    kept = weights > 0
    assert torch.allclose(loss.double(), expected, rtol=TOLERANCE[dtype])
    assert correct == (logits.argmax(-1) == labels)[kept].sum()
    assert (hidden.grad.double() - exact.grad).norm() < TOLERANCE[dtype] * exact.grad.norm()
    assert (hidden.grad[~kept] == 0).all()


def test_nothing_to_train_is_zero_with_a_gradient():
    hidden = torch.randn(3, 8, requires_grad=True)
    loss, correct = linear_cross_entropy(hidden, torch.randn(5, 8), torch.zeros(3, dtype=torch.long), torch.zeros(3))
    loss.backward()
    assert loss == 0
    assert correct == 0
    assert (hidden.grad == 0).all()


def test_labels_of_weight_zero_are_never_read():
    hidden, head = torch.randn(2, 8), torch.randn(5, 8)
    loss, _ = linear_cross_entropy(hidden, head, torch.tensor([-100, 3]), torch.tensor([0.0, 1.0]))
    assert torch.isfinite(loss)
