"""Kernels whose tiles grow with a model's sizes fit a program's shared memory, on cards that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# 120b has 128 experts. A program may have 99 KB on Ampere's and Ada's consumer cards, 227 KB on Hopper.
SCRIPT = """
import json
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from ossia.kernels.route import triton as route

def shared(capability, experts):
    tile = dict(route.tile_for(experts))
    options = {"num_warps": tile.pop("num_warps")}
    kernel = route._forward
    constants = dict(E=experts, K=4, EP=max(16, experts), KP=4, EXACT=True, **tile)
    types = dict(hidden="*bf16", router="*fp32", bias="*fp32", index="*i64", weight="*fp32", T="i32", H="i32")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(number,): [["tt.divisibility", 16]] for number, name in enumerate(kernel.arg_names)
                  if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

print(json.dumps([[c, e, shared(c, e)] for c in (86, 90) for e in (4, 32, 64, 128)]))
"""


def test_routing_fits_whatever_the_number_of_experts(tmp_path):
    pytest.importorskip("triton")
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for capability, experts, shared in json.loads(done.stdout.splitlines()[-1]):
        assert shared <= {86: 99 << 10, 90: 227 << 10}[capability], (capability, experts)
