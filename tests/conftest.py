"""Fixtures: tiny checkpoints, shared by a test session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    # Read when triton is first imported, which torch may do.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests import tiny


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return request.param


@pytest.fixture(scope="session")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random gpt-oss with MXFP4 experts."""
    return tiny.gpt_oss(tmp_path_factory.mktemp("model") / "gpt-oss")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    return tiny.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with reasoning."""
    return tiny.rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
