"""`ossia bench` and the benchmarks' tables."""

from __future__ import annotations

import json

import pytest
from benchmarks.train import table


def test_bench_measures_and_writes_json(ossia, tmp_path):
    out = tmp_path / "figures.json"
    flags = ("--size", "tiny", "--max_length", 32, "--max_steps", 4, "--profile", "true", "--result_path", out)
    said = ossia.ok("bench", *flags)
    assert "busy, of" in said
    assert "tokens/s" in said.splitlines()[-1]
    figures = json.loads(out.read_text())
    assert figures["slowest"] <= figures["tokens_per_second"] <= figures["fastest"]
    assert figures["kernels"][0]["milliseconds"] >= figures["kernels"][-1]["milliseconds"]
    assert {"torch", "transformers", "device"} <= figures["environment"].keys()
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "2"], "--max_steps is 2; it must be at least 3"),
        (["--max_length", "1"], "--max_length is 1"),
        (["--memory_budget", "lots"], "--memory_budget got 'lots'; it takes a size such as 16GB"),
        (["--size", "7b"], "--size got '7b'"),
        (["--result_path", "nowhere/f.json"], "--result_path nowhere/f.json: no such folder"),
    ],
)
def test_bad_flags(ossia, flags, message):
    done = ossia("bench", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_readme_shows_the_newest_results(readme):
    assert table.written(readme) == (table.ROOT / readme).read_text(encoding="utf-8"), (
        "python benchmarks/train/table.py --write"
    )
