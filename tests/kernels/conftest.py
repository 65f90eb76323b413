"""What tests of several kernels share."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch


@pytest.fixture
def triton_device(device):
    """Each device on which this process runs Triton's kernels: interpreted on a CPU, compiled on a GPU."""
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("compiled for the GPU, not interpreted")
    return device


@pytest.fixture(params=["public", "reference", "triton"])
def kernel(request, device):
    """Each implementation of the kernel whose folder the test's module names in KERNEL, on each device that runs it."""
    folder = f"ossia.kernels.{request.module.KERNEL}"
    if request.param == "public":
        return import_module(folder)
    if request.param == "triton":
        request.getfixturevalue("triton_device")
    return import_module(f"{folder}.{request.param}")


@pytest.fixture
def poison():
    """New tensors that nothing fills hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
