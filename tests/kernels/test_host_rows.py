"""Rows of a table in host memory equal plain indexing."""

import pytest
import torch

from ossia.kernels.host_rows import host_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "width"), [((3, 5), 48), ((1,), 2880), ((2, 0), 32)])
def test_equal_to_indexing(shape, width, dtype):
    pytest.importorskip("triton")
    from ossia.kernels.host_rows import triton

    table, index = torch.randn(70, width).to(dtype), torch.randint(0, 70, shape)
    held = table.pin_memory() if DEVICE == "cuda" else table
    for function in (host_rows, triton.host_rows):
        out = function(held, index.to(DEVICE))
        assert out.device.type == DEVICE
        assert torch.equal(out.cpu(), table[index])
