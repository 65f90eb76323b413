"""Whose base an adapter is of: the fingerprint is the weights', in either layout, and goes with the adapter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from ossia.adapters.inject import add_lora
from ossia.adapters.io import save_adapter
from ossia.adapters.origin import check_origin, fingerprint, origin_of
from ossia.errors import OssiaError
from ossia.export.merge import merge
from ossia.model.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.gpt_oss(tmp_path_factory.mktemp("origin") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "adapter"
    save_adapter(add_lora(load_model(base), rank=2), folder, str(base))
    return folder


def changed(base, folder, name, change):
    """The base with one tensor changed."""
    shutil.copytree(base, folder)
    file = folder / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)
    return folder


def test_goes_with_the_adapter_and_is_that_of_the_unchanged_merge(base, adapter, tmp_path):
    assert origin_of(adapter) == fingerprint(base)
    # An adapter that is untrained adds nothing: the base in transformers' layout, bfloat16 and float32.
    for dtype in (torch.bfloat16, torch.float32):
        assert fingerprint(merge(base, adapter, tmp_path / str(dtype), dtype, 10**9)) == fingerprint(base)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.self_attn.q_proj.weight", lambda t: t + 0.01),
        ("model.norm.weight", lambda t: t * 1.01),
        ("model.layers.0.mlp.experts.down_proj_scales", lambda t: t + 1),
    ],
)
def test_other_weights_of_the_same_shapes_are_told(base, adapter, tmp_path, name, change):
    other = changed(base, tmp_path / "other", name, change)
    with pytest.raises(OssiaError, match=r"it was trained on .*base, whose weights are not those in .*other"):
        check_origin(adapter, other)
    with pytest.raises(OssiaError, match="adapter of another base model"):
        merge(other, adapter, tmp_path / "out", None, 10**9)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_tools_have_none_and_pass(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_model.safetensors"
    save_file(load_file(file), file)
    assert origin_of(tmp_path / "plain") is None
    check_origin(tmp_path / "plain", changed(base, tmp_path / "other", "model.norm.weight", lambda t: t * 2))
