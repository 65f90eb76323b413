"""What older and newer GPUs are told, without having them."""

from __future__ import annotations

import pytest
import torch

from ossia.errors import UsageError
from ossia.model import load


@pytest.fixture
def gpu(monkeypatch):
    def of(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
        return torch.device("cuda", 0)

    return of


def test_before_ampere_bfloat16_is_refused_with_the_way_out(gpu):
    for wanted in ("auto", "bfloat16"):
        with pytest.raises(
            UsageError, match=r"a card \(compute capability 7\.5\) has no bfloat16.*--torch_dtype float32"
        ):
            load.pick_dtype(wanted, gpu(7, 5))
    assert load.pick_dtype("float32", gpu(7, 5)) == torch.float32
    assert load.pick_dtype("auto", gpu(8, 0)) == torch.bfloat16
    assert load.pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_what_is_slow_is_said(gpu, monkeypatch):
    assert load.path_lines(gpu(9, 0), dropout=False) == ["kernels: attention by Triton in windows, cuDNN elsewhere"]
    ampere = "\n".join(load.path_lines(gpu(8, 6), dropout=True))
    assert "FlashAttention 2 elsewhere" in ampere
    assert "--lora_dropout" in ampere
    assert "one by one below compute capability 9.0 (slow)" in ampere
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in "\n".join(load.path_lines(gpu(9, 0), dropout=False))
